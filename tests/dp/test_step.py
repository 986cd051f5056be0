"A private step inside a learner: equal to a loop over samples with every setting; optimizers and callbacks around it"
import warnings
from functools import partial
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import CSVLogger, ProgressCallback
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import GradientClip
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner, Recorder
from fastai.metrics import accuracy
from fastai.optimizer import SGD, Adam, Lookahead, OptimWrapper, RAdam, ranger
from torch import nn
import medprivacy.dp.callback  # noqa: F401
from medprivacy.core import BudgetError, ConfigError, UnsupportedUnderDP
from medprivacy.dp.average import EMACallback
from medprivacy.dp.sample import PoissonSampler
from medprivacy.dp.step import clip_step
from medprivacy.models.resnet import resnet9
from medprivacy.train import in_precision

class Shifts:
    "A transform of a whole batch, with one random shift for all its images"
    def __init__(self): self.seen = []
    def __call__(self, b):
        s = float(torch.rand(()))
        self.seen.append(s)
        return b[0]+s, *b[1:]

def dls_of(n=40, bs=8, dtype=torch.float32, tfm=None):
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 2, (n,), generator=g)
    x = (torch.randn(n, 1, 8, 8, generator=g) + y[:,None,None,None]).to(dtype)
    ds = list(zip(x, y))
    dls = DataLoaders(DataLoader(ds, bs=bs, shuffle=True, **({'after_batch': tfm} if tfm else {})), DataLoader(ds[:16], bs=8))
    dls.train_patients = np.arange(n)
    return dls

def net(): return nn.Sequential(nn.Conv2d(1,6,3,2), nn.GroupNorm(2,6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6,2))

def learner(dls=None, model=None, loss=None, **kw):
    torch.manual_seed(0)
    learn = Learner(dls or dls_of(), model or net(), loss_func=loss or nn.CrossEntropyLoss(), metrics=kw.pop('metrics', accuracy), lr=.05, **kw)
    learn.remove_cb(ProgressCallback); learn.logger = lambda *o: None
    return learn

def weights(learn): return torch.cat([p.detach().flatten().clone() for p in learn.model.parameters()])

class Batches(Callback):
    order = 1000
    def before_fit(self): self.seen = []
    def before_batch(self):
        if self.training: self.seen.append((self.xb[0].clone(), self.yb[0].clone()))

def factor(gs, c, clipping):
    "Clipped gradients of one image, by name"
    norm = lambda ts: torch.stack([t.norm() for t in ts]).norm().item()
    if clipping == 'flat': return {k: g*min(1., c/(norm(gs.values())+1e-6)) for k,g in gs.items()}
    if clipping == 'automatic': return {k: g*c/(norm(gs.values())+.01) for k,g in gs.items()}
    layers = {}
    for k,g in gs.items(): layers.setdefault(k.rpartition('.')[0], {})[k] = g
    return {k: g*min(1., c/len(layers)**.5/(norm(l.values())+1e-6)) for l in layers.values() for k,g in l.items()}

def loop(model, loss, seen, c, clipping, views, bs, lr):
    "The same steps, one sample at a time"
    params = dict(model.named_parameters())
    for x,y in seen:
        total = {k: torch.zeros_like(p) for k,p in params.items() if p.requires_grad}
        for i in range(len(y)):
            l  = sum(loss(model(x[j:j+1]), y[i:i+1]) for j in range(i*views, (i+1)*views))/views
            gs = dict(zip(total, torch.autograd.grad(l, [params[k] for k in total])))
            for k,g in factor(gs, c, clipping).items(): total[k] += g
        with torch.no_grad():
            for k,t in total.items(): params[k] -= lr*t/bs
    return model

GRID = [dict(clipping=c, views=v, physical_bs=p) for c in ('flat','automatic','layer') for v,p in ((1,None),(3,2))] + [dict(views=2, physical_bs=1)] + \
       [dict(engine='opacus', clipping=c, physical_bs=3) for c in ('flat','layer')]

@pytest.mark.parametrize('kw', GRID, ids=str)
@pytest.mark.parametrize('sizes', ['poisson', 'empty and one'])
def test_a_fit_is_a_loop_over_samples(kw, sizes, monkeypatch):
    if sizes != 'poisson':
        draw, turn = PoissonSampler.draw, iter(range(100))
        monkeypatch.setattr(PoissonSampler, 'draw', lambda self: draw(self)[:(0,1,5)[next(turn)%3]])
    tfm, loss = Shifts(), nn.CrossEntropyLoss(weight=torch.tensor([1.,9.]).double())
    learn = learner(dls_of(dtype=torch.float64, tfm=tfm), net().double(), loss, opt_func=SGD)
    ref = net().double(); ref.load_state_dict(learn.model.state_dict())
    learn.to_private(noise_multiplier=0, max_grad_norm=.3, seed=1, **kw)
    learn.fit(2, .1, cbs=(b := Batches()))
    v = kw.get('views', 1)
    assert len(b.seen)==10 and all(len(x)==v*len(y) for x,y in b.seen)
    if v > 1:   # K views, each with a shift of its own, the same for all images of the batch
        x = next(x for x,y in b.seen if len(y)).unflatten(0, (-1,v))
        assert len({round(float(o), 6) for o in (x[0]-x[0,:1]).flatten(1).mean(1)})==v
    loop(ref, loss, b.seen, .3, kw.get('clipping','flat'), v, 8, .1)
    for p,q in zip(learn.model.parameters(), ref.parameters()): assert (p-q).abs().max() < 1e-8

class LoRA(nn.Module):
    "A frozen layer and a trained product of two thin ones"
    def __init__(self, i, o, r=2):
        super().__init__()
        self.base, self.a, self.b = nn.Linear(i,o), nn.Linear(i,r,bias=False), nn.Linear(r,o,bias=False)
        self.base.requires_grad_(False)
    def forward(self, x): return self.base(x) + self.b(self.a(x))

@pytest.mark.parametrize('kind', ['head', 'lora', 'biases'])
def test_subsets_of_parameters(kind):
    model = nn.Sequential(nn.Flatten(), LoRA(64,5) if kind=='lora' else nn.Linear(64,5), nn.Tanh(), nn.Linear(5,2)).double()
    for n,p in model.named_parameters():
        if kind=='head' and not n.startswith('3'): p.requires_grad_(False)
        if kind=='biases' and not n.endswith('bias'): p.requires_grad_(False)
    learn = learner(dls_of(dtype=torch.float64), model, opt_func=SGD)
    before = {n: p.detach().clone() for n,p in model.named_parameters()}
    ref = nn.Sequential(nn.Flatten(), LoRA(64,5) if kind=='lora' else nn.Linear(64,5), nn.Tanh(), nn.Linear(5,2)).double()
    ref.load_state_dict(model.state_dict())
    for p,q in zip(ref.parameters(), model.parameters()): p.requires_grad_(q.requires_grad)
    for p in model.parameters(): p.grad = torch.ones_like(p)          # what a public training left behind
    learn.to_private(noise_multiplier=0, max_grad_norm=.2, seed=1)
    learn.fit(2, .1, cbs=(b := Batches()))
    loop(ref, nn.CrossEntropyLoss(), b.seen, .2, 'flat', 1, 8, .1)
    for (n,p),q in zip(model.named_parameters(), ref.parameters()):
        assert (p-q).abs().max() < 1e-8
        assert torch.equal(p, before[n]) != p.requires_grad

# ------------------------------------------------------------ precision

class Terms:
    max_grad_norm, physical_bs, clipping, views, engine, precision = .9, None, 'flat', 1, 'book-keeping', 'fp32'
    def __init__(self, **kw): vars(self).update(kw)

def summed_norms(cb, model, x, y):
    "Float64 norms of what each image adds to the sum"
    out = []
    for i in range(len(y)):
        o = clip_step(cb, model, nn.CrossEntropyLoss(), (x[i:i+1],), (y[i:i+1],), check=False)
        out.append(torch.cat([g.double().flatten() for g in o.grads.values()]).norm().item())
    return out

@pytest.mark.parametrize('clipping', ['flat', 'automatic', 'layer'])
@pytest.mark.parametrize('how', ['argument', 'in_precision'])
def test_in_bfloat16_the_sum_keeps_its_bound(how, clipping):
    model, x, y = resnet9(2), 30*torch.rand(6,3,32,32), torch.tensor([0,1,1,0,1,0])
    if how == 'argument': norms = summed_norms(Terms(precision='bf16', clipping=clipping), model, x, y)
    else:
        with in_precision('bf16', model): norms = summed_norms(Terms(clipping=clipping), model, x, y)
    assert max(norms) <= .9*(1+1e-6)
    assert clipping != 'flat' or min(norms) > .9*(1-1e-5)              # all of them were longer

def test_in_bfloat16_a_batch_is_the_sum_of_its_images():
    cb, model, x, y = Terms(precision='bf16'), resnet9(2), torch.rand(5,3,32,32), torch.tensor([0,1,1,0,1])
    whole = clip_step(cb, model, nn.CrossEntropyLoss(), (x,), (y,))
    assert (whole.norms > .9).all() and sum(v.double().square().sum() for v in whole.grads.values()).sqrt() <= 5*.9*(1+1e-6)
    fine = clip_step(Terms(), model, nn.CrossEntropyLoss(), (x,), (y,))
    a, b = (torch.cat([g.flatten() for g in o.grads.values()]) for o in (whole, fine))
    assert (a-b).norm() < .05*b.norm() and not torch.equal(a, b)       # it is another precision, and not by much

def test_a_coarse_product_would_break_the_bound_and_is_switched_off():
    model = nn.Sequential(nn.Flatten(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 2))
    x, y = torch.randn(64,512), torch.randint(0, 2, (64,))
    ref = clip_step(Terms(), model, nn.CrossEntropyLoss(), (x,), (y,)).grads
    torch.set_float32_matmul_precision('medium')
    try: got = clip_step(Terms(), model, nn.CrossEntropyLoss(), (x,), (y,)).grads
    finally: torch.set_float32_matmul_precision('highest')
    assert all(torch.equal(a, b) for a,b in zip(ref.values(), got.values()))

def test_opacus_cannot_do_everything():
    inplace = nn.Sequential(nn.Conv2d(1,4,3), nn.ReLU(True), nn.Flatten(), nn.Linear(4*36,2))
    with pytest.raises(UnsupportedUnderDP, match="engine='book-keeping'"): learner(model=inplace).to_private(noise_multiplier=1., engine='opacus').fit(1)
    with pytest.raises(ConfigError, match='one view'): learner().to_private(noise_multiplier=1., engine='opacus', views=2)
    learn = learner(dls_of(n=8, bs=4)).to_private(noise_multiplier=1., engine='opacus', physical_bs=2)
    learn.fit(1)
    assert learn.dp.spent.steps==2 and not any(m._forward_hooks for m in learn.model.modules()) and not any(hasattr(p, 'grad_sample') for p in learn.model.parameters())

# ------------------------------------------------------------ fastai around it

OPTIMIZERS = {'SGD': SGD, 'Adam': Adam, 'RAdam': RAdam, 'ranger': ranger, 'NAdam': partial(OptimWrapper, opt=torch.optim.NAdam),
              'AdamW': partial(OptimWrapper, opt=torch.optim.AdamW), 'RMSprop': partial(OptimWrapper, opt=torch.optim.RMSprop)}
CALLBACKS  = {'save best': lambda: SaveModelCallback(monitor='accuracy', with_opt=False), 'save each': lambda: SaveModelCallback(every_epoch=True, with_opt=False),
              'early stopping': lambda: EarlyStoppingCallback(patience=5), 'plateau': lambda: ReduceLROnPlateau(patience=1), 'ema': lambda: EMACallback(.9),
              'gradient clip': lambda: GradientClip(.1), 'csv': CSVLogger, 'train metrics': None}

def check_fits(learn, fit, cbs=None):
    before = weights(learn)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning)   # fastai's load names a numpy module that has moved
        getattr(learn, fit)(2, .01, cbs=cbs)
        getattr(learn, fit)(1, .01)                        # two fits add up
    assert learn.dp.spent.steps==15 and 0 < learn.dp.spent.eps <= 8
    assert not torch.equal(before, weights(learn)) and weights(learn).isfinite().all()
    assert np.isfinite(learn.recorder.values[-1]).all() and 'epsilon' in learn.recorder.metric_names

@pytest.mark.parametrize('name', OPTIMIZERS)
def test_optimizers(name):
    check_fits(learner(opt_func=OPTIMIZERS[name]).to_private(8., epochs=3, delta=1e-3), 'fit_one_cycle')

@pytest.mark.parametrize('name', CALLBACKS)
def test_callbacks(name, tmp_path):
    kw = dict(cbs=Recorder(train_metrics=True), default_cbs=True) if name=='train metrics' else {}
    learn = learner(path=tmp_path, **kw).to_private(8., epochs=3, delta=1e-3, views=2)
    check_fits(learn, 'fit', CALLBACKS[name]() if CALLBACKS[name] else None)
    lists = {'save best': 'chooses the weights by accuracy', 'early stopping': 'chooses the last epoch', 'plateau': 'learning rate'}
    told = [q for q in learn.dp.unaccounted if 'training loss' not in q]
    assert len(told)==(name in lists) and lists.get(name, '') in ''.join(told)
    assert learn.to_public().get_preds()[0].shape==(16,2)

@pytest.mark.parametrize('fit', ['fit_flat_cos', 'fit_sgdr', 'fine_tune'])
def test_schedules(fit):
    learn = learner(splitter=lambda m: [list(m[:5].parameters()), list(m[5:].parameters())]).to_private(8., epochs=3, delta=1e-3)
    if fit == 'fit_sgdr': learn.fit_sgdr(1, 3)
    elif fit == 'fine_tune': learn.fine_tune(2)
    else: learn.fit_flat_cos(3)
    assert learn.dp.spent.steps==15 and learn.dp.spent.eps <= 8

@pytest.mark.filterwarnings('ignore::ResourceWarning', 'ignore::DeprecationWarning')    # wandb's service process
@pytest.mark.parametrize('first', ['any', 'empty'])
def test_wandb_offline(tmp_path, monkeypatch, first):
    wandb = pytest.importorskip('wandb')
    from medprivacy.log import wandb_run
    monkeypatch.chdir(tmp_path); monkeypatch.setenv('HOME', str(tmp_path)); monkeypatch.setenv('WANDB_MODE', 'offline')
    draws, draw = [], PoissonSampler.draw
    def drawn(self):
        draws.append(draw(self)[:0] if first=='empty' and not draws else draw(self))
        return draws[-1]
    monkeypatch.setattr(PoissonSampler, 'draw', drawn)        # fastai has no smooth loss before the first image
    learn = learner().to_private(8., epochs=3, delta=1e-3)
    with wandb_run(tmp_path/'w', dict(lr=.01)) as cbs:
        learn.add_cbs(cbs); check_fits(learn, 'fit')
        last = dict(wandb.run.summary)
    assert last['epsilon']==learn.dp.spent.eps and last['train_loss']==learn.recorder.values[-1][0]      # ε is logged as in the table
    assert list((tmp_path/'w').rglob('*.wandb')) and any('WandbCallback' in q for q in learn.dp.unaccounted)

@pytest.mark.parametrize('how', ['argument', 'in_precision'])
def test_a_fit_in_bfloat16(how):
    def run(kind, **kw):
        learn = learner(opt_func=SGD).to_private(noise_multiplier=0, max_grad_norm=.5, seed=1, **kw)
        with in_precision(kind, learn.model): learn.fit(2, .1)
        return learn
    whole = run('fp32')
    learn = run('fp32', precision='bf16') if how=='argument' else run('bf16')
    a, b, start = weights(learn), weights(whole), weights(learner())
    assert a.dtype==torch.float32 and not torch.equal(a, b) and (a-b).norm() < .05*(b-start).norm()
    assert learn.dp.spent.steps==whole.dp.spent.steps==10 and 'forward' not in vars(learn.model)
    noisy = learner().to_private(8., epochs=3, delta=1e-3, precision='bf16')
    check_fits(noisy, 'fit_one_cycle')
    assert 7.9 < noisy.dp.spent.eps <= 8 and noisy.to_public().get_preds()[0].dtype==torch.float32

def test_saved_weights_are_those_of_a_charged_step(tmp_path):
    class Keeps(Callback):
        def after_epoch(self): kept.append((weights(self.learn), self.learn.dp.spent.steps))
    kept, learn = [], learner(path=tmp_path).to_private(8., epochs=4, delta=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning)
        learn.fit_one_cycle(4, .05, cbs=[SaveModelCallback(monitor='accuracy', with_opt=False), Keeps()])
    best = int(np.argmax([v[2] for v in learn.recorder.values]))
    assert torch.equal(weights(learn), kept[best][0]) and [n for _,n in kept]==[5,10,15,20]
    assert learn.dp.spent.steps==20                        # the best one was chosen among all, and all are paid for

def test_the_way_back_to_an_ordinary_learner():
    learn = learner().to_private(8., epochs=3, delta=1e-3)
    with pytest.raises(BudgetError, match='lr_find'): learn.lr_find(show_plot=False)
    learn.fit_one_cycle(2, .01)
    with pytest.raises(BudgetError, match='lr_find'): learn.lr_find(show_plot=False)
    learn.fit_one_cycle(1, .01)
    assert learn.dp.spent.steps==15 and [n for n in learn.recorder.metric_names if n=='epsilon']==['epsilon']
    before, spent = weights(learn), learn.dp.spent
    learn.to_public()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning)   # fastai's load names a numpy module that has moved
        found = learn.lr_find(num_it=12, stop_div=False, show_plot=False)
    assert 0 < found.valley < 10 and torch.equal(before, weights(learn)) and learn._dp_past==spent
    learn.fit(1)
    assert not torch.equal(before, weights(learn)) and 'epsilon' not in learn.recorder.metric_names

def test_a_buffer_that_carries_images_is_refused():
    class Remembers(nn.Module):
        def __init__(self): super().__init__(); self.register_buffer('centre', torch.zeros(64)); self.fc = nn.Linear(64,2)
        def forward(self, x):
            if self.training: self.centre = self.centre*.9 + x.detach().flatten(1).mean(0)*.1
            return self.fc(x.flatten(1))
    with pytest.raises(UnsupportedUnderDP, match='centre'): learner(model=Remembers()).to_private(noise_multiplier=1.).fit(1)
    spectral = nn.Sequential(nn.Flatten(), nn.utils.parametrizations.spectral_norm(nn.Linear(64,2)))
    learner(model=spectral).to_private(noise_multiplier=1.).fit(1)    # made of weights alone

def test_what_opacus_cannot_take_is_refused_by_name():
    from medprivacy.dp.step import _hooked
    with pytest.raises(UnsupportedUnderDP, match="Opacus cannot take.*BatchNorm.*engine='book-keeping'"):
        with _hooked(torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))): pass
