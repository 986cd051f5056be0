"Fresh attackers: blind where nothing is planted, sharp where it is, and the controls between"
import numpy as np, pandas as pd, pytest, torch
from sklearn.metrics import roc_auc_score

from medprivacy.attack import GaussianNoise, attack_attribute, matched_noise, mean_change, shuffle_attribute
from medprivacy.core import ConfigError, DataError
from medprivacy.data.phantom import make_phantom
from medprivacy.data.split import split_patients

HOW = dict(archs=['small_resnet'], size=32, bs=16, epochs=6, device='cpu')


def phantoms(root, n=150, **kw):
    "All patients to the attack, 40 % of them for testing"
    recs = make_phantom(root, n_patients=n, size=32, **kw)
    return split_patients(recs, (.5, .1, .4), stratify='sex', attack=1.)


@pytest.fixture(scope='module')
def planted(tmp_path_factory): return phantoms(tmp_path_factory.mktemp('attack')/'p')


@pytest.fixture(scope='module')
def raw(planted): return attack_attribute(planted, **HOW)


def auroc(preds):
    "Of test patients, with their scores averaged, and the standard error of that AUROC if it were 0.5"
    one = preds.df[preds.df.split == 'test'].groupby('patient_id')[['y_sex', 'score_sex']].mean(); n1 = one.y_sex.sum(); n0 = len(one) - n1
    return roc_auc_score(one.y_sex, one.score_sex), np.sqrt((n0+n1+1)/(12*n0*n1))


def test_planted_sex_is_read(raw): assert auroc(raw)[0] > .8


def test_nothing_planted_nothing_read(tmp_path):
    "Without planted sex an attacker is at chance: within 3 standard errors (Mann-Whitney, about 0.075 for 60 patients)"
    a, se = auroc(attack_attribute(phantoms(tmp_path/'p', strength=dict(sex=0)), **{**HOW, 'epochs': 3}))
    assert abs(a - .5) < 3*se


def test_shuffled_sex_is_not_read(planted):
    "The control: the same images with the sex of other patients"
    a, se = auroc(attack_attribute(planted, shuffle=True, **{**HOW, 'epochs': 3}))
    assert abs(a - .5) < 3*se


@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('attribute,column', [('sex', 'sex'), ('age>median', 'age')])
def test_shuffle(planted, attribute, column, seed):
    "Whole patients change places within their split; counts stay, images stay"
    mix = shuffle_attribute(planted, attribute, seed); d, m = planted.df, mix.df
    assert m.path.tolist() == d.path.tolist() and m.split.tolist() == d.split.tolist() and m[column].tolist() != d[column].tolist()
    assert m.groupby('patient_id')[column].nunique().max() == 1
    for s in ('train', 'valid', 'test'):
        of = lambda t: sorted(t[t.split == s].groupby('patient_id')[column].first())
        assert of(m) == of(d)
    assert shuffle_attribute(planted, attribute, seed).df[column].tolist() == m[column].tolist()


def test_a_seed_repeats(planted, raw):
    "The same seed gives the same scores and learning curves; another seed others"
    again, other = (attack_attribute(planted.select(where=lambda d: d.patient_id < 'p00040'), seed=s, draws=1, **{**HOW, 'epochs': 1}) for s in (3, 4))
    same = attack_attribute(planted.select(where=lambda d: d.patient_id < 'p00040'), seed=3, draws=1, **{**HOW, 'epochs': 1})
    assert same.df.score_sex.equals(again.df.score_sex) and not same.df.score_sex.equals(other.df.score_sex)
    pd.testing.assert_frame_equal(same.history, again.history)


def test_what_is_reported(planted, raw):
    "Validation and test patients once each, with curves of every epoch; no training patient"
    want = planted.select(split=('valid', 'test')).df
    assert sorted(raw.df.image_id) == sorted(want.image_id) and raw.labels == ('sex',) and raw.df.score_sex.between(0, 1).all()
    assert raw.history.epoch.tolist() == list(range(6)) and set(raw.history.columns) >= {'model', 'train_loss', 'valid_loss', 'valid_auroc'}
    truth = planted.df.set_index('image_id').sex.map(dict(F=1., M=0.))
    assert (raw.df.y_sex.to_numpy() == truth[raw.df.image_id].to_numpy()).all()


def test_patience_stops(planted):
    "An attacker that no longer improves stops before its last epoch (here: it cannot improve)"
    p = attack_attribute(planted.select(where=lambda d: d.patient_id < 'p00040'), obfuscator=lambda x, cond=None, generator=None: x*0,
                         patience=1, draws=1, **{**HOW, 'epochs': 5})
    assert len(p.history) == 2 and p.df.score_sex.nunique() == 1


def test_constant_release_hides_everything(planted):
    "One picture for all: exactly 0.5"
    p = attack_attribute(planted.select(where=lambda d: d.patient_id < 'p00040'), obfuscator=lambda x, cond=None, generator=None: torch.full_like(x, .5),
                         draws=1, **{**HOW, 'epochs': 1})
    assert auroc(p)[0] == .5


@pytest.mark.parametrize('change', [lambda x: x*.7, lambda x: 1 - x, lambda x: x.mean((2, 3), keepdim=True).expand_as(x), lambda x: x])
def test_matched_noise(change):
    "The noise changes images by as much as the mechanism, after clamping"
    torch.manual_seed(8)    # 65,536 pixels: the mean |Δ| has a standard error of at most .3/256, the tolerance is four of them
    x = torch.rand(16, 1, 64, 64, generator=torch.Generator().manual_seed(7))*.8+.1    # not the noise's seed
    noise = matched_noise(lambda v: change(v), x)
    assert mean_change(noise, x) == pytest.approx(mean_change(change, x), abs=5e-3) and 0 <= noise(x).min() and noise(x).max() <= 1


def test_noise_follows_the_generator():
    n, x = GaussianNoise(.2), torch.full((2, 1, 8, 8), .5); g = lambda: torch.Generator().manual_seed(1)
    assert torch.equal(n(x, generator=g()), n(x, generator=g())) and not torch.equal(n(x), n(x))
    with pytest.raises(ConfigError, match='sigma'): GaussianNoise(-1)


def test_no_noise_is_that_large():
    "A change of nearly 1 everywhere is more than clamped noise can make"
    with pytest.raises(ConfigError, match='no clamped Gaussian noise'): matched_noise(lambda v: 1 - v, torch.zeros(2, 1, 8, 8))


@pytest.mark.parametrize('how,kind', [(dict(archs=[]), ConfigError), (dict(archs='resnet9'), ConfigError), (dict(epochs=0), ConfigError),
                                      (dict(attribute='race'), ConfigError), (dict(archs=['nonet']), ConfigError)])
def test_bad_settings(planted, how, kind):
    small = planted.select(where=lambda d: d.patient_id < 'p00020')
    with pytest.raises(kind): attack_attribute(small, **{**HOW, **how})


def test_no_attack_part(planted):
    with pytest.raises(DataError, match="part 'attack'"): attack_attribute(planted.with_split(planted.df.split, ['defence']*len(planted)), **HOW)
