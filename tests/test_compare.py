"DeLong against its definition and the bootstrap, and tables that do not belong together"
import numpy as np, pandas as pd, pytest
from scipy.stats import binom

from medprivacy.compare import delong_test, matched_scores, paired_metrics, paired_table
from medprivacy.core import ConfigError, DataError
from medprivacy.data.core import Predictions
from medprivacy.evaluate import bootstrap_auroc, paired_test, scores_of
from medprivacy.rank import fake_predictions


def by_definition(y, a, b):
    "DeLong, DeLong and Clarke-Pearson 1988 with the full matrix of pairs"
    pa, pb = ((s[y == 1][:, None] > s[y == 0])+.5*(s[y == 1][:, None] == s[y == 0]) for s in (a, b))
    v = np.cov(pa.mean(1), pb.mean(1))/(y == 1).sum()+np.cov(pa.mean(0), pb.mean(0))/(y == 0).sum()
    return (v[0, 0]+v[1, 1]-2*v[0, 1])**.5


@pytest.mark.parametrize('seed', range(10))
def test_delong_equals_its_definition(seed):
    rng = np.random.default_rng(seed); y = rng.integers(0, 2, 80)*1.
    a, b = (rng.normal(size=80).round(1)+y for _ in range(2))
    t = delong_test(y, a, b, patient=None).iloc[0]
    assert t.se == pytest.approx(by_definition(y, a, b), abs=1e-12)
    back = delong_test(y, b, a, patient=None).iloc[0]
    assert back.p == pytest.approx(t.p) and back.lo == pytest.approx(-t.hi)


def test_clustered_delong_agrees_with_the_patient_bootstrap():
    "400 patients: the standard deviation of 1,000 draws has a standard error of 2.2 %, the approximations differ by a few more"
    p = fake_predictions(1000, ('x',), images_per_patient=4, share=.9); s = scores_of(p)
    b = np.random.default_rng(0).normal(size=s.y.shape)
    se = delong_test(s.y, s.score, b, patient=s.df.patient_id)[['se_a', 'se_b']].iloc[0]
    sd = [bootstrap_auroc(s.y, v, 1000, s.df.patient_id).std() for v in (s.score, b)]
    assert np.allclose(se, sd, rtol=.1)
    assert delong_test(s.y, s.score, b, patient=None).se_a[0] < .75*se['se_a']      # images are not independent


def test_delong_p_values():
    low = 0
    for r in range(200):
        rng = np.random.default_rng([5, r]); y = rng.integers(0, 2, 150)*1.; z = rng.normal(size=150)+y
        low += delong_test(y, z+.5*rng.normal(size=150), z+.5*rng.normal(size=150), patient=None).p[0] < .05
    assert binom.ppf(.0005, 200, .05) <= low <= binom.ppf(.9995, 200, .05)


def test_tables_in_any_order():
    a, b = (fake_predictions(120, noise_seed=k, auroc=q) for k, q in ((1, .9), (2, .7)))
    t = paired_table(a, Predictions(b.df.sample(frac=1, random_state=1), b.labels), n_boot=100)
    s, r = scores_of(a), scores_of(b)
    ref = paired_test(s.y, s.score, r.score, patient=s.df.patient_id, n_boot=100, labels=list(s.labels))
    pd.testing.assert_frame_equal(t, ref)
    assert paired_table(a, b, unit='image', n_boot=20).unit.unique().tolist() == ['image']


def test_tables_that_do_not_match():
    a = fake_predictions(100); k = a.df.index[a.df.split == 'test'][0]
    with pytest.raises(DataError, match='1 image ids'): paired_table(a, Predictions(a.df.drop(k), a.labels))
    df = a.df.copy(); df.loc[k, 'y_effusion'] = np.nan
    with pytest.raises(DataError, match='labels of 1 images differ'): paired_table(a, Predictions(df, a.labels))
    with pytest.raises(DataError, match='targets differ'): paired_table(a, Predictions(a.df, ['effusion']))


@pytest.mark.parametrize('y', [[1., 1.], [np.nan, np.nan]])
def test_one_class(y):
    t = delong_test(y, [.1, .2], [.2, .1], patient=[1, 2]).iloc[0]
    assert np.isnan([t.p, t.se, t.lo]).all() and t.note


def test_one_patient():
    t = delong_test([0, 1, 1], [.1, .2, .05], [.1, .2, .3], patient=['a']*3).iloc[0]
    assert np.isnan(t.se) and np.isnan(t.p)


def test_targets_in_another_order_and_wrong_patients():
    a, b = fake_predictions(100, noise_seed=1), fake_predictions(100, noise_seed=2); turned = Predictions(b.df, b.labels[::-1])
    pd.testing.assert_frame_equal(paired_table(a, turned, n_boot=30), paired_table(a, b, n_boot=30))
    k = b.df.index[b.df.split == 'test'][0]; df = b.df.copy(); df.loc[k, 'patient_id'] = 'somebody'
    with pytest.raises(DataError, match='patients of 1 images differ'): matched_scores(a, Predictions(df, b.labels))


def test_unknown_labels_in_both_tables_are_no_difference():
    a, b = fake_predictions(100, noise_seed=1), fake_predictions(100, noise_seed=2)
    a, b = (Predictions(p.df.assign(y_effusion=p.df.y_effusion.where(np.arange(len(p.df)) % 3 > 0)), p.labels) for p in (a, b))
    assert paired_table(a, b, n_boot=20).n[0] < paired_table(a, b, n_boot=20).n[1]+1
    df = b.df.copy(); k = df.index[(df.split == 'test') & df.y_effusion.notna()][0]; df.loc[k, 'y_effusion'] = 1-df.y_effusion[k]
    with pytest.raises(DataError, match='labels of 1 images differ'): paired_table(a, Predictions(df, b.labels))


def test_any_metric_at_its_own_thresholds():
    from medprivacy.evaluate import metrics_table
    a, b = (fake_predictions(200, noise_seed=k, auroc=q, model=m) for k, q, m in ((1, .9, 'a'), (2, .7, 'b')))
    t = paired_metrics(a, b, ('auroc', 'f1', 'npv'), n_boot=200).set_index(['metric', 'label'])
    ta, tb = (metrics_table(p, intervals=()).set_index('label') for p in (a, b))
    for m in ('auroc', 'f1', 'npv'):
        for l in ('effusion', 'cardiomegaly', 'macro'):
            assert (t.a[m, l], t.b[m, l]) == (pytest.approx(ta[m][l]), pytest.approx(tb[m][l])) and t.lo[m, l] < t.difference[m, l] < t.hi[m, l]
    assert np.isnan(t.p_holm['f1', 'macro']) and (t.p_holm.drop('macro', level='label') >= t.p.drop('macro', level='label')).all()
    with pytest.raises(ConfigError, match='no metric'): paired_metrics(a, b, ('auc',))


def test_paired_metrics_of_a_label_without_positives():
    a, b = (fake_predictions(100, noise_seed=k) for k in (1, 2)); a, b = (Predictions(p.df.assign(y_effusion=0.), p.labels) for p in (a, b))
    t = paired_metrics(a, b, ('auroc', 'specificity'), threshold=.5, n_boot=30).set_index(['metric', 'label'])
    assert np.isnan(t.p['auroc', 'effusion']) and t.note['auroc', 'effusion'].startswith('only negatives') and np.isfinite(t.p['specificity', 'effusion'])
    assert t.difference['auroc', 'macro'] == pytest.approx(t.difference['auroc', 'cardiomegaly'])


def test_bca_of_a_difference():
    a, b = (fake_predictions(200, noise_seed=k, auroc=.85) for k in (1, 2))
    p, q = (paired_table(a, b, n_boot=400, method=m) for m in ('percentile', 'bca'))
    assert (p.p == q.p).all() and (p.lo != q.lo).all() and np.allclose(p.lo, q.lo, atol=.02) and np.allclose(p.hi, q.hi, atol=.02)


def test_constant_scores_of_either_model_are_named():
    p = fake_predictions(60, ('x',)); flat = Predictions(p.df.assign(score_x=.5), ['x'])
    for t in (paired_table(p, flat, n_boot=20), paired_table(flat, p, n_boot=20)): assert 'all scores are equal' in t.note[0]
