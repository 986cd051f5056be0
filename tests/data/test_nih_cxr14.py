"NIH ChestX-ray14: every quirk of its table on a look-alike, and the published counts on the real table (without images)"
import importlib.util
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from medprivacy.core import ConfigError, DataError, LeakageError
from medprivacy.data.nih_cxr14 import fake_nih_cxr14, read_nih_cxr14

CSV = 'Data_Entry_2017_v2020.csv'
COUNTS = {'Infiltration': 19894, 'Effusion': 13317, 'Atelectasis': 11559, 'Nodule': 6331, 'Mass': 5782, 'Pneumothorax': 5302,
          'Consolidation': 4667, 'Pleural_Thickening': 3385, 'Cardiomegaly': 2776, 'Emphysema': 2516, 'Edema': 2303, 'Fibrosis': 1686,
          'Pneumonia': 1431, 'Hernia': 227}


@pytest.fixture
def root(tmp_path): return fake_nih_cxr14(tmp_path/'nih', n_patients=20)

def table(root): return pd.read_csv(root/CSV, dtype=object)

def spoil(root, col, value, row=3):
    "Write `value` into one cell of the table"
    df = table(root); df.loc[row, col] = value
    df.to_csv(root/CSV, index=False)
    return root

def by_file(r): return r.df.assign(file=r.df.path.map(lambda p: Path(p).name)).set_index('file')


def test_same_rows(root):
    "One row per image, in the coding of the library"
    raw, r = table(root).set_index('Image Index'), read_nih_cxr14(root)
    df = by_file(r).loc[raw.index]
    assert len(r) == len(raw) and r.name == 'nih_cxr14' and r.patient_known
    assert df.sex.tolist() == raw['Patient Gender'].tolist() and df['view'].tolist() == raw['View Position'].tolist()
    assert df.patient_id.astype(int).tolist() == raw['Patient ID'].astype(int).tolist()
    assert all((r.root/p).is_file() for p in r.df.path)


def test_commas_in_brackets_make_eleven_columns(root):
    "The header is split inside its brackets; columns right of it must not shift"
    assert (root/CSV).read_text().splitlines()[0].endswith('OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]')
    assert table(root).shape[1] == 11
    assert set(read_nih_cxr14(root).df['view']) <= {'PA', 'AP'}


def test_older_file_name(root):
    (root/CSV).rename(root/'Data_Entry_2017.csv')
    assert len(read_nih_cxr14(root)) == len(pd.read_csv(root/'Data_Entry_2017.csv'))


def test_patient_sex_is_an_alias(root):
    want = by_file(read_nih_cxr14(root)).sex
    table(root).rename(columns={'Patient Gender': 'Patient Sex'}).to_csv(root/CSV, index=False)
    assert by_file(read_nih_cxr14(root)).sex.equals(want)


def test_age_zero_is_unknown(root):
    df = by_file(read_nih_cxr14(root))
    f = table(root)['Image Index'][0]
    assert np.isnan(df.age[f]) and str(df.age_raw[f]) == '0'


def test_impossible_age_is_unknown(root):
    df = by_file(read_nih_cxr14(root))
    f = table(root)['Image Index'][2]
    assert np.isnan(df.age[f]) and str(df.age_raw[f]) == '414'


def test_age_with_unit(root):
    assert by_file(read_nih_cxr14(root)).age[table(root)['Image Index'][1]] == 60


def test_cleaned_ages_are_counted(root, capsys):
    "Two ages are out of range in the look-alike: 0 and 414"
    read_nih_cxr14(root)
    assert ' 2 age' in capsys.readouterr().out


def test_findings_are_split(root):
    raw, r = table(root).set_index('Image Index'), read_nih_cxr14(root)
    df = by_file(r).loc[raw.index]
    assert set(r.labels) == set(COUNTS)
    for l in COUNTS: assert df[l].tolist() == [float(l in t.split('|')) for t in raw['Finding Labels']], l


def test_no_finding_is_negative_for_all(root):
    raw, df = table(root), by_file(read_nih_cxr14(root))
    none = raw['Image Index'][raw['Finding Labels'] == 'No Finding']
    assert len(none) and (df.loc[none, list(COUNTS)] == 0).all().all()


def test_whole_names_not_substrings(root):
    "A longer name that contains a finding is not that finding"
    with pytest.raises(DataError, match='Effusion_Left'): read_nih_cxr14(spoil(root, 'Finding Labels', 'Effusion_Left'))


def test_fewer_labels(root):
    r = read_nih_cxr14(root, ['Mass', 'Hernia'])
    assert r.labels == ('Mass', 'Hernia') and len(r) == len(table(root))
    with pytest.raises((ConfigError, DataError), match='Hernias'): read_nih_cxr14(root, ['Hernias'])


def test_official_lists(root):
    df = by_file(read_nih_cxr14(root))
    test = (root/'test_list.txt').read_text().split()
    assert set(df.index[df.split == 'test']) == set(test)
    assert set(df.split[~df.index.isin(test)]) <= {'train', 'valid'}


def test_validation_comes_out_of_train_by_patient(tmp_path):
    df = read_nih_cxr14(fake_nih_cxr14(tmp_path/'n', n_patients=60)).df
    assert set(df.split) == {'train', 'valid', 'test'} and (df.split == 'train').sum() > (df.split == 'valid').sum()
    assert (df.groupby('patient_id').split.nunique() == 1).all()


def test_patient_in_both_lists(root):
    "One image of a patient of the training list goes to the test list"
    mine = (root/'train_val_list.txt').read_text().split()
    (root/'train_val_list.txt').write_text('\n'.join(mine[1:]))
    with (root/'test_list.txt').open('a') as f: f.write(mine[0] + '\n')
    with pytest.raises(LeakageError, match="nih_cxr14: 1 patient.s. stand in two values of 'split'"): read_nih_cxr14(root)


def test_image_in_both_lists(root):
    with (root/'test_list.txt').open('a') as f: f.write((root/'train_val_list.txt').read_text().split()[0] + '\n')
    with pytest.raises(LeakageError, match='both lists'): read_nih_cxr14(root)


def test_image_in_no_list(root):
    "No row gets a split by default"
    mine = (root/'train_val_list.txt').read_text().split()
    (root/'train_val_list.txt').write_text('\n'.join(mine[1:]))
    with pytest.raises(DataError, match=mine[0]): read_nih_cxr14(root)


def test_listed_image_that_is_not_in_the_table(root, capsys):
    "The table of a part of the release: said with a count, and the other rows keep their split"
    read_nih_cxr14(root)
    assert 'have no row' not in capsys.readouterr().out
    df, n = table(root), len(table(root))
    df.drop(index=[3, 5]).to_csv(root/CSV, index=False)
    assert read_nih_cxr14(root).df.split.notna().all()
    assert f'WARNING nih_cxr14: 2 of {n} images of the official lists have no row in the table, e.g. {df["Image Index"][3]}' in capsys.readouterr().out


def test_sizes_of_the_official_lists_are_compared(root, capsys):
    read_nih_cxr14(root)
    out = capsys.readouterr().out
    assert '(published 86524)' in out and '(published 25596)' in out
    (root/'test_list.txt').unlink(); (root/'train_val_list.txt').unlink()
    read_nih_cxr14(root)
    assert '(published 86524)' not in capsys.readouterr().out, 'no lists, nothing to compare'


def test_many_images_of_one_patient(root):
    "The number of images a patient is shown, because the patient-level guarantee needs it"
    r = read_nih_cxr14(root)
    assert r.df.groupby('patient_id').size().max() == 12 and ', 12' in repr(r)


def test_boxes_are_not_needed(root):
    (root/'BBox_List_2017.csv').unlink()
    assert len(read_nih_cxr14(root)) == len(table(root))


@pytest.mark.parametrize('col,value', [('Patient Gender', 'X'), ('View Position', 'LL'), ('Patient Age', 'sixty'), ('Finding Labels', 'Effusion|Lump'),
                                       ('Finding Labels', None)])
def test_unknown_code(root, col, value):
    with pytest.raises(DataError, match=value or 'Finding Labels'): read_nih_cxr14(spoil(root, col, value))


@pytest.mark.parametrize('part,words', [(CSV, 'Data_Entry_2017'), ('images', 'are not under .*, e.g. images/'), ('test_list.txt', 'lacks test_list.txt but has'),
                                        ('train_val_list.txt', 'lacks train_val_list.txt but has')])
def test_missing_part(root, part, words):
    (root/part).rename(root/'elsewhere')
    with pytest.raises(DataError, match=words): read_nih_cxr14(root)


def test_missing_root_says_where_to_get_it(tmp_path):
    with pytest.raises(DataError, match='nihcc'): read_nih_cxr14(tmp_path/'nowhere')


def test_missing_image(root, capsys):
    n, f = len(table(root)), table(root)['Image Index'][4]
    (root/'images'/f).unlink()
    with pytest.raises(DataError, match=f.split('.')[0]): read_nih_cxr14(root)
    assert len(read_nih_cxr14(root, missing='keep')) == n
    capsys.readouterr()
    assert len(read_nih_cxr14(root, missing='drop')) == n-1
    assert '1 ' in capsys.readouterr().out, 'the count of dropped rows is printed'


def test_duplicate_image(root):
    df = table(root)
    pd.concat([df, df[:1]]).to_csv(root/CSV, index=False)
    with pytest.raises(DataError, match='unique'): read_nih_cxr14(root)


def test_two_sexes_of_one_patient(root):
    df = table(root); other = {'M': 'F', 'F': 'M'}[df['Patient Gender'][3]]
    with pytest.raises(DataError, match='two sexes'): read_nih_cxr14(spoil(root, 'Patient Gender', other))


def test_counts_differ_from_published(root, capsys):
    read_nih_cxr14(root)
    out = capsys.readouterr().out
    assert 'WARNING' in out and '112120' in out.replace(',', '') and '30805' in out.replace(',', '')


# ---------------------------------------------------------------- the real table, as shipped by torchxrayvision

@pytest.fixture(scope='module')
def real(tmp_path_factory):
    spec = importlib.util.find_spec('torchxrayvision')
    if spec is None: pytest.skip('torchxrayvision is not installed (an extra for development): no real table')
    csv = Path(spec.origin).parent/'data'/'Data_Entry_2017_v2020.csv.gz'
    if not csv.is_file(): pytest.skip('this torchxrayvision ships no table of NIH ChestX-ray14')
    return read_nih_cxr14(tmp_path_factory.mktemp('none'), table=csv, missing='keep')


def test_real_images_and_patients(real): assert len(real) == 112120 and real.df.patient_id.nunique() == 30805
def test_real_sex(real): assert real.df.sex.value_counts().to_dict() == {'M': 63340, 'F': 48780}
def test_real_view(real): assert real.df['view'].value_counts().to_dict() == {'PA': 67310, 'AP': 44810}

@pytest.mark.parametrize('finding', COUNTS)
def test_real_finding(real, finding): assert (real.df[finding] == 1).sum() == COUNTS[finding] and real.df[finding].notna().all()

def test_real_no_finding(real): assert (real.df[list(COUNTS)] == 0).all(axis=1).sum() == 60361

def test_real_images_per_patient(real):
    per = real.df.groupby('patient_id').size()
    assert (per.median(), per.quantile(.99), per.max(), (per == 1).sum()) == (1, 35, 184, 17503)
    assert abs(per.mean() - 3.64) < .005

def test_real_ages(real):
    "0-95 years, with 14 zeros, which are unknown; nothing else is lost"
    age = real.df.age
    assert age.isna().sum() == 14 and age.max() == 95 and age.min() > 0
    assert (real.df.age_raw.astype(str) == '0').sum() == 14

def test_real_table_agrees_with_published(real, tmp_path, capsys):
    "What the reader prints about the real table holds no difference"
    spec = importlib.util.find_spec('torchxrayvision')
    read_nih_cxr14(tmp_path, table=Path(spec.origin).parent/'data'/'Data_Entry_2017_v2020.csv.gz', missing='keep')
    assert 'WARNING' not in capsys.readouterr().out


def test_a_list_that_is_no_text(root):
    (root/'test_list.txt').write_bytes(b'\xff\xfe\x00')
    with pytest.raises(DataError, match='list'): read_nih_cxr14(root)
