"CheXpert Plus and the CheXpert demographics, quirk by quirk, on a look-alike folder"
import json
import shutil
import numpy as np, pandas as pd, pytest

from medprivacy.core import DataError, LeakageError, MedPrivacyError
from medprivacy.data.chexpert import fake_chexpert, read_chexpert, soft
from medprivacy.data.chexpert_plus import add_demographics, fake_chexpert_plus, fake_demographics, read_chexpert_plus

FIVE  = ['Atelectasis', 'Cardiomegaly', 'Consolidation', 'Edema', 'Pleural Effusion']
TABLE = 'df_chexpert_plus_240401.csv'


@pytest.fixture(scope='module')
def tree(tmp_path_factory): return fake_chexpert_plus(tmp_path_factory.mktemp('plus')/'plus')

@pytest.fixture
def broken(tree, tmp_path): return shutil.copytree(tree, tmp_path/'copy')

def folder(path): return path.str.extract(r'/(patient\d+)/')[0]
def key(path): return path.str.replace(r'^PNG/PNG/', '', regex=True).str.rsplit('.', n=1).str[0]

def raw(root):
    "Table and labels as stored, by path without folder and suffix"
    df = pd.read_csv(root/TABLE, dtype=str)
    y  = {p: pd.DataFrame([json.loads(l) for l in (root/'chexbert_labels'/f'{p}_fixed.json').read_text().splitlines()]) for p in ('findings', 'report')}
    df = df.assign(key=key(df.path_to_image)).set_index('key')
    for p, t in y.items(): df = df.join(t.assign(key=key(t.path_to_image)).set_index('key')[FIVE].add_prefix(f'{p}:'))
    return df

def both(r, root):
    got = r.df.assign(key=key(r.df.path)).set_index('key')
    return got, raw(root).loc[got.index]

def rewrite(root, change):
    df = pd.read_csv(root/TABLE, dtype=str); out = change(df)
    (df if out is None else out).to_csv(root/TABLE, index=False)

def put(root, column, value):
    "Change the first frontal row"
    def change(df): df.loc[np.flatnonzero(df.frontal_lateral == 'Frontal')[0], column] = value
    rewrite(root, change)

def relabel(root, change):
    "Rewrite every label file: `change` gets a list of rows"
    for f in (root/'chexbert_labels').iterdir():
        rows = [json.loads(l) for l in f.read_text().splitlines()]
        rows = change(rows) or rows
        f.write_text('\n'.join(map(json.dumps, rows)) + '\n')

def first_frontal(root): return raw(root).query('frontal_lateral == "Frontal"').path_to_image.iloc[0]


# ---------------------------------------------------------------- paths and identity

def test_table_says_jpg_where_files_are_png(tree):
    "path_to_image ends in .jpg; the files stand as .png below PNG/PNG"
    r = read_chexpert_plus(tree)
    assert raw(tree).path_to_image.str.endswith('.jpg').all() and r.df.path.str.endswith('.png').all() and all((r.root/p).is_file() for p in r.df.path)

def test_patient_number_is_in_the_path(tree):
    "deid_patient_id is another number: the workbook and CheXpert join on the folder's"
    r = read_chexpert_plus(tree)
    assert (r.df.patient_id == folder(r.df.path)).all() and r.patient_known and r.df.groupby('patient_id').split.nunique().max() <= 1

def test_two_folders_of_one_patient(broken):
    "One deid_patient_id in two folders of the training part is one person: never in two splits, and one group"
    def change(df):
        two = folder(df.path_to_image[df['split'] == 'train']).unique()[:2]
        mine = folder(df.path_to_image).isin(two)
        df['deid_patient_id'], df['sex'] = df.deid_patient_id.mask(mine, 'patient77777'), df.sex.mask(mine, 'Male')
    n = read_chexpert_plus(broken).df.patient_id.nunique()
    rewrite(broken, change)
    assert read_chexpert_plus(broken).df.patient_id.nunique() == n-1

@pytest.mark.parametrize('value', ['patient77777', None])
def test_folder_with_two_patients_is_a_leak(broken, value):
    "The images of one folder carry two ids, or one has none"
    def change(df):
        f = folder(df.path_to_image)
        df.loc[np.flatnonzero(f == f.value_counts().index[0])[0], 'deid_patient_id'] = value
    rewrite(broken, change)
    with pytest.raises(LeakageError): read_chexpert_plus(broken)

def test_file_names_repeat_in_every_patient(tree):
    r = read_chexpert_plus(tree, frontal=False)
    assert r.df.image_id.is_unique and len(r) == len(raw(tree)) and r.df.groupby('study_id').patient_id.nunique().max() == 1

def test_path_without_patient_is_refused(broken):
    put(broken, 'path_to_image', 'train/00001/study1/view1_frontal.jpg')
    with pytest.raises(DataError): read_chexpert_plus(broken, missing='keep')

def test_duplicated_path_is_refused(broken):
    rewrite(broken, lambda df: pd.concat([df, df[df.frontal_lateral == 'Frontal'].iloc[[0]]]))
    with pytest.raises(DataError): read_chexpert_plus(broken)

@pytest.mark.parametrize('missing', ['raise', 'drop', 'keep'])
def test_missing_image(broken, missing):
    n, gone = len(read_chexpert_plus(broken)), read_chexpert_plus(broken).df.path[0]
    (broken/gone).unlink()
    if missing == 'raise':
        with pytest.raises(DataError, match='1 of'): read_chexpert_plus(broken)
    else: assert len(read_chexpert_plus(broken, missing=missing)) == n - (missing == 'drop')


# ---------------------------------------------------------------- CheXbert labels

def test_labels_are_joined_by_path(tree):
    "The JSON lines stand in another order than the table"
    got, was = both(read_chexpert_plus(tree, FIVE, uncertain='zeros', blank='ignore'), tree)
    for l in FIVE:
        same = was[f'findings:{l}'] == was[f'report:{l}']    # whichever section is read, null never equals
        want = was[f'report:{l}'].replace(-1, 0)
        assert same.sum() > 3 and (got[l][same] == want[same]).all()

def test_uncertain_and_null_labels(tree):
    got, was = both(read_chexpert_plus(tree, FIVE, uncertain='ignore', blank='zeros'), tree)
    ones, masked = both(read_chexpert_plus(tree, FIVE, uncertain='ones', blank='ignore'), tree)[0], 0
    for l in FIVE:
        null, unsure = was[f'findings:{l}'].isna() & was[f'report:{l}'].isna(), was[f'findings:{l}'] == -1
        assert null.any() and unsure.any()
        assert (got[l][null] == 0).all() and got[l][unsure].isna().all() and ones[l][null].isna().all() and (ones[l][unsure] == 1).all()

def test_soft_and_per_label_policies(tree):
    got, was = both(read_chexpert_plus(tree, FIVE, uncertain={'Edema': soft(.6, .7), 'Atelectasis': 'ones'}), tree)
    assert got['Edema'][was['findings:Edema'] == -1].between(.6, .7).all() and (got['Atelectasis'][was['findings:Atelectasis'] == -1] == 1).all()
    assert got['Cardiomegaly'][was['findings:Cardiomegaly'] == -1].isna().all()

def test_unknown_label_code_is_refused(broken):
    p = first_frontal(broken)
    relabel(broken, lambda rows: [r | ({'Edema': 3.0} if r['path_to_image'] == p else {}) for r in rows])
    with pytest.raises(DataError, match='Edema'): read_chexpert_plus(broken)

def test_image_without_labels_is_never_negative(broken):
    "A path that the label file does not know: an error, or unknown; not a silent zero"
    p = first_frontal(broken)
    relabel(broken, lambda rows: [r for r in rows if r['path_to_image'] != p])
    try: r = read_chexpert_plus(broken, FIVE, blank='zeros')
    except DataError: return
    assert r.df[key(r.df.path) == p.rsplit('.', 1)[0]][FIVE].isna().all(axis=None)

def test_image_with_two_label_rows_is_refused(broken):
    relabel(broken, lambda rows: rows + [r for r in rows if r['path_to_image'] == first_frontal(broken)])
    with pytest.raises(DataError): read_chexpert_plus(broken)

def test_label_file_that_is_no_json_lines_is_refused(broken):
    for f in (broken/'chexbert_labels').iterdir(): f.write_text(f.read_text() + '{"path_to_image": "train/pat\n')
    with pytest.raises(DataError): read_chexpert_plus(broken)

def test_label_missing_from_the_label_file_is_named(broken):
    relabel(broken, lambda rows: [{k: v for k,v in r.items() if k != 'Edema'} for r in rows])
    with pytest.raises(DataError, match='Edema'): read_chexpert_plus(broken, FIVE)

def test_unknown_label_name_is_refused(tree):
    with pytest.raises(MedPrivacyError, match='Oedema'): read_chexpert_plus(tree, ['Oedema'])


# ---------------------------------------------------------------- table

def test_reports_are_not_loaded(tree):
    df = read_chexpert_plus(tree).df
    assert not [c for c in df if c.startswith(('report', 'section'))] and not df.astype(str).apply(lambda c: c.str.contains('INVENTED')).any().any()

def test_unknown_sex_is_null(tree):
    got, was = both(read_chexpert_plus(tree), tree)
    assert (was.sex == 'Unknown').sum() == 1 and got.sex.isna().sum() == 1 and (got.sex.map({'M': 'Male', 'F': 'Female'}).fillna('Unknown') == was.sex).all()

def test_age_zero_is_null(tree):
    got, was = both(read_chexpert_plus(tree), tree)
    age = was.age.astype(float)
    assert (age == 0).any() and got.age[age == 0].isna().all() and (got.age[age > 0] == age[age > 0]).all()

def test_age_ninety_is_topcoded(tree):
    got, was = both(read_chexpert_plus(tree), tree)
    assert (got.age_topcoded.astype(bool) == (was.age.astype(float) == 90)).all() and got.age_topcoded.any()

def test_frontal_images_only_unless_told(tree):
    got, was = both(read_chexpert_plus(tree), tree)
    assert (was.frontal_lateral == 'Frontal').all() and (got['view'] == was.ap_pa).all() and len(got) < len(raw(tree))

def test_laterals_have_no_ap_pa(tree):
    got, was = both(read_chexpert_plus(tree, frontal=False), tree)
    lateral = was.frontal_lateral == 'Lateral'
    assert lateral.any() and was.ap_pa[lateral].isna().all() and (got['view'][lateral] == 'L').all()

def test_rare_ll_and_rl_views(broken):
    put(broken, 'ap_pa', 'LL')
    r = read_chexpert_plus(broken)
    assert len(r) == len(read_chexpert_plus(broken, missing='keep')) and (~r.df['view'].isin(['AP', 'PA'])).sum() == 1

@pytest.mark.parametrize('column,value', [('sex', 'X'), ('age', 'old'), ('frontal_lateral', 'Oblique'), ('ap_pa', 'XX'), ('split', 'holdout')])
def test_unknown_code_is_refused(broken, column, value):
    put(broken, column, value)
    with pytest.raises(DataError): read_chexpert_plus(broken)

def test_official_split_is_kept_apart(tree):
    "Rows of the official valid part are in none of the parts that hold official training rows"
    got, was = both(read_chexpert_plus(tree), tree)
    assert set(got.split[was.split == 'valid']).isdisjoint(set(got.split[was.split == 'train'])) and got.split.notna().all()

def test_patient_in_both_parts_is_a_leak(broken):
    "Two images of one patient, one of them moved to the other part"
    def change(df):
        df['split'] = np.where(df.path_to_image == df.path_to_image[df.frontal_lateral.eq('Frontal') & folder(df.path_to_image).isin(twice(df))].iloc[0], 'valid', df['split'])
    def twice(df):
        n = folder(df.path_to_image[df.frontal_lateral.eq('Frontal') & df['split'].eq('train')]).value_counts()
        return n.index[n > 1]
    rewrite(broken, change)
    with pytest.raises((LeakageError, DataError)): read_chexpert_plus(broken)

@pytest.mark.parametrize('gone', [TABLE, 'chexbert_labels', 'PNG'])
def test_missing_part_says_where_to_apply(broken, gone):
    shutil.rmtree(broken/gone) if (broken/gone).is_dir() else (broken/gone).unlink()
    with pytest.raises(DataError, match='(?s)(?i)(aimi|stanford)'): read_chexpert_plus(broken)

def test_published_counts_are_compared(tree, capsys):
    read_chexpert_plus(tree)
    assert 'WARNING' in capsys.readouterr().out


# ---------------------------------------------------------------- CHEXPERT DEMO.xlsx

DEMO = 'CHEXPERT DEMO.xlsx'

def redemo(root, change):
    df = pd.read_excel(root/DEMO, dtype=object); out = change(df)
    (df if out is None else out).to_excel(root/DEMO, index=False)

def demo(root): return pd.read_excel(root/DEMO, dtype=object).set_index('PATIENT')

def test_demographics_join_on_the_patient_folder(tree):
    "Row by row, and also for the first CheXpert"
    r = add_demographics(read_chexpert_plus(tree, frontal=False), tree/DEMO)
    was = demo(tree)
    white = folder(r.df.path).map(was.PRIMARY_RACE).isin(['White', 'White, non-Hispanic'])
    assert len(r) == len(raw(tree)) and (r.df.race[white] == r.df.race[white].iloc[0]).all() and (r.df.race[~white] != r.df.race[white].iloc[0]).all()

def test_demographics_of_the_first_chexpert(tmp_path):
    first = read_chexpert(fake_chexpert(tmp_path/'v1'))
    r = add_demographics(first, fake_demographics(tmp_path, sorted(first.df.patient_id.unique())))
    assert len(r) == len(first) and r.df.race.notna().all() and r.df.race.nunique() >= 4

def test_spellings_of_a_race_are_one_group(tree):
    r = add_demographics(read_chexpert_plus(tree, frontal=False), tree/DEMO)
    by = r.df.groupby(r.df.patient_id.map(demo(tree).PRIMARY_RACE)).race.unique()
    assert list(by['White']) == list(by['White, non-Hispanic']) and len({by[k][0] for k in ('White', 'Asian', 'Black or African American', 'Other')}) == 4

def test_unknown_race_is_no_group(tree):
    "`Unknown`, blank, and a patient without a row stay unknown, apart from `Other`"
    r = add_demographics(read_chexpert_plus(tree, frontal=False), tree/DEMO)
    race = r.df.patient_id.map(demo(tree).PRIMARY_RACE)
    absent = ~r.df.patient_id.isin(demo(tree).index)
    assert absent.any() and (r.df.race[race.isna() | (race == 'Unknown')] == 'unknown').all() and (r.df.race[absent] == 'unknown').all()
    assert not (r.df.race[race.notna() & (race != 'Unknown')] == 'unknown').any()

def test_unknown_spelling_of_a_race_is_refused(broken):
    redemo(broken, lambda df: df.__setitem__('PRIMARY_RACE', ['Martian'] + df.PRIMARY_RACE.tolist()[1:]))
    with pytest.raises(DataError, match='(?i)martian'): add_demographics(read_chexpert_plus(broken), broken/DEMO)

def test_join_rate_is_printed(tree, capsys):
    r = read_chexpert_plus(tree); capsys.readouterr()
    add_demographics(r, tree/DEMO)
    n = r.df.patient_id.nunique()
    assert f'{n - 1}' in (out := capsys.readouterr().out) and f'{n}' in out

def test_patient_with_two_races_is_refused(broken):
    redemo(broken, lambda df: pd.concat([df, df[df.PRIMARY_RACE == 'White'].assign(PRIMARY_RACE='Asian')]))
    with pytest.raises(DataError): add_demographics(read_chexpert_plus(broken), broken/DEMO)

def test_rows_of_a_patient_that_agree(broken):
    redemo(broken, lambda df: pd.concat([df, df[:3]]))
    r = read_chexpert_plus(broken)
    assert len(add_demographics(r, broken/DEMO)) == len(r)

@pytest.mark.parametrize('column', ['PATIENT', 'PRIMARY_RACE', 'ETHNICITY'])
def test_missing_column_of_the_workbook_is_named(broken, column):
    redemo(broken, lambda df: df.drop(columns=column))
    with pytest.raises(DataError, match=column): add_demographics(read_chexpert_plus(broken), broken/DEMO)
