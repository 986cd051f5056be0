"Every known data set, by name: look-alike → records → split → loaders → one training step; and from the command line"
import inspect
import re
import tomllib
import pandas as pd
import pytest
import torch
from fastai.learner import Learner
from medprivacy import cli
from medprivacy.core import ConfigError, DataError
from medprivacy.data.chexpert import CHEXPERT_COMPETITION, soft
from medprivacy.data.load import records_dls
from medprivacy.data.registry import FAKES, READERS, read_dataset, readers_table
from medprivacy.data.split import complete_split
from medprivacy.models.resnet import create_classifier
from medprivacy.objectives.focal import MaskedBCE


SOFT = dict(labels=list(CHEXPERT_COMPETITION), uncertain=soft(.55, .85), blank='ignore')
STEPS = [pytest.param(n, {}, {}, id=n) for n in READERS] + [
    pytest.param('odir', dict(form='kaggle'), {}, id='odir-kaggle'), pytest.param('chexpert', {}, SOFT, id='chexpert-soft'),
    pytest.param('chexpert', {}, SOFT | dict(uncertain='ignore'), id='chexpert-masked'),
    pytest.param('mimic_cxr', {}, dict(labels=['Edema', 'Fracture'], uncertain='ignore'), id='mimic_cxr-masked')]

@pytest.mark.parametrize('name,fake,options', STEPS)
def test_from_look_alike_to_training_step(name, fake, options, tmp_path):
    "Photographs of several sizes, 16-bit and DICOM films, soft and unknown labels: from the tree to a step of training"
    recs = complete_split(read_dataset(name, FAKES[name](tmp_path/name, n_patients=30, **fake), missing='drop', **options))
    assert recs.name == name and set(recs.df.split) == {'train', 'valid', 'test'}
    if options: assert recs.df[list(recs.labels)].isna().any(axis=None)
    dls = records_dls(recs, size=32, bs=4, device='cpu')
    x, y = dls.one_batch()
    channels = 3 if readers_table().set_index('name').images[name] == 'fundus' else 1
    assert x.shape == (4, channels, 32, 32) and x.dtype == torch.float32 and 0 <= x.min() < x.max() <= 1
    assert y.shape == (4, len(recs.labels))
    learn = Learner(dls, create_classifier('small_resnet', len(recs.labels), channels), loss_func=MaskedBCE())
    before = [p.detach().clone() for p in learn.model.parameters()]
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert torch.isfinite(torch.tensor(learn.recorder.losses)).all()
    assert any(not torch.equal(a, b) for a, b in zip(before, learn.model.parameters()))


@pytest.mark.parametrize('name', READERS)
def test_readers_have_one_shape(name):
    p = inspect.signature(READERS[name]).parameters
    assert list(p)[:2] == ['root', 'labels'] and p['labels'].default is None and p['missing'].default in ('raise', 'drop')
    assert all(v.kind is v.KEYWORD_ONLY for k, v in p.items() if k not in ('root', 'labels'))
    assert list(inspect.signature(FAKES[name]).parameters)[:3] == ['root', 'n_patients', 'seed']


@pytest.mark.parametrize('name', READERS)
def test_no_folder_says_where_to_apply(name, tmp_path):
    with pytest.raises(DataError, match='Access: .{20,}'): read_dataset(name, tmp_path/'none')
    (tmp_path/'empty').mkdir()
    with pytest.raises(DataError): read_dataset(name, tmp_path/'empty')


@pytest.mark.parametrize('name', READERS)
def test_a_label_that_does_not_exist(name, tmp_path):
    with pytest.raises((ConfigError, DataError), match='no_such_finding'):
        read_dataset(name, FAKES[name](tmp_path/name), ['no_such_finding'], missing='drop')


def test_command(tmp_path, capsys):
    "A run on a known set, with an option of its reader and an unreadable image put aside"
    root = FAKES['nih_cxr14'](tmp_path/'nih', n_patients=60)
    bad = next(p for p in sorted(root.rglob('*.png')))
    bad.write_bytes(bad.read_bytes()[:40])
    args = dict(dataset='nih_cxr14', root=str(root), options='missing=drop', labels='Effusion,Infiltration', device='cpu', size=32, bs=8, epochs=1)
    with pytest.raises(SystemExit): cli.medprivacy_obfuscate(out=str(tmp_path/'no'), **args)
    assert re.search(re.escape(bad.stem), capsys.readouterr().err) and not (tmp_path/'no').exists()
    cli.medprivacy_obfuscate(out=str(tmp_path/'run'), unreadable='quarantine', cache=str(tmp_path/'cache'), **args)
    listed = pd.read_csv(tmp_path/'run'/'quarantine.csv')
    assert listed.path.str.contains(bad.stem).tolist() == [True] and listed.reason.notna().all()
    cfg = tomllib.loads((tmp_path/'run'/'config.toml').read_text())['data']
    assert cfg['dataset'] == 'nih_cxr14' and cfg['options'] == {'missing': 'drop'} and cfg['labels'] == ['Effusion', 'Infiltration']
    assert (tmp_path/'run'/'model').exists() and any((tmp_path/'cache').iterdir())


@pytest.mark.parametrize('args,words', [(dict(dataset='imagenet', root='x'), 'unknown data set'), (dict(dataset='odir'), '--root'),
                                        (dict(dataset='odir', root='x', csv='t.csv'), 'exclude'), (dict(dataset='odir', root='x', options='a'), 'name=value'),
                                        (dict(dataset='odir', root='x', options='uncertain=ones'), 'takes no option'), (dict(dataset='odir', root='x', unreadable='skip'), '--unreadable')])
def test_arguments_that_cannot_work(args, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit): cli.medprivacy_attack(device='cpu', **args)
    assert words in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_table(): assert list(readers_table().name) == list(READERS)


def test_command_on_a_set_without_patient_numbers(tmp_path, capsys):
    "Nothing is said of patients where none are known, and none can be the unit of privacy"
    root, out = FAKES['vindr_cxr'](tmp_path/'vindr', n_patients=60), tmp_path/'run'
    small = dict(out=str(out), device='cpu', size=32, bs=8)
    cli.medprivacy_attack(dataset='vindr_cxr', root=str(root), options='missing=drop', epochs=1, utility_epochs=1, archs='small_resnet', draws=1, n_boot=20, **small)
    said = (out/'methods.txt').read_text()
    assert '(patients unknown)' in said and 'resamples of images' in said and not re.search(r'\d patients', said)
    assert pd.read_csv(out/'tables'/'demographics.csv').n_patients.isna().all() and pd.read_csv(out/'tables'/'attack.csv').unit.eq('image').all()
    with pytest.raises(SystemExit): cli.medprivacy_train(resume=True, epochs=1, private_epochs=1, private_bs=4, n_boot=20, **small)
    assert '--unit image' in capsys.readouterr().err
    cli.medprivacy_train(resume=True, epochs=1, private_epochs=1, private_bs=4, n_boot=20, unit='image', overwrite=False, **small)
    cli.medprivacy_report(run=str(out))
    assert 'unit of privacy: one image' in (out/'methods.txt').read_text()
