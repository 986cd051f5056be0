"SimCLR, InfoNCE and the bank against loops."
import math

import pytest
import torch
import torch.nn.functional as F

from medprivacy.core import ConfigError
from medprivacy.objectives.contrast import MemoryBank, NCELoss, SimCLRLoss


@pytest.mark.parametrize('t', [.07, .5])
@pytest.mark.parametrize('push_only', [False, True])
@pytest.mark.parametrize('b', [1, 2, 7])
def test_simclr_is_the_loop(b, push_only, t):
    g = torch.Generator().manual_seed(b)
    z1, z2 = torch.randn(b, 5, generator=g, dtype=torch.float64), torch.randn(b, 5, generator=g, dtype=torch.float64)
    a, c = [z/z.norm(dim=1, keepdim=True) for z in (z1, z2)]
    total = 0.
    for i in range(b):
        push = math.log(sum(math.exp((a[i]@o).item()/t) for o in [*a, *c])) - math.log(2*b)
        total += (0. if push_only else (a[i]@c[i]).item()/t) - push
    assert math.isclose(SimCLRLoss(t, push_only)(z1, z2).item(), -total/b, rel_tol=1e-9)
    assert torch.autograd.gradcheck(SimCLRLoss(t, push_only), (z1.requires_grad_(), z2.requires_grad_()))


@pytest.mark.parametrize('size, k', [(30, 4), (30, 50), (500, 8)])
def test_nce_is_the_loop_and_moves_the_bank(size, k):
    bank, idx = MemoryBank(size, 6, seed=3).double(), torch.tensor([0, 5, size-1])
    rows, z = bank.rows.clone(), torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    u = (z/z.norm(dim=1, keepdim=True)).detach()
    torch.manual_seed(9); neg = torch.randint(0, size, (3, k))
    torch.manual_seed(9); loss = NCELoss(bank, k, t=.1, m=.3)(idx, z)
    total = 0.
    for i in range(3):
        total += (u[i]@rows[idx[i]]).item()/.1 - (math.log(sum(math.exp((u[i]@rows[n]).item()/.1) for n in neg[i])) - math.log(k))
    assert math.isclose(loss.item(), -total/3, rel_tol=1e-6)
    loss.backward()
    assert torch.isfinite(z.grad).all()
    assert torch.allclose(bank[idx], F.normalize(.3*rows[idx] + .7*u, dim=1))
    rest = torch.ones(size, dtype=torch.bool); rest[idx] = False
    assert torch.equal(bank.rows[rest], rows[rest])


def test_bank_rests_in_eval_mode_and_is_saved():
    bank = MemoryBank(10, 4, seed=0)
    loss, rows = NCELoss(bank, 3).eval(), bank.rows.clone()
    loss(torch.tensor([1]), torch.randn(1, 4))
    assert torch.equal(bank.rows, rows) and 'bank.rows' in loss.state_dict()
    assert torch.equal(MemoryBank(10, 4, seed=0).rows, rows) and len(bank) == 10


def test_empty_batches_bf16_and_errors():
    z = torch.zeros(0, 4, requires_grad=True)
    (SimCLRLoss()(z, z) + NCELoss(MemoryBank(5, 4))(torch.zeros(0).long(), z)).backward()
    assert z.grad.shape == (0, 4)
    x, w = torch.randn(6, 4), torch.randn(4, 4, requires_grad=True)
    with torch.autocast('cpu', torch.bfloat16): loss = SimCLRLoss()(x@w, (x+.1)@w) + NCELoss(MemoryBank(6, 4), 5)(torch.arange(6), x@w)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(w.grad).all()
    for make in (lambda: SimCLRLoss(0), lambda: MemoryBank(0, 2), lambda: NCELoss(MemoryBank(2, 2), 0), lambda: NCELoss(MemoryBank(2, 2), m=2),
                 lambda: SimCLRLoss()(torch.zeros(2, 3), torch.zeros(3, 3))):
        with pytest.raises(ConfigError): make()
