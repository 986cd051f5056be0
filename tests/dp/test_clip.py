"Clipped sums against a loop over samples in float64"
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from medprivacy.core import ConfigError, UnsupportedUnderDP
from medprivacy.dp.clip import check_model, clipped_batch, clipped_gradient, sample_losses
from medprivacy.models.resnet import make_private_ready, resnet9
from medprivacy.objectives.focal import FocalLoss, MaskedBCE, MultilabelFocalLoss
from medprivacy.probe import ProbeLoss

def by_loop(model, loss_func, x, y, c):
    "The definition, one sample at a time"
    params = {n: p for n,p in model.named_parameters() if p.requires_grad}
    sums, norms = {n: torch.zeros_like(p) for n,p in params.items()}, []
    for i in range(len(x)):
        gs = torch.autograd.grad(loss_func(model(x[i:i+1]), y[i:i+1]), list(params.values()), allow_unused=True)
        gs = [torch.zeros_like(p) if g is None else g for g,p in zip(gs, params.values())]
        norms.append(sum(g.double().pow(2).sum() for g in gs).sqrt())
        for n,g in zip(params, gs): sums[n] += g*min(1., c/(norms[-1].item()+1e-6))
    return sums, torch.stack(norms) if norms else torch.zeros(0)

def compare(model, loss_func, x, y, c, tol=1e-8, **kw):
    xs, ys = (x,), (y,)
    o = clipped_batch(model, loss_func, xs, ys, c, **kw)
    ref, norms = by_loop(model, loss_func, x, y, c)
    assert (o.norms-norms).abs().max() <= tol*norms.max()
    for n,g in ref.items(): assert (o.grads[n]-g).abs().max() <= tol*max(1., g.abs().max().item()), n
    return o

class Bare(nn.Module):
    "Parameters of its own around inner layers"
    def __init__(self):
        super().__init__()
        self.scale, self.inner = nn.Parameter(torch.ones(4)), nn.Linear(4, 4)
    def forward(self, x): return self.inner(x*self.scale)

class InPlace(nn.Module):
    "A residual block as torchvision writes it"
    def __init__(self): super().__init__(); self.a, self.b = nn.Conv2d(4,4,3,padding=1), nn.GroupNorm(2,4)
    def forward(self, x):
        out = self.b(self.a(x)); out += x
        return F.relu_(out)

def flat(m): return nn.Sequential(m, nn.Flatten())
LAYERS = {
    'linear': lambda: (nn.Linear(4,3), (4,)), 'linear over tokens': lambda: (flat(nn.Linear(4,3)), (5,4)), 'linear, in-place relu': lambda: (nn.Sequential(nn.Linear(4,3), nn.ReLU(True)), (4,)),
    'conv1d': lambda: (flat(nn.Conv1d(4,6,3,stride=2,padding=1,groups=2)), (4,9)),
    'conv2d': lambda: (flat(nn.Conv2d(4,6,3,stride=2,padding=1)), (4,8,8)), 'depthwise': lambda: (flat(nn.Conv2d(4,8,3,groups=4,dilation=2)), (4,9,8)),
    'no bias': lambda: (flat(nn.Conv2d(4,6,1,bias=False)), (4,5,5)), 'same': lambda: (flat(nn.Conv2d(4,6,3,padding='same')), (4,6,6)),
    'circular': lambda: (flat(nn.Conv2d(4,6,3,padding=1,padding_mode='circular')), (4,6,6)), 'reflect': lambda: (flat(nn.Conv2d(4,6,3,padding=1,padding_mode='reflect')), (4,6,6)),
    'conv3d': lambda: (flat(nn.Conv3d(2,3,3,padding=1)), (2,4,4,4)), 'transposed': lambda: (flat(nn.ConvTranspose2d(4,3,3,stride=2)), (4,4,4)),
    'group norm': lambda: (flat(nn.GroupNorm(2,4)), (4,5,5)), 'layer norm': lambda: (flat(nn.LayerNorm(4)), (3,4)), 'rms norm': lambda: (flat(nn.RMSNorm(4)), (3,4)),
    'instance norm': lambda: (flat(nn.InstanceNorm2d(4, affine=True)), (4,5,5)), 'bare': lambda: (Bare(), (4,)), 'in place': lambda: (flat(InPlace()), (4,6,6)),
    'weight norm off': lambda: (nn.Sequential(nn.Flatten(), nn.Linear(16,2), nn.Tanh(), nn.Linear(2,2)), (4,4))}

@pytest.mark.parametrize('name', LAYERS)
@pytest.mark.parametrize('n', [5, 1])
def test_layers(name, n):
    torch.manual_seed(0)
    layer, shape = LAYERS[name]()   # built after seeding: else the test depends on what ran before it
    model = nn.Sequential(layer).double()
    x = torch.randn(n, *shape).double()
    y = torch.randn_like(model(x).detach())
    loss = lambda p,t: (p-t).pow(2).sum()
    o = compare(model, loss, x, y, .1)
    assert (o.norms > .1).any()   # else nothing was clipped

def test_embedding():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 3), nn.Flatten(), nn.Linear(12, 2)).double()
    compare(model, nn.CrossEntropyLoss(), torch.randint(0, 7, (6,4)), torch.randint(0, 2, (6,)), .5)

def masked_bce(pred, y):
    known = ~y.isnan()
    return F.binary_cross_entropy_with_logits(pred[known], y[known])

X = torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
Y = torch.tensor([0,1,1,0,1,0,0])
M = torch.tensor([[0.,1],[1,float('nan')],[float('nan'),0],[1,1],[0,0],[1,0],[0,float('nan')]]).double()
LOSSES = {'cross-entropy': (nn.CrossEntropyLoss(), Y), 'weighted': (nn.CrossEntropyLoss(weight=torch.tensor([1.,9.]).double()), Y),
          'sum': (nn.CrossEntropyLoss(reduction='sum'), Y), 'masked': (masked_bce, M), 'smoothed': (nn.CrossEntropyLoss(label_smoothing=.1), Y)}

@pytest.mark.parametrize('name', LOSSES)
@pytest.mark.parametrize('physical_bs', [None, 3, 1])
def test_losses_and_pieces(name, physical_bs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3,8,3,2), nn.GroupNorm(2,8), nn.ReLU(True), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32,2)).double()
    loss, y = LOSSES[name]
    o = compare(model, loss, X, y, .5, physical_bs=physical_bs)
    assert o.preds.shape==(7,2) and not o.preds.requires_grad
    assert torch.allclose(o.losses, torch.stack([loss(o.preds[i:i+1], y[i:i+1]) for i in range(7)]))

def branching(p, y):
    "A loss that looks at its target in Python"
    return F.mse_loss(p, y) if float(y.sum()) > 0 else F.l1_loss(p, y)

@pytest.mark.parametrize('loss', [nn.CrossEntropyLoss(weight=torch.tensor([1., 9., 2.])), nn.CrossEntropyLoss(label_smoothing=.1), branching,
                                  nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1., 4., 2.])), nn.BCEWithLogitsLoss(), MaskedBCE(), MaskedBCE([1., 4., 2.]),
                                  MultilabelFocalLoss(2.), FocalLoss(2., [1., 2., 3.])], ids=['weighted', 'smoothed', 'branching', 'positive weights', 'labels', 'known labels',
                                  'known labels, positive weights', 'focal of labels', 'focal of classes'])
def test_losses_of_images_equal_one_call_for_each(loss):
    torch.manual_seed(0)
    pred = torch.randn(6, 3, requires_grad=True)
    y    = torch.tensor([0, 1, 2, 2, 1, 0]) if isinstance(loss, (nn.CrossEntropyLoss, FocalLoss)) else torch.rand(6, 3)-.5*(torch.arange(6) % 2)[:, None]
    want = torch.stack([loss(pred[i:i+1], y[i:i+1]) for i in range(6)])
    got  = sample_losses(loss, pred, (y,))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(o.square().sum(), pred)[0] for o in (got, want)))

def test_losses_that_stand_alone_are_asked_once_and_others_image_by_image(monkeypatch):
    calls = []
    for kind in (nn.CrossEntropyLoss, nn.BCEWithLogitsLoss, MaskedBCE, FocalLoss, MultilabelFocalLoss):
        monkeypatch.setattr(kind, 'forward', lambda self,*a,f=kind.forward: calls.append(len(a[0])) or f(self, *a))
    pred, classes, labels = torch.randn(4, 3), torch.tensor([0, 2, 1, 1]), torch.rand(4, 3)
    for loss,y in ((nn.CrossEntropyLoss(), classes), (nn.BCEWithLogitsLoss(), labels), (MaskedBCE(), labels), (FocalLoss(2.), classes), (MultilabelFocalLoss(), labels)):
        sample_losses(loss, pred, (y,))
        assert calls==[4] and loss.reduction=='mean'
        calls.clear()
    for loss,y in ((nn.CrossEntropyLoss(torch.ones(3)), classes), (nn.CrossEntropyLoss(ignore_index=2), classes), (nn.CrossEntropyLoss(), torch.full((4, 3), 1/3)),
                   (nn.CrossEntropyLoss(reduction='sum'), classes), (nn.BCEWithLogitsLoss(torch.ones(3)), labels), (MaskedBCE(reduction='sum'), labels)):
        sample_losses(loss, pred, (y,))
        assert calls==[1]*4
        calls.clear()

@pytest.mark.parametrize('kind', ['binary', 'class', 'age'])
def test_the_loss_of_a_probe_is_asked_once(kind, monkeypatch):
    torch.manual_seed(0)
    pred, nan = torch.randn(5, 3, requires_grad=True), float('nan')
    y = {'binary': torch.tensor([[1., nan, 0.], [nan]*3, [0., 1., 1.], [nan, 1., -1.], [.3, 0., 1.]]),
         'class': torch.tensor([2., nan, 0., 1., -1.]), 'age': torch.tensor([30., nan, 91., 50., 64.])}[kind]
    loss, calls = ProbeLoss(kind), []
    want = torch.stack([loss(pred[i:i+1], y[i:i+1]) for i in range(5)])
    monkeypatch.setattr(ProbeLoss, 'forward', lambda *a: calls.append(a))
    got  = sample_losses(loss, pred, (y,))
    assert not calls and got[1]==0
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(o.square().sum(), pred)[0] for o in (got, want)))

def test_a_probe_whose_loss_was_exchanged_is_asked_image_by_image():
    loss, pred, y = ProbeLoss('binary'), torch.randn(4, 3), torch.rand(4, 3)
    loss.bce = nn.L1Loss()
    torch.testing.assert_close(sample_losses(loss, pred, (y,)), (pred-y).abs().mean(1))

def test_known_labels_of_one_image_count_for_that_image_alone():
    pred, y = torch.randn(5, 3, requires_grad=True), torch.tensor([[1., float('nan'), 0.], [-1., -1., -1.], [0., 1., 1.], [float('nan'), 1., -1.], [.3, 0., 1.]])
    want = torch.stack([MaskedBCE([2., 1., 3.])(pred[i:i+1], y[i:i+1]) for i in range(5)])
    got  = sample_losses(MaskedBCE([2., 1., 3.]), pred, (y,))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(o.square().sum(), pred)[0] for o in (got, want)))
    assert got[1]==0

@pytest.mark.parametrize('net', ['resnet9', 'resnet18 unmodified but for its norms', 'resnet18 converted'])
def test_networks(net):
    torch.manual_seed(0)
    if net=='resnet9': model = resnet9(2)
    elif 'unmodified' in net: model = torchvision.models.resnet18(num_classes=2, norm_layer=lambda c: nn.GroupNorm(8, c))
    else: model = make_private_ready(torchvision.models.resnet18(num_classes=2))[0]
    compare(model.double(), nn.CrossEntropyLoss(), X[:3], Y[:3], 1., physical_bs=2)

def test_float32_is_close_to_float64():
    torch.manual_seed(0)
    model = resnet9(2)
    ours, norms = clipped_gradient(model, nn.CrossEntropyLoss(), X[:3].float(), Y[:3], 1.)
    ref, ref_norms = by_loop(model.double(), nn.CrossEntropyLoss(), X[:3], Y[:3], 1.)
    assert ((norms-ref_norms).abs()/ref_norms).max() < 1e-5
    assert max((ours[n]-g).abs().max() for n,g in ref.items()) < 1e-5*max(g.abs().max() for g in ref.values())

def test_no_clipped_gradient_exceeds_c():
    torch.manual_seed(0)
    model = nn.Linear(100_000, 20)
    for i in range(3):
        g, _ = clipped_gradient(model, nn.MSELoss(), torch.randn(1, 100_000)*10, torch.randn(1, 20), 1.)
        assert sum(o.double().pow(2).sum() for o in g.values()).sqrt() <= 1+1e-6

def test_empty_batch_is_zero():
    model = resnet9(2)
    o = clipped_batch(model, nn.CrossEntropyLoss(), (X[:0].float(),), (Y[:0],), 1.)
    assert set(o.grads)=={n for n,_ in model.named_parameters()} and all((g==0).all() for g in o.grads.values())
    assert len(o.norms)==len(o.losses)==0 and o.preds is None

def test_a_sample_without_a_finite_gradient_counts_nothing():
    torch.manual_seed(0)
    model, x = nn.Linear(4, 2).double(), torch.randn(3, 4).double()
    y = M[:3].clone(); y[1] = float('nan')   # no known label: the masked mean is 0/0
    got, _ = clipped_gradient(model, masked_bce, x, y, .5)
    ref, _ = by_loop(model, masked_bce, x[[0,2]], y[[0,2]], .5)
    assert (got['weight']-ref['weight']).abs().max() < 1e-12

def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(4,3), nn.ReLU(), nn.Linear(3,2)).double()
    model[0].requires_grad_(False)
    compare(model, nn.CrossEntropyLoss(), torch.randn(5,4).double(), Y[:5], .3)
    assert list(clipped_gradient(model, nn.CrossEntropyLoss(), torch.randn(5,4).double(), Y[:5], .3)[0]) == ['2.weight','2.bias']

def test_several_inputs_and_targets():
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b = nn.Linear(3,2), nn.Linear(4,2)
        def forward(self, u, v): return self.a(u), self.b(v)
    torch.manual_seed(0)
    m, u, v = Two().double(), torch.randn(5,3).double(), torch.randn(5,4).double()
    loss = lambda p,s,t: F.mse_loss(p[0], s) + F.mse_loss(p[1], t)
    s, t = torch.randn(2, 5, 2).double()
    o = clipped_batch(m, loss, (u,v), (s,t), .5, physical_bs=2)
    total = {n: torch.zeros_like(p) for n,p in m.named_parameters()}
    for i in range(5):
        k = slice(i, i+1)
        gs = torch.autograd.grad(loss(m(u[k],v[k]), s[k], t[k]), list(m.parameters()))
        norm = torch.stack([g.norm() for g in gs]).norm().item()
        for n,g in zip(total, gs): total[n] += g*min(1, .5/(norm+1e-6))
    for n in total: assert (total[n]-o.grads[n]).abs().max() < 1e-10
    assert o.preds[1].shape==(5,2)

def test_nothing_is_left_on_the_model_even_after_an_error():
    model = nn.Sequential(nn.Conv2d(3,4,3,padding=1,padding_mode='circular'), nn.Flatten(), nn.LazyLinear(2))
    model(X[:1].float())
    def broken(p, t): raise RuntimeError('broken')
    with pytest.raises(RuntimeError, match='broken'): clipped_gradient(model, broken, X.float(), Y, 1.)
    clipped_gradient(model, nn.CrossEntropyLoss(), X.float(), Y, 1.)
    assert all(not m._forward_hooks and not hasattr(m, 'ft_compute_sample_grad') for m in model.modules())
    assert all(p.grad is None and not hasattr(p, 'grad_sample') for p in model.parameters())

class Mixes(nn.Module):
    def __init__(self): super().__init__(); self.a = nn.Linear(3,3)
    def forward(self, x): return self.a(x.mean(0, keepdim=True))
class Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w): ctx.save_for_backward(x, w); return x@w.T
    @staticmethod
    def backward(ctx, g): x,w = ctx.saved_tensors; return g@w, g.T@x
class Behind(nn.Module):
    "A weight used twice, once where no function of torch shows it"
    def __init__(self): super().__init__(); self.a = nn.Linear(3,3)
    def forward(self, x): return Hidden.apply(self.a(x), self.a.weight)
class Centred(nn.Module):
    def __init__(self): super().__init__(); self.a = nn.Linear(3,3)
    def forward(self, x): h = self.a(x); return h - h.mean(0, keepdim=True)

@pytest.mark.parametrize('model,words', [(Mixes(), 'first dimension'), (Behind(), 'a.weight'), (Centred(), 'mixed'),
    (nn.Sequential(nn.Linear(3,3), nn.BatchNorm1d(3)), 'GroupNorm'), (nn.Sequential(nn.Linear(3,4), nn.Unflatten(1,(2,2)), nn.InstanceNorm1d(2, affine=True, track_running_stats=True), nn.Flatten(), nn.Linear(4,3)), 'track_running_stats')])
def test_what_cannot_be_followed_is_refused(model, words):
    loss = lambda p,t: (p.mean(0)-t).pow(2).sum()
    with pytest.raises(UnsupportedUnderDP, match=words): clipped_gradient(model, loss, torch.randn(4,3), torch.randn(4,3), 1.)

@pytest.mark.parametrize('model,words', [
    (nn.Sequential(nn.Conv2d(1,2,3), nn.BatchNorm2d(2)), '1 is a BatchNorm2d'),
    (nn.Sequential(nn.InstanceNorm2d(2, affine=True, track_running_stats=True)), 'InstanceNorm'),
    (nn.LSTM(3,3), 'LSTM')])
def test_layers_that_cannot_be_private(model, words):
    with pytest.raises(UnsupportedUnderDP, match=words): check_model(model)

@pytest.mark.parametrize('c', [0, -1, float('nan')])
def test_norm_must_be_positive(c):
    with pytest.raises(ConfigError, match='max_grad_norm'): clipped_gradient(nn.Linear(3,2), nn.MSELoss(), torch.randn(4,3), torch.randn(4,2), c)
