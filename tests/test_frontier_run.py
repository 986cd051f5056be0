"medprivacy_frontier: the plan is told first, a killed sweep ends in the same tables, what cannot be run or judged is said before work starts"
import json, os, re, signal, subprocess, sys, time, tomllib

import pandas as pd, pytest
from fastcore.script import anno_parser

from medprivacy import frontier, frontier_cli, frontier_run, sweep as sweep_module
from medprivacy.core import open_run
from medprivacy.data.core import load_predictions
from medprivacy.data.phantom import make_phantom, tiny_records
from medprivacy.frontier import STRENGTHS, Effort
from medprivacy.frontier_cli import medprivacy_frontier
from medprivacy.report import report
from medprivacy.sweep import Sweep, measure_point, plan_table, plan_text

CHEAP  = Effort(1, 1, 1, 32, 16, 1, 'cpu', ('small_resnet',))
SETS   = {'nih-sample': ('sex', 'abnormal,hernia'), 'odir-fundus': ('age>median', 'normal,cataract,glaucoma')}
TABLES = ('frontier', 'matched', 'against', 'control', 'camera', 'ranking', 'frontier_groups', 'findings')


@pytest.fixture
def cheap(monkeypatch):
    "One epoch of everything; nothing is measured"
    monkeypatch.setattr(frontier_cli, 'sweep_effort', lambda *a, **k: CHEAP)
    monkeypatch.setattr(sweep_module, 'measure_point', lambda r, a, names, e, **k: {m: 60. for m in names})


@pytest.fixture(scope='module')
def table(tmp_path_factory):
    "Sixty patients as a CSV with a folder of images, and a finding that only one image has"
    d = tmp_path_factory.mktemp('set'); make_phantom(d/'set', n_patients=60, size=32)
    df = pd.read_csv(d/'set'/'labels.csv').assign(hernia=0); df.loc[0, 'hernia'] = 1; df['patient_id'] = 'clinic-' + df.patient_id
    df.to_csv(d/'set'/'labels.csv', index=False)
    return d/'set'/'labels.csv'


def args(table, **more):
    return dict(csv=str(table), folder='images', ext='.png', labels='effusion,cardiomegaly,hernia', mechanisms='blur,noise', strengths='blur=.1,noise=.3',
                more_seeds='none', most_loss=1., min_cases=2, size=32, bs=16, n_boot=20, device='cpu') | more


def tables(out): return {n: (out/'tables'/f'{n}.csv').read_bytes() for n in TABLES}


def stop_at(monkeypatch, n):
    "The n-th attack is broken off"
    calls, panel = [], frontier.attack_panel
    def attack(*a, **k):
        calls.append(1)
        if len(calls) == n: raise KeyboardInterrupt
        return panel(*a, **k)
    monkeypatch.setattr(frontier, 'attack_panel', attack); monkeypatch.setattr(frontier_run, 'attack_panel', attack)


def test_a_killed_sweep_ends_in_the_same_tables(table, tmp_path, cheap, monkeypatch, capsys):
    "Broken off in its third point, then in the control; the plan counts what is stored; nothing of a patient outside predictions/"
    medprivacy_frontier(out=str(tmp_path/'a'), **args(table)); said = capsys.readouterr().out
    assert said.index('points, 0 of them stored') < said.index('▸ raw-0-0') and 'left out (fewer than 2 images with or without): hernia' in said
    for n, stored in ((3, 0), (2, 2)):
        with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
            stop_at(m, n); medprivacy_frontier(out=str(tmp_path/'b'), resume=stored > 0, **args(table))
        assert f'{stored} of them stored' in capsys.readouterr().out
    assert not (tmp_path/'b'/'frontier.html').exists()
    medprivacy_frontier(out=str(tmp_path/'b'), resume=True, mechanisms='blur,noise', strengths='blur=.1,noise=.3', more_seeds='none', most_loss=1.,
                        min_cases=2, size=32, bs=16, n_boot=20, device='cpu')
    assert tables(tmp_path/'a') == tables(tmp_path/'b')
    html = (tmp_path/'b'/'frontier.html').read_text()
    assert 'too rare to be judged here: hernia' in html and 'data:image/png' in html and not re.search(r'(src|href)="(?!data:|#)', html)
    for f in (tmp_path/'b').rglob('*'):
        if f.is_file() and 'predictions' not in f.parts: assert b'clinic-' not in f.read_bytes(), f.name
    cfg = tomllib.loads((tmp_path/'b'/'config.toml').read_text())
    assert cfg['data']['fracs'] == [.5, .2, .3] and cfg['frontier']['findings'] == ['effusion', 'cardiomegaly'] and cfg['frontier_plan']['strengths'] == {'blur': [.1], 'noise': [.3]}
    said = open_run(tmp_path/'b').summary
    assert {'raw.sex.leakage', 'blur.sex.leakage', 'blur.disease.auroc', 'control.sex.auroc', 'camera.sex.auroc'} <= set(said)
    with pytest.raises(SystemExit): medprivacy_frontier(out=str(tmp_path/'b'), resume=True, **args(table, min_cases=1, labels='effusion'))
    assert 'other data' in capsys.readouterr().err


def test_other_settings_are_refused_more_mechanisms_are_not(table, tmp_path, cheap, monkeypatch, capsys):
    out, one = str(tmp_path/'r'), dict(mechanisms='blur', strengths='blur=.1', more_seeds='none')
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt): stop_at(m, 2); medprivacy_frontier(out=out, **args(table, **one))
    for more, words in ((dict(), 'exists already'), (dict(resume=True, overwrite=True), 'choose one'), (dict(resume=True, fracs='.6,.2,.2'), 'fracs'),
                        (dict(resume=True, attribute='age>median'), "is about 'sex'")):
        with pytest.raises(SystemExit): medprivacy_frontier(out=out, **args(table, **one, **more))
        assert words in capsys.readouterr().err
    monkeypatch.setattr(frontier_cli, 'sweep_effort', lambda *a, **k: Effort(1, 2, 1, 32, 16, 1, 'cpu', ('small_resnet',)))
    for plan in (False, True):
        with pytest.raises(SystemExit): medprivacy_frontier(out=out, resume=True, plan=plan, **args(table, **one))
        assert 'attack_epochs: 1 then, 2 now' in capsys.readouterr().err
    monkeypatch.setattr(frontier_cli, 'sweep_effort', lambda *a, **k: CHEAP)
    medprivacy_frontier(out=out, resume=True, plan=True, **args(table)); said = capsys.readouterr().out
    assert '1 of them stored' in said and 'noise' in said and not (tmp_path/'r'/'frontier.html').exists()
    assert tomllib.loads((tmp_path/'r'/'config.toml').read_text())['frontier_plan']['mechanisms'] == ['blur']       # a look changes nothing


def test_a_finding_that_is_hidden_is_not_one_to_be_kept(table, tmp_path, cheap):
    medprivacy_frontier(out=str(tmp_path/'r'), **args(table, attribute='effusion', mechanisms='blur', strengths='blur=.1', more_seeds='none'))
    points = tmp_path/'r'/'predictions'/'frontier'/'points'
    assert load_predictions(points/'blur-0.1-0-disease.parquet').labels == ('cardiomegaly',)
    assert load_predictions(points/'blur-0.1-0-attack.parquet').labels == ('effusion',) and 'raw.effusion.leakage' in open_run(tmp_path/'r').summary


def test_plan_says_how_long_and_how_to_shorten(table, tmp_path, cheap, monkeypatch, capsys):
    monkeypatch.setattr(sweep_module, 'measure_point', lambda r, a, names, e, **k: {m: 900. for m in names})
    medprivacy_frontier(out=str(tmp_path/'r'), plan=True, **args(table, mechanisms=None, strengths=None, more_seeds='1,2'))
    said = capsys.readouterr().out
    points = 1 + sum(map(len, STRENGTHS.values())) + 2*(1 + 3 + 1) + 1     # further seeds: raw, the best three, the published game
    assert f'{points} points, 0 of them stored; about {points/4:.1f} hours' in said and 'warning: that is more than 6 hours' in said
    for o in ('--more_seeds none', '--mechanisms', '--strengths', '--size', '--effort small'): assert o in said.split('warning')[1]
    assert not (tmp_path/'r').exists() and all(m in said for m in STRENGTHS)


def test_time_grows_with_epochs_and_images(monkeypatch):
    "An epoch of 1 s and 2 s of all else, on a quarter of the images"
    recs = tiny_records(n=96, size=32)
    piece = recs.select(where=recs.df.groupby('split').cumcount().to_numpy() % 4 == 0)
    monkeypatch.setattr(sweep_module, '_piece', lambda *a: piece); monkeypatch.setattr(sweep_module, '_two', lambda work: (1., 2.))
    share = len(recs.select(split='train'))/len(piece.select(split='train')), len(recs)/len(piece)
    assert measure_point(recs, 'sex', ('raw',), CHEAP)['raw'] == pytest.approx(2*(share[0] + 2*share[1]))
    assert measure_point(recs, 'sex', ('raw',), Effort(1, 5, 1, 32, 16, 1, 'cpu'))['raw'] == pytest.approx(6*share[0] + 4*share[1])


def test_the_published_game_always_gets_further_seeds(tmp_path, monkeypatch):
    ran, rank = [], pd.DataFrame(dict(mechanism=['blur', 'flow', 'noise', 'published'], strength=1., cheap=True, leakage=.5, loss=0.))
    monkeypatch.setattr(frontier_run, 'run_frontier', lambda run, recs, a, plan, e, seconds: ran.append(plan))
    monkeypatch.setattr(frontier_run, 'rank_mechanisms', lambda *a: rank); monkeypatch.setattr(frontier_run, 'shuffled_control', lambda *a: None)
    sweep = Sweep(('noise', 'published', 'flow', 'blur'), best=2)
    frontier_run.run_sweep(open_run(tmp_path/'r', {'a': 1}), None, 'sweep', sweep, CHEAP)
    assert {p.seed for p in ran[0]} == {0} and {p.mechanism for p in ran[1] if p.seed} == {'raw', 'blur', 'flow', 'published'}
    assert {p.strength for p in ran[1] if p.seed and p.mechanism != 'raw'} == {1.} and len(ran[1]) == len(ran[0]) + 8      # the chosen strength alone
    plan = plan_table(open_run(tmp_path/'r'), sweep, dict.fromkeys(('raw', *sweep.mechanisms), 60.))
    assert plan.points.sum() == len(ran[1]) + 1 and f'{len(ran[1])+1} minutes' in plan_text(plan)


@pytest.mark.parametrize('kw,words', [
    (dict(mechanisms='magic'), "got 'magic'"), (dict(mechanisms=''), '--mechanisms'), (dict(strengths='blur=7', mechanisms='blur'), '--strengths'),
    (dict(strengths='noise=.1', mechanisms='blur'), 'not among'), (dict(strengths='published=2'), 'at most 1'), (dict(strengths='blur'), '--strengths'),
    (dict(seeds='a'), '--seeds'), (dict(seeds='0,1'), '--more_seeds'), (dict(effort='huge'), '--effort'), (dict(most_loss=2.), '--most_loss'), (dict(min_cases=0), '--min_cases'),
    (dict(fracs='.5,.5'), '--fracs'), (dict(attack_share=1.), '--attack_share'), (dict(size=4), '--size'), (dict(device='tpu9'), 'tpu9'), (dict(csv='gone.csv'), '--labels'),
    (dict(resume=True), 'no run folder'), (dict(n_patients=12, attack_share=.01, size=32), "part 'attack'"), (dict(n_patients=12, attack_share=.99, size=32), "part 'defence'"),
    (dict(n_patients=12, size=32, attribute='race', mechanisms='blur'), '--attribute'), (dict(attribute='effusion', mechanisms='bottleneck'), 'learns to hide'),
    (dict(n_patients=30, size=32, min_cases=1000), '--min_cases')])
def test_errors_before_work_starts(kw, words, tmp_path, capsys, monkeypatch):
    "One line, and no folder left behind"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e: medprivacy_frontier(**{'device': 'cpu', 'out': 'run', **kw})
    out, err = capsys.readouterr()
    assert e.value.code == 2 and re.fullmatch(r'error: [^\n]*\n', err) and words in err and not list(tmp_path.iterdir()) and 'measuring' not in out


def test_help():
    "Every option has a description"
    text = anno_parser(medprivacy_frontier.__wrapped__, 'medprivacy_frontier').format_help()
    options = set(re.findall(r'^  (?:-\w, )?(--\w+)', text, re.M)) - {'--help'}
    shown = dict(re.findall(r'^  (?:-\w, )?(--\w+)(?: [A-Z_]+)?\s+(\S.*)$', text, re.M))
    assert {'--out', '--attribute', '--plan', '--resume', '--csv', '--dataset', '--more_seeds'} <= options
    assert {o for o in options if len(shown.get(o, '').split('(default')[0].strip()) < 5} == set()


@pytest.mark.slow
def test_killed_in_a_process(table, tmp_path):
    "By the system, while it works; its folder goes on"
    code = 'import sys; sys.argv[0] = "medprivacy_frontier"; from medprivacy.frontier_cli import medprivacy_frontier; medprivacy_frontier()'
    opts = [str(v) for k, o in args(table, effort='small', mechanisms='published,blur', strengths='published=.1,blur=.1').items() for v in (f'--{k}', o)]
    env  = {**os.environ, 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'Agg', 'PYTHONWARNINGS': 'ignore:`torch.jit.script` is deprecated:FutureWarning'}
    def start(*more): return subprocess.Popen([sys.executable, '-c', code, *opts, *more], cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    one = start('--out', 'a'); assert one.wait(900) == 0, one.stdout.read()
    two = start('--out', 'b')
    while not (tmp_path/'b'/'predictions'/'frontier'/'points'/'published-0.1-0.json').exists() and two.poll() is None: time.sleep(.05)
    two.send_signal(signal.SIGKILL); assert two.wait(60) == -signal.SIGKILL
    done = start('--out', 'b', '--resume'); said = done.communicate(timeout=900)[0]
    assert done.returncode == 0 and '2 of them stored' in said and 'measuring' not in said, said
    assert tables(tmp_path/'a') == tables(tmp_path/'b')
    assert report(tmp_path/'b').stat().st_size > 10_000       # the general report takes such a folder, too


@pytest.mark.real
@pytest.mark.parametrize('name', SETS)
def test_real_images(real_data, tmp_path, cheap, capsys, name):
    "A few patients of a real set: what is too rare is named, controls and page are made, and the page shows nobody"
    folder = real_data(name); attribute, labels = SETS[name]
    df = pd.read_csv(folder/'labels.csv', dtype=str).groupby('patient_id').head(2)
    df[df.patient_id.isin(df.patient_id.unique()[:90])].to_csv(tmp_path/'few.csv', index=False)
    medprivacy_frontier(out=str(tmp_path/'r'), csv=str(tmp_path/'few.csv'), root=str(folder), folder='images', labels=labels, attribute=attribute, mechanisms='pixelate',
                        strengths='pixelate=.1', more_seeds='none', most_loss=1., min_cases=3, size=32, bs=16, n_boot=20, device='cpu')
    said, rare = capsys.readouterr().out, {'nih-sample': 'hernia', 'odir-fundus': 'glaucoma'}[name]
    html = (tmp_path/'r'/'frontier.html').read_text()
    assert rare in said.split('left out')[1].split('\n')[0] and f'judged here: ' in html and rare in html and 'no pictures shown' in html and html.count('<img') == 1
    s = json.loads((tmp_path/'r'/'summary.json').read_text()); assert {f'raw.{attribute}.leakage', f'camera.{attribute}.auroc'} <= set(s)
    for f in (tmp_path/'r').rglob('*'):
        if f.is_file() and 'predictions' not in f.parts: assert not [i for i in df.patient_id.unique() if re.search(rf'\b{i}\b'.encode(), f.read_bytes())], f.name
