"The whole chain on a few real films and photographs; skipped where they are absent"
import base64, json, re

import pandas as pd, pytest

from medprivacy.core import open_run
from medprivacy.report import report
from medprivacy.study import attack_stage, obfuscate_stage, picture_stage, study_records, train_stage, utility_stage

pytestmark = pytest.mark.real
SETS = {'nih-sample': ('sex', ['effusion', 'cardiomegaly']), 'odir-fundus': ('age>median', ['cataract', 'myopia'])}


def few(folder, labels, n=60):
    "At most two images of `n` patients, those with a finding first in turn with others"
    df = pd.read_csv(folder/'labels.csv', dtype=str).groupby('patient_id').head(2)
    sick = df.groupby('patient_id')[labels].max().astype(float).max(axis=1) > 0
    ids = [*sick.index[sick][:n//2], *sick.index[~sick]][:n]
    return df[df.patient_id.isin(ids)]


@pytest.mark.parametrize('name', SETS)
def test_chain(real_data, tmp_path, name):
    "Obfuscate, attack, classify with and without privacy, report; the report shows no patient"
    folder = real_data(name); attribute, labels = SETS[name]
    few(folder, labels).to_csv(tmp_path/'few.csv', index=False)
    data = dict(phantom=False, csv=str(tmp_path/'few.csv'), root=str(folder), labels=labels, folder='images', size=32, seed=0, name=name)
    run, how = open_run(tmp_path/'run', dict(data=data, attribute=attribute)), dict(size=32, bs=16, epochs=1, seed=0, device='cpu')
    recs = study_records(run); obf = obfuscate_stage(run, recs, dict(how, archs=('small_resnet',), attacker_steps=1))
    picture_stage(run, recs, obf, 32)
    table = attack_stage(run, recs, obf, ('small_resnet',), dict(how, draws=1), n_boot=20)
    utility_stage(run, recs, obf, settings=dict(how, draws=1), n_boot=20)
    train_stage(run, recs, size=32, bs=16, private_bs=16, epochs=1, private_epochs=1, device='cpu', n_boot=20)
    assert set(table.condition) == {'raw', 'obfuscated', 'noise', 'shuffled'} and table.leakage.between(.5, 1).all()
    s = json.loads((run.path/'summary.json').read_text())
    assert {f'{c}.{attribute}.leakage' for c in ('raw', 'obfuscated', 'noise')} | {'raw.disease.auroc', 'private.epsilon'} <= set(s)
    html = report(run).read_text(); pictures = (run.path/'figures'/'views.png').read_bytes()
    assert base64.b64encode(pictures).decode()[:400] not in html and 'no pictures shown' in html and re.search('data:image/png;base64', html)
    for f in run.path.rglob('*'):
        if f.is_file() and 'predictions' not in f.parts: assert not [i for i in recs.df.patient_id.unique() if i.encode() in f.read_bytes()], f.name
