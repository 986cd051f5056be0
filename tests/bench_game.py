"""What training a mechanism costs, against the published game.

One line per mechanism: seconds of an epoch over those of the published game, goal (at most 2), ok|short, tab-separated; medians of interleaved
repeats of one run, on phantoms of 64 px. An epoch of a redraw is one of every teacher and one of the decoder. All makers are trained by
`train_obfuscator` as `frontier` trains them, but the published viewmaker at its full width; loading the images is not counted twice: it is part
of every repeat of every mechanism. Seconds go to stderr. A bench is no test and exits 0. Run: python tests/bench_game.py
"""
import os
os.environ.setdefault('OMP_NUM_THREADS', '2')
import sys
import time
import warnings

warnings.filterwarnings('ignore')
import numpy as np

from medprivacy.data.phantom import tiny_records
from medprivacy.frontier import TRAINED
from medprivacy.obfuscate import train_obfuscator

PATIENTS, EPOCHS, REPEATS, GOAL = 200, 1, 7, 2.
ARGS = {'published': dict(distortion_budget=.1), 'published, a quarter of the width': dict(distortion_budget=.1, width=.25),
        'frequency': dict(distortion_budget=.1, frequency_domain=True), 'confusion': dict(distortion_budget=.1),
        'bottleneck': {}, 'redraw': {}}


def seconds(records, name):
    how = {k: v for k, v in TRAINED[name.split(',')[0]].items() if k != 'share'}
    t = time.perf_counter()
    train_obfuscator(records, **{**how, 'maker_args': ARGS[name]}, epochs=EPOCHS, size=64, bs=32)
    return (time.perf_counter() - t)/EPOCHS


def main():
    records = tiny_records(n=PATIENTS, size=64, images_per_patient=1, fracs=(.8, .1, .1), attack=.2)
    took = {k: [] for k in ARGS}
    for r in range(1 + REPEATS):
        for k in ARGS:
            s = seconds(records, k)
            if r: took[k].append(s)     # the first round warms up
    base = np.array(took['published'])
    for k, v in took.items():
        ratio = float(np.median(np.array(v)/base))
        print(f'  {k}: {np.median(v):.2f} s an epoch', file=sys.stderr, flush=True)
        print(f'an epoch of {k} over one of the published game\t{ratio:.2f}\t{GOAL}\t{"ok" if ratio <= GOAL else "short"}', flush=True)


if __name__ == '__main__': main()
