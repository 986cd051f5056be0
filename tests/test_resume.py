"A command that is killed at any moment and repeated with --resume ends in the files of one that ran through"
import json, os, random, shutil, signal, subprocess, sys, time
from pathlib import Path

import pandas as pd, pytest
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parent.parent
DATA = ['--n_patients', '40', '--size', '32']
GAME = ['--epochs', '2', '--bs', '4', '--every', '2', '--device', 'cpu']
PANEL = ['--epochs', '2', '--utility_epochs', '1', '--archs', 'small_resnet,small_resnet', '--draws', '2', '--bs', '4', '--every', '3', '--n_boot', '10', '--device', 'cpu']

# One process does the imports and forks a child for each command: a start costs more than these trainings
SERVER = '''
import os, sys, io, signal, threading
import torch; torch.set_num_threads(1)
from medprivacy import cli
from fastcore.script import anno_parser
for line in sys.stdin:
    log, command, *args = line.rstrip('\\n').split('\\t')
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(log, os.O_WRONLY|os.O_CREAT|os.O_TRUNC), 1); os.dup2(1, 2)
        f = getattr(cli, 'medprivacy_'+command)
        kw = vars(anno_parser(f.__wrapped__).parse_args(args)); kw.pop('pdb'); kw.pop('xtra')
        try: f(**kw)
        except SystemExit as e: sys.stdout.flush(); os._exit(e.code or 0)
        except BaseException:
            import traceback; traceback.print_exc(); sys.stdout.flush(); os._exit(1)
        sys.stdout.flush(); os._exit(0)
    print(pid, flush=True)
    _, status = os.waitpid(pid, 0)
    print(-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status), flush=True)
'''


class Commands:
    "Runs commands in processes of their own and may kill them"
    def __init__(self, folder):
        self.log = str(folder/'log.txt')
        env = {**os.environ, 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'Agg', 'WANDB_MODE': 'offline', 'HOME': str(folder)}
        self.p = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=ROOT)
    def __call__(self, command, *args, kill=None):
        "Exit code, or -9 when it was killed; `kill`: function that returns when the moment has come, or None when the command ended before"
        self.p.stdin.write('\t'.join([self.log, command, *map(str, args)]) + '\n'); self.p.stdin.flush()
        pid = int(self.p.stdout.readline())
        if kill: kill(pid)
        return int(self.p.stdout.readline())
    def said(self): return Path(self.log).read_text()


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    c = Commands(tmp_path_factory.mktemp('commands'))
    yield c
    c.p.stdin.close(); c.p.wait(); c.p.stdout.close()


def alive(pid): return Path(f'/proc/{pid}/stat').exists() and ') Z ' not in Path(f'/proc/{pid}/stat').read_text()

def kill_when(ready):
    "Kill as soon as `ready()`, or not at all when the command ends before"
    def kill(pid):
        while alive(pid) and not ready(): time.sleep(.002)
        if alive(pid): os.kill(pid, signal.SIGKILL)
    return kill

def kill_after(seconds):
    end = time.monotonic() + seconds
    return kill_when(lambda: time.monotonic() > end)


@pytest.fixture(scope='module')
def whole(run, tmp_path_factory):
    "Obfuscator and attack, never interrupted"
    out = tmp_path_factory.mktemp('whole')/'run'
    t0 = time.monotonic(); assert run('obfuscate', '--out', out, *DATA, *GAME) == 0, run.said()
    t1 = time.monotonic(); assert run('attack', '--out', out, '--resume', *PANEL) == 0, run.said()
    return out, t1-t0, time.monotonic()-t1


def same_model(a, b):
    x, y = (load_file(o/'model'/'weights.safetensors') for o in (a, b))
    return x.keys() == y.keys() and all((x[k] == y[k]).all() for k in x) and (a/'metrics.csv').read_bytes() == (b/'metrics.csv').read_bytes()

def same_attack(a, b):
    for f in sorted((a/'predictions').glob('*.parquet')):
        x, y = (pd.read_parquet(o/'predictions'/f.name) for o in (a, b))
        if not x.drop(columns='run').equals(y.drop(columns='run')): return False
    return all((a/'tables'/f).read_bytes() == (b/'tables'/f).read_bytes() for f in ('attack.csv', 'history.csv', 'utility.csv'))

def copy_of_obfuscated(whole, to):
    "The whole run as it was before the attack"
    shutil.copytree(whole, to, ignore=shutil.ignore_patterns('predictions', 'tables', 'figures'))
    shutil.copytree(whole/'predictions'/'fits', to/'predictions'/'fits', ignore=lambda d, names: [n for n in names if not n.startswith('obfuscate')])
    (to/'record.json').write_text(json.dumps({k: v for k, v in json.loads((to/'record.json').read_text()).items() if k in ('data', 'split', 'obfuscate')}))
    text = (to/'config.toml').read_text(); (to/'config.toml').write_text(text[:text.index('[attack]')])


@pytest.mark.parametrize('seed', [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2, 3))])
def test_obfuscate_killed_at_random(run, whole, tmp_path, seed):
    "Killed after its first state (or its folder) was there, then at random moments"
    ref, took, _ = whole; rng, out = random.Random(seed), tmp_path/'run'
    killed = run('obfuscate', '--out', out, *DATA, *GAME, kill=kill_when(lambda: (out/'config.toml').exists() and next((out/'checkpoints').rglob('*.safetensors'), None) if seed == 0 else (out/'config.toml').exists()))
    assert killed == -9
    for _ in range(1 + (seed > 0)): run('obfuscate', '--out', out, '--resume', *DATA, *GAME, kill=kill_after(rng.uniform(0, took)))
    assert run('obfuscate', '--out', out, '--resume', *DATA, *GAME) == 0, run.said()
    assert same_model(ref, out) and not (out/'checkpoints').exists() and not [f for f in out.rglob('.*') if f.is_file()]


@pytest.mark.parametrize('seed', [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2, 3))])
def test_attack_killed_at_random(run, whole, tmp_path, seed):
    "Killed in a training, then at random; attackers that were done are not trained again"
    ref, _, took = whole; rng, out = random.Random(seed), tmp_path/'run'
    copy_of_obfuscated(ref, out); fits = out/'predictions'/'fits'
    first = 'attack-raw-1' if seed == 0 else 'attack-obfuscated-0'
    assert run('attack', '--out', out, '--resume', *PANEL, kill=kill_when(lambda: next((out/'checkpoints').glob(f'{first}*/*.safetensors'), None))) == -9
    done = {f.name: f.stat().st_mtime_ns for f in fits.glob('attack-*.json')}; assert done
    for _ in range(1 + (seed > 0)): run('attack', '--out', out, '--resume', *PANEL, kill=kill_after(rng.uniform(0, took)))
    assert run('attack', '--out', out, '--resume', *PANEL) == 0, run.said()
    assert same_attack(ref, out) and not (out/'checkpoints').exists() and 'is stored already' in run.said()
    assert {n: (fits/n).stat().st_mtime_ns for n in done} == done
    assert (out/'summary.json').read_text() == (ref/'summary.json').read_text()


def test_finished_runs_are_read_back(run, whole):
    "A finished run with --resume: nothing is trained, the same tables are written; data options may be repeated"
    ref, _, _ = whole; before = {f: f.read_bytes() for f in (ref/'predictions').rglob('*') if f.is_file()}
    tables = {f: f.read_bytes() for f in (ref/'tables').iterdir()}
    assert run('obfuscate', '--out', ref, '--resume', *DATA, *GAME) == 0 and 'is trained already' in run.said()
    assert run('attack', '--out', ref, '--resume', *PANEL) == 0 and run.said().count('is stored already') == 8
    assert {f: f.read_bytes() for f in before} == before and {f: f.read_bytes() for f in tables} == tables


@pytest.mark.parametrize('command,args,words', [
    ('obfuscate', [*GAME, '--epochs', '4'], 'epochs: 2 then, 4 now'), ('obfuscate', [*GAME, '--precision', 'bf16'], 'precision: fp32 then, bf16 now'),
    ('obfuscate', [*GAME, '--n_patients', '41'], 'n_patients: 40 then, 41 now'), ('attack', [*PANEL, '--patience', '2'], 'patience: none then, 2 now'),
    ('attack', [*PANEL, '--attribute', 'age>median'], "is about 'sex'"), ('attack', [*PANEL, '--csv', 'other.csv', '--labels', 'a'], 'other data'),
    ('attack', [*PANEL, '--overwrite'], 'choose one'), ('train', ['--precision', 'fp16'], '--precision'), ('train', ['--wandb', 'on'], '--wandb'),
    ('train', ['--wandb_images'], '--wandb_images needs'), ('obfuscate', [*GAME, '--every', '0'], '--every')])
def test_other_settings_are_named(run, whole, command, args, words):
    "One line, exit code 2, the run untouched"
    ref, _, _ = whole; before = {f: f.read_bytes() for f in ref.rglob('*') if f.is_file()}
    assert run(command, '--out', ref, '--resume', *args) == 2
    said = run.said(); assert words in said and said.startswith('error: ') and said.count('\n') == 1
    assert {f: f.read_bytes() for f in ref.rglob('*') if f.is_file()} == before


def test_attack_waits_for_its_obfuscator(run, tmp_path):
    "A run whose obfuscator was broken off is not attacked as if it had none"
    out = tmp_path/'run'
    assert run('obfuscate', '--out', out, *DATA, *GAME, kill=kill_when(lambda: (out/'checkpoints').exists())) == -9
    assert run('attack', '--out', out, '--resume', *PANEL) == 2 and 'medprivacy_obfuscate --resume' in run.said()


def test_train_keeps_what_is_done(run, tmp_path):
    "The classifier without privacy is the same after a kill; private results are read back with their terms; wandb stays in the run folder"
    small = ['--epochs', '1', '--private_epochs', '1', '--bs', '8', '--private_bs', '4', '--n_boot', '10', '--device', 'cpu', '--every', '2', '--epsilon', '8,50']
    ref, out = tmp_path/'ref', tmp_path/'run'
    assert run('train', '--out', ref, *DATA, *small, '--wandb', 'offline') == 0, run.said()
    fits = out/'predictions'/'fits'
    assert run('train', '--out', out, *DATA, *small, kill=kill_when(lambda: (fits/'train-eps8.json').exists())) == -9
    spent = json.loads((fits/'train-eps8.json').read_text())['more']
    assert run('train', '--out', out, '--resume', *small) == 0, run.said()
    assert json.loads((out/'privacy.json').read_text()) == spent and len(json.loads((out/'record.json').read_text())['train']['all_eps']) == 2
    a, b = (pd.read_parquet(o/'predictions'/'disease.parquet').query('model == "public"').drop(columns='run') for o in (ref, out))
    assert a.equals(b)
    logs = list((ref/'wandb').rglob('*.wandb')); ids = pd.read_csv(ref/'phantoms'/'labels.csv', dtype=str)[['patient_id', 'image_id']].stack().unique()
    assert len(logs) == 1 and b'valid_loss' in logs[0].read_bytes()    # of the classifier without privacy alone
    for f in (ref/'wandb').rglob('*'):
        if f.is_file(): assert not [i for i in ids if i.encode() in f.read_bytes()] and f.suffix not in ('.png', '.jpg')
    for eps in ('none', '8'):
        solo = ['--epochs', '1', '--private_epochs', '1', '--bs', '8', '--private_bs', '4', '--n_boot', '10', '--device', 'cpu', '--epsilon', eps, '--precision', 'bf16']
        assert run('train', '--out', tmp_path/eps, *DATA, *solo) == 0, run.said()
        assert ('private.epsilon' in (tmp_path/eps/'summary.json').read_text()) == (eps == '8')
