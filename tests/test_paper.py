"Tables and sentences for a paper: numbers with intervals, nothing escaped badly, no claim without a record"
import re
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest

from medprivacy.assess import assess, joined, p_text, write_assessment
from medprivacy.core import ConfigError, DataError, add_record, open_run
from medprivacy.data.core import Predictions
from medprivacy.paper import in_text, methods_paragraph, save_table, to_latex, to_markdown
from medprivacy.rank import fake_predictions

TOY = pd.DataFrame(dict(condition=['public', 'private_8'], label=['pleural_effusion', 'a|b & 50 %'], auroc=[.87312, .5], auroc_lo=[.8611, np.nan],
                        auroc_hi=[.8839, np.nan], n=[300, 20], n_patients=[150, 10]))
HARD = ['a_b', '50 %', 'x & y', '{z}', 'back\\slash', '~', '^', '#1', '$5', '<0.001', 'ε = 8', 'δ', 'F × [0,30)', '[30,60)', 'a − b', '∞', 'two\nlines', '≥ 3']


def test_intervals_as_text():
    t = in_text(TOY)
    assert t.AUROC.tolist() == ['0.873 [0.861, 0.884]', '0.500'] and list(t) == ['condition', 'label', 'AUROC', 'n', 'patients']
    assert in_text(TOY, digits=1).AUROC[0] == '0.9 [0.9, 0.9]'
    assert in_text(TOY.assign(auroc=np.nan)).AUROC.tolist() == ['–', '–']

def test_three_forms_say_the_same(tmp_path):
    t = in_text(TOY)
    files = save_table(t, tmp_path/'deep'/'table', 'AUROC [95 % interval]')
    assert [f.name for f in files] == ['table.csv', 'table.md', 'table.tex'] and pd.read_csv(files[0], dtype=str).equals(t)
    for f in files: assert '0.873 [0.861, 0.884]' in f.read_text(encoding='utf-8'), f
    md = files[1].read_text().splitlines()
    assert len(md) == 4 and all(len(re.findall(r'(?<!\\)\|', l)) == 6 for l in md)      # the pipe in a label is escaped
    with pytest.raises(ConfigError, match='without an ending'): save_table(t, tmp_path/'table.tex')

def test_latex_escapes_everything():
    tex = to_latex(pd.DataFrame({'h_1 & %': HARD}), caption='50 % of a_b', label='tab:x')
    body = tex.split('\\midrule')[1].split('\\bottomrule')[0]
    assert not re.search(r'(?<!\\)[%#]|(?<!\\)&', body) and body.count('\\\\') == len(HARD) and tex.isascii()
    assert not re.search(r'(?<!\\)_', body) and '\\caption{50 \\% of a\\_b}' in tex and '\\label{tab:x}' in tex
    assert not re.search(r'\\\\\s*\[', tex), 'a bracket after a line break is its option'

@pytest.mark.skipif(shutil.which('pdflatex') is None, reason='pdflatex is not installed: the table is not compiled')
def test_latex_compiles(tmp_path):
    tex = to_latex(pd.DataFrame({'h_1 & %': HARD}), caption='50 % of a_b')
    (tmp_path/'t.tex').write_text('\\documentclass{article}\\usepackage{booktabs}\\begin{document}' + tex + '\\end{document}', encoding='utf-8')
    done = subprocess.run(['pdflatex', '-interaction=nonstopmode', '-halt-on-error', 't.tex'], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-800:]


# ---------------------------------------------------------------- the methods paragraph

SPENT = dict(arch='resnet9', epochs=10, private_epochs=20, max_grad_norm=1., noise_multiplier=1.36, sampling='poisson', sample_rate=.2, steps=150, eps=7.99,
             delta=1.7e-4, accountant='prv', neighbours='add-remove', unit='patient', all_eps=[7.99], private=True, unaccounted=['thresholds'])
FACTS = dict(data=dict(name='toy', phantom=True, images=600, patients=300, labels=['effusion', 'mass']),
             split=dict(seed=0, official=False, attack=.5, sizes=dict(train=dict(patients=200, images=400))),
             obfuscate=dict(maker='viewmaker', attackers=3, attribute='sex', images=200, patients=100, epochs=5, attack='confusion', seed=0),
             attack=dict(attribute='sex', archs=['resnet9'], epochs=8, images=90, patients=45, conditions=['raw'], level=.95, interval='percentile', n_boot=99, unit='patient'),
             train=SPENT, evaluate=dict(samples=[dict(conditions=['public'], images=90, patients=45)], rule='youden', chosen_on='validation', level=.95, interval='percentile', n_boot=1000, unit='patient'),
             against=dict(pairs=[dict(a='private', b='public', images=90, patients=45)], holm=True))
WORDS = dict(data='phantom images', split='never images', obfuscate='An obfuscator', attack='Fresh attackers', train='differentially private', evaluate='Performance was measured: public on 90 images of 45 patients',
             against='was compared with')

@pytest.mark.parametrize('stage', FACTS)
def test_a_stage_is_mentioned_if_and_only_if_recorded(stage):
    assert WORDS[stage] in methods_paragraph({stage: FACTS[stage]})
    rest = {k: v for k,v in FACTS.items() if k != stage}
    assert WORDS[stage] not in methods_paragraph(rest)

@pytest.mark.parametrize('stage', FACTS)
def test_a_missing_fact_is_an_error_not_a_gap(stage):
    optional = {'phantom', 'official', 'attack', 'unaccounted', 'rule', 'chosen_on', 'patients', 'seed', 'private_epochs'}
    for fact in set(FACTS[stage]) - optional:
        with pytest.raises(DataError, match=f"stage '{stage}' lacks"): methods_paragraph({stage: {k: v for k,v in FACTS[stage].items() if k != fact}})

def test_several_noise_levels_are_said_one_by_one():
    from dataclasses import asdict
    from medprivacy.dp.account import PrivacySpent
    spent = PrivacySpent(5.97, 1e-4, steps=1150, kinds=[(2., 1/6, 1000), (.8123, .25, 150)], extra=(20., 30.))
    said = methods_paragraph(dict(train={k: v for k,v in SPENT.items() if k not in ('noise_multiplier', 'sample_rate')} | {k: v for k,v in asdict(spent).items() if v is not None}))
    assert ('poisson sampling, 1\u202f150 steps in all: 1\u202f000 steps at rate 0.167 with noise multiplier 2 and 150 steps at rate 0.25 with noise multiplier 0.812; '
            'with Gaussian queries of noise multiplier 20 and 30 on all patients): (ε = 5.97') in said
    one = methods_paragraph(dict(train=SPENT | dict(extra=[20.], kinds=[])))
    assert 'noise multiplier 1.36, poisson sampling at rate 0.2, 150 steps; with a Gaussian query of noise multiplier 20 on all patients)' in one

def test_every_number_of_the_paragraph_is_in_the_record():
    numbers = set(re.findall(r'\d[\d\u202f.]*(?:e-?\d+)?', methods_paragraph(FACTS).replace('max(AUROC, 1', '').replace('95%', '')))
    said = {n.rstrip('.').replace('\u202f', '') for n in numbers}
    known = {f'{v:g}' for v in _flat(FACTS)} | {'7.99', '1.7e-04', '50', '9'}            # ε, δ as written, a share in per cent, resnet9
    assert said <= known, said-known

def _flat(o):
    if isinstance(o, dict): return [x for v in o.values() for x in _flat(v)]
    if isinstance(o, list): return [x for v in o for x in _flat(v)]
    return [o] if isinstance(o, (int, float)) and not isinstance(o, bool) else []

def test_what_must_not_be_claimed():
    said = methods_paragraph(dict(train=SPENT | dict(private=False)))
    assert 'no privacy guarantee' in said and '7.99' not in said and 'ε' not in said
    for word in ('anonymous', 'safe', 'protects'): assert word not in methods_paragraph(FACTS)
    predictions = methods_paragraph(dict(data=dict(predictions=['a.csv'], labels=['x'])))
    assert 'not known here' in predictions and 'split' not in predictions and 'We used' not in predictions
    assert 'flatters' in methods_paragraph(dict(evaluate=FACTS['evaluate'] | dict(rule='youden_on_test', chosen_on='test')))
    assert 'validation' not in methods_paragraph(dict(evaluate=FACTS['evaluate'] | dict(rule='given', chosen_on='none', given=.5)))
    with pytest.raises(DataError, match='no record'): methods_paragraph({})


# ---------------------------------------------------------------- what `assess` says of predictions

def two(n=300): return [fake_predictions(n, auroc=a, model=m, noise_seed=i) for i,(m,a) in enumerate([('public', .9), ('private', .75)])]

def test_assessment_is_recorded_and_written(tmp_path):
    preds, a, b = joined(*two(), ('x', 'y'))
    run = open_run(tmp_path/'r', {}); found = assess(preds, [(b, a)], n_boot=200); write_assessment(run, found)
    text = (run.path/'methods.txt').read_text()
    assert 'private was compared with public' in text and "rule 'youden' on validation rows" in text and '200 bootstrap resamples of patients' in text
    for f in run.path.rglob('*'):
        if f.is_file(): assert not [i for i in preds.df.patient_id.unique() if i in f.read_text(encoding='utf-8')], f
    for name in ('performance', 'groups', 'gaps', 'calibration', 'comparison'):
        assert {f.suffix for f in (run.path/'paper').glob(f'{name}.*')} == {'.csv', '.md', '.tex'}

def test_thresholds_do_not_read_the_test_rows():
    preds = two()[0]
    flipped = preds.df.assign(y_effusion=preds.df.y_effusion.where(preds.df.split != 'test', 1-preds.df.y_effusion))
    a, b = (assess(Predictions(d, preds.labels), n_boot=10).tables['utility'].threshold for d in (preds.df, flipped))
    assert a[:2].tolist() == b[:2].tolist()

@pytest.mark.parametrize('spoil,words', [(lambda d: d[d.split != 'test'], 'no rows with split'), (lambda d: d.iloc[::2], 'only one of the two'),
                                         (lambda d: d.assign(y_effusion=1-d.y_effusion), 'labels of'), (lambda d: d.assign(patient_id='p'), 'patients of'),
                                         (lambda d: pd.concat([d, d]), 'occur twice'), (lambda d: d.assign(score_effusion=np.nan), 'effusion|NaN|score')])
def test_predictions_that_do_not_match(spoil, words):
    a, b = two()
    preds, one, other = joined(a, Predictions(spoil(b.df), b.labels), ('x', 'y'))
    with pytest.raises(DataError, match=words): assess(preds, [(other, one)], n_boot=10)

def test_degenerate_predictions_have_reasons():
    d = two()[0].df
    one_class = assess(Predictions(d.assign(y_effusion=0.), ('effusion', 'cardiomegaly')), threshold=.5, n_boot=20).tables['utility'].set_index('label')
    assert one_class.note['effusion'].startswith('only negatives') and np.isnan(one_class.auroc['effusion'])
    constant = assess(Predictions(d.assign(score_effusion=.5), ('effusion',)), n_boot=20).tables['utility']
    assert constant.note[0] == 'all scores are equal' and constant.auroc[0] == .5
    lone = assess(Predictions(d.assign(patient_id='p', split='test'), ('effusion',)), threshold=.5, n_boot=20).tables['utility']
    assert np.isnan(lone.auroc_lo[0]) and lone.note[0]

def test_p_values(): assert [p_text(p) for p in (np.nan, 0., .00099, .001, .0496, 1.)] == ['–', '<0.001', '<0.001', '0.001', '0.050', '1.000']
def test_empty_markdown(): assert to_markdown(pd.DataFrame(dict(a=[]))).count('\n') >= 2
