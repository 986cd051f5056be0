"""Every figure, at report size and at half width: axes returned, units named, nothing overlapping, wrong input refused

To look at them: `MEDPRIVACY_FIGURES=some/folder pytest tests/test_visualize.py` writes each as PNG.
"""
import contextlib
import functools
import itertools
import math
import os

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg

from medprivacy.core import DataError
from medprivacy.curves import calibration_curves, eps_table, roc_table
from medprivacy.data.core import Predictions, load_predictions
from medprivacy.draw import half_width
from medprivacy.evaluate import metrics_table
from medprivacy.fairness import by_group
from medprivacy.rank import fake_predictions
from medprivacy.trends import gaps_by_epsilon, performance_loss
from medprivacy.visualize import (contact_sheet, count_people, plot_attack_bars, plot_calibration, plot_demographics, plot_eps_auroc, plot_eps_gap,
                                  plot_learning_curves, plot_panels, plot_privacy_utility, plot_roc, plot_size, plot_subgroups, plot_utility_bars,
                                  show_views)


def attack(models=('net_a', 'net_b', 'strongest')):
    rows = [(c, m, v, v-.03, min(v+.02, 1), 200, 100) for c,v in dict(raw=.98, obfuscated=.61, noise=.93, shuffled=.52).items() for m in models]
    return pd.DataFrame(rows, columns='condition model leakage lo hi n n_patients'.split())

def utility(labels=('effusion', 'opacity', 'macro')):
    rows = [(c, l, v, v-.04, v+.03, 200, 100) for c,v in dict(raw=.91, obfuscated=.88, private=.8).items() for l in labels]
    return pd.DataFrame(rows, columns='condition label value lo hi n n_patients'.split())

def frontier():
    df = pd.DataFrame(dict(condition=['raw', 'obfuscated', 'obfuscated'], leakage=[.98, .7, .6], auroc=[.91, .9, .85]))
    for c in ('leakage', 'auroc'): df[f'{c}_lo'], df[f'{c}_hi'] = df[c]-.03, df[c]+.02
    return df

def eps(): return pd.DataFrame(dict(epsilon=[1, 4, math.inf], value=[.7, .8, .9], lo=[.65, .75, .86], hi=[.74, .84, .93]))

def history(conditions=('raw', 'obfuscated')):
    e = np.arange(5)
    return pd.concat([pd.DataFrame(dict(condition=c, model=m, epoch=e, train_loss=.7-.1*e, valid_loss=.7-.08*e, valid_auroc=.5+.1*e))
                      for c in conditions for m in ('net_a', 'net_b')])

def roc(): return pd.DataFrame(dict(curve=['a']*3 + ['b']*3, fpr=[0, .2, 1]*2, tpr=[0, .8, 1, 0, .6, 1]))

def groups():
    rows = [(c, b, g, .9, .85, .94, 50, 25) for c in ('raw', 'obfuscated') for b,g in [('sex', 'F'), ('sex', 'M'), ('age_band', '20-39')]]
    return pd.DataFrame(rows, columns='condition by group value lo hi n n_patients'.split())

def people(n=60):
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(patient_id=[f'p{i}' for i in range(n)], sex=rng.choice(['F', 'M', None], n), age=rng.uniform(0, 95, n),
                           split=rng.choice(['train', 'valid', 'test'], n), part=None))
    df.loc[0, 'age'] = np.nan
    return pd.concat([df, df]).reset_index(drop=True)    # two images a patient


PLOTS = {'attack': lambda: plot_attack_bars(attack()), 'utility': lambda: plot_utility_bars(utility()),
         'frontier': lambda: plot_privacy_utility(frontier()), 'eps': lambda: plot_eps_auroc(eps(), terms='δ = 1e-3, unit patient'),
         'curves': lambda: plot_learning_curves(history()), 'roc': lambda: plot_roc(roc(), roc().iloc[[1,4]]),
         'groups': lambda: plot_subgroups(groups()), 'people': lambda: plot_demographics(people()),
         'many attackers': lambda: plot_attack_bars(attack([f'network_{i}' for i in range(5)] + ['strongest'])),
         'many labels': lambda: plot_utility_bars(utility([f'long finding {i}' for i in range(9)])),
         'four conditions': lambda: plot_learning_curves(history(('raw', 'obfuscated', 'noise', 'shuffled')))}

LABELS = ('pleural_effusion', 'cardiomegaly', 'lung opacity', 'atelectasis', 'no finding')
EPS    = {'ε = 0.3': .3, 'ε = 1': 1., 'ε = 3': 3., 'ε = 10': 10., 'public': math.inf}
TERMS  = 'δ = 1e-4, unit patient, add-remove neighbours, Poisson sampling, PRV accountant'

@functools.cache
def models(names, labels=LABELS, n=300):
    fs = [fake_predictions(n, labels, auroc=.7+.04*i, model=m, noise_seed=i).df for i,m in enumerate(names)]
    return Predictions(pd.concat(fs, ignore_index=True), labels)

def bare(path, preds):
    "Predictions as another tool would write them"
    preds.df.drop(columns=['view', 'device', 'run']).to_csv(path, index=False)
    return load_predictions(path)

@functools.cache
def gap(by='age_band'): return gaps_by_epsilon(models(tuple(EPS), ('x',), 600), EPS, by, 'auroc', n_boot=20)
@functools.cache
def losses(by='label'):
    both = models(('private', 'x', 'public',)).df
    return performance_loss(*(Predictions(both[both.model == m], LABELS) for m in ('private', 'public')), by, n_boot=20)
def one_label(): return models(('public', 'private',), ('effusion',))

PLOTS |= {'eps by group': lambda: plot_eps_auroc(eps_table(models(tuple(EPS), n=600), EPS, 'sex', n_boot=20), terms=TERMS),
          'gap by sex': lambda: plot_eps_gap(gap('sex'), terms=TERMS), 'gap by age': lambda: plot_eps_gap(gap(), terms=TERMS),
          'size of labels': lambda: plot_size(losses()), 'size of bands': lambda: plot_size(losses('age_band')),
          'calibration': lambda: plot_calibration(calibration_curves(one_label(), n_boot=20)),
          'roc of a table': lambda: plot_roc(*roc_table(one_label())), 'roc of labels': lambda: plot_roc(*roc_table(models(('public',)))),
          'roc panels': lambda: plot_panels(plot_roc, *roc_table(models(('public', 'private', 'obfuscated',)))),
          'calibration panels': lambda: plot_panels(plot_calibration, calibration_curves(models(('public', 'private',)), n_boot=20)),
          'one panel': lambda: plot_panels(plot_roc, *roc_table(one_label())),
          'metrics': lambda: plot_utility_bars(metrics_table(models(('public', 'private',)), n_boot=20).query("label != 'weighted'"), value='auroc'),
          'groups of a table': lambda: plot_subgroups(by_group(one_label(), n_boot=20, intersections=True), value='auroc'),
          'views': lambda: show_views(np.full((4,1,8,8), .4), np.full((4,1,8,8), .5), titles=[f'image {i}' for i in range(4)]),
          'contact sheet': lambda: contact_sheet(np.full((8,1,8,8), .4), [f'{s}, {a} y' for s,a in zip('FMFMFMFM', range(20, 100, 10))])}
PICTURES = ('views', 'contact sheet')    # they have no axes with units

@pytest.fixture(params=[(n, size) for n in PLOTS for size in ('report', 'half')], ids='-'.join, scope='module')
def axes(request):
    name, size = request.param
    with half_width() if size == 'half' else contextlib.nullcontext(): axs = np.ravel(PLOTS[name]())
    axs[0].figure.name = name
    if out := os.environ.get('MEDPRIVACY_FIGURES'): axs[0].figure.savefig(f'{out}/{name.replace(" ", "_")}_{size}.png', dpi=150)
    axs[0].figure.canvas.draw()
    yield axs
    plt.close(axs[0].figure)


def seen(axes):
    "Texts of a figure that are drawn, each with its box in pixels: ticks outside the view are not"
    def out(axis):
        lo, hi = sorted(axis.get_view_interval())
        return [l for t in axis.get_major_ticks()+axis.get_minor_ticks() if not lo-1e-9 <= t.get_loc() <= hi+1e-9 for l in (t.label1, t.label2)]
    fig, hidden = axes[0].figure, {id(l) for a in axes for axis in (a.xaxis, a.yaxis) for l in out(axis)}
    found = [t for t in fig.findobj(plt.Text) if t.get_visible() and t.get_text().strip() and id(t) not in hidden]
    pen   = FigureCanvasAgg(fig).get_renderer()
    for t in found: t.get_window_extent(pen)
    boxes = [(t.get_text(), plt.Text.get_window_extent(t, pen)) for t in found]    # without lines that lead to a point
    return [(t, b) for t,b in boxes if b.width > 0]

def test_returns_axes(axes): assert all(isinstance(a, Axes) for a in axes)

def test_every_axis_is_named(axes):
    if axes[0].figure.name in PICTURES: return
    def words(axis): return any(not l.get_text().replace('.', '').isdigit() for l in axis.get_ticklabels() if l.get_text())
    for a in axes:
        for k in 'xy':
            joined = getattr(a, f'get_shared_{k}_axes')()
            named  = any(getattr(o, f'get_{k}label')() for o in axes if o is a or joined.joined(a, o))
            assert named or words(getattr(a, f'{k}axis')), (a, k)

def test_no_text_overlaps_or_leaves_the_figure(axes):
    found, (w, h) = seen(axes), axes[0].figure.canvas.get_width_height()
    assert len(found) > 4
    for t,b in found: assert b.x0 >= -2 and b.x1 <= w+2 and b.y0 >= -2 and b.y1 <= h+2, t
    for (s,a),(t,b) in itertools.combinations(found, 2):
        wide, high = min(a.x1, b.x1)-max(a.x0, b.x0), min(a.y1, b.y1)-max(a.y0, b.y0)
        assert wide <= 1 or high <= 1, f'{s!r} lies on {t!r}'

def test_no_point_loses_its_name():
    for by in ('label', 'age_band'):
        for size in (contextlib.nullcontext, half_width):
            with size(): ax = plot_size(losses(by))
            assert {t.get_text() for t in ax.texts} == set(losses(by).point)

def test_conditions_differ_without_colour():
    bars = plot_utility_bars(utility()).patches
    assert len({b.get_hatch() for b in bars}) == 3
    lines = [l for l in plot_privacy_utility(frontier()).get_lines() if l.get_label() in ('raw', 'obfuscated')]
    assert len({l.get_marker() for l in lines}) == 2


@pytest.mark.parametrize('make,plot', [(attack, plot_attack_bars), (utility, plot_utility_bars), (frontier, plot_privacy_utility),
                                       (history, plot_learning_curves), (roc, plot_roc), (groups, plot_subgroups)])
def test_missing_columns_and_empty_tables(make, plot):
    df = make()
    col = [c for c in df if c in ('lo', 'leakage_lo', 'valid_loss', 'tpr')][0]
    with pytest.raises(DataError, match=f"lacks the column '{col}'"): plot(df.drop(columns=col))
    with pytest.raises(DataError, match='no rows'): plot(df[:0])

def test_missing_numbers_are_left_blank():
    df = attack(); df.loc[0, ['leakage', 'lo', 'hi']] = np.nan
    labels = [t.get_text() for t in plot_attack_bars(df).texts]
    assert len(labels) == len(df)-1 and 'nan' not in labels
    plot_utility_bars(utility().assign(lo=np.nan, hi=np.nan)).figure.canvas.draw()

def test_draws_into_given_axes():
    fig, ax = plt.subplots()
    assert plot_attack_bars(attack(), ax=ax) is ax and plt.get_fignums() == [fig.number]

def test_style_does_not_leak_out():
    before = dict(plt.rcParams)
    plot_roc(roc())
    assert dict(plt.rcParams) == before

def test_eps_needs_its_terms():
    with pytest.raises(TypeError, match='terms'): plot_eps_auroc(eps())
    with pytest.raises(DataError, match='above 0'): plot_eps_auroc(eps().assign(epsilon=[0, 1, 2]), terms='δ')
    for df in (eps()[:1], eps()[2:]): plot_eps_auroc(df, terms='δ = 1e-3').figure.canvas.draw()


@pytest.mark.parametrize('c', [1, 3])
@pytest.mark.parametrize('b', [1, 4])
def test_views(b, c):
    x = torch.rand(b, c, 16, 12)
    y = (x+.1).clamp(0, 1)
    axs = show_views(x, y)
    assert axs.shape == (3, b)
    im = axs[2,0].images[0]
    assert im.get_clim()[0] == -im.get_clim()[1]
    np.testing.assert_allclose(im.get_array(), (y-x)[0].mean(0).numpy(), atol=1e-6)
    assert contact_sheet(x, [str(i) for i in range(b)], cols=3).shape == (math.ceil(b/3), min(3, b))

def test_identical_images_have_a_zero_difference():
    x = np.full((2,1,8,8), .5)
    assert show_views(x, x)[2,0].get_title() == 'mean |Δ| 0.000'

@pytest.mark.parametrize('bad', [np.zeros((1,2,8,8)), np.zeros((1,8,8)), np.zeros((0,1,8,8)), np.full((1,1,8,8), 2.), np.full((1,1,8,8), np.nan)])
def test_bad_images(bad):
    with pytest.raises(DataError): contact_sheet(bad)

def test_views_need_pairs():
    with pytest.raises(DataError, match='pairs'): show_views(np.zeros((2,1,8,8)), np.zeros((3,1,8,8)))


def test_head_counts():
    df = people()
    t  = count_people(df)
    assert t.n_patients.sum() == df.patient_id.nunique() and t.n_images.sum() == len(df)
    assert 'patient_id' not in t and {'unknown'} <= set(t.sex) and 'unknown' in set(t.age_band)
    one = df.assign(age=39.99, sex='F', split='train')
    assert count_people(one).age_band.tolist() == ['[30,60)']
    from_table, from_records = plot_demographics(t), plot_demographics(df)
    for a,b in zip(from_table, from_records): assert [p.get_width() for p in a.patches] == [p.get_width() for p in b.patches]

def test_everybody_is_drawn_once():
    "Shares of each split add up to 100, its counts to its patients, with unknown sex, age and split"
    df  = people(); t = count_people(df)
    axs = plot_demographics(df)
    assert [a.get_title() for a in axs] == [f'{s}: {n} patients' for s,n in t.groupby('split', sort=False).n_patients.sum().items()]
    for a in axs: assert np.isclose(sum(p.get_width() for p in a.patches), 100)
    assert sum(int(x.get_text()) for a in axs for x in a.texts) == df.patient_id.nunique()
    assert [l.get_text() for l in axs[0].get_yticklabels()] == ['under 30', '30–59', '60–69', '70–79', '80 or more', 'unknown']
    nobody = df.assign(sex=None, age=np.nan, split=None)
    ax, = plot_demographics(nobody)
    assert ax.get_title() == 'no split: 60 patients' and [p.get_width() for p in ax.patches] == [100]
