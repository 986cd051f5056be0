"The other unit's ε: against dp-accounting, against integration of the mechanism itself, and its limits"
import math
import numpy as np
import pytest
from dp_accounting import NeighboringRelation, dp_event
from dp_accounting.pld import PLDAccountant
from dp_accounting.pld import privacy_loss_distribution as pldlib
from scipy.stats import binom, norm
from medprivacy.core import ConfigError
from medprivacy.dp.account import PrivacySpent, epsilon
from medprivacy.dp.units import both_units, image_pair, other_epsilon, patient_pair

@pytest.mark.parametrize('noise,rate,steps,k,extra', [(2., .05, 100, 2, ()), (4., .1, 50, 5, ()), (3., .02, 200, 3, (30.,))])
def test_patient_when_images_are_drawn_agrees_with_pld(noise, rate, steps, k, extra):
    j = np.arange(k+1)
    a = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=1e-3 if steps < 300 else 1e-4)
    a.compose(dp_event.MixtureOfGaussiansDpEvent(noise, [float(o) for o in j], binom.pmf(j, k, rate).tolist()), steps)
    for s in extra: a.compose(dp_event.GaussianDpEvent(s/k))
    theirs, ours = a.get_epsilon(1e-5), other_epsilon(noise, rate, steps, 1e-5, drawn='image', images=k, extra=extra)
    assert theirs*.999 <= ours <= theirs*1.01

@pytest.mark.parametrize('noise,rate,steps,n', [(1., .2, 10, 2), (3., .9, 5, 2), (2., .05, 50, 4)])
def test_image_when_patients_are_drawn_agrees_with_pld_of_binned_outcomes(noise, rate, steps, n):
    "Outcomes sorted into 4000 bins: processing of the mechanism's output, so dp-accounting's value for it is a lower bound, and close"
    pair  = image_pair(noise, rate, n)
    edges = np.r_[-np.inf, np.linspace(-1-6*noise, 1+6*noise, 4000), np.inf]
    logs  = [{i: math.log(p) for i,p in enumerate(np.diff(sum(w*norm.cdf(edges, c, noise) for w,c in mix))) if p > 0} for mix in (pair.p, pair.q)]
    assert logs[0].keys() == logs[1].keys()
    loss  = pldlib.from_two_probability_mass_functions(logs[1], logs[0], value_discretization_interval=1e-5, symmetric=False)
    theirs, ours = loss.self_compose(steps).get_epsilon_for_delta(1e-5), other_epsilon(noise, rate, steps, 1e-5, drawn='patient', images=(n, n))
    assert theirs*.999 <= ours <= theirs*1.015

def plane(centres, weights, noise, x): return sum(w*np.exp(-((x-c)**2).sum(-1)/(2*noise**2)) for w,c in zip(weights, centres))/(2*math.pi*noise**2)

def line_delta(pair, eps, x=np.linspace(-25, 35, 6001)):
    p, q = (sum(w*norm.pdf(x, c, pair.noise) for w,c in m) for m in (pair.p, pair.q))
    return max(np.maximum(a-math.exp(eps)*b, 0).sum()*(x[1]-x[0]) for a,b in ((p, q), (q, p)))

@pytest.mark.parametrize('seed', range(6))
def test_no_gradients_beat_the_pairs(seed):
    "δ of one step of the mechanism as it runs, integrated over a plane, for random gradients of up to norm 1, never exceeds the pair's"
    rng, h, k = np.random.default_rng(seed), .1, 3
    noise, rate = rng.uniform(.7, 2), rng.uniform(.05, .95)
    x = np.stack(np.meshgrid(*[np.arange(-12, 12, h)]*2), -1)
    for trial in range(3):
        g = rng.normal(size=(k, 2))
        g = g/np.linalg.norm(g, axis=1, keepdims=True)*rng.random((k, 1))**(.3 if trial else 0)
        one  = plane(np.r_[[[0, 0]], g], [1-rate]+[rate/k]*k, noise, x), plane(np.r_[[[0, 0]], g[:-1]], [1-rate]+[rate/(k-1)]*(k-1), noise, x)
        sets = [[i for i in range(k) if s >> i & 1] for s in range(2**k)]
        drawn = plane([g[s].sum(0) for s in sets], [rate**len(s)*(1-rate)**(k-len(s)) for s in sets], noise, x), plane([[0, 0]], [1], noise, x)
        for (p, q), pair in ((one, image_pair(noise, rate, k)), (drawn, patient_pair(noise, rate, k))):
            for eps in (0, .3, 1, 2):
                real = max(np.maximum(a-math.exp(eps)*b, 0).sum()*h*h for a,b in ((p, q), (q, p)))
                assert real <= line_delta(pair, eps)*1.005+1e-6, (g, noise, rate, eps)

def test_drawing_as_the_sampler_does_stays_below():
    "The mechanism simulated: patients drawn, one image of each, noise added; the test that the pair says is best gains no more than δ"
    rng, n, rate, noise, eps = np.random.default_rng(0), 400_000, .6, .7, .5
    def run(images): return (rng.random(n) < rate)*images[rng.integers(len(images), size=n)]+noise*rng.normal(size=n)
    a, b = run(np.array([-1., 1.])), run(np.array([-1.]))
    gain = max((np.mean(a > t)-math.exp(eps)*np.mean(b > t) for t in np.linspace(0, 2, 21)))
    bound = line_delta(image_pair(noise, rate, 2), eps)
    assert bound-.006 <= gain <= bound+.006   # reached, and not exceeded, within four standard errors

def test_one_image_each_is_the_same():
    for drawn in ('patient', 'image'): assert other_epsilon(1., .1, 20, 1e-5, drawn=drawn, images=[1, 1, 1]) == epsilon(1., .1, 20, 1e-5)

def test_worst_patient_counts():
    kw = dict(noise_multiplier=2., sample_rate=.05, steps=100, delta=1e-5)
    own = epsilon(**kw)
    assert other_epsilon(**kw, drawn='image', images=[1, 4, 2]) == other_epsilon(**kw, drawn='image', images=4) > 2*own
    assert other_epsilon(**kw, drawn='patient', images=[1, 4]) == own                            # the patient with one image
    assert other_epsilon(**kw, drawn='patient', images=[2, 4]) == other_epsilon(**kw, drawn='patient', images=2) < own
    high = dict(kw, sample_rate=.9, steps=5)
    assert other_epsilon(**high, drawn='patient', images=(1, 2)) > 1.1*epsilon(**high)           # replaced, not removed

@pytest.mark.parametrize('drawn', ['patient', 'image'])
def test_corners(drawn):
    kw = dict(drawn=drawn, images=(2, 3))
    assert other_epsilon(1., .1, 0, 1e-5, **kw) == other_epsilon(1., 0., 9, 1e-5, **kw) == other_epsilon(math.inf, .1, 9, 1e-5, **kw) == 0
    assert other_epsilon(0., .1, 9, 1e-5, **kw) == math.inf
    apart = 3 if drawn == 'image' else 2
    assert math.isclose(other_epsilon(1., .1, 0, 1e-5, **kw, extra=(6.,)), epsilon(6/apart, 1., 1, 1e-5), rel_tol=1e-6)
    assert other_epsilon(.02, .5, 1000, 1e-5, **kw) > 1000
    if drawn == 'image': assert math.isclose(other_epsilon(4., 1., 4, 1e-5, **kw), epsilon(4/3, 1., 4, 1e-5), rel_tol=1e-6)

def test_record_keeps_its_terms():
    s = PrivacySpent(epsilon(2., .05, 100, 1e-5), 1e-5, unit='image', steps=100, sample_rate=.05, noise_multiplier=2., private=False)
    b = both_units(s, [3, 1])
    assert b.image is s and b.patient.eps > s.eps and b.patient.unit == 'patient' and not b.patient.private and b.images == (1, 3)
    assert 'NOT PRIVATE' in repr(b) and '1 to 3 images' in repr(b)
    with pytest.raises(ConfigError, match='steps'): both_units(PrivacySpent(1., 1e-5), [1])
    for bad in ([], [0, 1], [1.5], [math.nan]):
        with pytest.raises(ConfigError, match='whole numbers'): both_units(s, bad)
