"Correlations against scipy, Fisher's interval, and paired losses; gaps against epsilon; points that carry no information"
import numpy as np, pandas as pd, pytest
from scipy.stats import binom, pearsonr

from medprivacy.core import ConfigError, DataError
from medprivacy.data.core import Predictions
from medprivacy.evaluate import paired_test, scores_of
from medprivacy.fairness import against_rest, by_group
from medprivacy.rank import fake_predictions
from medprivacy.trends import gap_correlations, gaps_by_epsilon, loss_correlations, pearson, performance_loss

PUBLIC, PRIVATE = (fake_predictions(300, tuple('abcde'), auroc=a, noise_seed=k, model=m) for a, k, m in ((.9, 1, 'public'), (.75, 2, 'private')))


@pytest.mark.parametrize('seed', range(10))
def test_pearson_equals_scipy(seed):
    rng = np.random.default_rng(seed); x, y = rng.normal(size=(2, 4+seed))
    c, ref = pearson(x, y, level=.9), pearsonr(x, y)
    assert (c.r, c.p, c.n) == (pytest.approx(ref.statistic), pytest.approx(ref.pvalue), 4+seed)
    assert (c.lo, c.hi) == pytest.approx(tuple(ref.confidence_interval(.9)))


def test_fisher_interval_covers():
    "400 samples of 8 points with r = 0.6"
    hits = 0
    for r in range(400):
        rng = np.random.default_rng([2, r]); x, e = rng.normal(size=(2, 8)); c = pearson(x, .6*x+.8*e); hits += c.lo <= .6 <= c.hi
    assert binom.ppf(.0005, 400, .95) <= hits <= binom.ppf(.9995, 400, .95)


def test_bootstrap_interval_is_that_of_the_draws():
    rng = np.random.default_rng(0); x, y = rng.normal(size=(2, 6)); d = y+.1*rng.normal(size=(200, 6))
    c = pearson(x, y, y_draws=d)
    assert (c.boot_lo, c.boot_hi) == pytest.approx(tuple(np.quantile([pearsonr(x, v).statistic for v in d], [.025, .975])))


@pytest.mark.parametrize('x,y,why', [([1, 2], [1, 2], '2 points'), ([1, 1, 1], [1, 2, 3], 'all x are equal'), ([1, 2, 3], [4, 4, 4], 'all y are equal'),
                                     ([1, np.nan, 3, 4], [1, 2, np.inf, 4], '2 points'), ([], [], '0 points')])
def test_points_without_information(x, y, why):
    c = pearson(x, y); assert np.isnan([c.r, c.lo, c.hi, c.p]).all() and why in c.note


def test_losses_per_label_are_the_paired_test():
    t = performance_loss(PRIVATE, PUBLIC, n_boot=100); a, b = scores_of(PUBLIC), scores_of(PRIVATE)
    ref = paired_test(a.y, a.score, b.score, patient=a.df.patient_id, n_boot=100, labels=list('abcde'))
    np.testing.assert_allclose(t[['public', 'private', 'loss', 'lo', 'hi']], ref[['auroc_a', 'auroc_b', 'difference', 'lo', 'hi']], atol=1e-12)
    assert (t.size_of == 'train').all() and t['size'].tolist() == [PUBLIC.df[PUBLIC.df.split == 'train'][f'y_{l}'].sum() for l in 'abcde']


def test_losses_per_group_are_differences_of_group_means():
    t = performance_loss(PRIVATE, PUBLIC, 'age_band', n_boot=20, min_size=5).set_index('point')
    a, b = (by_group(p, 'age_band', n_boot=2, min_size=5, macro=True).query("label == 'macro' and by == 'age_band'").set_index('group').auroc for p in (PUBLIC, PRIVATE))
    np.testing.assert_allclose(t.loss, (a-b)[t.index], atol=1e-12)
    c = loss_correlations(PRIVATE, PUBLIC, 'age_band', n_boot=20, min_size=5)
    assert c.r[0] == pytest.approx(pearsonr(np.log10(t['size']), t.loss).statistic) and c[['x', 'y']].values.tolist()[3] == ['public', 'loss']
    assert (performance_loss(PRIVATE, PUBLIC, ('sex', 'view'), n_boot=2).by == 'sex × view').all()


def test_sizes_given_or_missing():
    size = dict(zip('abcde', [10, 100, 1000, 10_000, 100_000]))
    assert performance_loss(PRIVATE, PUBLIC, n_boot=2, sizes=size)['size'].tolist() == list(size.values())
    with pytest.raises(DataError, match="no entry for \\['e'\\]"): performance_loss(PRIVATE, PUBLIC, n_boot=2, sizes={k: 1 for k in 'abcd'})
    test = [Predictions(p.df[p.df.split == 'test'], p.labels) for p in (PRIVATE, PUBLIC)]
    assert (performance_loss(*test, threshold=.5, n_boot=2).size_of == 'test').all()
    with pytest.raises(DataError, match='has no logarithm'): loss_correlations(PRIVATE, PUBLIC, n_boot=2, sizes=size | {'a': 0})
    assert np.isfinite(loss_correlations(PRIVATE, PUBLIC, n_boot=2, sizes=size | {'a': 0}, log_size=False).r).all()


def test_a_label_without_positives():
    pub, pri = (Predictions(p.df.assign(y_a=0.), p.labels) for p in (PUBLIC, PRIVATE))
    t = performance_loss(pri, pub, n_boot=5, sizes=dict.fromkeys('abcde', 5)); assert np.isnan(t.loss[0]) and t.note[0] and np.isfinite(t.loss[1:]).all()
    assert loss_correlations(pri, pub, n_boot=5, sizes=dict(zip('abcde', range(1, 6)))).n[0] == 4


def test_tables_that_do_not_match():
    with pytest.raises(DataError, match='in only one of the two'): performance_loss(fake_predictions(250, tuple('abcde')), PUBLIC)
    with pytest.raises(DataError, match='targets differ'): performance_loss(fake_predictions(300), PUBLIC)
    with pytest.raises(ConfigError, match="metric 'auc'"): performance_loss(PRIVATE, PUBLIC, metric='auc')


EPS = {'e1': 1., 'e3': 3., 'e9': 9., 'e27': 27., 'inf': np.inf}
MANY = Predictions(pd.concat([fake_predictions(250, ('x',), auroc=.8, bias={'F': -.25/e}, model=m, noise_seed=j).df for j, (m, e) in enumerate(EPS.items())],
                             ignore_index=True), ('x',))


def test_gaps_are_those_against_the_rest():
    t = gaps_by_epsilon(MANY, EPS, n_boot=100); assert t[t.group == 'F'].model.tolist() == list(EPS)
    ref = against_rest(MANY, 'sex', 'accuracy', n_boot=100).set_index(['group', 'model']); mine = t.set_index(['group', 'model'])
    np.testing.assert_allclose(mine[['difference', 'lo', 'hi']], ref.loc[mine.index, ['difference', 'lo', 'hi']].astype(float), atol=1e-12)
    c = gap_correlations(MANY, EPS, n_boot=100, log_epsilon=False).set_index('group')
    f = t[(t.group == 'F') & np.isfinite(t.epsilon)]
    assert c.n['F'] == 4 and c.r['F'] == pytest.approx(pearsonr(f.epsilon, f.difference).statistic) and c.r['F'] == pytest.approx(-c.r['M'])


def test_models_on_other_images_or_without_epsilon():
    other = Predictions(pd.concat([MANY.df, fake_predictions(200, ('x',), model='z').df], ignore_index=True), ('x',))
    with pytest.raises(DataError, match='on other images'): gaps_by_epsilon(other, EPS | {'z': 2.}, threshold=.5)
    with pytest.raises(DataError, match="no entry for models \\['z'\\]"): gaps_by_epsilon(other, EPS)
    with pytest.raises(ConfigError, match='above 0'): gap_correlations(MANY, EPS | {'e1': -1.})
    with pytest.raises(ConfigError, match="metric 'auc'"): gaps_by_epsilon(MANY, EPS, metric='auc')


def test_rows_in_any_order():
    mixed = Predictions(MANY.df.sample(frac=1, random_state=0), ('x',))
    for unit in ('patient', 'image'):
        a, b = (gaps_by_epsilon(p, EPS, n_boot=30, unit=unit).sort_values(['group', 'model'], ignore_index=True) for p in (MANY, mixed))
        pd.testing.assert_frame_equal(a, b)
