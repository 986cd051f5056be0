"Private training that is killed: never under-counted, at most one block too much a kill, fresh noise, and only its own training goes on"
import json, os, subprocess, sys
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import ParamScheduler
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner, load_learner
from fastai.metrics import accuracy
from torch import nn
import medprivacy.dp.callback
from medprivacy.core import BudgetError, CheckpointError, ConfigError
from medprivacy.dp.ledger import Ledger
from medprivacy.dp.resume import PrivateCheckpointCallback
from medprivacy.train import _read

# ------------------------------------------------------------ processes that are killed

ENV = {**os.environ, 'PYTHONPATH': os.pathsep.join([os.path.dirname(__file__), *filter(None, [os.environ.get('PYTHONPATH')])])}   # of `faults`

DRIVER = r'''
"One training over many processes, each a fork that is killed: a JSON line for each, with what its own log says it did"
import hashlib, json, os, random, signal, sys, time
import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import ParamScheduler
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from pathlib import Path
from faults import Patched, at_call, die
import medprivacy.core as core, medprivacy.dp.callback, medprivacy.dp.ledger as ledger_module, medprivacy.train as train
from medprivacy.dp.ledger import Ledger
from medprivacy.dp.resume import PrivateCheckpointCallback

folder, kills, block, epochs = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(1)
draw = random.Random(7)

class Truth(Callback):
    "A log beside the library: a line for each step whose noisy gradient came to be, on the disk before weights change"
    def before_fit(self): self._fd = os.open(folder/'truth', os.O_WRONLY|os.O_APPEND|os.O_CREAT)
    def before_step(self):
        g = torch.cat([p.grad.flatten() for p in self.learn.model.parameters()])
        os.write(self._fd, (hashlib.sha256(g.numpy().tobytes()).hexdigest()+'\n').encode()); os.fsync(self._fd)

def torn(real, fd, data): real(fd, data[:draw.randrange(len(data)+1)]); die()
def before(real, *args): die()
def after(real, *args): real(*args); die()
def half_file(real, path, data):
    (path.parent/f'.{path.name}.half').write_bytes(data[:draw.randrange(len(data))]); die()

def fault(kind, n):
    "Prepare the death of this process"
    if kind == 'ledger write':  ledger_module.os = Patched(os, write=at_call(n, os.write, torn))
    if kind == 'before fsync':  ledger_module.os = Patched(os, fsync=at_call(n, os.fsync, before))
    if kind == 'after fsync':   ledger_module.os = Patched(os, fsync=at_call(n, os.fsync, after))
    if kind == 'checkpoint write':  train.atomic_write = at_call(max(1, n//3), core.atomic_write, half_file)
    if kind == 'checkpoint rename': core.os = Patched(os, replace=at_call(max(1, n//3), os.replace, before))
    if kind == 'checkpoint there':  core.os = Patched(os, replace=at_call(max(1, n//3), os.replace, after))

def learner():
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(120, 4, generator=g); y = torch.randint(0, 2, (120,), generator=g)
    dls = DataLoaders(DataLoader(ds := list(zip(x, y)), bs=10), DataLoader(ds[:20], bs=20))
    dls.train_patients = np.arange(60).repeat(2)
    learn = Learner(dls, nn_of(), loss_func=torch.nn.CrossEntropyLoss(), lr=.05)
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda row: rows.append(list(row))
    return learn

def nn_of(): return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))

rows = []
def child():
    learn = learner().to_private(target_epsilon=8, epochs=epochs, accountant='rdp', ledger=Ledger(folder/'ledger.jsonl', block=block))
    learn.fit_one_cycle(epochs, .05, cbs=[Truth(), PrivateCheckpointCallback(folder, every=3, resume=True)])
    return dict(eps=learn.dp.spent.eps, steps=learn.dp.spent.steps, stop=learn.dp.max_steps, columns=[r[-2] for r in rows],
                epochs=[r[0] for r in rows])

def say(**kw): print(json.dumps(kw), flush=True)

def truth():
    lines = (folder/'truth').read_text().splitlines() if (folder/'truth').exists() else []
    return len(lines), len(set(lines))

KINDS = ['ledger write', 'checkpoint write', 'time', 'before fsync', 'checkpoint rename', 'after fsync', 'time', 'checkpoint there']
for i in range(kills+1):
    kind = KINDS[i%len(KINDS)] if i < kills else None
    n, delay = draw.randint(2, 9), draw.uniform(.02, .2)
    pid = os.fork()
    if pid == 0:
        sys.stdout = open(os.devnull, 'w')
        fault(kind, n)
        try:
            done = child()
            (folder/'done.json').write_text(json.dumps(done))
            os._exit(0)
        except BaseException as e:
            (folder/'error').write_text(repr(e)); os._exit(1)
    if kind == 'time': time.sleep(delay); os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if (folder/'error').exists(): say(error=(folder/'error').read_text()); break
    steps = Ledger(folder/'ledger.jsonl').steps if (folder/'ledger.jsonl').exists() else 0
    say(kind=kind, killed=os.WIFSIGNALED(status), signal=os.WTERMSIG(status), truth=truth(), steps=steps)
'''

def killed_training(folder, kills, block, epochs):
    p = subprocess.run([sys.executable, '-W', 'ignore', '-c', DRIVER, str(folder), str(kills), str(block), str(epochs)], capture_output=True, text=True, timeout=900, env=ENV)
    assert p.returncode==0, p.stderr[-3000:]
    return [json.loads(l) for l in p.stdout.splitlines()], json.loads((folder/'done.json').read_text())

def check_kills(folder, kills, block, epochs):
    told, done = killed_training(folder, kills, block, epochs)
    assert not [o['error'] for o in told if 'error' in o]
    dead = [o for o in told if o['killed']]
    assert {o['signal'] for o in dead}=={9} and not told[-1]['killed']
    assert len(dead) >= .8*kills                      # the others had ended, or nothing was left for them to do
    for i,o in enumerate(told):
        n, different = o['truth']
        assert n==different                           # no noise was ever drawn again
        assert n <= o['steps'] <= n + block*sum(x['killed'] for x in told[:i+1])
    led = Ledger(folder/'ledger.jsonl')
    n = told[-1]['truth'][0]
    assert n <= done['steps']==led.steps <= done['stop']==epochs*6
    taken = type(led.spent())(**{**vars(led.spent()), 'eps': 0.})
    from medprivacy.dp.account import epsilon
    for how in ('rdp', 'prv'): assert led.spent(accountant=how).eps >= epsilon(taken.noise_multiplier, taken.sample_rate, n, taken.delta, how)
    assert done['eps'] <= 8 and done['columns'][-1]==done['eps'] and done['columns']==sorted(done['columns'])
    return told, done

def test_killed_at_random_moments(tmp_path):
    told, done = check_kills(tmp_path, 8, 2, 12)
    assert done['steps'] > told[-1]['truth'][0]       # a kill inside a write was charged and not taken

@pytest.mark.slow
@pytest.mark.parametrize('block', [1, 4])
def test_killed_fifty_times(tmp_path, block): check_kills(tmp_path, 50, block, 60 if block==1 else 90)

# ------------------------------------------------------------ in one process

class Killed(Exception): pass

class Kill(Callback):
    def __init__(self, at): self.left = iter([False]*(at-1) + [True]*(at > 0))
    def after_step(self):
        if next(self.left, False): raise Killed('power cut')

def dls_of(shift=0., bs=10, n=60, roll=0):
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 2, (n,), generator=g).repeat_interleave(2)
    x = torch.randn(n*2, 4, generator=g) + y[:,None] + shift
    dls = DataLoaders(DataLoader(ds := list(zip(x, y)), bs=bs), DataLoader(ds[:20], bs=20))
    dls.train_patients = np.roll(np.arange(n).repeat(2), roll)
    class Empty:
        def cpu(self): pass
    dls.new_empty = Empty
    return dls

def make(folder, *, dls=None, ledger=None, loss=None, width=8, **kw):
    torch.manual_seed(0)
    learn = Learner(dls or dls_of(), nn.Sequential(nn.Linear(4,width), nn.Tanh(), nn.Linear(width,2)), loss_func=loss or nn.CrossEntropyLoss(), metrics=accuracy, lr=.05)
    learn.remove_cb(ProgressCallback)
    learn.logger, learn.path = lambda o: None, folder
    if not {'noise_multiplier', 'target_epsilon'} & set(kw): kw['noise_multiplier'] = 1.
    return learn.to_private(ledger=ledger or folder/'ledger.jsonl', accountant='rdp', **kw)

def fit(learn, folder, kill=0, resume=True, epochs=4, every=4, lr=.05):
    try: learn.fit_one_cycle(epochs, lr, cbs=[PrivateCheckpointCallback(folder, every=every, resume=resume), Kill(kill)])
    except Killed: learn.dp.ledger.close()
    return learn

def weights(learn): return torch.cat([p.detach().flatten().clone() for p in learn.model.parameters()])

def test_it_goes_on_from_the_checkpoint(tmp_path):
    a = fit(make(tmp_path), tmp_path, kill=11)
    saved = _read(tmp_path/'checkpoint.safetensors', 'cpu')
    assert (saved['epoch'],saved['batch'],saved['steps'])==(1,2,8) and a.dp.spent.steps==11
    b, seen = make(tmp_path), []
    inner = b.dp.before_train
    def look(): inner(); seen.append(weights(b))
    object.__setattr__(b.dp, 'before_train', look)
    fit(b, tmp_path)
    assert torch.equal(seen[0], torch.cat([saved['state']['model'][k].flatten() for k in b.model.state_dict()]))
    assert b.dp.spent.steps==11+24-8 and len(b.recorder.values)==4 and b.recorder.values[0]==a.recorder.values[0]
    lrs = a.recorder.lrs
    assert len(lrs) <= 11 and b.recorder.lrs[:len(lrs)-3]==lrs[:-3] and np.isclose(b.pct_train, 1)    # the schedule goes on

def test_steps_that_were_lost_are_missing_at_the_end(tmp_path):
    kw = dict(target_epsilon=8, epochs=4)
    a = fit(make(tmp_path, **kw), tmp_path, kill=11)
    b = fit(make(tmp_path, **kw), tmp_path)
    assert a.dp.noise_multiplier==b.dp.noise_multiplier and b.dp.spent.steps==24==b.dp.max_steps and 7.9 < b.dp.spent.eps <= 8
    assert len(b.recorder.values)==4 and _read(tmp_path/'checkpoint.safetensors', 'cpu')['batch']==3
    end = weights(b)
    c = fit(make(tmp_path, **kw), tmp_path)
    assert torch.equal(weights(c), end) and c.dp.spent==b.dp.spent           # once more: the end, and no step
    with pytest.raises(BudgetError, match='spent'): c.fit(1)
    with pytest.raises(BudgetError, match='spent'): make(tmp_path, **kw).fit_one_cycle(4)

def test_two_fits_of_one_learner_add_up(tmp_path):
    learn = make(tmp_path)
    learn.fit(1); learn.fit(2)
    assert learn.dp.spent.steps==18==Ledger(tmp_path/'ledger.jsonl').steps
    other = make(tmp_path); other.fit(1)                                      # and of the next process
    assert other.dp.spent.steps==24

def test_no_noise_and_no_random_state_is_stored(tmp_path):
    learn = fit(make(tmp_path), tmp_path)
    state = _read(tmp_path/'checkpoint.safetensors', 'cpu')
    assert set(state)=={'facts', 'epoch', 'batch', 'steps', 'head', 'state'}
    assert set(state['state'])=={'model', 'opt', 'loss', 'pos_weight', 'frozen', 'learner', 'callbacks'} and 'dp' not in state['state']['callbacks']
    raw = (tmp_path/'checkpoint.safetensors').read_bytes()
    for s in (torch.get_rng_state(), torch.tensor(list(np.random.get_state()[1][:16]), dtype=torch.int64)): assert s.numpy().tobytes()[:64] not in raw
    key = (tmp_path/'ledger.jsonl.key').read_bytes()
    assert not any(key in f.read_bytes() for f in tmp_path.glob('*') if f.suffix!='.key')
    assert oct((tmp_path/'ledger.jsonl.key').stat().st_mode)[-3:]=='600'

OTHERS = dict(data=(dict(dls=dict(shift=1.)), 'data'), patients=(dict(dls=dict(roll=1)), 'patients'), batch=(dict(dls=dict(bs=12)), 'sampling rate: .*batch'),
              clipping=(dict(max_grad_norm=.5), 'clipping norm: 1.0 then, 0.5 now'), unit=(dict(unit='image'), 'unit: patient then, image now'),
              noise=(dict(noise_multiplier=2.), 'noise multiplier: 1.0 then, 2.0 now'), target=(dict(target_epsilon=3.), 'target ε'), delta=(dict(delta=1e-4), 'δ'),
              mode=(dict(clipping='automatic'), 'clipping: flat then, automatic now'), test=(dict(seed=1), 'private: True then, False now'))

@pytest.mark.parametrize('what', OTHERS)
def test_another_training_is_refused(tmp_path, what):
    fit(make(tmp_path), tmp_path, kill=3)
    kw, words = OTHERS[what]
    kw = dict(kw)
    if 'dls' in kw: kw['dls'] = dls_of(**kw['dls'])
    learn = make(tmp_path, **kw)
    before = weights(learn)
    with pytest.raises(CheckpointError, match=words): fit(learn, tmp_path)
    assert torch.equal(before, weights(learn)) and Ledger(tmp_path/'ledger.jsonl').steps==3
    fit(make(tmp_path), tmp_path)                                             # no lock is left behind

def test_another_fit_or_network_is_refused(tmp_path):
    fit(make(tmp_path), tmp_path, kill=5)
    with pytest.raises(CheckpointError, match='n_epoch: 4 then, 5 now'): fit(make(tmp_path), tmp_path, epochs=5)
    with pytest.raises(CheckpointError, match='schedule'): fit(make(tmp_path), tmp_path, lr=.1)
    with pytest.raises(CheckpointError, match='model'): fit(make(tmp_path, width=9), tmp_path)
    refused = make(tmp_path)
    with pytest.raises(CheckpointError, match='resume=True'): fit(refused, tmp_path, resume=False)
    fit(make(tmp_path), tmp_path)                                             # while it is still there: no lock is left behind
    assert refused.dp.ledger.steps==5

def test_a_ledger_of_another_run_or_a_shorter_one(tmp_path):
    for o in 'ab': (tmp_path/o).mkdir(); fit(make(tmp_path/o), tmp_path/o, kill=9)
    a, b = tmp_path/'a', tmp_path/'b'
    whole = (a/'ledger.jsonl').read_text()
    for f in ('ledger.jsonl', 'ledger.jsonl.key'): (a/f).write_bytes((b/f).read_bytes())
    with pytest.raises(CheckpointError, match='was cut, or belongs to another|data|patients'): fit(make(a), a)
    (a/'ledger.jsonl').write_text(whole)
    with pytest.raises(CheckpointError, match='data'): fit(make(a), a)        # its key is that of the other
    (a/'ledger.jsonl.key').unlink()
    with pytest.raises(CheckpointError, match='key is missing'): fit(make(a), a)
    lines = (b/'ledger.jsonl').read_text().splitlines(keepends=True)
    (b/'ledger.jsonl').write_text(''.join(lines[:6]))
    with pytest.raises(CheckpointError, match='was cut'): fit(make(b), b)
    (b/'ledger.jsonl').write_text(''.join(lines[:3]+lines[4:]))
    with pytest.raises(CheckpointError, match='line 4'): make(b)              # at the door
    (b/'checkpoint.safetensors').write_bytes(b'no')
    (b/'ledger.jsonl').write_text(''.join(lines))
    with pytest.raises(CheckpointError, match='readable'): fit(make(b), b)

def test_a_folder_that_cannot_be_written_is_found_before_the_first_step(tmp_path):
    (tmp_path/'file').write_text('')
    learn = make(tmp_path, ledger=tmp_path/'file'/'ledger.jsonl')
    before = weights(learn)
    with pytest.raises(CheckpointError, match='choose a folder'): learn.fit(1)
    assert torch.equal(before, weights(learn)) and learn.dp.spent.steps==0

def test_other_settings_add_up_when_asked(tmp_path):
    path = tmp_path/'ledger.jsonl'
    learn = make(tmp_path, noise_multiplier=2.); learn.fit(2)
    first = learn.dp.spent
    learn.to_public()
    with pytest.raises(BudgetError, match='give the ledger'): learn.to_private(noise_multiplier=1.)
    with pytest.raises(BudgetError, match='give the ledger'): learn.to_private(noise_multiplier=1., ledger=tmp_path/'new.jsonl')
    learn.to_private(target_epsilon=6, ledger=Ledger(path, further=True), accountant='rdp', max_grad_norm=.5)
    learn.fit(3)
    s = learn.dp.spent
    assert s.steps==30 and s.noise_multiplier is None and first.eps < s.eps and 5.9 < s.eps <= 6
    with pytest.raises(BudgetError): learn.fit(1)
    assert len(Ledger(path).parts)==2 and Ledger(path).spent()==s
    assert s.kinds==((2.,1/6,12), (learn.dp.noise_multiplier,1/6,18)) and '12 of noise multiplier 2 at rate 0.1667' in str(s)
    with pytest.raises(ConfigError, match='several kinds'): learn.dp.both

def test_a_test_mode_is_marked_in_the_ledger(tmp_path):
    make(tmp_path, seed=3).fit(1)
    assert str(Ledger(tmp_path/'ledger.jsonl').spent()).startswith('NOT PRIVATE')

@pytest.mark.filterwarnings('ignore::UserWarning')
def test_an_exported_learner_tells_what_was_spent_and_not_where(tmp_path):
    learn = make(tmp_path); learn.fit(1)
    learn.export('out.pkl')
    raw = (tmp_path/'out.pkl').read_bytes()
    back = load_learner(tmp_path/'out.pkl')
    assert back.dp.spent==learn.dp.spent and back.dp.ledger.path.name=='ledger.jsonl' and len(back.dp.ledger.path.parts)==1

def test_a_checkpoint_needs_a_ledger(tmp_path):
    learn = make(tmp_path).to_public()
    with pytest.raises(ConfigError, match='needs to_private'): fit(learn, tmp_path/'x')
    learn = Learner(dls_of(), nn.Linear(4,2), loss_func=nn.CrossEntropyLoss(), lr=.05).to_private(noise_multiplier=1.)
    with pytest.raises(ConfigError, match='ledger='): learn.fit(1, cbs=PrivateCheckpointCallback(tmp_path/'x'))

def test_validation_within_a_fit_does_not_close_the_ledger(tmp_path):
    class Looks(Callback):
        def after_batch(self):
            if self.training: looks.get_preds()
    learn, looks = make(tmp_path), make(tmp_path/'other')
    learn.fit(1, cbs=Looks())
    assert learn.dp.spent.steps==6
    learn.validate(); learn.get_preds(); learn.fit(1)
    assert learn.dp.spent.steps==12

def label_learner(folder, ledger=None, target=8, **kw):
    dls = dls_of()
    for dl in dls.loaders: dl.dataset[:] = [(x, y.float()[None]) for x,y in dl.dataset]
    learn = Learner(dls, nn.Linear(4,1), loss_func=nn.BCEWithLogitsLoss(), lr=.05)
    learn.remove_cb(ProgressCallback); learn.logger = lambda o: None
    return learn.to_private(target_epsilon=target, epochs=4, ledger=ledger or folder/'ledger.jsonl', accountant='rdp', pos_weight='private', **kw)

@pytest.mark.parametrize('at', [2, 9])                # before the first checkpoint, and after it
def test_paid_label_weights_come_back(tmp_path, at):
    a, b = fit(label_learner(tmp_path), tmp_path, kill=at), fit(label_learner(tmp_path), tmp_path)
    assert torch.equal(a.loss_func.pos_weight, b.loss_func.pos_weight)
    assert (tmp_path/'checkpoint.safetensors').exists() and (b.dp.counts is None) == (at==9)
    if at==2: assert np.array_equal(b.dp.counts.pos, a.dp.counts.pos) and b.dp.counts.private
    s = b.dp.spent
    assert len(s.extra)==1 and s.steps==24 and 7.8 < s.eps <= 8

def test_counts_stand_in_the_ledger_before_they_are_asked(tmp_path, monkeypatch):
    import medprivacy.dp.budget as budget
    real, seen = budget.private_class_counts, []
    def asks(*args, **kw): seen.append([r.get('query', r['kind']) for r in Ledger(tmp_path/'ledger.jsonl')._records]); return real(*args, **kw)
    monkeypatch.setattr(budget, 'private_class_counts', asks)
    label_learner(tmp_path).fit(1)
    assert seen==[['facts', 'class counts']]
    def dies(*args, **kw): raise Killed('power cut')
    monkeypatch.setattr(budget, 'private_class_counts', dies)
    (tmp_path/'b').mkdir()
    with pytest.raises(Killed): (learn := label_learner(tmp_path/'b')).fit(1)
    learn.dp.ledger.close()
    monkeypatch.undo()
    assert len(Ledger(tmp_path/'b'/'ledger.jsonl').spent().extra)==1          # paid, and not known
    with pytest.raises(BudgetError, match='another folder'): label_learner(tmp_path/'b').fit(1)
    assert len(Ledger(tmp_path/'b'/'ledger.jsonl').spent().extra)==1

def test_counts_of_a_further_training_are_within_its_target(tmp_path):
    first = label_learner(tmp_path).to_public().to_private(noise_multiplier=2., ledger=tmp_path/'ledger.jsonl', accountant='rdp')
    first.fit(2)
    a = label_learner(tmp_path, Ledger(tmp_path/'ledger.jsonl', further=True), target=6, delta=first.dp.delta)
    a.fit(4)
    s = a.dp.spent
    assert s.steps==36 and len(s.extra)==1 and 5.9 < s.eps <= 6 and a.dp.steps_left==0
    b = label_learner(tmp_path, Ledger(tmp_path/'ledger.jsonl', further=True), target=9, delta=first.dp.delta)
    b.fit(4)
    assert b.dp.spent.extra==s.extra and 8.9 < b.dp.spent.eps <= 9 and np.array_equal(a.dp.counts.neg, b.dp.counts.neg)   # asked once
