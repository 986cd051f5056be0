"Groups made alike: against scikit-learn's and numpy's quantiles, whatever the group; a code carries no more than ranks"
import numpy as np
import pytest
import torch
from medprivacy.core import ConfigError
from medprivacy.models.redraw import Redraw, group_quantiles, group_rows, transport

def made(n=3000, shift=1.5, code=2):
    rows = torch.arange(n) % 2 + 1
    x = torch.randn(n, code)
    x[rows == 2] = x[rows == 2].exp()*.7 + shift      # another shape, not only another place
    return x, rows

@pytest.mark.parametrize('knots', [2, 5, 32])
def test_transport_is_interpolation_of_quantiles(knots):
    x, rows = made()
    q, common = group_quantiles(x, rows, 2, knots)
    at = (np.arange(knots)+.5)/knots
    for g in (1, 2):
        mine = x[rows == g].numpy()
        np.testing.assert_allclose(q[g], np.quantile(mine, at, axis=0, method='hazen'), atol=1e-5)
        for j in range(2):
            want = np.interp(mine[:,j], q[g,:,j].numpy(), common[:,j].numpy())
            np.testing.assert_allclose(transport(x[rows == g], q[rows[rows == g]], common)[:,j], want, atol=1e-4)

def test_groups_of_other_patients_are_alike_afterwards():
    from scipy.stats import ks_2samp
    (x, rows), (new, other) = made(), made()
    m = Redraw(1, 32, 2, teachers=('small_resnet',))
    m.fit_groups(x, rows)
    z = m.between(new, other)
    for j in range(2):
        assert ks_2samp(new[other == 1,j], new[other == 2,j]).statistic > .4
        assert ks_2samp(z[other == 1,j], z[other == 2,j]).statistic < .08      # 1.4 of √(2/1500) is at 5 %

def test_equal_groups_are_left_as_they_are():
    x = torch.randn(4000, 3)
    q, common = group_quantiles(x, torch.arange(4000) % 2 + 1, 2, 64)
    z = transport(x, q[torch.arange(4000) % 2 + 1], common)
    inner = x.abs() < 1.5
    assert (z - x)[inner].abs().max() < .2 and z.min() >= common.min() and z.max() <= common.max()

def test_groups_that_are_unknown_or_small():
    x, rows = made(100)
    rows[:] = 1; rows[:5] = 2
    q, _ = group_quantiles(x, rows, 2)
    assert torch.equal(q[2], q[0]) and not torch.equal(q[1], q[0])
    assert group_rows(torch.tensor([float('nan'), 0., 1.]), 3, 2).tolist() == [0, 1, 2]

def test_what_is_subtracted_depends_on_the_group_alone():
    m = Redraw(1, 32, 2, teachers=('small_resnet',), strength=0.).eval()
    m.quantiles[-1,2] += 1.
    x = torch.rand(3, 1, 32, 32)
    with torch.no_grad():
        same, other, none = (m(x, cond=c) for c in (torch.zeros(3), torch.ones(3), None))
        assert not torch.equal(same, other) and torch.equal(same, none)     # row 0 and row 1 are still equal
        assert torch.equal(m(x[1:2], cond=torch.ones(1)), other[1:2]) or torch.allclose(m(x[1:2], cond=torch.ones(1)), other[1:2], atol=1e-6)

@pytest.mark.parametrize('kw,word', [(dict(strength=-.1), 'strength'), (dict(teachers=()), 'teacher'), (dict(n_groups=0), 'n_groups'), (dict(knots=1), 'knots'), (dict(rounds=0), 'rounds')])
def test_bad_arguments(kw, word):
    with pytest.raises(ConfigError, match=word): Redraw(1, 32, 2, **kw)
def test_bad_groups():
    with pytest.raises(ConfigError, match='group 2'): group_rows(torch.tensor([2.]), 1, 2)
    with pytest.raises(ConfigError, match='2 images'): group_rows(torch.zeros(3), 2, 2)

def test_a_patient_with_many_images_counts_once():
    x, rows = made(400)
    m, n = (Redraw(1, 32, 2, teachers=('small_resnet',)) for _ in range(2))
    m.fit_groups(x, rows)
    more = torch.cat([torch.arange(400), torch.full((200,), 3)])            # image 3 again, 200 times
    w = torch.ones(600); w[more == 3] = 1/201
    n.fit_groups(x[more], rows[more], w)
    torch.testing.assert_close(n.quantiles, m.quantiles, atol=.03, rtol=0)
