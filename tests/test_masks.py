"""A label that is NaN does not count: every loss and metric of the library equals the same call without it

Losses are compared in value and in gradient, and give 0 with zero gradients where nothing is known; metrics give NaN there, with a reason.
"""
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from medprivacy.compare import delong_test, paired_table
from medprivacy.data.core import Predictions, Records
from medprivacy.data.load import target_values
from medprivacy.dp.clip import clipped_batch, clipped_gradient
from medprivacy.evaluate import (auprc, auroc, auroc_ci, bootstrap_auroc, choose_thresholds, metrics_table,
                                 paired_test)
from medprivacy.rank import fake_predictions
from medprivacy.fairness import against_rest, by_group, gaps
from medprivacy.leakage import age_errors, leakage, leakage_table, strongest_leakage
from medprivacy.objectives.adversarial import ATTACKS, ObfuscationLoss
from medprivacy.objectives.focal import FocalLoss, MaskedBCE, MultilabelFocalLoss, class_weights, masked_bce
from medprivacy.game import AttackersCallback, GameLoss
from medprivacy.probe import ProbeLoss, mean_auroc
from medprivacy.thresholds import confusion, rate_threshold, sensitivity_threshold, youden_threshold

NAN = math.nan
L   = 3


def draw(n=9, c=L, seed=0):
    "Logits (n,c) in float64"
    return torch.randn(n, c, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

def holes(y, seed=0, share=.4):
    "A copy of `y` with NaN entries, among them a whole row and, for a matrix, never a whole column"
    y = y.clone().double()
    y[torch.rand(y.shape, generator=torch.Generator().manual_seed(seed)) < share] = NAN
    y[0] = NAN
    y[-1] = 1.
    return y

def run(loss, z, *targets):
    "Value, and gradient with respect to `z`"
    z = z.clone().requires_grad_()
    v = loss(z, *targets)
    return v.detach(), torch.autograd.grad(v.sum(), z)[0]

def same(a, b): torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------- losses of one target for each row

ROWS = {'focal': lambda: FocalLoss(), 'focal, gamma': lambda: FocalLoss(2), 'focal, alpha': lambda: FocalLoss(1.5, [.2, .5, .3]),
        'focal, detached': lambda: FocalLoss(2, detach=True), 'focal, sum': lambda: FocalLoss(2, reduction='sum'),
        'probe, class': lambda: ProbeLoss('class'), 'probe, age': lambda: ProbeLoss('age')}

@pytest.mark.parametrize('name', ROWS)
def test_rows_without_a_target_do_not_count(name):
    z, loss = draw(), ROWS[name]()
    y = holes(torch.arange(9) % 3 if 'age' not in name else torch.linspace(20, 90, 9))
    known = ~y.isnan(); assert 1 < known.sum() < len(y)-1
    (v, g), (w, h) = run(loss, z, y), run(loss, z[known], y[known])
    same(v, w); same(g[known], h); assert not g[~known].any()

@pytest.mark.parametrize('name', ROWS)
def test_no_known_row_is_zero(name):
    v, g = run(ROWS[name](), draw(4), torch.full((4,), NAN, dtype=torch.float64))
    assert v == 0 and not g.any()


# ---------------------------------------------------------------- losses of several labels

W = torch.tensor([.3, 2., 5.])
ENTRIES = {'multilabel focal': lambda w: MultilabelFocalLoss(), 'published': lambda w: MultilabelFocalLoss(scale=10.), 'gamma 0': lambda w: MultilabelFocalLoss(0),
           'alpha': lambda w: MultilabelFocalLoss(alpha=.25), 'alpha by label': lambda w: MultilabelFocalLoss(alpha=w/6), 'sum': lambda w: MultilabelFocalLoss(reduction='sum'),
           'bce': lambda w: MaskedBCE(), 'pos_weight': lambda w: MaskedBCE(w), 'masked_bce': lambda w: lambda z,y: masked_bce(z, y, w), 'probe': lambda w: ProbeLoss('binary')}

@pytest.mark.parametrize('name', ENTRIES)
def test_unknown_entries_do_not_count(name):
    "The mean over known entries is the weighted mean of each label's loss over the rows that know it"
    z, y = draw(), holes((draw(seed=1) > 0).double())
    v, g = run(ENTRIES[name](W), z, y)
    total, grad, count = 0., torch.zeros_like(z), 0
    for l in range(L):
        k = ~y[:,l].isnan(); n = 1 if name == 'sum' else int(k.sum())
        a, b = run(ENTRIES[name](W[l:l+1]), z[k][:,l:l+1], y[k][:,l:l+1])
        total, count = total+n*a, count+n
        grad[k,l] = n*b[:,0]
    count = 1 if name == 'sum' else count
    tol = dict(rtol=1e-6, atol=1e-7) if name == 'probe' else dict(rtol=1e-10, atol=1e-12)      # its labels are float32
    torch.testing.assert_close(v, total/count, **tol); torch.testing.assert_close(g, grad/count, **tol)
    assert not g[y.isnan()].any()

@pytest.mark.parametrize('name', ENTRIES)
def test_no_known_entry_is_zero(name):
    v, g = run(ENTRIES[name](W), draw(4), torch.full((4, L), NAN, dtype=torch.float64))
    assert v == 0 and not g.any()

@pytest.mark.parametrize('name', ENTRIES)
def test_what_stands_behind_a_hole_does_not_matter(name):
    "Even a logit that overflows, where the label is unknown, changes neither value nor gradient"
    z, y = draw(), holes((draw(seed=1) > 0).double())
    far  = torch.where(y.isnan(), 1e6*z, z)
    (v, g), (w, h) = (run(ENTRIES[name](W), x, y) for x in (z, far))
    same(v, w); same(g, h)

def test_weights_of_classes():
    y = holes((draw(50, seed=1) > .5).double())
    each = torch.stack([1-y[:,l][~y[:,l].isnan()].mean() for l in range(L)])
    same(class_weights(y), each)
    c = holes(torch.arange(30) % 3)
    same(class_weights(c), class_weights(c[~c.isnan()]))


# ---------------------------------------------------------------- obfuscation

NO_LABEL = ('confusion', 'entropy')     # these terms ask what the attacker says, not what is true

@pytest.mark.parametrize('attack', ATTACKS)
@pytest.mark.parametrize('width', [1, 2])
def test_unknown_attribute(attack, width):
    z, y, loss = draw(c=width), holes(torch.arange(9) % 2), ObfuscationLoss(attack, use_disease=False)
    known = ~y.isnan()
    v, g = run(loss, z, y)
    if attack in NO_LABEL:
        w, h = run(loss, z, torch.zeros(9)); same(v, w); same(g, h)
    else:
        w, h = run(loss, z[known], y[known]); same(v, w); same(g[known], h); assert not g[~known].any()

@pytest.mark.parametrize('attack', ATTACKS)
def test_no_known_attribute(attack):
    v, g = run(ObfuscationLoss(attack, use_disease=False), draw(4, 2), torch.full((4,), NAN))
    assert v.isfinite() and g.isfinite().all() and (attack in NO_LABEL or v == 0 and not g.any())

def test_unknown_disease():
    a, d, y = draw(c=2), draw(seed=2), holes((draw(seed=1) > 0).double())
    loss = ObfuscationLoss(weight=0.)
    v, g = run(lambda z: loss(a, torch.zeros(9), z, y), d)
    w, h = run(MultilabelFocalLoss(), d, y)
    same(v, w); same(g, h)
    c = holes(torch.arange(9) % 3); k = ~c.isnan()
    v, g = run(lambda z: loss(a, torch.zeros(9), z, c), d)
    w, h = run(FocalLoss(), d[k], c[k])
    same(v, w); same(g[k], h); assert not g[~k].any()
    v, g = run(lambda z: loss(a, torch.zeros(9), z, torch.full_like(y, NAN)), d)
    assert v == 0 and not g.any()

def test_loss_of_the_game():
    a, d, y, s = draw(c=1), draw(seed=2), holes((draw(seed=1) > 0).double()), holes(torch.arange(9) % 2, seed=3)
    k, loss = ~s.isnan(), GameLoss('negative')
    zero = torch.zeros((), dtype=torch.float64)
    def terms(attr, rows): return loss((None, [attr], [d, 2*d], zero), rows, y)
    v, g = run(terms, a, s)
    keep = masked_bce(d, y)+masked_bce(2*d, y)
    w, h = run(lambda z,t: -FocalLoss()(torch.cat((torch.zeros_like(z), z), 1), t) + keep, a[k], s[k])
    same(v, w); same(g[k], h); assert not g[~k].any()

def step_of_attackers(x, y):
    "Weights of an attacker of the game after one of its steps"
    torch.manual_seed(0)
    net = nn.ModuleList([nn.Linear(4, 1).double()])
    cb  = AttackersCallback(1)
    cb.learn = SimpleNamespace(cbs=[], model=SimpleNamespace(attackers=net, exposed=x, sight=lambda e: e), yb=(y,))
    cb.before_fit(); cb.after_step()
    return net[0].weight.detach().clone()

def test_attackers_of_the_game_skip_unknown_rows():
    x, y = draw(9, 4), holes(torch.arange(9) % 2)
    k = ~y.isnan()
    same(step_of_attackers(x, y), step_of_attackers(x[k], y[k]))
    after = step_of_attackers(x, torch.full((9,), NAN))
    torch.manual_seed(0); same(after, nn.Linear(4, 1).double().weight.detach())     # nothing known: no step


# ---------------------------------------------------------------- private training

def small(c=L):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, c)).double()

PRIVATE = {'bce': (MaskedBCE(), L), 'focal': (MultilabelFocalLoss(), L), 'pos_weight': (MaskedBCE(W), L), 'probe': (ProbeLoss('binary'), L),
           'class': (FocalLoss(2), 3), 'probe, class': (ProbeLoss('class'), 3), 'age': (ProbeLoss('age'), 1)}

def targets(name, n=9):
    if name == 'age': return holes(torch.linspace(20, 90, n))
    return holes(torch.arange(n) % 3) if 'class' in name or name == 'age' else holes((draw(n, seed=1) > 0).double())

@pytest.mark.parametrize('name', PRIVATE)
def test_private_gradient_of_unknown_rows_is_zero(name):
    "An image whose labels are all unknown has loss and gradient 0: the clipped sum is that of the others"
    (loss, c), x, y = PRIVATE[name], draw(9, 5), targets(name)
    model = small(c)
    k   = ~y.isnan() if y.ndim == 1 else ~y.isnan().all(1)
    all_, some = (clipped_batch(model, loss, (x[s],), (y[s],), .5) for s in (slice(None), k))
    assert not all_.norms[~k].any() and not all_.losses[~k].any() and k.sum() < 9
    same(all_.norms[k], some.norms); same(all_.losses[k], some.losses)
    for n in all_.grads: same(all_.grads[n], some.grads[n])

@pytest.mark.parametrize('name', ['bce', 'focal', 'probe'])
def test_private_gradient_of_one_image_is_that_of_its_known_labels(name):
    (loss, c), x, y = PRIVATE[name], draw(9, 5), targets(name)
    model, tol = small(c), dict(rtol=1e-6, atol=1e-7) if name == 'probe' else dict(rtol=1e-10, atol=1e-12)
    for i in torch.where(~y.isnan().all(1))[0]:
        l = ~y[i].isnan()
        whole, norm = clipped_gradient(model, loss, x[i:i+1], y[i:i+1], 1e3)
        part,  want = clipped_gradient(model, lambda z,t: loss(z[:,l], t[:,l]), x[i:i+1], y[i:i+1], 1e3)
        torch.testing.assert_close(norm, want, **tol)
        for n in whole: torch.testing.assert_close(whole[n], part[n], **tol)

@pytest.mark.parametrize('name', PRIVATE)
def test_private_batch_without_labels(name):
    (loss, c), y = PRIVATE[name], torch.full_like(targets(name), NAN)
    o = clipped_batch(small(c), loss, (draw(9, 5),), (y,), .5)
    assert not o.losses.any() and not o.norms.any() and not any(g.any() for g in o.grads.values())


# ---------------------------------------------------------------- metrics of one label

def scored(n=240, seed=0, people=60):
    "Labels with holes, scores (also behind the holes), patients; every patient has a known label"
    rng = np.random.default_rng(seed)
    y = (rng.random(n) < .4)*1.
    s = np.round(1/(1+np.exp(-(y+rng.normal(size=n)))), 2)
    y[rng.random(n) < .3] = NAN
    pat = np.arange(n) % people
    y[:people] = (rng.random(people) < .4)
    return y, s, pat

AREAS = {'auroc': lambda y,s,p: auroc(y, s), 'auprc': lambda y,s,p: auprc(y, s), 'leakage': lambda y,s,p: leakage(y, s),
         'bootstrap_auroc': lambda y,s,p: bootstrap_auroc(y, s, 50, p), 'youden': lambda y,s,p: youden_threshold(y, s),
         'sensitivity': lambda y,s,p: sensitivity_threshold(y, s, .8), 'rate': lambda y,s,p: rate_threshold(y, s, .3),
         'prevalence': lambda y,s,p: rate_threshold(y, s), 'confusion': lambda y,s,p: confusion(y[:,None], s[:,None], np.array([.5])).sum((1, 2)),
         'auroc_ci': lambda y,s,p: vars(auroc_ci(y, s, patient=p, n_boot=50)), 'bca': lambda y,s,p: vars(auroc_ci(y, s, patient=p, n_boot=50, method='bca')),
         'strongest': lambda y,s,p: vars(strongest_leakage(y, {'a': s, 'b': 1-s**2}, patient=p, n_boot=50)),
         'age': lambda y,s,p: {k: vars(v) for k,v in age_errors(40+30*y, 80*s, patient=p, n_boot=50).items()},
         'paired': lambda y,s,p: paired_test(y, s, 1-s**2, patient=p, n_boot=50).to_dict('list'),
         'delong': lambda y,s,p: delong_test(y, s, 1-s**2, patient=p).to_dict('list'), 'mean_auroc': lambda y,s,p: mean_auroc(s[:,None], y)}

def equal(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for k in a: equal(a[k], b[k])
    elif isinstance(a, str): assert a == b
    else: np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), rtol=1e-10, atol=1e-12) if not isinstance(a, list) or not isinstance(a[0], str) else None

@pytest.mark.parametrize('name', AREAS)
@pytest.mark.parametrize('seed', range(3))
def test_metric_without_the_unknown(name, seed):
    y, s, p = scored(seed=seed); k = ~np.isnan(y)
    equal(AREAS[name](y, s, p), AREAS[name](y[k], s[k], p[k]))
    equal(AREAS[name](y, np.where(k, s, NAN), p), AREAS[name](y[k], s[k], p[k]))       # nor is a score needed there

@pytest.mark.parametrize('name', AREAS)
def test_metric_of_nothing_known(name):
    "NaN (counts: 0), never a number and never a warning"
    _, s, p = scored()
    got = AREAS[name](np.full(len(s), NAN), s, p)
    if name == 'confusion': assert not got.any()
    elif name == 'age': assert all(math.isnan(v['value']) and v['note'] for v in got.values())
    elif name in ('paired', 'delong'): assert math.isnan(got['difference'][0]) and got['note'] == ['no known label']
    elif isinstance(got, dict): assert math.isnan(got['value']) and got['note']
    else: assert np.isnan(got).all()

@pytest.mark.parametrize('kind', ['binary', 'class', 'age'])
def test_score_by_which_an_epoch_is_chosen(kind):
    rng = np.random.default_rng(0)
    y = {'binary': rng.integers(0, 2, (60, 2))*1., 'class': rng.integers(0, 3, (60, 1))*1., 'age': rng.uniform(20, 90, (60, 1))}[kind]
    s = rng.random((60, {'binary': 2, 'class': 3, 'age': 1}[kind]))
    hole = np.repeat(rng.random((60, 1)) < .3, y.shape[1], 1)
    k = ~hole[:,0]
    assert mean_auroc(s, np.where(hole, NAN, y), kind) == mean_auroc(s[k], y[k], kind)
    assert math.isnan(mean_auroc(s, np.full_like(y, NAN), kind))


# ---------------------------------------------------------------- tables

def with_holes(seed=0, n=200):
    "Predictions of one label with three images a patient; every patient keeps a known label, which is not the first image's"
    p  = fake_predictions(n, ('x',), images_per_patient=3, seed=seed)
    df = p.df.copy()
    rng = np.random.default_rng(seed)
    df.loc[(rng.random(len(df)) < .4) & (np.arange(len(df)) % 3 != 1), 'y_x'] = NAN
    return Predictions(df, ('x',)), Predictions(df[df.y_x.notna()].reset_index(drop=True), ('x',))

TABLES = {'metrics_table': lambda p: metrics_table(p, n_boot=30, intervals='all'), 'choose_thresholds': choose_thresholds,
          'rate': lambda p: choose_thresholds(p, 'rate'), 'by_group': lambda p: by_group(p, ('sex', 'age_band'), intersections=True, n_boot=30),
          'gaps': lambda p: gaps(p, n_boot=30), 'against_rest': lambda p: against_rest(p, n_boot=30),
          'leakage_table': lambda p: leakage_table(p, n_boot=30), 'paired_table': lambda p: paired_table(p, p, n_boot=30)}

@pytest.mark.parametrize('name', TABLES)
def test_table_without_the_unknown(name):
    holed, known = with_holes()
    pd.testing.assert_frame_equal(TABLES[name](holed), TABLES[name](known), rtol=1e-9)

def test_multiclass_with_unknown_classes():
    p = fake_predictions(150, ('x',), seed=1).df
    rng = np.random.default_rng(0)
    raw = rng.dirichlet([1, 1, 1], len(p))
    df  = p.drop(columns='score_x').assign(y_x=np.where(rng.random(len(p)) < .3, NAN, rng.integers(0, 3, len(p))), **{f'score_x_{c}': raw[:,c] for c in range(3)})
    df.loc[df.groupby('patient_id').cumcount() == 0, 'y_x'] = rng.integers(0, 3, 150)
    a, b = (metrics_table(Predictions(d, ('x',), 'multiclass'), n_boot=30) for d in (df, df[df.y_x.notna()].reset_index(drop=True)))
    pd.testing.assert_frame_equal(a, b, rtol=1e-9)

def test_unknown_people_are_unknown_targets():
    df = pd.DataFrame(dict(image_id=list('abc'), path=list('abc'), patient_id=list('123'), sex=['F', None, 'M'], age=[70, NAN, 30], split='train', y=[1, NAN, 0]))
    r  = Records(df, '.', ['y'])
    for target,want in dict(sex=[1, NAN, 0], age=[70, NAN, 30], labels=[1, NAN, 0], y=[1, NAN, 0]).items():
        np.testing.assert_array_equal(target_values(r, target)[:,0], want)
    np.testing.assert_array_equal(target_values(r, 'age>median')[:,0], [1, NAN, 0])
