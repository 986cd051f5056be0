"Poisson draws of units, and batches of given rows from each kind of loader"
import numpy as np
import pytest
import torch
from fastai.data.load import DataLoader
from medprivacy.core import ConfigError
from medprivacy.dp.sample import PoissonDL, PoissonSampler, fetch_rows, loader_bs, train_rows

def test_each_unit_is_drawn_at_the_rate_whatever_its_rows():
    rows = np.repeat(np.arange(40), np.arange(1, 41))   # patient k has k+1 rows
    order = np.random.default_rng(1).permutation(len(rows))
    ids = np.array([f'p{k}' for k in rows])[order]
    s, n = PoissonSampler(ids, len(ids), bs=8, seed=0), 4000
    draws = [s.draw() for _ in range(n)]
    assert all(len(set(ids[d]))==len(d) for d in draws)
    drawn = np.concatenate(draws)
    per = {u: (ids[drawn]==u).sum()/n for u in set(ids)}
    se = np.sqrt(.2*.8/n)
    assert max(abs(v-.2) for v in per.values()) < 4.5*se
    last = drawn[ids[drawn]=='p39']                      # its 40 rows are equally likely
    counts = np.array([(last==r).sum() for r in np.flatnonzero(ids=='p39')])
    assert abs(((counts-counts.mean())**2).sum()/counts.mean()-39) < 5*np.sqrt(2*39)

def test_steps_are_independent_and_sizes_binomial():
    s = PoissonSampler(None, 50, bs=5, seed=0)
    sizes = np.array([len(s.draw()) for _ in range(5000)])
    assert abs(sizes.mean()-5) < 5*np.sqrt(4.5/5000) and abs(sizes.var()-4.5) < 5*4.5*np.sqrt(2/5000)
    assert abs(np.corrcoef(sizes[1:], sizes[:-1])[0,1]) < 5/np.sqrt(5000)
    assert (sizes==0).any()

def test_entropy_is_fresh_unless_seeded():
    draw = lambda seed: [tuple(PoissonSampler(None, 500, 100, seed).draw()) for _ in range(2)]
    a, b = draw(None); assert a != b
    a, b = draw(3);    assert a == b

@pytest.mark.parametrize('n,bs,steps', [(100,20,5), (100,100,1), (100,70,1), (60,7,9)])
def test_steps_per_epoch(n, bs, steps):
    s = PoissonSampler(None, n, bs)
    assert (s.rate, s.steps_per_epoch) == (bs/n, steps)

@pytest.mark.parametrize('units,n,bs,words', [(np.arange(5), 6, 2, 'one id per row'), (np.zeros(6), 6, 2, 'number of units'),
    (None, 6, 7, 'number of units'), (np.array(['a',None,'b'], dtype=object), 3, 1, 'missing ids')])
def test_bad_units(units, n, bs, words):
    with pytest.raises(ConfigError, match=words): PoissonSampler(units, n, bs)

class Fetches:
    "A loader with the fast path"
    bs, dataset = 4, list(range(10))
    def fetch(self, idxs): return torch.tensor(idxs, dtype=torch.float)[:,None], torch.tensor(idxs)

def loaders():
    ds = [(torch.full((2,), float(i)), torch.tensor(i)) for i in range(10)]
    double = lambda b: (b[0]*2, b[1])
    return dict(ours=Fetches(), fastai=DataLoader(ds, bs=4, shuffle=True), transformed=DataLoader(ds, bs=4, after_batch=double),
                torch=torch.utils.data.DataLoader(ds, batch_size=4))

@pytest.mark.parametrize('kind', ['ours', 'fastai', 'transformed', 'torch'])
def test_rows_from_every_loader(kind):
    dl = loaders()[kind]
    x, y = fetch_rows(dl, np.array([7,2]))
    assert y.tolist()==[7,2] and x[:,0].tolist()==([14.,4.] if kind=='transformed' else [7.,2.])
    x, y = fetch_rows(dl, [])
    assert len(x)==len(y)==0 and x.ndim==2
    assert (train_rows(dl), loader_bs(dl)) == (10, 4)
    p = PoissonDL(dl, PoissonSampler(None, 10, 4, seed=0), 7)
    assert len(p)==7==len(list(p)) and p.dataset is dl.dataset

def test_loaders_that_draw_their_own_way_are_refused():
    from fastai.data.core import TfmdLists
    from fastai.callback.data import WeightedDL
    dl = WeightedDL(TfmdLists(list(range(4)), []), bs=2, wgts=[1,1,1,1.])
    with pytest.raises(ConfigError, match='WeightedDL'): train_rows(dl)
    with pytest.raises(ConfigError, match='row number'): train_rows(iter([]))
    with pytest.raises(ConfigError, match='batch size'): loader_bs(torch.utils.data.DataLoader([1,2], batch_size=None))
