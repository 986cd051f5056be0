"""How fast one adversarial step is, against a step written the published way.

One line per point: point, ratio, goal, ok|short, tab-separated; medians of interleaved repeats of one run. A step trains an attacker (it reads
the sex) and then the maker against it, under the loss of a trained disease classifier that stays as it is. Published way: either turn runs
viewmaker, attacker and classifier, with gradients through everything. Ours: `game_learner` with `attackers_first`. Same networks, batch, noise
and optimizers; after a step of either the losses and updates are compared (float32). bf16 is ours in bfloat16 against the published way in
float32. Seconds go to stderr. A bench is no test and exits 0. Run: python tests/bench_obfuscate.py
"""
import os
os.environ.setdefault('OMP_NUM_THREADS', '2')
import sys
import time
import warnings
from contextlib import ExitStack
from copy import deepcopy

warnings.filterwarnings('ignore')
import numpy as np
import torch
from fastai.data.core import DataLoaders
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from medprivacy.models.resnet import create_classifier
from medprivacy.models.viewmaker import Viewmaker
from medprivacy.objectives.adversarial import ObfuscationLoss
from medprivacy.objectives.focal import MaskedBCE
from medprivacy.obfuscate import ViewmakerGame, game_learner
from medprivacy.train import in_precision

POINTS = {64: (32, 1.5, 2.3), 224: (4, 1.5, 2.8)}    # pixels: batch, goals in float32 and bfloat16
REPEATS, LABELS, CHANNELS, LR = 7, 5, 1, 2e-3
ARCHS = dict(attacker='small_resnet', disease='resnet18')    # norms of groups, and of the batch (frozen)


def networks(seed=0, width=1.):
    torch.manual_seed(seed)
    return (Viewmaker(CHANNELS, distortion_budget=.05, num_res_blocks=3, width=width), create_classifier(ARCHS['attacker'], 1, CHANNELS),
            create_classifier(ARCHS['disease'], LABELS, CHANNELS).eval())


def batch(px, n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, CHANNELS, px, px, generator=g), torch.arange(n) % 2, torch.randint(0, 2, (n, LABELS), generator=g).float()


class Published:
    "Two optimizers, each with a turn of its own; every turn runs and differentiates every network"
    def __init__(self, maker, attacker, disease):
        self.maker, self.attacker, self.disease = maker, attacker, disease.requires_grad_(True)
        self.opts = torch.optim.AdamW(attacker.parameters(), LR), torch.optim.Adam(maker.parameters(), LR, betas=(.9, .99), eps=1e-5)
        self.terms, self.bce = ObfuscationLoss('negative', disease_loss=MaskedBCE()), nn.BCEWithLogitsLoss()
    def turn(self, who, x, sex, y, seed):
        torch.manual_seed(seed)                      # the noise of both turns, so that the two ways can be compared
        v = self.maker(x)
        a, d = self.attacker(v), self.disease(v)
        hide, keep = self.terms.terms(a, sex, d, y)
        loss = self.bce(a[:, 0], sex.float()) if who == 0 else hide + keep
        for net in (self.maker, self.attacker, self.disease): net.zero_grad()
        (loss if who else loss + keep).backward()    # through everything, whoever steps
        self.opts[who].step()
        return loss.item()
    def step(self, x, sex, y, seed=0): return [self.turn(who, x, sex, y, seed) for who in (0, 1)]


class Ours:
    "The learner of `train_obfuscator`, one batch at a time"
    def __init__(self, maker, attacker, disease, px, bf16=False):
        game = ViewmakerGame(maker, (ARCHS['attacker'],), LABELS, CHANNELS, disease).to(next(maker.parameters()).dtype)
        game.attackers[0].load_state_dict(attacker.state_dict())
        dls = DataLoaders(*[DataLoader(TensorDataset(*batch(px, 2)), batch_size=2)]*2)
        self.learn, self.open = game_learner(dls, game, 'negative', attacker_steps=1, attackers_first=True), ExitStack()
        self.open.enter_context(in_precision('bf16' if bf16 else 'fp32', game, *game.attackers))    # open as long as a fit is
        cb = self.learn.attackers
        cb.before_fit()
        self.learn.create_opt(); self.learn.opt.set_hypers(lr=LR, wd=0.)
        self.cb, bce = cb, cb.bce
        cb.bce = lambda *args: self.note(bce(*args))
    def note(self, loss): self.attack = loss.item(); return loss
    def step(self, x, sex, y, seed=0):
        "As `Learner._do_one_batch` has it, with the events of the attackers' callback"
        learn, game = self.learn, self.learn.model
        game.train(); learn.training = True; learn.xb, learn.yb = (x,), (sex, y)
        torch.manual_seed(seed)
        self.cb.before_batch()
        loss = learn.loss_func(game(x), sex, y)
        loss.backward()
        learn.opt.step(); learn.opt.zero_grad()
        self.cb.after_step()
        return [self.attack, loss.item()]


def far(a, b): return max(abs(u - v)/max(abs(v), 1e-12) for u, v in zip(a, b))
def updates(net, old): return torch.cat([(p.detach() - o).flatten() for p, o in zip(net.parameters(), old)])


def compare(px, n, width=1., seed=0, dtype=torch.float32):
    "Relative difference of the losses and of the updates of attacker and maker after one step of either"
    nets = [o.to(dtype) for o in networks(seed, width)]
    x, sex, y = batch(px, n, seed); x = x.to(dtype)
    old, stats = [[p.detach().clone() for p in o.parameters()] for o in nets[:2]], {k: v.clone() for k, v in nets[2].state_dict().items()}
    pub, our = Published(*deepcopy(nets)), Ours(*deepcopy(nets), px)
    losses = pub.step(x, sex, y), our.step(x, sex, y)
    game, out = our.learn.model, {}
    for name, a, b, o in (('attacker', game.attackers[0], pub.attacker, old[1]), ('maker', game.maker, pub.maker, old[0])):
        ua, ub = updates(a, o), updates(b, o)
        out[name] = float((ua - ub).norm()/ub.norm())
    frozen = all(torch.equal(v, game.disease.state_dict()[k]) for k, v in stats.items())
    return dict(losses=far(*losses), frozen=frozen, **out)


def seconds(f, *args):
    t = time.perf_counter(); f(*args); return time.perf_counter() - t


def main():
    torch.set_num_threads(2)
    flags = open('/proc/cpuinfo').read() if os.path.exists('/proc/cpuinfo') else ''
    print(f'# bf16 of this processor: {" ".join(f for f in ("avx512_bf16", "amx_bf16") if f in flags) or "none"}', flush=True)
    for px, (n, fp32, bf16) in POINTS.items():
        print(f'  {px} px: {compare(px, n)}', file=sys.stderr, flush=True)
        b, made = batch(px, n), {'published': Published(*networks()), 'fp32': Ours(*networks(), px), 'bf16': Ours(*networks(), px, True)}
        for m in made.values(): m.step(*b)
        took = {k: [] for k in made}
        for _ in range(REPEATS):
            for k, m in made.items(): took[k].append(seconds(m.step, *b))
        print(f'  {px} px, batch {n}: ' + ', '.join(f'{k} {np.median(v):.2f} s' for k, v in took.items()), file=sys.stderr, flush=True)
        for k, goal in (('fp32', fp32), ('bf16', bf16)):
            r = float(np.median(np.array(took['published'])/np.array(took[k])))
            print(f'one step against the published way, {k}, {px} px\t{r:.2f}\t{goal}\t{"ok" if r >= goal else "short"}', flush=True)


if __name__ == '__main__': main()
