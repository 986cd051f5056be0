"MIMIC-CXR-JPG, quirk by quirk, on an invented look-alike"
import shutil
from pathlib import Path
import numpy as np, pandas as pd, pytest

from medprivacy.core import ConfigError, DataError, LeakageError
from medprivacy.data.mimic_cxr import fake_mimic_cxr, read_mimic_cxr

FINDINGS = ['Atelectasis', 'Cardiomegaly', 'Consolidation', 'Edema', 'Enlarged Cardiomediastinum', 'Fracture', 'Lung Lesion', 'Lung Opacity',
            'No Finding', 'Pleural Effusion', 'Pleural Other', 'Pneumonia', 'Pneumothorax', 'Support Devices']
META, SPLIT, CHEXPERT = (f'mimic-cxr-2.0.0-{t}.csv.gz' for t in ('metadata', 'split', 'chexpert'))
PATIENTS, ADMISSIONS = 'mimic-iv/hosp/patients.csv.gz', 'mimic-iv/hosp/admissions.csv.gz'


@pytest.fixture(scope='module')
def made(tmp_path_factory): return fake_mimic_cxr(tmp_path_factory.mktemp('made')/'m', 20)

@pytest.fixture
def root(made, tmp_path): return Path(shutil.copytree(made, tmp_path/'m'))


def table(path): return pd.read_csv(path, dtype=str, keep_default_na=False)

def edit(path, change):
    "Rewrite a table through `change(df)`, which changes it in place or returns another"
    df = table(path); new = change(df)
    (df if new is None else new).to_csv(path, index=False)

def put(row, column, value):
    def _put(df): df.loc[row, column] = value
    return _put

def read(root, *labels, **kw):
    return read_mimic_cxr(root, list(labels) or ['Edema'], **{'mimic_iv': root/'mimic-iv', 'uncertain': 'ignore', 'blank': 'zeros', 'frontal': False, **kw})

def kind(root, digit):
    "Subject ids of the invented patients whose number ends in `digit`: the second digit of the id is that of the number"
    return {s for s in table(root/META).subject_id if int(s[1]) == digit}

def source(root, labeler='chexpert'):
    "One row per image, joined by hand: the metadata with the text of the labels of its study"
    return table(root/META).merge(table(root/f'mimic-cxr-2.0.0-{labeler}.csv.gz').drop(columns='subject_id'), on='study_id', how='left').set_index('dicom_id')


# ---------------------------------------------------------------- layout and ids

def test_layout_of_folders(root):
    "files/p<two digits>/p<subject>/s<study>/<dicom>.jpg"
    df, m = read(root).df.set_index('image_id'), table(root/META)
    for r in m.itertuples():
        if r.dicom_id in df.index:
            assert df.path[r.dicom_id] == f'files/p{r.subject_id[:2]}/p{r.subject_id}/s{r.study_id}/{r.dicom_id}.jpg'
    assert len({p[:9] for p in df.path}) == 10

def test_patient_and_study_ids(root):
    "Ids are the text of the tables, without a decimal point"
    r, m = read(root), table(root/META).set_index('dicom_id'); df = r.df.set_index('image_id')
    assert r.name == 'mimic_cxr' and r.patient_known
    assert (df.patient_id == m.subject_id[df.index]).all() and (df.study_id == m.study_id[df.index]).all()

def test_no_rows_multiplied(root):
    "Per-study labels and per-patient tables are joined to images without making more of them"
    df = read(root).df
    assert df.image_id.is_unique and len(df) <= len(table(root/META))


# ---------------------------------------------------------------- sex and age from MIMIC-IV

def test_without_mimic_iv(root):
    "MIMIC-CXR has neither sex nor age"
    df = read(root, mimic_iv=None).df
    assert df.sex.isna().all() and df.age.isna().all() and df.Edema.notna().any()

def test_sex_join(root):
    df, g = read(root).df, table(root/PATIENTS).set_index('subject_id').gender
    assert set(df.sex.dropna()) == {'M', 'F'}
    for r in df[df.sex.notna()].itertuples(): assert r.sex == g[r.patient_id]

def test_sex_join_is_by_subject_not_by_row(root):
    edit(root/PATIENTS, lambda df: df.iloc[::-1]); df = read(root).df
    g = table(root/PATIENTS).set_index('subject_id').gender
    assert (df.sex.dropna() == df.patient_id[df.sex.notna()].map(g)).all()

def test_age_at_study(root):
    "anchor age + year of the study − anchor year; the same patient grows older"
    df, p, m = read(root).df, table(root/PATIENTS).set_index('subject_id'), table(root/META).set_index('dicom_id')
    seen = set()
    for r in df[~df.patient_id.isin(kind(root, 3) | kind(root, 5) | kind(root, 7))].itertuples():
        years = int(m.StudyDate[r.image_id][:4]) - int(p.anchor_year[r.patient_id])
        assert r.age == int(p.anchor_age[r.patient_id]) + years; seen.add(years)
    assert {-1, 0, 1} <= seen

def test_age_above_89(root):
    "MIMIC-IV sets ages above 89 to 91: kept, and flagged; nobody else is"
    df = read(root).df; old = df.patient_id.isin(kind(root, 7))
    assert old.any() and df.age_topcoded[old].astype(bool).all() and (df.age[old] >= 90).all()
    assert not df.age_topcoded[~old].astype(bool).any()

def test_age_zero_is_unknown(root):
    df, m = read(root).df, table(root/META).set_index('dicom_id')
    p = table(root/PATIENTS).set_index('subject_id')
    zero = df[df.patient_id.isin(kind(root, 5))]
    zero = zero[[m.StudyDate[i][:4] == p.anchor_year[s] for i,s in zip(zero.image_id, zero.patient_id)]]
    assert len(zero) and zero.age.isna().all() and zero.sex.notna().all()

def test_subject_without_mimic_iv_row(root, capsys):
    "Kept, with null sex and age, and the join rate is printed"
    n = len(table(root/META)); df = read(root).df; out = capsys.readouterr().out
    lost = df.patient_id.isin(kind(root, 3))
    assert len(df) == n and lost.any() and df.sex[lost].isna().all() and df.age[lost].isna().all() and df.sex[~lost].notna().all()
    assert f'{(~lost).sum()} of {n}' in out or '18 of 20' in out or '90' in out, out

def test_race_and_insurance_mode(root, capsys):
    "Admissions of one person can differ: the most frequent entry, and the conflicts counted"
    df = read(root).df; out = capsys.readouterr().out; two = df.patient_id.isin(kind(root, 4))
    assert set(df.race[two]) == {'WHITE'} and set(df.insurance[two]) == {'Medicare'}
    assert any('2' in l and 'race' in l.lower() for l in out.splitlines()), out
    assert df.race[df.patient_id.isin(kind(root, 3))].isna().all()

def test_without_admissions(root):
    (root/ADMISSIONS).unlink(); assert read(root).df.sex.notna().any()

def test_unknown_gender(root):
    edit(root/PATIENTS, put(0, 'gender', 'X'))
    with pytest.raises(DataError, match='gender|sex'): read(root)

def test_subject_twice_in_patients(root):
    "Would multiply images"
    edit(root/PATIENTS, lambda df: pd.concat([df, df.iloc[:1].assign(gender='M'), df.iloc[:1].assign(gender='F')]))
    with pytest.raises(DataError): read(root)

def test_mimic_iv_of_other_people(root):
    "Not one patient has a row: the wrong table"
    edit(root/PATIENTS, lambda df: df.assign(subject_id=range(len(df))))
    with pytest.raises(DataError, match='none of the 20 patients'): read(root)

def test_mimic_iv_folder_without_the_table(root):
    (root/PATIENTS).unlink()
    with pytest.raises(DataError, match='patients.csv'): read(root)

def test_study_date_that_is_no_date(root):
    edit(root/META, put(0, 'StudyDate', 'June'))
    with pytest.raises(DataError, match='StudyDate'): read(root)

# ---------------------------------------------------------------- labels

def test_labels_are_of_studies(root):
    "Every image of a study has the labels of the study"
    df, src = read(root, 'Edema', 'Pneumonia', blank='ignore').df.set_index('image_id'), source(root)
    for l in ('Edema', 'Pneumonia'):
        want = pd.to_numeric(src.loc[df.index, l].replace('', None)).replace(-1, np.nan)
        assert df[l].equals(want.astype(float).rename(l)) or np.array_equal(df[l], want, equal_nan=True)
    assert (df.groupby('study_id').size() > 1).any()

def test_default_labels(root):
    "Without a list: findings of the table, each 0, 1 or unknown"
    r = read_mimic_cxr(root)
    assert set(r.labels) <= set(FINDINGS) and len(r.labels) >= 5
    assert all(set(r.df[l].dropna()) <= {0., 1.} for l in r.labels)

def test_unknown_label_name(root):
    with pytest.raises(Exception, match='Oedema') as e: read(root, 'Oedema')
    assert isinstance(e.value, (DataError, ValueError))

@pytest.mark.parametrize('uncertain,value', [('ignore', np.nan), ('zeros', 0.), ('ones', 1.)])
def test_uncertain(root, uncertain, value):
    df = read(root, uncertain=uncertain).df.set_index('image_id'); src = source(root)
    at = src.Edema[df.index] == '-1.0'
    assert at.any() and np.array_equal(df.Edema[at], np.full(at.sum(), value), equal_nan=True)
    assert (df.Edema[src.Edema[df.index] == '1.0'] == 1).all() and (df.Edema[src.Edema[df.index] == '0.0'] == 0).all()

def test_uncertain_by_default_is_masked(root):
    df = read_mimic_cxr(root, ['Edema'], frontal=False).df.set_index('image_id'); src = source(root)
    assert df.Edema[src.Edema[df.index] == '-1.0'].isna().all()

def test_uncertain_per_label(root):
    df = read(root, 'Edema', 'Pneumonia', uncertain={'Edema': 'ones', 'Pneumonia': 'zeros'}).df.set_index('image_id'); src = source(root)
    for l,v in (('Edema', 1), ('Pneumonia', 0)): assert set(df[l][src[l][df.index] == '-1.0']) == {v}

def test_uncertain_soft(root):
    from medprivacy.data.chexpert import soft
    df = read(root, uncertain=soft(.55, .85)).df.set_index('image_id'); src = source(root)
    at = src.Edema[df.index] == '-1.0'
    assert at.any() and df.Edema[at].between(.55, .85).all() and set(df.Edema[~at].dropna()) == {0., 1.}

@pytest.mark.parametrize('blank,value', [('zeros', 0.), ('ignore', np.nan)])
def test_blank(root, blank, value):
    df = read(root, blank=blank).df.set_index('image_id'); src = source(root)
    labelled = table(root/CHEXPERT).study_id
    at = (src.Edema[df.index] == '') & src.study_id[df.index].isin(labelled)
    assert at.any() and np.array_equal(df.Edema[at], np.full(at.sum(), value), equal_nan=True)

def test_no_finding_is_one_or_blank(root):
    df = read(root, 'No Finding', blank='ignore').df
    assert set(df['No Finding'].dropna()) == {1.} and df['No Finding'].isna().any()

def test_study_without_labels(root):
    "A study that the labeler's table does not name is unknown, not negative; its images may also be left out"
    df = read(root, blank='zeros').df; named = set(table(root/CHEXPERT).study_id)
    assert df.Edema[~df.study_id.isin(named)].isna().all() and (set(table(root/META).study_id) - named)

def test_labeler(root):
    a, b = (read(root, labeler=l, blank='ignore').df.set_index('image_id') for l in ('chexpert', 'negbio'))
    src = source(root, 'negbio')
    assert not a.Edema.equals(b.Edema)
    assert (b.Edema[src.Edema[b.index] == '1.0'] == 1).all() and set(b.Edema[src.Edema[b.index] != '1.0'].dropna()) == {0.}

def test_unknown_labeler(root):
    with pytest.raises(ConfigError, match='radgraph'): read(root, labeler='radgraph')

def test_hand_labelled_file_of_2_1_0(root):
    "Its presence changes nothing unless it is asked for"
    before = read(root).df.Edema; by_hand = [p for p in root.glob('*.csv') if 'test-set' in p.name]
    for p in by_hand: p.unlink()
    assert by_hand and before.equals(read(root).df.Edema)

def test_labels_given_by_hand(root):
    "Asked for: the table under whatever name it has, and the images of its studies only"
    hand = next(p for p in root.glob('*.csv') if 'test-set' in p.name); hand.rename(root/'radiologists-test-labels.csv')
    df, t = read(root, labeler='hand', blank='ignore').df, table(root/'radiologists-test-labels.csv').set_index('study_id')
    assert set(df.study_id) == set(t.index) and set(df.split) == {'test'}
    assert (df.Edema[df.study_id.map(t.Edema) == '1.0'] == 1).all() and (df.Edema == 1).any()
    (root/'radiologists-test-labels.csv').unlink()
    with pytest.raises(DataError, match='test'): read(root, labeler='hand')

def test_study_of_another_patient(root):
    "The label table and the metadata name the same patient"
    edit(root/CHEXPERT, put(0, 'subject_id', '19999999'))
    with pytest.raises(DataError, match='another patient'): read(root)

def test_unknown_label_code(root):
    edit(root/CHEXPERT, put(2, 'Edema', '2.0'))
    with pytest.raises(DataError, match='Edema'): read(root)

def test_label_that_is_no_number(root):
    edit(root/CHEXPERT, put(2, 'Edema', 'yes'))
    with pytest.raises(DataError, match='Edema'): read(root)

def test_study_twice_in_labels(root):
    edit(root/CHEXPERT, lambda df: pd.concat([df, df.iloc[:1]]))
    with pytest.raises(DataError, match='two rows'): read(root)


# ---------------------------------------------------------------- views

def test_frontal_by_default(root):
    "PA and AP only; laterals and unnamed views are left out"
    df = read_mimic_cxr(root, ['Edema']).df; m = table(root/META)
    assert set(df.view) == {'PA', 'AP'} and len(df) == m.ViewPosition.isin(['PA', 'AP']).sum()

def test_all_views(root):
    "LATERAL and LL are L, blank is unknown"
    df, m = read(root).df.set_index('image_id'), table(root/META).set_index('dicom_id').ViewPosition
    for code,view in (('PA', 'PA'), ('AP', 'AP'), ('LATERAL', 'L'), ('LL', 'L')): assert set(df.view[m[df.index] == code]) == {view}
    assert len(df) == len(m) and df.view[m[df.index] == ''].isna().all() and (m == '').any()

@pytest.mark.parametrize('frontal', [True, False])
def test_unknown_view(root, frontal):
    edit(root/META, put(1, 'ViewPosition', 'UPSIDE'))
    with pytest.raises(DataError, match='ViewPosition|view'): read(root, frontal=frontal)


# ---------------------------------------------------------------- split

def test_official_split(root):
    "validate is our valid"
    df, s = read(root).df, table(root/SPLIT).set_index('dicom_id').split
    assert set(df.split) == {'train', 'valid', 'test'}
    assert (df.split == df.image_id.map(s).replace('validate', 'valid')).all()

def test_split_is_by_image_id_not_by_row(root):
    edit(root/SPLIT, lambda df: df.iloc[::-1]); df = read(root).df
    s = table(root/SPLIT).set_index('dicom_id').split
    assert (df.split == df.image_id.map(s).replace('validate', 'valid')).all()

def test_split_with_a_patient_on_two_sides(root):
    m = table(root/SPLIT); many = m.subject_id[m.subject_id.duplicated()].iloc[0]; row = m.index[m.subject_id == many][0]
    edit(root/SPLIT, put(row, 'split', 'train' if m.split[row] != 'train' else 'test'))
    with pytest.raises(LeakageError): read(root)

def test_unknown_split(root):
    edit(root/SPLIT, put(0, 'split', 'extra'))
    with pytest.raises(DataError, match='split'): read(root)

def test_image_without_a_split(root):
    edit(root/SPLIT, lambda df: df.iloc[1:])
    with pytest.raises(DataError, match='split.*disagree on 1 row'): read(root)


# ---------------------------------------------------------------- files and columns

def test_published_counts(root, capsys):
    read(root); out = capsys.readouterr().out
    assert '377,110' in out or '377110' in out, out
    assert 'WARNING' in out

@pytest.mark.parametrize('name', [META, SPLIT, CHEXPERT, 'files'])
def test_missing_part(root, name):
    "Names what is missing and where access is given"
    p = root/name
    p.rename(root.parent/'away') if p.is_dir() else p.unlink()
    with pytest.raises(DataError, match='physionet.org') as e: read(root)
    assert name.replace('2.0.0-', '').removeprefix('mimic-cxr-').split('.')[0] in str(e.value)

def test_tables_of_two_releases(root):
    "Either file would do: say which"
    shutil.copy(root/META, root/META.replace('2.0.0', '2.1.0'))
    with pytest.raises(DataError, match='metadata'): read(root)

def test_tables_without_gzip(root):
    "As some copies are unpacked"
    before = read(root).df
    for f in root.glob('mimic-cxr-*.csv.gz'):
        table(f).to_csv(f.with_suffix(''), index=False); f.unlink()
    pd.testing.assert_frame_equal(read(root).df, before)

def test_missing_image(root):
    r = read(root); gone = r.df.path[0]; (root/gone).unlink()
    with pytest.raises(DataError, match=gone.split('/')[-1].removesuffix('.jpg')): read(root)
    assert len(read(root, missing='drop')) == len(r) - 1 and len(read(root, missing='keep')) == len(r)

def test_duplicate_image(root):
    edit(root/META, lambda df: pd.concat([df, df.iloc[:1]]))
    with pytest.raises(DataError): read(root)

def test_blank_subject(root):
    edit(root/META, put(0, 'subject_id', ''))
    with pytest.raises(DataError): read(root)
