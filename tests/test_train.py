"Killed at any moment and continued, a training ends in the same bits; another training is refused; bfloat16 stays close"
import contextlib, io, json, os, random, signal, sys, tempfile, warnings
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
import numpy as np
import pytest, torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from medprivacy import train
from medprivacy.core import CheckpointError, ConfigError, seed_everything
from medprivacy.data.load import records_dls
from medprivacy.data.phantom import tiny_records
from medprivacy.models.resnet import create_classifier
from medprivacy.obfuscate import train_obfuscator
from medprivacy.objectives.focal import MaskedBCE
from medprivacy.probe import probe_learner, train_probe
from medprivacy.train import CheckpointCallback, checkpoint_cbs, in_precision

GAME = dict(size=32, bs=4, epochs=3, archs=('small_resnet',)*2, attacker_steps=2, device='cpu')
NARROW = dict(maker='viewmaker', maker_args=dict(width=.25, distortion_budget=.1))


def game(recs, cbs, **kw):
    o = train_obfuscator(recs, cbs=cbs, **GAME, **kw)
    return o.maker.state_dict(), o.history

def probe(recs, cbs, **kw):
    "With early stopping, the best weights kept, and released images drawn at random"
    noisy = lambda x, cond=None: (x + .2*torch.rand_like(x)).clamp(0, 1)
    p = train_probe(recs.select(part='attack'), 'sex', size=32, bs=4, epochs=4, patience=3, draws=3, mechanism=noisy, device='cpu', cbs=cbs, **kw)
    return p.model.state_dict(), p.preds.history

def ordinary(recs, cbs, checkpoint=None, every=1, resume=False):
    "Dropout, gradients accumulated over steps, torch's own optimizer, one cycle"
    seed_everything(7)
    dls   = records_dls(recs, 'labels', 32, 4, device='cpu')
    model = nn.Sequential(create_classifier('small_resnet', len(recs.labels), 1), nn.Dropout(.4))
    learn = Learner(dls, model, loss_func=MaskedBCE(), opt_func=lambda p, **kw: OptimWrapper(p, torch.optim.RMSprop, **kw),
                    cbs=[GradientAccumulation(8), *cbs, *checkpoint_cbs(checkpoint, every, resume)])
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(3, 1e-3)
    return model.state_dict(), [list(v) for v in learn.recorder.values]

TRAININGS = dict(bottleneck=game, viewmaker=lambda r, c, **kw: game(r, c, **NARROW, **kw), probe=probe, ordinary=ordinary,
                 first=lambda r, c, **kw: game(r, c, attackers_first=True, **NARROW, **kw))


class KillCallback(Callback):
    "End the process in the middle of a step, as the system does when memory runs out"
    run_valid = False
    def __init__(self, at): self.now = lambda step: step == at
    def after_backward(self):
        if self.now(self.train_iter): os.kill(os.getpid(), signal.SIGKILL)


def kill_in_write(n, where):
    "At the n-th write of a state: half of the file written, all of it but under its other name, or just renamed"
    real, count = train.atomic_write, [0]
    def write(path, data):
        count[0] += 1
        if count[0] < n: return real(path, data)
        if where == 'renamed': real(path, data)
        else: (path.parent/f'.{path.name}.abc').write_bytes(data[:len(data)//2] if where == 'half' else data)
        os.kill(os.getpid(), signal.SIGKILL)
    train.atomic_write = write


def forked(work, expect=0):
    "Run `work` in a process of its own"
    pid = os.fork()
    if pid == 0:
        try: work(); os._exit(0)
        except BaseException as e:
            print(f'{type(e).__name__}: {e}', file=sys.stderr, flush=True); os._exit(1)
    status = os.waitpid(pid, 0)[1]
    if status != expect: raise SystemExit(f'the child ended with {status}, expected {expect}')


def same(a, b):
    "Are weights and history equal to the bit?"
    hist = lambda h: h.drop(columns=['model'], errors='ignore').to_numpy(float) if hasattr(h, 'columns') else np.array(h, float)
    return list(a[0]) == list(b[0]) and all(torch.equal(a[0][k], b[0][k]) for k in a[0]) and np.array_equal(hist(a[1]), hist(b[1]), equal_nan=True)


def kills(name, root, seed):
    "Each moment: killed there, then continued in a new process; twice killed too"
    recs, fit = tiny_records(40, root=root/'p', size=32, attack=.5), TRAININGS[name]
    rng = random.Random(seed)
    class Count(Callback):
        def after_fit(self): (root/'n').write_text(str(self.train_iter))
    def child(i, at=-1, every=3, resume=False):
        torch.manual_seed(1000+i); random.seed(i); np.random.seed(i)      # nothing may depend on the seed of the process
        torch.save(fit(recs, [KillCallback(at)], checkpoint=root/f'c{i}', every=every, resume=resume), root/f'r{i}')
    forked(lambda: torch.save(fit(recs, [KillCallback(-1), Count()]), root/'whole'))
    whole, n = torch.load(root/'whole', weights_only=False), int((root/'n').read_text())
    moments = [dict(at=rng.randrange(3, n)), dict(at=rng.randrange(n//2, n)), dict(at=rng.randrange(0, 3)), *[dict(where=w) for w in ('half', 'whole', 'renamed')], dict(at=rng.randrange(3, n-1), twice=True)]
    for i, m in enumerate(moments):
        if 'where' in m:
            forked(lambda: (kill_in_write(rng.randrange(2, max(3, n//3)), m['where']), child(i)), signal.SIGKILL)
        else: forked(lambda: child(i, at=m['at']), signal.SIGKILL)
        if m.get('twice'): forked(lambda: child(i, at=n-1, resume=True), signal.SIGKILL)
        forked(lambda: child(i, resume=True))
        got = torch.load(root/f'r{i}', weights_only=False)
        left = [p.name for p in (root/f'c{i}').iterdir()]
        print(json.dumps(dict(moment=m, same=same(whole, got), left=left)), flush=True)


@pytest.mark.parametrize('name', [pytest.param(n, marks=pytest.mark.slow) if n in ('probe', 'viewmaker', 'first') else n for n in TRAININGS])
def test_killed_and_continued(name):
    import subprocess
    out = subprocess.run([sys.executable, __file__, name, str(random.SystemRandom().randrange(10**6))], capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    rows = [json.loads(l) for l in out.stdout.splitlines() if l.startswith('{')]
    assert out.returncode == 0 and len(rows) == 7, out.stdout + out.stderr[-3000:]
    assert [r for r in rows if not r['same']] == []
    assert all(r['left'] == ['checkpoint.safetensors'] for r in rows)


@pytest.fixture(scope='module')
def recs(tmp_path_factory): return tiny_records(20, root=tmp_path_factory.mktemp('train')/'p', size=32, attack=.5)


class CrashCallback(Callback):
    def __init__(self, at): self.now = lambda step: step == at
    def after_backward(self):
        if self.now(self.train_iter): raise KeyboardInterrupt


def crash(fit, at, **kw):
    with pytest.raises(KeyboardInterrupt): fit([CrashCallback(at)], **kw)


CHANGES = dict(seed=dict(seed=1), epochs=dict(epochs=4), rate=dict(lr=1e-3), batch=dict(bs=3), weight=dict(weight=2.), term=dict(attack='entropy'), steps=dict(attacker_steps=1), order=dict(attackers_first=True),
               precision=dict(precision='bf16'), attribute=dict(attribute='age>median'), attackers=dict(archs=('small_resnet',)), maker=dict(maker_args=dict(code=8)))
NAMES = dict(seed='seed', epochs='n_epoch', rate='schedule', batch='batches', weight='loss', term='loss', steps='callback attackers', order='callback attackers', precision='precision', attribute='attribute', attackers='model', maker='model')

@pytest.fixture(scope='module')
def begun(recs, tmp_path_factory):
    d = tmp_path_factory.mktemp('begun')
    crash(lambda cbs, **kw: train_obfuscator(recs, cbs=cbs, **{**GAME, 'epochs': 3}, **kw), 3, checkpoint=d, every=1)
    return d

@pytest.mark.parametrize('what', CHANGES)
def test_other_settings_are_refused(recs, begun, what):
    "By name, before a step is made; the state stays as it was"
    was = (begun/'checkpoint.safetensors').read_bytes()
    with pytest.raises(CheckpointError, match=NAMES[what]): train_obfuscator(recs, cbs=[CrashCallback(-1)], checkpoint=begun, resume=True, **{**GAME, **CHANGES[what]})
    assert (begun/'checkpoint.safetensors').read_bytes() == was

@pytest.mark.parametrize('what', ['images', 'split', 'targets'])
def test_other_data_are_refused(recs, begun, what, tmp_path):
    df, defence = recs.df.copy(), recs.df.part.eq('defence').to_numpy()
    row = np.flatnonzero(defence & recs.df.split.eq('train').to_numpy())[0]
    if what == 'split':   df.loc[df.index[row], 'patient_id'] = 'someone else'
    if what == 'targets': df.loc[df.index[row], recs.labels[0]] = 1 - df.loc[df.index[row], recs.labels[0]]
    if what == 'images':  df.loc[df.index[row], 'path'] = df.loc[df.index[np.flatnonzero(defence)[-1]], 'path']
    with pytest.raises(CheckpointError, match=f'train {what}'): train_obfuscator(recs._with(df), cbs=[CrashCallback(-1)], checkpoint=begun, resume=True, **GAME)

def test_a_forgotten_resume_is_refused(recs, begun):
    with pytest.raises(CheckpointError, match='exists already'): train_obfuscator(recs, cbs=[CrashCallback(-1)], checkpoint=begun, **GAME)
    with pytest.raises(ConfigError, match='needs checkpoint'): train_obfuscator(recs, resume=True, **GAME)

@pytest.mark.parametrize('how', ['cut', 'empty', 'other'])
def test_damaged_state(recs, begun, how, tmp_path):
    raw = (begun/'checkpoint.safetensors').read_bytes()
    (tmp_path/'checkpoint.safetensors').write_bytes(dict(cut=raw[:-100], empty=b'', other=b'x'*500)[how])
    with pytest.raises(CheckpointError, match='no readable checkpoint'): train_obfuscator(recs, cbs=[CrashCallback(-1)], checkpoint=tmp_path, resume=True, **GAME)

def test_no_patient_in_the_state(recs, begun):
    raw = (begun/'checkpoint.safetensors').read_bytes()
    assert not [p for k in ('patient_id', 'image_id') for p in recs.df[k].astype(str) if f'"{p}"'.encode() in raw]

def test_nothing_stored_yet(recs, tmp_path):
    "Killed before the first state: the whole training is repeated"
    whole = game(recs, [CrashCallback(-1)])
    crash(lambda cbs, **kw: game(recs, cbs, **kw), 1, checkpoint=tmp_path/'c', every=50)
    assert same(whole, game(recs, [CrashCallback(-1)], checkpoint=tmp_path/'c', every=50, resume=True))

@pytest.mark.parametrize('at', [1, 2, 3, 5])
def test_training_with_checkpoints_is_the_same_training(recs, at, tmp_path):
    "Writing states changes nothing, whatever the interval; going on from the end repeats the end"
    whole = ordinary(recs, [])
    assert same(whole, ordinary(recs, [], checkpoint=tmp_path, every=at)) and same(whole, ordinary(recs, [], checkpoint=tmp_path, every=at, resume=True))

def test_broken_off_on_the_way(recs, tmp_path):
    "An error while past batches are thrown away leaves no callback asleep"
    crash(lambda cbs, **kw: ordinary(recs, cbs, **kw), 5, checkpoint=tmp_path, every=5)
    dls = records_dls(recs, 'labels', 32, 4, device='cpu')
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(1024, len(recs.labels))), loss_func=MaskedBCE(), cbs=CheckpointCallback(tmp_path/'x'))
    learn.checkpoint.still = [learn.recorder]; learn.recorder.run = False
    with learn.no_bar(), learn.no_logging():
        with pytest.raises(CheckpointError, match='call fit again'): learn.fit(1)
        learn.fit(1)
    assert len(learn.recorder.values) == 1


@pytest.mark.parametrize('maker', ['bottleneck', 'viewmaker'])
def test_bf16_trains_close(recs, maker):
    "The curve is that of float32 to a few percent, not to the bit; what comes out is float32"
    how = NARROW if maker == 'viewmaker' else {}
    a, b = (train_obfuscator(recs, precision=p, **GAME, **how) for p in ('fp32', 'bf16'))
    loss = [h.history[['train_loss', 'valid_loss']].to_numpy() for h in (a, b)]
    assert np.isfinite(loss[1]).all() and 0 < np.abs(loss[0] - loss[1]).max() < .05*np.abs(loss[0]).max()
    assert all(p.dtype == torch.float32 for p in b.maker.parameters()) and b.config['precision'] == 'bf16'
    x = torch.rand(2, 1, 32, 32)
    assert b(x).dtype == torch.float32 and 'forward' not in vars(b.maker)

def test_bf16_probe(recs):
    a, b = (train_probe(recs.select(part='attack'), 'sex', size=32, bs=4, epochs=2, device='cpu', precision=p).preds.history for p in ('fp32', 'bf16'))
    assert 0 < (a.train_loss - b.train_loss).abs().max() < .05

def test_bf16_first_turn(recs):
    "The attackers' turn before the maker's computes in bfloat16 too, and their weights move"
    a, b = (train_obfuscator(recs, precision=p, attackers_first=True, **GAME, **NARROW).history.train_loss for p in ('fp32', 'bf16'))
    assert 0 < (a - b).abs().max() < .05*a.abs().max()

@pytest.mark.parametrize('precision', ['fp16', 'float16', 'fp8', None])
def test_other_precisions_are_refused(recs, precision):
    with pytest.raises(ConfigError, match='bf16'): train_obfuscator(recs, precision=precision, **GAME)
    with pytest.raises(ConfigError, match='bf16'): train_probe(recs, precision=precision)

def test_loss_scaling_is_refused_in_the_game(recs):
    with pytest.raises(ConfigError, match='bf16'): train_obfuscator(recs, cbs=[MixedPrecision()], **GAME)

def test_bf16_and_resume(recs, tmp_path):
    how = dict(precision='bf16', **NARROW)
    crash(lambda cbs, **kw: game(recs, cbs, **kw), 4, checkpoint=tmp_path, every=3, **how)
    assert same(game(recs, [CrashCallback(-1)], **how), game(recs, [CrashCallback(-1)], checkpoint=tmp_path, every=3, resume=True, **how))


if __name__ == '__main__':
    warnings.filterwarnings('ignore')
    with tempfile.TemporaryDirectory() as t: kills(sys.argv[1], Path(t), int(sys.argv[2]))
    sys.exit(0)
