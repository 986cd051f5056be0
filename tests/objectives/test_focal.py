"Focal and masked losses against loops, over masks, types and empty batches."
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from medprivacy.core import ConfigError
from medprivacy.objectives.focal import FocalLoss, MaskedBCE, MultilabelFocalLoss, class_weights, masked_bce


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(2, 5), st.sampled_from([0, .5, 1, 2, 5]), st.booleans(), st.sampled_from(['mean', 'sum']), st.booleans(),
       st.integers(0, 10**6))
def test_focal_is_the_loop(b, c, gamma, weighted, reduction, detach, seed):
    g = torch.Generator().manual_seed(seed)
    z, y = torch.randn(b, c, generator=g, dtype=torch.float64)*4, torch.randint(-1, c, (b,), generator=g)
    alpha = torch.rand(c, generator=g).tolist() if weighted else None
    total = n = 0
    for row, t in zip(z.tolist(), y.tolist()):
        if t < 0: continue
        m  = max(row)
        lp = row[t] - m - math.log(sum(math.exp(o-m) for o in row))
        total += -(alpha[t] if weighted else 1) * (-math.expm1(lp))**gamma * lp; n += 1
    want = total / max(n, 1) if reduction == 'mean' else total
    assert math.isclose(FocalLoss(gamma, alpha, reduction, detach)(z, y).item(), want, rel_tol=1e-6, abs_tol=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.sampled_from([0, .5, 2]), st.sampled_from(['none', 'scalar', 'list']), st.sampled_from(['mean', 'sum']),
       st.integers(0, 10**6))
def test_multilabel_is_the_loop(b, l, gamma, kind, reduction, seed):
    g = torch.Generator().manual_seed(seed)
    z, y = torch.randn(b, l, generator=g, dtype=torch.float64)*3, torch.randint(0, 2, (b, l), generator=g).double()
    y[torch.rand(b, l, generator=g) < .3] = math.nan
    alpha = dict(none=None, scalar=.3, list=torch.rand(l, generator=g).tolist())[kind]
    total = n = 0
    for i in range(b):
        for j in range(l):
            if math.isnan(t := y[i, j].item()): continue
            bce = math.log1p(math.exp(-z[i, j].item())) if t else math.log1p(math.exp(z[i, j].item()))
            a   = {'none': None, 'scalar': .3, 'list': alpha and kind == 'list' and alpha[j]}[kind]
            total += (1 if a is None else a*t + (1-a)*(1-t)) * (1-math.exp(-bce))**gamma * bce; n += 1
    want = 10*total / (max(n, 1) if reduction == 'mean' else 1)
    assert math.isclose(MultilabelFocalLoss(gamma, alpha, reduction, 10.)(z, y).item(), want, rel_tol=1e-6, abs_tol=1e-9)


@pytest.mark.parametrize('detach', [True, False])
@pytest.mark.parametrize('gamma', [0., .5, 1., 2.])
def test_focal_gradient(gamma, detach):
    torch.manual_seed(0)
    z, y = torch.randn(4, 3, dtype=torch.float64, requires_grad=True), torch.tensor([0, 2, 1, 1])
    if not detach: assert torch.autograd.gradcheck(lambda t: FocalLoss(gamma)(t, y), (z,))
    g, = torch.autograd.grad(FocalLoss(gamma, detach=detach)(z, y), z)
    p  = z.softmax(1).detach()
    pt = p.gather(1, y[:, None])
    ce = (p - F.one_hot(y, 3))/4
    dfactor = 0 if detach else gamma*(1-pt)**(gamma-1) * pt * pt.log()     # d(1-p)^γ·log p, in units of the gradient of log p
    assert torch.allclose(g, ce*((1-pt)**gamma - dfactor), atol=1e-10)


def test_multilabel_gradient():
    torch.manual_seed(0)
    y = torch.tensor([[1., 0., math.nan], [0., 1., 1.]], dtype=torch.float64)
    z = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: MultilabelFocalLoss(2, [.1, .5, .7])(t, y), (z,))
    g, = torch.autograd.grad(MultilabelFocalLoss()(z, y), z)
    assert g[0, 2] == 0 and (g != 0).sum() == 5


LOSSES = [FocalLoss(), FocalLoss(2, [.3, .7]), FocalLoss(.5, detach=True), MultilabelFocalLoss(), MultilabelFocalLoss(0, .3, scale=10.), MaskedBCE(), MaskedBCE([2., 3.])]


@pytest.mark.parametrize('loss', LOSSES, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize('n', [0, 3])
def test_nothing_known_is_zero_with_a_gradient(loss, n):
    z = torch.randn(n, 2, requires_grad=True)
    y = torch.full((n,), -1) if isinstance(loss, FocalLoss) else torch.full((n, 2), math.nan)
    loss(z, y).backward()
    assert loss(z, y) == 0 and z.grad.shape == z.shape and (z.grad == 0).all()


@pytest.mark.parametrize('loss', LOSSES, ids=lambda o: type(o).__name__)
def test_bf16_and_extremes(loss):
    y = torch.tensor([0, 1, 1]) if isinstance(loss, FocalLoss) else torch.tensor([[0., 1.], [1., 1.], [math.nan, 0.]])
    z = torch.randn(3, 2, requires_grad=True)
    with torch.autocast('cpu', torch.bfloat16): out = loss(z @ torch.eye(2), y)
    out.backward()
    assert out.dtype == torch.float32 and torch.isfinite(out) and torch.isfinite(z.grad).all()
    for s in 1., 1e4:
        e = (torch.tensor([[1., -1.], [-1., 1.], [1., 1.]])*s).requires_grad_()
        out = loss(e, y); out.backward()
        assert torch.isfinite(out) and torch.isfinite(e.grad).all()


@pytest.mark.parametrize('loss', LOSSES, ids=lambda o: type(o).__name__)
def test_reductions_agree_and_masked_rows_do_not_matter(loss):
    torch.manual_seed(1)
    multi = not isinstance(loss, FocalLoss)
    z = torch.randn(6, 2)
    y = torch.randint(0, 2, (6, 2)).float() if multi else torch.randint(0, 2, (6,)).float()
    y[::3] = math.nan
    values, old = {}, loss.reduction
    for r in 'mean', 'sum', 'none':
        loss.reduction = r
        values[r] = loss(z, y)
    loss.reduction = old
    assert torch.isclose(values['none'].sum(), values['sum']) and torch.isclose(values['sum']/(~y.isnan()).sum(), values['mean'])
    assert torch.isclose(loss(z[~y.isnan().reshape(6, -1).any(1)], y[~y.isnan().reshape(6, -1).any(1)]), values['mean'])
    assert torch.equal(z + 0, z)


def test_masked_bce_shapes_and_soft_labels():
    z, y = torch.randn(5, 1), torch.tensor([0, 1, 1, 0, 1])
    assert masked_bce(z, y).shape == () and torch.isclose(masked_bce(z, y), masked_bce(z[:, 0], y.float()))
    soft = torch.tensor([[.2], [.7]])
    assert torch.isclose(masked_bce(z[:2], soft), F.binary_cross_entropy_with_logits(z[:2], soft))
    w = torch.tensor([3.])
    assert torch.isclose(masked_bce(z, y, w), F.binary_cross_entropy_with_logits(z[:, 0], y.float(), pos_weight=w))
    with pytest.raises(ConfigError, match='same shape'): masked_bce(torch.zeros(3, 2), torch.zeros(3))


def test_class_weights():
    assert torch.allclose(class_weights([0, 0, 1, 2]), torch.tensor([.5, .75, .75]))
    assert torch.allclose(class_weights(torch.tensor([[1., math.nan], [0., 0.]])), torch.tensor([.5, 1.]))


@pytest.mark.parametrize('make', [lambda: FocalLoss(-1), lambda: FocalLoss(alpha=.5), lambda: FocalLoss(reduction='avg'), lambda: MultilabelFocalLoss(-1),
                                  lambda: MaskedBCE(reduction=''), lambda: FocalLoss()(torch.zeros(2, 2), torch.zeros(3))])
def test_errors(make):
    with pytest.raises(ConfigError): make()
