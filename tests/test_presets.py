"The published systems: complete settings, a small run of each to its report, on phantoms and on real images"
import json, re

import pandas as pd, pytest, torch

from medprivacy.core import ConfigError
from medprivacy.game import GameLoss, ViewmakerGame, focal_losses
from medprivacy.models.resnet import create_classifier
from medprivacy.models.viewmaker import Viewmaker
from medprivacy.presets import run_preset
from medprivacy.systems import PRESETS, maker_args, preset_config

QUICK = dict(size=32, n_boot=20, data=dict(n_patients=56))
LEAK  = {f'{c}.sex.leakage' for c in ('raw', 'obfuscated', 'noise')} | {'control.sex.auroc', 'obfuscated.mean_change'}


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "Function: preset -> its small run, made once"
    made, root = {}, tmp_path_factory.mktemp('presets')
    def _run(name):
        if name not in made: made[name] = run_preset(name, root/name, config=QUICK, small=True, device='cpu')
        return made[name]
    return _run


def some(kind, quick): return [n if n == quick else pytest.param(n, marks=pytest.mark.slow) for n, p in PRESETS.items() if p.kind == kind]


@pytest.mark.parametrize('name', some('viewmaker', 'retinal_viewmaker'))
def test_viewmaker_presets(runs, name):
    "Game, fresh attackers with controls, utility, pictures, report; the settings of the run are a configuration again"
    run = runs(name); budget = maker_args(run.config['maker'])['distortion_budget']
    assert LEAK | {'raw.disease.auroc', 'obfuscated.disease.auroc'} <= set(run.summary) and 0 < run.summary['obfuscated.mean_change']['value'] <= budget+1e-3
    assert preset_config(config=run.path/'config.toml') == preset_config(name, QUICK, small=True)
    how = json.loads((run.path/'model'/'obfuscator.json').read_text())
    assert (how['attack'], how['trained_disease'], how['use_disease'], how['attackers_first']) == ('negative', True, True, True)
    assert how['args']['num_res_blocks'] == dict(retinal_viewmaker=3, chest_viewmaker=5)[name] and how['task'] == ('multiclass' if name[0] == 'r' else 'multilabel')
    assert {f.stem for f in (run.path/'figures').glob('*.png')} >= {'views', 'views_sheet', 'attack', 'utility'} and not (run.path/'checkpoints').exists()
    html = (run.path/'report.html').read_text()
    assert 'still reads sex' in html and 'Obfuscated images' in html and 'not tested' in html


@pytest.mark.parametrize('name', some('pretrain', 'simclr_adversarial'))
def test_pretraining_presets(runs, name):
    "Nearest neighbours each epoch, linear evaluation of findings and of classes, beside random features; no claim about privacy"
    run = runs(name); s = run.summary
    assert {f'{c}.disease.{m}' for c in ('pretrained', 'random_features') for m in ('auroc', 'macro_f1')} | {'pretrained.knn.accuracy', 'pretrained.knn.auroc'} <= set(s)
    curve = pd.read_csv(run.path/'metrics.csv'); assert len(curve) == 2 and curve.knn_accuracy.between(0, 1).all()
    assert set(pd.read_csv(run.path/'tables'/'comparison.csv').model) == {'pretrained'} and (run.path/'figures'/'views_pretraining.png').exists()
    html = (run.path/'report.html').read_text()
    assert 'Pretraining protects nobody' in html and 'No attack was made' in html and 'Only the attackers listed' not in html


def test_downstream_preset(runs):
    "Confusion matrix and macro-F1 of each epoch, raw beside obfuscated; the report says that nobody attacked"
    run = runs('downstream'); conf = pd.read_csv(run.path/'tables'/'confusion.csv'); hist = pd.read_csv(run.path/'tables'/'history.csv')
    assert set(conf.condition) == {'raw', 'obfuscated'} and conf.groupby('condition').n.sum().nunique() == 1 and len(conf) == 2*9
    assert hist.macro_f1.between(0, 1).all() and {'raw.disease.macro_f1', 'obfuscated.disease.macro_f1'} <= set(run.summary)
    html = (run.path/'report.html').read_text()
    assert 'were not attacked' in html and 'resnet18d' in html and 'predicted class' in html


@pytest.mark.slow
def test_downstream_on_a_stored_obfuscator(runs, tmp_path):
    "A folder takes the place of the game"
    model = runs('retinal_viewmaker').path/'model'
    run = run_preset(config=dict(QUICK, preset='downstream', downstream=dict(obfuscator=str(model))), out=tmp_path/'r', small=True, device='cpu')
    assert run.record['downstream']['given'] is True and not (run.path/'model').exists() and 'obfuscate' not in run.record


@pytest.mark.slow
def test_goes_on_after_a_crash(runs, tmp_path, monkeypatch):
    "Interrupted after the game: nothing is trained twice, and the result is that of an unbroken run"
    import medprivacy.presets as module
    whole = runs('chest_viewmaker'); real = module.attack_stage
    def crash(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr(module, 'attack_stage', crash)
    with pytest.raises(KeyboardInterrupt): run_preset('chest_viewmaker', tmp_path/'r', config=QUICK, small=True, device='cpu')
    assert not (tmp_path/'r'/'report.html').exists(); old = (tmp_path/'r'/'model'/'weights.safetensors').stat().st_mtime_ns
    monkeypatch.setattr(module, 'attack_stage', real)
    run = run_preset('chest_viewmaker', tmp_path/'r', config=QUICK, small=True, device='cpu', resume=True)
    assert (run.path/'model'/'weights.safetensors').stat().st_mtime_ns == old and run.summary == whole.summary
    with pytest.raises(ConfigError, match='other settings'): run_preset('chest_viewmaker', tmp_path/'r', config=dict(QUICK, bs=8), small=True, device='cpu', resume=True)


@pytest.mark.parametrize('config, why', [
    (dict(preset='retinal'), 'unknown preset'), ({}, 'no preset is named'), (dict(preset='downstream', gane={}), "unknown setting 'gane'; did you mean 'game'"),
    (dict(preset='downstream', game=dict(wieght=1.)), "'game.wieght'; did you mean 'game.weight'"), (dict(preset='downstream', size='64'), 'size must be a int'),
    (dict(preset='chest_viewmaker', data=dict(colour=3)), 'data.colour'), (dict(preset='chest_viewmaker', attack=dict(archs=['resnet99'])), 'no known architecture')])
def test_refused_by_name(config, why, tmp_path):
    "Before a folder is made"
    with pytest.raises(ConfigError, match=re.escape(why)): run_preset(config=config, out=tmp_path/'r', device='cpu')
    assert not (tmp_path/'r').exists()


def test_published_numbers():
    r, c = (PRESETS[n].settings() for n in ('retinal_viewmaker', 'chest_viewmaker'))
    assert (r['maker']['budget'], r['maker']['num_res_blocks'], r['game']['focal'], r['game']['weight']) == (.7, 3, dict(gamma=2., attr_gamma=2., weigh=True, scale=1., detach=True), 1.)
    assert (c['maker']['budget'], c['maker']['num_res_blocks'], c['game']['focal']['scale'], c['game']['weight'], c['game']['use_disease']) == (8., 5, 10., 1.5, True)
    assert abs(maker_args(c['maker'])['distortion_budget'] - 8*.0349) < 1e-9 and PRESETS['downstream'].settings()['downstream']['arch'] == r['disease']['arch'] == 'resnet200d'


def test_x_ray_form_without_disease(tmp_path):
    "The published chest objective can be chosen: no gradient reaches the maker from the disease"
    cfg = preset_config('chest_viewmaker', dict(game=dict(use_disease=False)), small=True)
    assert cfg['game']['use_disease'] is False
    hide, keep = focal_losses(torch.tensor([0, 1]), torch.zeros(2, 5), weigh=False, attr_gamma=0., scale=10.)
    d = torch.zeros(2, 5, requires_grad=True); a = torch.zeros(2, 1, requires_grad=True)
    for use in (True, False):
        GameLoss('negative', 1.5, use, attr_loss=hide, disease_loss=keep)((None, [a], [d], torch.tensor(0.)), torch.tensor([0, 1]), torch.ones(2, 5)).backward()
        assert (d.grad is not None) == use; d.grad = None


def test_resnet200d_learns_in_the_game():
    "The published encoder, forward and backward, as attacker and as trained classifier"
    torch.manual_seed(0)
    game = ViewmakerGame(Viewmaker(3, .119, width=.25), ('resnet200d',), 3, 3, create_classifier('resnet200d', 3, 3)).train()
    _, (a,), (d,), _ = game(torch.rand(2, 3, 32, 32))
    (a.sum() + d.sum()).backward()
    assert a.shape == (2, 1) and d.shape == (2, 3) and all(p.grad is not None for p in game.attackers.parameters())
    assert not any(p.requires_grad for p in game.disease.parameters()) and any(p.grad.abs().sum() > 0 for n, p in game.maker.named_parameters() if p.grad is not None)


# ---------------------------------------------------------------- real images

GRADES = ('mild nonproliferative', 'moderate non proliferative', 'severe nonproliferative', '(?<!non)(?<!non )proliferative retinopathy')


def few(folder, labels, n):
    "At most two images of each of `n` patients, half of them with a finding; numbers that nothing else holds; a grade of retinopathy from the keywords"
    df = pd.read_csv(folder/'labels.csv', dtype=str).groupby('patient_id').head(2)
    if labels == ['icdr']: df['icdr'] = sum(df.keywords.str.lower().str.contains(w, regex=True)*g for g, w in enumerate(GRADES, 1)).clip(upper=4)
    sick = df.groupby('patient_id')[labels].max().astype(float).max(axis=1) > 0
    ids = [*sick.index[sick][:n//2], *sick.index[~sick][:n//2]]
    return df[df.patient_id.isin(ids)].assign(patient_id=lambda d: 'somebody-' + d.patient_id)


REAL = {'retinal_viewmaker': ('odir-fundus', ['icdr']), 'downstream': ('odir-fundus', ['icdr']),
        'chest_viewmaker': ('nih-sample', ['effusion', 'cardiomegaly', 'atelectasis', 'consolidation', 'edema']),
        'simclr_adversarial': ('nih-sample', ['effusion', 'infiltration']), 'nce_adversarial': ('covid-cxr', ['covid']),
        'simclr_expert': ('nih-sample', ['effusion', 'infiltration'])}


@pytest.mark.real
@pytest.mark.parametrize('name', REAL)
def test_on_real_images(real_data, tmp_path, name):
    "Each preset, small, to a report that shows no patient"
    source, labels = REAL[name]; folder = real_data(source)
    df = few(folder, labels, 240 if labels == ['icdr'] else 80); df.to_csv(tmp_path/'few.csv', index=False)
    data = dict(csv=str(tmp_path/'few.csv'), root=str(folder), folder='images', labels=labels, name=source)
    own  = dict(classes=dict(cuts=[1], grade_cuts=[1, 2])) if 'classes' in PRESETS[name].config else {}
    run = run_preset(name, tmp_path/'run', config=dict(n_boot=20, **own), data=data, small=True, device='cpu')
    html = (run.path/'report.html').read_text()
    assert 'no pictures shown' in html and run.config['data']['name'] == source and any('disease' in k for k in run.summary)
    for f in run.path.rglob('*'):
        if f.is_file() and 'predictions' not in f.parts: assert not [i for i in df.patient_id.unique() if i.encode() in f.read_bytes()], f.name
