"Private training on several ranks that is killed: one ledger and one checkpoint, never under-counted, other numbers of ranks, private counts"
import json, os, subprocess, sys
import numpy as np
import pytest
import torch
from medprivacy.dp.account import epsilon
from medprivacy.dp.ledger import Ledger

ENV = {**os.environ, 'PYTHONPATH': os.pathsep.join([os.path.dirname(__file__), *filter(None, [os.environ.get('PYTHONPATH')])])}   # of `faults`

DRIVER = r'''
"Trainings over many starts, each some forked processes that find one another as under torchrun, some of them killed: a JSON line for each start"
import hashlib, json, os, random, signal, socket, sys, time
from pathlib import Path
import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from faults import Patched, at_call, die
import medprivacy.core as core, medprivacy.dp.callback, medprivacy.dp.ledger as ledger_module, medprivacy.train as train
from medprivacy.dp.ledger import Ledger
from medprivacy.dp.parallel import start_ranks
from medprivacy.dp.resume import PrivateCheckpointCallback

torch.set_num_threads(1)

def torn(real, fd, data): real(fd, data[:len(data)//2]); die()
def half_file(real, path, data): (path.parent/f'.{path.name}.half').write_bytes(data[:len(data)//2]); die()
def slowly(fd, data): time.sleep(.03); return os.write(fd, data)
def never(*args): raise AssertionError('a rank other than the first wrote')

logs, fatal = {}, {}   # Not attributes of callbacks, which come back from the checkpoint of the first rank
class Truth(Callback):
    "A log beside the library: a line for each noisy gradient that came to this rank, on the disk before weights change"
    def before_fit(self): logs['fd'] = os.open(folder/f'truth{rank}', os.O_WRONLY|os.O_APPEND|os.O_CREAT)
    def before_batch(self):
        if self.training: self.n = len(self.xb[0])
    def before_step(self):
        g = torch.cat([p.grad.flatten() for p in self.learn.model.parameters()])
        os.write(logs['fd'], f'{hashlib.sha256(g.numpy().tobytes()).hexdigest()} {self.n}\n'.encode()); os.fsync(logs['fd'])

class Dies(Callback):
    "Kill this process at an event of a step"
    order = 70
    def __call__(self, event):
        if event == fatal['event'] and self.training: fatal['step'] -= 1
        if fatal['step'] == 0: die()

def learner(labels):
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 2, (60,), generator=g).repeat_interleave(2)
    x = torch.randn(120, 4, generator=g)+y[:,None]
    y = y.float()[:,None] if labels else y
    dls = DataLoaders(DataLoader(ds := list(zip(x, y)), bs=10), DataLoader(ds[:20], bs=20))
    dls.train_patients = np.arange(60).repeat(2)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1 if labels else 2))
    learn = Learner(dls, net, loss_func=torch.nn.BCEWithLogitsLoss() if labels else torch.nn.CrossEntropyLoss(), lr=.05)
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda row: columns.append(row[-2])
    return learn

def ahead(learn, path):
    "Fail when this rank computes before its step stands in the file of the first"
    def look(m, x):
        if learn.training and learn.lock.locked() is False and Ledger(path).steps < learn.dp.steps_taken: early.append(learn.dp.steps_taken)
    learn.model.register_forward_pre_hook(look)

columns, early = [], []
def child(o):
    torch.manual_seed(100*rank+os.getpid())               # ranks start from other weights
    home = folder if rank == 0 or plan.get('shared') else folder/f'elsewhere{rank}'
    if rank: ledger_module.os = Patched(os, write=never); train.atomic_write = ledger_module.atomic_write = never
    elif plan.get('slow'): ledger_module.os = Patched(os, write=slowly)
    learn = learner(plan.get('labels'))
    kw = dict(pos_weight='private') if plan.get('labels') else {}
    learn.to_private(target_epsilon=8, epochs=plan['epochs'], accountant='gdp', ledger=Ledger(home/'ledger.jsonl', block=plan['block']), **kw)
    if plan.get('slow'): ahead(learn, folder/'ledger.jsonl')
    mine, how = o.get('rank') == rank, o.get('how', '')
    if mine and how == 'ledger write': ledger_module.os = Patched(os, write=at_call(o['n'], os.write, torn))
    if mine and how == 'checkpoint write': train.atomic_write = at_call(max(1, o['n']//4), core.atomic_write, half_file)
    fatal.update(event=how, step=o['n'] if mine and ' ' not in how else -1)
    learn.fit_one_cycle(plan['epochs'], .05, cbs=[Truth(), Dies(), PrivateCheckpointCallback(home, every=4, resume=True)])
    s, c = learn.dp.spent, learn.dp.counts
    return dict(eps=s.eps, steps=s.steps, stop=learn.dp.max_steps, columns=columns, noise=s.noise_multiplier, rate=s.sample_rate, delta=s.delta, extra=s.extra, early=early,
                weights=torch.cat([p.detach().flatten() for p in learn.model.parameters()]).tolist(), counts=None if c is None else [*c.pos, *c.neg],
                pos_weight=learn.loss_func.pos_weight.tolist() if plan.get('labels') else None)

def free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]

def lines(name): return (folder/name).read_text().splitlines() if (folder/name).exists() else []

def steps_of(): return Ledger(folder/'ledger.jsonl').steps if (folder/'ledger.jsonl').exists() else 0

def start(n, o):
    "Fork `n` ranks, and kill as `o` says; exit codes"
    global rank
    port, base, pids = free_port(), steps_of(), []
    for rank in range(n):
        if pid := os.fork(): pids.append(pid); continue
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(n), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(n), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
        sys.stdout = open(os.devnull, 'w')
        sys.stderr = open(folder/f'stderr{rank}', 'a')
        try:
            start_ranks(); (folder/f'done{rank}.json').write_text(json.dumps(child(o)))
            while rank and not (folder/'done0.json').exists(): time.sleep(.01)    # it may still read what this rank sent
            os._exit(0)
        except core.MedPrivacyError as e: (folder/f'refused{rank}').write_text(f'{type(e).__name__}: {e}'); os._exit(3)
        except AssertionError as e: (folder/'error').write_text(repr(e)); os._exit(4)
        except BaseException as e: print(repr(e), file=sys.stderr, flush=True); os._exit(1)      # the others are gone
    codes, end = {}, time.time()+300
    while len(codes) < n:
        for i,pid in enumerate(pids):
            if i not in codes and os.waitpid(pid, os.WNOHANG)[0]: codes[i] = 1
        if o.get('how') == 'all' and steps_of() >= base+o['n']:
            time.sleep(o['wait'])
            for i,pid in enumerate(pids):
                if i not in codes: os.kill(pid, signal.SIGKILL)
            o = {}
        if time.time() > end:
            for i,pid in enumerate(pids):
                if i not in codes: os.kill(pid, signal.SIGKILL)
            (folder/'error').write_text(f'ranks {set(range(n))-set(codes)} of {n} did not end, {o}')
            end += 300
        time.sleep(.002)

kinds = [('all', None), ('after_step', 1), ('before_step', 0), ('ledger write', 0), ('after_loss', 1), ('checkpoint write', 0), ('after_batch', 0), ('before_backward', 1)]
def run(name):
    for i,n in enumerate(plan['ranks']):
        how, who = kinds[i%len(kinds)] if n > 1 else ('after_step', 0)
        last = i == len(plan['ranks'])-1
        start(n, {} if last else dict(how=how, rank=who, n=draw.randint(2, 9), wait=draw.uniform(0, .02)))
        if (folder/'error').exists(): return print(json.dumps(dict(name=name, error=(folder/'error').read_text())), flush=True)
        truth = [[l.split()[0] for l in lines(f'truth{r}')] for r in range(max(plan['ranks']))]
        print(json.dumps(dict(name=name, n=n, how=how, truth=[len(t) for t in truth], seen=len(set(sum(truth, []))), steps=steps_of())), flush=True)

rank = 0
for name,plan in json.loads(sys.argv[2]).items():
    folder, draw = Path(sys.argv[1])/name, random.Random(plan.get('seed', 3))
    folder.mkdir()
    run(name)
'''

def train(root, plans):
    "Of each plan: its folder, what each start told, and what each rank of the last one found"
    p = subprocess.run([sys.executable, '-W', 'ignore', '-c', DRIVER, str(root), json.dumps(plans)], capture_output=True, text=True, timeout=900, env=ENV)
    assert p.returncode == 0, p.stderr[-3000:]
    told, out = [json.loads(l) for l in p.stdout.splitlines()], {}
    for name,plan in plans.items():
        folder, starts = root/name, [o for o in told if o['name'] == name]
        said = {f.name: f.read_text()[-800:] for f in folder.glob('*') if f.name.startswith(('refused', 'stderr'))}
        assert not [o['error'] for o in starts if 'error' in o], (starts, said)
        done = [folder/f'done{r}.json' for r in range(plan['ranks'][-1])]
        assert all(f.exists() for f in done), (starts, said)
        out[name] = folder, starts, [json.loads(f.read_text()) for f in done]
    return out

PLANS = dict(killed=dict(ranks=[2]*5, epochs=10, block=2), others=dict(ranks=[2, 1, 3, 2], epochs=10, block=1, shared=True),
             slow=dict(ranks=[2], epochs=3, block=1, slow=True), labels=dict(ranks=[2, 2], epochs=4, block=1, labels=True))

@pytest.fixture(scope='module')
def trained(tmp_path_factory): return train(tmp_path_factory.mktemp('ranks'), PLANS)

def check(folder, told, done, block, epochs):
    "Nothing is charged too little, and at most a block too much for each kill; all ranks end alike"
    taken, before = 0, [0]*len(told[0]['truth'])
    for i,o in enumerate(told):
        taken += max(b-a for a,b in zip(before, o['truth']))   # a killed rank may not have told its last step
        before = o['truth']
        assert o['seen'] == taken                         # the ranks see the same gradients, and none twice
        assert taken <= o['steps'] <= taken+block*min(i+1, len(told)-1)
    led, one = Ledger(folder/'ledger.jsonl'), done[0]
    assert all(o == one for o in done)                    # weights, ε and its column, counts
    assert one['steps'] == led.steps and taken <= led.steps == one['stop'] == epochs*6
    for how in ('rdp', 'prv'): assert led.spent(accountant=how).eps >= epsilon(one['noise'], one['rate'], taken, one['delta'], how)
    assert 7.9 < one['eps'] == led.spent().eps <= 8 and one['columns'] == sorted(one['columns']) and one['columns'][-1] == one['eps']
    assert not list(folder.glob('elsewhere*'))            # other ranks wrote nothing

def test_two_ranks_killed_at_random_steps(trained):
    folder, told, done = trained['killed']
    check(folder, told, done, 2, 10)
    assert len({o['how'] for o in told[:-1]}) == 4 and all(a['steps'] < b['steps'] for a,b in zip(told, told[1:]))

def test_another_number_of_ranks(trained):
    folder, told, done = trained['others']
    check(folder, told, done, 1, 10)
    shares = [[int(l.split()[1]) for l in (folder/f'truth{r}').read_text().splitlines()] for r in range(3)]
    taken, drawn = max(map(len, shares)), sum(map(sum, shares))     # of 60 patients at rate 1/6, whatever the number of ranks
    assert abs(drawn-10*taken) < 5*np.sqrt(taken*10*5/6)+3*10       # a killed rank may not have told its last share

def test_no_rank_computes_before_the_line_is_on_the_disk(trained):
    _, _, done = trained['slow']
    assert all(o['early'] == [] and o['steps'] == 18 for o in done)

def test_private_counts_on_two_ranks(trained):
    folder, told, done = trained['labels']
    check(folder, told, done, 1, 4)
    led = Ledger(folder/'ledger.jsonl')
    kinds = [r.get('query', r['kind']) for r in led._records]
    assert kinds[:4] == ['facts', 'class counts', 'answer', 'steps'] and kinds.count('class counts') == 1 == kinds.count('answer')
    assert done[0]['extra'] == [led._records[1]['noise']] and done[0]['pos_weight'] == done[1]['pos_weight'] != [1.]
    assert led.answer('class counts')['private'] and abs(led.answer('class counts')['pos'][0]+led.answer('class counts')['neg'][0]-60) < 60

@pytest.mark.slow
@pytest.mark.parametrize('block', [1, 4])
def test_two_ranks_killed_forty_times(tmp_path, block):
    check(*train(tmp_path, dict(many=dict(ranks=[2]*41, epochs=60, block=block, seed=11)))['many'], block, 60)
