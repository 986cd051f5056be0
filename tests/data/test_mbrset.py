"mBRSET as its public description has it: each quirk of the release, and each way in which a fact can turn out wrong"
import re, shutil
from pathlib import Path

import numpy as np, pandas as pd, pytest

from medprivacy.core import DataError, MedPrivacyError
from medprivacy.data.mbrset import fake_mbrset, read_mbrset
from medprivacy.data.split import split_patients

TABLE = 'labels_mbrset.csv'


@pytest.fixture(scope='module')
def made(tmp_path_factory): return fake_mbrset(tmp_path_factory.mktemp('made')/'mbrset', 20)

@pytest.fixture
def root(made, tmp_path): return Path(shutil.copytree(made, tmp_path/'mbrset'))


def raw(root): return pd.read_csv(root/TABLE, dtype=str)

def rewrite(root, change, encoding='utf-8'):
    "Let `change` work on the table, in place or by returning a new one"
    df = raw(root); out = change(df)
    (df if out is None else out).to_csv(root/TABLE, index=False, encoding=encoding)

def put(root, column, value, row=0):
    def change(df): df.loc[row, column] = value
    rewrite(root, change)

def read(root, *a, missing='drop', **kw):
    "The records, their table by file name, and the table it was read from, without the missing image"
    recs = read_mbrset(root, *a, missing=missing, **kw)
    df, t = recs.df.set_index(recs.df.path.str.split('/').str[-1]), raw(root).set_index('file')
    return recs, df, t.loc[[f for f in t.index if f in df.index]]


# ---------------------------------------------------------------- the table and the folder

def test_rows_and_columns(root):
    recs, df, t = read(root, missing='keep')
    assert recs.name == 'mbrset' and recs.patient_known and len(df) == len(t) == len(raw(root)) and df.split.isna().all()
    assert recs.df.image_id.is_unique and (df.patient_id[t.index] == t.patient).all()


def test_file_column_already_has_the_suffix(root):
    _, df, t = read(root)
    assert df.path[t.index].tolist() == ['images/' + f for f in t.index]
    assert t.index.str.fullmatch(r'\d+\.[1-4]\.jpg').all() and not df.path.str.contains('.jpg.jpg', regex=False).any()


def test_one_image_is_missing(root, capsys):
    "Some copies lack 985.1.jpg"
    n = len(raw(root)); recs, df, _ = read(root)
    out = capsys.readouterr().out
    assert len(recs) == n-1 and '985.1.jpg' not in df.index and '985.2.jpg' in df.index
    assert re.search(r'\b1\b', out), 'how many were skipped'
    assert '985.1.jpg' in set(read(root, missing='keep')[1].index)
    with pytest.raises(DataError, match=r'985\.1'): read(root, missing='raise')


def test_missing_images_are_skipped_by_default(root): assert len(read_mbrset(root)) == len(raw(root)) - 1


def test_file_of_another_patient(root):
    "A table sorted by single columns gives people the eyes of others"
    put(root, 'file', '2.1.jpg'); put(root, 'file', '1.1.jpg', row=4)
    with pytest.raises(DataError, match='2.1.jpg'): read(root)


def test_four_images_of_a_patient_stay_together(root):
    recs = split_patients(read(root)[0], (.5, .25, .25))
    per = recs.df.groupby('patient_id')
    assert per.size().max() == 4 and per.split.nunique().max() == 1


def test_no_table(root):
    (root/TABLE).rename(root/'table.csv')
    with pytest.raises(DataError) as e: read(root)
    assert TABLE in str(e.value) and 'physionet' in str(e.value)


def test_no_images(root):
    (root/'images').rename(root/'elsewhere')
    with pytest.raises(DataError): read_mbrset(root, missing='raise')


def test_wrong_encoding(root):
    put(root, 'insulin', 'às vezes'); (root/TABLE).write_bytes((root/TABLE).read_text(encoding='utf-8').encode('latin-1'))
    with pytest.raises(DataError, match='UTF-8'): read(root)


def test_duplicate_file(root):
    put(root, 'file', '1.2.jpg')
    with pytest.raises(DataError, match=r'1\.2'): read(root)


def test_published_counts_are_compared(root, capsys):
    read(root)
    out = capsys.readouterr().out
    assert 'WARNING' in out and '5164' in out.replace(',', '') and '1291' in out.replace(',', '')


# ---------------------------------------------------------------- people

def test_sex_is_0_female_1_male(root):
    "The opposite of BRSET's order"
    def blank(df): df.loc[df.patient == '1', 'sex'] = None
    rewrite(root, blank)
    _, df, t = read(root)
    known = t.sex.notna()
    assert df.sex[t.index[known]].tolist() == t.sex[known].map({'0': 'F', '1': 'M'}).tolist() and df.sex.nunique() == 2
    assert df.sex[t.index[~known]].isna().all() and not known.all()


@pytest.mark.parametrize('code', ['2', 'F', '-1'])
def test_unknown_sex(root, code):
    put(root, 'sex', code)
    with pytest.raises(DataError, match='sex'): read(root)


def test_age_of_90_and_more_is_text(root, capsys):
    _, df, t = read(root)
    top = t.age == '>= 90'
    assert top.sum() == 4 and df.age[t.index][top].eq(90).all() and df.age_topcoded[t.index].tolist() == top.tolist()
    assert df.age[t.index][~top].tolist() == t.age[~top].astype(float).tolist() and df.age_raw[t.index].tolist() == t.age.tolist()


def test_age_of_0(root):
    put(root, 'age', '0')
    assert np.isnan(read(root)[1].age['1.1.jpg'])


def test_age_is_no_number(root):
    put(root, 'age', 'about 50')
    with pytest.raises(DataError, match='about 50'): read(root)


def test_eye_is_text(root):
    _, df, t = read(root)
    assert df.laterality[t.index].tolist() == t.laterality.map({'right': 'R', 'left': 'L'}).tolist() and df.laterality.nunique() == 2


def test_unknown_eye(root):
    put(root, 'laterality', 'both')
    with pytest.raises(DataError, match='laterality'): read(root)


def test_one_camera(root): assert read(root)[1].device.str.contains('Phelcom').all()


# ---------------------------------------------------------------- labels

def of_grade(recs): return [l for l in recs.labels if re.search('icdr|retinopathy|(^|_)dr($|_)', l.lower())]


def test_ungraded_is_unknown(root):
    "280 images have no grade: that is not grade 0"
    recs, df, t = read(root)
    assert of_grade(recs) and t.final_icdr.isna().any()
    for l in of_grade(recs):
        assert df[l][t.index].isna().tolist() == t.final_icdr.isna().tolist()
        assert df[l][t.index][t.final_icdr.eq('0.0')].eq(0).all() and df[l][t.index][t.final_icdr.eq('4.0')].ne(0).all()


@pytest.mark.parametrize('grade', ['5', '-1', 'mild', '1.5'])
def test_unknown_grade(root, grade):
    put(root, 'final_icdr', grade)
    with pytest.raises(DataError, match='final_icdr'): read(root)


@pytest.mark.parametrize('column', ['final_edema', 'final_artifacts', 'final_quality'])
def test_yes_and_no_in_any_case(root, column):
    put(root, column, None, row=2)
    recs, df, t = read(root, [column])
    assert recs.labels == (column,) and t[column].nunique() > 2
    want = t[column].str.lower().map({'yes': 1., 'no': 0.})
    pd.testing.assert_series_equal(df[column][t.index], want, check_names=False, check_index_type=False)
    assert np.isnan(df[column]['1.3.jpg'])


@pytest.mark.parametrize('column', ['final_edema', 'final_artifacts', 'final_quality'])
def test_unknown_yes_or_no(root, column):
    put(root, column, 'maybe')
    with pytest.raises(DataError, match=column): read(root, [column])


def test_insurance_blank_is_not_uninsured(root):
    _, df, t = read(root, ['insurance'])
    pd.testing.assert_series_equal(df.insurance[t.index], t.insurance.astype(float), check_names=False, check_index_type=False)
    assert t.insurance.isna().any() and set(df.insurance.dropna()) == {0., 1.}


def test_unknown_insurance(root):
    put(root, 'insurance', '2')
    with pytest.raises(DataError, match='insurance'): read(root, ['insurance'])


def test_education_is_1_to_7_or_unknown(root):
    "A grade of its own, kept as a number beside the labels; 1 is illiterate"
    _, df, t = read(root)
    pd.testing.assert_series_equal(df.educational_level[t.index].astype(float), t.educational_level.astype(float), check_names=False, check_index_type=False)
    assert t.educational_level.isna().any() and {1., 7.} <= set(df.educational_level.astype(float))


@pytest.mark.parametrize('code', ['0', '8', 'primary'])
def test_unknown_education(root, code):
    put(root, 'educational_level', code)
    with pytest.raises(DataError, match='educational_level'): read(root)


def test_wrong_label(root):
    with pytest.raises(MedPrivacyError, match='glaucoma'): read(root, ['glaucoma'])


def test_a_patient_with_odd_signs_is_no_pattern(root):
    def odd(df): df.loc[:3, 'patient'] = '1('
    rewrite(root, odd)
    with pytest.raises(DataError, match=r"row 0.*'1\('"): read_mbrset(root)
