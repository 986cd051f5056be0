"Sentences follow the numbers: who leaks, which control failed, which attacker is no evidence, which term of ε is missing"
import re

import numpy as np
import pandas as pd
import pytest

from medprivacy.core import DataError
from medprivacy.findings import (EVIDENCE, NOISE_FLOOR, attack_findings, control_findings, non_claims, privacy_terms, sample_size,
                                 utility_findings, with_interval)

SPENT = dict(eps=3.2, delta=1e-5, accountant='prv', sampling='poisson', neighbours='add-remove', unit='patient')


def attack(models=('net_a', 'net_b', 'strongest'), half=.03, **leak):
    leak = dict(raw=.98, obfuscated=.61, noise=.94, shuffled=.52) | leak
    rows = [(c, m, v, v-half, min(v+half, 1), 200, 100) for c,v in leak.items() if v is not None for m in models]
    return pd.DataFrame(rows, columns='condition model leakage lo hi n n_patients'.split())

def warnings_of(fs): return [f.text for f in fs if f.kind == 'warning']
def auroc(v, half=.06): return dict(value=v, lo=v-half, hi=v+half, n=200)


@pytest.mark.parametrize('row,text', [(dict(value=.8735, lo=.861, hi=.884), '0.874 [0.861, 0.884]'), (dict(value=.5), '0.500'),
                                      (dict(value=.5, lo=np.nan, hi=np.nan), '0.500'), (dict(value=np.nan), '–'), ({}, '–')])
def test_number_with_interval(row, text): assert with_interval(row) == text

def test_sample_size():
    assert sample_size(dict(n=20., n_patients=10.)) == 'n = 20 images of 10 patients'
    assert sample_size(dict(n=np.nan)) == 'n not stored' and sample_size(dict(n=20.)) == 'n = 20 images'

def test_every_estimate_in_a_sentence_has_interval_and_size():
    for f in attack_findings(attack()) + control_findings(attack(), auroc(.5)):
        if 'leakage 0.' in f.text: assert re.search(r'\[\d\.\d{3}, \d\.\d{3}\]', f.text) and 'images of 100 patients' in f.text

@pytest.mark.parametrize('raw,weak', [(EVIDENCE, 0), (EVIDENCE+.01, 0), (EVIDENCE-.001, 3), (.6, 3), (np.nan, 3)])
def test_attackers_that_fail_on_raw_are_flagged(raw, weak):
    said = warnings_of(attack_findings(attack(raw=raw)))
    assert sum('no evidence' in t for t in said) == weak

def test_attacker_never_tried_on_raw():
    df = attack()
    df = df[~((df.model == 'net_b') & (df.condition == 'raw'))]
    assert any('net_b was not tested on raw' in t for t in warnings_of(attack_findings(df)))

def test_one_attacker_is_not_enough(): assert any('Fewer than two' in t for t in warnings_of(attack_findings(attack(('net_a', 'strongest')))))

@pytest.mark.parametrize('obf,shown', [(.61, True), (.94, True), (.955, False), (.99, False)])
def test_no_protection(obf, shown):
    assert any('no protection' in t for t in warnings_of(attack_findings(attack(obfuscated=obf)))) is not shown

def test_real_images_are_not_called_phantoms():
    said = ' '.join(warnings_of(attack_findings(attack(raw=.8), phantom=False)))
    assert 'phantom' not in said and 'below 0.95' in said

def test_nothing_attacked(): assert 'nothing is known' in warnings_of(attack_findings(attack(obfuscated=None)))[0]

def test_attack_table_without_columns():
    with pytest.raises(DataError, match="'leakage'"): attack_findings(attack().drop(columns='leakage'))


@pytest.mark.parametrize('v,ok', [(.5, True), (.47, True), (.5+2.9*.06/1.96, True), (.5+3.1*.06/1.96, False), (.3, False), (.9, False)])
def test_shuffled_control_within_three_standard_errors(v, ok):
    assert (control_findings(attack(), auroc(v))[1].kind == 'holds') is ok

def test_every_headline_says_what_it_counts():
    s = {f'{c}.disease.auroc': auroc(.8) for c in ('raw', 'obfuscated', 'private')}
    for f in control_findings(attack(), auroc(.5)) + utility_findings(s, SPENT):
        if 'AUROC' in f.text: assert 'n = 200 images' in f.text

@pytest.mark.parametrize('row', [None, {}, dict(value=.5), dict(value=.5, lo=None, hi=None)])
def test_shuffled_control_missing(row): assert 'was not run' in control_findings(attack(), row)[1].text

@pytest.mark.parametrize('noise,phantom,kind', [(.94, True, 'holds'), (NOISE_FLOOR-.01, True, 'warning'), (NOISE_FLOOR-.01, False, 'holds'),
                                                (.62, False, 'warning'), (None, True, 'warning')])
def test_noise_control(noise, phantom, kind): assert control_findings(attack(noise=noise), auroc(.5), phantom=phantom)[0].kind == kind


@pytest.mark.parametrize('term,name', [('delta', 'δ'), ('sampling', 'sampling'), ('neighbours', 'neighbours'), ('accountant', 'accountant'), ('unit', 'unit')])
def test_each_term_of_epsilon(term, name):
    t = privacy_terms({k: v for k,v in SPENT.items() if k != term}).set_index('term').value
    assert t[name] == 'missing' and (t == 'missing').sum() == 1
    said = utility_findings({'private.disease.auroc': auroc(.8)}, {k: v for k,v in SPENT.items() if k != term})
    assert said[-1].kind == 'warning'

def test_several_kinds_of_steps():
    t = privacy_terms({**SPENT, 'steps': 30, 'noise_multiplier': None, 'extra': (), 'kinds': ((1., .1, 10), (2., .2, 20))})
    assert t.value[t.term == 'steps of one kind'].tolist() == ['10 at rate 0.1 with noise multiplier 1', '20 at rate 0.2 with noise multiplier 2']
    assert not {'extra', 'kinds', 'noise multiplier'} & set(t.term)

def test_a_delta_is_written_with_few_digits(): assert privacy_terms({**SPENT, 'delta': 1/6000}).value[1] == '0.0001667'


def test_zero_epsilon_is_not_missing(): assert privacy_terms({**SPENT, 'eps': 0.}).value[0] == '0'
def test_test_mode_is_void(): assert 'void' in utility_findings({'private.disease.auroc': auroc(.8)}, {**SPENT, 'private': False})[-1].text

@pytest.mark.parametrize('raw,obf,text', [(.9, .85, '0.050 lower'), (.85, .9, '0.050 higher')])
def test_cost_has_a_direction(raw, obf, text):
    s = {'raw.disease.auroc': auroc(raw), 'obfuscated.disease.auroc': auroc(obf)}
    assert text in utility_findings(s)[0].text

def test_private_without_terms(): assert 'proves no privacy' in utility_findings({'private.disease.auroc': auroc(.8)})[-1].text
def test_missing_values_say_nothing(): assert utility_findings({'raw.disease.auroc': dict(value=None), 'obfuscated.disease.auroc': {}}) == []

def test_words():
    said = ' '.join(f.text for f in attack_findings(attack()) + control_findings(attack(), auroc(.5))).lower()
    assert not re.search(r'anonym|safe|differential|guarantee', said)       # obfuscation is empirical
    assert any('not anonymous' in s for s in non_claims(False)) and any('identity' in s for s in non_claims(False))
