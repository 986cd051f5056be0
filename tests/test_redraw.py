"A redraw hides what a bottleneck of a game leaves, keeps the disease, and is told the attribute it hides"
import numpy as np
import pytest
import torch
from medprivacy.attack import attack_attribute
from medprivacy.core import DataError
from medprivacy.data.core import Records
from medprivacy.data.load import load_images, median_age, records_dls, release_condition
from medprivacy.data.phantom import tiny_records
from medprivacy.obfuscate import Obfuscator, train_obfuscator
from medprivacy.panel import train_inverter
from medprivacy.probe import mean_auroc, train_probe
from medprivacy.redraw import fit_redraw, teacher_folds

HOW = dict(maker='redraw', size=32, bs=16, epochs=4, device='cpu')

def auc(preds):
    d = preds.df[preds.df.split == 'test']
    return mean_auroc(*(d[[f'{k}_{l}' for l in preds.labels]].to_numpy() for k in ('score', 'y')))

def test_it_hides_sex_and_keeps_the_disease():
    recs = tiny_records(n=260, size=32, attack=.5, fracs=(.5, .2, .3), labels=['effusion'], seed=1)
    obf  = train_obfuscator(recs, **{**HOW, 'epochs': 8, 'maker_args': dict(teachers=('small_resnet',))})
    how  = dict(size=32, bs=16, epochs=6, device='cpu', draws=2)
    raw, hid = (auc(attack_attribute(recs, 'sex', o, ('small_resnet',), **how)) for o in (None, obf))
    use = auc(train_probe(recs.select(part='attack'), 'labels', mechanism=obf, **how).preds)
    assert raw > .85 and abs(hid-.5) < .2 and use > .65      # n = 76 images: 3 standard errors of 0.5 are 0.2
    assert set(obf.history.model) == {'teacher 0', 'decoder'} and obf.config['attackers'] == 0

def test_it_is_told_what_it_hides(tmp_path):
    recs = tiny_records(n=60, size=32, attack=.4)
    obf  = train_obfuscator(recs, 'age>median', **HOW)
    assert obf.attribute == 'age>median' and obf.median == median_age(recs.select(part='defence'))
    part = recs.select(part='attack')
    np.testing.assert_array_equal(release_condition(part, obf), (part.df.age > obf.median).astype(float))
    np.testing.assert_array_equal(release_condition(part, None), (part.df.sex == 'F').astype(float))
    back = Obfuscator.load(obf.save(tmp_path))
    x, g = torch.rand(3, 1, 32, 32), lambda: torch.Generator().manual_seed(2)
    for c in (None, torch.tensor([0., 1., float('nan')])): assert torch.equal(obf(x, c, g()), back(x, c, g()))
    assert back.attribute == obf.attribute and back.median == obf.median
    undone = train_inverter(part, obf, size=32, epochs=1, bs=16, device='cpu')
    assert undone.attribute == 'age>median' and undone(x).shape == x.shape

def test_unknown_sex_is_released_as_everybodys():
    recs = tiny_records(n=40, size=32, attack=.4)
    obf  = train_obfuscator(recs, **HOW)
    part = recs.select(part='attack')
    df   = part.df.assign(sex=np.where(np.arange(len(part)) % 3 == 0, None, part.df.sex))
    odd  = Records(df, part.root, part.labels, part.task, part.name)
    dls  = records_dls(odd, 'labels', 32, 8, mechanism=obf, draws=1, device='cpu')
    assert len(dls.train.dataset) == (df.split == 'train').sum()

def test_groups_are_measured_by_teachers_who_did_not_learn_from_them(monkeypatch):
    import medprivacy.redraw as redraw
    recs, learnt, told = tiny_records(n=24, size=32, images_per_patient=2), [], []
    probe, alike = redraw.train_probe, redraw.make_alike
    monkeypatch.setattr(redraw, 'train_probe', lambda part, *a, **k: learnt.append(set(part.select(split='train').df.patient_id)) or probe(part, *a, **k))
    monkeypatch.setattr(redraw, 'make_alike', lambda m, codes, recs, *a: told.append((codes, recs)) or alike(m, codes, recs, *a))
    _, maker, _ = fit_redraw(recs, size=32, bs=16, epochs=1, device='cpu')
    (codes, seen), = told
    assert sorted(seen.df.image_id) == sorted(recs.df.image_id) and len(learnt) == 3 and not set.intersection(*learnt)
    images = load_images(seen, 32)
    for who, teacher in zip(learnt, maker.teachers):
        out = (~seen.df.patient_id.isin(who)).to_numpy(copy=True)
        with torch.no_grad(): torch.testing.assert_close(codes[out], teacher.eval()(images[out].float()/255).cpu())

def test_more_teachers_than_patients_are_refused():
    with pytest.raises(DataError, match='5 teachers need at least as many patients, got 4'): teacher_folds(tiny_records(n=4, size=32), 5)

def test_classes_and_colour():
    eyes   = tiny_records(n=40, size=32, modality='fundus', attack=.5)
    grades = Records(eyes.df.assign(grade=eyes.df[list(eyes.labels)].sum(axis=1).clip(upper=2)), eyes.root, ('grade',), 'multiclass', 'graded')
    obf = train_obfuscator(grades, **{**HOW, 'epochs': 1})
    assert obf.config['args']['code'] == 3 and obf(torch.rand(2, 3, 32, 32)).shape == (2, 3, 32, 32)

def test_the_same_seed_gives_the_same_redraw():
    recs = tiny_records(n=30, size=32, attack=.4)
    one, two, three = (train_obfuscator(recs, **{**HOW, 'epochs': 1, 'seed': s}).maker.state_dict() for s in (0, 0, 1))
    assert all(torch.equal(one[k], two[k]) for k in one) and not all(torch.equal(one[k], three[k]) for k in one)

@pytest.mark.parametrize('maker', ['redraw', 'bottleneck', 'viewmaker'])
def test_copies_of_one_batch_are_those_of_single_calls(maker):
    "The code is computed once for all copies of an image; what comes out is the same to the bit"
    from medprivacy.data.draws import release_draws
    from medprivacy.panel import Inverter, Undone
    recs = tiny_records(n=24, size=32, attack=.4)
    obf  = train_obfuscator(recs, **{**HOW, 'maker': maker, 'epochs': 1, **({} if maker == 'redraw' else dict(archs=('small_resnet',), attacker_steps=1))})
    x, cond = torch.randint(0, 256, (5, 1, 32, 32), dtype=torch.uint8), torch.tensor([0., 1., 1., float('nan'), 0.])
    for mechanism in (obf, Undone(obf, Inverter(1))):
        def copies(m):
            torch.manual_seed(4)
            return release_draws(x, m, cond, 3, device='cpu')
        out = copies(mechanism)
        assert torch.equal(out, copies(lambda v,c: mechanism(v, c))) and not torch.equal(out[:,0], out[:,1])
