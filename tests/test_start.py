import json

import pytest
import torch

from medprivacy.core import CheckpointError, ConfigError, LeakageError, add_record, open_run
from medprivacy.models.resnet import create_classifier
from medprivacy.start import START, check_other_patients, start_weights, started_model, weights_file, write_weights

KW = dict(arch='small_resnet', size=32, device='cpu')

def run_of(path, seed=0, phantom=True):
    return open_run(path, dict(data=dict(phantom=phantom, modality='cxr', seed=seed, name='x'), attribute='sex'))

def test_pretraining_on_phantoms_can_be_repeated_and_names_its_patients(tmp_path):
    args = dict(n_patients=20, epochs=1, bs=8)
    got  = [start_weights(run_of(tmp_path/n), 'phantoms', args, **KW) for n in 'ab']
    assert got[0][0].read_bytes() == got[1][0].read_bytes() and got[0][1] == got[1][1]
    assert got[0][1]['settings']['seed'] == 1 and 'other patients (seed 1)' in got[0][1]['said']
    other = start_weights(run_of(tmp_path/'c'), 'phantoms', dict(args, seed=2), **KW)
    assert other[0].read_bytes() != got[0][0].read_bytes()

@pytest.mark.parametrize('head', ['new', 'kept'])
def test_only_the_head_is_drawn_again(tmp_path, head):
    file = write_weights(tmp_path/'w.safetensors', create_classifier('resnet9', 3, 1))
    a, b = create_classifier('resnet9', 3, 1, file).state_dict(), started_model(file, 'resnet9', 3, head=head).state_dict()
    for k in a: assert torch.equal(a[k], b[k]) == (head == 'kept' or not k.startswith('fc.')), k
    wide = started_model(file, 'resnet9', 5, 3).state_dict()    # other findings, colour
    assert wide['fc.weight'].shape == (5, 512) and wide['conv1.weight'].shape[1] == 3
    assert torch.equal(wide['layer1.0.conv1.weight'], a['layer1.0.conv1.weight'])

def test_patients_that_are_to_be_protected_are_recognised(tmp_path):
    run, real = run_of(tmp_path/'run'), run_of(tmp_path/'real', phantom=False)
    for r,h in ((run, 'aa'), (real, 'bb')): add_record(r, 'split', hash=h)
    cases = dict(same_phantoms=run_of(tmp_path/'1'), other_seed=run_of(tmp_path/'2', 5))
    add_record(cases['other_seed'], 'split', hash='cc')
    with pytest.raises(LeakageError): check_other_patients(run, cases['same_phantoms'].path)
    check_other_patients(run, cases['other_seed'].path)
    twin = run_of(tmp_path/'3', 9, phantom=False); add_record(twin, 'split', hash='bb')
    with pytest.raises(LeakageError): check_other_patients(real, twin.path)
    file = write_weights(twin.path/'model'/'public.safetensors', create_classifier('small_resnet', 3, 1))
    with pytest.raises(LeakageError): start_weights(real, file, **KW)
    assert start_weights(run, twin.path, **KW)[0] == file

def test_what_cannot_be_a_start(tmp_path):
    run = run_of(tmp_path/'run')
    model = create_classifier('small_resnet', 3, 1)
    for n in 'ab': write_weights(tmp_path/'two'/f'{n}.safetensors', model)
    with pytest.raises(CheckpointError, match='2 files'): weights_file(tmp_path/'two')
    with pytest.raises(CheckpointError, match='no weights'): start_weights(run, tmp_path/'none.safetensors', **KW)
    with pytest.raises(ConfigError, match='lr'): start_weights(run, 'phantoms', dict(rate=1), **KW)
    with pytest.raises(LeakageError): start_weights(run, 'phantoms', dict(seed=0), **KW)
    assert set(START) == {'modality', 'n_patients', 'seed', 'epochs', 'lr', 'bs'} and not (run.path/'start').exists()
