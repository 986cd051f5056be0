"The panel: features know what they should, undoing leads back, the camera is told apart from the picture"
import numpy as np
import pytest
import torch
from medprivacy.attack import GaussianNoise
from medprivacy.core import ConfigError, DataError
from medprivacy.data.load import records_dls
from medprivacy.data.phantom import make_phantom
from medprivacy.data.split import split_patients
from medprivacy.leakage import leakage_table
from medprivacy.panel import Inverter, attack_effort, camera_control, feature_attack, image_features, led_back

def phantoms(root, **strength):
    recs = make_phantom(root, 'cxr', n_patients=240, size=32, seed=2, strength=strength)
    return split_patients(recs, (.5, .1, .4), seed=0, stratify='sex', attack=.99)

def features_on(recs, mechanism=None):
    dls = records_dls(recs.select(part='attack'), 'sex', 32, 32, device='cpu', mechanism=mechanism, draws=1)
    return leakage_table(feature_attack(dls, 'sex'), n_boot=200).set_index('model')

def test_features_read_planted_sex_and_nothing_where_none_is(tmp_path):
    assert (features_on(phantoms(tmp_path/'a')).leakage[['linear', 'boosted']] > .75).all()
    none = features_on(phantoms(tmp_path/'b', sex=0))
    error = np.sqrt(1/(3*none.n))            # of an AUROC: 1/sqrt(12 m n/(m+n+1)) with m = n = images/2; two images of a patient are not independent
    assert (none.leakage[['linear', 'boosted']] - .5 < 3*np.sqrt(2)*error[['linear', 'boosted']]).all()

@pytest.mark.parametrize('c,h,w', [(1, 32, 32), (3, 33, 47)])
def test_features_are_finite_and_of_one_length(c, h, w):
    f = image_features(torch.cat([torch.zeros(1, c, h, w), torch.ones(1, c, h, w), torch.rand(2, c, h, w)]))
    assert f.shape == (4, c*(16+8+64+32)) and np.isfinite(f).all()

def test_features_of_an_image_do_not_depend_on_the_batch():
    x = torch.rand(6, 1, 32, 32)
    assert np.allclose(image_features(x)[2:3], image_features(x[2:3]), atol=1e-5)

def test_one_sex_cannot_be_learnt(tmp_path):
    recs = phantoms(tmp_path/'p')
    same = recs._with(recs.df.assign(sex='F'))
    with pytest.raises(DataError, match='all of one kind'): features_on(same)
    with pytest.raises(DataError, match='all of one kind'): camera_control(same)

def test_camera_knows_nothing_where_devices_are_independent_of_sex(tmp_path):
    t = leakage_table(camera_control(phantoms(tmp_path/'p')), n_boot=200).set_index('model')
    assert t.leakage['camera'] - .5 < 3*np.sqrt(2/(3*t.n['camera']))

def test_inverter_needs_no_batch_and_keeps_the_range():
    net = Inverter(3).eval()
    x = torch.rand(5, 3, 40, 24)
    y = net(x)
    assert torch.allclose(y[:1], net(x[:1]), atol=1e-5) and 0 <= y.min() and y.max() <= 1

def test_effort_is_named_and_judged_on_the_same_images(tmp_path):
    p = attack_effort(phantoms(tmp_path/'p'), obfuscator=GaussianNoise(.05), shares=(.3, 1.), efforts=(1., 2.), epochs=1, size=32, bs=32, draws=1, device='cpu')
    assert list(p.df.model.unique()) == ['0.3 of patients, 1 epochs', '1 of patients, 1 epochs', '1 of patients, 2 epochs']
    assert p.df.groupby('model').image_id.agg(lambda v: tuple(sorted(v))).nunique() == 1

def test_unknown_features_are_refused(tmp_path):
    with pytest.raises(ConfigError, match='kinds must be'): feature_attack(None, 'sex', ('forest',))

def test_networks_of_the_panel_are_those_of_an_attack_alone():
    "Releases are drawn once for all of the panel, and as they would be drawn for the networks alone"
    from medprivacy.attack import attack_attribute
    from medprivacy.data.phantom import tiny_records
    from medprivacy.panel import attack_panel
    recs = tiny_records(n=40, size=32, attack=.6, seed=2)
    how  = dict(size=32, draws=2, epochs=1, bs=16, seed=3, device='cpu')
    both = attack_panel(recs, 'sex', GaussianNoise(.1), networks=('small_resnet',), undo=False, flip=False, **how).df
    one  = attack_attribute(recs, 'sex', GaussianNoise(.1), ('small_resnet',), **how).df
    mine = both[both.model == 'small_resnet'].reset_index(drop=True)
    assert set(both.model) == {'small_resnet', 'linear', 'boosted'} and mine.score_sex.tolist() == one.score_sex.tolist()

def test_the_shuffled_control_is_the_same_for_every_attacker():
    from medprivacy.data.phantom import tiny_records
    from medprivacy.panel import attack_panel
    recs = tiny_records(n=40, size=32, attack=.6, seed=2)
    told = attack_panel(recs, 'sex', GaussianNoise(.1), networks=('small_resnet',), shuffle=True, size=32, draws=1, epochs=1, bs=16, device='cpu').df
    y = told.pivot(index='image_id', columns='model', values='y_sex')
    assert y.shape[1] == 5 and y.notna().all(axis=None) and (y.nunique(axis=1) == 1).all()

def test_the_attacker_of_raw_images_is_trained_once_and_answers_the_same(tmp_path, monkeypatch):
    from medprivacy import panel, probe
    from medprivacy.data.phantom import tiny_records
    recs, trained, real = tiny_records(n=40, size=32, attack=.6, seed=2), [], probe.train_probe
    def count(*a, **k): trained.append(k.get('name')); return real(*a, **k)
    for m in (panel, probe): monkeypatch.setattr(m, 'train_probe', count)
    def told(mechanism, file):
        df = panel.attack_panel(recs, 'sex', mechanism, networks=('small_resnet',), features=(), undo=False, flip_file=file, size=32, draws=2, epochs=1, bs=16, device='cpu').df
        return df[df.model == 'raw-trained'].score_sex.tolist()
    f = tmp_path/'a.safetensors'; noise, dark = GaussianNoise(.1), lambda x, cond=None, generator=None: x/2
    alone = told(noise, None), told(dark, None)
    assert trained == ['raw-trained']*2 and (told(noise, f), told(dark, f)) == alone and trained == ['raw-trained']*3
    assert alone[0] != alone[1]

@pytest.mark.parametrize('channels', [1, 3])
def test_what_is_led_back_are_the_releases_of_the_others(channels):
    from medprivacy.data.phantom import tiny_records
    recs = tiny_records(n=24, size=32, modality='cxr' if channels == 1 else 'fundus')
    shown = records_dls(recs, 'sex', 32, 8, mechanism=GaussianNoise(.2), draws=3, device='cpu')
    net = Inverter(channels).eval(); back = led_back(shown, net)
    for a, b in zip(shown.loaders, back.loaders):
        x, y = a.dataset.store, b.dataset.store
        slow = torch.stack([net(x[i,k][None].float()/255)[0].detach() for i in range(len(x)) for k in range(3)])
        assert y.dtype == torch.uint8 and ((y.flatten(0, 1).float()/255 - slow).abs() <= .5/255 + 1e-6).all()
        assert torch.equal(a.dataset.ys[0], b.dataset.ys[0]) and (a.bs, a.shuffle, a.drop_last, a.draw) == (b.bs, b.shuffle, b.drop_last, b.draw)
