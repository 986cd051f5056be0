"Equality with fairlearn on random tables, planted and absent gaps, and groups that carry no information"
import numpy as np, pandas as pd, pytest
from fairlearn.metrics import (MetricFrame, count, demographic_parity_difference, equalized_odds_difference, false_negative_rate,
                               false_positive_rate, selection_rate, true_positive_rate)
from hypothesis import given, settings, strategies as st
from scipy.stats import binom
from sklearn.metrics import accuracy_score, roc_auc_score

from medprivacy.core import ConfigError, DataError
from medprivacy.data.core import Predictions
from medprivacy.fairness import AGE_BANDS, GAPS, against_rest, age_band, by_group, gaps, groups_of
from medprivacy.rank import fake_predictions

FNS = dict(accuracy=accuracy_score, tpr=true_positive_rate, fpr=false_positive_rate, fnr=false_negative_rate, selection_rate=selection_rate)


def table(seed, n=150, groups=3):
    "A random table with ties, in which every group has both classes"
    rng = np.random.default_rng(seed)
    df = pd.DataFrame(dict(image_id=[f'i{k}' for k in range(n)], patient_id=[f'p{k//2}' for k in range(n)], split='test', age=np.nan,
                           sex=None, view=rng.choice([f'v{k}' for k in range(groups)], n), device=None, model='m', run='r',
                           y_x=rng.integers(0, 2, n)*1., score_x=rng.random(n).round(2)))
    return Predictions(df, ['x'])


@pytest.mark.parametrize('seed', range(15))
def test_equals_fairlearn(seed):
    p = table(seed, groups=2+seed % 4); d = p.df; hit = d.score_x >= .5
    kw = dict(y_true=d.y_x, y_pred=hit, sensitive_features=d['view'])
    mf = MetricFrame(metrics=FNS | dict(n=count), **kw)
    t = by_group(p, 'view', threshold=.5, min_size=1, n_boot=5).query("by == 'view'").set_index('group')
    for m in [*FNS, 'n']: np.testing.assert_allclose(t[m], mf.by_group[m].loc[t.index].astype(float), atol=1e-12)
    for g, r in t.iterrows():
        k = d['view'] == g
        assert r.auroc == pytest.approx(roc_auc_score(d.y_x[k], d.score_x[k]), abs=1e-12) and r.prevalence == d.y_x[k].mean()
    q = gaps(p, 'view', threshold=.5, min_size=1, n_boot=5).set_index('gap').value
    assert q['selection_rate_parity'] == pytest.approx(demographic_parity_difference(**kw), abs=1e-12)
    assert q['equalised_odds'] == pytest.approx(equalized_odds_difference(**kw), abs=1e-12)
    assert q['underdiagnosis'] == pytest.approx(mf.difference()['fnr'], abs=1e-12)
    assert q['overdiagnosis'] == pytest.approx(mf.difference()['fpr'], abs=1e-12)
    assert q['accuracy_gap'] == pytest.approx(mf.difference()['accuracy'], abs=1e-12)


@st.composite
def any_table(draw):
    "A random table: one to four groups of any size, some without a class, scores with ties"
    n = draw(st.integers(2, 40))
    def col(v): return draw(st.lists(st.sampled_from(v), min_size=n, max_size=n))
    df = pd.DataFrame(dict(image_id=[f'i{k}' for k in range(n)], patient_id=[f'p{k}' for k in range(n)], split='test', age=np.nan, sex=None, view=None,
                           device=col(['a', 'b', 'c', 'd'][:draw(st.integers(1, 4))]), model='m', run='r', y_x=col([0., 1.]), score_x=col([.1, .3, .5, .7, .9])))
    return Predictions(df, ['x'])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(any_table())
def test_any_table_equals_metric_frame(p):
    d = p.df; hit = d.score_x >= .5
    mf = MetricFrame(metrics=dict(n=count, accuracy=accuracy_score, selection_rate=selection_rate), y_true=d.y_x, y_pred=hit, sensitive_features=d.device)
    t = by_group(p, 'device', threshold=.5, min_size=1, n_boot=2).query("by == 'device'").set_index('group')
    for m in ('n', 'accuracy', 'selection_rate'): np.testing.assert_allclose(t[m], mf.by_group[m].loc[t.index].astype(float), atol=1e-12)
    # fairlearn gives 0 for a rate without a denominator; here it is NaN
    for m, cls in dict(tpr=1, fnr=1, fpr=0).items():
        ref = MetricFrame(metrics=FNS[m], y_true=d.y_x, y_pred=hit, sensitive_features=d.device).by_group.astype(float)
        has = d.groupby('device').y_x.apply(lambda y: (y == cls).any())
        np.testing.assert_allclose(t[m], ref.where(has)[t.index], atol=1e-12)
    for g, k in d.groupby('device').groups.items():
        two = d.y_x[k].nunique() == 2
        np.testing.assert_allclose(t.auroc[g], roc_auc_score(d.y_x[k], d.score_x[k]) if two else np.nan, atol=1e-12)
        assert two or t.note[g].startswith('only')
    q = gaps(p, 'device', threshold=.5, min_size=1, n_boot=2).set_index('gap')
    if d.device.nunique() > 1:
        for gap, m in dict(accuracy_gap='accuracy', selection_rate_parity='selection_rate').items():
            np.testing.assert_allclose(q.value[gap], mf.difference()[m], atol=1e-12)
    else: assert q.value.isna().all() and q.note.str.contains('can be compared').all()


@pytest.mark.parametrize('column', ['view', 'device'])
def test_view_and_device(column):
    p = fake_predictions(300, ('a', 'b')); df = p.df.copy()
    df[column] = np.random.default_rng(0).choice(['one', 'two', 'three'], len(df)); q = Predictions(df, p.labels)
    t = by_group(q, [column, ('sex', column)], n_boot=10, min_size=3)
    assert set(t.group[t.by == column]) == {'one', 'two', 'three'} and len(set(t.group[t.by == f'sex × {column}'])) == 6
    assert (gaps(q, column, n_boot=10).n_groups == 3).all() and set(against_rest(q, column, n_boot=10).group) == {'one', 'two', 'three'}


def test_mean_over_labels():
    p = fake_predictions(400, ('a', 'b', 'c')); kw = dict(n_boot=50, macro=True)
    t = by_group(p, 'sex', intervals=('auroc', 'accuracy', 'fnr'), **kw); f = t[t.group == 'F'].set_index('label')
    for m in ('auroc', 'accuracy', 'tpr', 'fpr', 'fnr', 'selection_rate'): assert f[m]['macro'] == pytest.approx(f[m][list('abc')].mean(), abs=1e-12)
    assert ((t.accuracy_lo <= t.accuracy) & (t.accuracy <= t.accuracy_hi)).all() and (t.fnr_hi-t.fnr_lo > 0).all()
    m = t[(t.by == 'sex') & (t.label == 'macro')].set_index('group')
    q = gaps(p, 'sex', **kw).query("label == 'macro'").set_index('gap').value
    assert q['accuracy_gap'] == pytest.approx(abs(m.accuracy['F']-m.accuracy['M'])) and q['underdiagnosis'] == pytest.approx(abs(m.fnr['F']-m.fnr['M']))
    r = against_rest(p, 'sex', **kw).query("label == 'macro'").set_index('group')
    assert r.difference['F'] == pytest.approx(m.accuracy['F']-m.accuracy['M']) and r.p['F'] > 0
    without = gaps(p, 'sex', no_finding='c', **kw).query("label == 'macro'").set_index('gap').value
    ab = t[(t.by == 'sex') & t.label.isin(['a', 'b'])].groupby('group').accuracy.mean()
    assert without['accuracy_gap'] == pytest.approx(abs(ab['F']-ab['M']))


def test_groups_are_compared_on_the_same_labels():
    p = fake_predictions(300, ('a', 'b')); df = p.df.assign(y_a=p.df.y_a.where(p.df.sex == 'M', 0.)); q = Predictions(df, p.labels)
    t = by_group(q, 'sex', macro=True, n_boot=5).query("by == 'sex'").set_index(['group', 'label'])
    assert t.auroc['M', 'macro'] == t.auroc['M', 'b'] and t.auroc['F', 'macro'] == t.auroc['F', 'b'] and t.note['M', 'macro'] == 'without a'
    assert t.fpr['M', 'macro'] == pytest.approx((t.fpr['M', 'a']+t.fpr['M', 'b'])/2)       # false positives exist for both


def test_patients_without_the_label_do_not_count():
    p = fake_predictions(300, ('a', 'b')); df = p.df.copy(); few = df.patient_id[(df.sex == 'F') & (df.split == 'test')].unique()[3:]
    df.loc[df.patient_id.isin(few), 'y_a'] = np.nan
    t = by_group(Predictions(df, p.labels), 'sex', n_boot=5).set_index(['group', 'label'])
    assert t.note['F', 'a'] == 'only 3 patients (minimum 10)' and np.isnan(t.accuracy['F', 'a']) and np.isfinite(t.accuracy['F', 'b'])
    q = gaps(Predictions(df, p.labels), 'sex', n_boot=5).set_index(['label', 'gap']).value
    assert np.isnan(q['a', 'accuracy_gap']) and np.isfinite(q['b', 'accuracy_gap'])
    r = against_rest(Predictions(df, p.labels), 'sex', n_boot=5).set_index(['label', 'group']); assert np.isnan(r.difference['a', 'F']) and r.note['a', 'F']


def test_published_accuracy_difference_against_the_rest():
    "Published: accuracy of the band minus the mean accuracy of the other bands, weighted by their images"
    p = fake_predictions(400, ('x',)); t = by_group(p, 'age_band', n_boot=2, min_size=1).query("by == 'age_band'").set_index('group')
    r = against_rest(p, 'age_band', n_boot=2, min_size=1).set_index('group').difference
    for g in t.index:
        o = t.drop(g); assert r[g] == pytest.approx(t.accuracy[g]-np.average(o.accuracy, weights=o.n), abs=1e-12)


def test_age_bands():
    assert age_band([0, 29.99, 30, 59, 60, 69, 70, 79.5, 80, 100]).tolist() == [b for b in AGE_BANDS for _ in range(2)]
    assert age_band([np.nan])[0] is None
    with pytest.raises(DataError, match='age holds -3'): age_band([-3])


def test_groups():
    df = pd.DataFrame(dict(sex=['F', 'M', None], age=[20., np.nan, 50]))
    assert groups_of(df, 'age_band').tolist() == ['[0,30)', 'unknown', '[30,60)']
    assert groups_of(df, ('sex', 'age_band')).tolist() == ['F × [0,30)', 'unknown', 'unknown']


def test_intersections_and_models():
    p = fake_predictions(200); two = Predictions(pd.concat([p.df, p.df.assign(model='b')]), p.labels)
    t = by_group(two, ('sex', 'age_band'), intersections=True, n_boot=20, min_size=3)
    assert set(t.by) == {'all', 'sex', 'age_band', 'sex × age_band'} and set(t.model) == {'model', 'b'}
    for (_, by, l), g in t.groupby(['model', 'by', 'label']): assert g.n.sum() == (p.df.split == 'test').sum()
    same = t.drop(columns='model').groupby(t.model.to_numpy())
    pd.testing.assert_frame_equal(*(g.reset_index(drop=True) for _, g in same))


def test_one_threshold_for_all_groups():
    t = by_group(fake_predictions(200), n_boot=10)
    assert (t.groupby('label').threshold.nunique() == 1).all()


def test_a_planted_gap_is_found_and_named():
    p = fake_predictions(900, ('x',), auroc=.85, bias={'F': -.2})
    q = gaps(p, 'sex', n_boot=200).set_index('gap')
    assert q.lowest['auroc_gap'] == 'F' and q.lo['auroc_gap'] > 0 and q.p['auroc_gap'] < .02 and q.highest['underdiagnosis'] == 'F'
    r = against_rest(p, 'sex', 'auroc', n_boot=200).set_index('group')
    assert r.difference['F'] == pytest.approx(-r.difference['M']) and r.hi['F'] < 0
    assert abs(r.difference['F']) == pytest.approx(q.value['auroc_gap'])


def null_rate(reps, n_boot, **kw):
    low = []
    for r in range(reps):
        q = gaps(fake_predictions(250, ('x',), seed=1000+r), 'age_band', threshold=.3, n_boot=n_boot, **kw)
        low.append(q.set_index('gap').p < .05)
    return pd.concat(low, axis=1).sum(axis=1)


def test_absent_gaps_are_rarely_found():
    "25 tables without a gap and with small bands: a gap's p below 0.05 in 7 or more has a chance under 1e-3"
    assert null_rate(25, 99, min_size=5).max() <= binom.ppf(1-.001/6, 25, .05)


@pytest.mark.slow
def test_permutation_is_exact():
    "400 tables: the share below 0.05 lies in the 99.9 % band, for every gap"
    low = null_rate(400, 199, min_size=5)
    assert (low <= binom.ppf(1-.001/6, 400, .05)).all() and (low >= binom.ppf(.001/6, 400, .03)).all()


def test_no_finding_swaps_the_roles():
    p = fake_predictions(200)
    a, b = (gaps(p, 'sex', no_finding=n, n_boot=30).query("label == 'effusion'").set_index('gap').value for n in (None, 'effusion'))
    assert a['underdiagnosis'] == b['overdiagnosis'] and a['overdiagnosis'] == b['underdiagnosis'] and a['accuracy_gap'] == b['accuracy_gap']


# ---------------------------------------------------------------- nothing to go by

def test_small_groups_are_masked():
    p = fake_predictions(80); n = p.df[p.df.split == 'test'].groupby(groups_of(p.df, 'age_band')).patient_id.nunique()
    t = by_group(p, 'age_band', min_size=int(n.max()), n_boot=10).query("by != 'all'")
    small = t.n_patients < n.max()
    assert small.any() and t[small][['auroc', 'tpr', 'prevalence', 'n_pos']].isna().all(axis=None) and t[small].note.str.startswith('only ').all()
    q = gaps(p, 'age_band', min_size=10**6, n_boot=10)
    assert q.value.isna().all() and q.p.isna().all() and (q.note == '0 group(s) can be compared').all() and set(q.gap) == set(GAPS)
    assert against_rest(p, 'age_band', min_size=10**6, n_boot=10).difference.isna().all()


def test_group_without_positives():
    p = fake_predictions(200, ('x',)); df = p.df.assign(y_x=p.df.y_x.where(p.df.sex == 'M', 0.))
    t = by_group(Predictions(df, ['x']), 'sex', n_boot=20).set_index('group')
    assert np.isnan(t.tpr['F']) and np.isnan(t.auroc['F']) and np.isfinite(t.fpr['F']) and t.note['F'].startswith('only negatives')
    q = gaps(Predictions(df, ['x']), 'sex', n_boot=20).set_index('gap')
    assert np.isnan(q.value['underdiagnosis']) and np.isfinite(q.value['overdiagnosis']) and '1 group' in q.note['auroc_gap']
    assert np.isnan(against_rest(Predictions(df, ['x']), 'sex', 'tpr', n_boot=20).difference).all()


def test_unknown_attribute_is_shown_but_not_compared():
    p = fake_predictions(200); df = p.df.copy(); df.loc[df.patient_id < 'p00060', 'sex'] = None
    q = Predictions(df, p.labels)
    assert by_group(q, 'sex', n_boot=10).group.unique().tolist() == ['all', 'F', 'M', 'unknown']
    assert (gaps(q, 'sex', n_boot=10).n_groups == 2).all() and set(against_rest(q, 'sex', n_boot=10).group) == {'F', 'M'}
    none = Predictions(df.assign(sex=None), p.labels)
    assert gaps(none, 'sex', n_boot=10).value.isna().all()


def test_age_band_that_changes_within_a_patient():
    p = fake_predictions(150); df = p.df.copy(); df.loc[df.image_id.str.endswith('_1'), 'age'] += 5
    assert gaps(Predictions(df, p.labels), 'age_band', n_boot=20).p.between(0, 1).all()


def test_wrong_settings():
    p = fake_predictions(60)
    with pytest.raises(DataError, match="no column 'ward'"): by_group(p, 'ward')
    with pytest.raises(ConfigError, match="metric 'auc'"): against_rest(p, 'sex', 'auc')
    with pytest.raises(ConfigError, match='unit is'): gaps(p, 'sex', unit='eye')
    with pytest.raises(DataError, match="no 'valid' rows"): gaps(Predictions(p.df[p.df.split == 'test'], p.labels), 'sex')
    with pytest.raises(DataError, match='no threshold for'): by_group(p, 'sex', threshold=pd.DataFrame(dict(model=['model'], label=['effusion'], threshold=[.5])))
    with pytest.raises(ConfigError, match='no metric'): by_group(p, 'sex', intervals=('brier',))


def test_one_patient_and_constant_scores():
    p = fake_predictions(60, ('x',)); test = p.df[p.df.split == 'test']
    t = by_group(Predictions(test.assign(patient_id='a'), ['x']), 'sex', threshold=.5, n_boot=5)
    assert (t.note == 'only 1 patients (minimum 10)').all() and t.auroc.isna().all()
    t = by_group(Predictions(test.assign(score_x=.5), ['x']), 'sex', threshold=.5, min_size=1, n_boot=5)
    assert (t.auroc == .5).all() and t.note.str.contains('all scores are equal').all()
    with pytest.raises(DataError, match='NaN or infinite'): by_group(Predictions(test.assign(score_x=np.nan), ['x']), 'sex', threshold=.5)


def test_multiclass_by_group():
    p = fake_predictions(200, ('x',)); df = p.df.rename(columns=dict(score_x='score_x_1')); df['score_x_0'] = 1-df.score_x_1
    t = by_group(Predictions(df, ['x'], 'multiclass'), 'sex', n_boot=5, macro=True).set_index(['group', 'label'])
    assert t.auroc['F', 'x=0'] == pytest.approx(t.auroc['F', 'x=1']) == pytest.approx(t.auroc['F', 'macro'])
