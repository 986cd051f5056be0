"The viewmaker's side of the games: values, masks, gradients, what each term asks for."
import math

import pytest
import torch
import torch.nn.functional as F

from medprivacy.core import ConfigError
from medprivacy.objectives.adversarial import ATTACKS, AdversarialNCELoss, AdversarialSimCLRLoss, ObfuscationLoss
from medprivacy.objectives.contrast import MemoryBank, NCELoss, SimCLRLoss
from medprivacy.objectives.focal import FocalLoss, MultilabelFocalLoss


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 2, (8, 3), generator=g).double(); y[1, 2] = math.nan
    return (torch.randn(8, 2, generator=g, dtype=torch.float64), torch.randint(0, 2, (8,), generator=g),
            torch.randn(8, 3, generator=g, dtype=torch.float64), y)


@pytest.mark.parametrize('weight', [0., .5, 3.])
def test_published_forms(batch, weight):
    a, s, d, y = batch
    hide = -weight*F.cross_entropy(a, s)
    assert torch.isclose(ObfuscationLoss('negative', weight)(*batch), hide + MultilabelFocalLoss()(d, y))
    assert torch.isclose(ObfuscationLoss('negative', weight, False)(*batch), hide)
    assert torch.isclose(ObfuscationLoss('negative', weight, False)(a, s), hide)
    classes = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    fl = FocalLoss(2, [.5, .6, .9], detach=True)
    assert torch.isclose(ObfuscationLoss('negative', weight, attr_loss=FocalLoss(2), disease_loss=fl)(a, s, d, classes),
                         -weight*FocalLoss(2)(a, s) + fl(d, classes))


@pytest.mark.parametrize('attack', ATTACKS)
def test_one_column_is_the_log_odds(batch, attack):
    a, s, d, y = batch
    odds, loss = a[:, 1] - a[:, 0], ObfuscationLoss(attack)
    for form in odds, odds[:, None]: assert torch.isclose(loss(a, s, d, y), loss(form, s.float(), d, y))
    assert torch.isclose(loss(a, s, d, y), loss(a, s[:, None], d, y))


@pytest.mark.parametrize('attack', ['negative', 'prior'])
@pytest.mark.parametrize('unknown', [math.nan, -1.])
def test_unknown_sex_is_left_out(batch, attack, unknown):
    a, s, d, y = batch
    masked = s.double(); masked[[0, 5]] = unknown
    keep = [1, 2, 3, 4, 6, 7]
    loss = ObfuscationLoss(attack)
    assert torch.isclose(loss.terms(a, masked, d, y)[0], loss.terms(a[keep], s[keep], d[keep], y[keep])[0])
    assert torch.isclose(loss.terms(a, masked, d, y)[1], MultilabelFocalLoss()(d, y))


@pytest.mark.parametrize('attack', ATTACKS)
def test_gradients(batch, attack):
    a, s, d, y = batch
    assert torch.autograd.gradcheck(lambda u, v: ObfuscationLoss(attack, .7)(u, s, v, y), (a.requires_grad_(), d.requires_grad_()))


@pytest.mark.parametrize('attack', ['confusion', 'entropy', 'prior'])
def test_ignorance_is_the_optimum(attack):
    "Descent on the attacker's logits ends at one half; with 'prior' at the share of the batch"
    s = torch.tensor([1, 1, 1, 0])
    z = torch.tensor([2., -1., .5, -2.], requires_grad=True)
    opt = torch.optim.Adam([z], .05)
    for _ in range(600):
        opt.zero_grad(); ObfuscationLoss(attack, use_disease=False)(z, s).backward(); opt.step()
    assert torch.allclose(z.sigmoid(), torch.full((4,), .75 if attack == 'prior' else .5), atol=.02)


def test_negative_wants_inversion():
    s, z = torch.tensor([1, 0]), torch.tensor([1., -1.])
    loss = ObfuscationLoss('negative', use_disease=False)
    assert loss(-5*z, s) < loss(0*z, s) < loss(5*z, s)


@pytest.mark.parametrize('attack', ATTACKS)
def test_empty_batch_bf16_and_certainty(attack):
    loss = ObfuscationLoss(attack)
    a, d = torch.zeros(0, 2, requires_grad=True), torch.zeros(0, 3, requires_grad=True)
    out = loss(a, torch.zeros(0), d, torch.zeros(0, 3)); out.backward()
    assert out == 0 and a.grad is not None
    x, w = torch.randn(4, 5), torch.randn(5, 2, requires_grad=True)
    with torch.autocast('cpu', torch.bfloat16): out = loss(x@w, torch.tensor([0, 1, 0, 1]), x@w, torch.zeros(4, 2))
    out.backward()
    assert out.dtype == torch.float32 and torch.isfinite(w.grad).all()
    a = torch.tensor([[500., -500.]]*2, requires_grad=True)
    out = ObfuscationLoss(attack, use_disease=False)(a, torch.tensor([0, 1])); out.backward()
    assert torch.isfinite(out) and torch.isfinite(a.grad).all()


def test_adversarial_pretraining():
    z1, z2 = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4)
    enc, view = AdversarialSimCLRLoss(.2, 3.)(z1, z2)
    assert torch.isclose(enc, SimCLRLoss(.2)(z1, z2)) and torch.isclose(view, -3*enc)
    (g,), (h,) = torch.autograd.grad(enc, z1, retain_graph=True), torch.autograd.grad(view, z1)
    assert torch.allclose(h, -3*g, atol=1e-6)
    idx = torch.arange(5)
    torch.manual_seed(0); enc, view = AdversarialNCELoss(MemoryBank(9, 4, seed=1), 6, .1, .5, 2.)(idx, z1)
    torch.manual_seed(0); assert torch.isclose(enc, NCELoss(MemoryBank(9, 4, seed=1), 6, .1, .5)(idx, z1)) and torch.isclose(view, -2*enc)


def test_errors(batch):
    for make in lambda: ObfuscationLoss('flip'), lambda: ObfuscationLoss(weight=-1), lambda: ObfuscationLoss()(*batch[:2]):
        with pytest.raises(ConfigError): make()
