"Real images: a sample of ChestX-ray14 through the reader and through `read_table`, a second set through `read_table`; each into loaders and one step"
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.learner import Learner

from medprivacy.core import DataError
from medprivacy.data.chexpert import carve_valid
from medprivacy.data.core import read_table
from medprivacy.data.load import records_dls
from medprivacy.data.nih_cxr14 import NIH_FINDINGS, read_nih_cxr14
from medprivacy.data.split import check_disjoint, split_patients
from medprivacy.models.resnet import create_classifier
from medprivacy.objectives.focal import MaskedBCE

pytestmark = pytest.mark.real
LABELS = [f.lower() for f in NIH_FINDINGS]


def one_step(records, labels, n=48):
    "Loaders of a few images of every split, and one optimiser step; the loss must be finite and the weights must move"
    few = records.select(where=records.df.groupby('split').cumcount() < n)
    dls = records_dls(few, size=32, bs=8, device='cpu')
    x, y = dls.one_batch()
    assert x.shape[1:] == (1, 32, 32) and x.dtype == torch.float32 and 0 <= x.min() and .3 < x.max() <= 1 and x.std() > .02
    assert y.shape == (8, len(labels))
    learn = Learner(dls, create_classifier('small_resnet', len(labels), in_channels=1), loss_func=MaskedBCE())
    before = [p.detach().clone() for p in learn.model.parameters()]
    learn.create_opt(); loss = learn.loss_func(learn.model(x), y); loss.backward(); learn.opt.step()
    assert torch.isfinite(loss) and any(not torch.equal(a, b) for a,b in zip(before, learn.model.parameters()))


@pytest.fixture(scope='module')
def sample(real_data): return real_data('nih-sample')

@pytest.fixture(scope='module')
def small(sample): return pd.read_csv(sample/'labels.csv', dtype={'finding': str})

@pytest.fixture(scope='module')
def look(sample, small, tmp_path_factory):
    "A folder as the release has it: the table of 2017 with its columns, both lists, images by link (the reader only looks whether they are there)"
    root, patient = tmp_path_factory.mktemp('nih'), small.patient_id.str.extract(r'nih(\d+)')[0].astype(int)
    pd.DataFrame({'Image Index': small.image_id, 'Finding Labels': small.finding, 'Follow-up #': small.followup, 'Patient ID': patient,
                  'Patient Age': small.age.astype(int), 'Patient Gender': small.sex, 'View Position': small['view'],
                  'OriginalImage[Width': 2048, 'Height]': 2048, 'OriginalImagePixelSpacing[x': .143, 'y]': .143}
                 ).to_csv(root/'Data_Entry_2017.csv', index=False)
    (root/'images').symlink_to((sample/'images').resolve(), target_is_directory=True)
    test = patient % 5 == 0
    for name, mine in (('train_val', ~test), ('test', test)): (root/f'{name}_list.txt').write_text('\n'.join(small.image_id[mine]))
    return root


def test_sample_in_the_columns_of_the_release(look, sample, small, capsys):
    "Every row, with the sex, age, view and findings that the sample's own table gives"
    r = read_nih_cxr14(look)
    df = r.df.set_index('image_id').loc[small.image_id]
    assert len(r) == len(small) == 790 and r.df.patient_id.nunique() == small.patient_id.nunique()
    assert df.sex.tolist() == small.sex.tolist() and df['view'].tolist() == small['view'].tolist()
    np.testing.assert_array_equal(df.age, small.age)
    np.testing.assert_array_equal(df[list(NIH_FINDINGS)].to_numpy(), small[LABELS].to_numpy())
    assert 'WARNING' in capsys.readouterr().out    # it is a sample, and the reader says so
    check_disjoint(r)
    one_step(replace(r, root=sample), NIH_FINDINGS)    # loaders open nothing through a link that leaves the root


def test_sample_with_a_missing_image(look, small, tmp_path):
    "A folder of links in which one is absent: refused, or left out with a count"
    for f in ('Data_Entry_2017.csv', 'train_val_list.txt', 'test_list.txt'): (tmp_path/f).write_text((look/f).read_text())
    (tmp_path/'images').mkdir()
    for f in small.image_id[1:]: (tmp_path/'images'/f).symlink_to((look/'images'/f).resolve())
    with pytest.raises(DataError, match='1 of 790'): read_nih_cxr14(tmp_path)
    assert len(read_nih_cxr14(tmp_path, missing='drop')) == 789


def test_sample_through_read_table(sample, look):
    "The sample's own table gives the same images, sexes and labels as the reader"
    r = read_table(sample/'labels.csv', sample, LABELS, folder='images', extra={'view': 'view'}, name='sample')
    other = read_nih_cxr14(look).df.set_index('image_id').loc[r.df.image_id]
    assert r.df.sex.tolist() == other.sex.tolist()
    np.testing.assert_array_equal(r.df[LABELS].to_numpy(), other[list(NIH_FINDINGS)].to_numpy())
    r = split_patients(r); check_disjoint(r); one_step(r, LABELS)


def test_official_part_is_divided_by_patient(look):
    r = read_nih_cxr14(look, valid=0)
    assert set(r.df.split) == {'train', 'test'}
    assert carve_valid(r, .1).df.split.tolist() == read_nih_cxr14(look, valid=.1).df.split.tolist()


def test_second_set_through_read_table(real_data):
    "Radiographs of many publishers: JPEG, three views, ages and sexes with gaps"
    root = real_data('covid-cxr')
    r = read_table(root/'labels.csv', root, ['covid'], folder='images', extra={'view': 'view'}, name='covid')
    assert len(r) == 345 and r.df.patient_id.nunique() == 207 and r.df.sex.value_counts().to_dict() == {'M': 211, 'F': 134}
    assert r.df.age.isna().sum() == 10 and int(r.df.covid.sum()) == 264
    r = split_patients(r); check_disjoint(r); one_step(r, ['covid'])
