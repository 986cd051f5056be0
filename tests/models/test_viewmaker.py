"The viewmaker against an independent functional form, over its options, sizes and types."
import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from scipy.fft import dctn, idctn
from torch import nn

from medprivacy.core import ConfigError
from medprivacy.models.viewmaker import Viewmaker, dct2, idct2, limit_l1


def reference(sd, x, budget, activation, clamp, frequency_domain, downsample_to, num_res_blocks):
    "The published network in functional form, from a state dict; numpy transforms, loops over images"
    act = torch.relu if activation == 'relu' else lambda t: torch.where(t > 0, t, .01*t)

    def conv(t, name, stride=1):
        w, b = sd[f'{name}.conv2d.weight'], sd[f'{name}.conv2d.bias']
        return F.conv2d(nn.ReflectionPad2d(w.shape[-1]//2)(t), w, b, stride)

    def norm(t, name):
        m = t.mean((2, 3), keepdim=True)
        t = (t-m) / ((t-m).square().mean((2, 3), keepdim=True) + 1e-5).sqrt()
        return t * sd[f'{name}.weight'][:, None, None] + sd[f'{name}.bias'][:, None, None]

    def noise(t): return torch.cat((t, torch.rand(t.shape[0], 1, t.shape[2], t.shape[3]).to(t)), 1)

    def twice(t): return t.repeat_interleave(2, 2).repeat_interleave(2, 3)

    def freq(t, f): return torch.from_numpy(f(t.detach().double().numpy(), axes=(-2, -1))).to(t)

    y = F.interpolate(x, size=(downsample_to, downsample_to), mode='bilinear', align_corners=False) if downsample_to else x
    if frequency_domain: y = freq(y, dctn)
    y = act(norm(conv(noise(y), 'conv1'), 'in1'))
    y = act(norm(conv(y, 'conv2', 2), 'in2'))
    y = act(norm(conv(y, 'conv3', 2), 'in3'))
    for i in range(1, num_res_blocks+1):
        y = noise(y)
        z = torch.relu(norm(conv(y, f'res{i}.conv1'), f'res{i}.in1'))
        y = norm(conv(z, f'res{i}.conv2'), f'res{i}.in2') + y
    y = act(norm(conv(twice(y), 'deconv1'), 'in4'))
    y = act(norm(conv(twice(y), 'deconv2'), 'in5'))
    d = torch.stack([t*budget/(t.abs().mean() + 1e-4) for t in torch.tanh(conv(y, 'deconv3'))])
    if frequency_domain: d = freq(d, idctn)
    if downsample_to: d = F.interpolate(d, size=x.shape[2:], mode='bilinear', align_corners=False)
    return (x+d).clamp(0, 1) if clamp else x+d


def trained_like(dtype=torch.float32, **kw):
    "A viewmaker whose norms have moved from one and zero"
    vm = Viewmaker(**kw).to(dtype)
    for n, p in vm.named_parameters():
        if '.in' in n or n.startswith('in'): nn.init.uniform_(p, .5, 1.5)
    return vm


def both(vm, x, seed=7):
    with torch.no_grad():
        torch.manual_seed(seed); ours = vm(x)
        torch.manual_seed(seed)
        return ours, reference(vm.state_dict(), x, vm.distortion_budget, vm.activation, vm.clamp, vm.frequency_domain, vm.downsample_to,
                               vm.num_res_blocks)


OPTIONS = [dict(num_channels=c, activation=a, clamp=cl, frequency_domain=f, downsample_to=d, num_res_blocks=n, distortion_budget=b)
           for (c, a, b), cl, f, d, n in itertools.product([(1, 'relu', .5), (3, 'leaky_relu', .05)], [True, False], [True, False],
                                                           [False, 16], [0, 3, 5])]
def name(o): return '-'.join(str(v) for v in o.values()) if isinstance(o, dict) else 'x'.join(map(str, o))


@pytest.mark.parametrize('kw', OPTIONS, ids=name)
def test_golden_and_backward_over_all_options(kw):
    torch.manual_seed(1)
    for dtype, tol in (torch.float32, 1e-3), (torch.float64, 1e-8):
        vm = trained_like(dtype, **kw)
        x = torch.rand(1, kw['num_channels'], 32, 32, dtype=dtype)
        ours, ref = both(vm, x)
        assert (ours-ref).abs().max() < tol
    vm(x).square().mean().backward()
    used = {n: p for n, p in vm.named_parameters() if not (n.startswith('res') and int(n[3]) > kw['num_res_blocks'])}
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in used.values())
    assert all(p.grad is None for n, p in vm.named_parameters() if n not in used)


@pytest.mark.parametrize('kw, size', [({}, (64, 64)), ({}, (8, 12)), (dict(num_res_blocks=0), (96, 160)), (dict(frequency_domain=True), (24, 40)),
    (dict(downsample_to=32), (96, 160)), *[pytest.param(o, s, marks=pytest.mark.slow) for s in [(96, 160), (224, 224)] for o in [{}, dict(frequency_domain=True)]]],
    ids=str)
def test_golden_and_backward_over_sizes(size, kw):
    torch.manual_seed(2)
    for dtype, tol in (torch.float32, 1e-3), (torch.float64, 1e-8):
        vm = trained_like(dtype, **kw)
        x = torch.rand(1, 3, *size, dtype=dtype)
        ours, ref = both(vm, x)
        assert (ours-ref).abs().max() < tol
    vm(x).square().mean().backward()
    assert torch.isfinite(vm.conv1.conv2d.weight.grad).all()


@pytest.mark.slow
@pytest.mark.parametrize('size', [(64, 64), (96, 160), (224, 224)], ids=name)
@pytest.mark.parametrize('kw', OPTIONS, ids=name)
def test_all_options_at_all_sizes(kw, size):
    vm = trained_like(**kw)
    ours, ref = both(vm, torch.rand(1, kw['num_channels'], *size))
    assert (ours-ref).abs().max() < 1e-3
    vm(torch.rand(1, kw['num_channels'], *size)).mean().backward()


@pytest.mark.parametrize('n', range(6))
def test_names_and_shapes_are_the_published_ones(n):
    shapes = {k: tuple(v.shape) for k, v in Viewmaker(num_channels=1, num_res_blocks=n).state_dict().items()}
    want = {}
    def conv(k, i, o, s): want.update({f'{k}.conv2d.weight': (o, i, s, s), f'{k}.conv2d.bias': (o,)})
    def norm(k, c): want.update({f'{k}.weight': (c,), f'{k}.bias': (c,)})
    conv('conv1', 2, 32, 9), norm('in1', 32), conv('conv2', 32, 64, 3), norm('in2', 64), conv('conv3', 64, 128, 3), norm('in3', 128)
    for i in range(1, 6):
        c = 128+i
        conv(f'res{i}.conv1', c, c, 3), norm(f'res{i}.in1', c), conv(f'res{i}.conv2', c, c, 3), norm(f'res{i}.in2', c)
    conv('deconv1', 128+n, 64, 3), norm('in4', 64), conv('deconv2', 64, 32, 3), norm('in5', 32), conv('deconv3', 32, 1, 9)
    assert shapes == want and list(shapes) == list(want)


def test_defaults_and_positions():
    vm = Viewmaker()
    assert (vm.num_channels, vm.distortion_budget, vm.activation, vm.clamp, vm.frequency_domain, vm.downsample_to, vm.num_res_blocks) == \
        (3, .5, 'relu', True, False, False, 3)
    vm = Viewmaker(1, .1, 'leaky_relu', False, True, 16, 5)
    assert (vm.num_channels, vm.distortion_budget, vm.activation, vm.clamp, vm.frequency_domain, vm.downsample_to, vm.num_res_blocks) == \
        (1, .1, 'leaky_relu', False, True, 16, 5)
    assert isinstance(vm.act, nn.LeakyReLU)


def test_same_weights_under_the_same_seed_order():
    "Noise: one draw before the first layer, then one before each block, in that order"
    vm, x = Viewmaker(1, num_res_blocks=2, width=.25), torch.rand(3, 1, 16, 24)
    torch.manual_seed(5)
    vm(x)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    for h, w in (16, 24), (4, 6), (4, 6): torch.rand((3, 1, h, w))
    assert torch.equal(torch.get_rng_state(), after)


def test_generator_gives_what_the_global_state_gives():
    vm, x = Viewmaker(1, width=.25), torch.rand(2, 1, 16, 16)
    torch.manual_seed(11)
    a = vm(x)
    assert torch.equal(a, vm(x, torch.Generator().manual_seed(11)))
    assert torch.equal(a, (x + vm.perturbation(x, generator=torch.Generator().manual_seed(11))).clamp(0, 1))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.floats(1e-6, 10), st.floats(.3, 50), st.integers(0, 10**6))
def test_budget_is_met_by_each_image(b, c, budget, scale, seed):
    y = torch.randn(b, c, 12, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    mean = limit_l1(y, budget).abs().mean((1, 2, 3))
    assert (mean <= budget*(1+1e-12)).all() and (mean >= budget*.99).all()


def test_budget_within_the_network():
    d = Viewmaker(3, .07).perturbation(torch.rand(4, 3, 32, 32))
    assert torch.allclose(d.abs().mean((1, 2, 3)), torch.tensor(.07), rtol=1e-2)
    with torch.no_grad(): assert torch.equal(Viewmaker(3, 0.)(x := torch.rand(1, 3, 16, 16)), x)


@pytest.mark.parametrize('h, w', [(1, 1), (2, 5), (16, 16), (33, 20)])
def test_dct_is_scipys(h, w):
    x = torch.randn(2, h, w, dtype=torch.float64)
    np.testing.assert_allclose(dct2(x), dctn(x.numpy(), axes=(-2, -1)), atol=1e-10)
    np.testing.assert_allclose(idct2(dct2(x)), x, atol=1e-12)
    assert torch.autograd.gradcheck(lambda t: dct2(t[0]), (x.requires_grad_(),))


def test_dct_stays_exact_under_autocast_and_after_inference_mode():
    x = torch.rand(1, 1, 40, 40)
    with torch.inference_mode(): dct2(torch.rand(1, 1, 52, 52))
    with torch.autocast('cpu', torch.bfloat16): y = idct2(dct2(x))
    assert y.dtype == torch.float32 and (x-y).abs().max() < 1e-4
    z = torch.rand(1, 1, 52, 52, requires_grad=True)
    dct2(z).sum().backward()
    assert z.grad is not None


@pytest.mark.parametrize('kw', [{}, dict(frequency_domain=True), dict(downsample_to=16)], ids=str)
def test_bf16_autocast(kw):
    vm, x = Viewmaker(1, .1, width=.25, **kw), torch.rand(2, 1, 32, 32)
    with torch.autocast('cpu', torch.bfloat16): out = vm(x)
    out.float().mean().backward()
    assert out.dtype == torch.float32 and torch.isfinite(out).all() and torch.isfinite(vm.conv1.conv2d.weight.grad).all()
    half = copy.deepcopy(vm).bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16


def test_empty_batch_width_and_strict_load():
    vm = Viewmaker(3, width=.25)
    assert vm(torch.rand(0, 3, 32, 32)).shape == (0, 3, 32, 32)
    assert vm.conv3.conv2d.weight.shape[0] == 32 and Viewmaker(width=.01).conv1.conv2d.weight.shape[0] == 8
    sd = Viewmaker(3).state_dict()
    Viewmaker(3, .1, 'leaky_relu').load_state_dict(sd, strict=True)
    with pytest.raises(RuntimeError, match='size mismatch'): vm.load_state_dict(sd)
    with pytest.raises(RuntimeError, match='deconv1'): Viewmaker(3, num_res_blocks=5).load_state_dict(sd)


@pytest.mark.parametrize('kw, words', [
    (dict(num_channels=0), 'num_channels'), (dict(distortion_budget=-.1), 'budget'), (dict(distortion_budget=float('nan')), 'budget'),
    (dict(activation='tanh'), 'relu'), (dict(num_res_blocks=6), '0…5'), (dict(num_res_blocks=-1), '0…5'), (dict(width=0), 'width'),
    (dict(downsample_to=18), 'multiple of 4'), (dict(downsample_to=4), 'from 8 on'), (dict(downsample_to=True), 'downsample_to')])
def test_bad_options(kw, words):
    with pytest.raises(ConfigError, match=words): Viewmaker(**kw)


@pytest.mark.parametrize('shape', [(1, 3, 30, 32), (1, 3, 32, 30), (1, 3, 4, 32), (1, 1, 32, 32), (3, 32, 32)])
def test_bad_images(shape):
    with pytest.raises(ConfigError): Viewmaker()(torch.rand(shape))


def test_learns_to_darken():
    "The gradient reaches the budget's direction: a few steps push the image where the loss wants it"
    torch.manual_seed(0)
    vm, x = Viewmaker(1, .1, width=.25, num_res_blocks=1), torch.rand(4, 1, 16, 16)*.5 + .25
    opt = torch.optim.Adam(vm.parameters(), 1e-2)
    for _ in range(30):
        opt.zero_grad(); vm(x).mean().backward(); opt.step()
    assert (vm(x)-x).mean() < -.08
