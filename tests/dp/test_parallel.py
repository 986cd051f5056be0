"Two and four processes with gloo against one: draws, clipped sums, noise, weights, ε, and what is refused"
import os
import subprocess
import sys
from pathlib import Path
import numpy as np
import pytest
import torch
from medprivacy.core import ConfigError, UnsupportedUnderDP
from medprivacy.dp.parallel import SharedDraws, check_same, mean_loss, noisy_sum, ranks, same_weights, start_ranks

SIGMA, C, BS, PATIENTS = 1.3, .7, 4, 24

def dls():
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 2, (2*PATIENTS,), generator=g)
    x = torch.randn(2*PATIENTS, 1, 8, 8, generator=g) + y[:,None,None,None]
    out = DataLoaders(DataLoader(list(zip(x, y)), bs=BS, shuffle=True), DataLoader(list(zip(x, y))[:8], bs=8))
    out.train_patients = np.arange(PATIENTS).repeat(2)
    return out

def learner(init, lr=.1, **kw):
    from fastai.callback.progress import ProgressCallback
    from fastai.learner import Learner
    from torch import nn
    import medprivacy.dp.callback  # noqa: F401
    torch.manual_seed(init)
    net = nn.Sequential(nn.Conv2d(1,6,3,2), nn.GroupNorm(2,6), nn.ReLU(True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6,2))
    learn = Learner(dls(), net, loss_func=nn.CrossEntropyLoss(), lr=lr)
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda *o: None
    return learn.to_private(max_grad_norm=C, **kw)

def weights(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()])

def train(init, **kw):
    "Sizes of the shares, losses, gradients of each step, and the end of a short private training"
    from fastai.callback.core import Callback
    class Watch(Callback):
        order = 60
        def before_fit(self): self.sizes, self.losses, self.grads = [], [], []
        def before_batch(self):
            if self.training: self.sizes.append(len(self.xb[0]))
        def before_step(self): self.grads.append(torch.cat([p.grad.flatten() for p in self.learn.model.parameters()]))
        def after_batch(self):
            if self.training: self.losses.append(float(self.learn.loss))
    learn, watch = learner(init, **kw), Watch()
    learn.add_cb(watch).fit(2)
    return dict(sizes=watch.sizes, losses=watch.losses, grads=torch.stack(watch.grads), weights=weights(learn), eps=learn.dp.spent.eps, steps=learn.dp.spent.steps, loss=learn.recorder.values[-1][1])

def work(folder):
    "What each of two processes does; results go to a file of its own"
    import warnings; warnings.filterwarnings('ignore')
    from fastai.callback.core import Callback
    from torch import nn
    from medprivacy.dp.clip import clipped_gradient
    from medprivacy.models.resnet import SmallResNet
    rank, n = start_ranks()
    out = dict(n=n)
    for dtype in torch.float32, torch.float64:       # 7 images on 2 ranks; then 1, so that a rank has none
        for images in 7, 1:
            torch.manual_seed(rank)                  # ranks disagree until they are given one state
            net = same_weights(SmallResNet(2, width=8).to(dtype))
            x, y = torch.randn(7,3,16,16, generator=torch.Generator().manual_seed(1)).to(dtype)[:images], (torch.arange(7)%2)[:images]
            got = noisy_sum(clipped_gradient(net, nn.CrossEntropyLoss(), x[rank::n], y[rank::n], .5)[0], lambda gs: gs)
            ref = clipped_gradient(net.double(), nn.CrossEntropyLoss(), x.double(), y, .5)[0]
            out[f'off {dtype} {images}'] = float(max((got[k]-g).abs().max() for k,g in ref.items())/max(g.abs().max() for g in ref.values()))
    out['exact'] = train(rank+5, noise_multiplier=0., seed=3)
    out['noisy'] = train(rank+5, noise_multiplier=SIGMA)
    calls = []
    def noise(gs): calls.append(1); return {k: g+torch.randn(g.shape, dtype=g.dtype) for k,g in gs.items()}
    torch.manual_seed(0)                             # the worst a script can do: every rank has one seed
    out['sums'] = torch.stack([noisy_sum(dict(a=torch.zeros(3), b=torch.zeros(2).double()), noise)['a'] for _ in range(600)])
    out['calls'] = len(calls)
    out['mean loss'] = [float(mean_loss(torch.tensor([1., float('nan'), 4.]) if rank==0 else torch.zeros(0))), float(mean_loss(torch.zeros(0)))]
    def said(f):
        try: f()
        except (ConfigError, UnsupportedUnderDP) as e: return str(e)
    out['other noise'] = said(lambda: learner(0, noise_multiplier=1.+rank).fit(1))
    DistributedTrainer = type('DistributedTrainer', (Callback,), {})
    out['wrapped'] = said(lambda: learner(0, noise_multiplier=1.).add_cb(DistributedTrainer()).fit(1))
    out['facts'] = said(lambda: check_same(dict(a=1) if rank else dict(a=1, b=2)))
    torch.save(out, Path(folder)/f'{rank}.pt')

def on_ranks(n, d):
    "What each of n processes under torchrun found"
    cmd = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(n), __file__, str(d)]
    done = subprocess.run(cmd, env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore'}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(d/f'{i}.pt') for i in range(n)]

@pytest.fixture(scope='module')
def two(tmp_path_factory): return on_ranks(2, tmp_path_factory.mktemp('ranks'))

@pytest.fixture(scope='module')
def one(): return train(5, noise_multiplier=0., seed=3)

def test_clipped_sums_are_those_of_one_process(two):
    for o in two:
        assert o['n'] == 2
        for images in 7, 1:                           # one image: the other rank's share is empty
            assert o[f'off torch.float64 {images}'] < 1e-8 and o[f'off torch.float32 {images}'] < 1e-5

def test_a_training_without_noise_is_that_of_one_process(two, one):
    a, b = (o['exact'] for o in two)
    assert [i+j for i,j in zip(a['sizes'], b['sizes'])] == one['sizes']     # one draw, dealt out
    assert all(0 <= i-j <= 1 for i,j in zip(a['sizes'], b['sizes'])) and max(b['sizes']) > 0
    assert (a['grads']-one['grads']).abs().max() < 1e-5*one['grads'].abs().max()
    assert (a['weights']-one['weights']).abs().max() < 1e-5
    assert a['losses'] == b['losses'] and np.allclose(a['losses'], one['losses'], atol=1e-5)

@pytest.mark.parametrize('kind', ['exact','noisy'])
def test_weights_gradients_and_epsilon_are_the_same_on_all_ranks(two, one, kind):
    a, b = (o[kind] for o in two)
    assert torch.equal(a['weights'], b['weights']) and torch.equal(a['grads'], b['grads'])
    assert a['steps'] == b['steps'] == one['steps'] == 12 and a['loss'] == b['loss']
    if kind=='noisy':
        from medprivacy.dp.account import epsilon
        assert a['eps'] == b['eps'] == epsilon(SIGMA, BS/PATIENTS, 12, 1/(10*PATIENTS))     # counted once

def test_an_empty_share_works(two):
    sizes = [o['noisy']['sizes']+o['exact']['sizes'] for o in two]
    assert len(sizes[0]) == 24 and any(j==0 for j in sizes[1])

def test_noise_is_added_once_and_never_again(two):
    a, b = (o['sums'] for o in two)
    assert torch.equal(a, b) and [o['calls'] for o in two] == [600, 0]
    assert abs(a.std()-1) < .09                       # 1800 entries: std known to 1.7 %, times 5; two noises would give 1.41
    assert len(a.unique(dim=0)) == 600
    assert abs(np.corrcoef(a[1:].flatten(), a[:-1].flatten())[0,1]) < .12     # 5/√1797

def test_noise_of_a_training_has_the_scale_of_one_process(two):
    got = two[0]['noisy']['grads']*BS                 # 12 steps of 86 entries; a clipped sum has norm ≤ C per image
    std = got.std(correction=0)
    signal = C*max(i+j for i,j in zip(*(o['noisy']['sizes'] for o in two)))/got.shape[1]**.5
    assert SIGMA*C*.88 < std < ((SIGMA*C)**2*1.26+signal**2)**.5 and std < SIGMA*C*2**.5

def test_what_is_refused(two):
    assert all('noise_multiplier differs between ranks ([1.0, 2.0])' in o['other noise'] for o in two)
    assert all('start_ranks' in o['wrapped'] for o in two)
    assert all('b differs between ranks ([2, None])' in o['facts'] for o in two)

@pytest.mark.slow
def test_four_ranks(tmp_path, one):
    from medprivacy.dp.account import epsilon
    four = on_ranks(4, tmp_path)
    exact, noisy = ([o[k] for o in four] for k in ('exact', 'noisy'))
    for o in four:
        assert o['n'] == 4 and all(v < (1e-8 if 'float64' in k else 1e-5) for k,v in o.items() if k.startswith('off'))
        assert torch.equal(o['sums'], four[0]['sums']) and 'noise_multiplier differs' in o['other noise'] and o['mean loss'] == [2.5, 0.]
    assert [sum(s) for s in zip(*(o['sizes'] for o in exact))] == one['sizes'] and min(exact[3]['sizes']) == 0
    assert (exact[0]['grads']-one['grads']).abs().max() < 1e-5*one['grads'].abs().max() and (exact[0]['weights']-one['weights']).abs().max() < 1e-5
    for kind in (exact, noisy): assert all(torch.equal(o[k], kind[0][k]) for o in kind for k in ('weights', 'grads'))
    assert {(o['eps'], o['steps']) for o in noisy} == {(epsilon(SIGMA, BS/PATIENTS, 12, 1/(10*PATIENTS)), 12)}
    assert [o['calls'] for o in four] == [600, 0, 0, 0] and abs(four[0]['sums'].std()-1) < .09       # four noises would give 2

def test_the_loss_to_show_is_that_of_all_ranks(two):
    assert all(o['mean loss'] == [2.5, 0.] for o in two)

def test_one_process_needs_none_of_it():
    class Draw:
        def draw(self): return np.array([3, 1])
    assert ranks() == start_ranks() == (0, 1) and SharedDraws(Draw()).draw().tolist() == [3, 1]
    assert noisy_sum(dict(w=torch.ones(2)), lambda gs: {k: 2*g for k,g in gs.items()})['w'].tolist() == [2., 2.]
    assert mean_loss(torch.tensor([1., 3.])).item() == 2
    check_same(dict(a=1))

if __name__ == '__main__': work(sys.argv[1])
