"""How fast images reach the training loop, against a loader in the published style and a plain torchvision loader.

One line per point: point, ratio, goal, ok|short, tab-separated; medians of interleaved repeats of one run. Counted at the output of
`records_dls`: float32 in [0,1], batches of 64, drawn 512 px grey JPEGs resized to 224. Cores: `one core` pins the process to one core, both
sides alike (no worker processes, one torch thread); `two cores` gives our side two torch threads and two or more decoding threads, and the plain
loader two worker processes. All files and caches are in the memory of the system on both sides. Rates in images/s go to stderr. Cold is always
measured on a table of 300 rows, one for each file. A bench is
no test and exits 0. Run: python tests/bench_data.py
"""
import os
os.environ.setdefault('OMP_NUM_THREADS', '2')
import contextlib
import io
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

warnings.filterwarnings('ignore')
import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

from medprivacy.data.core import Records
from medprivacy.data.load import records_dls

FILES, SIDE, SIZE, BS, ROWS, REPEATS = 300, 512, 224, 64, (300, 20_000, 190_000), 5
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else [0]


def draw(folder):
    "Textured grey JPEGs: a body, ribs, film grain; about 50 KB each"
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:SIDE, :SIDE]/SIDE
    grain = rng.normal(size=(2*SIDE, 2*SIDE)).astype(np.float32)
    for i in range(FILES):
        a, b = rng.integers(0, SIDE, 2)
        im = 105 + 45*np.sin(60*y + 8*(x-.5)**2 + i) + 70*np.exp(-((x-.5)**2 + (y-.5)**2)*8) + 12*grain[a:a+SIDE, b:b+SIDE]
        Image.fromarray(im.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(.8)).save(folder/f'{i:05d}.jpg', quality=85)


def table(n, ids):
    "n rows that repeat the files, so that only the length of the table differs"
    num = np.arange(n) if ids == 'int' else np.array([f'patient{k//2:06d}_study1_view{k%2}' for k in range(n)])
    df = pd.DataFrame(dict(image_id=num, path=[f'all/{k%FILES:05d}.jpg' for k in range(n)], patient_id=num))
    return df.assign(sex=np.resize(['F', 'M'], n), split='train', y=np.resize([0., 1., 1.], n))


def records(df, root):
    "All rows for training but two, which the loaders ask for"
    df = pd.concat([df, df.iloc[:2].assign(split='valid')], ignore_index=True)
    return Records(df, root, ['y'], name='bench')


class Published(Dataset):
    "In the published style: the table is searched for each item, the file decoded at its full size, transformed alone"
    def __init__(self, df, root):
        self.df, self.root, self.ids = df, root, list(df.image_id)
        self.tfm = T.Compose([T.Resize((SIZE, SIZE)), T.ToTensor()])
    def __len__(self): return len(self.ids)
    def __getitem__(self, i):
        row = self.df[self.df.image_id == self.ids[i]].iloc[0]
        im  = Image.open(self.root/row['path']).convert('L')
        return self.tfm(im), torch.tensor(float(row['y']))


def plain(root, workers):
    "torchvision's ImageFolder as it comes (it opens every image as RGB), Resize, ToTensor"
    return DataLoader(ImageFolder(root, T.Compose([T.Resize((SIZE, SIZE)), T.ToTensor()])), batch_size=BS, shuffle=True, num_workers=workers)


def grey(path):
    with open(path, 'rb') as f: return Image.open(f).convert('L')


def plain_grey(root, workers):
    dl = plain(root, workers); dl.dataset.loader = grey
    return dl


def ours(df, root, cache):
    with contextlib.redirect_stdout(io.StringIO()): return records_dls(records(df, root), 'labels', SIZE, BS, device='cpu', cache=cache).train


def rate(dl, n):
    "Images/s over at least n images, whole epochs begun anew as needed"
    seen, t = 0, time.perf_counter()
    while seen < n:
        for b in dl:
            seen += len(b[0])
            if seen >= n: break
    return seen/(time.perf_counter()-t)


def cold(df, root, cache):
    "Images/s from nothing: decode, write and flush the cache, and one pass over the batches"
    shutil.rmtree(cache, ignore_errors=True)
    t = time.perf_counter(); n = sum(len(b[0]) for b in ours(df, root, cache))
    return n/(time.perf_counter()-t)


def cores(n):
    "Use n cores from now on, worker processes included"
    if hasattr(os, 'sched_setaffinity'): os.sched_setaffinity(0, CORES[:n])
    torch.set_num_threads(min(n, len(CORES)))


def line(point, value, goal): print(f'{point}\t{value:.2f}\t{goal}\t{"ok" if value >= goal else "short"}', flush=True)
def tell(what, rates): print(f'  {what}: ' + ', '.join(f'{k} {np.median(v):.0f}' for k, v in rates.items()) + ' images/s', file=sys.stderr, flush=True)


def interleaved(makers, repeats=REPEATS):
    "Name → rates, one of each in turn"
    out = {k: [] for k in makers}
    for _ in range(repeats):
        for k, f in makers.items(): out[k].append(f())
    return out


def ratio(rates, a, b): return float(np.median(np.array(rates[a])/np.array(rates[b])))


def main():
    with tempfile.TemporaryDirectory() as t:
        root, cache = Path(t)/'img', Path(t)/'cache'
        (root/'all').mkdir(parents=True); draw(root/'all')
        df = table(FILES, 'int')
        for n, workers in ((1, 0), (2, 2)):
            if n > len(CORES): continue
            cores(n); word = {1: 'one core', 2: 'two cores'}[n]
            warm = ours(df, root, cache); rate(warm, FILES)
            r = interleaved({'warm': lambda: rate(warm, 12_000), 'cold': lambda: cold(df, root, Path(t)/'cold'),
                             'ImageFolder': lambda: rate(plain(root, workers), FILES), 'ImageFolder grey': lambda: rate(plain_grey(root, workers), FILES)})
            tell(word, r)
            line(f'warm cache against ImageFolder, {word} each', ratio(r, 'warm', 'ImageFolder'), 50)
            line(f'cold decode against ImageFolder, {word} each', ratio(r, 'cold', 'ImageFolder'), 2)
            line(f'warm cache against ImageFolder with a grey loader, {word} each', ratio(r, 'warm', 'ImageFolder grey'), 50)
            line(f'cold decode against ImageFolder with a grey loader, {word} each', ratio(r, 'cold', 'ImageFolder grey'), 1)
        cores(1)
        for ids in ('int', 'string'):
            dls, old = {}, {}
            for n in ROWS:
                d = table(n, 'int' if ids == 'int' else 'text')
                dls[n], old[n] = ours(d, root, cache), DataLoader(Published(d, root), batch_size=BS, shuffle=True)
            # half an epoch of the longest table, so that drawing its whole order is counted twice over
            r = interleaved({**{n: (lambda n=n: rate(dls[n], ROWS[-1]//2)) for n in ROWS}, 'cold': lambda: cold(df, root, Path(t)/'cold'), **{f'published {n}': (lambda n=n: rate(old[n], 64)) for n in ROWS}}, 3)
            tell(f'{ids} ids, one core, by rows', r)
            # no goal is set against the published style: 1 is as fast
            for n in ROWS: line(f'warm cache against the published style, {n} rows, {ids} ids, one core each', ratio(r, n, f'published {n}'), 1)
            for n in ROWS: line(f'cold decode against the published style, {n} rows, {ids} ids, one core each', ratio(r, 'cold', f'published {n}'), 1)
            line(f'our rate at {ROWS[-1]} rows over that at {ROWS[0]}, {ids} ids, one core', ratio(r, ROWS[-1], ROWS[0]), .9)


if __name__ == '__main__': main()
