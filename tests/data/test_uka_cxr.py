"UKA-CXR, quirk by quirk, on an invented look-alike"
import shutil
from pathlib import Path
import numpy as np, pandas as pd, pytest

from medprivacy.core import DataError, LeakageError
from medprivacy.data.uka_cxr import fake_uka_cxr, read_uka_cxr

EIGHT = ['cardiomegaly', 'congestion', 'pleural_effusion_right', 'pleural_effusion_left', 'pneumonic_infiltrates_right',
         'pneumonic_infiltrates_left', 'atelectasis_right', 'atelectasis_left']
BASE = 'UKA/chest_radiograph'
LIST = f'{BASE}/master_list.csv'


@pytest.fixture(scope='module')
def made(tmp_path_factory): return fake_uka_cxr(tmp_path_factory.mktemp('made')/'u', 20)

@pytest.fixture
def root(made, tmp_path): return Path(shutil.copytree(made, tmp_path/'u'))


def table(root): return pd.read_csv(root/LIST, dtype=str, keep_default_na=False)

def edit(root, change):
    "Rewrite the master list through `change(df)`, which changes it in place or returns another"
    df = table(root); new = change(df)
    (df if new is None else new).to_csv(root/LIST, index=False)

def put(row, column, value):
    def _put(df): df.loc[row, column] = value
    return _put

def kind(df, digit): return df.patient_id.astype(str).str[-1] == str(digit)

def by_image(root): return read_uka_cxr(root).df.set_index('image_id')


def test_layout(root):
    "Images stand in a folder named by the column `subset`"
    r, t = read_uka_cxr(root), table(root).set_index('image_id')
    assert r.name == 'uka_cxr' and r.patient_known and len(r) == len(t)
    for i,p in zip(r.df.image_id, r.df.path): assert p.endswith(f'UKA_preprocessed/{t.subset[i]}/{i}.jpg')

def test_folder_of_256_pixels(tmp_path):
    r = read_uka_cxr(fake_uka_cxr(tmp_path/'s', 20, side=256))
    assert all('UKA_preprocessed256/' in p for p in r.df.path)

def test_patient_is_subject_id(root):
    df, t = by_image(root), table(root).set_index('image_id')
    assert (df.patient_id == t.subject_id[df.index]).all() and df.patient_id.nunique() == 20

def test_image_key_named_patient_id(root):
    "A few tables call the image key `patient_id`: it is no grouping key"
    before = by_image(root)
    edit(root, lambda df: df.rename(columns={'image_id': 'patient_id'})); after = by_image(root)
    assert after.patient_id.equals(before.patient_id) and after.path.equals(before.path)

def test_sex(root):
    "M, F; anything else is unknown, and not female as in the published code"
    df, t = by_image(root), table(root).set_index('image_id')
    for code,sex in (('M', 'M'), ('F', 'F')): assert set(df.sex[t.patient_sex[df.index] == code]) == {sex}
    for code in ('O', ''):
        at = t.patient_sex[df.index] == code
        assert at.any() and df.sex[at].isna().all() and set(t.gender[df.index][at]) == {'1'}

def test_sex_code_never_seen(root):
    "Null or an error, never a guess"
    edit(root, put(0, 'patient_sex', 'Q'))
    try: assert by_image(root).sex[table(root).image_id[0]] is None
    except DataError as e: assert 'patient_sex' in str(e)

def test_age_from_dates(root):
    "Twenty-eight days are not a twelfth of a year: the age comes from the dates, not from the column `age`"
    df, t = by_image(root), table(root).set_index('image_id').loc[by_image(root).index]
    exact = (pd.to_datetime(t.examination_date) - pd.to_datetime(t.birth_date)).dt.days/365.25
    known = df.age.notna()
    assert known.any() and (df.age - exact)[known].abs().max() < .003
    assert (df.age - t.age.astype(float))[known].abs().max() > .003

def test_age_column_is_not_trusted(root):
    before = by_image(root).age; edit(root, lambda df: df.assign(age='33.0'))
    assert before.equals(by_image(root).age)

@pytest.mark.parametrize('digit,what', [(4, 'zero'), (8, 'above 120'), (9, 'negative')])
def test_age_range(root, digit, what):
    "Kept only in (0, 120]"
    df = read_uka_cxr(root).df; odd, first = kind(df, digit), df.drop_duplicates('patient_id').index
    assert odd.any() and df.age[first][odd[first]].isna().all()
    if digit != 4: assert df.age[odd].isna().all()                # a later visit of a newborn has an age
    assert df.age[~(kind(df, 4) | kind(df, 8) | kind(df, 9))].between(19, 90).all()

def test_date_that_is_no_date(root):
    edit(root, put(0, 'birth_date', '31.12.1950'))
    with pytest.raises(DataError, match='birth_date'): read_uka_cxr(root)

def test_blank_date(root, capsys):
    "The age is that of the table, and such rows are counted"
    edit(root, put(0, 'birth_date', '')); i = table(root).image_id[0]
    assert by_image(root).age[i] == pytest.approx(float(table(root).age[0])) and '1 row(s) lack a date' in capsys.readouterr().out

def test_sex_and_gender_contradict(root):
    "0 is male and 1 is female; a table that says otherwise is refused"
    edit(root, lambda df: df.assign(gender=1 - df.gender.astype(int)))
    with pytest.raises(DataError, match='gender'): read_uka_cxr(root)

def test_eight_labels(root):
    "Pneumothorax is in the table, and not among the labels by default"
    assert list(read_uka_cxr(root).labels) == EIGHT
    assert read_uka_cxr(root, ['pneumothorax_left']).labels == ('pneumothorax_left',)

@pytest.mark.parametrize('label', EIGHT)
def test_severity(root, label):
    "3 and 4 are positive, 1 and 2 negative"
    df, t = by_image(root), table(root).set_index('image_id')
    for code,y in (('1', 0), ('2', 0), ('3', 1), ('4', 1)): assert set(df[label][t[label][df.index] == code]) == {float(y)}

@pytest.mark.parametrize('code', ['0', '5', '-1', '2.5', 'severe'])
def test_unknown_severity(root, code):
    "A sibling release counts from 0: that must not pass as negative"
    edit(root, put(3, 'congestion', code))
    with pytest.raises(DataError, match='congestion'): read_uka_cxr(root)

def test_severity_is_an_argument(root):
    "Codes from 0, and -1 for not assessable"
    edit(root, lambda df: df.assign(**{l: (df[l].astype(int) - 1).astype(str) for l in EIGHT}))
    edit(root, put(3, 'cardiomegaly', '-1')); i = table(root).image_id[3]
    r = read_uka_cxr(root, severity={-1: None, 0: 0, 1: 0, 2: 0, 3: 1, 4: 1}); df, t = r.df.set_index('image_id'), table(root).set_index('image_id')
    assert np.isnan(df.cardiomegaly[i]) and set(df.congestion[t.congestion[df.index] == '3']) == {1.} and set(df.congestion[t.congestion[df.index] == '2']) == {0.}

def test_severity_of_one_label(root):
    "A map for the heart alone, with -1 for not assessable; the others keep the default"
    edit(root, put(3, 'cardiomegaly', '-1')); t = table(root).set_index('image_id')
    df = read_uka_cxr(root, severity={'cardiomegaly': {-1: None, 1: 0, 2: 1, 3: 1, 4: 1}}).df.set_index('image_id')
    assert np.isnan(df.cardiomegaly[t.index[3]]) and set(df.cardiomegaly[t.cardiomegaly[df.index] == '2']) == {1.}
    assert df.congestion.equals(by_other(root).congestion)
    with pytest.raises(ValueError, match='cardio'): read_uka_cxr(root, ['congestion'], severity={'cardiomegaly': {1: 0}})

def by_other(root): return read_uka_cxr(root, EIGHT[1:]).df.set_index('image_id')

@pytest.mark.parametrize('wrong', [{}, {1: 0, 3: 2}, {'congestion': {}}])
def test_wrong_severity(root, wrong):
    with pytest.raises(ValueError, match='severity'): read_uka_cxr(root, severity=wrong)

def test_blank_severity(root):
    "Unknown or an error, never negative"
    edit(root, put(3, 'congestion', '')); i = table(root).image_id[3]
    try: assert np.isnan(by_image(root).congestion[i])
    except DataError as e: assert 'congestion' in str(e)

def test_older_name_of_atelectasis(root):
    before = read_uka_cxr(root)
    edit(root, lambda df: df.rename(columns={f'atelectasis_{s}': f'disturbances_{s}' for s in ('right', 'left')})); after = read_uka_cxr(root)
    assert after.labels == before.labels and after.df[EIGHT].equals(before.df[EIGHT])

def test_left_and_right_are_apart(root):
    df = read_uka_cxr(root).df
    assert not df.pleural_effusion_right.equals(df.pleural_effusion_left) and not df.atelectasis_right.equals(df.atelectasis_left)

def test_further_columns(root):
    before = read_uka_cxr(root); edit(root, lambda df: df.assign(comorbidities='', healthy='0'))
    assert read_uka_cxr(root).df[EIGHT].equals(before.df[EIGHT])

def test_official_split(root):
    df, t = by_image(root), table(root).set_index('image_id')
    assert (df.split == t.split[df.index]).all() and set(df.split) == {'train', 'test'}

def test_split_with_a_patient_on_two_sides(root):
    def _move(df):
        row = df.index[df.subject_id == df.subject_id[df.subject_id.duplicated()].iloc[0]][0]
        df.loc[row, 'split'] = 'test' if df.split[row] == 'train' else 'train'
    edit(root, _move)
    with pytest.raises(LeakageError): read_uka_cxr(root)

def test_unknown_split(root):
    "A row outside train, valid and test is named, not put anywhere"
    edit(root, put(0, 'split', 'fold1'))
    with pytest.raises(DataError, match='split'): read_uka_cxr(root)

def test_missing_split(root):
    "Null or an error"
    edit(root, put(0, 'split', ''))
    try: assert pd.isna(by_image(root).split[table(root).image_id[0]])
    except DataError as e: assert 'split' in str(e)

def test_published_counts(root, capsys):
    read_uka_cxr(root); out = capsys.readouterr().out
    assert ('193,311' in out or '193311' in out) and 'WARNING' in out

@pytest.mark.parametrize('below', ['UKA', 'UKA/chest_radiograph'])
def test_root_is_any_folder_on_the_way(root, below):
    r = read_uka_cxr(root/below)
    assert len(r) == len(table(root)) and all((r.root/p).is_file() for p in r.df.path)

def test_images_in_the_root(root):
    "The public code has them beside the table; copies keep them apart"
    (root/BASE/'UKA_preprocessed').rename(root/'UKA_preprocessed')
    assert read_uka_cxr(root).df.path.str.startswith('UKA_preprocessed/').all()

def test_missing_master_list(root):
    (root/LIST).unlink()
    with pytest.raises(DataError, match='master_list.csv'): read_uka_cxr(root)

def test_missing_image_folder(root):
    (root/BASE/'UKA_preprocessed').rename(root/BASE/'elsewhere')
    with pytest.raises(DataError, match='UKA_preprocessed'): read_uka_cxr(root)

def test_missing_image(root):
    r = read_uka_cxr(root); (root/r.df.path[0]).unlink()
    with pytest.raises(DataError, match=r.df.image_id[0]): read_uka_cxr(root)
    assert len(read_uka_cxr(root, missing='drop')) == len(r) - 1 and len(read_uka_cxr(root, missing='keep')) == len(r)

def test_duplicate_image(root):
    edit(root, lambda df: pd.concat([df, df.iloc[:1]]))
    with pytest.raises(DataError, match='unique|twice|duplicate'): read_uka_cxr(root)

def test_blank_subject(root):
    edit(root, put(0, 'subject_id', ''))
    with pytest.raises(DataError): read_uka_cxr(root)


def test_a_birthday_completes_a_year(root):
    "Thirty on the birthday, not 29.9986: bands are closed on the left"
    def change(df):
        df.loc[[0, 1], 'birth_date'] = '1980-03-01'
        df.loc[0, 'examination_date'], df.loc[1, 'examination_date'] = '2010-03-01', '2010-02-28'
    edit(root, change)
    df, ids = by_image(root), table(root).image_id
    assert df.age[ids[0]] == 30 and 29.9 < df.age[ids[1]] < 30
