import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from medprivacy.budgets import curve_table
from medprivacy.data.core import Predictions
from medprivacy.evaluate import auroc_ci

def made(seed, n=120, shift=0.):
    "Predictions of a model without privacy and two private ones, and their terms"
    rng = np.random.default_rng(seed)
    k, y = np.arange(n), rng.integers(0, 2, (n, 2)).astype(float)
    df  = pd.DataFrame(dict(image_id=[f'i{i}' for i in k], patient_id=[f'p{i//2}' for i in k], split='test', view=None,
                            sex=np.where(k//2 % 3, 'F', 'M'), age=20. + k//2 % 60, device=None, run='', y_a=y[:,0],
                            y_b=y[:,1]))
    parts, names = [], ['public', 'private', 'private ε=1']
    for m,noise in zip(names, (.5, .8, 2.)):
        s = y + rng.normal(size=y.shape)*noise + shift
        parts.append(df.assign(model=m, score_a=s[:,0], score_b=s[:,1]))
    terms = pd.DataFrame(dict(model=names, condition=names, epsilon=[np.inf, 8, 1], delta=[np.nan, 1e-5, 1e-5]))
    return Predictions(pd.concat(parts, ignore_index=True), ('a', 'b'), 'multilabel'), terms

@pytest.mark.parametrize('group', ['all', 'F', 'M'])
def test_every_row_is_the_auroc_of_its_group_with_the_usual_interval(group):
    preds, terms = made(0)
    t = curve_table(preds, terms, ('sex',), n_boot=100).set_index(['group', 'condition', 'label'])
    for m in terms.model:
        d = preds.df[(preds.df.model == m)]
        y = d[['y_a', 'y_b']].to_numpy().copy()
        if group != 'all': y[(d.sex != group).to_numpy()] = np.nan
        s, got = d[['score_a', 'score_b']].to_numpy(), [t.loc[(group, m, l)] for l in 'ab']
        for r,i in zip(got, auroc_ci(y, s, patient=d.patient_id, n_boot=100)):
            assert (r.auroc, r.lo, r.hi) == pytest.approx((i.value, i.lo, i.hi), abs=1e-12)
        assert t.loc[(group, m, 'macro')].auroc == pytest.approx(np.mean([r.auroc for r in got]), abs=1e-12)
        assert t.loc[(group, m, 'macro')].n_patients == d.patient_id[(d.sex == group) | (group == 'all')].nunique()

@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1000), st.floats(-3, 3))
def test_ranks_alone_matter_and_differences_are_paired(seed, shift):
    (preds, terms), (moved, _) = made(seed), made(seed, shift=shift)
    a, b = [curve_table(p, terms, (), n_boot=30) for p in (preds, moved)]
    np.testing.assert_allclose(a.auroc, b.auroc, atol=1e-9)
    of = a[a.label == 'macro'].set_index('condition')
    np.testing.assert_allclose(of.difference, of.auroc-of.auroc['public'], atol=1e-12)
    assert of.difference_lo['public'] == of.difference_hi['public'] == 0 and np.isnan(of.p['public'])
    assert (a.p_holm.dropna() >= a.p.dropna()).all()

def test_trainings_are_averaged_and_a_copy_changes_nothing():
    preds, terms = made(1)
    twin = preds.df[preds.df.model == 'private'].assign(model='private (training 2)')
    both = Predictions(pd.concat([preds.df, twin], ignore_index=True), preds.labels, preds.task)
    more = pd.concat([terms, terms.iloc[[1]].assign(model='private (training 2)')], ignore_index=True)
    a, b = curve_table(preds, terms, (), n_boot=50), curve_table(both, more, (), n_boot=50)
    same = ['auroc', 'lo', 'hi', 'difference', 'difference_lo', 'difference_hi', 'p']
    pd.testing.assert_frame_equal(a[same], b[same])
    assert (b.spread[b.condition == 'private'] == 0).all() and a.spread.isna().all()
