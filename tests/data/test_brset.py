"BRSET as its public description has it: each quirk of the release, and each way in which a fact can turn out wrong"
import re, shutil
from pathlib import Path

import numpy as np, pandas as pd, pytest

from medprivacy.core import ConfigError, DataError, MedPrivacyError
from medprivacy.data.brset import fake_brset, read_brset
from medprivacy.data.split import split_patients

TABLE = 'label_brset.csv'
FINDINGS = ('diabetic_retinopathy macular_edema scar nevus amd vascular_occlusion hypertensive_retinopathy drusens hemorrhage '
            'retinal_detachment myopic_fundus increased_cup_disc other').split()


@pytest.fixture(scope='module')
def made(tmp_path_factory): return fake_brset(tmp_path_factory.mktemp('made')/'brset', 20)

@pytest.fixture
def root(made, tmp_path): return Path(shutil.copytree(made, tmp_path/'brset'))


def raw(root, table=TABLE): return pd.read_csv(root/table, dtype=str, encoding='utf-8-sig')

def rewrite(root, change, encoding='utf-8-sig'):
    "Let `change` work on the table, in place or by returning a new one"
    df = raw(root); out = change(df)
    (df if out is None else out).to_csv(root/TABLE, index=False, encoding=encoding)

def put(root, column, value, row=0):
    def change(df): df.loc[row, column] = value
    rewrite(root, change)

def read(root, *a, **kw):
    "The records' table, one row per image id, and the table it was read from"
    recs = read_brset(root, *a, **kw)
    return recs, recs.df.set_index('image_id'), raw(root).set_index('image_id')


# ---------------------------------------------------------------- the table and the folder

def test_rows_and_columns(root):
    recs, df, t = read(root)
    assert recs.name == 'brset' and recs.patient_known and recs.task == 'multilabel' and set(df.index) == set(t.index)
    assert (df.path == 'fundus_photos/' + df.index + '.jpg').all()
    assert (df.patient_id == t.patient_id.reindex(df.index)).all() and df.split.isna().all() and df.part.isna().all()


@pytest.mark.parametrize('bom', [True, False])
def test_byte_order_mark(root, bom):
    rewrite(root, lambda df: None, 'utf-8-sig' if bom else 'utf-8')
    assert ((root/TABLE).read_bytes()[:3] == b'\xef\xbb\xbf') == bom
    assert 'img00001' in set(read_brset(root).df.image_id)


@pytest.mark.parametrize('table', ['labels.csv', 'labels_brset.csv', 'label_brset.csv'])
def test_table_name_depends_on_release(tmp_path, capsys, table):
    recs = read_brset(fake_brset(tmp_path/'b', table=table))
    assert len(recs) and table in capsys.readouterr().out, 'say which table was found'


def test_several_tables(root, capsys):
    (root/'labels.csv').write_bytes((root/TABLE).read_bytes())
    read_brset(root)
    assert any(t in capsys.readouterr().out for t in (TABLE, 'labels.csv'))


def test_no_table(root):
    (root/TABLE).rename(root/'table.csv')
    with pytest.raises(DataError) as e: read_brset(root)
    assert all(s in str(e.value) for s in ('labels.csv', 'labels_brset.csv', 'label_brset.csv', 'physionet')), 'what was tried; where to apply'


def test_no_root(tmp_path):
    with pytest.raises(DataError, match='physionet'): read_brset(tmp_path/'nowhere')


@pytest.mark.parametrize('folder', ['fundus_photos', 'images', 'photos'])
def test_image_folder_has_several_names(tmp_path, folder):
    recs = read_brset(fake_brset(tmp_path/'b', folder=folder))
    assert recs.df.path.str.startswith(folder + '/').all() and all((recs.root/p).is_file() for p in recs.df.path)


def test_no_image_folder(root):
    (root/'fundus_photos').rename(root/'elsewhere')
    with pytest.raises(DataError): read_brset(root)


def test_missing_image(root, capsys):
    (root/'fundus_photos'/'img00003.jpg').unlink(); n = len(raw(root))
    with pytest.raises(DataError, match='img00003'): read_brset(root)
    capsys.readouterr()
    df = read_brset(root, missing='drop').df
    assert len(df) == n-1 and 'img00003' not in set(df.image_id) and '1' in capsys.readouterr().out
    assert len(read_brset(root, missing='keep')) == n
    with pytest.raises(MedPrivacyError): read_brset(root, missing='ignore it')


def test_own_spellings(root):
    "`iluminaton` and `drusens` are the set's own spellings; a corrected table is another table"
    assert 'drusens' in read_brset(root).labels and read_brset(root, labels=['iluminaton']).labels == ('iluminaton',)
    rewrite(root, lambda df: df.rename(columns={'iluminaton': 'illumination'}))
    with pytest.raises(DataError, match='illumination'): read_brset(root, labels=['iluminaton'])


def test_wrong_encoding(root):
    put(root, 'comorbidities', 'pressão alta')
    (root/TABLE).write_bytes((root/TABLE).read_text(encoding='utf-8-sig').encode('latin-1'))
    with pytest.raises(DataError, match='UTF-8'): read_brset(root)


def test_duplicate_id(root):
    put(root, 'image_id', 'img00002')
    with pytest.raises(DataError, match='img00002'): read_brset(root)


def test_blank_patient(root):
    put(root, 'patient_id', None)
    with pytest.raises(DataError, match='patient_id'): read_brset(root)


def test_published_counts_are_compared(root, capsys):
    read_brset(root)
    out = capsys.readouterr().out
    assert 'WARNING' in out and '16266' in out.replace(',', '') and '8524' in out.replace(',', '')


# ---------------------------------------------------------------- people

def test_sex_is_1_male_2_female(root):
    put(root, 'patient_sex', None, row=0)
    _, df, t = read(root)
    known = t.patient_sex.notna()
    assert df.sex[t.index[known]].tolist() == t.patient_sex[known].map({'1': 'M', '2': 'F'}).tolist() and not known.all()
    assert df.sex[t.index[~known]].isna().all(), 'never guessed'


@pytest.mark.parametrize('code', ['0', '3', 'M'])
def test_unknown_sex(root, code):
    put(root, 'patient_sex', code)
    with pytest.raises(DataError, match='patient_sex'): read_brset(root)


def test_eye_is_1_right_2_left(root):
    _, df, t = read(root)
    assert df.laterality[t.index].tolist() == t.exam_eye.map({'1': 'R', '2': 'L'}).tolist() and df.laterality.nunique() == 2


@pytest.mark.parametrize('code', ['0', '3', 'both'])
def test_unknown_eye(root, code):
    put(root, 'exam_eye', code)
    with pytest.raises(DataError, match='exam_eye'): read_brset(root)


def test_age_is_missing_on_many_rows(root, capsys):
    _, df, t = read(root)
    age = pd.to_numeric(t.patient_age)
    pd.testing.assert_series_equal(df.age[t.index], age, check_names=False)
    assert 0 < age.isna().sum() < len(t) and {5., 97.} <= set(df.age.dropna())
    assert df.age_raw[t.index].isna().tolist() == age.isna().tolist()
    assert f'brset: age is missing in {age.isna().sum()} of {len(t)} rows' in capsys.readouterr().out, 'how many have no age'


@pytest.mark.parametrize('age', ['0', '-1', '130'])
def test_impossible_age(root, age):
    put(root, 'patient_age', age)
    df = read_brset(root).df.set_index('image_id')
    assert np.isnan(df.age['img00001']) and df.age_raw['img00001'] == age


def test_age_is_no_number(root):
    put(root, 'patient_age', 'old')
    with pytest.raises(DataError, match='old'): read_brset(root)


def test_two_eyes_of_a_patient_stay_together(root):
    recs = split_patients(read_brset(root), (.5, .25, .25))
    assert recs.df.groupby('patient_id').size().max() > 1 and recs.df.groupby('patient_id').split.nunique().max() == 1


def test_camera(root):
    _, df, t = read(root)
    assert df.device[t.index].tolist() == t.camera.tolist() and df.device.nunique() == 2


def test_comorbidities_are_dropped(root):
    _, df, t = read(root)
    assert 'comorbidities' not in df and not df.isin(['hypertension, "sugar"; none other']).any(axis=None) and t.comorbidities.notna().any()


# ---------------------------------------------------------------- labels

def test_findings_are_the_default(root):
    recs, df, t = read(root)
    assert set(FINDINGS) <= set(recs.labels)
    for c in FINDINGS: assert df[c][t.index].tolist() == t[c].astype(float).tolist()
    assert not any('glaucoma' in l for l in recs.labels), 'increased_cup_disc is not a diagnosis of glaucoma'


def test_chosen_labels(root):
    assert read_brset(root, ['scar', 'amd']).labels == ('scar', 'amd')
    with pytest.raises(MedPrivacyError, match='glaucoma'): read_brset(root, ['glaucoma'])


@pytest.mark.parametrize('code', ['2', '-1', 'yes'])
def test_unknown_finding(root, code):
    put(root, 'drusens', code)
    with pytest.raises(DataError, match='drusens'): read_brset(root)


def test_blank_finding_is_unknown(root):
    put(root, 'drusens', None)
    df = read_brset(root).df.set_index('image_id')
    assert np.isnan(df.drusens['img00001']) and df.drusens.notna().sum() == len(df)-1


def test_diabetes_in_any_case(root):
    _, df, t = read(root, ['diabetes'])
    assert t.diabetes.nunique() > 2 and df.diabetes[t.index].tolist() == t.diabetes.str.lower().map({'yes': 1., 'no': 0.}).tolist()


def test_unknown_diabetes(root):
    put(root, 'diabetes', 'maybe')
    with pytest.raises(DataError, match='diabetes'): read_brset(root, ['diabetes'])


def test_anatomy_is_1_normal_2_abnormal(root):
    _, df, t = read(root, ['optic_disc', 'vessels', 'macula'])
    for c in ('optic_disc', 'vessels', 'macula'): assert df[c][t.index].tolist() == t[c].map({'1': 0., '2': 1.}).tolist()


@pytest.mark.parametrize('code', ['0', '3', 'normal'])
def test_unknown_anatomy(root, code):
    put(root, 'macula', code)
    with pytest.raises(DataError, match='macula'): read_brset(root, ['macula'])


@pytest.mark.parametrize('column', ['focus', 'iluminaton', 'image_field', 'artifacts'])
def test_photo_is_1_satisfactory_2_not(root, column):
    "A label is 1 where the thing is wrong with the picture"
    _, df, t = read(root, [column])
    assert df[column][t.index].tolist() == t[column].map({'1': 0., '2': 1.}).tolist()
    put(root, column, '3')
    with pytest.raises(DataError, match=column): read_brset(root, [column])


def test_quality_is_text(root):
    _, df, t = read(root, ['quality'])
    y = df.quality[t.index].groupby(t.quality).agg(['min', 'max'])
    assert (y['min'] == y['max']).all() and set(y['min']) == {0., 1.}
    put(root, 'quality', 'Good')
    with pytest.raises(DataError, match='quality'): read_brset(root, ['quality'])


@pytest.mark.parametrize('scale', ['ICDR', 'SDRG'])
def test_classes_of_retinopathy(root, capsys, scale):
    "None, non-proliferative and proliferative by the cut points 1 and 4, on either scale"
    recs, df, t = read(root, classes=(1, 4), scale=scale)
    want = t[f'DR_{scale}'].astype(int).map({0: 0., 1: 1., 2: 1., 3: 1., 4: 2.})
    assert recs.task == 'multiclass' and len(recs.labels) == 1 and df[recs.labels[0]][t.index].tolist() == want.tolist()
    assert scale in capsys.readouterr().out + recs.labels[0], 'say which scale was used'


def test_scales_disagree(root):
    t = raw(root); assert (t.DR_ICDR != t.DR_SDRG).sum() == 1
    a, b = (read_brset(root, classes=(1, 2, 3, 4), scale=s) for s in ('ICDR', 'SDRG'))
    differ = a.df[a.labels[0]].to_numpy() != b.df[b.labels[0]].to_numpy()
    assert a.df.image_id[differ].tolist() == ['img00003'] and set(a.df[a.labels[0]]) == {0., 1., 2., 3., 4.}


@pytest.mark.parametrize('grade', ['5', '-1', 'mild'])
def test_unknown_grade(root, grade):
    put(root, 'DR_ICDR', grade)
    with pytest.raises(DataError, match='DR_ICDR'): read_brset(root, classes=(1, 4))


def test_missing_grade_is_unknown(root):
    put(root, 'DR_ICDR', None)
    recs = read_brset(root, classes=(1, 4))
    assert recs.df[recs.labels[0]].isna().tolist() == (recs.df.image_id == 'img00001').tolist()


@pytest.mark.parametrize('wrong', [dict(classes=(4, 1)), dict(classes=()), dict(classes=(0, 9)), dict(classes=(1, 4), scale='ETDRS')])
def test_wrong_cut_points_or_scale(root, wrong):
    with pytest.raises(ConfigError): read_brset(root, **wrong)
