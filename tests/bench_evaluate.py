"""How much faster the vectorised bootstrap is than a loop in the published style and than scikit-learn per resample.

One line per point: point, ratio, goal, ok|short, tab-separated; medians of interleaved repeats of one run. The loops run fewer resamples
and are scaled to 1,000. A bench is no test and exits 0. Run: python tests/bench_evaluate.py
"""
import os
os.environ.setdefault('OMP_NUM_THREADS', '1')
import time
import numpy as np
from sklearn.metrics import accuracy_score, auc, confusion_matrix, f1_score, roc_auc_score, roc_curve
from medprivacy.evaluate import bootstrap_auroc, metric_draws
from medprivacy.resample import units_of

N_BOOT, L = 1000, 8


def data(n):
    rng = np.random.default_rng(0)
    y = (rng.random((n, L)) < .2)*1.
    return y, rng.normal(size=(n, L))+1.2*y


def published(y, s, n_boot, all_metrics=False):
    "A Python loop over resamples, drawn images and labels, in the style of the published evaluation"
    rng, out = np.random.default_rng(0), []
    for _ in range(n_boot):
        ys, ss = [], []
        for i in rng.integers(0, len(y), len(y)):
            row_y, row_s = [], []
            for l in range(y.shape[1]): row_y.append(y[i][l]); row_s.append(s[i][l])
            ys.append(row_y); ss.append(row_s)
        ys, ss, res = np.array(ys), np.array(ss), []
        for l in range(y.shape[1]):
            fpr, tpr, thr = roc_curve(ys[:, l], ss[:, l])
            res.append(auc(fpr, tpr))
            if all_metrics:
                hit = ss[:, l] >= thr[np.argmax(tpr-fpr)]
                confusion_matrix(ys[:, l], hit); accuracy_score(ys[:, l], hit); f1_score(ys[:, l], hit)
        out.append(res)
    return np.array(out)


def sklearn_loop(y, s, n_boot):
    rng = np.random.default_rng(0)
    idx = rng.integers(0, len(y), (n_boot, len(y)))
    return np.array([[roc_auc_score(y[i, l], s[i, l]) for l in range(y.shape[1])] for i in idx])


def seconds(f, *args):
    t = time.perf_counter(); f(*args); return time.perf_counter()-t


def ratio(fast, slow, slow_boot, repeats=3):
    "Median over interleaved repeats of (slow, scaled to N_BOOT)/fast"
    r = []
    for _ in range(repeats):
        f = seconds(*fast); r.append(seconds(*slow)*N_BOOT/slow_boot/f)
    return float(np.median(r))


def line(point, value, goal): print(f'{point}\t{value:.1f}\t{goal}\t{"ok" if value >= goal else "short"}', flush=True)


def main():
    for n, few, auc_goal, all_goal in ((2000, 10, 190, 90), (10_000, 4, 80, 45)):
        y, s = data(n); u = units_of(n)
        def ours(): return bootstrap_auroc(y, s, N_BOOT)
        def ours_all(): return metric_draws(y, s, np.full(L, .5), u, N_BOOT)
        ours()
        line(f'auroc alone, n={n}, against the published loop', ratio((ours,), (published, y, s, few), few), auc_goal)
        line(f'auroc alone, n={n}, against scikit-learn per resample', ratio((ours,), (sklearn_loop, y, s, few), few), 18)
        line(f'all metrics, fixed thresholds, n={n}, against the published loop',
             ratio((ours_all,), (published, y, s, few, True), few), all_goal)
    y, s = data(40_000)
    took = seconds(bootstrap_auroc, y, s, N_BOOT)
    line('auroc alone, n=40000: runs in 10 s (10/seconds)', 10/took, 1)


if __name__ == '__main__': main()
