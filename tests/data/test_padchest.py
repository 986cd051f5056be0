"PadChest: every quirk of its table on a look-alike"
import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from medprivacy.core import ConfigError, DataError
from medprivacy.data.load import records_dls
from medprivacy.data.padchest import fake_padchest, read_padchest
from medprivacy.data.split import check_disjoint, split_patients

CSV = 'PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv'
TWO = ['cardiomegaly', 'pleural effusion']


@pytest.fixture
def root(tmp_path): return fake_padchest(tmp_path/'padchest', n_patients=20)

def table(root): return pd.read_csv(root/CSV, dtype=object)

def spoil(root, col, value, row=6):
    "Write `value` into one cell of the table; row 6 is a frontal film of patient 1"
    df = table(root); df.loc[row, col] = value
    df.to_csv(root/CSV, index=False)
    return root

def by_file(r): return r.df.assign(file=r.df.path.map(lambda p: Path(p).name)).set_index('file')

def both(root, **kw):
    "The raw rows that were read, and the records, in one order"
    df = by_file(read_padchest(root, TWO, **kw))
    raw = table(root).set_index('ImageID')
    return raw.loc[df.index], df


def planted(root):
    "The one file of the look-alike that PIL cannot decode"
    def whole(p):
        try:
            with Image.open(p) as im: im.load()
        except OSError: return False
        return True
    (bad,) = [p for p in sorted(root.rglob('*.png')) if not whole(p)]
    return bad


def test_same_rows(root):
    raw, df = both(root)
    assert len(raw) > 20 and df.patient_id.astype(str).tolist() == raw.PatientID.tolist()
    r = read_padchest(root)
    assert r.name == 'padchest' and r.patient_known and all((r.root/p).is_file() for p in r.df.path)
    assert df.study_id.astype(str).tolist() == raw.StudyID.tolist() and df.device.tolist() == raw.Manufacturer_DICOM.tolist()


def test_images_lie_in_numbered_folders(root):
    raw, df = both(root)
    assert [Path(p).parts[-2:] for p in df.path] == list(zip(raw.ImageDir, raw.index))


def test_compressed_table(root):
    want = len(read_padchest(root))
    (root/f'{CSV}.gz').write_bytes(gzip.compress((root/CSV).read_bytes())); (root/CSV).unlink()
    assert len(read_padchest(root)) == want


def test_age_is_study_year_less_birth_year(root):
    raw, df = both(root)
    want = raw.StudyDate_DICOM.str[:4].astype(float) - raw.PatientBirth.astype(float)
    ok = (want > 0) & (want <= 120)
    assert ok.sum() > 10 and df.age[ok].tolist() == want[ok].tolist()


def test_unknown_birth_is_unknown_age(root):
    raw, df = both(root)
    assert raw.PatientBirth.isna().any() and df.age[raw.PatientBirth.isna()].isna().all()


def test_impossible_birth_is_unknown_age(root, capsys):
    raw, df = both(root)
    old = raw.PatientBirth.astype(float) == 1800
    assert old.any() and df.age[old].isna().all()
    assert f' {int(old.sum())} age' in capsys.readouterr().out


@pytest.mark.parametrize('date', ['2014', '20141', '2014-05-01', '20141301', 'May'])
def test_study_date_of_another_form(root, date):
    with pytest.raises(DataError, match=date): read_padchest(spoil(root, 'StudyDate_DICOM', date))


@pytest.mark.parametrize('year', ['19450101', 'old'])
def test_birth_of_another_form(root, year):
    "A date where a year is expected is no age of minus some million"
    with pytest.raises(DataError, match=year): read_padchest(spoil(root, 'PatientBirth', year))


def test_sex_other_than_m_and_f_is_unknown(root):
    raw, df = both(root)
    mf = raw.PatientSex_DICOM.isin(['M', 'F'])
    assert df.sex[mf].tolist() == raw.PatientSex_DICOM[mf].tolist()
    assert {'O'} == set(raw.PatientSex_DICOM[~mf].dropna()) and raw.PatientSex_DICOM.isna().any() and df.sex[~mf].isna().all()


def test_views(root):
    raw, df = both(root)
    assert set(df['view'].dropna()) <= {'PA', 'AP', 'L'}
    for p in ('PA', 'AP', 'L'): assert (df['view'][raw.Projection == p] == p).all()
    assert {'PA', 'AP'} <= set(df['view'])


def test_supine_is_ap(root):
    raw, df = both(root)
    assert df['view'][raw.Projection == 'AP_horizontal'].tolist() == ['AP']


def test_excluded_films_are_left_out(root):
    raw, df = both(root)
    assert 'EXCLUDE' in set(table(root).Projection) and 'EXCLUDE' not in set(raw.Projection)


def test_ribs_are_no_chest_view(root):
    raw, df = both(root)
    assert 'COSTAL' in set(table(root).Projection) and df['view'][raw.Projection == 'COSTAL'].isna().all()


def test_labels_are_the_text_of_a_list(root):
    raw, df = both(root)
    some = raw.Labels.notna()
    for l in TWO: assert df[l][some].tolist() == [float(l in [s.strip() for s in eval(t)]) for t in raw.Labels[some]], l


def test_blanks_around_labels_are_stripped(root):
    f = table(root).ImageID[0]
    assert table(root).Labels[0] == "[' cardiomegaly', 'pleural effusion ']"
    assert by_file(read_padchest(root, TWO)).loc[f, TWO].tolist() == [1, 1]


def test_empty_labels_in_a_list_are_dropped(root):
    f = table(root).ImageID[1]
    assert by_file(read_padchest(root, TWO)).loc[f, TWO].tolist() == [0, 0]


def test_row_without_labels_is_unknown_not_normal(root):
    raw, df = both(root)
    assert raw.Labels.isna().sum() == 1 and df.loc[raw.Labels.isna(), TWO].isna().all().all() and df.loc[raw.Labels.notna(), TWO].notna().all().all()


def test_whole_names_not_substrings(root):
    "`effusion` alone, or a longer name, is not `pleural effusion`"
    f = table(root).ImageID[6]
    df = by_file(read_padchest(spoil(root, 'Labels', "['loculated pleural effusion', 'effusion']"), TWO))
    assert df['pleural effusion'][f] == 0


@pytest.mark.parametrize('text', ["['normal'", 'normal', "{'normal': 1}", "['normal', 3]", "'cardiomegaly'"])
def test_labels_that_are_no_list(root, text):
    with pytest.raises(DataError, match='Labels'): read_padchest(spoil(root, 'Labels', text))


def test_labels_are_parsed_not_run(root, tmp_path):
    mark = tmp_path/'was_run'
    with pytest.raises(DataError): read_padchest(spoil(root, 'Labels', f"[open({str(mark)!r}, 'w').name]"))
    assert not mark.exists()


def test_physicians_only(root):
    n = (table(root).MethodLabel == 'Physician').sum()
    raw, df = both(root, only_physician=True)
    assert set(raw.MethodLabel) == {'Physician'} and 0 < len(df) <= n
    assert len(df) < len(read_padchest(root))


def test_report_text_is_not_kept(root):
    r = read_padchest(root)
    assert 'Report' not in r.df and not (r.df.astype(str) == 'invented text').any().any()


def test_missing_image_is_left_out_with_a_count(root, capsys):
    "Some twenty files of the release are missing: they are left out unless asked otherwise"
    gone = [f for f,d in zip(table(root).ImageID, table(root).ImageDir) if not (root/d/f).exists()]
    capsys.readouterr()
    df = by_file(read_padchest(root))
    assert len(gone) == 1 and gone[0] not in df.index and '1 of' in capsys.readouterr().out
    cut = planted(root)
    cut.write_bytes(next(p for p in root.rglob('*.png') if p != cut).read_bytes())
    with pytest.raises(DataError, match=gone[0]): read_padchest(root, missing='raise')
    assert gone[0] in by_file(read_padchest(root, missing='keep')).index


def test_truncated_image_is_left_out_with_a_count(root, capsys):
    "Some files of the release are truncated: left out with a count; if kept, an error when they are decoded, never a silent zero"
    f = planted(root).name
    capsys.readouterr()
    assert f not in by_file(read_padchest(root)).index and '1 of' in (out := capsys.readouterr().out) and 'truncated' in out
    with pytest.raises(DataError, match=f): read_padchest(root, missing='raise')
    r = read_padchest(root, missing='keep')
    r = r.select(where=[(r.root/p).is_file() for p in r.df.path])
    r = r.with_split(['train']*(len(r)-2) + ['valid', 'test'])
    with pytest.raises(DataError, match=f): records_dls(r, 'sex', size=32, bs=4, bits=16, device='cpu').one_batch()


@pytest.mark.parametrize('value,share', [(32768, .5), (255, .004), (65535, 1.)])
def test_sixteen_bits_are_scaled_by_65535(root, value, share):
    df = table(root)
    Image.fromarray(np.full((40, 40), value, np.uint16)).save(root/df.ImageDir[0]/df.ImageID[0])
    r = read_padchest(root, TWO)
    assert r.bits == 16
    i = by_file(r).index.get_loc(df.ImageID[0])
    r = r.with_split(np.where(np.arange(len(r)) == i, 'train', 'valid'))
    x = records_dls(r, 'labels', size=32, bs=1, bits=16, device='cpu').train.fetch([0])[0]
    assert x.shape[1:] == (1, 32, 32) and (x - share).abs().max() < .005


@pytest.mark.parametrize('col,value', [('Projection', 'OBLIQUE'), ('MethodLabel', 'Guess')])
def test_unknown_code(root, col, value):
    with pytest.raises(DataError, match=value): read_padchest(spoil(root, col, value))


def test_missing_table(root):
    (root/CSV).unlink()
    with pytest.raises(DataError, match='PADCHEST'): read_padchest(root)


def test_missing_root_says_where_to_apply(tmp_path):
    with pytest.raises(DataError, match='bimcv'): read_padchest(tmp_path/'nowhere')


def test_image_folder_that_leaves_the_root(root):
    with pytest.raises(DataError, match=r'\.\.'): read_padchest(spoil(root, 'ImageDir', '../../elsewhere'), missing='keep')


def test_duplicate_image(root):
    df = table(root)
    pd.concat([df, df[:1]]).to_csv(root/CSV, index=False)
    with pytest.raises(DataError, match='unique'): read_padchest(root)


def test_unknown_label_is_refused(root):
    with pytest.raises((ConfigError, DataError), match='cardiomegalie'): read_padchest(root, ['cardiomegalie'])


def test_no_official_split(root):
    r = read_padchest(root)
    assert r.df.split.isna().all()
    check_disjoint(split_patients(r))


def test_counts_differ_from_published(root, capsys):
    read_padchest(root)
    assert 'WARNING' in capsys.readouterr().out


def test_rows_left_out_on_purpose_do_not_change_the_published_count(root, capsys):
    n, patients = len(table(root)), table(root).PatientID.nunique()
    read_padchest(root, only_physician=True)
    assert f'here {n} of {patients}' in capsys.readouterr().out


def test_report_text_is_not_read(root, monkeypatch):
    import medprivacy.data.padchest as m
    seen, real = [], m.read_csv
    monkeypatch.setattr(m, 'read_csv', lambda *a, **kw: seen.append(real(*a, **kw)) or seen[-1])
    read_padchest(root)
    assert 'Report' in table(root) and not {'Report', 'LabelsLocalizationsBySentence'} & set(seen[0])


def test_age_as_computed_is_kept(root):
    df = read_padchest(root).df
    assert (df.age_raw > 120).any() and df.age.max() <= 120


def test_a_blank_folder_leads_nowhere_else(root, capsys):
    "Without a folder the path would begin with a slash"
    f = table(root).ImageID[6]
    spoil(root, 'ImageDir', None)
    assert f not in set(read_padchest(root).df.image_id) and 'ImageDir is blank in 1 row' in capsys.readouterr().out
    assert not any(p.startswith('/') for p in read_padchest(root, missing='keep').df.path)
