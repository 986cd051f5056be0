"The strongest attacker: the fold, the choice inside resamples, and tables whose attackers saw different images"
import numpy as np, pandas as pd, pytest
from scipy.stats import binom
from sklearn.metrics import r2_score

from medprivacy.core import DataError
from medprivacy.data.core import Predictions
from medprivacy.evaluate import auroc_ci, bootstrap_auroc
from medprivacy.leakage import age_errors, leakage, leakage_table, panel_of, strongest_leakage
from medprivacy.rank import fake_predictions


def panel(n_pat=120, areas=(.7, .6), target='sex'):
    parts = [fake_predictions(n_pat, (target,), auroc=a, model=f'm{k}', noise_seed=k).df for k, a in enumerate(areas)]
    return Predictions(pd.concat(parts, ignore_index=True), [target])


@pytest.mark.parametrize('a', [.1, .3, .5, .9])
def test_fold(a):
    y = np.repeat([0., 1.], 500); s = np.r_[np.linspace(0, 1, 500), np.linspace(0, 1, 500)+(a-.5)]
    assert leakage(y, s)[0] == pytest.approx(leakage(y, -s)[0]) == pytest.approx(leakage(1-y, s)[0]) and leakage(y, s)[0] >= .5


def test_maximum_is_taken_in_every_resample():
    rng = np.random.default_rng(0); y = rng.integers(0, 2, 300)*1.; pid = np.arange(300)//3
    s = rng.normal(size=(300, 3))+y[:, None]*[.8, .7, -.75]
    i = strongest_leakage(y, s, patient=pid, n_boot=400, seed=3)
    d = bootstrap_auroc(np.repeat(y[:, None], 3, 1), s, 400, pid, 3); best = np.maximum(d, 1-d).max(1)
    assert i.value == leakage(np.repeat(y[:, None], 3, 1), s).max()
    assert i.hi == pytest.approx(np.quantile(best, .975)) and i.lo == pytest.approx(min(i.value, np.quantile(best, .025)))
    assert i.n == 100 and i.unit == 'patient'
    alone = auroc_ci(y, s[:, 0], patient=pid, n_boot=400, seed=3)
    assert i.hi >= alone.hi


def test_dict_and_matrix_agree():
    rng = np.random.default_rng(1); y = rng.integers(0, 2, 80)*1.; s = rng.normal(size=(80, 2))
    assert strongest_leakage(y, dict(a=s[:, 0], b=s[:, 1]), patient=None, n_boot=50) == strongest_leakage(y, s, patient=None, n_boot=50)


def test_blind_attackers():
    "60 panels of five: 0.5 left out more than 9 times has a chance under 1e-3 if intervals are honest"
    out = 0
    for r in range(60):
        rng = np.random.default_rng([11, r]); y = rng.integers(0, 2, 100)*1.
        i = strongest_leakage(y, rng.normal(size=(100, 5)), patient=None, n_boot=200)
        assert i.lo <= i.value <= i.hi
        out += .5 not in i
    assert out <= binom.ppf(.999, 60, .05)


def test_table():
    p = panel(areas=(.7, .35)); t = leakage_table(p, n_boot=100)
    assert t.model.tolist() == ['m0', 'm1', 'strongest'] and (t.target == 'sex').all() and (t.n_patients <= 120).all()
    assert t.leakage[2] == t.leakage[:2].max() and t.auroc[1] < .5 < t.leakage[1]
    assert leakage_table(p, unit='image', n_boot=20).unit.unique().tolist() == ['image']
    assert set(leakage_table(p, split='valid', n_boot=20).n) == {int((p.df[p.df.model == 'm0'].split == 'valid').sum())}


def test_one_attacker_is_its_own_strongest():
    t = leakage_table(panel(areas=(.75,)), n_boot=100)
    assert (t.iloc[0][['leakage', 'lo', 'hi']] == t.iloc[1][['leakage', 'lo', 'hi']]).all()


def test_age_above_its_median_is_a_target():
    t = leakage_table(panel(target='age>median'), n_boot=50)
    assert (t.target == 'age>median').all() and t.leakage.notna().all()


def test_different_images():
    p = panel(); k = p.df.index[(p.df.model == 'm1') & (p.df.split == 'test')]
    with pytest.raises(DataError, match="1 image ids differ between 'm0' and 'm1'"): leakage_table(Predictions(p.df.drop(k[0]), p.labels))
    df = p.df.copy(); df.loc[k[0], 'y_sex'] = 1-df.loc[k[0], 'y_sex']
    with pytest.raises(DataError, match='of the same image differs'): panel_of(Predictions(df, p.labels), 'sex')
    with pytest.raises(DataError, match='occur twice'): leakage_table(Predictions(pd.concat([p.df, p.df]), p.labels))


def test_one_class():
    p = panel(); t = leakage_table(Predictions(p.df.assign(y_sex=1.), p.labels), n_boot=20)
    assert t.leakage.isna().all() and (t.note == 'only one class is known').all()


def test_wrong_input():
    with pytest.raises(DataError, match='2 labels, but scores'): strongest_leakage([0, 1], np.zeros((3, 2)), patient=None)
    with pytest.raises(DataError, match='NaN or infinite'): strongest_leakage([0, 1], [[.1], [np.nan]], patient=None)


def test_age_errors():
    rng = np.random.default_rng(0); age = rng.uniform(20, 90, 300); guess = age+rng.normal(scale=8, size=300); age[::10] = np.nan
    e = age_errors(age, guess, patient=np.arange(300)//2, n_boot=300); k = ~np.isnan(age)
    assert e['mae'].value == pytest.approx(np.abs(age-guess)[k].mean()) and e['r2'].value == pytest.approx(r2_score(age[k], guess[k]))
    assert e['mae'].value in e['mae'] and e['r2'].value in e['r2'] and e['mae'].n == 150
    assert np.isnan(age_errors([np.nan, 50], [40, 50], patient=[1, 2])['mae'].value)
    same = age_errors([50., 50., 50.], [40., 50., 60.], patient=[1, 2, 3])
    assert np.isnan(same['r2'].value) and same['r2'].note == 'all ages are equal' and same['mae'].value == pytest.approx(20/3)
