"Calibration: equal to scikit-learn and torchmetrics, unbiased where it says so, intervals that cover, scores that are no probabilities"
import numpy as np, pandas as pd, pytest, torch
from scipy.stats import binom
from sklearn.calibration import calibration_curve as sk_curve
from torchmetrics.classification import BinaryCalibrationError

from medprivacy.calibration import calibration_curve, calibration_error, calibration_table, score_bins
from medprivacy.core import ConfigError, DataError
from medprivacy.data.core import Predictions
from medprivacy.rank import fake_predictions


def drawn(n=400, k=2, seed=0, power=1., share=.7):
    "Scores that are right for power=1; images of a patient share most of what makes them differ"
    rng = np.random.default_rng(seed); m = n//k; pid = np.repeat(np.arange(m), k)
    z = share**.5*rng.normal(size=m)[pid]+(1-share)**.5*rng.normal(size=n)
    p = 1/(1+np.exp(-1.5*z))
    return (rng.random(n) < p)*1., 1/(1+np.exp(-1.5*power*z)), pid


@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('strategy,theirs', [('width', 'uniform'), ('mass', 'quantile')])
@pytest.mark.parametrize('decimals', [1, 9])
def test_curve_equals_sklearn(seed, strategy, theirs, decimals):
    y, s, pid = drawn(seed=seed); s = s.round(decimals)
    true, mean = sk_curve(y, s, n_bins=8, strategy=theirs)
    t = calibration_curve(y, s, patient=pid, bins=8, strategy=strategy, n_boot=5)
    np.testing.assert_allclose(t.observed, true, atol=1e-12); np.testing.assert_allclose(t.score, mean, atol=1e-12)
    assert t.n.sum() == 400 and (t.n_units <= t.n).all()


@pytest.mark.parametrize('norm', ['l1', 'l2', 'max'])
def test_error_equals_torchmetrics(norm):
    y, s, _ = drawn(power=2.)
    ref = BinaryCalibrationError(n_bins=10, norm=norm)(torch.tensor(s), torch.tensor(y).int()).item()
    assert calibration_error(y, s, bins=10, strategy='width', norm=norm)[0] == pytest.approx(ref, abs=1e-6)


def test_debiased_square_is_unbiased_over_patients():
    "200 calibrated samples in which both images of a patient have one label: only the variance over patients removes the bias"
    right, naive = [], []
    for r in range(200):
        y, s, pid = drawn(200, 2, seed=r, share=1.); y = np.repeat(y[::2], 2)
        for out, who in ((right, pid), (naive, None)): out.append(calibration_error(y, s, bins=8, norm='l2', debias=True, patient=who)[0]**2)
    plain = [calibration_error(*drawn(200, 2, seed=r, share=1.)[:2], bins=8, norm='l2')[0]**2 for r in range(50)]
    assert np.mean(right) < .6*np.mean(naive) and np.mean(right) < np.mean(plain)


@pytest.mark.parametrize('k', [1, 2])
def test_bias_interval_covers(k):
    "100 simulations of calibrated scores: the interval of mean score - prevalence holds 0 in a count of the 99.9 % band (86 to 100)"
    hits = 0
    for r in range(100):
        y, s, pid = drawn(240, k, seed=r)
        df = pd.DataFrame(dict(image_id=np.arange(240).astype(str), patient_id=pid.astype(str), split='test', sex=None, age=np.nan, view=None,
                               device=None, model='m', run='r', y_x=y, score_x=s))
        t = calibration_table(Predictions(df, ['x']), n_boot=200, seed=r, bins=5).iloc[0]; hits += t.bias_lo <= 0 <= t.bias_hi
    assert hits >= binom.ppf(.0005, 100, .95)


def test_table_has_means_and_ignores_row_order():
    p = fake_predictions(200); t = calibration_table(p, n_boot=100)
    assert t.label.tolist() == ['effusion', 'cardiomegaly', 'macro', 'weighted']
    for m in ('ece', 'bias', 'rmsce', 'brier', 'ece_chance'):
        assert t[m][2] == pytest.approx(t[m][:2].mean()) and t[m][3] == pytest.approx(np.average(t[m][:2], weights=t.n_pos[:2]))
    mixed = Predictions(p.df.sample(frac=1, random_state=0), p.labels)
    pd.testing.assert_frame_equal(calibration_table(mixed, n_boot=100), t)
    assert ((t.brier_lo < t.brier) & (t.brier < t.brier_hi) & (t.rmsce_lo <= t.rmsce) & (t.rmsce <= t.rmsce_hi)).all()


def test_sharper_scores_are_found_out():
    a, b = (calibration_error(*drawn(4000, 2, power=q)[:2])[0] for q in (1., 3.)); assert b > 2*a


def test_unknown_labels_are_masked():
    y, s, pid = drawn(); t = y.copy(); t[::3] = np.nan; u = s.copy(); u[::3] = np.nan; k = ~np.isnan(t)
    assert calibration_error(t, u)[0] == pytest.approx(calibration_error(y[k], s[k])[0])
    pd.testing.assert_series_equal(calibration_curve(t, u, patient=pid, n_boot=3).observed, calibration_curve(y[k], s[k], patient=pid[k], n_boot=3).observed)


def test_multiclass_is_one_against_rest():
    p = fake_predictions(200, ('x',)); df = p.df.rename(columns=dict(score_x='score_x_1')); df['score_x_0'] = 1-df.score_x_1
    t = calibration_table(Predictions(df, ['x'], 'multiclass'), n_boot=20, strategy='width').set_index('label')
    assert t.bias['x=0'] == pytest.approx(-t.bias['x=1']) and t.brier['x=0'] == pytest.approx(t.brier['x=1'])


# ---------------------------------------------------------------- nothing to go by

def test_one_class_constant_scores_one_patient_no_label():
    assert calibration_error([0, 0, 0], [.2, .2, .2])[0] == pytest.approx(.2)      # exists without a positive
    assert np.isnan(calibration_error([np.nan], [.2])[0]) and np.isnan(calibration_error([], []))[0]
    t = calibration_curve([0, 1, 1], [.2, .7, .7], patient=['a']*3, bins=2); assert t.lo.isna().all() and t.note.str.contains('1 patient|no width').all()
    assert calibration_curve([np.nan], [.1], patient=['a']).empty and calibration_curve([], [], patient=None).empty
    p = fake_predictions(60); one = Predictions(p.df[p.df.split == 'test'].assign(patient_id='a'), p.labels)
    r = calibration_table(one, n_boot=10).iloc[0]; assert np.isfinite(r.ece) and np.isnan(r.brier_lo) and '1 patient' in r.note
    none = calibration_table(Predictions(p.df.assign(y_effusion=np.nan), p.labels), n_boot=10)
    assert none.note[0] == 'no known label' and np.isnan(none.ece[0]) and np.isfinite(none.ece[2])


@pytest.mark.parametrize('kw,why', [(dict(bins=0), 'at least 1'), (dict(strategy='equal'), "'mass' or 'width'"), (dict(norm='l3'), "'l1', 'l2' or 'max'"),
                                    (dict(debias=True), "only norm='l2'")])
def test_wrong_settings(kw, why):
    with pytest.raises(ConfigError, match=why): calibration_error([0, 1], [.1, .9], **kw)


def test_scores_that_are_no_probabilities():
    with pytest.raises(DataError, match='from -2 to 3'): score_bins([-2., 3.])
    with pytest.raises(DataError, match='NaN or infinite'): calibration_error([0, 1], [np.nan, .5])
    with pytest.raises(ConfigError, match='unit is'): calibration_table(fake_predictions(60), unit='eye')
