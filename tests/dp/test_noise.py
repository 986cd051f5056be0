"Noise: the numbers themselves, those that training adds, and what a copy knows of them"
import copy, os, pickle
import numpy as np
import pytest
import torch
from scipy.stats import chi2, kstest
from torch import nn
from medprivacy.core import ConfigError
from medprivacy.dp.noise import NoiseSource, _Normals, _Stream

def normals(n, dtype=torch.float32, **kw): return torch.cat([z.clone() for z in NoiseSource(**kw).normals(n, dtype)])

def looks_normal(z, std=1., level=1e-9):
    "Kolmogorov-Smirnov for the shape, chi-square for the scale"
    z = z.double().flatten().numpy()/std
    q = chi2.cdf((z**2).sum(), len(z))
    return kstest(z, 'norm').pvalue > level and level < q < 1-level and abs(z.mean()) < 6/len(z)**.5

# ------------------------------------------------------------ the source

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_numbers_are_standard_normal_and_independent(dtype):
    z = normals(2_000_000, dtype)
    assert looks_normal(z[:500_000])
    z = z.double()
    assert abs((z**4).mean()-3) < 6*(96/len(z))**.5
    for lag in (1, 2, 2**18, 2**19):                       # the two halves of a chunk share radii and angles
        assert abs((z[lag:]*z[:-lag]).mean()) < 6/len(z)**.5
        assert abs(((z[lag:]**2-1)*(z[:-lag]**2-1)).mean()) < 6*2/len(z)**.5
    tail = (z.abs() > 4).sum().item()                      # 6.3e-5 of them
    assert abs(tail-126.7) < 6*126.7**.5

def test_the_stream_is_uniform_and_never_repeats():
    s, out = _Stream(), bytearray(2**20+64)
    blocks = set()
    for _ in range(4):
        s.into(bytes(2**20), out)
        b = np.frombuffer(out, np.uint8)[:2**20]
        counts = np.bincount(b, minlength=256)
        assert 1e-9 < chi2.cdf(((counts-4096)**2/4096).sum(), 255) < 1-1e-9
        bits = np.unpackbits(b)
        assert abs(bits.mean()-.5) < 6*.5/len(bits)**.5 and abs((bits[1:]==bits[:-1]).mean()-.5) < 6*.5/len(bits)**.5
        blocks |= {bytes(out[i:i+64]) for i in range(0, 2**20, 64)}
    assert len(blocks)==4*2**14

def test_a_key_is_replaced_before_the_cipher_repeats(monkeypatch):
    monkeypatch.setattr('medprivacy.dp.noise._KEY_BYTES', 200)
    s, out, seen = _Stream(), bytearray(96+64), set()
    for _ in range(10):
        s.into(bytes(96), out)
        seen.add(bytes(out[:96]))
    assert s.keys==5 and len(seen)==10

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork')
@pytest.mark.filterwarnings('ignore:This process .* is multi-threaded:DeprecationWarning')
def test_a_forked_process_has_other_noise():
    source = NoiseSource()
    next(source.normals(10))
    r, w = os.pipe()
    if (pid := os.fork()) == 0:
        os.write(w, next(source.normals(1000)).numpy().tobytes()); os._exit(0)
    os.waitpid(pid, 0)
    theirs = torch.frombuffer(bytearray(os.read(r, 4000)), dtype=torch.float32)
    ours   = next(source.normals(1000)).clone()
    same = set(theirs.tolist()) & set(ours.tolist())       # float32 has few numbers: now and then two are equal by chance
    assert len(theirs)==1000 and len(same) < 5

@pytest.mark.parametrize('secure', [False, True])
def test_copies_carry_no_key_and_draw_other_noise(secure):
    source = NoiseSource(secure=secure)
    source.add({'a': torch.zeros(10)}, 1., 1.)
    assert source.stream.left > 0
    for twin in (copy.copy(source), copy.deepcopy(source), pickle.loads(pickle.dumps(source))):
        assert twin.secure==secure and twin.stream.left==0 and not hasattr(twin.stream, 'encryptor')
        assert twin.add({'a': torch.zeros(10)}, 1., 1.)['a'].tolist() != source.add({'a': torch.zeros(10)}, 1., 1.)['a'].tolist()
    assert len(pickle.dumps(source)) < 300                 # settings only

@pytest.mark.parametrize('secure', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_added_noise_has_the_scale_asked_for(secure, dtype):
    source = NoiseSource(secure=secure)
    sums  = {'w': torch.full((70_000,), 3., dtype=dtype), 'b': torch.full((3,5), -2., dtype=dtype), 'one': torch.tensor(1., dtype=dtype),
             'cl': torch.zeros(4,6,20,20, dtype=dtype).contiguous(memory_format=torch.channels_last)}
    shapes = {k: v.shape for k,v in sums.items()}
    out = source.add(sums, 2., 1., by=4.)
    assert {k: v.shape for k,v in out.items()}==shapes and all(v.dtype==dtype for v in out.values())
    assert looks_normal(out['w']-.75, .5) and looks_normal(out['cl'], .5)

def test_settings():
    for std in (-1., float('inf'), float('nan')):
        with pytest.raises(ConfigError, match='std'): NoiseSource().add({}, std)
    with pytest.raises(ConfigError, match='sensitivity'): NoiseSource(secure=True).add({'a': torch.zeros(1)}, 1.)
    with pytest.raises(ConfigError, match='not a number'): NoiseSource(secure=True).add({'a': torch.tensor([float('nan')])}, 1., 1.)

def test_on_the_grid_every_output_can_come_from_every_sum():
    source = NoiseSource(secure=True)
    for std in (.3, 1., 7.):
        step = 2.**(np.floor(np.log2(std))-24)
        for total in (0., 1., .1234567, -55.5):
            y = source.add({'a': torch.full((20_000,), total, dtype=torch.float64)}, std, 1.)['a']/step
            assert torch.equal(y, y.round()) and (y.abs() < 2**52).all()
            last = torch.remainder(y, 16).long()           # the last digits say nothing of the sum
            assert 1e-9 < chi2.cdf(((torch.bincount(last, minlength=16)-1250)**2/1250).sum().item(), 15) < 1-1e-9

def test_neighbours_have_outputs_in_common_only_on_the_grid():
    a, b = ({float(v) for v in torch.full((300_000,), t) + 2.**-14*normals(300_000)} for t in (0., 1.))
    fine = sum(v % 2.**-24 != 0 for v in a)/len(a)         # the usual addition: values that 1 + noise cannot have
    assert fine > .9 and not any(v % 2.**-24 for v in b)

# ------------------------------------------------------------ the noise that training adds

class ZeroLoss(nn.Module):
    def forward(self, p, y): return (p*0).sum()

def learner(**kw):
    from fastai.callback.progress import ProgressCallback
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from fastai.learner import Learner
    from fastai.optimizer import SGD
    import medprivacy.dp.callback  # noqa: F401
    ds = list(zip(torch.randn(40, 64), torch.zeros(40)))
    dls = DataLoaders(DataLoader(ds, bs=8, shuffle=True), DataLoader(ds, bs=8))
    dls.train_patients = np.arange(40)
    learn = Learner(dls, nn.Sequential(nn.Linear(64,300), nn.Linear(300,100)), loss_func=ZeroLoss(), opt_func=SGD)
    learn.remove_cb(ProgressCallback); learn.logger = lambda *o: None
    return learn.to_private(**kw)

def noise_of(learn, epochs=2):
    from fastai.callback.core import Callback
    class Probe(Callback):
        def before_fit(self): self.grads = []
        def before_step(self): self.grads.append([p.grad.clone().flatten() for p in self.learn.model.parameters()])
    probe = Probe()
    learn.fit(epochs, 0., cbs=probe)
    return probe.grads

@pytest.mark.parametrize('kw', [dict(), dict(secure=True), dict(engine='opacus'), dict(clipping='layer'), dict(views=2), dict(precision='bf16')], ids=str)
def test_noise_added_by_training(kw):
    steps, std = noise_of(learner(noise_multiplier=1.7, max_grad_norm=.4, **kw)), 1.7*.4/8
    whole = [torch.cat(s) for s in steps]
    assert len(steps)==10 and looks_normal(torch.cat(whole), std)
    for s in steps:
        assert all(looks_normal(p, std) for p in s)                        # each parameter, each step
        assert abs((s[0][:10_000]*s[2][:10_000]).mean())/std**2 < 6/1e4**.5      # parameters do not share it
    z = torch.stack(whole)/std
    corr = torch.corrcoef(z) - torch.eye(len(z))
    assert corr.abs().max() < 6.5/z.shape[1]**.5                                 # nor do steps
    assert len(torch.unique(z))/z.numel() > .9                                   # nothing is used again

def test_two_learners_do_not_share_noise():
    a, b = (torch.cat([torch.cat(s) for s in noise_of(learner(noise_multiplier=1.), 1)]) for _ in range(2))
    assert abs(torch.corrcoef(torch.stack([a,b]))[0,1]) < 6/len(a)**.5
    lags = np.correlate(a[:3000].numpy(), b[:3000].numpy(), 'full')/np.float64(3000)*64
    assert abs(lags).max() < 6/3000**.5                                          # not shifted against one another either

def test_the_global_generators_neither_give_nor_feel_noise(monkeypatch):
    add, same = NoiseSource.add, []
    def watched(self, *args, **kw):
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), np.random.get_state()[2]
        out = add(self, *args, **kw)
        same.append(torch.equal(before[0], torch.get_rng_state()) and (before[1]==np.random.get_state()[1]).all() and before[2]==np.random.get_state()[2])
        return out
    monkeypatch.setattr(NoiseSource, 'add', watched)
    def run():
        torch.manual_seed(1); np.random.seed(1)
        return torch.cat(noise_of(learner(noise_multiplier=1.), 1)[0])
    assert not torch.equal(run(), run()) and same==[True]*10

def test_an_exported_learner_carries_no_key(tmp_path, monkeypatch):
    learn = learner(noise_multiplier=1.)
    learn.path = tmp_path
    learn.fit(1)
    monkeypatch.setattr(type(learn.dls), 'new_empty', lambda self: None)
    learn.export('m.pkl')
    assert learn.dp.__getstate__()['noise'] is None
    assert b'NoiseSource' not in (tmp_path/'m.pkl').read_bytes() and b'encryptor' not in (tmp_path/'m.pkl').read_bytes()
