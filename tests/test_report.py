"The report: complete for a whole run, honest for half a run, silent about patients"
import base64
import json
import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from matplotlib import pyplot as plt

from medprivacy.core import ConfigError, DataError, add_summary, add_table, open_run
from medprivacy.report import FIGURES, make_figures, report
from medprivacy.visualize import count_people

SPENT = dict(eps=3.21, delta=1e-3, accountant='prv', sampling='poisson', neighbours='add-remove', unit='patient', steps=77,
             noise_multiplier=1.25, sample_rate=.05, private=True)
LEAK  = dict(raw=.981, obfuscated=.623, noise=.944, shuffled=.512)


def size(n=200): return dict(n=n, n_patients=n//2)
def attack(**leak):
    return pd.DataFrame([dict(condition=c, model=m, auroc=v, leakage=v, lo=v-.03, hi=min(v+.03, 1), **size())
                         for c,v in (LEAK | leak).items() for m in ('net_a', 'net_b', 'strongest')])
def utility(labels=('effusion', 'opacity', 'macro')):
    return pd.DataFrame([dict(condition=c, label=l, value=v, lo=v-.05, hi=v+.05, **size())
                         for c,v in dict(raw=.91, obfuscated=.887, public=.92, private=.79).items() for l in labels])
def groups():
    return pd.DataFrame([dict(condition='raw', by=b, group=g, label=l, auroc=.9, auroc_lo=.8, auroc_hi=.95, **size(40), sensitivity=.7)
                         for b,g in [('sex', 'F'), ('sex', 'M'), ('age_band', '40-59')] for l in ('effusion', 'macro')])
def history():
    e = np.arange(4)
    return pd.DataFrame(dict(condition='raw', model='net_a', epoch=e, train_loss=.6-.1*e, valid_loss=.6-.1*e, valid_auroc=.6+.1*e))

@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    "Figures take most of the time; they are drawn only for tests that ask for `drawn`"
    if 'drawn' not in request.fixturenames: monkeypatch.setattr('medprivacy.report.make_figures', lambda run: [])

@pytest.fixture
def drawn(): return True

@pytest.fixture
def make(tmp_path):
    "Write a run folder; `tables` replaces or, with None, removes a table"
    def _make(name='run', phantom=True, labels=('effusion', 'opacity', 'macro'), **tables):
        run = open_run(tmp_path/name, dict(seed=7, data=dict(name='made up', phantom=phantom, root=str(tmp_path/'person_name'/'images'))))
        rng = np.random.default_rng(0)
        rec = pd.DataFrame(dict(patient_id=[f'secret{i}' for i in range(90)], sex=rng.choice(['F', 'M'], 90), age=rng.uniform(25, 85, 90),
                                split=rng.choice(['train', 'valid', 'test'], 90)))
        every = dict(attack=attack(), utility=utility(labels), groups=groups(), history=history(), demographics=count_people(rec)) | tables
        for k,df in every.items():
            if df is not None: add_table(run, k, df)
        lim = lambda v: dict(value=v, lo=v-.05, hi=v+.05, n=100)
        add_summary(run, {**{f'{c}.sex.leakage': lim(v) for c,v in LEAK.items() if c != 'shuffled'}, 'control.sex.auroc': lim(.49),
                          'raw.disease.auroc': lim(.91), 'obfuscated.disease.auroc': lim(.887), 'private.disease.auroc': lim(.79),
                          'private.epsilon': dict(value=3.21)})
        (run.path/'privacy.json').write_text(json.dumps(SPENT))
        (run.path/'unaccounted.json').write_text(json.dumps(['thresholds were read from validation patients']))
        (run.path/'notes.json').write_text(json.dumps(['a note of the run']))
        Image.fromarray(rng.integers(0, 255, (9,9), dtype=np.uint8)).save(run.figure_path('views_test'))
        return run
    return _make

def html_of(run, **kw): return report(run, **kw).read_text(encoding='utf-8')
def text_of(html): return re.sub(r'\s+', ' ', re.sub(r'<[^>]+>', ' ', re.sub(r'(?s)<style>.*?</style>', '', html))).replace('\xa0', ' ')


def test_a_whole_run(make, drawn):
    run = make()
    assert report(run.path) == run.path/'report.html'
    html = html_of(run); text = text_of(html)
    for s in ('still reads sex at 0.623 [0.593, 0.653] leakage (n = 200 images of 100 patients', '0.887 [0.837, 0.937]', 'ε = 3.21',
              'not differentially private', 'identity', 'thresholds were read', 'a note of the run', 'seed = 7', 'torch', '77', '1.25'): assert s in text, s
    for term in ('δ', 'poisson', 'add-remove', 'prv', 'patient'): assert term in text
    assert 'Not run' not in text
    assert html.count('<img') == 7 and html.count('alt="') == 7        # attack, curves, utility, frontier, groups, people, views

def test_nothing_is_loaded_and_nothing_is_named(make):
    html = html_of(make())
    bare = re.sub(r'base64,[A-Za-z0-9+/=]+', '', html)
    assert not re.search(r'https?:|<script|<link|url\(', bare)
    assert 'person_name' not in html and 'secret' not in html

def test_embedded_images_are_the_figures(make, drawn):
    run = make()
    stored = {base64.b64encode(p.read_bytes()).decode() for p in (run.path/'figures').glob('*.png')}
    assert not stored - set(re.findall(r'base64,([A-Za-z0-9+/=]+)', html_of(run)))

@pytest.mark.parametrize('phantom,ask,shown', [(True, False, True), (False, False, False), (False, True, True), ('true', False, False), (1, False, False)])
def test_pictures_of_patients(make, phantom, ask, shown):
    run = make(phantom=phantom)
    run.figure_path('sheet').write_bytes(run.figure_path('views_test').read_bytes())    # a name that the report does not know
    html = html_of(run, show_images=ask)
    data = base64.b64encode(run.figure_path('views_test').read_bytes()).decode()
    assert (data in html) is shown and html.count('Left out') == (0 if shown else 2)

def test_a_stray_identifier_is_dropped(make):
    assert 'p0001' not in html_of(make(attack=attack().assign(patient_id='p0001', path='p0001.png')))

def test_hostile_labels(make):
    html = html_of(make(labels=('<script>alert(1)</script>', 'b&c', 'macro')))
    assert '<script' not in html and '&lt;script&gt;' in html and 'b&amp;c' in html

@pytest.mark.parametrize('gone,said', [('attack', 'no attacker was trained'), ('utility', 'no disease classifier'), ('groups', 'by sex and age band'),
                                       ('demographics', 'head counts')])
def test_missing_tables(make, gone, said):
    assert said in text_of(html_of(make(**{gone: None})))
    assert said in text_of(html_of(make(name='empty', **{gone: pd.DataFrame()})))

def test_a_bare_run(tmp_path):
    text = text_of(html_of(open_run(tmp_path/'r', dict(seed=1))))
    assert text.count('Not run') == 7 and 'not anonymous' in text and 'Patient data, no pictures shown' in text

@pytest.mark.parametrize('files', [('privacy.json',), ('unaccounted.json',), ('notes.json',), ('summary.json',), ('versions.txt',)])
def test_missing_files(make, files):
    run = make()
    for f in files: (run.path/f).unlink()
    text = text_of(html_of(run))
    if 'privacy.json' in files: assert 'proves no privacy' in text and 'no model was trained with differential privacy' in text
    if 'unaccounted.json' in files: assert 'whether there were any is unknown' in text

def test_no_run_folder(tmp_path):
    for p in (tmp_path, tmp_path/'absent'):
        with pytest.raises(ConfigError, match='no run folder'): report(p)
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('name', ['privacy.json', 'notes.json', 'tables/attack.csv'])
def test_broken_files_are_named(make, name):
    run = make()
    (run.path/name).write_bytes(b'{"a": \xff')
    with pytest.raises(DataError, match=name.split('/')[-1].split('.')[0]): report(run)

def test_warnings_reach_the_page(make):
    text = text_of(html_of(make(attack=attack(raw=.9, noise=.6))))
    assert text.count('no evidence') == 3 and 'too easy to hide' in text

def test_small_head_counts_are_hidden(make):
    few = pd.DataFrame(dict(part='all', split='test', sex=['F', 'M'], age_band='20-39', n_patients=[3, 40], n_images=[6, 80]))
    run = make(phantom=False, demographics=few)
    run.figure_path('demographics').write_bytes(run.figure_path('views_test').read_bytes())
    html = html_of(run)
    assert '&lt;5' in html and FIGURES['demographics'] not in html

def test_figures(make, drawn):
    run = make()
    assert make_figures(run.path) == ['attack', 'curves', 'utility', 'frontier', 'subgroups', 'demographics']
    for f in (run.path/'figures').glob('*.png'): assert plt.imread(f).std() > 0
    assert not plt.get_fignums()

def test_optional_figures(make, drawn):
    e = pd.DataFrame(dict(epsilon=[1, 8, np.inf], value=[.7, .8, .9], lo=[.6, .7, .8], hi=[.8, .9, 1]))
    r = pd.DataFrame(dict(curve='raw', fpr=[0, .2, 1], tpr=[0, .8, 1]))
    run = make(eps=e, roc=r, points=r[1:2])
    assert {'eps', 'roc'} <= set(make_figures(run)) and html_of(run).count('<img') == 9

def test_thresholded_metrics(make):
    m = pd.DataFrame([dict(condition='raw', label='effusion', threshold=.4, sensitivity=.8, specificity=.7, fpr=.3, n=200)])
    text = text_of(html_of(make(metrics=m)))
    assert 'sensitivity' in text and 'fpr' not in text

def test_groups_as_by_group_writes_them(make, drawn):
    g = groups().drop(columns='condition').assign(model='private', note='')
    g = g[g.label != 'macro']
    g.loc[g.group == '40-59', ['auroc', 'auroc_lo', 'auroc_hi', 'note']] = [np.nan, np.nan, np.nan, 'only 4 patients (minimum 10)']
    run = make(groups=g)
    assert 'subgroups' in make_figures(run)
    text = text_of(html_of(run))
    assert 'only 4 patients (minimum 10)' in text and '0.900 [0.800, 0.950]' in text

def test_utility_as_metrics_table_writes_it(make, drawn):
    u = utility().rename(columns=dict(value='auroc', lo='auroc_lo', hi='auroc_hi'))
    u = u.assign(threshold=np.where(u.label == 'macro', np.nan, .3), sensitivity=.81, specificity=.72, rule='youden', unit='patient', note='')
    run = make(utility=pd.concat([u, u[u.label == 'macro'].assign(label='weighted')]))
    assert {'utility', 'frontier'} <= set(make_figures(run))
    html = html_of(run); text = text_of(html)
    assert 'youden' in text and '0.810' in text and 'weighted' not in text and '0.887 [0.837, 0.937]' in text

def test_a_control_with_one_attacker(make, drawn):
    a = attack()
    run = make(attack=a[~((a.condition == 'shuffled') & (a.model == 'net_b'))])
    assert 'attack' in make_figures(run) and 'nan' not in text_of(html_of(run))

def test_small_numbers_are_not_zero(make):
    run = make()
    add_summary(run, {'private.delta': 1e-5, 'obfuscated.mean_change': dict(value=.0421, n=64)})
    text = text_of(html_of(run))
    assert '1e-05' in text and 'Mean |Δ| per pixel, obfuscated images 0.042' in text

def test_headlines_count_images(tmp_path):
    "Attack and control are tested on the same images, two of each patient"
    from medprivacy.leakage import leakage_table
    from medprivacy.rank import fake_predictions
    from medprivacy.study import _control, headline
    preds = fake_predictions(60, ('sex',), auroc=.5)
    preds.df['y_sex'] = preds.df.y_sex.mask(preds.df.patient_id.isin(preds.df.patient_id.unique()[:6]))     # not known of some
    run = open_run(tmp_path/'r', dict(seed=1))
    _control(run, preds, 'sex', 20)
    t = leakage_table(preds, n_boot=20).iloc[0]
    add_summary(run, {'raw.sex.leakage': dict(value=t.leakage, lo=t.lo, hi=t.hi, n=t.n)})
    assert run.summary['control.sex.auroc']['n'] == t.n == 2*t.n_patients == run.summary['raw.sex.leakage']['n']
    text = text_of(html_of(run))
    assert 'result value [95 % interval] images in summary.json' in text and list(headline(run).images) == [t.n, t.n]
