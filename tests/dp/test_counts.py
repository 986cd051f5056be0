"Private class counts: what one patient can change, the noise that is really added, and a budget that adds up"
import math
import numpy as np
import pytest
from dp_accounting import NeighboringRelation, dp_event
from dp_accounting.pld import PLDAccountant
from scipy.stats import kstest
from medprivacy.core import ConfigError, DataError
from medprivacy.dp.account import epsilon
from medprivacy.dp.counts import (PrivateCounts, budget_for_counts, contributions, count_noise_for, pos_weight_from,
    private_class_counts)
from medprivacy.dp.noise import NoiseSource

def cohort(seed, n=60, labels=4, patients=15, missing=.3, soft=False):
    rng = np.random.default_rng(seed)
    y = rng.random((n, labels))
    if not soft: y = np.round(y)
    y[rng.random(y.shape) < missing] = np.nan
    return y, rng.integers(patients, size=n)

@pytest.mark.parametrize('seed', range(8))
def test_one_patient_moves_the_query_by_at_most_one(seed):
    y, ids = cohort(seed, missing=(.0, .3, .9)[seed%3], soft=seed%2 == 1)
    whole = contributions(y, ids).sum(0)
    for p in np.unique(ids):
        assert np.linalg.norm(whole-contributions(y[ids != p], ids[ids != p]).sum(0)) <= 1+1e-9
    for i in range(len(y)):   # Nor does one image, which is replaced by the patient's others
        keep = np.arange(len(y)) != i
        assert np.linalg.norm(whole-contributions(y[keep], ids[keep]).sum(0)) <= 2

@pytest.mark.parametrize('labels', [1, 3, 14])
def test_the_bound_is_reached(labels):
    assert math.isclose(np.linalg.norm(contributions(np.ones((5, labels)), ['a']*5)), 1)

def test_counts_are_counts_of_patients():
    y = np.array([[1, np.nan], [0, 1], [1, 1], [np.nan, 0]])
    c = private_class_counts(y, [7, 7, 8, 8], noise_multiplier=0)
    assert np.allclose(c.pos, [1., 1.]) and np.allclose(c.neg, [.5, .5]) and not c.private   # 7: (½, ½), 8: (½, ½)
    assert private_class_counts(y, noise_multiplier=0).unit == 'image' and c.unit == 'patient'

def test_noise_is_what_is_charged():
    y, ids = cohort(0)
    exact = private_class_counts(y, ids, noise_multiplier=0)
    z = []
    for _ in range(250):
        c = private_class_counts(y, ids, noise_multiplier=3.)
        assert c.private and c.std == 3*math.sqrt(4)
        z.append((np.r_[c.pos, c.neg]-np.r_[exact.pos, exact.neg])/c.std)
    z = np.array(z)
    assert kstest(z.ravel(), 'norm').pvalue > 1e-5
    assert np.abs(np.corrcoef(z.T)-np.eye(8)).max() < 5/math.sqrt(250)    # independent
    assert len(np.unique(z)) > .99*z.size                                 # not used again; on its grid two may meet by chance

def test_a_seed_is_not_private():
    y, ids = cohort(0)
    a, b = (private_class_counts(y, ids, noise_multiplier=3., source=NoiseSource(seed=1)) for _ in range(2))
    assert not a.private and np.array_equal(a.pos, b.pos) and repr(a).startswith('NOT PRIVATE')

@pytest.mark.parametrize('seed', range(5))
def test_weights_are_finite_and_within_limits(seed):
    rng = np.random.default_rng(seed)
    c = PrivateCounts(rng.normal(0, 100, 50), rng.normal(0, 100, 50), 2.)
    w = pos_weight_from(c, (.2, 5.))
    assert np.isfinite(w).all() and w.min() >= .2 and w.max() <= 5
    plain = PrivateCounts(np.array([100., 10.]), np.array([300., 40.]), 0.)
    assert np.allclose(pos_weight_from(plain), [3, 4])

@pytest.mark.parametrize('target,share,accountant', [(.29, .05, 'prv'), (1., .3, 'prv'), (7.89, .1, 'prv'), (2., .1, 'rdp'), (2., .1, 'gdp')])
def test_budget_adds_up(target, share, accountant):
    kw = dict(sample_rate=.05, steps=200, delta=6e-6)
    b = budget_for_counts(target, share, **kw, accountant=accountant)
    assert .99*target <= b.eps <= target and .99*share*target <= b.eps_counts <= share*target
    assert b.eps == epsilon(b.noise_multiplier, **kw, accountant=accountant, extra=(b.count_noise,))
    assert b.count_noise == count_noise_for(target, share, delta=6e-6, accountant=accountant)
    if accountant == 'gdp': return   # An approximation
    a = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=min(1e-4, .05/b.noise_multiplier/20))
    a.compose(dp_event.PoissonSampledDpEvent(.05, dp_event.GaussianDpEvent(b.noise_multiplier)), 200)
    a.compose(dp_event.GaussianDpEvent(b.count_noise))
    assert a.get_epsilon(6e-6) <= target*1.0005

def test_bad_input_is_refused():
    for y in ([2, 0], [[-1]], [math.inf]):
        with pytest.raises(DataError, match='between 0 and 1'): contributions(y)
    with pytest.raises(DataError, match='shape'): contributions(np.zeros((2, 2, 2)))
    with pytest.raises(ConfigError, match='missing ids'): contributions([1, 0], ['a', None])
    for bad in (-1, math.inf, math.nan):
        with pytest.raises(ConfigError, match='noise_multiplier'): private_class_counts([1, 0], noise_multiplier=bad)
    for share in (0, 1, -1, math.nan):
        with pytest.raises(ConfigError, match='share'): count_noise_for(1., share, delta=1e-5)
