"""How much longer a private step takes than a normal one, and how much more memory: ours, Opacus' hooks and ghost clipping, torch.func's vmap.

One line per point: point, ratio, goal, ok|short, tab-separated; medians of interleaved repeats of one run. Nothing is asked of the other engines
(goal -). A step is forward, loss and clipped sum. A logical step is 4 physical batches of 32, one noise and one step of NAdam, made of what the
training loop is made of (`clipped_batch`, `NoiseSource`); its normal form adds up the gradients of the same 4 batches. A bfloat16 step is compared
with a normal one in float32, and only where the gradients that are added up are seen to be no longer than C. Repeats: 7, of logical steps 21, since
neighbours of a virtual machine move single ones by a tenth; slow engines make fewer when the time of their point is up, which is said in their line.

Memory (Linux) is the peak of a fresh process above what it had before the first step, with every tensor of 1 MB or more in pages of its own (glibc's
MALLOC_MMAP_THRESHOLD_): what steps hold. What the heap of a process without that setting keeps besides, in holes between tensors, differs from run to
run by a tenth: it is printed as `heap`, from the median of three processes each, against the same goal.

A bench is no test and exits 0; it is for a machine that does nothing else. Run: python tests/bench_dp.py [words that a point must contain]
"""
import os
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
import torch
import torchvision
from opacus import GradSampleModule
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping
from torch import nn
from medprivacy.dp.clip import clipped_batch
from medprivacy.dp.noise import NoiseSource
from medprivacy.dp.step import _computing_in, exact_products
from medprivacy.models.resnet import resnet9

warnings.filterwarnings('ignore')
C, REPEATS, LOGICAL_REPEATS, SLOW_SECONDS = 1., 7, 21, 25
OTHERS = 'opacus hooks', 'opacus ghost', 'vmap'
# point → net, px, batch, goal, the other engines
STEPS = {'step 64 px, batch 16': ('resnet9', 64, 16, 1.5, OTHERS), 'step 64 px, batch 32': ('resnet9', 64, 32, 1.4, OTHERS),
         'step 128 px, batch 16': ('resnet9', 128, 16, 1.2, OTHERS), 'step 128 px, batch 32': ('resnet9', 128, 32, 1.2, OTHERS),
         'step 224 px, batch 16': ('resnet9', 224, 16, 1.2, ('opacus hooks',)), 'step 224 px, batch 16, resnet18': ('resnet18', 224, 16, 1.5, ())}
LOGICAL = {'logical 64 px, 4 x 32, NAdam, noise': (64, 1.3), 'logical 128 px, 4 x 32, NAdam, noise': (128, 1.15)}
MEMORY = {'memory 64 px, batch 32': (64, None), 'memory 128 px, batch 32': (128, None), 'memory 224 px, batch 32': (224, 1.4)}


def setup(px, bs, net='resnet9'):
    torch.manual_seed(0)
    model = resnet9(2) if net == 'resnet9' else torchvision.models.resnet18(num_classes=2, norm_layer=lambda c: nn.GroupNorm(32, c))
    return model, torch.randn(bs, 3, px, px), torch.randint(0, 2, (bs,)), nn.CrossEntropyLoss()


def hooks_sum(wrapped, params, loss, x, y):
    "Clipped sum into `.grad` by Opacus' hooks, added to what is there"
    for p in params.values(): p.grad_sample = None
    loss(wrapped(x), y).backward()
    norms = torch.stack([p.grad_sample.flatten(1).norm(dim=1) for p in params.values()]).norm(dim=0)
    factor = (C/(norms+1e-6)).clamp(max=1.)
    out = {k: torch.einsum('i,i...', factor, p.grad_sample) for k, p in params.items()}
    for p in params.values(): p.grad_sample = p.grad = None
    return out


def step_of(engine, px, bs, net='resnet9'):
    "A function that makes one step of the engine; builds its own model and batch"
    model, x, y, loss = setup(px, bs, net)
    each, params = nn.CrossEntropyLoss(reduction='none'), dict(model.named_parameters())
    if engine == 'normal':
        def step(): model.zero_grad(); loss(model(x), y).backward()
    elif engine == 'ours':
        def step(): clipped_batch(model, loss, (x,), (y,), C, check=False)
    elif engine == 'ours bf16':
        def step():
            with exact_products(), _computing_in('bf16', model): return clipped_batch(model, loss, (x,), (y,), C, check=False)
    elif engine == 'opacus hooks':
        wrapped = GradSampleModule(model)
        def step(): hooks_sum(wrapped, params, loss, x, y)
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


def logical_of(engine, px, n=4, bs=32, sigma=1.):
    "One logical step: n physical batches, one noise, NAdam"
    model, x, y, loss = setup(px, n*bs)
    opt, params, source = torch.optim.NAdam(model.parameters(), lr=1e-4), dict(model.named_parameters()), NoiseSource()
    pieces = list(zip(x.split(bs), y.split(bs)))
    def private(sums):
        for k, g in source.add(sums, sigma*C, C, by=n*bs).items(): params[k].grad = g
        opt.step(); opt.zero_grad()
    if engine == 'normal':
        def step():
            for a, b in pieces: (loss(model(a), b)/n).backward()
            opt.step(); opt.zero_grad()
    elif engine == 'ours':
        def step(): private(clipped_batch(model, loss, (x,), (y,), C, physical_bs=bs, check=False).grads)
    else:
        wrapped = GradSampleModule(model)
        def step():
            sums = {k: torch.zeros_like(p) for k, p in params.items()}
            for a, b in pieces:
                for k, g in hooks_sum(wrapped, params, loss, a, b).items(): sums[k] += g
            private(sums)
    return step


def medians(steps, slow=(), repeats=REPEATS):
    "Seconds of each, interleaved, and the repeats; those in `slow` sit rounds out when the time of the point is up"
    out = {e: [] for e in steps}
    for _ in range(2):       # the first step of ours chooses its ways by time; the second is like all others
        for e, step in steps.items():
            if e not in slow or not _: step()
    end = time.perf_counter()+SLOW_SECONDS
    for r in range(repeats):
        for e, step in steps.items():
            if e in slow and r >= 1 and time.perf_counter() > end: continue
            start = time.perf_counter(); step(); out[e].append(time.perf_counter()-start)
    return {e: (statistics.median(t), len(t)) for e, t in out.items()}


def line(point, ratio, goal=None, note=''): print(f'{point}{note}\t{ratio:.2f}\t{goal or "-"}\t{"ok" if goal is None or ratio <= goal else "short"}', flush=True)


def lines(point, found, goals):
    base = found['normal'][0]
    for e, (t, n) in found.items():
        if e != 'normal': line(f'{point}, {e}', t/base, goals.get(e), '' if n >= REPEATS else f', {n} repeats')


def peak(engine, px, bs, heap=False):
    "MB that steps of an engine need above the idle process, in a process of its own"
    env = os.environ if heap else {**os.environ, 'MALLOC_MMAP_THRESHOLD_': str(2**20)}
    out = subprocess.run([sys.executable, __file__, '--peak', engine, str(px), str(bs)], capture_output=True, text=True, env=env)
    return float(out.stdout.split()[-1]) if out.returncode == 0 else float('nan')


def heap_of(px, bs, rounds=3):
    "Median peak of ours over that of a normal step, memory that the heap keeps included"
    both = [statistics.median(peak(e, px, bs, True) for _ in range(rounds)) for e in ('ours', 'normal')]
    return both[0]/both[1]


def memory_of_this(engine, px, bs):
    step   = step_of(engine, px, bs)
    status = lambda key: int(next(l for l in Path('/proc/self/status').read_text().splitlines() if l.startswith(key)).split()[1])/1024
    before = status('VmRSS')
    Path('/proc/self/clear_refs').write_text('5')      # what the imports needed at their peak is forgotten
    for _ in range(2): step()
    print(status('VmHWM')-before)


def bf16_flags():
    file = Path('/proc/cpuinfo')
    return sorted({f for f in file.read_text().split() if f in ('amx_bf16', 'avx512_bf16')}) if file.exists() else []


def longest(px=64, c=.01):
    "Longest gradient of one image that a bfloat16 step adds up, in units of C, with C far below all norms"
    model, x, y, loss = setup(px, 4)
    with exact_products(), _computing_in('bf16', model):
        found = [clipped_batch(model, loss, (x[i:i+1],), (y[i:i+1],), c, check=False) for i in range(4)]
    assert min(float(o.norms) for o in found) > c
    return max(float(sum(g.double().square().sum() for g in o.grads.values()).sqrt())/c for o in found)


def bf16():
    flags, far = bf16_flags(), longest()
    print(f'# bfloat16 in this processor: {", ".join(flags) or "none"}; longest gradient in a bfloat16 step: {far:.7f} C')
    if far > 1+1e-5: return print('# bfloat16 is left out: its gradients are longer than C')
    steps = {'normal': step_of('normal', 128, 32), 'ours bf16': step_of('ours bf16', 128, 32)}
    lines('bfloat16 against float32, 128 px, batch 32', medians(steps), {'ours bf16': 1. if flags else None})


def main(*words):
    wanted = lambda point: not words or any(w in point for w in words)
    print(f'# {os.cpu_count()} processors, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.2f}, torch {torch.__version__}', flush=True)
    for point, (net, px, bs, goal, others) in STEPS.items():
        if wanted(point): lines(point, medians({e: step_of(e, px, bs, net) for e in ('normal', 'ours', *others)}, others), {'ours': goal})
    for point, (px, goal) in LOGICAL.items():
        if wanted(point): lines(point, medians({e: logical_of(e, px) for e in ('normal', 'ours', 'opacus hooks')}, ['opacus hooks'], LOGICAL_REPEATS), {'ours': goal})
    if wanted('bfloat16'): bf16()
    for point, (px, goal) in MEMORY.items():
        if not wanted(point): continue
        base = peak('normal', px, 32)
        for e in ('ours', 'opacus hooks') if px == 224 else ('ours', *OTHERS): line(f'{point}, {e}', peak(e, px, 32)/base, goal if e == 'ours' else None)
        if goal: line(f'{point}, ours, heap', heap_of(px, 32), goal)
    print(f'# load at the end {os.getloadavg()[0]:.2f}')


if __name__ == '__main__':
    if sys.argv[1:2] == ['--peak']: memory_of_this(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else: main(*sys.argv[1:])
