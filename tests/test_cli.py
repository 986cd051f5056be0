"The commands as a user runs them: in a process of their own, from a table or phantoms to a report"
import json, os, re, subprocess, sys, tomllib
from pathlib import Path

import pandas as pd, pytest
from fastcore.script import anno_parser
from PIL import Image

from medprivacy import cli
from medprivacy.compare import paired_metrics
from medprivacy.data.core import load_predictions
from medprivacy.data.phantom import make_phantom
from medprivacy.evaluate import choose_thresholds
from medprivacy.rank import fake_predictions

COMMANDS = ['demo', 'preset', 'obfuscate', 'attack', 'train', 'evaluate', 'report']
BIN = Path(sys.executable).parent


def run(command, *args, cwd=None):
    quiet = 'ignore:`torch.jit.script` is deprecated:FutureWarning'    # fastai's import, as in pytest.ini
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'Agg', 'PYTHONWARNINGS': quiet}
    return subprocess.run([str(BIN/f'medprivacy_{command}'), *map(str, args)], capture_output=True, text=True, cwd=cwd, env=env, timeout=900)


def content(folder): return {str(f.relative_to(folder)): f.read_bytes() for f in Path(folder).rglob('*') if f.is_file()}


@pytest.fixture(scope='module')
def demo(tmp_path_factory):
    "One small demo: its folder and what it printed"
    d = tmp_path_factory.mktemp('cli'); done = run('demo', '--small', '--out', d/'run', '--device', 'cpu')
    assert done.returncode == 0, done.stderr
    return d/'run', done


def test_demo_prints_a_table(demo):
    path, done = demo
    assert re.search(r'raw\.sex\.leakage\s+0?\.?\d', done.stdout) and f'report: {path}/report.html' in done.stdout
    assert 'Traceback' not in done.stderr and 'Warning' not in done.stderr


def test_demo_writes_its_files(demo):
    "Report, summary with every headline number, settings, versions and the terms of the privacy"
    path, _ = demo
    need = ['raw.sex.leakage', 'obfuscated.sex.leakage', 'noise.sex.leakage', 'control.sex.auroc', 'raw.disease.auroc', 'obfuscated.disease.auroc',
            'public.disease.auroc', 'private.disease.auroc', 'private.epsilon']
    s = json.loads((path/'summary.json').read_text())
    assert not set(need) - set(s) and all(0 <= s[k]['lo'] <= s[k]['value'] <= s[k]['hi'] <= 1 and s[k]['n'] > 0 for k in need[:-1])
    assert s['control.sex.auroc']['n'] == s['raw.sex.leakage']['n']                  # images, not patients
    assert 0 < s['private.epsilon']['value'] <= 8 and json.loads((path/'privacy.json').read_text())['eps'] == s['private.epsilon']['value']
    cfg = tomllib.loads((path/'config.toml').read_text())
    assert cfg['attribute'] == 'sex' and cfg['data']['phantom'] is True and 'torch' in (path/'versions.txt').read_text()
    html = (path/'report.html').read_text()
    assert len(html) > 10_000 and not re.search(r'(src|href)="https?://[^"]*\.(js|css|png)', html)


def test_no_patient_in_the_tables(demo):
    "Ids of patients and images stand in predictions/ and phantoms/ alone"
    path, _ = demo
    ids = pd.read_csv(path/'phantoms'/'labels.csv', dtype=str)[['patient_id', 'image_id']].stack().unique()
    for name, b in content(path).items():
        b = re.sub(rb'base64,[A-Za-z0-9+/=]+', b'', b)                 # pictures hold any four letters by chance
        if not name.startswith(('predictions/', 'phantoms/')): assert not [i for i in ids if i.encode() in b], name


def test_demo_again(demo):
    "The folder exists: one line, exit code 2, nothing touched"
    path, _ = demo; before = content(path); done = run('demo', '--small', '--out', path, '--device', 'cpu')
    assert done.returncode == 2 and done.stdout == '' and content(path) == before
    assert re.fullmatch(r'error: .* exists already; pass .*\n', done.stderr)


@pytest.mark.parametrize('command', COMMANDS)
def test_help(command):
    "Every option has a description"
    if command == 'attack':    # in a process of its own, the others from the parser that it uses
        done = run(command, '--help'); assert done.returncode == 0 and done.stderr == ''
        text = done.stdout
    else: text = anno_parser(getattr(cli, f'medprivacy_{command}').__wrapped__, f'medprivacy_{command}').format_help()
    options = re.findall(r'^  (--\w+)', text, re.M)
    shown = dict(re.findall(r'^  (?:-\w, )?(--\w+)(?: [A-Z_]+)?\s+(\S.*)$', text, re.M))
    assert len(options) >= 1 and {o for o in options if len(shown.get(o, '').split('(default')[0].strip()) < 5} == set()
    usage = set(re.findall(r'--\w+', text.split('options:')[0])); assert usage <= {*shown, '--help'}
    if command in ('demo', 'preset', 'obfuscate', 'attack', 'train'): assert {'--seed', '--device', '--out', '--overwrite'} <= usage
    if command in ('preset', 'obfuscate', 'attack', 'train'): assert {'--resume', '--every', '--wandb', '--csv', '--dataset'} <= usage


@pytest.fixture
def table(tmp_path):
    "Twelve patients as a CSV with a folder of images, as a user would bring them"
    make_phantom(tmp_path/'set', n_patients=12, size=32)
    return tmp_path/'set'/'labels.csv'


def spoil(csv, fault):
    df = pd.read_csv(csv)
    if fault == 'missing column': df = df.drop(columns='patient_id')
    if fault == 'sex coded 1/2':  df['sex'] = df.sex.map(dict(M=1, F=2))
    if fault == 'empty label':    df['effusion'] = None
    if fault == 'two splits':     df['split'] = ['train', 'test']*(len(df)//2)
    df.to_csv(csv, index=False); image = next((csv.parent/'images').iterdir())
    if fault == 'absent image':   image.unlink()
    if fault == 'corrupt image':  image.write_bytes(image.read_bytes()[:60])
    if fault == 'CMYK image':     Image.new('CMYK', (32, 32)).save(image, format='JPEG')
    return image.name


FAULTS = {'missing column': 'patient_id', 'sex coded 1/2': '--sex_codes|sex_codes', 'empty label': 'effusion', 'two splits': "two values of 'split'",
          'absent image': 'IMAGE', 'corrupt image': 'IMAGE', 'CMYK image': 'IMAGE'}


def bad_table_args(csv, out):
    return dict(csv=str(csv), folder='images', ext='.png', labels='effusion', out=str(out), device='cpu')


@pytest.mark.parametrize('fault', FAULTS)
def test_one_clear_error(table, fault, tmp_path, capsys):
    "Before training, and without a folder that would be in the way of the next try"
    image = spoil(table, fault)
    with pytest.raises(SystemExit) as e: cli.medprivacy_obfuscate(**bad_table_args(table, tmp_path/'run'))
    out, err = capsys.readouterr()
    assert e.value.code == 2 and err.startswith('error: ') and err.count('error:') == 1 and '▸' not in out
    assert re.search(FAULTS[fault].replace('IMAGE', re.escape(image.removesuffix('.png'))), err) and not (tmp_path/'run').exists()


def test_error_in_a_process(table, tmp_path):
    "As a user sees it: one line, exit code 2, no traceback; a run that is to be replaced stays"
    (tmp_path/'run').mkdir(); (tmp_path/'run'/'config.toml').write_text(''); spoil(table, 'sex coded 1/2')
    args = [t for k, v in bad_table_args(table, tmp_path/'run').items() for t in (f'--{k}', v)]
    done = run('attack', '--overwrite', *args)
    assert done.returncode == 2 and re.fullmatch(r'error: [^\n]*sex_codes[^\n]*\n', done.stderr) and (tmp_path/'run'/'config.toml').exists()


@pytest.mark.parametrize('command,args,words', [
    ('attack', dict(csv='gone.csv', labels='y'), 'gone.csv'), ('attack', dict(csv='gone.csv'), '--labels'), ('attack', dict(resume=True), 'no run folder'),
    ('train', dict(device='tpu9'), 'tpu9'), ('evaluate', {}, '--predictions'), ('evaluate', dict(predictions='gone.csv'), 'gone.csv'),
    ('report', dict(run='gone'), 'gone'), ('preset', dict(name='retina'), 'retinal_viewmaker'), ('preset', dict(name='downstream', config='gone.toml'), 'gone.toml'),
    ('preset', dict(name='downstream', csv='gone.csv'), '--labels'), ('preset', dict(name='downstream', labels='a'), '--csv'), ('preset', dict(name='downstream', wandb='on'), '--wandb'),
    ('preset', dict(name='downstream', resume=True, overwrite=True), 'choose one'), ('preset', dict(name='downstream', device='tpu9'), 'tpu9'),
    ('obfuscate', dict(precision='fp16'), '--precision'), ('attack', dict(every=0), '--every'), ('obfuscate', dict(wandb='on'), '--wandb'), ('attack', dict(wandb_images=True), '--wandb_images'),
    ('attack', dict(wandb_images=True, wandb='offline', csv='gone.csv', labels='y'), 'phantoms only'), ('train', dict(precision='fp16'), '--precision'), ('attack', dict(root='x'), '--csv'),
    ('attack', dict(resume=True, overwrite=True), 'choose one'), ('train', dict(out='/proc/run'), '/proc/run'), ('demo', dict(device='tpu9'), 'tpu9'), ('demo', dict(modality='mri'), '--modality'),
    ('obfuscate', dict(maker='gan'), '--maker'), ('obfuscate', dict(attack='gan'), '--attack'), ('obfuscate', dict(epochs=0), '--epochs'),
    ('obfuscate', dict(attribute='race'), '--attribute'), ('obfuscate', dict(budget=.1, maker='bottleneck'), '--budget'), ('obfuscate', dict(size=4), '--size'),
    ('attack', dict(archs='resnet19'), 'resnet18'), ('attack', dict(draws=0), '--draws'), ('attack', dict(archs=','), '--archs'),
    ('train', dict(epsilon='eight'), '--epsilon'), ('train', dict(delta=2.), '--delta'), ('train', dict(unit='eye'), '--unit'), ('train', dict(lr=-1.), '--lr')])
def test_settings_that_cannot_work(command, args, words, tmp_path, capsys, monkeypatch):
    "One line each, and no folder left behind"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e: getattr(cli, f'medprivacy_{command}')(**args)
    err = capsys.readouterr().err
    assert e.value.code == 2 and re.fullmatch(r'error: [^\n]*\n', err) and words in err and not list(tmp_path.iterdir())


def test_chain(tmp_path):
    "obfuscate → attack → train → report in one folder, then evaluate on what it wrote"
    make_phantom(tmp_path/'set', n_patients=40, size=32); table = tmp_path/'set'/'labels.csv'; df = pd.read_csv(table); df['patient_id'] = 'clinic-' + df.patient_id; df.to_csv(table, index=False)
    out = tmp_path/'run'; small = ['--out', out, '--device', 'cpu', '--size', 32, '--bs', 4]
    steps = [('obfuscate', ['--csv', table, '--folder', 'images', '--ext', '.png', '--labels', 'effusion,cardiomegaly', '--epochs', 1]),
             ('attack', ['--resume', '--epochs', 1, '--archs', 'small_resnet', '--draws', 1, '--n_boot', 20]),
             ('train', ['--resume', '--epochs', 1, '--private_epochs', 1, '--private_bs', 4, '--n_boot', 20])]
    for command, args in steps:
        done = run(command, *args, *small); assert done.returncode == 0, done.stderr
    cli.medprivacy_report(run=str(out)); assert (out/'report.html').stat().st_size > 10_000
    assert {'data', 'attribute', 'obfuscate', 'attack', 'train'} <= set(tomllib.loads((out/'config.toml').read_text()))
    for name, b in content(out).items():
        if not name.startswith('predictions/'): assert b'clinic-' not in b, name
    cli.medprivacy_evaluate(predictions=str(out/'predictions'/'disease.parquet'), out=str(tmp_path/'eval'), n_boot=20)
    assert len(pd.read_csv(tmp_path/'eval'/'tables'/'utility.csv'))
    said = (out/'methods.txt').read_text()
    for words in ('obfuscated was compared with raw', 'private was compared with public', 'accountant', 'patients'): assert words in said
    assert {'comparison.tex', 'performance.md', 'groups.csv'} <= {f.name for f in (out/'paper').iterdir()}
    html = (out/'report.html').read_text()
    for words in ('Paired comparisons', 'Calibration', 'Methods, from what the stages recorded'): assert words in html


# ---------------------------------------------------------------- predictions of any tool

@pytest.fixture
def tool(tmp_path):
    "Two CSV files as another tool writes them: no model, run, view or device column"
    def write(name, change=lambda d: d, **kw):
        df = change(fake_predictions(200, ('effusion', 'mass'), **kw).df).drop(columns=['model', 'run', 'view', 'device'], errors='ignore')
        df.to_csv(tmp_path/f'{name}.csv', index=False)
        return str(tmp_path/f'{name}.csv')
    return write


def test_evaluate_against(tool, tmp_path):
    "In a process of its own: tables in three forms, figures, record, methods, report; thresholds from validation rows"
    a, b, out = tool('mine', auroc=.9, noise_seed=1), tool('theirs', auroc=.7, noise_seed=2), tmp_path/'out'
    done = run('evaluate', '--predictions', a, '--against', b, '--out', out, '--n_boot', 200)
    assert done.returncode == 0 and 'p_holm' in done.stdout and f'report: {out}/report.html' in done.stdout and 'Traceback' not in done.stderr
    t, c = (pd.read_csv(out/'tables'/f'{n}.csv') for n in ('utility', 'comparison'))
    assert set(t.condition) == {'mine', 'theirs'} and set(t.rule) == {'youden'}
    for model, file in (('mine', a), ('theirs', b)):
        preds = load_predictions(file)
        assert (choose_thresholds(preds).threshold - t[t.condition == model].threshold.dropna().to_numpy()).abs().max() < 1e-9
    ref = paired_metrics(load_predictions(a), load_predictions(b), n_boot=200)
    assert (c.difference - ref.difference).abs().max() < 1e-12 and (c.p_holm - ref.p_holm).abs().max() < 1e-12
    names = {f.relative_to(out).as_posix() for f in out.rglob('*')}
    assert {f'paper/{n}.{e}' for n in ('performance', 'groups', 'gaps', 'calibration', 'comparison') for e in ('csv', 'md', 'tex')} <= names
    assert {'figures/roc.png', 'figures/calibration.png', 'figures/utility.png', 'figures/subgroups.png', 'record.json', 'methods.txt', 'report.html'} <= names
    assert {'data', 'evaluate', 'against'} == set(json.loads((out/'record.json').read_text())) and 'split at random' not in (out/'methods.txt').read_text()
    assert json.loads((out/'summary.json').read_text())['mine.auroc']['value'] == pytest.approx(t.query("condition == 'mine' and label == 'macro'").auroc.item())
    ids = set(load_predictions(a).df.patient_id)
    for name, data in content(out).items(): assert not [i for i in ids if i.encode() in data], name


@pytest.mark.parametrize('change,words', [
    (lambda d: d.iloc[8:], 'image ids of split'), (lambda d: d.assign(image_id='x'+d.image_id), 'only one of the two tables'), (lambda d: d.assign(y_mass=1-d.y_mass), 'labels of'),
    (lambda d: d.assign(patient_id='q'+d.patient_id), 'patients of'), (lambda d: d.drop(columns=['y_mass', 'score_mass']), 'targets differ'),
    (lambda d: d.drop(columns='patient_id'), 'patient_id'), (lambda d: d.drop(columns='score_mass'), 'score_mass'), (lambda d: d[d.split != 'valid'], "no rows with split 'valid'"),
    (lambda d: d[d.split != 'test'], "no rows with split 'test'"), (lambda d: pd.concat([d, d]), 'occur twice')])
def test_evaluate_one_clear_error(tool, tmp_path, capsys, change, words):
    "Files that do not match: one line, and no folder left behind"
    a, b = tool('mine'), tool('theirs', change, noise_seed=2)
    with pytest.raises(SystemExit) as e: cli.medprivacy_evaluate(predictions=a, against=b, out=str(tmp_path/'out'), n_boot=10)
    err = capsys.readouterr().err
    assert e.value.code == 2 and re.fullmatch(r'error: [^\n]*\n', err) and words in err and not (tmp_path/'out').exists()


def test_evaluate_several_models(tool, tmp_path, capsys):
    "One file with two models: each judged; --model chooses; the same file may be compared with itself"
    one = pd.concat([fake_predictions(200, model=m, noise_seed=i).df for i, m in enumerate('ab')]); file = str(tmp_path/'both.csv'); one.to_csv(file, index=False)
    cli.medprivacy_evaluate(predictions=file, out=str(tmp_path/'all'), n_boot=10)
    assert set(pd.read_csv(tmp_path/'all'/'tables'/'utility.csv').condition) == {'a', 'b'} and not (tmp_path/'all'/'tables'/'comparison.csv').exists()
    cli.medprivacy_evaluate(predictions=file, model='a', against=file, against_model='b', out=str(tmp_path/'pair'), n_boot=10, threshold='0.5', unit='image')
    c = pd.read_csv(tmp_path/'pair'/'tables'/'comparison.csv'); assert set(c.model) == {'a'} and set(c.against) == {'b'} and set(c.unit) == {'image'}
    assert 'The threshold 0.5 was given' in (tmp_path/'pair'/'methods.txt').read_text()
    for kw, words in ((dict(model='z'), "no model 'z'"), (dict(against=file), 'choose one'), (dict(unit='eye'), '--unit'), (dict(n_boot=0), '--n_boot'), (dict(threshold='best'), 'threshold rule')):
        with pytest.raises(SystemExit): cli.medprivacy_evaluate(predictions=file, out=str(tmp_path/'no'), **kw)
        assert words in capsys.readouterr().err and not (tmp_path/'no').exists()


def test_evaluate_says_what_is_weak(tool, tmp_path, capsys):
    "Logits, nobody's sex or age, patients of the test set among the validation rows: judged, with notes"
    file = tool('logits', lambda d: d.assign(score_mass=d.score_mass*9-3, split=['valid', 'test']*(len(d)//2)).drop(columns=['sex', 'age']))
    cli.medprivacy_evaluate(predictions=file, out=str(tmp_path/'out'), n_boot=10); said = capsys.readouterr().out
    assert 'no probabilities' in said and 'both validation and test' in said and 'no probabilities' in (tmp_path/'out'/'report.html').read_text()
    assert not (tmp_path/'out'/'tables'/'gaps.csv').exists() and not (tmp_path/'out'/'tables'/'calibration.csv').exists()


def test_preset_lists_the_systems(capsys):
    "Without a name: one line each, nothing written"
    cli.medprivacy_preset(name=None)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 6 and all(re.fullmatch(r'[a-z_]+  +\S.*', l) for l in lines) and any(l.startswith('chest_viewmaker ') for l in lines)


def test_preset_runs_on_a_table(table, tmp_path, capsys):
    "A small run on a CSV, with a changed setting; a second call on the finished folder goes through, other settings are named"
    kw = dict(out=str(tmp_path/'run'), csv=str(table), folder='images', ext='.png', labels='effusion', small=True, device='cpu')
    (tmp_path/'my.toml').write_text('seed = 3\n')
    with pytest.raises(SystemExit): cli.medprivacy_preset(name='simclr_expert', **{**kw, 'csv': 'gone.csv'})
    assert 'gone.csv' in capsys.readouterr().err and not (tmp_path/'run').exists()
    cli.medprivacy_preset(name='simclr_expert', config=str(tmp_path/'my.toml'), **kw)
    assert (tmp_path/'run'/'report.html').exists() and tomllib.loads((tmp_path/'run'/'config.toml').read_text())['seed'] == 3
    cli.medprivacy_preset(name='simclr_expert', config=str(tmp_path/'my.toml'), resume=True, **kw); capsys.readouterr()
    for more, words in ((dict(config=str(tmp_path/'my.toml')), 'exists already'), (dict(resume=True, seed=4), 'seed')):
        with pytest.raises(SystemExit): cli.medprivacy_preset(name='simclr_expert', **more, **kw)
        assert words in capsys.readouterr().err


def test_nothing_half_written(table, tmp_path, capsys):
    "An error that only the split shows (no age at all) leaves no folder; a set without patients cannot promise them privacy"
    df = pd.read_csv(table); df['age'] = None; df.to_csv(table, index=False)
    kw = dict(csv=str(table), folder='images', ext='.png', labels='effusion', device='cpu', out=str(tmp_path/'run'))
    with pytest.raises(SystemExit): cli.medprivacy_obfuscate(attribute='age>median', epochs=1, **kw)
    assert 'age' in capsys.readouterr().err and not (tmp_path/'run').exists()
    with pytest.raises(SystemExit): cli.medprivacy_train(patient='', **kw)
    assert '--unit image' in capsys.readouterr().err and not (tmp_path/'run').exists()


def test_folders_that_cannot_be_gone_on_with(tmp_path, capsys):
    "No config.toml, a damaged one, a run of another command"
    for text, words in ((None, 'no config.toml'), ('seed = ', 'cannot be read'), ('[data]\nphantom = false\nname = "x"\n', 'names no images')):
        d = tmp_path/words.replace(' ', '_'); d.mkdir(); (d/'mine.txt').write_text('kept')
        if text is not None: (d/'config.toml').write_text(text)
        with pytest.raises(SystemExit) as e: cli.medprivacy_attack(out=str(d), resume=True, device='cpu')
        err = capsys.readouterr().err
        assert e.value.code == 2 and words in err and re.fullmatch(r'error: [^\n]*\n', err) and {f.name for f in d.iterdir()} <= {'mine.txt', 'config.toml'}
