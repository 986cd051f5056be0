"CheXpert v1.0 and -small, quirk by quirk, on a look-alike folder"
import shutil
import numpy as np, pandas as pd, pytest

from medprivacy.core import ConfigError, DataError, LeakageError, MedPrivacyError
from medprivacy.data.chexpert import fake_chexpert, read_chexpert, soft

FIVE = ['Atelectasis', 'Cardiomegaly', 'Consolidation', 'Edema', 'Pleural Effusion']


@pytest.fixture(scope='module')
def tree(tmp_path_factory): return fake_chexpert(tmp_path_factory.mktemp('chexpert')/'CheXpert-v1.0-small')

@pytest.fixture
def broken(tree, tmp_path): return shutil.copytree(tree, tmp_path/'copy')

def raw(root):
    "The two tables as text, by path below the root"
    df = pd.concat([pd.read_csv(root/f'{p}.csv', dtype=str) for p in ('train', 'valid')])
    return df.assign(path=df.Path.str.split('/', n=1).str[1]).set_index('path')

def rewrite(csv, change):
    df = pd.read_csv(csv, dtype=str)
    out = change(df)
    (df if out is None else out).to_csv(csv, index=False)

def put(csv, column, value, row=0): rewrite(csv, lambda df: df.__setitem__(column, [value if i == row else v for i,v in enumerate(df[column])]))
def frontal_row(root, part='train'): return int(np.flatnonzero(pd.read_csv(root/f'{part}.csv')['Frontal/Lateral'] == 'Frontal')[0])
def by_path(r): return r.df.set_index('path')
def both(r, root): return by_path(r), raw(root).loc[r.df.path]


def test_look_alike_is_small_and_seeded(tree, tmp_path):
    again = fake_chexpert(tmp_path/'again')
    files = sorted(p.relative_to(tree) for p in tree.rglob('*') if p.is_file())
    assert all((tree/f).read_bytes() == (again/f).read_bytes() for f in files) and sum((tree/f).stat().st_size for f in files) < 2**20


# ---------------------------------------------------------------- paths and identity

@pytest.mark.parametrize('release', ['CheXpert-v1.0', 'CheXpert-v1.0-small'])
@pytest.mark.parametrize('folder', ['CheXpert-v1.0', 'elsewhere'])
def test_prefix_of_either_release_is_stripped(tmp_path, release, folder):
    "`Path` begins with the release's folder name, whatever the folder is called here"
    r = read_chexpert(fake_chexpert(tmp_path/folder, release=release))
    assert r.df.path.str.match(r'(train|valid)/patient\d{5}/study\d+/view\d_frontal\.jpg$').all()
    assert all((r.root/p).is_file() for p in r.df.path)

def test_unknown_prefix_is_refused(broken):
    rewrite(broken/'train.csv', lambda df: df.assign(Path='Other-v9/' + df.Path.str.split('/', n=1).str[1]))
    with pytest.raises(DataError): read_chexpert(broken)

def test_patient_is_read_from_the_path(tree):
    r = read_chexpert(tree, frontal=False)
    assert (r.df.patient_id == r.df.path.str.extract(r'/(patient\d+)/')[0]).all() and r.patient_known

def test_file_names_repeat_in_every_patient(tree):
    "Every patient has a view1_frontal.jpg in a study1: ids must still be unique"
    r = read_chexpert(tree, frontal=False)
    assert r.df.image_id.is_unique and r.df.groupby('study_id').patient_id.nunique().max() == 1 and r.df.study_id.notna().all()
    assert r.df.study_id.nunique() == r.df.path.str.rsplit('/', n=1).str[0].nunique()

def test_path_without_patient_is_refused(broken):
    put(broken/'train.csv', 'Path', 'CheXpert-v1.0-small/train/00001/study1/view1_frontal.jpg', frontal_row(broken))
    with pytest.raises(DataError): read_chexpert(broken, missing='keep')

def test_duplicated_path_is_refused(broken):
    rewrite(broken/'train.csv', lambda df: pd.concat([df, df.iloc[[frontal_row(broken)]]]))
    with pytest.raises(DataError): read_chexpert(broken)

@pytest.mark.parametrize('missing', ['raise', 'drop', 'keep'])
def test_missing_image(broken, missing, capsys):
    n, gone = len(read_chexpert(broken)), read_chexpert(broken).df.path[0]
    (broken/gone).unlink()
    if missing == 'raise':
        with pytest.raises(DataError, match='1 of'): read_chexpert(broken)
    else:
        capsys.readouterr(); r = read_chexpert(broken, missing=missing)
        assert len(r) == n - (missing == 'drop') and (gone in set(r.df.path)) == (missing == 'keep')
        if missing == 'drop': assert '1' in capsys.readouterr().out


# ---------------------------------------------------------------- labels

@pytest.mark.parametrize('uncertain,want', [('ignore', np.nan), ('zeros', 0.), ('ones', 1.)])
def test_uncertain_labels(tree, uncertain, want):
    "-1 is what the policy says, and 1 and 0 stay what they are"
    r = read_chexpert(tree, FIVE, uncertain=uncertain, blank='ignore')
    got, was = both(r, tree)
    for l in FIVE:
        expect = was[l].map({'1.0': 1., '0.0': 0., '-1.0': want}).astype(float)
        assert (was[l] == '-1.0').any()
        np.testing.assert_array_equal(got[l].astype(float), expect)

def test_uncertain_labels_are_ignored_unless_told(tree):
    got, was = both(read_chexpert(tree, FIVE), tree)
    assert all(got[l][was[l] == '-1.0'].isna().all() for l in FIVE)

def test_soft_labels_for_uncertain(tree):
    r = read_chexpert(tree, FIVE, uncertain=soft(.55, .85))
    again, (got, was) = by_path(read_chexpert(tree, FIVE, uncertain=soft(.55, .85))), both(r, tree)
    y, u = got[FIVE].astype(float), was[FIVE] == '-1.0'
    assert y.equals(again[FIVE].astype(float)) and not by_path(read_chexpert(tree, FIVE, uncertain=soft(.55, .85, seed=1)))[FIVE].equals(got[FIVE])
    values = y.to_numpy()[u.to_numpy()]
    assert ((values >= .55) & (values <= .85)).all() and len(np.unique(values)) > 3 and y.where(~u, 0).isin([0, 1]).all().all()

def test_soft_range_is_checked():
    for lo, hi in ((.8, .2), (-.1, .5), (.5, 1.5)):
        with pytest.raises(ConfigError): soft(lo, hi)

def test_uncertainty_policy_per_label(tree):
    "A dict names labels; those it leaves out are ignored"
    r = read_chexpert(tree, FIVE, uncertain={'Edema': 'ones', 'Consolidation': 'zeros', 'Atelectasis': soft(.6, .7)})
    got, was = both(r, tree)
    at = {l: got[l][was[l] == '-1.0'] for l in FIVE}
    assert (at['Edema'] == 1).all() and (at['Consolidation'] == 0).all() and at['Atelectasis'].between(.6, .7).all()
    assert at['Cardiomegaly'].isna().all() and at['Pleural Effusion'].isna().all()

@pytest.mark.parametrize('bad', ['maybe', 1, {'Edema': 'maybe'}, {'Oedema': 'ones'}])
def test_unknown_policy_is_refused(tree, bad):
    with pytest.raises(MedPrivacyError): read_chexpert(tree, FIVE, uncertain=bad)

@pytest.mark.parametrize('blank,want', [('zeros', 0.), ('ignore', np.nan)])
def test_blank_labels(tree, blank, want):
    got, was = both(read_chexpert(tree, FIVE, blank=blank), tree)
    for l in FIVE:
        v = got[l][was[l].isna()].to_numpy(float)
        assert len(v) and (np.isnan(v).all() if np.isnan(want) else (v == want).all())

def test_unknown_blank_policy_is_refused(tree):
    with pytest.raises(MedPrivacyError): read_chexpert(tree, blank='ones')

def test_no_finding_is_one_or_blank(tree):
    r = read_chexpert(tree, ['No Finding'])
    got, was = both(r, tree)
    assert set(was['No Finding'][got.split != 'test'].dropna()) == {'1.0'} and set(got['No Finding']) == {0., 1.}

def test_default_labels_are_in_the_table(tree):
    r = read_chexpert(tree)
    assert r.task == 'multilabel' and r.name == 'chexpert' and set(FIVE) <= set(r.labels) <= set(raw(tree).columns)

@pytest.mark.parametrize('value', ['2.0', '-2', '0.5', 'yes'])
def test_unknown_label_code_is_refused(broken, value):
    put(broken/'train.csv', 'Edema', value, frontal_row(broken))
    with pytest.raises(DataError, match='Edema'): read_chexpert(broken)

def test_unknown_label_name_is_refused(tree):
    with pytest.raises(MedPrivacyError, match='Oedema'): read_chexpert(tree, ['Oedema'])


# ---------------------------------------------------------------- sex and age

def test_unknown_sex_is_null(tree):
    "One row of sex `Unknown`; the published code turns it into a woman"
    got, was = both(read_chexpert(tree, frontal=False), tree)
    assert (was.Sex == 'Unknown').sum() == 1 and got.sex[was.Sex == 'Unknown'].isna().all()
    assert (got.sex[was.Sex == 'Male'] == 'M').all() and (got.sex[was.Sex == 'Female'] == 'F').all()

def test_rows_keep_their_own_sex_and_age_after_a_filter(tree):
    "The published loader pairs images with other people's sex once rows are filtered"
    got, was = both(read_chexpert(tree), tree)
    assert len(got) < len(raw(tree))
    assert (got.sex.map({'M': 'Male', 'F': 'Female'}).fillna('Unknown') == was.Sex).all()
    age = was.Age.astype(float)
    assert (got.age[age > 0] == age[age > 0]).all()

def test_unknown_sex_code_is_refused(broken):
    put(broken/'train.csv', 'Sex', 'X', frontal_row(broken))
    with pytest.raises(DataError): read_chexpert(broken)

def test_age_zero_is_null(tree):
    got, was = both(read_chexpert(tree), tree)
    zero = was.Age.astype(float) == 0
    assert zero.any() and got.age[zero].isna().all() and (got.age_raw[zero].astype(float) == 0).all() and got.age[~zero].notna().all()

def test_age_ninety_is_topcoded(tree):
    got, was = both(read_chexpert(tree), tree)
    top = was.Age.astype(float) == 90
    assert top.any() and (got.age[top] == 90).all() and got.age_topcoded[top].astype(bool).all() and not got.age_topcoded[~top].astype(bool).any()

def test_age_text_is_refused(broken):
    put(broken/'train.csv', 'Age', 'old', frontal_row(broken))
    with pytest.raises(DataError): read_chexpert(broken)


# ---------------------------------------------------------------- views

def test_frontal_images_only_unless_told(tree):
    got, was = both(read_chexpert(tree), tree)
    assert (was['Frontal/Lateral'] == 'Frontal').all() and len(got) == (raw(tree)['Frontal/Lateral'] == 'Frontal').sum()

def test_laterals_have_no_ap_pa(tree):
    got, was = both(read_chexpert(tree, frontal=False), tree)
    lateral = was['Frontal/Lateral'] == 'Lateral'
    assert lateral.any() and was['AP/PA'][lateral].isna().all() and (got['view'][lateral] == 'L').all() and len(got) == len(raw(tree))

def test_lateral_with_ap_pa_is_refused(broken):
    "Laterals leave the column blank; if not, the columns do not say what the page says"
    put(broken/'train.csv', 'AP/PA', 'AP', int(np.flatnonzero(pd.read_csv(broken/'train.csv')['Frontal/Lateral'] == 'Lateral')[0]))
    with pytest.raises(DataError, match='Lateral'): read_chexpert(broken)

def test_folder_above_the_release(tree):
    "The folder that holds the release folder is taken too"
    assert len(read_chexpert(tree.parent)) == len(read_chexpert(tree))

def test_ap_and_pa(tree):
    got, was = both(read_chexpert(tree), tree)
    known = was['AP/PA'].isin(['AP', 'PA'])
    assert (got['view'][known] == was['AP/PA'][known]).all()

def test_rare_ll_and_rl_views(tree):
    "They are known codes, and neither AP nor PA"
    got, was = both(read_chexpert(tree), tree)
    rare = was['AP/PA'].isin(['LL', 'RL'])
    assert rare.sum() == 2 and not got['view'][rare].isin(['AP', 'PA']).any()

@pytest.mark.parametrize('column,value', [('AP/PA', 'XX'), ('Frontal/Lateral', 'Oblique')])
def test_unknown_view_code_is_refused(broken, column, value):
    put(broken/'train.csv', column, value, frontal_row(broken))
    with pytest.raises(DataError): read_chexpert(broken)


# ---------------------------------------------------------------- splits

def test_valid_csv_is_the_test_split(tree):
    got = by_path(read_chexpert(tree))
    official = got.index.str.startswith('valid/')
    assert official.any() and (got.split[official] == 'test').all() and (got.split[~official] != 'test').all()

def test_validation_is_carved_out_of_train_by_patient(tree):
    r = read_chexpert(tree)
    assert set(r.df.split) == {'train', 'valid', 'test'} and r.df.groupby('patient_id').split.nunique().max() == 1
    wide = read_chexpert(tree, frontal=False)
    assert by_path(r).split.equals(by_path(wide).split.loc[r.df.path])

def test_patient_in_both_files_is_a_leak(broken):
    "A patient folder of train.csv repeated in valid.csv"
    i, j = frontal_row(broken), frontal_row(broken, 'valid')
    p = pd.read_csv(broken/'train.csv').Path[i].split('/')[2]
    put(broken/'valid.csv', 'Path', f'CheXpert-v1.0-small/valid/{p}/study1/view1_frontal.jpg', j)
    with pytest.raises(LeakageError, match="chexpert: 1 patient.s. stand in two values of 'split'"): read_chexpert(broken, missing='keep')

@pytest.mark.parametrize('value', ['-1.0', None], ids=['uncertain', 'blank'])
def test_valid_csv_has_no_blanks_and_no_uncertain_labels(broken, value):
    "The radiologists decided every label; if the file says otherwise it is not the file that the page describes"
    put(broken/'valid.csv', 'Edema', value, frontal_row(broken, 'valid'))
    with pytest.raises(DataError): read_chexpert(broken)


# ---------------------------------------------------------------- files

def test_a_byte_order_mark_does_no_harm(broken):
    f = broken/'train.csv'
    f.write_bytes(b'\xef\xbb\xbf' + f.read_bytes())
    assert len(read_chexpert(broken))

@pytest.mark.parametrize('gone', ['train.csv', 'valid.csv'])
def test_missing_table_says_where_to_apply(broken, gone):
    (broken/gone).unlink()
    with pytest.raises(DataError, match='(?s)' + gone.replace('.', r'\.') + '.*(aimi|stanford)'): read_chexpert(broken)

def test_published_counts_are_compared(tree, capsys):
    read_chexpert(tree)
    assert 'WARNING' in capsys.readouterr().out


def test_a_label_named_twice(tmp_path):
    with pytest.raises(ConfigError, match='twice'): read_chexpert(fake_chexpert(tmp_path), ['Edema', 'Edema'])
