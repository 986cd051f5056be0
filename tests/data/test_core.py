"Tables that must be refused, each with one error that names the file, the row or the value, and what to do"
import numpy as np, pandas as pd, pytest
from PIL import Image

from medprivacy.core import ConfigError, DataError, LeakageError
from medprivacy.data.core import Predictions, Records, load_predictions, make_predictions, read_table, save_predictions

N = 8


def table(**cols):
    base = dict(image_id=[f'i{k}.png' for k in range(N)], patient_id=[f'p{k//2}' for k in range(N)], sex=list('FFMMFFMM'),
                age=[40+k//2 for k in range(N)], effusion=[k % 2 for k in range(N)])
    return pd.DataFrame({**base, **cols})


@pytest.fixture
def folder(tmp_path):
    "Function: a table → its CSV beside eight images"
    for k in range(N): Image.new('L', (4, 4), k).save(tmp_path/f'i{k}.png')
    def _write(df, encoding='utf-8'):
        (tmp_path/'t.csv').write_bytes(df.to_csv(index=False).encode(encoding))
        return tmp_path/'t.csv'
    return _write


def read(csv, **kw): return read_table(csv, csv.parent, kw.pop('labels', ['effusion']), **kw)


def put(col, row, value):
    "The good table with one cell replaced"
    df = table().astype(object)
    df.loc[row, col] = value
    return df


BAD = {
    'no patient column':  (lambda: table().drop(columns='patient_id'), DataError, ['t.csv', "'patient_id'", 'found', 'patient=']),
    'no label column':    (lambda: table().drop(columns='effusion'),   DataError, ['t.csv', "'effusion'", 'found']),
    'no sex column':      (lambda: table().drop(columns='sex'),        DataError, ['t.csv', "'sex'", 'None where there is none']),
    'absent image':       (lambda: put('image_id', 3, 'gone.png'),     DataError, ['1 of 8', "'gone.png'", 'row 3', 'root']),
    'patient in two splits': (lambda: table(split=['train', 'test']+['train']*6), LeakageError, ["'split'", "'p0'", 'split_patients']),
    'patient in two parts':  (lambda: table(part=['defence']*2+['attack', 'defence']+['attack']*4), LeakageError, ["'part'", "'p1'"]),
    'sex 1/2':            (lambda: table(sex=[1, 1, 2, 2]*2),          DataError, ["'sex'", "'1'", "'2'", "sex_codes={'1': 'M'"]),
    'sex 0/1':            (lambda: table(sex=[0, 0, 1, 1]*2),          DataError, ["'sex'", "'0'", 'sex_codes']),
    'sex typing error':   (lambda: put('sex', 5, 'X'),                 DataError, ["'sex'", "'x'", 'sex_codes']),
    'empty label':        (lambda: table(effusion=None),               DataError, ["'effusion' is empty", 'drop it']),
    'label -1':           (lambda: put('effusion', 2, -1),             DataError, ["'effusion'", '-1', "'i2.png' (row 2)", 'blank (unknown)']),
    'label 2':            (lambda: put('effusion', 6, 2),              DataError, ["'effusion'", '2', "'i6.png' (row 6)"]),
    'label in words':     (lambda: put('effusion', 1, 'yes'),          DataError, ['t.csv', "'effusion'", "'yes'", '1, 0 or blank']),
    'image twice':        (lambda: put('image_id', 1, 'i0.png'),       DataError, ['not unique', "'i0.png' (row 0)", 'row 1', 'drop or rename']),
    'path with ..':       (lambda: put('image_id', 4, '../i4.png'),    DataError, ['leaves the root', 'row 4', 'relative']),
    'absolute path':      (lambda: put('image_id', 4, '/i4.png'),      DataError, ['leaves the root', "'/i4.png'", 'relative']),
    'no patient':         (lambda: put('patient_id', 7, None),         DataError, ["'patient_id' is empty", "'i7.png' (row 7)"]),
    'blank patient':      (lambda: put('patient_id', 7, '  '),         DataError, ["'patient_id' is empty", "'i7.png' (row 7)"]),
    'no image name':      (lambda: put('image_id', 0, None),           DataError, ["'image_id' is empty", 'row 0']),
    'two sexes':          (lambda: put('sex', 3, 'F'),                 DataError, ["'p1' has two sexes", 'blank the sex']),
    'age in words':       (lambda: put('age', 0, 'old'),               DataError, ["'age'", "'old'", '058Y']),
    'split misspelt':     (lambda: table(split='training'),            DataError, ["'split'", "'training'", "'train'"]),
    'no rows':            (lambda: table().iloc[:0],                   DataError, ['t.csv', 'no rows']),
}


@pytest.mark.parametrize('fault', BAD)
def test_bad_table(folder, fault):
    "One error; it names what is wrong and how to mend it, in one line"
    make, kind, words = BAD[fault]
    csv = folder(make())
    with pytest.raises(kind) as e: read(csv)
    text = str(e.value)
    assert [w for w in words if w not in text] == [] and '\n' not in text


def test_good_table(folder):
    r = read(folder(table()))
    assert len(r) == N and r.labels == ('effusion',) and r.df.effusion.dtype == float and r.df.sex.tolist() == list('FFMMFFMM')


@pytest.mark.parametrize('column', ['image_id', 'path', 'patient_id'])
def test_records_without_a_column(tmp_path, column):
    "Records that were not read by `read_table` are held to the same rules"
    df = table(path=[f'i{k}.png' for k in range(N)]).drop(columns=column)
    with pytest.raises(DataError, match='empty|missing'): Records(df, tmp_path, ['effusion']).validate(files=False)


@pytest.mark.parametrize('how', [dict(task='ranking'), dict(labels=[]), dict(task='multiclass', labels=['effusion', 'age'])])
def test_bad_settings(folder, how):
    with pytest.raises(ConfigError): read(folder(table()), **how)


def test_labels_as_text(folder):
    with pytest.raises(ConfigError, match='list of columns'): read(folder(table()), labels='effusion')


def test_byte_order_mark(folder):
    "A table saved by a spreadsheet starts with a byte order mark"
    assert read(folder(table(), 'utf-8-sig')).df.image_id[0] == 'i0.png'


def test_not_utf8(folder):
    csv = folder(table(view='thoráx'), 'latin-1')
    with pytest.raises(DataError, match='not UTF-8') as e: read(csv)
    assert 't.csv' in str(e.value) and 'save it as UTF-8' in str(e.value)


@pytest.mark.parametrize('content', [b'', b'a,b\n1,2,3\n4,5,6,7\n'])
def test_no_csv(tmp_path, content):
    (tmp_path/'t.csv').write_bytes(content)
    with pytest.raises(DataError, match='t.csv'): read(tmp_path/'t.csv')


def test_absent_table(tmp_path):
    with pytest.raises(DataError, match='gone.csv does not exist'): read(tmp_path/'gone.csv')


@pytest.mark.parametrize('codes,want', [({'1': 'M', '2': 'F'}, ['M', 'M', 'F', 'F']*2), ({1: 'F', 2: 'M'}, ['F', 'F', 'M', 'M']*2),
                                        ({'1': 'M', '2': None}, ['M', 'M', None, None]*2)])
@pytest.mark.parametrize('as_float', [False, True])
def test_sex_codes(folder, codes, want, as_float):
    "Codes are given, never guessed; 1 and 1.0 are the same code"
    sex = [1, 1, 2, 2]*2
    r = read(folder(table(sex=[float(s) for s in sex] if as_float else sex)), sex_codes=codes)
    assert [None if pd.isna(s) else s for s in r.df.sex] == want


def test_set_without_patients(folder):
    "Where no patient is known each image is its own, and the records say so"
    r = read(folder(table().drop(columns='patient_id')), patient=None)
    assert not r.patient_known and r.df.patient_id.tolist() == r.df.image_id.tolist()


def some_predictions(n=N):
    df = table(path='x', split=['valid', 'test']*(N//2), view='PA', device=None)
    df['patient_id'] = [f'00{k//2}' for k in range(N)]
    df.loc[3, 'age'] = np.nan
    recs = Records(df, '.', ['effusion'])
    y = df.effusion.to_numpy(float).copy(); y[5] = np.nan
    return make_predictions(recs, y, np.linspace(0, 1, N)/3, ['effusion'], model='m', run='r')


@pytest.mark.parametrize('ending', ['csv', 'parquet'])
def test_predictions_round_trip(tmp_path, ending):
    "Nothing is rounded, unknown stays unknown and patients keep their leading zeros"
    p = some_predictions(); f = save_predictions(p, tmp_path/f'p.{ending}'); q = load_predictions(f)
    assert q.labels == p.labels and list(q.df.columns) == list(p.df.columns)
    for c in ('image_id', 'patient_id', 'split', 'sex', 'model', 'run'): assert q.df[c].tolist() == p.df[c].tolist()
    for c in ('age', 'y_effusion', 'score_effusion'): np.testing.assert_array_equal(q.df[c].to_numpy(float), p.df[c].to_numpy(float))


def test_predictions_of_other_tools(tmp_path):
    "Only ids, truths and scores are needed"
    some_predictions().df[['image_id', 'patient_id', 'y_effusion', 'score_effusion']].to_csv(tmp_path/'p.csv', index=False)
    q = load_predictions(tmp_path/'p.csv')
    assert q.labels == ('effusion',) and set(q.df.split) == {'test'} and set(q.df.model) == {'p'}


@pytest.mark.parametrize('gone', ['image_id', 'patient_id', 'y_effusion', 'score_effusion'])
def test_predictions_lack(tmp_path, gone):
    some_predictions().df.drop(columns=gone).to_csv(tmp_path/'p.csv', index=False)
    with pytest.raises(DataError, match=gone.replace('effusion', '')): load_predictions(tmp_path/'p.csv')


def test_predictions_elsewhere(tmp_path):
    with pytest.raises(ConfigError, match='parquet or .csv'): save_predictions(some_predictions(), tmp_path/'p.json')
    with pytest.raises(DataError, match='does not exist'): load_predictions(tmp_path/'p.csv')


def test_a_condition_is_true_or_false_for_each_row(folder):
    "A null would count as true, a name of a column as true for all rows, and a Series of other rows would be misread"
    r = read(folder(table()))
    assert len(r.select(where=r.df.sex == 'F')) == len(r.select(where=lambda d: d.sex.map({'F': True, 'M': False}))) == 4
    assert len(r.select(where=np.zeros(N, bool))) == 0
    view = pd.Series(['PA', None, 'AP', 'PA', None, 'L', 'PA', 'PA'], dtype=object)
    for wrong in ('sex', [True, False], [0, 3], view.str.startswith('P').astype(object), r.df.age.where(r.df.age > 41),
                  (r.df.sex == 'F').sample(frac=1, random_state=0)):
        with pytest.raises(ConfigError, match='where'): r.select(where=wrong)


def test_a_label_named_twice(folder):
    with pytest.raises(ConfigError, match='effusion.*twice'): read(folder(table()), labels=['effusion', 'effusion'])


@pytest.mark.parametrize('col,value', [('age', 'old'), ('sex', 'X')])
def test_an_error_names_value_and_row(folder, col, value):
    with pytest.raises(DataError, match=f'{value.lower()}.* in 1 row.*row 5'): read(folder(put(col, 5, value)))
