"VinDr-CXR: every quirk of its tables and DICOM files on a look-alike"
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest

from medprivacy.core import ConfigError, DataError
from medprivacy.data.dicom import write_dicom
from medprivacy.data.load import drop_unreadable, load_images, records_dls
from medprivacy.data.vindr_cxr import fake_vindr_cxr, read_vindr_cxr

TRAIN, TEST = 'annotations/image_labels_train.csv', 'annotations/image_labels_test.csv'


@pytest.fixture
def root(tmp_path): return fake_vindr_cxr(tmp_path/'vindr', n_patients=20)

def table(root, csv=TRAIN): return pd.read_csv(root/csv, dtype=object)

def spoil(root, change, csv=TRAIN):
    "Rewrite a table: `change` takes it and gives the new one"
    change(table(root, csv)).to_csv(root/csv, index=False)
    return root

def set_cell(col, value):
    def _set(df): df.loc[0, col] = value; return df
    return _set

def by_id(r): return r.df.set_index('image_id')

def tags(root):
    "Tags of every film, read with pydicom"
    ds = {f.stem: pydicom.dcmread(f, stop_before_pixels=True) for f in sorted(root.glob('*/*.dicom'))}
    return pd.DataFrame({k: [str(d.PatientSex), str(d.PatientAge), d.PhotometricInterpretation, d.BitsStored] for k,d in ds.items()},
                        index=['sex', 'age', 'mono', 'bits']).T


def test_one_row_per_film(root):
    "Three rows per film become one"
    r = read_vindr_cxr(root)
    assert len(table(root)) == 3*16 and len(r) == 20 and r.df.image_id.is_unique and r.name == 'vindr_cxr'
    assert all((r.root/p).is_file() and p.endswith('.dicom') for p in r.df.path)


def test_majority_of_three_readers(root):
    votes = table(root).set_index('image_id').drop(columns='rad_id').astype(int).groupby(level=0).sum()
    r = read_vindr_cxr(root); df = by_id(r)
    assert {0, 1, 2, 3} == set(votes.Cardiomegaly)
    for l in r.labels:
        if l in votes: assert df.loc[votes.index, l].tolist() == (votes[l] >= 2).astype(float).tolist(), l


def test_vote_count_is_kept(root):
    "A column of votes for each label, as `votes_<label>`"
    votes = table(root).set_index('image_id').drop(columns='rad_id').astype(int).groupby(level=0).sum()
    df = by_id(read_vindr_cxr(root))
    assert df.loc[votes.index, 'votes_Cardiomegaly'].tolist() == votes.Cardiomegaly.tolist()


def test_consensus_row_of_a_test_film(root):
    want, df = table(root, TEST).set_index('image_id'), by_id(read_vindr_cxr(root))
    assert df.loc[want.index, 'Pleural effusion'].tolist() == want['Pleural effusion'].astype(float).tolist()
    assert set(df.index[df.split == 'test']) == set(want.index)
    assert set(df.split[~df.index.isin(want.index)]) <= {'train', 'valid'}


def test_other_disease_and_other_diseases_are_one(root):
    r = read_vindr_cxr(root)
    other = [l for l in r.labels if l.lower().startswith('other disease')]
    assert len(other) == 1 and r.df[other[0]].notna().all()
    df, want = by_id(r), table(root, TEST).set_index('image_id')['Other disease'].astype(float)
    assert df.loc[want.index, other[0]].tolist() == want.tolist()


def test_sex_and_age_from_the_header(root):
    df, t = by_id(read_vindr_cxr(root)), tags(root)
    for k in t.index:
        assert df.sex[k] == t.sex[k] if t.sex[k] in ('M', 'F') else pd.isna(df.sex[k])
        if t.age[k] not in ('', '000Y', '150Y'): assert df.age[k] == int(t.age[k][:3])


def test_sex_gaps_are_unknown(root):
    df, t = by_id(read_vindr_cxr(root)), tags(root)
    assert {'', 'O'} < set(t.sex) and df.sex[t.index[t.sex.isin(['', 'O'])]].isna().all()


def test_age_gaps_and_impossible_ages_are_unknown(root, capsys):
    df, t = by_id(read_vindr_cxr(root)), tags(root)
    bad = t.index[t.age.isin(['', '000Y', '150Y'])]
    assert len(bad) == 3 and df.age[bad].isna().all() and df.age.notna().sum() == len(df)-3
    assert ' 2 age' in capsys.readouterr().out


def test_no_patient_id(root):
    r = read_vindr_cxr(root)
    assert not r.patient_known and r.df.patient_id.tolist() == r.df.image_id.tolist()


def test_unknown_sex_in_the_header(root):
    write_dicom(root/'train'/f'{table(root).image_id[0]}.dicom', np.full((32, 32), 9, np.uint16), sex='X', age='058Y')
    with pytest.raises(DataError, match="(?i)'x'"): read_vindr_cxr(root)


def test_tags_are_read_once(root, monkeypatch):
    "The second reading opens no film"
    first, n, real = read_vindr_cxr(root), [], pydicom.dcmread
    def counted(*a, **kw): n.append(a); return real(*a, **kw)
    monkeypatch.setattr(pydicom, 'dcmread', counted)
    import medprivacy.data.dicom, medprivacy.data.vindr_cxr
    for m in (medprivacy.data.dicom, medprivacy.data.vindr_cxr):
        for name in ('dcmread', 'dicom_tags'):
            if hasattr(m, name):
                def boom(*a, **kw): n.append(a); raise AssertionError('a film was opened')
                monkeypatch.setattr(m, name, boom)
    again = read_vindr_cxr(root)
    assert not n
    pd.testing.assert_frame_equal(first.df, again.df, check_dtype=False)


def test_films_come_the_right_way_round(root):
    "MONOCHROME1 is inverted: the corner that is black on every film is black, the white one white, at every bit depth"
    r, t = read_vindr_cxr(root), tags(root)
    assert set(t.mono) == {'MONOCHROME1', 'MONOCHROME2'} and set(t.bits) == {12, 14, 16}
    r = r.with_split(['train']*18 + ['valid', 'test'])
    x = records_dls(r, 'Cardiomegaly', size=32, bs=4, device='cpu').train.fetch(range(18))[0]
    assert x.shape[1:] == (1, 32, 32) and 0 <= x.min() and x.max() <= 1
    assert (x[:, 0, 0, 0] < .05).all() and (x[:, 0, -1, -1] > .95).all()


@pytest.mark.parametrize('image', ['../../elsewhere/film', '/elsewhere/film'])
def test_image_id_that_leaves_the_root(root, image, monkeypatch):
    "Refused before any header is read"
    import medprivacy.data.vindr_cxr as module
    def boom(*a): raise AssertionError('a film was opened')
    monkeypatch.setattr(module, 'dicom_tags', boom)
    with pytest.raises(DataError, match='elsewhere'): read_vindr_cxr(spoil(root, set_cell('image_id', image), TEST), missing='keep')


def test_boxes_are_not_needed(root):
    for f in ('annotations_train.csv', 'annotations_test.csv'): (root/'annotations'/f).unlink()
    assert len(read_vindr_cxr(root)) == 20


def test_two_readers_have_no_majority(root):
    with pytest.raises(DataError, match='(?i)three|3'): read_vindr_cxr(spoil(root, lambda df: df[1:]))


def test_reader_twice_on_one_film(root):
    "The same reader in two of the three rows of a film"
    def change(df):
        mine = df.index[df.image_id == df.image_id[0]]
        df.loc[mine[1], 'rad_id'] = df.rad_id[mine[0]]
        return df
    with pytest.raises(DataError, match='rad_id|reader'): read_vindr_cxr(spoil(root, change))


def test_two_consensus_rows(root):
    with pytest.raises(DataError): read_vindr_cxr(spoil(root, lambda df: pd.concat([df, df[:1]]), TEST))


def test_film_in_both_parts(root):
    def change(df): return pd.concat([df, df[:1].assign(image_id=table(root).image_id[0])])
    with pytest.raises(DataError): read_vindr_cxr(spoil(root, change, TEST))


@pytest.mark.parametrize('csv', [TRAIN, TEST])
@pytest.mark.parametrize('value', ['2', '-1', 'yes'])
def test_unknown_code(root, csv, value):
    with pytest.raises(DataError, match=value): read_vindr_cxr(spoil(root, set_cell('Cardiomegaly', value), csv))


@pytest.mark.parametrize('part', ['train', 'test', TRAIN, TEST])
def test_missing_part(root, part):
    (root/part).rename(root/'elsewhere')
    with pytest.raises(DataError, match=Path(part).stem): read_vindr_cxr(root)


def test_missing_root_says_where_to_apply(tmp_path):
    with pytest.raises(DataError, match='physionet'): read_vindr_cxr(tmp_path/'nowhere')


def test_the_challenge_copy_is_refused(tmp_path):
    "The copy of the challenge has one table of boxes, and no labels of the whole film"
    (tmp_path/'train').mkdir()
    (tmp_path/'train.csv').write_text('image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max\nab,No finding,14,R1,,,,\n')
    with pytest.raises(DataError, match='annotations'): read_vindr_cxr(tmp_path)


def test_missing_film(root, capsys):
    f = table(root).image_id[0]
    (root/'train'/f'{f}.dicom').unlink()
    with pytest.raises(DataError, match=f): read_vindr_cxr(root)
    capsys.readouterr()
    r = read_vindr_cxr(root, missing='drop')
    assert len(r) == 19 and f not in set(r.df.image_id) and '1 ' in capsys.readouterr().out
    r = read_vindr_cxr(root, missing='keep')
    assert len(r) == 20 and pd.isna(by_id(r).sex[f]) and np.isnan(by_id(r).age[f])


def test_fewer_labels(root):
    assert read_vindr_cxr(root, ['Cardiomegaly', 'Nodule/Mass']).labels == ('Cardiomegaly', 'Nodule/Mass')
    with pytest.raises((ConfigError, DataError), match='Goitre'): read_vindr_cxr(root, ['Goitre'])


def test_counts_differ_from_published(root, capsys):
    read_vindr_cxr(root)
    out = capsys.readouterr().out.replace(',', '')
    assert 'WARNING' in out and '18000' in out


def test_rescaling_and_windows_are_applied(root):
    "What the loader gives is what pydicom's modality and VOI steps give, inverted where the film is MONOCHROME1"
    r, n = read_vindr_cxr(root), 0
    for i,p in enumerate(r.df.path):
        ds = pydicom.dcmread(root/p)
        if 'WindowWidth' not in ds: continue
        v = ds.pixel_array*float(ds.RescaleSlope) + float(ds.RescaleIntercept)
        want = ((v - float(ds.WindowCenter) + .5)/(float(ds.WindowWidth) - 1) + .5).clip(0, 1)
        if ds.PhotometricInterpretation == 'MONOCHROME1': want = 1 - want
        got = load_images(r.select(where=r.df.path == p), 32)[0, 0].numpy()/255
        assert np.abs(got - want).max() < .01 and .05 < (want*(1-want) > 0).mean() < 1
        n += 1
    assert n >= 3


@pytest.mark.parametrize('damage', [b'', b'no film at all '*20], ids=['empty', 'text'])
def test_a_damaged_header_is_counted_and_left_out_on_request(root, damage, capsys, tmp_path):
    f = table(root).image_id[0]
    (root/'train'/f'{f}.dicom').write_bytes(damage)
    with pytest.raises(DataError, match=f"1 of 20 headers.*missing='drop'.*{f}"): read_vindr_cxr(root)
    capsys.readouterr()
    r = read_vindr_cxr(root, missing='drop')
    assert len(r) == 19 and f not in set(r.df.image_id) and 'left out 1 of 20' in capsys.readouterr().out
    r = read_vindr_cxr(root, missing='keep')
    assert pd.isna(by_id(r).sex[f])
    assert len(drop_unreadable(r, tmp_path/'q.csv')) == 19 and f in (tmp_path/'q.csv').read_text()


def test_an_unknown_sex_is_no_damage(root):
    "An unknown code is refused, whatever is done about damaged files"
    write_dicom(root/'train'/f'{table(root).image_id[0]}.dicom', np.full((32, 32), 9, np.uint16), sex='X', age='058Y')
    for missing in ('drop', 'keep'):
        with pytest.raises(DataError, match="'X'"): read_vindr_cxr(root, missing=missing)


def test_each_header_is_read_once(root, monkeypatch):
    import medprivacy.data.vindr_cxr as m
    n, real = [], m.dicom_tags
    monkeypatch.setattr(m, 'dicom_tags', lambda p: n.append(p) or real(p))
    read_vindr_cxr(root)
    assert len(n) == len(set(n)) == 20


def test_a_table_of_tags_that_repeats_a_film_is_read_anew(root):
    first, file = read_vindr_cxr(root), root/'dicom_tags.csv'
    lines = file.read_text().splitlines()
    file.write_text('\n'.join([*lines, lines[1]]) + '\n')
    pd.testing.assert_frame_equal(first.df, read_vindr_cxr(root).df, check_dtype=False)
