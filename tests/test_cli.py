"The commands as a user runs them: in a process of their own, from a table or phantoms to a report"
import json, os, re, subprocess, sys, tomllib
from pathlib import Path

import pandas as pd, pytest
from fastcore.script import anno_parser
from PIL import Image

from medprivacy import cli
from medprivacy.data.phantom import make_phantom

COMMANDS = ['demo', 'obfuscate', 'attack', 'train', 'evaluate', 'report']
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
    if command in ('demo', 'obfuscate', 'attack', 'train'): assert {'--seed', '--device', '--out', '--overwrite'} <= usage


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
    ('report', dict(run='gone'), 'gone'), ('demo', dict(device='tpu9'), 'tpu9'), ('demo', dict(modality='mri'), '--modality'),
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
