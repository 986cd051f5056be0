"Real fundus photographs, by the general reader and by the reader of ODIR-5K; skipped where they are absent"
import numpy as np, pandas as pd, pytest
from fastai.learner import Learner

from medprivacy.data.core import read_table
from medprivacy.data.load import records_dls
from medprivacy.data.odir import read_odir
from medprivacy.data.split import split_patients
from medprivacy.models.resnet import create_classifier
from medprivacy.objectives.focal import MaskedBCE

pytestmark = pytest.mark.real
WORDS = dict(N='normal', D='diabetes', G='glaucoma', C='cataract', A='amd', H='hypertension', M='myopia', O='other')


@pytest.fixture(scope='module')
def folder(real_data): return real_data('odir-fundus')
@pytest.fixture(scope='module')
def table(folder): return pd.read_csv(folder/'labels.csv', dtype=str)


@pytest.fixture(scope='module')
def kaggle(table, tmp_path_factory):
    "A copy of the table under the column names of `full_df.csv`, one row an eye; the photographs stay where they are"
    file, rows = tmp_path_factory.mktemp('kaggle')/'full_df.csv', []
    for p,g in table.groupby('patient_id'):
        num, eye = str(int(p.removeprefix('odir'))), g.set_index('eye'); y = g[list(WORDS.values())].astype(int).max()
        row = {'ID': num, 'Patient Age': str(int(float(g.age.iloc[0]))) if g.age.notna().all() else '1',      # 1 stands for unknown
               'Patient Sex': dict(M='Male', F='Female')[g.sex.iloc[0]]}
        row |= {f'{s}-Fundus': f'{num}_{s.lower()}.jpg' for s in ('Left', 'Right')}
        row |= {f'{s}-Diagnostic Keywords': eye.keywords.get(s.lower(), '').replace(', ', '，') for s in ('Left', 'Right')}
        row |= {c: str(int(g.normal.astype(int).min()) if c == 'N' else y[w]) for c,w in WORDS.items()}
        rows += [dict(row, filename=i) for i in g.image_id]
    pd.DataFrame(rows).to_csv(file, index=False)
    return file


def step(records, n_out):
    "Loss after one epoch on 16 images"
    few = records.df.patient_id.unique()[:40]
    r = split_patients(records.select(where=records.df.patient_id.isin(few)), (.4, .2, .4), attack=0)
    dls = records_dls(r, size=32, bs=8, device='cpu')
    x, y = dls.one_batch()
    assert x.shape == (8, 3, 32, 32) and y.shape == (8, n_out) and .02 < float(x.mean()) < .98
    learn = Learner(dls, create_classifier('small_resnet', n_out, in_channels=3), loss_func=MaskedBCE())
    with learn.no_logging(): learn.fit(1, 1e-3)
    return float(learn.recorder.losses[-1])


def test_read_table(folder, table):
    r = read_table(folder/'labels.csv', folder, list(WORDS.values()), folder='images', extra=dict(laterality='eye'), name='odir')
    assert len(r) == len(table) == 3414 and r.df.patient_id.nunique() == 1787
    assert (r.df.sex == 'M').sum() == 1869 and r.df.age.isna().sum() == 16
    assert r.df[list(WORDS.values())].sum().astype(int).tolist() == [1544, 917, 142, 147, 127, 93, 126, 476]
    assert np.isfinite(step(r, 8))


def test_read_odir(folder, kaggle, table, capsys):
    "The classes that the reader finds in the keywords are those that stand in the table, for every eye"
    r = read_odir(folder, table=kaggle, unusable='keep'); out = capsys.readouterr().out
    df, t = r.df.set_index('image_id'), table.set_index('image_id')
    assert len(df) == len(t) and not set(df.index) ^ set(t.index) and 'differ from the patient columns' not in out
    for c,w in WORDS.items(): assert (df[c] == t[w].astype(float)[df.index]).all(), w
    assert (df.sex == t.sex[df.index]).all() and (df.laterality == t.eye[df.index].map(dict(left='L', right='R'))).all()
    assert ((df.remarks != '') == t.quality[df.index].notna()).all()
    np.testing.assert_array_equal(df.age, t.age[df.index].astype(float))
    assert np.isfinite(step(r, 8))


def test_unusable_are_left_out(folder, kaggle, table):
    df = read_odir(folder, table=kaggle).df
    assert len(df) == table.quality.isna().sum() and df.remarks.eq('').all()
