"The cache on disk: bit-identical after kills inside its writes, damage, full disks and company; run as a script, it is the process that is killed"
import os
os.environ.setdefault('OMP_NUM_THREADS', '1')
import errno
import json
import random
import signal
import stat
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from medprivacy.core import ConfigError, DataError
from medprivacy.data import cache as cache_module
from medprivacy.data import load as load_module
from medprivacy.data.cache import PixelCache
from medprivacy.data.core import Records
from medprivacy.data.load import load_images, records_dls

N, SIZE, BLOCK, KILLS = 32, 24, 5, 20
N_BLOCKS = -(-N//BLOCK)
PLACES = ('pixels', 'before pixel flush', 'before journal', 'journal', 'before journal flush', 'after journal flush', 'before rename', 'after rename')


def records(root, at=None):
    df = pd.DataFrame(dict(path=[f'{i%4}/{i}.jpg' for i in range(N)])).assign(image_id=lambda t: t.path, patient_id=lambda t: t.path)
    df['sex'], df['split'], df['y'] = np.resize(['F', 'M'], N), np.resize(['train', 'train', 'valid', 'test'], N), np.resize([0., 1., 1.], N)
    return Records(df if at is None else df.iloc[at], root, ['y'], name='films')


def draw(root, seed=0):
    rng = np.random.default_rng(seed)
    for p in records(root).df.path:
        f = root/p; f.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 48), np.uint8)).save(f, quality=90)
    return root


def small_blocks(): cache_module._BLOCK_ROWS = BLOCK
def only(folder, name): return next(Path(folder).glob('*/'+name))


# ---------------------------------------------------------------- the processes that are killed, forked by this file as a script

def die(): os.kill(os.getpid(), signal.SIGKILL)


def strike(place, k, part):
    "Make this process kill itself at the k-th visit to a place, after `part` of the bytes where that is inside a write"
    pwrite, write, fsync, replace, count = os.pwrite, os.write, os.fsync, os.replace, dict.fromkeys(PLACES, 0)
    written = []
    def now(p):
        count[p] += 1
        return p == place and count[p] == k
    def some(data): return bytes(data)[:int(part*len(data))]
    def my_pwrite(fd, data, at):
        if now('pixels'): pwrite(fd, some(data), at); die()
        written.append('pixels')
        return pwrite(fd, data, at)
    def my_write(fd, data):
        if now('before journal'): die()
        if now('journal'): write(fd, some(data)); die()
        written.append('journal')
        return write(fd, data)
    def my_fsync(fd):
        what = written[-1] if written else ''
        if what == 'pixels' and now('before pixel flush') or what == 'journal' and now('before journal flush'): die()
        fsync(fd)
        if what == 'journal' and now('after journal flush'): die()
    def my_replace(a, b):
        if now('before rename'): die()
        replace(a, b)
        if now('after rename'): die()
    os.pwrite, os.write, os.fsync, os.replace = my_pwrite, my_write, my_fsync, my_replace


def forked(work):
    "Run `work` in a fork, and give its process id"
    pid = os.fork()
    if pid: return pid
    code, sys.stdout = 1, open(os.devnull, 'w')
    try: work(); code = 0
    finally: os._exit(code)


def died(pid): return os.waitpid(pid, 0)[1] == signal.SIGKILL


def slowly():
    "Take some milliseconds for each image"
    load = load_module.load_image
    def slow(*args, **kwargs): time.sleep(.004); return load(*args, **kwargs)
    load_module.load_image = slow


def counting():
    "List of the files that are decoded from now on"
    seen, load = [], load_module.load_image
    def counted(path, *args, **kwargs): seen.append(str(path)); return load(path, *args, **kwargs)
    load_module.load_image = counted
    return seen


def script_kill(root, caches):
    "Twenty caches, each built by one to three processes that die in a random place"
    for seed in range(KILLS):
        rng, told = random.Random(seed), []
        for turn in range(1 + seed%3):
            place = PLACES[(seed+3*turn)%len(PLACES)] if turn == 0 else rng.choice(PLACES[:6])
            k = 1 if 'rename' in place else rng.randint(1, N_BLOCKS if turn == 0 else 1)
            part = rng.random()
            def work(): strike(place, k, part); load_images(records(root), SIZE, 1, cache=caches/str(seed))
            told.append([place, k, died(forked(work))])
        print(json.dumps(told))


def script_timed(root, caches):
    "Twenty caches, each built by a process that is killed from outside, at a random moment"
    slowly()
    for seed in range(KILLS):
        pid = forked(lambda: load_images(records(root), SIZE, 1, cache=caches/str(seed)))
        time.sleep(random.Random(seed).uniform(.002, .06)); os.kill(pid, signal.SIGKILL)
        print(json.dumps(died(pid)))


def script_together(root, folder):
    "Three processes at once, on overlapping parts; each stores what it got and how much it decoded"
    slowly()
    at, gate = [range(N), range(N//2, N), range(0, N, 2)], os.pipe()
    def work(i):
        seen = counting(); os.read(gate[0], 1)
        x = load_images(records(root, list(at[i])), SIZE, 1, cache=folder/'cache')
        np.savez(folder/f'{i}.npz', x=x.numpy(), at=list(at[i]), seen=sorted(seen))
    pids = [forked(lambda i=i: work(i)) for i in range(3)]
    time.sleep(.05); os.write(gate[1], b'...')
    print(json.dumps([os.waitpid(p, 0)[1] for p in pids]))


def script_heir(root, folder):
    "A process dies while it holds the lock and another one waits for it"
    slowly()
    first = forked(lambda: load_images(records(root), SIZE, 1, cache=folder/'cache'))
    while not list((folder/'cache').glob('*/journal.jsonl')): time.sleep(.001)
    second = forked(lambda: np.savez(folder/'0.npz', x=load_images(records(root), SIZE, 1, cache=folder/'cache').numpy()))
    time.sleep(.01); os.kill(first, signal.SIGKILL)
    print(json.dumps([died(first), os.waitpid(second, 0)[1]]))


if __name__ == '__main__':
    small_blocks(); torch.set_num_threads(1)
    for what in ('kill', 'timed', 'together', 'heir'):    # in one process, since importing the library takes seconds
        print(what); (folder := Path(sys.argv[2])/what).mkdir()
        if not (pid := os.fork()): globals()['script_'+what](Path(sys.argv[1]), folder); sys.stdout.flush(); os._exit(0)
        os.waitpid(pid, 0)
    sys.exit()

# ---------------------------------------------------------------- the tests

import pytest


@pytest.fixture(scope='module')
def films(tmp_path_factory): return draw(tmp_path_factory.mktemp('films'))


@pytest.fixture(scope='module')
def truth(films): return load_images(records(films), SIZE, 1)


@pytest.fixture(autouse=True)
def blocks(monkeypatch): monkeypatch.setattr(cache_module, '_BLOCK_ROWS', BLOCK)


@pytest.fixture
def decoded(monkeypatch):
    "The files that are decoded, as a list"
    monkeypatch.setattr(load_module, 'load_image', load_module.load_image)    # so that it is put back
    return counting()


@pytest.fixture(scope='module')
def script(films, tmp_path_factory):
    "Run this file as a script, in a process without threads that may fork; gives for each part its lines and its folder"
    to = tmp_path_factory.mktemp('script')
    p = subprocess.run([sys.executable, '-W', 'ignore', __file__, str(films), str(to)], capture_output=True, text=True, timeout=300)
    assert p.returncode == 0, p.stderr
    parts = p.stdout.split('\n')
    told = {}
    for l in parts:
        if l.isalpha() and l not in ('true', 'false'): at = told.setdefault(l, [])
        elif l: at.append(json.loads(l))
    return lambda what: (told[what], to/what)


def whole(root, folder, truth, decoded):
    "The next run gives the right pixels, and the one after it decodes nothing; gives how many the first decoded"
    decoded.clear(); assert torch.equal(load_images(records(root), SIZE, 1, cache=folder), truth)
    n = len(decoded); decoded.clear()
    assert torch.equal(load_images(records(root), SIZE, 1, cache=folder), truth) and decoded == []
    return n


def test_killed_inside_writes(films, truth, script, decoded):
    "Twenty caches, SIGKILL inside and around every write, some several times"
    told, folder = script('kill')
    assert len(told) == KILLS and {t[0][0] for t in told} == set(PLACES)
    assert all(t[0][2] for t in told)
    for seed in range(KILLS):
        n = whole(films, folder/str(seed), truth, decoded)
        if told[seed][0][0] == 'after journal flush': assert n <= N-BLOCK, told[seed]      # what was committed is used


@pytest.mark.skipif(not Path('/proc/self/fd').is_dir(), reason='names of open files are asked of /proc')
def test_pixels_are_on_the_disk_before_their_line(films, tmp_path, monkeypatch):
    "The order that a loss of power needs: pixels, flush, line, flush"
    calls = []
    def note(name):
        real = getattr(os, name)
        def f(fd, *args): calls.append((name, os.readlink(f'/proc/self/fd/{fd}').rpartition('/')[2])); return real(fd, *args)
        monkeypatch.setattr(os, name, f)
    for name in ('pwrite', 'write', 'fsync'): note(name)
    load_images(records(films), SIZE, 1, cache=tmp_path)
    calls = [c for c in calls if 'about' not in c[1]]
    assert calls == [('pwrite', 'pixels.u8'), ('fsync', 'pixels.u8'), ('write', 'journal.jsonl'), ('fsync', 'journal.jsonl')]*N_BLOCKS


def test_killed_at_random_moments(films, truth, script, decoded):
    told, folder = script('timed')
    assert len(told) == KILLS and sum(told) >= KILLS//2
    for seed in range(KILLS): whole(films, folder/str(seed), truth, decoded)


def test_three_processes_at_once(films, truth, script, decoded):
    "All get the right pixels, and no image is decoded twice"
    told, folder = script('together')
    assert told == [[0, 0, 0]]
    got = [np.load(folder/f'{i}.npz') for i in range(3)]
    for g in got: assert np.array_equal(g['x'], truth[g['at']])
    seen = [s for g in got for s in g['seen']]
    assert len(seen) == len(set(seen)) == N
    whole(films, folder/'cache', truth, decoded)


def test_a_killed_writer_leaves_no_lock(films, truth, script, decoded):
    told, folder = script('heir')
    assert told[-1] == [True, 0] and np.array_equal(np.load(folder/'0.npz')['x'], truth)
    whole(films, folder/'cache', truth, decoded)


@pytest.fixture
def built(films, tmp_path):
    load_images(records(films), SIZE, 1, cache=tmp_path/'c')
    return tmp_path/'c'


@pytest.mark.parametrize('name', ['pixels.u8', 'journal.jsonl'])
@pytest.mark.parametrize('share', [0, .001, .3, .5, .77, .999])
def test_truncated(films, truth, built, decoded, name, share):
    f = only(built, name); os.truncate(f, int(share*f.stat().st_size))
    assert whole(films, built, truth, decoded) > 0


def test_truncated_without_checks(films, truth, built):
    "Reading beyond the end of a mapped file would kill the process, so the length is always looked at"
    f = only(built, 'pixels.u8'); os.truncate(f, f.stat().st_size//2)
    assert torch.equal(load_images(records(films), SIZE, 1, cache=built, verify=False), truth)


@pytest.mark.parametrize('name', ['pixels.u8', 'journal.jsonl'])
@pytest.mark.parametrize('seed', range(8))
def test_garbled(films, truth, built, decoded, name, seed):
    "One to twenty bytes overwritten anywhere, newlines among them"
    f, rng = only(built, name), np.random.default_rng(seed)
    a = np.frombuffer(f.read_bytes(), np.uint8).copy()
    at = rng.integers(0, len(a), rng.integers(1, 20)); a[at] ^= rng.integers(1, 255, len(at)).astype(np.uint8)
    if seed%4 == 0: a[at[0]] = ord('\n')
    if name == 'journal.jsonl' and seed == 7: a[np.flatnonzero(a == ord('\n'))[1]] = 32
    f.write_bytes(a.tobytes())
    assert whole(films, built, truth, decoded) > 0


@pytest.mark.parametrize('gone', [('pixels.u8',), ('journal.jsonl',), ('about.json',), ('lock',), ('pixels.u8', 'journal.jsonl', 'lock')])
def test_deleted(films, truth, built, decoded, gone):
    for name in gone: only(built, name).unlink()
    whole(films, built, truth, decoded)


def test_damage_stays_known_without_checks(films, truth, built):
    "A damaged block is written off in the journal, so a later run that does not check the pixels avoids it"
    f = only(built, 'pixels.u8'); a = bytearray(f.read_bytes()); a[0] ^= 255; f.write_bytes(a)
    assert not torch.equal(load_images(records(films), SIZE, 1, cache=built, verify=False), truth)
    assert torch.equal(load_images(records(films, [1]), SIZE, 1, cache=built), truth[1:2])     # another image of that block
    assert torch.equal(load_images(records(films), SIZE, 1, cache=built, verify=False), truth)


def test_changed_image(tmp_path, decoded):
    root = draw(tmp_path/'i'); load_images(records(root), SIZE, 1, cache=tmp_path/'c')
    Image.new('L', (40, 40), 200).save(root/'1'/'5.jpg'); decoded.clear()
    x = load_images(records(root), SIZE, 1, cache=tmp_path/'c')
    assert len([f for f in decoded if f.endswith('5.jpg')]) == len(decoded) == 1 and (x[5] == 200).all()
    assert torch.equal(x, load_images(records(root), SIZE, 1))
    os.utime(root/'0'/'0.jpg', ns=(1, 1)); decoded.clear()
    load_images(records(root), SIZE, 1, cache=tmp_path/'c'); assert len(decoded) == 1
    (root/'0'/'0.jpg').unlink()
    with pytest.raises(DataError, match='1 of 32 images'): load_images(records(root), SIZE, 1, cache=tmp_path/'c')


def test_parts_share_rows(films, truth, tmp_path, decoded):
    "Any choice and order of images, with repeats, uses the same rows"
    for at in ([3, 1], [1, 2, 3, 30], [30, 30, 2], list(range(N))):
        decoded.clear(); assert torch.equal(load_images(records(films, at), SIZE, 1, cache=tmp_path), truth[at])
        assert len(decoded) == {2: 2, 4: 2, 3: 0, N: N-4}[len(at)]
    assert only(tmp_path, 'pixels.u8').stat().st_size == N*SIZE*SIZE


def test_settings_are_kept_apart(films, tmp_path, monkeypatch):
    for kw in (dict(size=8), dict(size=(8, 9)), dict(size=8, channels=3), dict(size=8, resize='pad')):
        for _ in range(2): assert torch.equal(load_images(records(films), **{'channels': 1, **kw}, cache=tmp_path), load_images(records(films), **{'channels': 1, **kw}))
    assert len(list(tmp_path.iterdir())) == 4
    monkeypatch.setattr(cache_module, 'decoder_version', lambda: 'another'); load_images(records(films), 8, 1, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 5


def test_two_roots_in_one_folder(tmp_path):
    a, b = draw(tmp_path/'a', 1), draw(tmp_path/'b', 2)
    for root in (a, b, a): assert torch.equal(load_images(records(root), SIZE, 1, cache=tmp_path/'c'), load_images(records(root), SIZE, 1))


def test_a_reader_sees_what_is_added(films, truth, tmp_path):
    "A map that is open stays right while another object adds rows, and the reader then finds them"
    def decode(p): return load_module.load_image(films/p, SIZE, 1)
    a, b = (PixelCache(tmp_path, films, (1, SIZE, SIZE)) for _ in 'ab')
    paths = list(records(films).df.path)
    rows, _ = a.rows(paths[:10], decode); x = a.pixels
    more, _ = b.rows(paths, decode)
    assert torch.equal(x[rows], truth[:10]) and torch.equal(b.pixels[more], truth)
    assert np.array_equal(a.rows(paths, None)[0], more) and torch.equal(a.pixels[more], truth)


@contextmanager
def as_nobody():
    "Without the rights of root, whom permissions do not stop"
    if os.geteuid(): yield; return
    os.seteuid(65534)
    try: yield
    finally: os.seteuid(0)


def test_read_only_folder(films, truth):
    "It can be used; what it lacks is an error, unless that cannot be read anyway"
    with tempfile.TemporaryDirectory() as t:
        t = Path(t); t.chmod(0o755); root = draw(t/'films')
        load_images(records(root, list(range(20))), SIZE, 1, cache=t/'c')
        for f in [t/'c', *(t/'c').rglob('*')]: f.chmod(0o555 if f.is_dir() else 0o444)
        try:
            with as_nobody():
                assert torch.equal(load_images(records(root, [7, 3]), SIZE, 1, cache=t/'c'), truth[[7, 3]])
                with pytest.raises(ConfigError, match='lacks 12 of the images.*cache=None'): load_images(records(root), SIZE, 1, cache=t/'c')
                with pytest.raises(ConfigError, match='cannot be written'): load_images(records(root), 8, 1, cache=t/'c')
            (root/'3'/'31.jpg').write_bytes(b'')
            with as_nobody(), pytest.raises(DataError, match='1 of 21 images'): load_images(records(root, [*range(20), 31]), SIZE, 1, cache=t/'c')
        finally:
            for f in [t/'c', *(t/'c').rglob('*')]: f.chmod(stat.S_IRWXU)


@pytest.mark.parametrize('share', [.05, .4, .9])
def test_full_disk(films, truth, tmp_path, decoded, share):
    "A limit on the size of files, which stops a write in its middle as a full disk does"
    import resource
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share*N*SIZE*SIZE), hard))
    try:
        for _ in range(2):
            with pytest.raises(ConfigError, match='no room for .* images .*stays valid'): load_images(records(films), SIZE, 1, cache=tmp_path)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    decoded.clear(); assert torch.equal(load_images(records(films), SIZE, 1, cache=tmp_path), truth)
    assert len(decoded) == N - int(share*N)//BLOCK*BLOCK
    whole(films, tmp_path, truth, decoded)


@pytest.mark.parametrize('call', ['pwrite', 'write', 'fsync'])
@pytest.mark.parametrize('code', [errno.ENOSPC, errno.EDQUOT])
def test_no_room_at_any_call(films, truth, tmp_path, decoded, monkeypatch, call, code):
    "Some file systems notice only when they flush; short writes are carried on"
    real, n = getattr(os, call), [0]
    def failing(fd, *args):
        n[0] += 1
        if n[0] == 4: raise OSError(code, os.strerror(code))
        return real(fd, *args) if call == 'fsync' else real(fd, bytes(args[0])[:100], *args[1:])
    with monkeypatch.context() as m:
        m.setattr(os, call, failing)
        with pytest.raises(ConfigError, match='no room'): load_images(records(films), SIZE, 1, cache=tmp_path)
    whole(films, tmp_path, truth, decoded)


def test_room_is_asked_for_first(films, tmp_path, monkeypatch, decoded):
    monkeypatch.setattr(cache_module.shutil, 'disk_usage', lambda p: type('U', (), dict(free=1000)))
    with pytest.raises(ConfigError, match='no room for 32 images of 576 bytes.*1000 bytes are free'): load_images(records(films), SIZE, 1, cache=tmp_path)
    assert decoded == [] and not only(tmp_path, 'pixels.u8').stat().st_size


def test_unreadable_images_are_tried_again(tmp_path, decoded):
    "They take no row; once mended, they are read"
    root = draw(tmp_path/'i'); good = (root/'2'/'2.jpg').read_bytes(); (root/'2'/'2.jpg').write_bytes(good[:300])
    for _ in range(2):
        with pytest.raises(DataError, match='1 of 32 images.*\n.*2.jpg'): load_images(records(root), SIZE, 1, cache=tmp_path/'c')
    (root/'2'/'2.jpg').write_bytes(good)
    whole(root, tmp_path/'c', load_images(records(root), SIZE, 1), decoded)


def test_loaders_are_equal_with_and_without(films, tmp_path):
    "Bit-identical batches; one store for all splits"
    plain = records_dls(records(films), 'sex', SIZE, 4, device='cpu')
    for _ in range(2):
        dls = records_dls(records(films), 'sex', SIZE, 4, device='cpu', cache=tmp_path)
        for a, b in zip(plain.loaders, dls.loaders):
            i = range(len(a.dataset)); assert all(torch.equal(u, v) for u, v in zip(a.fetch(i), b.fetch(i)))
        assert len({l.dataset.store.data_ptr() for l in dls.loaders}) == 1
