"Untrained mechanisms: range, shape, randomness, sizes that do not divide"
import pytest
import torch
from medprivacy.core import ConfigError
from medprivacy.data.draws import release_draws
from medprivacy.mechanisms import MECHANISMS, Flow, Pixelate, make_mechanism

@pytest.mark.parametrize('name', MECHANISMS)
@pytest.mark.parametrize('shape', [(3, 1, 32, 32), (2, 3, 33, 47), (0, 1, 32, 32), (1, 1, 17, 64)])
@pytest.mark.parametrize('strength', [0., .03, .5, 1.])
def test_shape_range_and_type(name, shape, strength):
    x = torch.rand(shape)
    y = make_mechanism(name, strength)(x, cond=torch.zeros(len(x)))
    assert y.shape == x.shape and y.dtype == x.dtype and y.isfinite().all()
    assert not len(y) or 0 <= y.min() and y.max() <= 1
    if strength == 0: assert torch.equal(x, y)

@pytest.mark.parametrize('name,random', [('noise', True), ('flow', True), ('blur', False), ('pixelate', False)])
def test_noise_is_fresh_and_can_be_repeated(name, random):
    x, m = torch.rand(2, 1, 32, 32), make_mechanism(name, .2)
    assert torch.equal(m(x), m(x)) != random
    one, two = (m(x, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two)

def test_two_images_of_a_batch_have_noise_of_their_own():
    x = torch.rand(1, 1, 32, 32).expand(2, 1, 32, 32)
    for m in (make_mechanism('noise', .1), Flow(.2), Pixelate(.2, eps=2.)):
        y = m(x)
        assert not torch.equal(y[0], y[1])

def test_releases_go_through():
    x = (torch.rand(5, 1, 32, 32)*255).to(torch.uint8)
    out = release_draws(x, Flow(.1), torch.zeros(5), 2, device='cpu')
    assert out.shape == (5, 2, 1, 32, 32) and not torch.equal(out[:,0], out[:,1])

@pytest.mark.parametrize('name,strength', [('noise', -1), ('blur', 2), ('pixelate', -.1), ('flow', 1.5)])
def test_bad_strengths(name, strength):
    with pytest.raises(ConfigError, match='must be'): make_mechanism(name, strength)
