"Classifiers by name, weights from files, and the conversion for private training."
import copy
from types import MethodType

import pytest
import torch
import torchvision
from opacus import GradSampleModule
from opacus.validators import ModuleValidator
from safetensors.torch import save_file
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from medprivacy.core import CheckpointError, ConfigError
from medprivacy.models.resnet import SmallResNet, create_classifier, make_private_ready, resnet9


def slow(*archs): return [pytest.param(o, marks=pytest.mark.slow) for o in archs]


def per_sample_error(model, x):
    "Hooked per-sample gradients against a loop over samples, relative to the largest gradient"
    for m in model.modules():
        if isinstance(m, nn.Dropout): m.p = 0
    g = GradSampleModule(model, loss_reduction='sum')
    g(x).square().sum().backward()
    hooked = {n: p.grad_sample.clone() for n, p in model.named_parameters()}
    g.remove_hooks()
    err = top = 0.
    for i in range(len(x)):
        grads = torch.autograd.grad(model(x[i:i+1]).square().sum(), list(model.parameters()))
        for (n, _), o in zip(model.named_parameters(), grads):
            err, top = max(err, (hooked[n][i]-o).abs().max().item()), max(top, o.abs().max().item())
    return err/top


@pytest.mark.parametrize('act', ['mish', 'relu'])
@pytest.mark.parametrize('in_channels', [1, 3])
def test_resnet9_is_the_published_network(act, in_channels):
    theirs = ResNet(BasicBlock, [1,1,1,1], num_classes=3, norm_layer=lambda c: nn.GroupNorm(32, c))
    theirs.conv1 = nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False)
    if act == 'mish':
        theirs.relu = nn.Mish()
        for m in theirs.modules():
            if isinstance(m, BasicBlock): m.relu = nn.Mish()
    ours = resnet9(3, act, in_channels)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.rand(2, in_channels, 64, 48)
    assert torch.equal(ours(x), theirs(x))


def test_resnet9_starts_from_the_same_weights():
    torch.manual_seed(3)
    a = ResNet(BasicBlock, [1,1,1,1], num_classes=2, norm_layer=lambda c: nn.GroupNorm(32, c)).state_dict()
    torch.manual_seed(3)
    b = resnet9(2).state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize('arch', ['resnet18', 'resnet50', 'timm/resnet18', *slow('densenet121', 'googlenet', 'timm/resnet26d',
                                                                                 'timm/efficientnet_lite0')])
def test_per_sample_gradients_of_converted_networks(arch):
    torch.manual_seed(0)
    if arch.startswith('timm/'):
        import timm
        model = timm.create_model(arch.removeprefix('timm/'), num_classes=2)
    else: model = create_classifier(arch, 2)
    ready, changes = make_private_ready(model.double().train())
    assert changes and ModuleValidator.validate(ready) == []
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in ready.modules())
    size = 64 if arch == 'googlenet' else 32     # norms need more than one value a group
    assert per_sample_error(ready, torch.rand(2, 3, size, size).double()) < 1e-8


@pytest.mark.parametrize('model', [resnet9(2).double(), SmallResNet(2).double(), SmallResNet(2, hidden=16, act='mish').double()])
def test_our_networks_need_no_conversion(model):
    ready, changes = make_private_ready(model)
    assert changes == []
    assert per_sample_error(ready, torch.rand(3, 3, 32, 32).double()) < 1e-8


@pytest.mark.parametrize('arch', ['resnet18', 'mobilenet_v3_small', *slow('densenet121', 'googlenet', 'resnet26t', 'resnest14d')])
def test_rewritten_methods_compute_the_same(arch):
    "With the norms already GroupNorm, the conversion changes no number"
    torch.manual_seed(0)
    model = create_classifier(arch, 2).eval()
    once, _ = make_private_ready(model)
    undone = copy.deepcopy(once)
    for m in undone.modules():
        for name in [k for k, v in vars(m).items() if isinstance(v, MethodType)]: delattr(m, name)     # the originals again
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad(): assert torch.equal(once(x), undone(x))


def test_conversion_leaves_the_model_alone():
    model = create_classifier('resnet18', 2)
    before, keys = repr(model), {k: v.clone() for k, v in model.state_dict().items()}
    ready, changes = make_private_ready(model)
    assert repr(model) == before and all(torch.equal(v, keys[k]) for k, v in model.state_dict().items())
    assert 'bn1: BatchNorm2d(64) → GroupNorm(32, 64)' in changes
    assert 'forward' not in vars(model.layer1[0])


def test_conversion_keeps_scale_shift_dtype_and_frozen_layers():
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12, eps=1e-3), nn.ReLU(inplace=True)).double()
    nn.init.uniform_(model[1].weight), nn.init.uniform_(model[1].bias)
    model[1].weight.requires_grad_(False)
    ready, changes = make_private_ready(model)
    assert (ready[1].num_groups, ready[1].eps, ready[1].weight.dtype) == (4, 1e-3, torch.float64)
    assert torch.equal(ready[1].weight, model[1].weight) and torch.equal(ready[1].bias, model[1].bias)
    assert not ready[1].weight.requires_grad and ready[1].bias.requires_grad and not ready[2].inplace and len(changes) == 2


def test_users_network_with_in_place_sums():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        def forward(self, x):
            y = self.a(x)
            z = self.b(y)
            z += y
            z *= 2
            return z.mean((2, 3))
    x = torch.rand(2, 1, 8, 8).double()
    net = Net().double()
    with pytest.raises(RuntimeError, match='modified inplace'): GradSampleModule(copy.deepcopy(net))(x).sum().backward()
    ready, changes = make_private_ready(net)
    assert changes == ['Net.forward: z += y, z *= 2 → out of place (1×)']
    assert torch.equal(net(x), ready(x))
    assert per_sample_error(ready, x) < 1e-8


@pytest.mark.parametrize('arch', ['resnet9', 'small_resnet', 'resnet18', 'resnet10t', 'squeezenet1_0', *slow('vit_b_16', 'convnext_tiny', 'vgg11')])
@pytest.mark.parametrize('in_channels', [1, 3])
def test_any_arch_in_grey_and_colour(arch, in_channels):
    size = 224 if arch.startswith('vit') else 64
    model = create_classifier(arch, 2, in_channels).eval()
    with torch.no_grad(): assert model(torch.rand(1, in_channels, size, size)).shape == (1, 2)


@pytest.mark.slow
def test_resnet200d():
    with torch.no_grad(): assert create_classifier('resnet200d', 5, 1).eval()(torch.rand(1, 1, 64, 64)).shape == (1, 5)


@pytest.mark.parametrize('arch', ['resnet9', 'small_resnet', 'resnet18', 'resnet10t'])
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_weights_from_a_file(arch, suffix, tmp_path):
    donor, path = create_classifier(arch, 7), tmp_path/f'w{suffix}'
    if suffix == '.pth': torch.save(donor.state_dict(), path)
    else: save_file(donor.state_dict(), path)
    same = create_classifier(arch, 7, pretrained=path).eval()
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad(): assert torch.equal(same(x), donor.eval()(x))
    other = create_classifier(arch, 2, 1, pretrained=str(path)).eval()
    with torch.no_grad(): assert other(x[:, :1]).shape == (2, 2)


@pytest.mark.parametrize('kw, error, words', [
    (dict(arch='resnett18', n_out=2), ConfigError, 'resnet18'),
    (dict(arch='§§', n_out=2), ConfigError, "try 'resnet9'"),
    (dict(arch='resnet9', n_out=0), ConfigError, 'n_out'),
    (dict(arch='resnet9', n_out=2, in_channels=0), ConfigError, 'in_channels'),
    (dict(arch='small_resnet', n_out=2, pretrained=True), ConfigError, 'no published weights'),
    (dict(arch='resnet18', n_out=2, pretrained='nowhere.pth'), CheckpointError, 'no weights at'),
])
def test_errors(kw, error, words):
    with pytest.raises(error, match=words): create_classifier(**kw)


@pytest.mark.parametrize('arch', ['resnet18', 'resnet10t'])
def test_no_download_is_a_clear_error(arch, monkeypatch):
    def fail(*a, **k): raise OSError('no route')
    monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url', fail)
    monkeypatch.setattr('timm.create_model', fail)
    with pytest.raises(CheckpointError, match='pretrained=.path/to/file.pth'): create_classifier(arch, 2, pretrained=True)


def test_a_file_of_another_network_is_refused(tmp_path):
    torch.save(torchvision.models.resnet34(num_classes=2).state_dict(), tmp_path/'w.pth')
    with pytest.raises(CheckpointError, match='does not fit'): create_classifier('resnet18', 2, pretrained=tmp_path/'w.pth')
    (tmp_path/'bad.pth').write_bytes(b'not weights')
    with pytest.raises(CheckpointError, match='cannot be read'): create_classifier('resnet18', 2, pretrained=tmp_path/'bad.pth')


@pytest.mark.parametrize('arch', ['resnet9', 'small_resnet'])
def test_bf16_and_empty_batch(arch):
    model = create_classifier(arch, 2, 1)
    with torch.autocast('cpu', torch.bfloat16): out = model(torch.rand(2, 1, 64, 64))
    out.float().sum().backward()
    assert torch.isfinite(out).all() and model(torch.rand(0, 1, 64, 64)).shape == (0, 2)
