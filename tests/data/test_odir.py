"ODIR-5K as its public description has it, as the workbook and as the Kaggle copy: each quirk, and each way in which a fact can turn out wrong"
import re, shutil
from pathlib import Path

import numpy as np, pandas as pd, pytest

from medprivacy.core import DataError, MedPrivacyError
from medprivacy.data.odir import fake_odir, read_odir
from medprivacy.data.split import split_patients

BOOK, KAGGLE = 'ODIR-5K_Training_Annotations(Updated)_V2.xlsx', 'full_df.csv'
NAMES = dict(N='normal', D='diabetes', G='glaucoma', C='cataract', A='amd', H='hypertension', M='myopia', O='other')
FORMS = pytest.mark.parametrize('form', ['xlsx', 'kaggle'])


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "Both forms, made once"
    return {form: fake_odir(tmp_path_factory.mktemp('made')/'o', form=form) for form in ('xlsx', 'kaggle')}

@pytest.fixture
def book(made, tmp_path): return Path(shutil.copytree(made['xlsx'], tmp_path/'book'))
@pytest.fixture
def kaggle(made, tmp_path): return Path(shutil.copytree(made['kaggle'], tmp_path/'kaggle'))
@pytest.fixture
def any_root(request, form): return request.getfixturevalue({'xlsx': 'book', 'kaggle': 'kaggle'}[form])


def raw(root): return pd.read_excel(root/BOOK, dtype=object) if (root/BOOK).exists() else pd.read_csv(root/KAGGLE, dtype=str)

def rewrite(root, change):
    "Let `change` work on the table, in place or by returning a new one"
    df = raw(root); out = change(df); out = df if out is None else out
    out.to_excel(root/BOOK, index=False) if (root/BOOK).exists() else out.to_csv(root/KAGGLE, index=False)

def put(root, column, value, row=0):
    def change(df): df.loc[row, column] = value
    rewrite(root, change)

def eyes(recs): return recs.df.set_index(recs.df.path.str.split('/').str[-1])

def label(recs, letter):
    "The column of a class, under its letter or its name"
    got = [l for l in recs.labels if l == letter or l.lower() == NAMES[letter]]
    assert len(got) == 1, f'{letter}: {recs.labels}'
    return got[0]

def classes(recs, file):
    "Letters of the classes of one eye; None where the photograph was dropped or all its labels are unknown"
    df = eyes(recs)
    if file not in df.index: return None
    y = [df.loc[file, label(recs, c)] for c in 'NDGCAHMO']
    if all(np.isnan(y)): return None
    assert not any(np.isnan(y)), 'an eye is either usable or not'
    return ''.join(c for c,v in zip('NDGCAHMO', y) if v)


# ---------------------------------------------------------------- the table and the folder

def test_one_row_a_patient_becomes_one_an_eye(book):
    recs = read_odir(book, missing='keep'); df, t = eyes(recs), raw(book)
    assert recs.name == 'odir' and recs.patient_known and recs.df.image_id.is_unique and recs.df.split.isna().all()
    assert set(df.index) <= {*t['Left-Fundus'], *t['Right-Fundus']} and len(df) > len(t)
    assert df.patient_id['0_left.jpg'] == df.patient_id['0_right.jpg'] == '0'
    assert (df.laterality == df.index.str.extract('_(left|right)', expand=False).map({'left': 'L', 'right': 'R'}).to_numpy()).all()
    assert all((recs.root/p).is_file() for p in recs.df.path)


def test_kaggle_has_one_row_an_eye(kaggle):
    recs = read_odir(kaggle); df, t = eyes(recs), raw(kaggle)
    assert set(df.index) <= set(t.filename) and '6_right.jpg' not in df.index and '6_right.jpg' not in set(t.filename)
    assert df.patient_id['0_left.jpg'] == df.patient_id['0_right.jpg'] == '0'
    assert (df.laterality == df.index.str.extract('_(left|right)', expand=False).map({'left': 'L', 'right': 'R'}).to_numpy()).all()


def test_both_forms_agree(book, kaggle):
    a, b = read_odir(book), read_odir(kaggle)
    assert a.labels == b.labels
    a, b = (eyes(r)[['patient_id', 'sex', 'age', 'laterality', *r.labels]] for r in (a, b))
    pd.testing.assert_frame_equal(a.loc[b.index], b, check_dtype=False)
    assert len(b) < len(a)


def test_table_in_use_is_named(book, kaggle, capsys):
    read_odir(book); assert 'ODIR-5K_Training' in capsys.readouterr().out
    read_odir(kaggle); assert KAGGLE in capsys.readouterr().out


@FORMS
@pytest.mark.parametrize('folder', ['images', 'Training Images'])
def test_image_folder_has_no_fixed_name(tmp_path, form, folder):
    recs = read_odir(fake_odir(tmp_path/'o', form=form, folder=folder))
    assert all((recs.root/p).is_file() for p in recs.df.path)


def test_no_table(book):
    (book/BOOK).unlink()
    with pytest.raises(DataError) as e: read_odir(book)
    assert 'odir2019.grand-challenge.org' in str(e.value) and KAGGLE in str(e.value) and 'xlsx' in str(e.value)


@FORMS
def test_missing_image(any_root, capsys):
    root = any_root; n = len(read_odir(root))
    next(root.rglob('0_left.jpg')).unlink()
    with pytest.raises(DataError, match='0_left'): read_odir(root, missing='raise')
    capsys.readouterr()
    recs = read_odir(root, missing='drop')
    assert len(recs) == n-1 and '0_left.jpg' not in eyes(recs).index and '1' in capsys.readouterr().out
    assert len(read_odir(root, missing='keep')) == n


def test_duplicate_patient(book):
    put(book, 'Left-Fundus', '1_left.jpg')
    with pytest.raises(DataError): read_odir(book)


def test_published_counts_are_compared(book, kaggle, capsys):
    read_odir(book); assert 'WARNING' in capsys.readouterr().out
    read_odir(kaggle); assert 'WARNING' in (out := capsys.readouterr().out) and '6392' in out.replace(',', '')


# ---------------------------------------------------------------- people

@FORMS
def test_sex_is_text(any_root):
    root = any_root; df, t = eyes(read_odir(root)), raw(root)
    sex = dict(zip(t.ID.astype(str), t['Patient Sex'].map({'Male': 'M', 'Female': 'F'})))
    assert df.sex.tolist() == df.patient_id.map(sex).tolist() and df.sex.nunique() == 2


def test_unknown_sex(book):
    put(book, 'Patient Sex', 'X')
    with pytest.raises(DataError, match='Patient Sex'): read_odir(book)


@FORMS
def test_age_of_1_is_a_placeholder(any_root, capsys):
    root = any_root; df, t = eyes(read_odir(root)), raw(root)
    age = dict(zip(t.ID.astype(str), t['Patient Age'].astype(float).mask(t['Patient Age'].astype(float) == 1)))
    np.testing.assert_array_equal(df.age, df.patient_id.map(age))
    gone = df.age.isna()
    assert gone.any() and df.age_raw[gone].astype(float).eq(1).all(), 'kept as read'
    assert re.search(rf'\b{gone.sum()}\b', capsys.readouterr().out), 'how many were cleaned'


def test_age_is_no_number(book):
    put(book, 'Patient Age', 'old')
    with pytest.raises(DataError, match='old'): read_odir(book)


@FORMS
def test_two_eyes_of_a_patient_stay_together(any_root):
    recs = split_patients(read_odir(any_root), (.5, .25, .25))
    per = recs.df.groupby('patient_id')
    assert per.size().max() == 2 and per.split.nunique().max() == 1


# ---------------------------------------------------------------- labels from keywords

@FORMS
def test_labels_are_of_the_eye_not_the_patient(any_root):
    root = any_root; recs, t = read_odir(root), raw(root)
    assert t.loc[t.ID.astype(str) == '0', ['N', 'C']].astype(int).iloc[0].tolist() == [0, 1], 'the patient has a cataract'
    assert classes(recs, '0_left.jpg') == 'C' and classes(recs, '0_right.jpg') == 'N'
    assert classes(recs, '5_left.jpg') == 'N' and classes(recs, '5_right.jpg') == 'O'


@FORMS
def test_keywords_are_separated_by_a_full_width_comma(any_root):
    recs = read_odir(any_root)
    assert classes(recs, '1_left.jpg') == 'DG' and classes(recs, '1_right.jpg') == 'D'


def test_a_finding_beside_a_known_one(book):
    "Read apart by the full-width comma: the second one is other, and not lost in the first"
    put(book, 'Left-Diagnostic Keywords', 'cataract，drusen'); put(book, 'Right-Diagnostic Keywords', 'lens dust，drusen')
    recs = read_odir(book, unusable='keep')
    assert classes(recs, '0_left.jpg') == 'CO' and eyes(recs).remarks['0_right.jpg'] == 'lens dust' and classes(recs, '0_right.jpg') == 'O'


@pytest.mark.parametrize('file,letter', [('0_left.jpg', 'C'), ('1_right.jpg', 'D'), ('2_left.jpg', 'A'), ('3_left.jpg', 'H'), ('4_left.jpg', 'M'),
                                         ('5_left.jpg', 'N'), ('5_right.jpg', 'O')])
def test_each_class(book, file, letter): assert classes(read_odir(book), file) == letter


@FORMS
@pytest.mark.parametrize('file', ['2_right.jpg', '4_right.jpg', '6_left.jpg', '3_right.jpg'])
def test_unusable_photographs(any_root, file):
    "Lens dust, a disc that cannot be seen, an image offset, and lens dust beside a diagnosis: no labels, whatever else is said"
    assert classes(read_odir(any_root), file) is None


def test_unusable_photographs_are_counted(book, capsys):
    n = len(raw(book)); read_odir(book)
    bad = sum(k in (2, 3, 4, 6) for k in (i % 8 for i in range(n)))
    assert re.search(rf'\b{bad}\b', capsys.readouterr().out)


@pytest.mark.parametrize('text', [None, ''])
def test_no_keywords_is_unknown(book, text):
    put(book, 'Left-Diagnostic Keywords', text)
    try: recs = read_odir(book)
    except DataError as e: assert 'Left-Diagnostic Keywords' in str(e)
    else: assert classes(recs, '0_left.jpg') is None, 'never a silent zero'


def test_keywords_are_compared_with_the_patient(book, capsys):
    "A finding in words that the reader does not know is noticed, because the patient's own columns say otherwise"
    read_odir(book); assert 'patient columns' not in capsys.readouterr().out
    put(book, 'Left-Diagnostic Keywords', 'clouded lens'); read_odir(book)
    assert 'patient columns for 1 of 20 patients' in capsys.readouterr().out


def test_patient_column_with_an_unknown_code(book):
    put(book, 'G', 2)
    with pytest.raises(DataError, match="'G'"): read_odir(book)


def test_unusable_photographs_can_be_kept(book):
    recs = read_odir(book, unusable='keep'); df = eyes(recs)
    assert len(df) == 40 and classes(recs, '6_left.jpg') is None and df.remarks['3_right.jpg'] == 'lens dust' and classes(recs, '3_right.jpg') == 'N'


def test_chosen_labels(book):
    first = read_odir(book).labels[:2]
    assert read_odir(book, list(first)).labels == first
    with pytest.raises(MedPrivacyError, match='scoliosis'): read_odir(book, ['scoliosis'])
