"Images and targets as they reach a network: shapes, ranges, unknown values, files that cannot be read"
import numpy as np, pandas as pd, pytest, torch
from PIL import Image

from medprivacy.core import ConfigError, DataError
from medprivacy.data.core import Records
from medprivacy.data.load import load_image, load_images, median_age, records_dls, release_draws, target_values
from medprivacy.data.phantom import tiny_records
from medprivacy.data.split import split_patients

K = 6


@pytest.fixture(scope='module')
def recs(tmp_path_factory): return tiny_records(12, root=tmp_path_factory.mktemp('load')/'p', attack=.5)


@pytest.fixture
def loose(tmp_path):
    "Six patients with one image each, two in every split, that a test may spoil"
    for k in range(K): Image.fromarray(np.full((9, 9), 40*k, np.uint8)).save(tmp_path/f'i{k}.png')
    df = pd.DataFrame(dict(image_id=[f'i{k}' for k in range(K)], path=[f'i{k}.png' for k in range(K)], patient_id=[f'p{k}' for k in range(K)],
                           sex=list('FMFMFM'), age=[20., 40, 60, 80, 100, 110], split=['train']*2+['valid']*2+['test']*2, y=[0., 1, 0, 1, 0, 1]))
    return Records(df, tmp_path, ['y'], name='loose')


TARGETS = [('labels', torch.float32, (3,)), ('sex', torch.int64, ()), ('age', torch.float32, ()), ('age>median', torch.int64, ()),
           ('effusion', torch.float32, (1,)), (['opacity', 'effusion'], torch.float32, (2,))]


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('target,dtype,shape', TARGETS, ids=[str(t[0]) for t in TARGETS])
def test_batches(recs, target, dtype, shape, channels):
    "x is float32 in [0,1] of the asked shape; each kind of target has its own type"
    dls = records_dls(recs, target, (24, 32), 4, channels=channels, device='cpu')
    for dl in dls.loaders:
        for x, y in dl:
            assert x.dtype == torch.float32 and x.shape[1:] == (channels, 24, 32) and 0 <= x.min() and x.max() <= 1 and x.max() > .5
            assert y.dtype == dtype and y.shape[1:] == shape and len(x) == len(y)
    if channels == 3: assert torch.equal(x[:, 0], x[:, 2])
    assert len(dls.train_patients) == len(dls.train.dataset)


def test_several_targets(recs):
    x, sex, y = records_dls(recs, ('sex', 'labels'), 16, 4, device='cpu').one_batch()
    assert x.shape == (4, 1, 16, 16) and sex.shape == (4,) and y.shape == (4, 3)


@pytest.mark.parametrize('resize', ['crop', 'pad', 'squash'])
@pytest.mark.parametrize('hw', [(7, 31), (31, 7), (16, 16)])
def test_resize(tmp_path, resize, hw):
    Image.new('RGB', (20, 10), (250, 5, 5)).save(tmp_path/'a.png')
    a = load_image(tmp_path/'a.png', hw, resize=resize)
    assert a.shape == (3, *hw) and a.dtype == np.uint8 and a[0].max() == 250


def test_fetch(recs):
    "Rows by number, in order, with repeats; none at all gives empty tensors"
    dl = records_dls(recs, ('sex', 'labels'), 16, 4, device='cpu').train
    whole = dl.fetch(range(len(dl.dataset))); some = dl.fetch([3, 0, 3]); none = dl.fetch([])
    for w, s in zip(whole, some): assert torch.equal(s, w[[3, 0, 3]])
    assert [tuple(t.shape) for t in none] == [(0, 1, 16, 16), (0,), (0, 3)] and none[0].dtype == torch.float32


@pytest.mark.parametrize('target,column', [('sex', 'sex'), ('age', 'age'), ('age>median', 'age'), ('y', 'y')])
def test_unknown_targets_are_dropped(loose, capsys, target, column):
    "With a printed count; nothing is made up for them"
    df = loose.df.astype({column: object}); df.loc[[0, 5], column] = None
    if column != 'sex': df[column] = df[column].astype(float)
    dls = records_dls(loose._with(df), target, 8, 1, device='cpu')
    assert [len(d.dataset) for d in dls.loaders] == [1, 2, 1] and 'dropped 2 of 6' in capsys.readouterr().out


def test_partly_known_labels_stay(loose):
    "A row with one known label of two is kept, with NaN for the loss to mask"
    df = loose.df.assign(z=[np.nan]*5+[1.]); r = Records(df, loose.root, ['y', 'z'])
    y = records_dls(r, 'labels', 8, 2, device='cpu').train.dataset.ys[0]
    assert len(y) == 2 and y[:, 1].isnan().all() and not y[:, 0].isnan().any()


def spoil(path, how):
    "Turn a good file into one that must be refused"
    if how == 'zero bytes': path.write_bytes(b'')
    if how == 'text': path.write_text('no image')
    if how == 'truncated':
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)).save(path); path.write_bytes(path.read_bytes()[:900])
    if how == '16 bit': Image.fromarray(np.arange(81, dtype=np.uint16).reshape(9, 9)*500).save(path)
    if how == 'float': Image.fromarray(np.ones((9, 9), np.float32)).save(path, format='TIFF')
    if how == 'CMYK': Image.new('CMYK', (9, 9)).save(path, format='JPEG')
    if how == 'animated': Image.new('L', (9, 9), 0).save(path, format='PNG', save_all=True, append_images=[Image.new('L', (9, 9), 200)])
    if how == 'absent': path.unlink()


@pytest.mark.parametrize('how', ['zero bytes', 'text', 'truncated', '16 bit', 'float', 'CMYK', 'animated', 'absent'])
@pytest.mark.parametrize('row', [0, 5])
def test_files_that_are_refused(loose, how, row):
    "The error names the file, whichever split it is in, before there are loaders"
    spoil(loose.root/f'i{row}.png', how)
    with pytest.raises(DataError, match=f'i{row}.png') as e: records_dls(loose, 'sex', 8, 1, device='cpu')
    assert len(str(e.value)) < 500


@pytest.mark.parametrize('cached', [False, True])
def test_quarantine(loose, tmp_path, capsys, cached):
    "Broken rows are left out with a count and listed with the reason; the others are as they were"
    kw = dict(device='cpu', cache=tmp_path/'cache' if cached else None)
    clean = records_dls(loose, 'sex', 8, 1, **kw)
    spoil(loose.root/'i0.png', 'zero bytes'); spoil(loose.root/'i3.png', 'CMYK')
    for _ in range(2):
        dls = records_dls(loose, 'sex', 8, 1, unreadable='quarantine', quarantine=tmp_path/'run'/'unreadable.csv', **kw)
        assert '2 of 6 images cannot be read and are left out' in capsys.readouterr().out
        assert [len(l.dataset) for l in dls.loaders] == [1, 1, 2] and dls.train_patients.tolist() == ['p1']
        for a, b, i in zip(dls.loaders, clean.loaders, ([1], [0], [0, 1])):
            assert all(torch.equal(u, v) for u, v in zip(a.fetch(range(len(i))), b.fetch(i)))
        t = pd.read_csv(tmp_path/'run'/'unreadable.csv')
        assert list(t) == ['image_id', 'path', 'reason'] and t.image_id.tolist() == ['i0', 'i3'] and t.reason.str.len().gt(10).all()
        assert [f.name for f in (tmp_path/'run').iterdir()] == ['unreadable.csv']


def test_nothing_to_quarantine(loose, tmp_path, capsys):
    "An empty list says that all was read"
    records_dls(loose, 'sex', 8, 1, device='cpu', unreadable='quarantine', quarantine=tmp_path/'q.csv')
    assert len(pd.read_csv(tmp_path/'q.csv')) == 0 and 'left out' not in capsys.readouterr().out


def test_too_many_to_quarantine(loose, tmp_path):
    "More than half is a fault of the folder, not of files; a split may not be emptied either"
    kw = dict(unreadable='quarantine', quarantine=tmp_path/'q.csv', device='cpu')
    for k in (0, 1): spoil(loose.root/f'i{k}.png', 'zero bytes')
    with pytest.raises(DataError, match="'train' is empty"): records_dls(loose, 'sex', 8, 1, **kw)
    for k in (3, 4): spoil(loose.root/f'i{k}.png', 'text')
    with pytest.raises(DataError, match='4 of 6 images cannot be read, more than half'): records_dls(loose, 'sex', 8, 1, **kw)
    assert len(pd.read_csv(tmp_path/'q.csv')) == 4
    for k in (2, 5): spoil(loose.root/f'i{k}.png', 'absent')
    with pytest.raises(DataError, match='none of the first 6 of 6 images can be read'): records_dls(loose, 'sex', 8, 1, **kw)


@pytest.mark.parametrize('how,match', [(dict(unreadable='drop'), "'raise' or 'quarantine'"), (dict(unreadable='quarantine'), 'needs quarantine='),
                                       (dict(bits=12), 'bits'), (dict(bits=16), '8 bits')])
def test_bad_policy(loose, how, match):
    with pytest.raises((ConfigError, DataError), match=match): records_dls(loose, 'sex', 8, 1, device='cpu', **how)


@pytest.mark.parametrize('policy', ['raise', 'quarantine'])
@pytest.mark.parametrize('path', ['../other.png', '{root}/i1.png', '{out}', 'a/../../other.png'])
def test_nothing_outside_the_root_is_opened(loose, tmp_path_factory, monkeypatch, path, policy):
    "Not even under quarantine: such a table is wrong"
    import builtins
    out = tmp_path_factory.mktemp('out')/'other.png'; Image.new('L', (9, 9)).save(out)
    df = loose.df.copy(); df.loc[2, 'path'] = path.format(root=loose.root, out=out)
    kw = dict(unreadable=policy, quarantine=out.parent/'q.csv') if policy == 'quarantine' else {}
    monkeypatch.setattr(builtins, 'open', None)
    with pytest.raises(DataError, match='leave the root'): records_dls(loose._with(df), 'sex', 8, 1, device='cpu', **kw)


def test_a_link_that_leaves_the_root(loose, tmp_path_factory):
    out = tmp_path_factory.mktemp('out')/'other.png'; Image.new('L', (9, 9)).save(out)
    (loose.root/'i2.png').unlink(); (loose.root/'i2.png').symlink_to(out)
    with pytest.raises(DataError, match='1 of 6 images.*\n.*outside'): load_images(loose, 8)


def test_values(recs):
    "float32 of each byte over 255, in any number of pieces, contiguous or with channels innermost"
    plain = records_dls(recs, 'sex', (21, 33), 4, channels=3, device='cpu')
    last  = records_dls(recs, 'sex', (21, 33), 4, channels=3, device='cpu', channels_last=True)
    for a, b in zip(plain.loaders, last.loaders):
        i = list(range(len(a.dataset)))*9; x, y = a.fetch(i)[0], b.fetch(i)[0]
        assert torch.equal(x, a.dataset.x[torch.tensor(i)].float()/255) and x.is_contiguous()
        assert torch.equal(x, y) and y.is_contiguous(memory_format=torch.channels_last)


def test_images_that_repeat_are_decoded_once(loose, tmp_path):
    "Several rows of one image (two eyes in one file, a row for each reader) share its pixels"
    df = pd.concat([loose.df, loose.df.assign(image_id=lambda t: t.image_id+'b')], ignore_index=True)
    for cache in (None, tmp_path/'c'):
        dls = records_dls(loose._with(df), 'sex', 8, 2, device='cpu', cache=cache)
        assert len(dls.train.dataset) == 4 and len(dls.train.dataset.store) == 6
        x = dls.train.fetch([0, 1, 2, 3])[0]; assert torch.equal(x[:2], x[2:]) and not torch.equal(x[0], x[1])


def test_all_bad_files_are_counted(loose):
    for k in (1, 3, 4): spoil(loose.root/f'i{k}.png', 'zero bytes')
    with pytest.raises(DataError, match='3 of 6 images'): load_images(loose, 8)


def test_jpeg_cut_short(tmp_path):
    "A JPEG that ends early would decode to a grey rest"
    f = tmp_path/'a.jpg'; Image.fromarray(np.random.default_rng(0).integers(0, 255, (128, 128), np.uint8)).save(f)
    f.write_bytes(f.read_bytes()[:3000])
    with pytest.raises(DataError, match='a.jpg'): load_image(f, 16)


@pytest.mark.parametrize('mode', ['L', 'LA', 'P', 'RGB', 'RGBA', '1'])
def test_modes_that_are_read(tmp_path, mode):
    Image.new('L', (9, 9), 255).convert(mode).save(tmp_path/'a.png')
    for c in (1, 3): assert load_image(tmp_path/'a.png', 4, c).shape == (c, 4, 4)
    assert (load_image(tmp_path/'a.png', 4, 1) == 255).all()


@pytest.mark.parametrize('how', [dict(resize='stretch'), dict(channels=2), dict(size=0)])
def test_bad_settings(loose, how):
    with pytest.raises(ConfigError): load_images(loose, **{'size': 8, **how})


@pytest.mark.parametrize('bs', [0, -1, 2.5])
def test_bad_batch(loose, bs):
    with pytest.raises(ConfigError, match='bs'): records_dls(loose, 'sex', 8, bs, device='cpu')


def test_no_split(loose):
    with pytest.raises(DataError, match='split_patients'): records_dls(loose._with(loose.df.assign(split=None)), 'sex', 8, device='cpu')


@pytest.mark.parametrize('gone', ['train', 'valid'])
def test_empty_split(loose, gone):
    with pytest.raises(DataError, match=f"'{gone}' is empty"): records_dls(loose.select(where=loose.df.split != gone), 'sex', 8, 1, device='cpu')


def test_median_of_training_patients(loose):
    "Ages of validation and test patients, and how often a patient was imaged, do not move the median"
    assert median_age(loose) == 30
    df = pd.concat([loose.df, loose.df.iloc[[0]*5]], ignore_index=True)
    assert median_age(loose._with(df)) == 30
    df = loose.df.assign(age=[20., 40, 1, 1, 1, 1]); assert median_age(loose._with(df)) == 30
    assert target_values(loose, 'age>median')[:, 0].tolist() == [0, 1, 1, 1, 1, 1]
    assert records_dls(loose, 'age>median', 8, 1, device='cpu').median_age == 30
    with pytest.raises(DataError, match='no training patient has an age'): median_age(loose._with(loose.df.assign(age=np.nan)))


class Count:
    "A mechanism that writes the number of the call into the image"
    n = 0
    def __call__(self, x, cond=None, generator=None):
        self.n += 1; self.cond = cond
        return torch.full_like(x, self.n/100)


def test_draws(loose):
    "Training shows any of the releases, validation always the first; each is made once"
    m = Count(); dls = records_dls(loose, 'sex', 8, 2, mechanism=m, draws=5, device='cpu')
    assert m.n == 15 and dls.train.dataset.x.shape == (2, 5, 1, 8, 8) and set(m.cond.tolist()) == {0., 1.}
    torch.manual_seed(0); seen = {round(float(v)*100) for _ in range(40) for v in dls.train.fetch([0, 1])[0].mean((1, 2, 3))}
    assert seen == {1, 2, 3, 4, 5} and {round(float(v)*100) for v in dls.valid.fetch([0, 1])[0].mean((1, 2, 3))} == {6}
    with pytest.raises(ConfigError, match='draws'): release_draws(torch.zeros(1, 1, 4, 4, dtype=torch.uint8), m, torch.zeros(1), 0)


def test_too_many_draws():
    with pytest.raises(ConfigError, match='fewer draws'): release_draws(torch.zeros(64, 1, 64, 64, dtype=torch.uint8), Count(), torch.zeros(64), 10**6)


def test_training_order_follows_the_seed(recs):
    def order(seed):
        torch.manual_seed(seed); import random; random.seed(seed)
        return [b[0].mean((1, 2, 3)).tolist() for b in records_dls(recs, 'sex', 16, 4, device='cpu').train]
    assert order(1) == order(1) != order(2)


def test_select_then_load(recs):
    "Loaders see one part only"
    for part in ('defence', 'attack'):
        r = split_patients(recs, (.4, .3, .3), stratify='sex', attack=.5).select(part=part)
        assert set(records_dls(r, 'sex', 16, 2, device='cpu').train_patients) <= set(r.df.patient_id)
