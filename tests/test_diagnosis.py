"False 'no finding', false findings and worst groups: against counts by hand, planted differences, and groups without patients"
import numpy as np, pandas as pd, pytest
from fairlearn.metrics import MetricFrame, false_negative_rate, false_positive_rate

from medprivacy.core import ConfigError, DataError
from medprivacy.data.core import Predictions
from medprivacy.diagnosis import diagnosis_rates, health_calls, worst_groups
from medprivacy.fairness import by_group
from medprivacy.rank import fake_predictions


def test_by_hand():
    y = np.array([[1, 0], [0, 0], [0, 1], [0, np.nan], [1, np.nan]]); s = np.array([[.1, .1], [.1, .1], [.9, .1], [.1, .1], [.9, .9]])
    sick, healthy = health_calls(y, s, [.5, .5])
    np.testing.assert_array_equal(sick, [1, 0, 1, np.nan, 1]); np.testing.assert_array_equal(healthy, [1, 1, 0, 1, 0])
    own, said = health_calls(y, s, [.5, .5], 1); np.testing.assert_array_equal(own[:3], [1, 1, 0]); np.testing.assert_array_equal(said, s[:, 1] >= .5)


@pytest.mark.parametrize('seed', range(5))
def test_equals_fairlearn_for_one_made_label(seed):
    p = fake_predictions(150, ('a', 'b'), seed=seed); d = p.df[p.df.split == 'test']
    sick = (d[['y_a', 'y_b']] == 1).any(axis=1); said = (d[['score_a', 'score_b']] >= .4).any(axis=1)
    mf = MetricFrame(metrics=dict(false_no_finding=false_negative_rate, false_finding=false_positive_rate), y_true=sick, y_pred=said, sensitive_features=d.sex)
    t = diagnosis_rates(p, 'sex', threshold=.4, min_size=1, n_boot=5)
    for rate in ('false_no_finding', 'false_finding'):
        r = t[t.rate == rate].set_index('group').value
        np.testing.assert_allclose(r[mf.by_group.index].to_numpy(), mf.by_group[rate].to_numpy(float), atol=1e-12)
        assert r['all'] == pytest.approx(mf.overall[rate], abs=1e-12)


def test_label_of_its_own():
    p = fake_predictions(200, ('nf', 'b')); t = diagnosis_rates(p, ('sex', 'view', ('sex', 'view')), no_finding='nf', n_boot=50).set_index(['by', 'group', 'rate'])
    ref = by_group(p, 'sex', n_boot=5).query("label == 'nf'").set_index('group')
    assert t.value['sex', 'F', 'false_no_finding'] == pytest.approx(ref.fpr['F']) and t.value['sex', 'M', 'false_finding'] == pytest.approx(ref.fnr['M'])
    assert ('sex × view', 'F × PA', 'false_finding') in t.index and ((t.lo <= t.value) & (t.value <= t.hi)).all()


def test_undecided_images_are_counted():
    p = fake_predictions(200, ('a', 'b')); df = p.df.copy(); df.loc[df.y_b == 0, 'y_b'] = np.nan
    t = diagnosis_rates(Predictions(df, p.labels), 'sex', threshold=.5, n_boot=5).query("by == 'all'").set_index('rate')
    d = df[df.split == 'test']
    assert t.undecided.iloc[0] == (d.y_b.isna() & (d.y_a == 0)).sum() and np.isnan(t.value['false_finding']) and 'only 0 patients' in t.note['false_finding']


def test_the_planted_group_is_worst():
    p = fake_predictions(900, ('x',), auroc=.85, bias={'F': -.2})
    for metric in ('auroc', 'accuracy', 'tpr', 'fnr', 'fpr'):
        w = worst_groups(p, 'sex', metric, n_boot=200).iloc[0]
        ref = by_group(p, 'sex', n_boot=5).query("by == 'sex'").set_index('group')[metric]
        assert w.value == pytest.approx(ref.max() if metric in ('fnr', 'fpr') else ref.min()) and w.worst == (ref.idxmax() if metric in ('fnr', 'fpr') else ref.idxmin())
    a = worst_groups(p, 'sex', n_boot=200).iloc[0]; assert a.worst == 'F' and a.stable > .95 and a.floor <= a.value


def test_equal_groups_are_not_stable():
    p = fake_predictions(600, ('x',)); df = p.df.copy(); df['device'] = np.random.default_rng(0).permutation(df.patient_id.factorize()[0] % 6).astype(str)
    w = worst_groups(Predictions(df, ['x']), 'device', n_boot=300).iloc[0]; assert w.n_groups == 6 and w.stable < .9 and w.floor < w.value


def test_nothing_to_go_by():
    p = fake_predictions(200, ('x',)); df = p.df.assign(y_x=p.df.y_x.where(p.df.sex == 'M', 0.)); q = Predictions(df, ['x'])
    assert worst_groups(q, 'sex', n_boot=20).iloc[0][['worst', 'n_groups']].tolist() == ['M', 1]
    t = diagnosis_rates(q, 'sex', n_boot=5).set_index(['group', 'rate']); assert np.isnan(t.value['F', 'false_no_finding']) and np.isfinite(t.value['F', 'false_finding'])
    one = Predictions(p.df[p.df.split == 'test'].assign(patient_id='a'), ['x'])
    assert worst_groups(one, 'sex', threshold=.5, n_boot=5).note[0] == 'no group can be judged'
    assert diagnosis_rates(one, 'sex', threshold=.5, n_boot=5).value.isna().all()
    unknown = Predictions(p.df.assign(sex=None), ['x'])
    assert worst_groups(unknown, 'sex', n_boot=5).n_groups[0] == 0 and set(diagnosis_rates(unknown, 'sex', n_boot=5).group) == {'all', 'unknown'}


def test_wrong_settings():
    p = fake_predictions(60)
    with pytest.raises(DataError, match="no label 'No Finding'"): diagnosis_rates(p, no_finding='No Finding')
    with pytest.raises(ConfigError, match='has no worst'): worst_groups(p, metric='selection_rate')
    with pytest.raises(ConfigError, match='unit is'): diagnosis_rates(p, unit='eye')
    with pytest.raises(DataError, match="no column 'ward'"): worst_groups(p, 'ward')
    with pytest.raises(DataError, match='have no threshold'): health_calls(np.zeros((2, 1)), np.zeros((2, 1)), [np.nan])
