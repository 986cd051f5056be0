"Agreement with scikit-learn, known answers, coverage of intervals, and inputs that carry no information"
import numpy as np, pandas as pd, pytest
from scipy.stats import binom, bootstrap, norm
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score, roc_curve

from medprivacy.core import ConfigError, DataError
from medprivacy.data.core import Predictions
from medprivacy.evaluate import (METRICS, Interval, auprc, auroc, auroc_ci, bootstrap_auroc, choose_thresholds,
                                 metric_draws, metrics_table, paired_test, scores_of, youden_threshold)
from medprivacy.rank import exact_dtype, fake_predictions
from medprivacy.resample import Units, bootstrap_sums, holm, interval, resample_counts, two_sided_p, units_of
from medprivacy.thresholds import confusion, rate_threshold, rates, sensitivity_threshold


def draw(seed, n=300, L=3, decimals=1):
    "Labels with NaN, scores with ties, and patients with several images"
    rng = np.random.default_rng(seed)
    y = (rng.random((n, L)) < rng.uniform(.1, .6, L))*1.
    y[:2] = [[0]*L, [1]*L]
    s = (rng.normal(size=(n, L)) + y).round(decimals)
    y[rng.random((n, L)) < .1] = np.nan
    return y, s, rng.integers(0, n//3, n)


# ---------------------------------------------------------------- agreement

@pytest.mark.parametrize('seed', range(20))
@pytest.mark.parametrize('decimals', [0, 1, 8])
def test_areas_equal_sklearn(seed, decimals):
    y, s, _ = draw(seed, n=150, decimals=decimals)
    w = np.random.default_rng(seed).random(len(y))
    for weight in (None, w):
        for ours, theirs in ((auroc, roc_auc_score), (auprc, average_precision_score)):
            got = ours(y, s, weight)
            for l in range(y.shape[1]):
                k = ~np.isnan(y[:, l])
                ref = theirs(y[k, l], s[k, l], sample_weight=None if weight is None else weight[k])
                assert abs(got[l]-ref) < 1e-12


@pytest.mark.parametrize('seed', range(5))
def test_bootstrap_equals_a_loop(seed):
    y, s, pid = draw(seed, n=120)
    units = units_of(len(y), pid)
    got = bootstrap_auroc(y, s, 30, pid, seed)
    counts = np.concatenate(list(resample_counts(units.m, 30, seed)), axis=1)
    for b in range(30):
        w = counts[units.codes, b]
        for l in range(y.shape[1]):
            k = ~np.isnan(y[:, l]) & (w > 0)
            if len(np.unique(y[k, l])) < 2: assert np.isnan(got[b, l])
            else: assert abs(got[b, l]-roc_auc_score(y[k, l], s[k, l], sample_weight=w[k])) < 1e-12


def test_rows_in_another_order_give_the_same_draws():
    y, s, pid = draw(0)
    k = np.random.default_rng(1).permutation(len(y))
    np.testing.assert_allclose(bootstrap_auroc(y[k], s[k], 50, pid[k]), bootstrap_auroc(y, s, 50, pid), atol=1e-14)


def test_monotone_scores_and_flipped_labels():
    y, s, pid = draw(3)
    np.testing.assert_allclose(auroc(y, np.exp(s)*1e6), auroc(y, s), atol=1e-14)
    np.testing.assert_allclose(auroc(1-y, s), 1-auroc(y, s), atol=1e-14)
    np.testing.assert_allclose(bootstrap_auroc(y, -s, 20, pid), 1-bootstrap_auroc(y, s, 20, pid), atol=1e-12)


def test_labels_share_resamples_and_keep_their_axis():
    y, s, pid = draw(4)
    all_ = bootstrap_auroc(y, s, 20, pid)
    assert all_.shape == (20, 3) and bootstrap_auroc(y[:, 0], s[:, 0], 20, pid).shape == (20, 1)
    np.testing.assert_array_equal(bootstrap_auroc(y[:, 1], s[:, 1], 20, pid)[:, 0], all_[:, 1])
    assert auroc(y[:, 0], s[:, 0]).shape == (1,)


def test_large_clusters_leave_float32():
    assert exact_dtype(units_of(10)) is np.float32
    rng = np.random.default_rng(0)
    pid = np.r_[np.zeros(4000, int), np.arange(1, 2000)]
    y = (rng.random(len(pid)) < .5)*1.; s = rng.normal(size=len(pid)).round(1)+y
    assert exact_dtype(units_of(len(pid), pid)) is np.float64
    u = units_of(len(pid), pid); w = next(resample_counts(u.m, 1))[u.codes, 0]
    assert abs(bootstrap_auroc(y, s, 1, pid)[0, 0]-roc_auc_score(y, s, sample_weight=w)) < 1e-12


def test_chunks_change_nothing():
    ref = np.concatenate(list(resample_counts(37, 100, 5)), axis=1)
    for chunk in (1, 3, 64, 1000): np.testing.assert_array_equal(np.concatenate(list(resample_counts(37, 100, 5, chunk=chunk)), 1), ref)
    assert (ref.sum(0) == 37).all()


def test_memory_is_bounded_by_chunks():
    "All counts of 1,000 resamples of 20,000 images would take 76 MB; blocks keep it to a tenth"
    import tracemalloc
    rng = np.random.default_rng(0); y = (rng.random(20_000) < .2)*1.; s = rng.normal(size=20_000)+y
    tracemalloc.start(); bootstrap_auroc(y, s, 1000); peak = tracemalloc.get_traced_memory()[1]/2**20; tracemalloc.stop()
    assert peak < 15


# ---------------------------------------------------------------- intervals

def clustered(rng, n_pat, k, area, share):
    "Scores of known AUROC; label and part of the score belong to the patient"
    y = np.repeat(rng.integers(0, 2, n_pat), k)*1.
    z = share**.5*np.repeat(rng.normal(size=n_pat), k)+(1-share)**.5*rng.normal(size=n_pat*k)
    return y, z+2**.5*norm.ppf(area)*y, np.repeat(np.arange(n_pat), k)


def covered(reps, n_pat, k, area, share, n_boot, method='percentile', by_image=False):
    hits = 0
    for r in range(reps):
        y, s, pid = clustered(np.random.default_rng([7, r]), n_pat, k, area, share)
        hits += area in auroc_ci(y, s, patient=None if by_image else pid, n_boot=n_boot, seed=r, method=method)
    return hits


def band(reps, p=.95, mass=.999): return binom.interval(mass, reps, p)


@pytest.mark.parametrize('k,share', [(1, 0.), (3, .6)])
def test_coverage_small(k, share):
    "150 simulations: 99.9 % of exact 95 % intervals would give a count in the band (132 to 150)"
    lo, hi = band(150)
    assert lo <= covered(150, 200, k, .8, share, 300) <= hi


def test_resampling_images_of_patients_is_too_narrow():
    "Four images that share 90 % of their noise: the image-wise interval is about half as wide as it should be"
    assert covered(100, 100, 4, .8, .9, 200, by_image=True) < band(100)[0]


@pytest.mark.slow
@pytest.mark.parametrize('method', ['percentile', 'bca'])
@pytest.mark.parametrize('k,share', [(1, 0.), (3, .6)])
def test_coverage(k, share, method):
    lo, hi = band(2000)
    assert lo <= covered(2000, 250, k, .8, share, 1000, method) <= hi


def test_bca_agrees_with_scipy():
    rng = np.random.default_rng(0)
    y, s, _ = clustered(rng, 80, 1, .9, 0.)
    ours = auroc_ci(y, s, patient=None, n_boot=6000, method='bca')
    i = np.arange(80)

    def stat(i): return auroc(y[i.astype(int)], s[i.astype(int)])[0]
    ref = bootstrap((i,), stat, n_resamples=800, vectorized=False, method='BCa', rng=np.random.default_rng(1)).confidence_interval
    # the ends of 800 draws have a standard error of less than 0.1 of the width
    assert np.allclose([ours.lo, ours.hi], ref, atol=.35*(ref[1]-ref[0]))


def test_interval_prints_as_in_papers():
    assert str(Interval(.8731, .8607, .8839, 812, 'patient')) == '0.873 [0.861, 0.884]'


def test_interval_follows_level():
    d = np.linspace(0, 1, 1001)
    a, b = (interval(.5, d, n=9, unit='patient', level=l) for l in (.9, .5))
    assert (a.lo, a.hi, b.lo, b.hi) == pytest.approx((.05, .95, .25, .75))


def test_holm_is_statsmodels_like():
    p = np.array([.01, .02, .03, .04, np.nan])
    np.testing.assert_allclose(holm(p), [.04, .06, .06, .06, np.nan])
    assert float(two_sided_p(np.ones(99))) == pytest.approx(.02)


# ---------------------------------------------------------------- paired

def test_paired_test_sees_a_small_difference_that_intervals_do_not():
    rng = np.random.default_rng(0)
    y, s, pid = clustered(rng, 200, 2, .8, .5)
    b = s+.25*rng.normal(size=len(s)); a = s+.25*y
    t = paired_test(y, a, b, patient=pid).iloc[0]
    one, two = auroc_ci(y, a, patient=pid), auroc_ci(y, b, patient=pid)
    assert t.p < .05 and one.lo < two.hi and t.hi-t.lo < one.hi-one.lo
    assert t.n == 200 and t.unit == 'patient'


def test_paired_test_of_equal_models():
    y, s, pid = draw(0)
    t = paired_test(y, s, s, patient=pid, labels=list('abc'))
    assert (t.p == 1).all() and (t.p_holm == 1).all() and (t.difference == 0).all() and t.label.tolist() == list('abc')


def test_p_values_are_uniform_enough():
    "60 comparisons of equally good models: more than 9 below 0.05 has a chance under 1e-3"
    low = 0
    for r in range(60):
        rng = np.random.default_rng([3, r]); y = rng.integers(0, 2, 200)*1.
        z = rng.normal(size=200)+y
        low += paired_test(y, z+.5*rng.normal(size=200), z+.5*rng.normal(size=200), patient=None, n_boot=300).p[0] < .05
    assert low <= binom.ppf(.999, 60, .05)


def test_one_class_in_paired_test():
    t = paired_test([1., 1.], [.1, .2], [.3, .1], patient=[1, 2]).iloc[0]
    assert np.isnan(t.p) and np.isnan(t.p_holm) and 'only positives' in t.note


# ---------------------------------------------------------------- thresholds

@pytest.mark.parametrize('seed', range(10))
def test_youden_equals_sklearn(seed):
    y, s, _ = draw(seed, decimals=2)
    for l, t in enumerate(youden_threshold(y, s)):
        k = ~np.isnan(y[:, l]); fpr, tpr, thr = roc_curve(y[k, l], s[k, l])
        assert t == thr[np.argmax(tpr-fpr)]


@pytest.mark.parametrize('share', [.05, .5, .9, 1.])
def test_fixed_sensitivity_and_rate(share):
    y, s, _ = draw(1, decimals=8)
    for l, (a, b) in enumerate(zip(sensitivity_threshold(y, s, share), rate_threshold(y, s, share))):
        k = ~np.isnan(y[:, l]); pos = s[k & (y[:, l] == 1), l]
        assert (pos >= a).mean() >= share > (pos > a).mean()
        assert (s[k, l] >= b).mean() >= share > (s[k, l] > b).mean()


def test_rates_equal_sklearn():
    y, s, _ = draw(2)
    k = ~np.isnan(y[:, 0])
    r = rates(*confusion(y, s, [.5]*3).sum(1))
    assert r['f1'][0] == pytest.approx(f1_score(y[k, 0], s[k, 0] >= .5))
    assert np.allclose(r['sensitivity']+r['fnr'], 1) and np.allclose(r['specificity']+r['fpr'], 1)


# ---------------------------------------------------------------- tables

def test_table_is_consistent():
    p = fake_predictions(300, ('a', 'b', 'c'))
    t = metrics_table(p, intervals='all', n_boot=200)
    assert t.label.tolist() == ['a', 'b', 'c', 'macro', 'weighted'] and (t.unit == 'patient').all() and (t.rule == 'youden').all()
    for m in METRICS:
        assert ((t[f'{m}_lo'] <= t[m]+1e-9) & (t[m] <= t[f'{m}_hi']+1e-9)).all()
        assert t[m][3] == pytest.approx(t[m][:3].mean())
        assert t[m][4] == pytest.approx(np.average(t[m][:3], weights=t.n_pos[:3]))


def test_thresholds_come_from_validation_only():
    p = fake_predictions(300)
    df = p.df.copy(); test = df.split == 'test'
    df.loc[test, ['score_effusion', 'score_cardiomegaly']] **= 3
    assert (choose_thresholds(Predictions(df, p.labels)).threshold == choose_thresholds(p).threshold).all()
    assert metrics_table(p, threshold='youden_on_test', intervals=()).balanced_accuracy[0] >= metrics_table(p, intervals=()).balanced_accuracy[0]
    assert set(metrics_table(p, threshold='youden_on_test', intervals=()).rule) == {'youden_on_test'}


def test_masked_labels_count():
    p = fake_predictions(200); df = p.df.copy()
    df.loc[df.index[::3], 'y_effusion'] = np.nan
    t = metrics_table(Predictions(df, p.labels), n_boot=50)
    assert t.n[0] == df[df.split == 'test'].y_effusion.notna().sum() < t.n[1]


def test_draws_of_counts_are_sums():
    y, s, pid = draw(0); u = units_of(len(y), pid)
    d = metric_draws(y, s, [.5]*3, u, 10)
    w = np.concatenate(list(resample_counts(u.m, 10)), 1)[u.codes]
    k = ~np.isnan(y[:, 0])
    acc = [np.average((y[k, 0] == (s[k, 0] >= .5)), weights=w[k, b]) for b in range(10)]
    np.testing.assert_allclose(d['accuracy'][:, 0], acc)


# ---------------------------------------------------------------- nothing to go by

def test_one_class():
    assert np.isnan(auroc([[1], [1]], [[.1], [.2]])).all()
    i = auroc_ci([0, 0, np.nan], [.1, .2, .3], patient=[1, 2, 3])
    assert np.isnan([i.value, i.lo, i.hi]).all() and i.note == 'only negatives among 2 images' and i.n == 2
    assert 'no known label' == auroc_ci([np.nan], [.1], patient=[1]).note
    assert np.isnan(youden_threshold([1, 1], [.1, .2])).all()


def test_no_rows():
    assert np.isnan(auroc([], [])).all() and np.isnan(bootstrap_auroc([], [], 3)).all()
    assert auroc_ci([], [], patient=[]).note == 'no known label'


def test_constant_scores():
    i = auroc_ci([0, 1, 0, 1], [.5]*4, patient=[1, 2, 3, 4])
    assert i.value == .5 and i.note.startswith('all scores are equal')
    assert youden_threshold([0, 1, 0, 1], [.5]*4) == [.5]


def test_nan_scores():
    with pytest.raises(DataError, match='NaN or infinite in 1 rows'): auroc([0, 1], [np.nan, .2])
    assert auroc([0, 1, np.nan], [.1, .2, np.nan])[0] == 1
    with pytest.raises(DataError, match='NaN or infinite'): paired_test([0, 1], [.1, .2], [.1, np.inf], patient=None)


def test_one_patient():
    i = auroc_ci([0, 1, 1], [.1, .2, .05], patient=['a']*3)
    assert i.value == .5 and np.isnan(i.lo) and i.note == 'no interval: 1 patient'


@pytest.mark.parametrize('y,s,why', [([0, 2], [.1, .2], 'labels are 0, 1 or NaN'), ([0, 1], [.1], 'one score per label'),
                                     ([[0, 1]], [[.1], [.2]], 'one score per label')])
def test_wrong_input(y, s, why):
    with pytest.raises(DataError, match=why): auroc(y, s)


def test_wrong_settings():
    with pytest.raises(DataError, match='patient is missing'): auroc_ci([0, 1], [.1, .2], patient=['a', None])
    with pytest.raises(DataError, match='3 entries for 2 rows'): bootstrap_auroc([0, 1], [.1, .2], 5, patient=[1, 2, 3])
    with pytest.raises(ConfigError, match='n_boot'): bootstrap_auroc([0, 1], [.1, .2], 0)
    with pytest.raises(ConfigError, match='level'): auroc_ci([0, 1, 0, 1], [.1, .2, .3, .4], patient=[1, 2, 3, 4], level=95)
    p = fake_predictions(60)
    with pytest.raises(ConfigError, match='unit is'): metrics_table(p, unit='study')
    with pytest.raises(DataError, match='no threshold for'): metrics_table(p, threshold=choose_thresholds(p).iloc[:1])


def test_mismatching_tables():
    p = fake_predictions(60)
    with pytest.raises(DataError, match='no rows with split'): scores_of(p, split='holdout')
    with pytest.raises(DataError, match='occur twice'): metrics_table(Predictions(pd.concat([p.df, p.df]), p.labels), threshold=.5)


def test_a_group_without_positives_keeps_the_rest_of_the_table():
    p = fake_predictions(100); df = p.df.assign(y_effusion=0.)
    t = metrics_table(Predictions(df, p.labels), intervals='all', n_boot=50)
    assert np.isnan(t.auroc[0]) and np.isnan(t.threshold[0]) and np.isfinite(t.auroc[2]) and t.note[2] == 'without effusion'


def test_sums_with_other_weights():
    u = Units(np.array([0, 0, 1]), 2, 'patient')
    got = bootstrap_sums(np.array([[1.], [2.], [4.]]), u, 2, draw=lambda: iter([np.array([[1., 0.], [0., 2.]])]))
    np.testing.assert_array_equal(got, [[3.], [8.]])
