"""How much longer a private step takes than a normal one, and how much more memory: ours, Opacus' hooks and ghost clipping, torch.func's vmap.

One line per point: point, ratio, goal, ok|short, tab-separated; medians of interleaved repeats of one run. Nothing is asked of the other engines
(goal -). All steps are forward, loss, clipped sum of a `resnet9` of today; noise and optimizer are the same for all and left out. Memory is the peak
of a fresh process above what it had before the first step. Repeats: at least 7, fewer than 7 only for engines that exceed the time of the bench,
which is said in their line. A bench is no test and exits 0.
Run: python tests/bench_dp.py
"""
import resource
import statistics
import subprocess
import sys
import time
import warnings
import torch
from opacus import GradSampleModule
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping
from torch import nn
from medprivacy.dp.clip import clipped_batch
from medprivacy.models.resnet import resnet9

warnings.filterwarnings('ignore')
C, REPEATS, SECONDS = 1., 7, 330
POINTS = [(64, 16, 1.5), (64, 32, 1.4), (128, 16, 1.2), (128, 32, 1.2)]
ENGINES = 'normal', 'ours', 'opacus hooks', 'opacus ghost', 'vmap'


def step_of(engine, px, bs):
    "A function that makes one step of the engine; builds its own model and batch"
    torch.manual_seed(0)
    model, x, y = resnet9(2), torch.randn(bs, 3, px, px), torch.randint(0, 2, (bs,))
    loss, each = nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction='none')
    params = dict(model.named_parameters())
    if engine == 'normal':
        def step(): model.zero_grad(); loss(model(x), y).backward()
    elif engine == 'ours':
        def step(): clipped_batch(model, loss, (x,), (y,), C, check=False)
    elif engine == 'opacus hooks':
        wrapped = GradSampleModule(model)
        def step():
            wrapped.zero_grad()
            loss(wrapped(x), y).backward()
            norms = torch.stack([p.grad_sample.flatten(1).norm(dim=1) for p in params.values()]).norm(dim=0)
            factor = (C/(norms+1e-6)).clamp(max=1.)
            for p in params.values(): p.grad = torch.einsum('i,i...', factor, p.grad_sample); p.grad_sample = None
    elif engine == 'opacus ghost':
        wrapped = GradSampleModuleFastGradientClipping(model, max_grad_norm=C, use_ghost_clipping=True)
        def step():
            wrapped.zero_grad()
            losses = each(wrapped(x), y)
            losses.mean().backward(retain_graph=True)
            factor = wrapped.get_clipping_coef()
            wrapped.zero_grad(); wrapped.disable_hooks()
            (factor*losses).sum().backward()
            wrapped.enable_hooks()
    else:
        values = {k: p.detach() for k, p in params.items()}
        one = lambda v, a, b: loss(torch.func.functional_call(model, v, a[None]), b[None])
        grads = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0))
        def step():
            g = grads(values, x, y)
            norms = torch.stack([o.flatten(1).norm(dim=1) for o in g.values()]).norm(dim=0)
            factor = (C/(norms+1e-6)).clamp(max=1.)
            return {k: torch.einsum('i,i...', factor, o) for k, o in g.items()}
    return step


def times(px, bs, seconds):
    "Seconds of each engine, interleaved; the slow ones sit rounds out when the time is up"
    steps, out = {e: step_of(e, px, bs) for e in ENGINES}, {e: [] for e in ENGINES}
    for step in steps.values(): step()
    steps['ours']()          # the first step has chosen the ways, this one is like all further ones
    end = time.perf_counter()+seconds
    for r in range(REPEATS):
        for e, step in steps.items():
            if e not in ('normal', 'ours') and r >= 1 and time.perf_counter() > end: continue
            start = time.perf_counter(); step(); out[e].append(time.perf_counter()-start)
    return out


def peak(engine, px, bs):
    "MB that steps of an engine need above the idle process, in a process of its own"
    out = subprocess.run([sys.executable, __file__, engine, str(px), str(bs)], capture_output=True, text=True)
    return float(out.stdout.split()[-1]) if out.returncode == 0 else float('nan')


def memory_of_this(engine, px, bs):
    step = step_of(engine, px, bs)
    rss  = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
    before = rss()
    for _ in range(2): step()
    print(rss()-before)


def line(point, ratio, goal): print(f'{point}\t{ratio:.2f}\t{goal or "-"}\t{"ok" if goal is None or ratio <= goal else "short"}', flush=True)


def main():
    start = time.perf_counter()
    for i, (px, bs, goal) in enumerate(POINTS):
        t = times(px, bs, (SECONDS-90-(time.perf_counter()-start))/(len(POINTS)-i))
        base = statistics.median(t['normal'])
        for e in ENGINES[1:]:
            few = '' if len(t[e]) >= REPEATS else f', {len(t[e])} repeats'
            line(f'step {px} px, batch {bs}, {e}{few}', statistics.median(t[e])/base, goal if e == 'ours' else None)
    for px, bs, goal in ((64, 32, None), (128, 32, None), (224, 32, 1.4)):
        base = peak('normal', px, bs)
        for e in ENGINES[1:]:
            if time.perf_counter()-start > SECONDS: return
            if px == 224 and e != 'ours': continue
            line(f'memory {px} px, batch {bs}, {e}', peak(e, px, bs)/base, goal if e == 'ours' else None)


if __name__ == '__main__': main() if len(sys.argv) == 1 else memory_of_this(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
