"Pretraining without labels: views, losses, neighbours, the two ways of taking turns, resume."
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.optimizer import SGD
from sklearn.neighbors import KNeighborsClassifier
from torch import nn
from torchvision.transforms import v2

from medprivacy.core import CheckpointError, ConfigError, seed_everything
from medprivacy.data.phantom import tiny_records
from medprivacy.models.viewmaker import Viewmaker
from medprivacy.objectives.adversarial import AdversarialNCELoss, AdversarialSimCLRLoss
from medprivacy.objectives.contrast import MemoryBank
from medprivacy.neighbours import KNNMetric, knn_accuracy, knn_scores
from medprivacy.pretrain import (AdversaryCallback, EachImage, PretrainLoss, ViewsEncoder, create_encoder, expert_views,
                                 head_name, load_pretrained, pretrain, pretrain_dls, pretrain_learner)


@pytest.fixture(scope='module')
def recs(): return tiny_records(n=16, size=32)

SMALL = dict(size=32, bs=8, dim=16, hidden=16, epochs=2, t=.2, k=16, device='cpu')
TINY  = dict(distortion_budget=.1, num_res_blocks=1, width=.25)


class Fixed(nn.Module):
    "A maker that learns and draws nothing, so that a second pass sees the same noise"
    def __init__(self): super().__init__(); self.a, self.b = nn.Parameter(torch.full((1,), .1)), nn.Parameter(torch.zeros(1, 1, 1, 32))
    def forward(self, x): return x + self.a*x.flip(3) + self.b


# ---------------------------------------------------------------- views

@pytest.mark.parametrize('channels', [1, 3])
def test_expert_views_stay_in_range_and_differ(channels):
    x = torch.rand(1, channels, 32, 32).repeat(16, 1, 1, 1)
    v = expert_views(32, channels)(x)
    assert v.shape == x.shape and v.min() >= 0 and v.max() <= 1
    assert len(v.flatten(1).unique(dim=0)) == 16
    torch.manual_seed(5); a = expert_views(32, channels)(x)
    torch.manual_seed(5); b = expert_views(32, channels)(x)
    assert torch.equal(a, b)
    assert expert_views(32, channels)(x[:0]).shape == (0, channels, 32, 32)


def test_no_flip_unless_asked():
    "A ramp from dark to light stays one under every crop and jitter, and is turned round by half of the flips"
    x = torch.linspace(.2, .8, 32).expand(64, 1, 32, 32)
    def rises(flip): return (lambda v: v[:, 0, :, -1].mean(1) > v[:, 0, :, 0].mean(1))(expert_views(32, 1, flip=flip)(x))
    assert rises(False).all() and 10 < rises(True).sum() < 54


def test_grey_images_get_no_colour_transforms():
    names = lambda c: {type(t).__name__ for t in expert_views(32, c).tfm.transforms}
    assert 'RandomGrayscale' not in names(1) and 'RandomGrayscale' in names(3)


def test_each_image_has_its_draw():
    x = torch.rand(8, 1, 16, 16)
    torch.manual_seed(0); got = EachImage(v2.RandomErasing(1.))(x)
    torch.manual_seed(0); want = torch.stack([v2.RandomErasing(1.)(o) for o in x])
    assert torch.equal(got, want)


@pytest.mark.parametrize('kw', [dict(crop=0), dict(crop=1.1), dict(jitter=-1), dict(blur=2), dict(grey=-1)])
def test_bad_views(kw):
    with pytest.raises(ConfigError): expert_views(32, 3, **kw)


# ---------------------------------------------------------------- encoders and loaders

@pytest.mark.parametrize('arch', ['small_resnet', 'resnet9', 'resnet18', 'mobilenet_v3_small', 'resnet10t', 'densenet121'])
def test_projection_head_of_any_arch(arch):
    enc = create_encoder(arch, 8, 1, hidden=12).eval()
    head = enc.get_submodule(head_name(enc))
    assert [type(m) for m in head] == [nn.Linear, nn.ReLU, nn.Linear]
    assert head[0].out_features == 12 and enc(torch.rand(2, 1, 32, 32)).shape == (2, 8)


def test_unlabelled_images_take_part(recs, capsys):
    none = recs.df.assign(**{l: np.where(recs.df.patient_id == recs.df.patient_id[0], np.nan, recs.df[l]) for l in recs.labels})
    dls  = pretrain_dls(recs._with(none), 32, 4, device='cpu')
    assert sum(len(dl.dataset) for dl in dls.loaders) == len(recs) and 'dropped' not in capsys.readouterr().out
    for x, row, y in dls.train:
        ds = dls.train.dataset
        assert torch.allclose(x, ds.images(row).float()/255, atol=1e-6)
        want = ds.records.df[list(recs.labels)].to_numpy(float)[row.numpy()]
        assert np.array_equal(y.numpy(), want.astype(np.float32), equal_nan=True)


# ---------------------------------------------------------------- losses and the bank

def reference_update(rows, idx, z, m):
    out = rows.clone()
    for i, v in zip(idx.tolist(), z):
        new = m*rows[i] + (1-m)*v/v.norm()
        out[i] = new/new.norm()
    return out


@pytest.mark.parametrize('m', [0., .5, .9])
@pytest.mark.parametrize('method', ['simclr', 'nce'])
def test_bank_update_is_exact(method, m):
    "SimCLR moves the bank by its first view; only rows of the batch, once, and only in training mode"
    bank = MemoryBank(12, 4, seed=1).double()
    loss = PretrainLoss(AdversarialSimCLRLoss(.1) if method == 'simclr' else AdversarialNCELoss(bank, 5, .1, m), bank, m)
    idx, z1, z2 = torch.tensor([7, 0, 3]), *torch.randn(2, 3, 4, dtype=torch.float64)
    z, old = (z1, z2)[:2 if method == 'simclr' else 1], bank.rows.clone()
    want = reference_update(old, idx, z1, m)
    loss(z, idx)
    assert torch.allclose(bank.rows, want, atol=1e-12)
    rest = [i for i in range(12) if i not in idx.tolist()]
    assert torch.equal(bank.rows[rest], old[rest])
    now = bank.rows.clone()
    loss((*z, z1), idx); loss.eval(); loss(z, idx)                      # validation; the viewmaker's turn
    assert torch.equal(bank.rows, now)


def test_objectives_in_loop_form():
    "Both losses of both methods against sums over single vectors, in float64"
    g = torch.Generator().manual_seed(0)
    z1, z2 = torch.randn(2, 5, 6, generator=g, dtype=torch.float64)
    u1, u2 = [o/o.norm() for o in z1], [o/o.norm() for o in z2]
    t, w = .13, .6
    want = sum(-(u1[i]@u2[i]).item()/t + math.log(sum(math.exp((u1[i]@o).item()/t) for o in [*u1, *u2])) - math.log(10) for i in range(5))/5
    bank = MemoryBank(30, 6, seed=2).double()
    got  = PretrainLoss(AdversarialSimCLRLoss(t, w), bank).sides((z1, z2), torch.arange(5))
    assert math.isclose(got[0], want, rel_tol=1e-9) and math.isclose(got[1], -w*want, rel_tol=1e-9)
    idx, rows = torch.tensor([3, 9, 11, 0, 29]), bank.rows.clone()
    torch.manual_seed(4); neg = torch.randint(0, 30, (5, 7))
    torch.manual_seed(4); got = PretrainLoss(AdversarialNCELoss(bank, 7, t, weight=w), bank).sides((z1,), idx)
    want = sum(-(u1[i]@rows[idx[i]]).item()/t + math.log(sum(math.exp((u1[i]@rows[j]).item()/t) for j in neg[i])) - math.log(7) for i in range(5))/5
    assert math.isclose(got[0], want, rel_tol=1e-6) and math.isclose(got[1], -w*want, rel_tol=1e-6)


def test_nce_has_no_validation_loss():
    bank = MemoryBank(4, 3)
    assert PretrainLoss(AdversarialNCELoss(bank, 2), bank)((torch.randn(2, 3),)*2, torch.tensor([0, 99])).isnan()


# ---------------------------------------------------------------- neighbours

@pytest.mark.parametrize('k', [1, 5, 8])
@pytest.mark.parametrize('bs', [3, 1000])
def test_neighbours_are_those_of_scikit_learn(k, bs):
    g = torch.Generator().manual_seed(k)
    rows = F.normalize(torch.randn(80, 6, generator=g, dtype=torch.float64), dim=1)
    z, c = torch.randn(33, 6, generator=g, dtype=torch.float64), torch.randint(0, 4, (80, 1), generator=g)
    truth = torch.randint(0, 4, (33, 1), generator=g).double()
    ref = KNeighborsClassifier(k, metric='cosine').fit(rows, c[:, 0])
    got = knn_scores(rows, c.double(), z, k, n_classes=4, bs=bs)
    assert np.allclose(got, ref.predict_proba(z)) and math.isclose(knn_accuracy(got, truth, True), ref.score(z, truth[:, 0]), rel_tol=1e-6)
    y, t = torch.randint(0, 2, (80, 3), generator=g).double(), torch.randint(0, 2, (33, 3), generator=g).double()
    got, accs = knn_scores(rows, y, z, k, bs=bs), []
    for j in range(3):
        ref = KNeighborsClassifier(k, metric='cosine').fit(rows, y[:, j])
        assert np.allclose(got[:, j], ref.predict_proba(z)[:, 1])
        accs.append(ref.score(z, t[:, j]))
    assert math.isclose(knn_accuracy(got, t), np.mean(accs), rel_tol=1e-6)


def test_unknown_labels_neither_vote_nor_count():
    rows, z = F.normalize(torch.randn(30, 4), dim=1), torch.randn(9, 4)
    y = torch.randint(0, 2, (30, 2)).float(); y[:20, 0] = torch.nan
    assert torch.allclose(knn_scores(rows, y, z, 3)[:, 0], knn_scores(rows[20:], y[20:, :1], z, 3)[:, 0])
    assert knn_scores(rows, torch.full((30, 1), torch.nan), z, 3).isnan().all()
    assert knn_scores(rows, y, z[:0], 3).shape == (0, 2)
    t = torch.tensor([[1., torch.nan], [0., torch.nan]])
    assert knn_accuracy(torch.tensor([[.9, 0.], [.8, 0.]]), t) == .5 and math.isnan(knn_accuracy(t, t*torch.nan))
    with pytest.raises(ConfigError): knn_scores(rows, y, z, 0)
    with pytest.raises(ConfigError): KNNMetric(MemoryBank(2, 2), y, kind='f1')


@pytest.mark.parametrize('method', ['simclr', 'nce'])
def test_metric_of_an_epoch_is_recomputed(recs, method):
    "What the learner records is the accuracy of scikit-learn's neighbours on the bank after the epoch"
    p = pretrain(recs, method, 'expert', neighbours=3, **SMALL)
    dls = pretrain_dls(recs, 32, 8, device='cpu')
    tr, va = (dl.dataset for dl in dls.loaders[:2])
    with torch.no_grad(): z = p.encoder(va.images(torch.arange(len(va))).float()/255)
    ref = [KNeighborsClassifier(3, metric='cosine').fit(p.bank.rows, tr.ys[1][:, j]).score(z, va.ys[1][:, j]) for j in range(len(recs.labels))]
    assert math.isclose(p.history.knn_accuracy.iloc[-1], np.mean(ref), rel_tol=1e-6)
    assert p.history.valid_loss.isna().all() == (method == 'nce')


# ---------------------------------------------------------------- turns

def learner(recs, update, method='simclr', maker=None, seed=0, encoder=None, **kw):
    seed_everything(seed)
    dls = pretrain_dls(recs, 32, 8, device='cpu')
    return pretrain_learner(dls, encoder or create_encoder('small_resnet', 8, 1, hidden=8), maker or Fixed(), method,
                            update=update, t=.5, k=16, **kw)

def fit(learn, epochs, lr):
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, lr)
    return {k: v.clone() for k, v in learn.model.state_dict().items()}


@pytest.mark.parametrize('method', ['simclr', 'nce'])
@pytest.mark.parametrize('update', ['alternating', 'simultaneous'])
def test_steps_are_those_written_out(recs, method, update, lr=.1, w=.7):
    "An epoch of the learner against torch.autograd.grad and plain descent, the bank included"
    learn = learner(recs, update, method, weight=w, opt_func=partial(SGD, mom=0.), wd=0.)
    twin  = learner(recs, update, method, weight=w)
    twin.dls.train.rng.setstate(learn.dls.train.rng.getstate())
    for l in learn, twin:                                    # in float64, so that 1e-6 means something after several steps
        l.model.double(); l.loss_func.double()
        for dl in l.dls.loaders: dl.batch_tfms = torch.Tensor.double
    e, v  = list(twin.model.encoder.parameters()), list(twin.model.maker.parameters())
    twin.loss_func.bank.rows.copy_(learn.loss_func.bank.rows)
    random = torch.get_rng_state()
    learn.remove_cb(learn.recorder)                          # its smoothing is in float32
    with learn.no_bar(), learn.no_logging(): learn.fit(1, lr)
    torch.set_rng_state(random)
    twin.model.train()
    for x, rows, y in twin.dls.train:
        g = torch.autograd.grad(twin.loss_func(twin.model(x), rows), e+v)
        with torch.no_grad():
            for p, d in zip(e, g): p -= lr*d
        if update == 'alternating':
            twin.loss_func.eval()
            g = (*g[:len(e)], *torch.autograd.grad(twin.loss_func(twin.model(x), rows), v))
            twin.loss_func.train()
        with torch.no_grad():
            for p, d in zip(v, g[len(e):]): p += lr*w*d
    for a, b in zip(learn.model.parameters(), twin.model.parameters()): assert torch.allclose(a, b, atol=1e-6, rtol=0)
    assert torch.allclose(learn.loss_func.bank.rows, twin.loss_func.bank.rows, atol=1e-6, rtol=0)


def test_both_forms_are_one_when_the_viewmaker_rests(recs):
    "Rate 0 for the viewmaker: bit-identical encoders; rate 0 for the encoder: the same viewmaker"
    for rates, moved in (([1e-2, 0.], 'encoder'), ([0., 1e-2], 'maker')):
        start = learner(recs, 'simultaneous').model.state_dict()
        a, b = (fit(learner(recs, u, maker=Fixed(), wd=0.), 2, rates) for u in ('alternating', 'simultaneous'))
        assert any(not torch.equal(a[k], start[k]) for k in a if k.startswith(moved))
        for k in a:
            if moved == 'encoder': assert torch.equal(a[k], b[k])
            else: assert torch.allclose(a[k], b[k], atol=1e-6)
            if not k.startswith(moved): assert torch.equal(a[k], start[k].to(a[k]))
    a, b = (fit(learner(recs, u), 1, 1e-2) for u in ('alternating', 'simultaneous'))
    assert not all(torch.equal(a[k], b[k]) for k in a)                  # else the second pass would be in vain


def test_the_viewmakers_turn_leaves_encoder_statistics_and_bank_alone(recs):
    "BatchNorm counts one batch a step, not two; gradients and flags of the encoder are as before"
    enc = create_encoder('resnet18', 8, 1, hidden=8)
    learn = learner(recs, 'alternating', 'nce', encoder=enc)
    fit(learn, 1, 1e-3)
    assert enc.bn1.num_batches_tracked == len(learn.dls.train)          # one view a step, and none in the other's turn
    assert all(p.requires_grad for p in enc.parameters())
    stats, bank = {k: v.clone() for k, v in enc.state_dict().items()}, learn.loss_func.bank.rows.clone()
    learn.xb, learn.yb = learn.dls.train.one_batch()[:1], learn.dls.train.one_batch()[1:]
    learn.model.train(); learn.adversary.after_step()
    assert all(torch.equal(v, stats[k]) for k, v in enc.state_dict().items()) and torch.equal(learn.loss_func.bank.rows, bank)


@pytest.mark.parametrize('update', ['alternating', 'simultaneous'])
def test_the_viewmaker_works_against_the_encoder(recs, update):
    "With a resting encoder the loss of the same batch rises"
    learn = learner(recs, update, maker=Fixed(), wd=0., opt_func=partial(SGD, mom=0.))
    b = learn.dls.valid.one_batch()
    def loss():
        learn.loss_func.eval(); learn.model.train()
        with torch.no_grad(): out = learn.loss_func.sides(learn.model(b[0]), torch.arange(len(b[0])))[0].item()
        learn.loss_func.train()
        return out
    before = loss(); fit(learn, 3, [0., .05])
    assert loss() > before


def test_expert_views_have_no_adversary(recs):
    learn = learner(recs, 'alternating', maker=expert_views(32))
    assert not any(isinstance(cb, AdversaryCallback) for cb in learn.cbs)
    with pytest.raises(ConfigError, match='update'): AdversaryCallback('both')


# ---------------------------------------------------------------- whole runs

@pytest.mark.parametrize('views', ['viewmaker', 'expert'])
@pytest.mark.parametrize('method', ['simclr', 'nce'])
def test_runs_save_and_load(recs, tmp_path, method, views):
    args = TINY if views == 'viewmaker' else dict(crop=.5)
    p = pretrain(recs, method, views, view_args=args, **SMALL)
    assert len(p.history) == 2 and p.history.train_loss.notna().all() and len(p.bank) == p.config['n_images']
    assert p.patients == set(recs.select(split='train').df.patient_id)
    q, x = load_pretrained(p.save(tmp_path)), torch.rand(2, 1, 32, 32)
    with torch.no_grad(): assert torch.equal(p.encoder(x), q.encoder(x))
    text = ''.join(f.read_bytes().decode('latin-1') for f in tmp_path.iterdir())
    assert not any(i in text for i in p.patients) and 'rows' not in text        # neither patients nor bank
    (tmp_path/'encoder.safetensors').unlink()
    with pytest.raises(CheckpointError, match='no readable'): load_pretrained(tmp_path)


def test_classes_colour_and_bf16(recs):
    from dataclasses import replace
    grade = replace(recs, df=recs.df.assign(grade=recs.df[list(recs.labels)].sum(axis=1)), labels=('grade',), task='multiclass')
    p = pretrain(grade, views='viewmaker', view_args=TINY, precision='bf16', update='simultaneous', **SMALL)
    assert p.history.knn_accuracy.between(0, 1).all() and next(p.encoder.parameters()).dtype == torch.float32
    eyes = tiny_records(n=8, size=32, modality='fundus')
    assert pretrain(eyes, 'nce', 'expert', **SMALL).config['channels'] == 3


class Crash(Callback):
    "Break the fit off after so many batches"
    order = 10_000
    def __init__(self, at): self.now = lambda step: step == at
    def after_batch(self):
        if self.training and self.now(self.train_iter): raise KeyboardInterrupt('crash')


@pytest.mark.parametrize('method, update, at', [('simclr', 'alternating', 1), ('nce', 'simultaneous', 3)])
def test_resume_is_exact(recs, tmp_path, method, update, at):
    "Weights of both sides and the bank go on to the same bits"
    kw = dict(method=method, view_args=TINY, update=update, **SMALL)
    whole = pretrain(recs, cbs=[Crash(-1)], **kw)
    with pytest.raises(KeyboardInterrupt): pretrain(recs, checkpoint=tmp_path, every=1, cbs=[Crash(at)], **kw)
    again = pretrain(recs, checkpoint=tmp_path, every=1, resume=True, cbs=[Crash(-1)], **kw)
    for a, b in zip((whole.encoder, whole.maker, whole.bank), (again.encoder, again.maker, again.bank)):
        for k, v in a.state_dict().items(): assert torch.equal(v, b.state_dict()[k]), k
    assert whole.history.equals(again.history)


@pytest.mark.parametrize('kw', [dict(method='moco'), dict(views='ours'), dict(update='both'), dict(epochs=0), dict(precision='fp16'),
                                dict(resume=True)])
def test_errors_before_work(recs, kw):
    with pytest.raises(ConfigError): pretrain(recs, **{**SMALL, **kw})
