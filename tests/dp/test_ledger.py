"The ledger: on the disk before a step is used, never short after a crash, damage is named, several kinds of steps add up"
import json, math, os, signal, subprocess, sys
from types import SimpleNamespace
import numpy as np
import pytest
import medprivacy.dp.ledger as module
from medprivacy.core import BudgetError, CheckpointError, ConfigError
from medprivacy.dp.account import epsilon
from medprivacy.dp.ledger import Ledger, total_epsilon
from medprivacy.dp.plan import plan_noise

FACTS = {'unit': 'patient', 'units': 500, 'rows': 800, 'δ': 1e-4, 'accountant': 'rdp', 'private': True, 'noise multiplier': 1.1, 'sampling rate': .1,
         'clipping norm': 1., 'data': 'a', 'patients': 'b'}

def written(path, n=10, **kw):
    led = Ledger(path, **kw).begin(FACTS)
    for _ in range(n): led.charge(1.1, .1)
    led.close()
    return led

# ------------------------------------------------------------ what is on the disk, and when

def test_a_charge_returns_after_its_record_is_flushed(tmp_path, monkeypatch):
    calls = []
    real = SimpleNamespace(write=os.write, fsync=os.fsync)
    def write(fd, data): calls.append(('write', data)); return real.write(fd, data)
    def fsync(fd): calls.append(('fsync', fd)); return real.fsync(fd)
    led = Ledger(tmp_path/'l.jsonl').begin(FACTS)
    monkeypatch.setattr(os, 'write', write); monkeypatch.setattr(os, 'fsync', fsync)
    for _ in range(3): led.charge(1.1, .1)
    monkeypatch.undo()
    assert [c[0] for c in calls]==['write', 'fsync']*3 and calls[1][1]==led._file
    assert led.path.read_bytes().endswith(calls[-2][1]) and b'"steps": 1' in calls[0][1]
    led.close()

def test_a_new_file_has_its_facts_and_its_name_on_the_disk(tmp_path, monkeypatch):
    synced, real = [], os.fsync
    monkeypatch.setattr(os, 'fsync', lambda fd: (synced.append(os.fstat(fd).st_ino), real(fd))[1])
    led = Ledger(tmp_path/'l.jsonl').begin(FACTS)
    led.close()
    assert synced==[led.path.stat().st_ino, tmp_path.stat().st_ino]

def test_a_file_is_read_back(tmp_path):
    led = written(tmp_path/'l.jsonl', 25)
    back = Ledger(led.path)
    assert back.parts=={(1.1,.1): 25} and back.head==led.head and back.run==led.run and back.facts=={**FACTS, 'block': 1}
    s = back.spent()
    assert s.eps==epsilon(1.1, .1, 25, 1e-4, 'rdp') and (s.steps,s.delta,s.unit,s.accountant,s.noise_multiplier,s.sample_rate)==(25,1e-4,'patient','rdp',1.1,.1)
    assert '25 of noise 1.1 at rate 0.1' in repr(back)
    assert back.spent(1e-5, 'prv').eps==epsilon(1.1, .1, 25, 1e-5, 'prv')

def test_nothing_in_it_tells_patients_or_noise(tmp_path):
    text = written(tmp_path/'l.jsonl').path.read_text()
    keys = {k for l in text.splitlines() for k in json.loads(l)}
    assert keys=={'kind', 'run', 'facts', 'block', 'steps', 'noise', 'rate', 'chain'}-{'block'}

def test_blocks_charge_ahead(tmp_path):
    led = Ledger(tmp_path/'l.jsonl', block=5).begin(FACTS)
    seen = [(led.charge(1.1, .1), Ledger(led.path).steps, led.used) for _ in range(12)]
    assert seen==[(5*(1+i//5), 5*(1+i//5), i+1) for i in range(12)]
    assert led.charge(1.1, .1, most=3)==15 and led.used==13
    led.close(); led.begin({**FACTS})
    assert led.used==13                                     # the same process goes on with what it reserved
    led.close()
    assert Ledger(led.path, block=5).used==15               # another one does not
    led = Ledger(tmp_path/'m.jsonl', block=5).begin(FACTS)
    led.charge(1.1, .1, most=3)
    assert led.steps==3
    led.close()
    with pytest.raises(CheckpointError, match='block: 5 then, 1 now'): Ledger(led.path).begin(FACTS)

def test_a_failed_write_takes_no_step_and_counts(tmp_path, monkeypatch):
    led = written(tmp_path/'l.jsonl', 3).begin(FACTS)
    real = os.write
    monkeypatch.setattr(os, 'write', lambda fd, data: real(fd, data[:17]))        # the disk is full
    with pytest.raises(CheckpointError, match='this step was not taken'): led.charge(1.1, .1)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match='not open'): led.charge(1.1, .1)
    assert Ledger(led.path).steps==4
    led.begin(FACTS); led.charge(1.1, .1); led.close()
    assert Ledger(led.path).steps==5

def test_answers_are_kept_and_count_nothing(tmp_path):
    led = Ledger(tmp_path/'l.jsonl', block=3).begin(FACTS)
    led.charge(20., 1., query='class counts')
    assert led.answer('class counts') is None
    led.charge(1.1, .1)
    eps = led.spent().eps
    led.keep('class counts', dict(pos=[1.5, -2.], unit='patient'))
    assert led.charge(1.1, .1)==3 and led.spent().eps==eps                     # what was reserved is still there
    led.close()
    back = Ledger(led.path)
    assert back.answer('class counts')==dict(pos=[1.5, -2.], unit='patient') and back.answer('other') is None
    assert back.parts=={(20.,1.): 1, (1.1,.1): 3} and back.spent().extra==(20.,) and back.spent().kinds==()
    text = led.path.read_text()
    led.path.write_text(text[:text.index('"answer"')])                        # torn: counts as a block, and tells nothing
    assert Ledger(led.path).answer('class counts') is None and Ledger(led.path).steps==6
    led.path.write_text(text.replace('1.5', '2.5'))
    with pytest.raises(CheckpointError, match='line 4'): Ledger(led.path)

# ------------------------------------------------------------ damage

def test_every_cut_of_the_last_two_records(tmp_path):
    led = written(tmp_path/'l.jsonl', 10)
    whole = led.path.read_bytes()
    ends = [i+1 for i,c in enumerate(whole) if c==10]
    for cut in range(ends[-3], len(whole)+1):
        led.path.write_bytes(whole[:cut])
        at = Ledger(led.path)
        # the record that was cut counts; a cut at the end of a line looks whole, and the head of a checkpoint tells
        want = 8+(cut>ends[-3])+(cut>ends[-2])
        assert at.steps==want, cut
        if cut < len(whole)-1:
            with pytest.raises(CheckpointError, match='was cut'): at.check_head(led.head)
        at.begin(FACTS); at.charge(1.1, .1); at.close()
        again = Ledger(led.path)
        assert again.steps==want+1, cut
        assert led.path.read_bytes().startswith(whole[:cut])        # nothing is ever removed

def test_a_crash_while_a_torn_line_is_mended(tmp_path):
    led = written(tmp_path/'l.jsonl', 4)
    torn = led.path.read_bytes()[:-20]
    led.path.write_bytes(torn)
    led.begin(FACTS); led.close()
    mended = led.path.read_bytes()
    for cut in range(len(torn), len(mended)+1):
        led.path.write_bytes(mended[:cut])
        at = Ledger(led.path)
        assert at.steps in (4, 5)
        at.begin(FACTS); at.charge(1.1, .1); at.close()
        assert 5 <= Ledger(led.path).steps <= 6

def damaged(lines, how):
    l = list(lines)
    if how=='steps': l[4] = l[4].replace('"steps": 1', '"steps": 0')
    if how=='noise': l[4] = l[4].replace('1.1', '9.1')
    if how=='facts': l[0] = l[0].replace('"clipping norm": 1.0', '"clipping norm": 2.0')
    if how=='deleted': del l[4]
    if how=='first deleted': del l[0]
    if how=='swapped': l[4],l[5] = l[5],l[4]
    if how=='twice': l.insert(4, l[4])
    if how=='empty line': l.insert(4, '')
    if how=='spaces': l[4] = l[4]+' '
    if how=='last': l[-1] = l[-1].replace('"steps": 1', '"steps": 0')
    if how=='cut in the middle': l[4] = l[4][:40]
    if how=='not text': l[4] = 'ÿ\x00'*20
    if how=='a list': l[4] = '[1, 2]'
    return l

@pytest.mark.parametrize('how,line', [('steps',5), ('noise',5), ('facts',1), ('deleted',5), ('first deleted',1), ('swapped',5), ('twice',6), ('empty line',5), ('spaces',5),
                                      ('last',11), ('cut in the middle',5), ('not text',5), ('a list',5)])
def test_damage_is_named(tmp_path, how, line):
    led = written(tmp_path/'l.jsonl', 10)
    lines = led.path.read_text().splitlines()
    led.path.write_text('\n'.join(damaged(lines, how))+'\n')
    with pytest.raises(CheckpointError, match=f'line {line}:.*restore'): Ledger(led.path)

def test_empty_and_unreadable_files(tmp_path):
    (tmp_path/'l.jsonl').write_text('')
    with pytest.raises(CheckpointError, match='empty'): Ledger(tmp_path/'l.jsonl')
    (tmp_path/'d.jsonl').mkdir()
    with pytest.raises(CheckpointError, match='cannot be read'): Ledger(tmp_path/'d.jsonl')
    (tmp_path/'t.jsonl').write_text('{"kind": "fac')
    with pytest.raises(CheckpointError, match='line 1'): Ledger(tmp_path/'t.jsonl')
    with pytest.raises(CheckpointError, match='right file'): Ledger(tmp_path/'none.jsonl').spent()

def test_folders_that_cannot_be_written(tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(CheckpointError, match='cannot be written'): Ledger(tmp_path/'file'/'l.jsonl').begin(FACTS)
    if os.geteuid()==0: pytest.skip('the superuser may write anywhere')
    (tmp_path/'closed').mkdir(mode=0o555)
    with pytest.raises(CheckpointError, match='cannot be written'): Ledger(tmp_path/'closed'/'l.jsonl').begin(FACTS)

# ------------------------------------------------------------ one training at a time, and only its own

HOLDER = """
import sys, time
from medprivacy.dp.ledger import Ledger
led = Ledger(sys.argv[1]).begin(eval(sys.argv[2]))
led.charge(1.1, .1)
print('held', flush=True)
time.sleep(600)
"""

def test_two_processes_are_refused_and_a_killed_one_is_not_waited_for(tmp_path):
    path = tmp_path/'l.jsonl'
    p = subprocess.Popen([sys.executable, '-c', HOLDER, str(path), repr(FACTS)], stdout=subprocess.PIPE, text=True)
    try:
        assert p.stdout.readline().strip()=='held'
        with pytest.raises(CheckpointError, match='another training'): Ledger(path).begin(FACTS)
        assert Ledger(path).steps==1                # reading is allowed
    finally: p.send_signal(signal.SIGKILL); p.wait(); p.stdout.close()
    led = Ledger(path).begin(FACTS)
    with pytest.raises(CheckpointError, match='close'): Ledger(path).begin(FACTS)
    led.charge(1.1, .1); led.close()
    assert Ledger(path).steps==2

@pytest.mark.parametrize('key', ['unit', 'units', 'rows', 'δ', 'data', 'patients', 'clipping norm', 'noise multiplier', 'sampling rate'])
def test_other_facts_are_refused_and_named(tmp_path, key):
    led = written(tmp_path/'l.jsonl')
    other = {**FACTS, key: 'x' if isinstance(FACTS[key], str) else FACTS[key]*2}
    with pytest.raises(CheckpointError, match=f'{key}: {FACTS[key]} then, {other[key]} now'): Ledger(led.path).begin(other)
    further = Ledger(led.path, further=True)
    if key in ('unit', 'units', 'rows', 'δ', 'data', 'patients'):
        with pytest.raises(CheckpointError, match='another training'): further.begin(other)
    else: further.begin(other).close()
    Ledger(led.path, further=True).begin(FACTS).close()         # no lock is left behind

def test_a_head_of_another_ledger(tmp_path):
    a,b = (written(tmp_path/f'{o}.jsonl') for o in 'ab')
    assert a.run != b.run
    with pytest.raises(CheckpointError, match='another training'): a.check_head(b.head)
    a.check_head(a.head); a.check_head([0, ''])

# ------------------------------------------------------------ what it comes to

def pld(parts, delta):
    from dp_accounting import dp_event
    from dp_accounting.pld import PLDAccountant
    acc = PLDAccountant()
    for (s,q),n in parts.items(): acc.compose(dp_event.PoissonSampledDpEvent(q, dp_event.GaussianDpEvent(s)), n)
    return acc.get_epsilon(delta)

@pytest.mark.filterwarnings('ignore')       # of the other library
@pytest.mark.parametrize('parts', [{(1.,.1): 100, (2.,.2): 50}, {(1.5,.02): 400, (1.1,.05): 30}, {(4.,.05): 200, (8.,.02): 300}, {(1.,.1): 60, (1.2,.1): 60, (10.,1.): 1}],
                         ids=['two rates', 'little added', 'small ε', 'with a question'])
def test_several_kinds_agree_with_another_accountant(parts):
    ref, eps = pld(parts, 1e-5), total_epsilon(parts, 1e-5)
    assert ref*.999 <= eps <= ref*1.012
    assert eps <= total_epsilon(parts, 1e-5, 'rdp')+1e-9

def test_corner_cases_of_the_sum():
    assert total_epsilon({}, 1e-5)==0 and total_epsilon({(1.,.1): 0}, 1e-5)==0
    assert total_epsilon({(0.,.1): 1, (1.,.2): 1}, 1e-5)==math.inf
    assert total_epsilon({(1.,.1): 10}, 1e-5)==epsilon(1., .1, 10, 1e-5)
    assert total_epsilon({(1.,.1): 10, (5.,1.): 2}, 1e-5)==epsilon(1., .1, 10, 1e-5, extra=(5.,5.))
    assert np.isclose(total_epsilon({(3.,1.): 2, (5.,1.): 1}, 1e-5), epsilon(1/math.sqrt(2/9+1/25), 1., 1, 1e-5), rtol=.01)
    one,two = (total_epsilon(o, 1e-5, 'gdp') for o in ({(1.,.1): 100}, {(1.,.1): 50, (1.0000001,.1): 50}))
    assert np.isclose(one, two, rtol=1e-4)

def test_a_further_training_stays_within_the_target_of_both(tmp_path):
    led = Ledger(written(tmp_path/'l.jsonl', 40).path, further=True)
    noise,stop = plan_noise(led, 6., sample_rate=.2, steps=30, delta=1e-4, accountant='rdp')
    assert stop==70
    led.begin({**FACTS, 'noise multiplier': noise, 'sampling rate': .2})
    for _ in range(30): led.charge(noise, .2)
    led.close()
    s = Ledger(led.path).spent()
    assert 5.9 < s.eps <= 6 and s.steps==70 and s.noise_multiplier is None and s.sample_rate is None
    assert s.kinds==((1.1,.1,40), (noise,.2,30))
    with pytest.raises(BudgetError, match='nothing of the target'): plan_noise(led, 5.9, sample_rate=.2, steps=1, delta=1e-4, accountant='rdp')

def test_a_known_seed_is_remembered(tmp_path):
    led = Ledger(written(tmp_path/'l.jsonl').path, further=True).begin({**FACTS, 'private': False})
    led.close()
    assert not Ledger(led.path).spent().private

def test_charging_needs_an_open_file(tmp_path):
    with pytest.raises(CheckpointError, match='begin'): Ledger(tmp_path/'l.jsonl').charge(1., .1)
    with pytest.raises(ConfigError, match='block'): Ledger(tmp_path/'l.jsonl', block=0)
