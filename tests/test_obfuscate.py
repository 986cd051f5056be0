"The game: whose images it opens, who learns in which step, and what a stored obfuscator gives back"
import warnings

import pytest, torch
from fastai.callback.core import Callback
from torch import nn

from medprivacy.attack import attack_attribute
from medprivacy.core import CheckpointError, ConfigError, DataError, LeakageError
from medprivacy.data.core import Records
from medprivacy.data.load import records_dls
from medprivacy.data.phantom import tiny_records
from medprivacy.models.bottleneck import Bottleneck
from medprivacy.models.viewmaker import Viewmaker
from medprivacy.obfuscate import BottleneckGame, Obfuscator, ViewmakerGame, game_learner, train_obfuscator

QUICK = dict(size=32, bs=8, epochs=1, archs=('small_resnet',), attacker_steps=1, device='cpu')
NARROW = dict(maker='viewmaker', maker_args=dict(width=.25, distortion_budget=.1))


@pytest.fixture(scope='module')
def recs(tmp_path_factory): return tiny_records(20, root=tmp_path_factory.mktemp('obfuscate')/'p', attack=.5)


@pytest.fixture(scope='module')
def made(recs): return {m: train_obfuscator(recs, **QUICK, **how) for m, how in dict(bottleneck={}, viewmaker=NARROW).items()}


def gen(seed=5): return torch.Generator().manual_seed(seed)


def without(recs, part, root):
    "The same records over a folder where every file of one part is empty"
    for r in recs.df.itertuples():
        (root/r.path).parent.mkdir(parents=True, exist_ok=True)
        (root/r.path).write_bytes(b'' if r.part == part else (recs.root/r.path).read_bytes())
    return Records(recs.df, root, recs.labels, recs.task, recs.name)


@pytest.mark.parametrize('maker', ['bottleneck', 'viewmaker'])
def test_round_trip(made, maker, tmp_path):
    "A stored mechanism gives the same bits, batch by batch, and knows no patient"
    obf = made[maker]; back = Obfuscator.load(obf.save(tmp_path/'m')); x = torch.rand(3, 1, 32, 32)
    assert torch.equal(back(x, generator=gen()), obf(x, generator=gen())) and back.config == obf.config
    assert not back.patients and obf.patients and not any(p.requires_grad for p in back.maker.parameters()) and not back.maker.training
    text = b''.join(f.read_bytes() for f in (tmp_path/'m').iterdir())
    assert not [p for p in obf.patients if p.encode() in text]


@pytest.mark.parametrize('maker', ['bottleneck', 'viewmaker'])
def test_noise_follows_the_generator(made, maker):
    "Same generator, same release; another one, another; none, fresh noise each time"
    obf, x = made[maker], torch.rand(2, 1, 32, 32)
    assert torch.equal(obf(x, generator=gen(1)), obf(x, generator=gen(1))) and not torch.equal(obf(x, generator=gen(1)), obf(x, generator=gen(2)))
    assert not torch.equal(obf(x), obf(x)) and 0 <= obf(x).min() and obf(x).max() <= 1


@pytest.mark.parametrize('spoilt', ['weights', 'config', 'unknown maker'])
def test_damaged_folder(made, spoilt, tmp_path):
    d = made['bottleneck'].save(tmp_path/'m')
    if spoilt == 'weights': (d/'weights.safetensors').write_bytes((d/'weights.safetensors').read_bytes()[:200])
    if spoilt == 'config':  (d/'obfuscator.json').write_text('{')
    if spoilt == 'unknown maker': (d/'obfuscator.json').write_text((d/'obfuscator.json').read_text().replace('bottleneck', 'blur'))
    with pytest.raises(CheckpointError, match='no readable obfuscator'): Obfuscator.load(d)


def test_training_repeats(recs, made):
    "A seed decides weights, batches and noise"
    again = train_obfuscator(recs, **QUICK).maker.state_dict()
    assert all(torch.equal(v, again[k]) for k, v in made['bottleneck'].maker.state_dict().items())


def test_trained_on_the_defence_alone(recs, made, tmp_path):
    "Without the attack's files the result is the same to the bit"
    same = train_obfuscator(without(recs, 'attack', tmp_path), **QUICK)
    assert all(torch.equal(v, same.maker.state_dict()[k]) for k, v in made['bottleneck'].maker.state_dict().items())
    assert same.patients == set(recs.select(part='defence').df.patient_id)


def test_defence_opens_its_own_files(recs, tmp_path):
    with pytest.raises(DataError, match='cannot be read'): train_obfuscator(without(recs, 'defence', tmp_path), **QUICK)


def test_attack_opens_no_file_of_the_defence(recs, made, tmp_path):
    p = attack_attribute(without(recs, 'defence', tmp_path), obfuscator=made['bottleneck'], archs=['small_resnet'], size=32, bs=8, epochs=1, draws=1, device='cpu')
    assert set(p.df.patient_id) <= set(recs.select(part='attack').df.patient_id)


def test_shared_patients_are_refused(recs, made):
    "Before an image is opened"
    swapped = recs.with_split(recs.df.split, recs.df.part.map({'attack': 'defence', 'defence': 'attack'}))
    with pytest.raises(LeakageError, match='keep their parts apart'): attack_attribute(swapped._with(swapped.df.assign(path='gone')), obfuscator=made['bottleneck'], size=32)


def weights(module): return [p.detach().clone() for p in module.parameters()]
def moved(old, module): return any(not torch.equal(a, b) for a, b in zip(old, module.parameters()))


class Watch(Callback):
    "Note what moves in the maker's step, and after it in the attackers'"
    order = -10    # before AttackersCallback
    def __init__(self): self.rows = []
    def before_step(self):
        m = self.model; self.old = weights(m.attackers), weights(m.maker)
        self.row = dict(graded=any(p.grad is not None and p.grad.abs().sum() > 0 for p in m.attackers.parameters()),
                        frozen=not any(p.requires_grad for p in m.attackers.parameters()))
    def after_step(self):
        self.row |= dict(attackers=moved(self.old[0], self.model.attackers), maker=moved(self.old[1], self.model.maker))
        self.after = weights(self.model.maker)
    def after_batch(self):
        if not self.training: return
        self.rows.append(self.row | dict(later=moved(self.old[0], self.model.attackers), maker_later=moved(self.after, self.model.maker)))


@pytest.mark.parametrize('maker', ['bottleneck', 'viewmaker'])
def test_each_step_moves_its_own(recs, maker):
    "The maker's step leaves the attackers as they are, without gradients; theirs leaves the maker"
    dls = records_dls(recs.select(part='defence'), ('sex', 'labels'), 32, 4, device='cpu'); torch.manual_seed(0)
    net = Bottleneck(num_channels=1, size=32) if maker == 'bottleneck' else Viewmaker(num_channels=1, width=.25, distortion_budget=.1)
    game = (BottleneckGame if maker == 'bottleneck' else ViewmakerGame)(net, ('small_resnet',), 3, 1); watch = Watch()
    learn = game_learner(dls, game, attacker_steps=1); learn.add_cb(watch)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    want = dict(graded=False, frozen=True, attackers=False, maker=True, later=True, maker_later=False)
    for row in watch.rows[1:]: assert row | dict(graded=False) == want
    assert watch.rows[0] == want and len(watch.rows) >= 2
    held = {id(p) for h in learn.opt.param_lists for p in h}
    assert not held & {id(p) for p in game.attackers.parameters()} and held >= {id(p) for p in game.maker.parameters()}


@pytest.mark.parametrize('attack', ['negative', 'confusion', 'prior', 'entropy'])
def test_every_attack_term_trains(recs, attack):
    "The published network, a quarter as wide, with each attack term: finite curves, a change within its budget"
    obf = train_obfuscator(recs, attack=attack, **QUICK, **NARROW); x = torch.rand(4, 1, 32, 32)
    assert len(obf.history) == 1 and torch.isfinite(torch.tensor(obf.history.train_loss.to_numpy(copy=True))).all()
    assert 0 < (obf(x) - x).abs().mean() <= .1 + 1e-4 and obf.config['attack'] == attack


@pytest.mark.parametrize('maker', ['bottleneck', 'viewmaker'])
def test_published_form_without_disease(recs, maker):
    "Nothing protects the disease, and the stored settings say so"
    how = NARROW if maker == 'viewmaker' else {}
    assert train_obfuscator(recs, use_disease=False, **QUICK, **how).config['use_disease'] is False


def test_hides_age(recs): assert train_obfuscator(recs, 'age>median', **QUICK).config['attribute'] == 'age>median'


@pytest.mark.parametrize('how', [dict(epochs=0), dict(archs=()), dict(attacker_steps=0), dict(attack='hinge'), dict(weight=-1), dict(attribute='race'), dict(maker='blur')])
def test_bad_settings(recs, how):
    with pytest.raises(ConfigError): train_obfuscator(recs, **{**QUICK, **how})


def test_images_that_are_refused(made):
    for x in (torch.rand(1, 3, 32, 32), torch.rand(1, 32, 32), torch.rand(1, 1, 32, 32)*2, torch.rand(1, 1, 32, 32)-1, torch.full((1, 1, 32, 32), torch.nan)):
        with pytest.raises(DataError, match='images must be'): made['bottleneck'](x)


@pytest.mark.parametrize('seed', range(3))
def test_step_is_the_published_one(seed):
    "Attackers first, then the maker: losses and updates of the step written the published way, with less work; the trained classifier stays as it is"
    import importlib.util
    from pathlib import Path
    spec = importlib.util.spec_from_file_location('bench_obfuscate', Path(__file__).with_name('bench_obfuscate.py'))
    bench = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings(): spec.loader.exec_module(bench)
    for dtype, tol in ((torch.float32, 1e-4), (torch.float64, 1e-10)):
        got = bench.compare(32, 6, .25, seed, dtype)
        assert got.pop('frozen') and max(got.values()) < tol, got
