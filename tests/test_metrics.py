"One pass over all metrics: equality with scikit-learn on random tables, BCa for any metric, rules with their number, several classes"
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from sklearn.metrics import (accuracy_score, average_precision_score, balanced_accuracy_score, brier_score_loss, cohen_kappa_score, f1_score,
                             precision_score, recall_score, roc_auc_score)

from medprivacy.core import ConfigError, DataError
from medprivacy.data.core import Predictions
from medprivacy.evaluate import auprc, auroc, auroc_ci, choose_thresholds, metrics_table, paired_test, scores_of
from medprivacy.metrics import METRICS, areas, mean_over_labels, metric_draws, metric_left_out
from medprivacy.multiclass import class_metrics_table, class_scores
from medprivacy.rank import fake_predictions
from medprivacy.resample import influence_of, left_out, units_of
from medprivacy.thresholds import sensitivity_threshold


@st.composite
def weighted(draw):
    "Labels of both classes, scores with many ties, weights of which some are zero"
    n = draw(st.integers(4, 40))
    y = [0., 1.]+draw(st.lists(st.sampled_from([0., 1.]), min_size=n-2, max_size=n-2))
    s = draw(st.lists(st.integers(0, 6), min_size=n, max_size=n))
    w = [1., 1.]+draw(st.lists(st.sampled_from([0., .5, 1., 3.]), min_size=n-2, max_size=n-2))
    return np.array(y), np.array(s)/6, np.array(w)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(weighted())
def test_areas_equal_sklearn_with_ties_and_weights(case):
    y, s, w = case
    for weight in (None, w):
        assert abs(auroc(y, s, weight)[0]-roc_auc_score(y, s, sample_weight=weight)) < 1e-12
        assert abs(auprc(y, s, weight)[0]-average_precision_score(y, s, sample_weight=weight)) < 1e-12


@settings(max_examples=60, deadline=None, derandomize=True)
@given(weighted())
def test_every_metric_equals_sklearn(case):
    y, s, _ = case; hit = s >= .5
    v = {m: x[0, 0] for m, x in metric_draws(y[:, None], s[:, None], [.5], units_of(len(y))).items()}
    ref = dict(accuracy=accuracy_score(y, hit), balanced_accuracy=balanced_accuracy_score(y, hit), sensitivity=recall_score(y, hit),
               specificity=recall_score(y, hit, pos_label=0), f1=f1_score(y, hit), brier=brier_score_loss(y, s),
               selection_rate=hit.mean(), fpr=1-recall_score(y, hit, pos_label=0), fnr=1-recall_score(y, hit))
    ref |= dict(ppv=precision_score(y, hit) if hit.any() else np.nan, npv=precision_score(y, hit, pos_label=0) if (~hit).any() else np.nan)
    for m, r in ref.items(): np.testing.assert_allclose(v[m], r, atol=1e-12, err_msg=m)
    assert set(v) == set(METRICS) and set(ref) | {'auroc', 'auprc'} == set(METRICS)


def test_left_out_units_are_the_metric_without_them():
    rng = np.random.default_rng(0); n = 60
    y = rng.integers(0, 2, (n, 2))*1.; s = rng.random((n, 2)); u = units_of(n, rng.integers(0, 20, n))
    left = metric_left_out(y, s, [.5, .5], u)
    for j in (0, 7, u.m-1):
        k = u.codes != j; ref = metric_draws(y[k], s[k], [.5, .5], units_of(k.sum()))
        for m in METRICS: np.testing.assert_allclose(left[m][j], ref[m][0], atol=1e-6, err_msg=m)


def test_groups_of_units_keep_the_acceleration():
    "Sums of cubes over squares, units against groups of five: 2,000 exponential values, standard error of the ratio about a quarter"
    x = np.random.default_rng(0).exponential(size=2000)

    def acc(most):
        f = influence_of(np.concatenate([(x@w)/w.sum(0) for w in left_out(2000, most)]))
        return (f**3).sum()/(6*(f**2).sum()**1.5)
    assert acc(400) == pytest.approx(acc(2000), rel=.5) and acc(2000) == pytest.approx(2/6/2000**.5, rel=.3)


def test_table_with_bca():
    p = fake_predictions(300, ('a', 'b')); kw = dict(intervals='all', n_boot=400)
    a, b = metrics_table(p, **kw), metrics_table(p, method='bca', **kw)
    for m in METRICS:
        assert (b[f'{m}_lo'] < b[m]).all() and (b[m] < b[f'{m}_hi']).all(), m
        width = a[f'{m}_hi']-a[f'{m}_lo']
        assert ((b[f'{m}_lo']-a[f'{m}_lo']).abs() < .35*width).all(), m
    s = scores_of(p); one = auroc_ci(s.y, s.score, patient=s.df.patient_id, n_boot=400, method='bca')
    np.testing.assert_allclose(b.auroc_lo[:2], [i.lo for i in one], atol=.005)
    with pytest.raises(ConfigError, match="'percentile' or 'bca'"): metrics_table(p, method='t')
    with pytest.raises(ConfigError, match="'percentile' or 'bca'"): paired_test(s.y, s.score, s.score, patient=None, method='basic')


def test_bca_of_more_units_than_columns():
    p = fake_predictions(3500, ('a',), images_per_patient=1)
    t = metrics_table(p, method='bca', intervals=('auroc', 'f1'), n_boot=100)
    assert t.n_patients[0] > 1000 and (t.f1_lo < t.f1).all() and (t.f1 < t.f1_hi).all()


@pytest.mark.parametrize('rule,want', [('sensitivity=0.8', .8), ('sensitivity', .9)])
def test_rules_with_numbers(rule, want):
    p = fake_predictions(200); v = scores_of(p, split='valid')
    assert choose_thresholds(p, rule).threshold.tolist() == sensitivity_threshold(v.y, v.score, want).tolist()
    assert (metrics_table(p, threshold=rule, intervals=()).rule == rule).all()


@pytest.mark.parametrize('rule,why', [('best', 'none of'), ('youden=1', 'none of'), ('rate=x', 'not a number'), ('sensitivity=90', 'in \\(0,1\\]')])
def test_rules_that_do_not_exist(rule, why):
    with pytest.raises(ConfigError, match=why): choose_thresholds(fake_predictions(60), rule)


def test_means_leave_out_what_is_missing():
    v = np.array([[.2, np.nan, .8], [np.nan]*3])
    np.testing.assert_allclose(mean_over_labels(v, np.array([1, 5, 3])), [.65, np.nan])


# ---------------------------------------------------------------- several classes

def graded(n=300, k=4, seed=0, drop=None):
    rng = np.random.default_rng(seed); g = rng.integers(0, k, n)
    z = rng.normal(size=(n, k))-np.abs(np.arange(k)-g[:, None]); prob = np.exp(z)/np.exp(z).sum(1, keepdims=True)
    df = pd.DataFrame(dict(image_id=[f'i{j}' for j in range(n)], patient_id=[f'p{j//2}' for j in range(n)], split=np.where(np.arange(n) < 100, 'valid', 'test'),
                           sex=rng.choice(['F', 'M'], n), age=50., view=None, device=None, model='m', run='r', y_dr=g.astype(float)))
    for c in range(k): df[f'score_dr_{c}'] = prob[:, c]
    return Predictions(df, ('dr',), 'multiclass')


def test_multiclass_equals_sklearn():
    p = graded(); t = class_metrics_table(p, n_boot=50).set_index('metric').value
    d = p.df[p.df.split == 'test']; prob = d[[f'score_dr_{c}' for c in range(4)]].to_numpy(); pred = prob.argmax(1)
    ref = dict(accuracy=accuracy_score(d.y_dr, pred), macro_recall=balanced_accuracy_score(d.y_dr, pred), macro_f1=f1_score(d.y_dr, pred, average='macro'),
               kappa=cohen_kappa_score(d.y_dr, pred), kappa_quadratic=cohen_kappa_score(d.y_dr, pred, weights='quadratic'),
               macro_auroc=roc_auc_score(d.y_dr, prob, multi_class='ovr'))
    for m, r in ref.items(): assert t[m] == pytest.approx(r, abs=1e-12), m
    whole = metrics_table(p, n_boot=50).set_index('label')
    assert whole.index.tolist() == ['dr=0', 'dr=1', 'dr=2', 'dr=3', 'macro', 'weighted']
    assert whole.auroc['macro'] == pytest.approx(ref['macro_auroc'], abs=1e-12)
    assert whole.auroc['weighted'] == pytest.approx(roc_auc_score(d.y_dr, prob, multi_class='ovr', average='weighted'), abs=1e-12)


def test_multiclass_with_unknown_grades():
    p = graded(); df = p.df.copy(); df.loc[df.index[::5], 'y_dr'] = np.nan
    q = Predictions(df, p.labels, p.task); t = class_metrics_table(q, n_boot=20).set_index('metric')
    d = df[(df.split == 'test') & df.y_dr.notna()]; pred = d[[f'score_dr_{c}' for c in range(4)]].to_numpy().argmax(1)
    assert t.value['accuracy'] == pytest.approx((pred == d.y_dr).mean()) and t.n['accuracy'] == len(d)


def test_multiclass_that_lacks_something():
    p = graded(); kept = Predictions(p.df[p.df.y_dr < 3], p.labels, p.task)
    t = class_metrics_table(kept, n_boot=20).set_index('metric')
    assert np.isnan(t.value['macro_f1']) or t.note['macro_recall'] == 'no image of class 3'
    assert np.isnan(t.value['macro_recall']) and np.isfinite(t.value['kappa_quadratic'])
    with pytest.raises(DataError, match='choose one with target'): class_scores(fake_predictions(60))
    with pytest.raises(DataError, match='one score column'): class_scores(fake_predictions(60), target='effusion')
    with pytest.raises(ConfigError, match='unit is'): class_metrics_table(p, unit='eye')


def test_a_target_whose_name_begins_like_another():
    p = graded(); df = p.df.rename(columns={f'score_dr_{c}': f'score_dr_macula_{c}' for c in range(4)}).rename(columns=dict(y_dr='y_dr_macula'))
    for c in ('0', '1'): df[f'score_dr_{c}'] = .5
    df['y_dr'] = 0.
    s = scores_of(Predictions(df, ('dr', 'dr_macula'), 'multiclass'))
    assert s.labels == ('dr=0', 'dr=1', *(f'dr_macula={c}' for c in range(4)))


def test_areas_refuse_weights_that_do_not_fit():
    with pytest.raises(DataError, match='weight needs'): areas([0, 1], [.1, .2], weight=[1.])
