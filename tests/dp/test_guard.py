"Attempts to make ε untrue: each is refused, or leaves ε right"
import copy, io, pickle
from contextlib import redirect_stdout
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from torch import nn
from fastcore.basics import noop
from medprivacy.core import BudgetError, ConfigError, MedPrivacyError, UnsupportedUnderDP
from medprivacy.dp.account import epsilon
from medprivacy.dp.callback import DPCallback

def dls_of(n=40, per=2, bs=8):
    y = torch.randint(0, 2, (n,)).repeat_interleave(per)
    ds = list(zip(torch.randn(n*per, 4) + y[:,None], y))
    dls = DataLoaders(DataLoader(ds, bs=bs, shuffle=True), DataLoader(ds[:16], bs=8))
    dls.train_patients = np.arange(n).repeat(per)
    return dls

def learner(dls=None, **kw):
    learn = Learner(dls or dls_of(), nn.Linear(4,2), loss_func=nn.CrossEntropyLoss(), lr=.05, **kw)
    learn.remove_cb(ProgressCallback); learn.logger = noop
    return learn

def private(dls=None, cbs=None, **kw): return learner(dls, cbs=cbs).to_private(**(kw or dict(noise_multiplier=1.)))
def weights(learn): return learn.model.weight.detach().clone()

TERMS = dict(steps_taken=0, max_steps=10**6, noise_multiplier=0., _noise=0., max_grad_norm=9., delta=.5, unit='image', accountant='gdp', clipping='layer', views=5,
             engine='opacus', precision='bf16', secure=True, rate=1e-9, n_units=10**9, sampler=None, noise=None, target_epsilon=99., spent=None, steps_left=9, _test_mode=False,
             _seed=None, ledger=None, unaccounted=[], _extra=(), _sealed=False)

@pytest.mark.parametrize('name', TERMS)
def test_terms_cannot_be_assigned(name):
    learn = private()
    with pytest.raises(ConfigError, match=name): setattr(learn.dp, name, TERMS[name])
    with pytest.raises(ConfigError, match=name): delattr(learn.dp, name)

def test_the_list_of_queries_is_a_copy():
    learn = private(); learn.fit(1)
    learn.dp.unaccounted.clear()
    assert learn.dp.unaccounted

def other_bs(l): l.dls.train.bs = 4
def other_dls(l): l.dls = dls_of()
def other_data(l): l.dls.train.dataset = list(zip(torch.randn(80,4), torch.zeros(80).long()))
def other_rate(l): l.dp.sampler.bs = 4
def other_units(l): l.dp.sampler.n_units = 400
def other_rows(l): l.dp.sampler.rows = np.zeros_like(l.dp.sampler.rows)
def other_rows_in_place(l): l.dp.sampler.rows[:] = 0
def other_draw(l): l.dp.sampler.draw = lambda: np.arange(8)
def other_optimizer(l): l.create_opt(); l.opt.param_lists[0].append(nn.Parameter(torch.zeros(1)))

@pytest.mark.parametrize('change', [other_bs, other_dls, other_data, other_rate, other_units, other_rows, other_rows_in_place, other_draw, other_optimizer])
@pytest.mark.parametrize('after', [0, 1])
def test_changes_are_noticed_at_the_next_fit(change, after):
    learn = private()
    if after: learn.fit(after)
    change(learn)
    before, steps = weights(learn), learn.dp.steps_taken
    with pytest.raises(ConfigError): learn.fit(1)
    assert torch.equal(before, weights(learn)) and learn.dp.steps_taken==steps

def test_the_callback_in_another_learner():
    a, b = private(), learner()
    b.add_cb(a.dp)
    with pytest.raises(ConfigError, match='another learner'): b.fit(1)
    with pytest.raises(ConfigError, match='another learner'): a.fit(1)     # fastai gave the callback to b
    c = learner(a.dls, cbs=DPCallback(noise_multiplier=1.))
    with pytest.raises(ConfigError, match='by hand'): c.fit(1)

@pytest.mark.parametrize('copier', [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=['deepcopy', 'pickle'])
def test_copies_cannot_train(copier):
    learn = private()
    learn.fit(1)
    spent = learn.dp.spent
    twin = copier(learn)
    assert twin.dp.spent==spent and twin.dp.noise is None and twin.dp.sampler is None and twin.dp._ids is None
    with pytest.raises(ConfigError, match='copied'): twin.fit(1)
    with pytest.raises(MedPrivacyError): twin.training = True; twin.one_batch(0, twin.dls.one_batch())
    with pytest.raises(BudgetError, match='before'): twin.to_public().to_private(noise_multiplier=1.)
    learn.fit(1)                                                          # the original goes on
    assert learn.dp.steps_taken==10

class Breaks(Callback):
    order = 5
    def __init__(self, how): self.how = how
    def before_batch(self):
        if not self.training: return
        if self.how == 'twice':  self.learn.xb, self.learn.yb = tuple(torch.cat([o,o]) for o in self.xb), tuple(torch.cat([o,o]) for o in self.yb)
        if self.how == 'other':  self.learn.dl = self.learn.dls.train
        if self.how == 'again' and not getattr(self, 'busy', False):
            self.busy = True
            self.learn._do_one_batch()

@pytest.mark.parametrize('how,error', [('twice', UnsupportedUnderDP), ('other', BudgetError), ('again', BudgetError)])
def test_batches_that_were_not_drawn(how, error):
    learn = private(dls_of(bs=20), cbs=Breaks(how))
    with pytest.raises(error): learn.fit(1)
    assert learn.dp.steps_taken <= 1+(how=='again')

def test_a_batch_by_hand():
    learn = private()
    for _ in range(2):
        before, steps = weights(learn), learn.dp.steps_taken
        learn.model.train(); learn.training = True
        if learn.opt is None: learn.create_opt()
        with pytest.raises(MedPrivacyError): learn.one_batch(0, next(iter(learn.dls.train)))
        assert torch.equal(before, weights(learn)) and learn.dp.steps_taken==steps
        learn.fit(1)

def test_reading_training_images_is_listed():
    learn = private()
    learn.fit(1); learn.validate(); learn.get_preds()
    assert not any('training images' in q for q in learn.dp.unaccounted)
    learn.validate(ds_idx=0)
    assert any('training images' in q for q in learn.dp.unaccounted) and learn.dp.steps_taken==5
    learn = private()
    learn.get_preds(dl=learn.dls.train.new(shuffle=False))
    assert any('training images' in q for q in learn.dp.unaccounted)

def test_a_failed_fit_leaves_no_door_open():
    class Fails(Callback):
        def before_step(self): raise RuntimeError('power cut')     # comes for an empty batch too
    learn = private()
    with pytest.raises(RuntimeError, match='power cut'): learn.fit(1, cbs=Fails())
    assert learn.dp.steps_taken==1
    before = weights(learn)
    with pytest.raises(MedPrivacyError): learn.training = True; learn.one_batch(0, next(iter(learn.dls.train)))
    assert torch.equal(before, weights(learn))
    learn.fit(1)
    assert learn.dp.spent.eps==epsilon(1., .2, 6, learn.dp.delta)

def test_the_loader_of_a_pass_gives_each_batch_once():
    class Steals(Callback):
        "Draws from the loader of the pass, as a second training loop would"
        def after_train(self): self.left = list(self.learn.dl)
    learn = private(cbs=(s := Steals()))
    learn.fit(1)
    learn.training = True
    with pytest.raises(BudgetError): learn.one_batch(0, s.left[0])
    assert learn.dp.steps_taken==5

# ------------------------------------------------------------ weights of labels

def label_dls(n=80, per=2, bs=20):
    y = (torch.arange(n*per)//per % 5 == 0).float()[:,None]
    dls = DataLoaders(DataLoader(list(zip(torch.randn(n*per,4)+y, y)), bs=bs, shuffle=True), DataLoader(list(zip(torch.randn(16,4), y[:16])), bs=8))
    dls.train_patients = np.arange(n).repeat(per)
    return dls

def label_learner(loss=None):
    learn = Learner(label_dls(), nn.Linear(4,1), loss_func=loss or nn.BCEWithLogitsLoss(), lr=.05)
    learn.remove_cb(ProgressCallback); learn.logger = noop
    return learn

def test_private_weights_are_paid_from_the_same_epsilon():
    learn, out = label_learner().to_private(8., epochs=2, pos_weight='private'), io.StringIO()
    assert learn.dp.spent.eps==0
    with redirect_stdout(out): learn.fit(1); learn.fit(1)
    dp = learn.dp
    assert out.getvalue().count('weights of positives')==1                # asked once
    assert 7.9 < dp.spent.eps <= 8 and dp.spent.steps==8
    assert dp.spent.eps==epsilon(dp.noise_multiplier, dp.rate, 8, dp.delta, extra=(dp.count_noise,)) > epsilon(dp.noise_multiplier, dp.rate, 8, dp.delta)
    assert .2 < learn.loss_func.pos_weight.item()/4 <= 5 and dp.counts.private and dp.counts.unit=='patient'
    assert not any('pos_weight' in q for q in dp.unaccounted)

def test_given_weights_are_used_and_listed():
    from medprivacy.objectives.focal import MaskedBCE
    learn = label_learner(MaskedBCE()).to_private(noise_multiplier=1., pos_weight=[4.])
    learn.fit(1)
    assert learn.loss_func.pos_weight.tolist()==[4.] and any('pos_weight' in q for q in learn.dp.unaccounted)
    with pytest.raises(ConfigError, match='no pos_weight'): private(noise_multiplier=1., pos_weight=[1.]).fit(1)
    with pytest.raises(ConfigError, match='count_noise'): label_learner().to_private(noise_multiplier=1., pos_weight='private')

# ------------------------------------------------------------ units

@pytest.mark.parametrize('unit', ['patient', 'image'])
def test_both_units_side_by_side(unit):
    from medprivacy.dp.units import both_units
    learn = private(noise_multiplier=1., unit=unit, delta=1e-3)
    learn.fit(1)
    both = learn.dp.both
    assert getattr(both, unit)==learn.dp.spent and both.images==(2,2) and both.drawn==unit
    assert both.patient.eps > both.image.eps if unit=='image' else both.image.eps > 0
    assert both==both_units(learn.dp.spent, (2,2))
    no_ids = DataLoaders(*dls_of().loaders)
    with pytest.raises(ConfigError, match='patients='): private(no_ids, noise_multiplier=1., unit='image').dp.both
