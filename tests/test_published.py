"The published evaluation: equal to a literal loop in its style, flattering, and under its own names"
import numpy as np, pytest
from sklearn.metrics import multilabel_confusion_matrix, roc_auc_score, roc_curve

from medprivacy.evaluate import metrics_table, one_sided_ratio, paired_test, scores_of
from medprivacy.published import RESAMPLE_METRICS, published_ratio, published_table, youden_on_every_resample
from medprivacy.rank import fake_predictions
from medprivacy.resample import resample_counts, units_of


def literal(y, s, idx, strict):
    "One resample as the published code judges it, zero-size denominators aside"
    t = []
    for l in range(y.shape[1]):
        fpr, tpr, thr = roc_curve(y[idx, l], s[idx, l], pos_label=1); t.append(thr[np.argmax(tpr-fpr)])
    m = multilabel_confusion_matrix(y[idx], s[idx] > t if strict else s[idx] >= t).astype(float)
    tn, fp, fn, tp = m[:, 0, 0], m[:, 0, 1], m[:, 1, 0], m[:, 1, 1]
    return dict(auroc=roc_auc_score(y[idx], s[idx], average=None), accuracy=(tp+tn)/len(idx), specificity=tn/(tn+fp),
                sensitivity=tp/(tp+fn), f1=2*tp/(2*tp+fn+fp))


@pytest.mark.parametrize('decimals', [0, 1, 9])
@pytest.mark.parametrize('strict', [True, False])
@pytest.mark.parametrize('seed', range(4))
def test_equals_the_published_loop(seed, strict, decimals):
    rng = np.random.default_rng(seed); n = 90; pid = np.arange(n)//(1+seed % 3)
    y = (rng.random((n, 3)) < .4)*1.; s = (rng.normal(size=(n, 3))+.7*y).round(decimals)
    u = units_of(n, pid); counts = next(resample_counts(u.m, 40, seed))[u.codes].astype(int)
    got = youden_on_every_resample(y, s, 40, pid, seed, strict)
    for b in range(40):
        for m, r in literal(y, s, np.repeat(np.arange(n), counts[:, b]), strict).items():
            np.testing.assert_allclose(got[m][b], r, atol=1e-12, err_msg=m)


def test_float32_would_pick_the_other_side():
    "Two thresholds with the same J in float32 but not in float64: 1/3-0 and 2/3-1/3 round alike"
    y = np.r_[np.ones(3), np.zeros(3)]; s = np.array([6., 4, 1, 5, 3, 2])      # from the top: + - + - - +
    got = youden_on_every_resample(y, s, 200, None, 0, False)
    u = units_of(6); counts = np.concatenate(list(resample_counts(6, 200)), 1).astype(int)
    for b in range(200):
        idx = np.repeat(np.arange(6), counts[:, b])
        if len(np.unique(y[idx])) < 2: assert np.isnan(got['f1'][b, 0]); continue
        fpr, tpr, thr = roc_curve(y[idx], s[idx]); hit = s[idx] >= thr[np.argmax(tpr-fpr)]
        assert got['sensitivity'][b, 0] == hit[y[idx] == 1].mean() and got['specificity'][b, 0] == (~hit[y[idx] == 0]).mean()


def test_noise_looks_better_than_it_is():
    p = fake_predictions(400, ('x',), auroc=.5, images_per_patient=1)
    assert published_table(p, n_boot=100).balanced_accuracy[0] > .52
    assert set(published_table(p, n_boot=5).rule) == {'youden_on_every_resample'}


def test_nothing_to_go_by():
    got = youden_on_every_resample(np.array([[1, 0], [1, 1], [np.nan, 0]]), np.array([[.1, .2], [.3, .4], [.5, .6]]), 20)
    assert set(got) == set(RESAMPLE_METRICS) and all(np.isnan(v[:, 0]).all() for v in got.values())
    assert np.isnan(youden_on_every_resample([], [], 3)['auroc']).all()
    flat = youden_on_every_resample([0, 1, 0, 1], [.5]*4, 10)
    seen = ~np.isnan(flat['auroc'][:, 0]); assert (flat['auroc'][seen] == .5).all() and (flat['sensitivity'][seen] == 0).all()


def test_ratio_has_its_own_name():
    p = fake_predictions(200); s = scores_of(p); b = s.score+.3*np.random.default_rng(0).normal(size=s.score.shape)
    r = published_ratio(s.y, s.score, b, n_boot=300)
    t = paired_test(s.y, s.score, b, patient=None, n_boot=300)
    np.testing.assert_array_equal(r['per_label'], t.one_sided_ratio)
    assert ((t.one_sided_ratio <= .5) == (t.difference >= 0)).all() and 0 <= r['mean'] <= 1
    assert one_sided_ratio([np.nan]) != one_sided_ratio([np.nan]) and one_sided_ratio([-1., 0, 1, np.nan]) == pytest.approx(2/3)


def test_validation_thresholds_stay_the_default():
    assert set(metrics_table(fake_predictions(80), intervals=()).rule) == {'youden'}
