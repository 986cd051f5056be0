"""How much faster the vectorised bootstrap is than (a) a loop in the published style and (b) scikit-learn per resample; like for like.

One line per point: point, ratio, goal, ok|short, tab-separated; medians of interleaved repeats of one run, on one core. Both sides compute the same
metrics with the same rule for thresholds. The loops run fewer resamples and are scaled to 1,000. A bench is no test and exits 0.
Run: python tests/bench_evaluate.py
"""
import os
for name in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'): os.environ.setdefault(name, '1')
import time
import tracemalloc
import numpy as np
from sklearn.metrics import confusion_matrix, multilabel_confusion_matrix, roc_auc_score, roc_curve
from medprivacy.evaluate import bootstrap_auroc
from medprivacy.metrics import metric_draws
from medprivacy.published import youden_on_every_resample
from medprivacy.resample import units_of

N_BOOT, L, REPEATS = 1000, 8, 3
FIXED = 'auroc', 'accuracy', 'sensitivity', 'specificity', 'f1'


def data(n):
    rng = np.random.default_rng(0)
    y = (rng.random((n, L)) < .2)*1.
    return y, rng.normal(size=(n, L))+1.2*y


def published(y, s, n_boot, all_metrics):
    "Python loops over resamples, labels and drawn images; with `all_metrics` a threshold chosen on every resample"
    rng, out = np.random.default_rng(0), []
    for _ in range(n_boot):
        idx = rng.integers(0, len(y), len(y))
        ys, ss = np.zeros_like(y), np.zeros_like(s)
        for l in range(y.shape[1]):
            yl, sl = np.zeros(len(y)), np.zeros(len(y))
            for i, j in enumerate(idx): yl[i], sl[i] = y[:, l][j], s[:, l][j]
            ys[:, l], ss[:, l] = yl, sl
        res = [roc_auc_score(ys, ss, average=None)]
        if all_metrics:
            thr = np.zeros(y.shape[1])
            for l in range(y.shape[1]):
                fpr, tpr, t = roc_curve(ys[:, l], ss[:, l]); thr[l] = t[np.argmax(tpr-fpr)]
            res += rates_of(multilabel_confusion_matrix(ys, (ss > thr).astype(int)))
        out.append(res)
    return out


def rates_of(m):
    tn, fp, fn, tp = m[:, 0, 0], m[:, 0, 1], m[:, 1, 0], m[:, 1, 1]
    return [(tp+tn)/(tp+tn+fp+fn), tp/(tp+fn), tn/(tn+fp), 2*tp/(2*tp+fp+fn)]


def sklearn_loop(y, s, n_boot, what):
    "scikit-learn on every resample: images drawn by fancy indexing; what: 'auroc', 'fixed' or 'youden' thresholds"
    rng, out = np.random.default_rng(0), []
    for _ in range(n_boot):
        i = rng.integers(0, len(y), len(y)); ys, ss = y[i], s[i]
        for l in range(y.shape[1]):
            res = [roc_auc_score(ys[:, l], ss[:, l])]
            if what != 'auroc':
                t = .5
                if what == 'youden': fpr, tpr, thr = roc_curve(ys[:, l], ss[:, l]); t = thr[np.argmax(tpr-fpr)]
                res += rates_of(confusion_matrix(ys[:, l], ss[:, l] > t)[None])
            out.append(res)
    return out


def seconds(f, *args):
    t = time.perf_counter(); f(*args); return time.perf_counter()-t


def ratio(fast, slow, few):
    "Median over interleaved repeats of the slow time, scaled to N_BOOT, over the fast time"
    fast()
    return float(np.median([seconds(slow)*N_BOOT/few/seconds(fast) for _ in range(REPEATS)]))


def line(point, value, goal): print(f'{point}\t{value:.1f}\t{goal}\t{"ok" if value >= goal else "short"}', flush=True)


def main():
    goals = {2000: (190, 90), 10_000: (80, 45), 40_000: (80, 45)}
    for n, few in ((2000, 10), (10_000, 3), (40_000, 1)):
        y, s = data(n); u = units_of(n)
        def alone(): return bootstrap_auroc(y, s, N_BOOT)
        def youden(): return youden_on_every_resample(y, s, N_BOOT)
        def fixed(): return metric_draws(y, s, np.full(L, .5), u, N_BOOT, metrics=FIXED)
        one, every = goals[n]
        line(f'AUROC alone, n={n}, (a) published loop', ratio(alone, lambda: published(y, s, few, False), few), one)
        line(f'AUROC alone, n={n}, (b) scikit-learn per resample', ratio(alone, lambda: sklearn_loop(y, s, few, 'auroc'), few), 18)
        line(f'all threshold metrics, threshold of every resample, n={n}, (a) published loop', ratio(youden, lambda: published(y, s, few, True), few), every)
        line(f'all threshold metrics, threshold of every resample, n={n}, (b) scikit-learn per resample',
             ratio(youden, lambda: sklearn_loop(y, s, few, 'youden'), few), 18)
        line(f'all threshold metrics, fixed thresholds, n={n}, (b) scikit-learn per resample', ratio(fixed, lambda: sklearn_loop(y, s, few, 'fixed'), few), 18)
    took = float(np.median([seconds(alone) for _ in range(REPEATS)]))
    line(f'AUROC alone, n=40000, {took:.1f} s; ratio = 10 s / time', 10/took, 1)
    tracemalloc.start(); bootstrap_auroc(y, s, N_BOOT); peak = tracemalloc.get_traced_memory()[1]/2**20; tracemalloc.stop()
    line(f'memory, n=40000, peak {peak:.0f} MB; ratio = 153 MB of all counts at once / peak', 40_000*N_BOOT*4/2**20/peak, 1)


if __name__ == '__main__': main()
