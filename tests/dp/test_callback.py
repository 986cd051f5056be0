"Private training through fastai's Learner: exactness without noise, the noise itself, the budget, the guards"
import io, warnings
from contextlib import redirect_stdout
from functools import partial
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import ProgressCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner, Recorder, load_learner
from fastai.metrics import accuracy
from fastai.optimizer import SGD, OptimWrapper
from torch import nn
from medprivacy.core import BudgetError, ConfigError, UnsupportedUnderDP
from medprivacy.dp.account import PrivacySpent, epsilon
from medprivacy.dp.callback import DPCallback
from medprivacy.dp.noise import NoiseSource
from medprivacy.dp.sample import PoissonSampler
from medprivacy.data.phantom import tiny_dls
from medprivacy.models.resnet import SmallResNet, resnet9

class Empty:
    "What `export` keeps of the loaders"
    def cpu(self): pass

def dls_of(n=40, per=2, bs=8, chans=1, size=8, ids=True):
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 2, (n,), generator=g).repeat_interleave(per)
    x = torch.randn(n*per, chans, size, size, generator=g) + y[:,None,None,None]
    ds = list(zip(x, y))
    dls = DataLoaders(DataLoader(ds, bs=bs, shuffle=True), DataLoader(ds[:16], bs=8))
    dls.new_empty = Empty
    if ids: dls.train_patients = np.arange(n).repeat(per)
    return dls

def net(): return nn.Sequential(nn.Conv2d(1,6,3,2), nn.GroupNorm(2,6), nn.ReLU(True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6,2))

def learner(dls=None, model=None, loss=None, **kw):
    torch.manual_seed(0)
    learn = Learner(dls or dls_of(), model or net(), loss_func=loss or nn.CrossEntropyLoss(), metrics=kw.pop('metrics', accuracy), lr=kw.pop('lr', .05), **kw)
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda *o: None
    return learn

def weights(learn): return torch.cat([p.detach().flatten().clone() for p in learn.model.parameters()])

class Probe(Callback):
    "What the optimizer sees"
    order = DPCallback.order+1
    def before_fit(self): self.grads, self.sizes, self.losses = [], [], []
    def before_batch(self):
        if self.training: self.sizes.append(len(self.xb[0]))
    def after_loss(self):
        if self.training: self.losses.append(self.learn.loss.item())
    def before_step(self): self.grads.append(torch.cat([p.grad.flatten().clone() for p in self.learn.model.parameters()]))

# ------------------------------------------------------------ the step

@pytest.mark.parametrize('physical_bs', [None, 3, 1])
def test_without_noise_it_is_a_loop_over_samples(physical_bs):
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.,9.]).double())
    dls = dls_of()
    dls = DataLoaders(*[DataLoader([(x.double(),y) for x,y in o.dataset], bs=o.bs) for o in dls.loaders])
    dls.train_patients = np.arange(40).repeat(2)
    learn = learner(dls, net().double(), loss, opt_func=SGD).to_private(noise_multiplier=0, max_grad_norm=.3, seed=1, physical_bs=physical_bs)
    torch.manual_seed(0)
    ref = net().double(); ref.load_state_dict(learn.model.state_dict())
    class Rows(Callback):
        def before_batch(self):
            if self.training: seen.append((self.xb[0], self.yb[0]))
    seen = []
    learn.fit(2, .1, cbs=Rows())
    assert len(seen)==10
    for x,y in seen:
        total = [torch.zeros_like(p) for p in ref.parameters()]
        for i in range(len(y)):
            gs = torch.autograd.grad(loss(ref(x[i:i+1]), y[i:i+1]), list(ref.parameters()))
            norm = torch.stack([g.norm() for g in gs]).norm().item()
            for t,g in zip(total, gs): t += g*min(1., .3/(norm+1e-6))
        with torch.no_grad():
            for p,t in zip(ref.parameters(), total): p -= .1*t/8
    for a,b in zip(learn.model.parameters(), ref.parameters()): assert (a-b).abs().max() < 1e-8

class ZeroLoss(nn.Module):
    def forward(self, p, y): return (p*0).sum()

def test_noise_has_the_stated_scale_and_is_fresh_each_step():
    probe = Probe()
    learn = learner(model=nn.Sequential(nn.Flatten(), nn.Linear(64, 2000)), loss=ZeroLoss(), metrics=[], opt_func=SGD).to_private(noise_multiplier=1.7, max_grad_norm=.4)
    learn.fit(1, 0., cbs=probe)
    g, std = torch.stack(probe.grads), 1.7*.4/8
    n = g.shape[1]
    assert (g.mean(1).abs() < 5*std/n**.5).all() and (g.std(1)/std-1).abs().max() < 5/(2*n)**.5
    corr = torch.corrcoef(g) - torch.eye(len(g))
    assert corr.abs().max() < 5.5/n**.5
    assert abs(((g/std)**4).mean()-3) < 5*(96/g.numel())**.5     # as heavy-tailed as a Gaussian

def test_noise_is_never_repeated_unless_asked():
    def run(**kw):
        learn = learner(opt_func=SGD).to_private(noise_multiplier=1., **kw)
        learn.fit(1); return weights(learn), learn.dp.spent
    torch.manual_seed(5); a, spent = run()
    torch.manual_seed(5); b, _     = run()
    assert not torch.equal(a, b) and spent.private
    (a, spent), (b, _) = run(seed=5), run(seed=5)
    assert torch.equal(a, b) and not spent.private and str(spent).startswith('NOT PRIVATE')

def test_an_empty_batch_is_a_step_of_noise(monkeypatch):
    probe = Probe()
    draw = PoissonSampler.draw
    monkeypatch.setattr(PoissonSampler, 'draw', lambda self: draw(self)[:0])
    learn = learner(cbs=Recorder(train_metrics=True), default_cbs=True).to_private(noise_multiplier=1.)
    before = weights(learn)
    learn.fit(2, cbs=probe)
    assert probe.sizes==[0]*10 and len(probe.grads)==10 and learn.dp.spent.steps==10
    assert not torch.equal(before, weights(learn)) and weights(learn).isfinite().all()

def test_small_rates_meet_empty_batches_and_survive():
    probe = Probe()
    learn = learner(dls_of(bs=1)).to_private(noise_multiplier=2.)
    learn.fit(2, cbs=probe)
    assert 0 in probe.sizes and len(probe.grads)==80
    assert np.isfinite(list(learn.recorder.values[-1])).all()

def test_patients_count_once_in_a_step():
    dls = dls_of(n=40, per=3)
    ds = [(x, torch.tensor(i)) for i,(x,y) in enumerate(dls.train.dataset)]   # the target is the row
    own = DataLoaders(DataLoader(ds, bs=20, shuffle=True), DataLoader(ds, bs=8))
    own.train_patients = dls.train_patients
    seen = []
    class Rows(Callback):
        def before_batch(self):
            if self.training: seen.append(own.train_patients[self.yb[0].numpy()])
    learn = learner(own, loss=lambda p,y: p.sum(), metrics=[]).to_private(noise_multiplier=1.)
    learn.fit(10, cbs=Rows())
    assert all(len(set(s))==len(s) for s in seen) and len(seen)==20
    assert abs(np.mean([len(s) for s in seen])-20) < 5*np.sqrt(10/20)

# ------------------------------------------------------------ budget

def test_target_holds_and_the_noise_never_changes():
    learn = learner().to_private(target_epsilon=3, epochs=4)
    noise = learn.dp.noise_multiplier
    assert learn.dp.spent.eps==0
    learn.fit(1); first = learn.dp.spent
    out = io.StringIO()
    with redirect_stdout(out): learn.fit(5)
    spent = learn.dp.spent
    assert '15 of these 25 steps' in out.getvalue() and spent.steps==20
    assert 0 < first.eps < spent.eps <= 3 and spent.eps > 2.97 and spent.noise_multiplier==noise==learn.dp.noise_multiplier
    before = weights(learn)
    with pytest.raises(BudgetError, match='spent'): learn.fit(1)
    assert torch.equal(before, weights(learn)) and learn.dp.spent==spent
    learn.validate(); learn.get_preds()      # reading is not training

def test_the_first_fit_sets_the_noise():
    learn = learner().to_private(target_epsilon=2)
    assert learn.dp.noise_multiplier is None and learn.dp.spent.eps==0
    learn.fit_one_cycle(3)
    assert learn.dp.spent.steps==15 and 1.98 <= learn.dp.spent.eps <= 2
    with pytest.raises(BudgetError): learn.fit_one_cycle(1)

def test_noise_multiplier_has_no_cap():
    learn = learner().to_private(noise_multiplier=.9, delta=1e-3, accountant='rdp')
    for k in (1,2):
        learn.fit(1)
        assert learn.dp.spent == PrivacySpent(epsilon(.9, .2, 5*k, 1e-3, 'rdp'), 1e-3, 'rdp', 'poisson', neighbours='add-remove', unit='patient',
                                              steps=5*k, sample_rate=.2, noise_multiplier=.9)

def test_a_failed_step_is_charged_and_training_goes_on_afterwards():
    learn = learner().to_private(target_epsilon=5, epochs=2)
    class Fails(Callback):
        def before_step(self):
            if self.learn.dp.spent.steps==3: raise RuntimeError('power cut')
    with pytest.raises(RuntimeError, match='power cut'): learn.fit(2, cbs=Fails())
    assert learn.dp.spent.steps==3
    assert all(not m._forward_hooks for m in learn.model.modules())
    with redirect_stdout(io.StringIO()): learn.fit(2)
    assert learn.dp.spent.steps==10 and learn.dp.spent.eps <= 5

def test_eps_is_a_column_of_the_table():
    rows = []
    learn = learner().to_private(noise_multiplier=1.)
    learn.logger = rows.append
    learn.fit(2)
    assert list(learn.recorder.metric_names)==['epoch','train_loss','valid_loss','accuracy','epsilon','time']
    assert len(rows)==2 and all(len(r)==6 for r in rows) and rows[0][4] < rows[1][4]==learn.dp.spent.eps
    assert len(learn.validate())==2          # as on a public learner
    learn.fit(1); assert len(learn.final_record)==4

# ------------------------------------------------------------ fastai around it

def test_schedules_optimizers_and_losses_are_seen():
    probe = Probe()
    learn = learner(opt_func=partial(OptimWrapper, opt=torch.optim.NAdam)).to_private(noise_multiplier=.5, physical_bs=4)
    before = weights(learn)
    learn.fit_one_cycle(2, .01, cbs=probe)
    assert len(learn.recorder.lrs)==10-probe.sizes.count(0) and len(set(learn.recorder.lrs)) > 5
    assert not torch.equal(before, weights(learn)) and len(probe.losses)==10-probe.sizes.count(0)
    assert all(np.isfinite(probe.losses))

def test_validation_and_prediction_are_those_of_a_public_learner():
    learn = learner()
    before = learn.validate(), learn.get_preds()[0]
    learn.to_private(noise_multiplier=1.)
    after = learn.validate(), learn.get_preds()[0]
    assert list(before[0])==list(after[0]) and torch.equal(before[1], after[1])
    assert learn.get_preds(ds_idx=0)[0].shape==(80,2)
    learn.fit(1)
    preds = learn.get_preds()[0]
    assert torch.equal(learn.to_public().get_preds()[0], preds)
    assert learn.dls.train.__class__ is DataLoader

def test_to_public_gives_an_ordinary_learner():
    learn = learner().to_private(noise_multiplier=1.)
    keys = list(learn.model.state_dict())
    learn.fit(1)
    w = weights(learn)
    assert learn.to_public() is learn and not hasattr(learn, 'dp') and torch.equal(w, weights(learn)) and list(learn.model.state_dict())==keys
    probe = Probe()
    learn.fit(1, cbs=probe)
    assert probe.sizes==[8]*10 and 'epsilon' not in learn.recorder.metric_names
    with pytest.raises(BudgetError, match='before'): learn.to_private(noise_multiplier=1.)
    assert learn.to_public() is learn

def test_an_exported_learner_carries_neither_noise_nor_patients(tmp_path):
    learn = learner(loss=F.cross_entropy)
    learn.path = tmp_path
    learn.to_private(noise_multiplier=1., seed=918_273_645)
    learn.fit(1)
    state = learn.dp.__getstate__()
    kinds = torch.Generator, np.random.Generator, NoiseSource, PoissonSampler
    assert not any(isinstance(v, kinds) for v in state.values()) and 918_273_645 not in state.values()
    learn.export('out.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        back = load_learner(tmp_path/'out.pkl')
    assert back.dp.sampler is None and back.dp.noise is None and back.dp.spent.steps==5
    assert torch.equal(weights(back), weights(learn))
    back.dls = dls_of()
    with pytest.raises(ConfigError, match='loaded from a file'): back.fit(1)

def test_save_and_load_weights(tmp_path):
    learn = learner(); learn.path = tmp_path
    learn.to_private(noise_multiplier=1.).fit(1)
    learn.save('w')
    public = learner(); public.path = tmp_path
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')   # fastai names a numpy module that has moved
        public.load('w')
    assert torch.equal(weights(public), weights(learn))

# ------------------------------------------------------------ guards

@pytest.mark.parametrize('kw', [dict(), dict(target_epsilon=1, noise_multiplier=1), dict(target_epsilon=0), dict(noise_multiplier=-1), dict(noise_multiplier=float('nan')),
    dict(noise_multiplier=1, delta=1/40), dict(noise_multiplier=1, delta=0), dict(noise_multiplier=1, max_grad_norm=0), dict(noise_multiplier=1, unit='site'),
    dict(noise_multiplier=1, physical_bs=0), dict(noise_multiplier=1, accountant='x'), dict(noise_multiplier=1, patients=np.arange(3)), dict(target_epsilon=1, epochs=0),
    dict(target_epsilon='8'), dict(noise_multiplier=float('inf')), dict(noise_multiplier=1, epochs='2'), dict(noise_multiplier=1, count_noise=3.)])
def test_settings_are_checked_at_the_door(kw):
    learn = learner()
    with pytest.raises(ConfigError): learn.to_private(**kw)
    assert not hasattr(learn, 'dp')

def test_units():
    no_ids = dls_of(ids=False)
    with pytest.raises(ConfigError, match='patients='): learner(no_ids).to_private(noise_multiplier=1)
    assert learner(no_ids).to_private(noise_multiplier=1, patients=np.arange(40).repeat(2)).dp.spent.sample_rate==.2
    image = learner(no_ids).to_private(noise_multiplier=1, unit='image').dp.spent
    assert image.unit=='image' and image.sample_rate==.1 and image.delta < 1/80
    assert learner().to_private(noise_multiplier=1).dp.spent.delta < 1/40
    with pytest.raises(ConfigError, match='private already'): learner().to_private(noise_multiplier=1).to_private(noise_multiplier=1)
    with pytest.raises(ConfigError, match='units'): learner(dls_of(bs=41)).to_private(noise_multiplier=1)

@pytest.mark.filterwarnings('ignore::UserWarning', 'ignore::FutureWarning')   # MixedPrecision on a machine without CUDA
@pytest.mark.parametrize('cb,words', [(GradientAccumulation(16), 'GradientAccumulation'), (MixedPrecision(), 'MixedPrecision'), (MixUp(), 'MixUp'), (CutMix(), 'MixUp')])
def test_conflicts_are_named(cb, words):
    learn = learner().to_private(noise_multiplier=1.)
    before = weights(learn)
    with pytest.raises(UnsupportedUnderDP, match=words): learn.fit(1, cbs=cb)
    assert torch.equal(before, weights(learn)) and learn.dp.spent.steps==0

def test_lr_find_is_refused():
    learn = learner().to_private(noise_multiplier=1.)
    before = weights(learn)
    with pytest.raises(BudgetError, match='lr_find'): learn.lr_find()
    assert torch.equal(before, weights(learn)) and learn.dp.spent.steps==0
    learn.fit(1)

def test_changed_loaders_are_refused():
    learn = learner().to_private(noise_multiplier=1.)
    learn.dls = dls_of()
    with pytest.raises(ConfigError, match='changed'): learn.fit(1)
    learn = learner().to_private(noise_multiplier=1.)
    learn.dls.train.bs = 4
    with pytest.raises(ConfigError, match='changed'): learn.fit(1)

def test_a_callback_that_changes_the_loss_is_refused():
    class Adds(Callback):
        def after_loss(self): self.learn.loss_grad = self.learn.loss_grad+1
    with pytest.raises(UnsupportedUnderDP, match='replaced'): learner(cbs=Adds()).to_private(noise_multiplier=1.).fit(1)

def test_the_callback_by_hand_is_refused_and_its_removal_noticed():
    learn = learner(cbs=DPCallback(noise_multiplier=1.))
    with pytest.raises(ConfigError, match='by hand'): learn.fit(1)
    learn = learner().to_private(noise_multiplier=1.)
    learn.fit(1)
    learn.remove_cb(DPCallback)
    with pytest.raises(ConfigError, match='to_public'): learn.fit(1)
    learn.to_public().fit(1)

# ------------------------------------------------------------ networks

@pytest.mark.parametrize('make', [lambda: torchvision.models.resnet18(num_classes=2), lambda: resnet9(2)], ids=['torchvision resnet18', 'resnet9'])
def test_networks_end_to_end(make, tmp_path):
    learn = learner(dls_of(n=8, per=1, bs=4, chans=3, size=32), make())
    learn.path = tmp_path
    converts = any(isinstance(m, nn.BatchNorm2d) for m in learn.model.modules())
    if converts:
        with pytest.raises(UnsupportedUnderDP, match='bn1 is a BatchNorm2d'): learn.to_private(noise_multiplier=1., convert=False)
    out = io.StringIO()
    with redirect_stdout(out): learn.to_private(target_epsilon=8, physical_bs=2)
    assert ('bn1: BatchNorm2d(64) → GroupNorm' in out.getvalue()) == converts
    before, keys = weights(learn), list(learn.model.state_dict())
    learn.fit(1)
    assert not torch.equal(before, weights(learn)) and weights(learn).isfinite().all() and 7.9 < learn.dp.spent.eps <= 8
    assert keys[0]=='conv1.weight'
    learn.export('m.pkl')

def test_phantoms_from_their_own_loader():
    dls = tiny_dls(n=24, size=32)
    learn = learner(dls, SmallResNet(dls.train.one_batch()[1].shape[1], in_channels=dls.train.one_batch()[0].shape[1]),
                    nn.BCEWithLogitsLoss(), metrics=[]).to_private(target_epsilon=8)
    learn.fit(1)
    assert learn.dp.n_units==len(set(dls.train_patients)) and 7.9 < learn.dp.spent.eps <= 8
    assert learn.dp.spent.sample_rate==dls.train.bs/learn.dp.n_units
