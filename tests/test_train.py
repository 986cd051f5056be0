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
from fastai.optimizer import Adam, OptimWrapper
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from medprivacy import train
from medprivacy.core import CheckpointError, ConfigError, seed_everything
from medprivacy.data.core import Records
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
                    cbs=[GradientAccumulation(12), *cbs, *checkpoint_cbs(checkpoint, every, resume)])
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
    moments = [dict(at=rng.randrange(3, n)), dict(at=rng.randrange(n//2, n)), dict(at=rng.randrange(0, 3)), *[dict(where=w) for w in ('half', 'whole', 'renamed')], dict(at=n-1, twice=True)]
    for i, m in enumerate(moments):
        if 'where' in m:
            forked(lambda: (kill_in_write(rng.randrange(2, max(3, n//3)), m['where']), child(i)), signal.SIGKILL)
        else: forked(lambda: child(i, at=m['at']), signal.SIGKILL)
        if m.get('twice'): forked(lambda: child(i, at=n-2 if (n-2) % 3 else n-1, resume=True), signal.SIGKILL)
        forked(lambda: child(i, resume=True))
        got = torch.load(root/f'r{i}', weights_only=False)
        left = [p.name for p in (root/f'c{i}').iterdir()]
        print(json.dumps(dict(moment=m, same=same(whole, got), left=left)), flush=True)


if __name__ == '__main__':
    warnings.filterwarnings('ignore')
    with tempfile.TemporaryDirectory() as t: kills(sys.argv[1], Path(t), int(sys.argv[2]))
    sys.exit(0)


@pytest.mark.parametrize('name', [pytest.param(n, marks=pytest.mark.slow) if n in ('viewmaker', 'first') else n for n in TRAININGS])
def test_killed_and_continued(name):
    import subprocess
    out = subprocess.run([sys.executable, __file__, name, str(random.SystemRandom().randrange(10**6))], capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    rows = [json.loads(l) for l in out.stdout.splitlines() if l.startswith('{')]
    assert out.returncode == 0 and len(rows) == 7, out.stdout + out.stderr[-3000:]
    assert [r for r in rows if not r['same']] == []
    assert all(r['left'] == ['checkpoint.safetensors'] for r in rows)
