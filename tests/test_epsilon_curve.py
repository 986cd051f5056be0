import json
import os
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from medprivacy.core import CheckpointError, ConfigError, LeakageError, open_run, read_table_of
from medprivacy.data.core import load_predictions, read_table
from medprivacy.data.load import records_dls
from medprivacy.data.phantom import tiny_records
from medprivacy.data.split import split_patients
from medprivacy.epsilon_curve import DP_CXR, DP_CXR_TUNED, EPSILONS, curve_jobs, private_curve, run_dp_cxr
from medprivacy.models.resnet import _read_state, create_classifier
from medprivacy.probe import ProbeLoss, probe_predictions

DATA  = dict(data=dict(phantom=True, modality='cxr', seed=0, name='cxr phantoms'), attribute='sex')
SMALL = dict(epsilons=(1., 8.), arch='small_resnet', size=32, bs=8, epochs=1, private_epochs=1, n_boot=20, device='cpu',
             start_args=dict(n_patients=24, epochs=1, bs=16))

def test_the_preset_is_the_published_recipe():
    want = dict(arch='resnet9', optimizer='nadam', lr=2e-4, max_grad_norm=1.5, bs=128, physical_bs=32, delta=6e-6,
                unit='patient', epsilons=(.29, .54, 1.06, 2.04, 4.71, 7.89))
    assert want.items() <= DP_CXR.items() and DP_CXR['start'] == 'phantoms'
    assert [j.target for j in curve_jobs(EPSILONS)] == [np.inf, 7.89, 4.71, 2.04, 1.06, .54, .29]

@pytest.fixture(scope='module')
def done(tmp_path_factory):
    "A finished small curve"
    run  = open_run(tmp_path_factory.mktemp('curve')/'run', DATA)
    recs = tiny_records(36, size=32)
    return run, recs, run_dp_cxr(run, recs, SMALL)

def test_a_run_holds_table_terms_weights_report_and_says_where_it_started(done):
    run, recs, table = done
    mean = table[(table.label == 'macro') & (table['by'] == 'all')].set_index('condition')
    assert mean.index.tolist() == ['public', 'private', 'private ε=1', 'start', 'untrained']
    assert mean.epsilon['public'] == np.inf and mean.epsilon['start'] == mean.epsilon['untrained'] == 0
    assert 7 < mean.epsilon['private'] <= 8 and .9 < mean.epsilon['private ε=1'] <= 1
    assert {'all', 'F', 'M'} < set(table.group) and set(table.label) == {*recs.labels, 'macro'}
    assert mean.p[['private', 'private ε=1']].between(0, 1).all()
    budgets = read_table_of(run, 'budgets')
    assert budgets.noise_multiplier.is_monotonic_increasing and (budgets.delta == 6e-6).all()
    privacy = json.loads((run.path/'privacy.json').read_text(encoding='utf-8'))
    assert privacy['unit'] == 'patient' and privacy['eps'] == pytest.approx(mean.epsilon['private'])
    for f in ('public', 'eps_8', 'eps_1'): assert (run.path/'model'/f'{f}.safetensors').exists()
    page = (run.path/'report.html').read_text(encoding='utf-8')
    said = (run.path/'methods.txt').read_text(encoding='utf-8')
    for text in (page, said): assert 'differentially private NAdam' in text and '22 other patients (seed 1)' in text
    assert 'spends the sum' in page and 'figures' and (run.path/'figures'/'eps.png').exists()
    assert (run.path/'figures'/'eps_sex.png').exists()
    assert not {'image_id', 'patient_id'} & set(table.columns)

def test_a_finished_curve_is_not_trained_again_and_other_settings_are_refused(done, capsys):
    run, recs, table = done
    weights = {f: f.stat().st_mtime_ns for f in (run.path/'model').iterdir()}
    again   = private_curve(run, recs, **{**DP_CXR, **SMALL})
    assert weights == {f: f.stat().st_mtime_ns for f in (run.path/'model').iterdir()}
    assert capsys.readouterr().out.count('stored already') == 3
    pd.testing.assert_frame_equal(again, table)
    with pytest.raises(ConfigError, match='other settings'): private_curve(run, recs, **{**DP_CXR, **SMALL, 'lr': 1e-3})
    with pytest.raises(CheckpointError, match='made otherwise'):
        private_curve(run, tiny_records(36, size=32, seed=5), **{**DP_CXR, **SMALL})

KILLED = '''
import os, signal, sys, torch
torch.set_num_threads(1)
from medprivacy.core import open_run
from medprivacy.data.phantom import read_phantom
from medprivacy.data.split import split_patients
from medprivacy.dp.callback import DPCallback
import medprivacy.epsilon_curve as e
taken = 0
def step(self):
    global taken
    taken += 1
    if self.target_epsilon == 1 and taken == 4: os.kill(os.getpid(), signal.SIGKILL)
DPCallback.after_step = step
recs = split_patients(read_phantom(sys.argv[2]), (.5, .25, .25), stratify='sex', seed=0)
e.private_curve(open_run(sys.argv[1]), recs, **{**e.DP_CXR, **eval(sys.argv[3])})
'''

def test_a_killed_run_gives_the_remaining_epsilons_only(tmp_path, capsys):
    recs = tiny_records(36, size=32, root=tmp_path/'images')
    recs = split_patients(recs, (.5, .25, .25), stratify='sex', seed=0)
    run  = open_run(tmp_path/'run', DATA)
    args = [sys.executable, '-c', KILLED, str(run.path), str(tmp_path/'images'), repr({**SMALL, 'every': 1})]
    got  = subprocess.run(args, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert got.returncode == -signal.SIGKILL, got.stderr
    assert {f.stem for f in (run.path/'model').iterdir()} == {'public', 'eps_8'}
    before = (run.path/'model'/'eps_8.safetensors').read_bytes()
    table  = private_curve(run, recs, **{**DP_CXR, **SMALL, 'every': 1})
    out    = capsys.readouterr().out
    assert out.count('stored already') == 2 and 'private ε=1: epoch 1 of 1' in out and 'pretraining' not in out
    assert (run.path/'model'/'eps_8.safetensors').read_bytes() == before
    assert set(table.condition) == {'public', 'private', 'private ε=1', 'start', 'untrained'}
    assert table.epsilon[table.condition == 'private ε=1'].max() <= 1    # what the killed training spent is inside

def test_repeats_are_one_condition(tmp_path):
    run   = open_run(tmp_path/'run', DATA)
    table = private_curve(run, tiny_records(80, size=32), **{**SMALL, 'epsilons': (8.,), 'start': None, 'repeats': 2})
    mean  = table[(table.label == 'macro') & (table['by'] == 'all')].set_index('condition')
    assert mean.index.tolist() == ['public', 'private', 'untrained']
    assert mean.trainings.tolist() == [2, 2, 1] and (mean.spread[:2] >= 0).all()

def test_the_tuned_recipe_trains_the_last_layer_from_zero(tmp_path):
    run   = open_run(tmp_path/'run', DATA)
    recs  = tiny_records(36, size=32)
    table = run_dp_cxr(run, recs, {**DP_CXR_TUNED, **SMALL})
    mean  = table[(table.label == 'macro') & (table['by'] == 'all')].set_index('condition')
    assert mean.auroc['untrained'] == mean.lo['untrained'] == mean.hi['untrained'] == .5 and mean.epsilon['private'] <= 8
    start, public, private = [_read_state(f) for f in (run.path/'start'/'weights.safetensors',
                                                       *[run.path/'model'/f'{f}.safetensors' for f in ('public', 'eps_8')])]
    moved = lambda a, b: {k for k in a if not torch.equal(a[k], b[k])}
    assert moved(start, private) == {'fc.weight', 'fc.bias'} and len(moved(start, public)) > 10
    model = create_classifier('small_resnet', 3, 1, run.path/'model'/'eps_8.safetensors')
    whole = probe_predictions(model, records_dls(recs, size=32, device='cpu'), ProbeLoss('binary'), recs.labels, 'm')
    kept  = load_predictions(run.path/'predictions'/'disease.parquet', recs.labels, 'multilabel').df.query('model == "private"')
    assert np.allclose(whole.df.score_opacity, kept.score_opacity, atol=1e-5) and kept.score_opacity.std() > 0
    assert 'NAdam of the last layer alone, both from weights' in (run.path/'methods.txt').read_text(encoding='utf-8')
    assert run.record['train']['trained'] == 'head' and run.record['train']['private_lr'] == DP_CXR_TUNED['private_lr']

def test_what_would_void_epsilon_is_refused_before_work(tmp_path):
    recs = tiny_records(24, size=32)
    for change,error,match in ((dict(start_args=dict(seed=0)), LeakageError, 'another seed'),
                               (dict(delta=.2), ConfigError, 'one over the number'),
                               (dict(epsilons=(0.,)), ConfigError, 'positive'),
                               (dict(head='kept', start=None), ConfigError, 'needs a start'),
                               (dict(trained='head', start=None), ConfigError, 'needs a start'),
                               (dict(trained='body'), ConfigError, 'trained'),
                               (dict(optimizer='lion'), ConfigError, 'nadam')):
        run = open_run(tmp_path/'run', DATA, overwrite=(tmp_path/'run').exists())
        with pytest.raises(error, match=match): private_curve(run, recs, **{**DP_CXR, **SMALL, **change})
        assert not (run.path/'model').exists()

def test_a_start_from_a_run_on_other_patients(done, tmp_path):
    source = done[0].path
    run    = open_run(tmp_path/'run', dict(DATA, data=dict(DATA['data'], seed=3)))
    recs   = tiny_records(24, size=32, seed=3)
    small  = {**SMALL, 'epsilons': (8.,), 'start': source, 'start_args': None}
    table  = private_curve(run, recs, **small)
    assert set(table.condition) == {'public', 'private', 'untrained'}    # whether its own head fits is not known
    assert 'promises nothing' in run.record['train']['start']
    with pytest.raises(LeakageError, match='void'):
        private_curve(open_run(tmp_path/'same', DATA), tiny_records(24, size=32), **small)

@pytest.mark.real
def test_on_real_photographs(real_data, tmp_path):
    folder = real_data('odir-fundus')
    recs   = read_table(folder/'labels.csv', folder, ['cataract', 'myopia'], folder='images', name='odir-fundus')
    few    = recs.df.patient_id.drop_duplicates().head(150)
    recs   = split_patients(recs.select(where=recs.df.patient_id.isin(few)), (.5, .2, .3), stratify='sex', seed=0)
    run    = open_run(tmp_path/'run', dict(data=dict(phantom=False, name='odir-fundus', seed=0), attribute='sex'))
    table  = run_dp_cxr(run, recs, {**SMALL, 'epsilons': (8.,), 'bs': 16})
    mean   = table[(table.label == 'macro') & (table['by'] == 'all')].set_index('condition')
    assert mean.index.tolist() == ['public', 'private', 'untrained']    # other findings: the start's head is not judged
    assert mean.auroc.between(0, 1).all()
    assert 'fundus phantom images' in run.record['train']['start']
    page = (run.path/'report.html').read_text(encoding='utf-8')
    assert not any(i in page for i in recs.df.image_id.head(20))
