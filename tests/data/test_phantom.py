"Phantoms: knobs do what they say and nothing else, tables and files are as promised, cues are coarse and not in the histogram"
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from medprivacy.core import ConfigError, DataError, MedPrivacyError
from medprivacy.data.phantom import FINDINGS, draw_phantom, make_phantom, read_phantom, tiny_dls, tiny_records

MODALITIES = list(FINDINGS)
both = pytest.mark.parametrize('modality', MODALITIES)
pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning')


def opened(path):
    with Image.open(path) as im: return im.format, im.mode, np.asarray(im)

def pixels(records): return np.stack([opened(records.root/p)[-1] for p in records.df.path])

@pytest.fixture(scope='module', params=MODALITIES)
def crowd(request, tmp_path_factory):
    "Records and pixels of 360 patients with one image each"
    recs = make_phantom(tmp_path_factory.mktemp('crowd'), request.param, 360, 1, size=64, seed=3)
    return recs, pixels(recs)


# ---------------------------------------------------------------- knobs

CHANGES = dict(sex=('M', 'F'), age=(22., 88.), device=('A', 'C'))

@both
@pytest.mark.parametrize('factor', CHANGES)
@pytest.mark.parametrize('patient', [0, 7])
def test_a_knob_at_zero_leaves_no_trace(modality, factor, patient):
    one, two = ({factor: v} for v in CHANGES[factor])
    off, half = ({factor: s} for s in (0, .5))
    draw = lambda s, ch: draw_phantom(patient, 1, modality, size=48, strength=s, **ch)
    assert (draw(off, one)==draw(off, two)).all()
    assert (draw(half, one)!=draw(half, two)).any()
    assert (draw({}, one)!=draw({}, two)).mean() > .2       # at full strength most of the picture changes


@both
def test_findings_at_zero_leave_no_trace(modality):
    well = draw_phantom(2, modality=modality, findings={})
    for f in FINDINGS[modality]:
        assert (draw_phantom(2, modality=modality, findings={f: .8})!=well).any()
        assert (draw_phantom(2, modality=modality, findings={f: .8}, strength={'disease': 0})==well).all()


@both
def test_severity_is_graded(modality):
    well = draw_phantom(4, modality=modality, findings={}, size=96).astype(float)
    for f in FINDINGS[modality]:
        d = [np.abs(draw_phantom(4, modality=modality, findings={f: v}, size=96)-well).mean() for v in (.3, .6, 1.)]
        assert d[0]>0 and d[2]>d[0], f'{f}: {d}'


@both
def test_identity(modality, tmp_path):
    "Two images of a patient are alike; without the knob they are as far apart as two patients"
    def gap(strength):
        recs = make_phantom(tmp_path/str(strength), modality, 24, 4, size=48, seed=5, labels=FINDINGS[modality][:1],
                            strength=dict(identity=strength, disease=0, sex=0, age=0, device=0))
        x = pixels(recs).astype(float)
        x = x.mean(-1) if x.ndim==4 else x
        if modality=='fundus': x[1::2] = x[1::2, :, ::-1]          # left eyes are mirrored
        x = x.reshape(24, 4, -1)
        x = (x-x.mean((0, 1)))/x.std((0, 1)).clip(1)               # away from the mean picture: what distinguishes patients
        r = np.corrcoef(x.reshape(96, -1)).reshape(24, 4, 24, 4).transpose(0, 2, 1, 3)
        same = r[np.arange(24), np.arange(24)][:, ~np.eye(4, dtype=bool)].mean()
        return same-r[~np.eye(24, dtype=bool)].mean()
    with_id, without = gap(1), gap(0)
    assert with_id > .08 and with_id > 3*abs(without), (with_id, without)      # pose alone moves a patient's own pixels a good deal
    assert abs(without) < .05


# ---------------------------------------------------------------- draws

@both
def test_same_seed_same_files(modality, tmp_path):
    a, b, c = (make_phantom(tmp_path/n, modality, 4, 2, size=32, seed=s) for n,s in (('a', 1), ('b', 1), ('c', 2)))
    for p in a.df.path: assert (a.root/p).read_bytes()==(b.root/p).read_bytes()
    assert a.df.drop(columns='path').equals(b.df.drop(columns='path'))
    assert (pixels(a)!=pixels(c)).any(axis=tuple(range(1, pixels(a).ndim))).all()


@both
def test_patients_stay_when_the_set_grows(modality, tmp_path):
    small, large = make_phantom(tmp_path/'s', modality, 3, 1, size=32), make_phantom(tmp_path/'l', modality, 6, 3, size=32)
    for i,p in zip(small.df.image_id, small.df.path): assert (small.root/p).read_bytes()==(large.root/large.df.set_index('image_id').path[i]).read_bytes()
    cols = ['sex', 'age', 'device', *small.labels]
    assert small.df[cols].equals(large.df[large.df.image_id.isin(small.df.image_id)][cols].reset_index(drop=True))


@both
def test_a_choice_of_labels_changes_only_the_findings(modality, tmp_path):
    keep = FINDINGS[modality][1]
    recs = make_phantom(tmp_path/'one', modality, 12, 1, size=32, labels=[keep])
    full = make_phantom(tmp_path/'all', modality, 12, 1, size=32)
    assert recs.labels==(keep,) and set(FINDINGS[modality])-{keep}-set(recs.df.columns)==set(FINDINGS[modality])-{keep}
    assert recs.df[[keep, 'sex', 'age']].equals(full.df[[keep, 'sex', 'age']])
    alone = full.df[[l for l in full.labels if l!=keep]].sum(axis=1)==0
    assert alone.any() and (pixels(recs)[alone]==pixels(full)[alone]).all()


# ---------------------------------------------------------------- table and files

@both
@pytest.mark.parametrize('size', [32, 96])
def test_files(modality, size, tmp_path):
    recs = make_phantom(tmp_path/'p', modality, 3, 3, size=size)
    assert len(recs)==9 and recs.df.patient_id.nunique()==3 and recs.patient_known
    assert sorted(f.name for f in (tmp_path/'p').iterdir())==['images', 'labels.csv']
    for p in recs.df.path:
        kind, mode, im = opened(recs.root/p)
        assert (kind, mode, im.shape[:2], im.dtype)==('PNG', 'L' if modality=='cxr' else 'RGB', (size, size), np.uint8)
    assert recs.validate() is recs and recs.df.split.isna().all()
    assert (recs.df.groupby('patient_id')[['sex', 'age', 'device', *recs.labels]].nunique()==1).all().all()
    assert recs.df.age.between(20, 90).all() and set(recs.df.device)<=set('ABC') and recs.labels==FINDINGS[modality]
    if modality=='fundus': assert recs.df.laterality.tolist()[:3]==['R', 'L', 'R']
    else: assert set(recs.df['view'])=={'PA'}
    assert read_phantom(tmp_path/'p').df.equals(recs.df)


def test_marginals(crowd):
    df, labels = crowd[0].df, crowd[0].labels
    assert abs((df.sex=='F').mean()-.5) < .1 and df.device.value_counts(normalize=True).between(.23, .44).all()
    for l in labels: assert .33 < df[l].mean() < .51
    code = df[[*labels, 'age']].assign(sex=df.sex=='F', device=df.device.map('ABC'.index)).astype(float).corr().to_numpy()
    assert np.abs(code[~np.eye(len(code), dtype=bool)]).max() < .18        # 15 pairs, SE .053: 3.4 SE


def test_pictures_are_neither_flat_nor_clipped(crowd):
    x = crowd[1]
    flat = x.reshape(len(x), -1)
    assert (flat.std(1) > 15).all() and ((flat==255).mean(1) < .15).all()


@pytest.mark.parametrize('pair, r', [(('sex', 'disease'), .3), (('sex', 'age'), -.6), (('age', 'effusion'), .5), (('device', 'sex'), .7),
                                     (('effusion', 'opacity'), -.4), (('device', 'age'), .8)])
def test_requested_correlation(pair, r):
    from medprivacy.data.phantom import _patient, _plan
    plan = _plan(corr={pair: r})
    who  = [_patient(plan, k) for k in range(900)]
    df   = pd.DataFrame([{**{l: v>0 for l,v in w['findings'].items()}, 'sex': w['sex']=='F', 'age': w['age'], 'device': 'ABC'.index(w['device'])}
                         for w in who]).astype(float)
    labels = list(FINDINGS['cxr'])
    ends = [labels if p=='disease' else [p] for p in pair]
    for a in ends[0]:
        for b in ends[1]: assert abs(df[a].corr(df[b])-r) < .11              # SE about (1-r²)/√900 = .033
    touched = {frozenset((a, b)) for a in ends[0] for b in ends[1]}
    for i,a in enumerate(df):
        for b in list(df)[i+1:]:
            if frozenset((a, b)) not in touched: assert abs(df[a].corr(df[b])) < .12, (a, b)


# ---------------------------------------------------------------- errors

@pytest.mark.parametrize('kw, says', [
    (dict(modality='mri'), 'modality'), (dict(strength={'gender': 1}), 'gender'), (dict(strength={'sex': -1}), 'sex'), (dict(strength={'age': 9}), '[0,2]'),
    (dict(labels=['mass']), 'mass'), (dict(labels=[]), 'choose'), (dict(labels=['opacity', 'opacity']), 'once'), (dict(corr={('sex', 'height'): .2}), 'height'),
    (dict(corr={('sex', 'sex'): .2}), 'sex'), (dict(corr={'sex': .2}), 'pair'), (dict(corr={('sex', 'age'): 1.2}), '1.2'),
    (dict(corr={('sex', 'disease'): .7}), 'at once'), (dict(corr={('sex', 'age'): .99}), 'at most'), (dict(n_patients=0), 'n_patients=0'),
    (dict(images_per_patient=0), 'images_per_patient'), (dict(size=8), 'size=8'), (dict(seed=-1), 'seed')])
def test_wrong_settings(tmp_path, kw, says):
    with pytest.raises(ConfigError) as e: make_phantom(tmp_path/'p', **{'n_patients': 2, 'size': 32, **kw})
    assert says in str(e.value) and not (tmp_path/'p').exists()


def test_folders_are_not_overwritten(tmp_path):
    make_phantom(tmp_path/'p', n_patients=1, size=32)
    with pytest.raises(DataError, match='exists'): make_phantom(tmp_path/'p', n_patients=1, size=32)
    (tmp_path/'file').write_text('x')
    with pytest.raises(DataError, match='exists'): make_phantom(tmp_path/'file', n_patients=1, size=32)
    (tmp_path/'empty').mkdir()
    assert len(make_phantom(tmp_path/'empty', n_patients=1, size=32))==2
    with pytest.raises(DataError, match='labels.csv'): read_phantom(tmp_path)


# ---------------------------------------------------------------- small sets

@both
@pytest.mark.parametrize('n', [3, 4, 24])
def test_tiny_records(modality, n):
    recs = tiny_records(n, modality)
    assert len(recs)==2*n and set(recs.df.split)=={'train', 'valid', 'test'}
    assert recs.df.groupby('patient_id').split.nunique().max()==1
    assert sum(f.stat().st_size for f in recs.root.rglob('*') if f.is_file()) < 1e6


def test_tiny_dls(tmp_path):
    dls = tiny_dls(n=6, size=32, bs=4, target=('sex', 'labels'), modality='fundus')
    x, sex, y = dls.train.one_batch()
    assert x.shape==(4, 3, 32, 32) and sex.shape==(4,) and y.shape==(4, 3) and 0<=x.min() and x.max()<=1
    recs = tiny_records(30, root=tmp_path/'r', attack=.5)
    assert set(recs.df.part)=={'defence', 'attack'}
    with pytest.raises(MedPrivacyError, match='at least 3'): tiny_records(2)


# ---------------------------------------------------------------- what can be read from the pictures

def histograms(x, bins):
    x = x[..., None] if x.ndim==3 else x
    return np.sqrt(np.stack([np.concatenate([np.histogram(i[..., c], bins, (0, 256))[0] for c in range(i.shape[-1])]) for i in x]))

@pytest.mark.parametrize('bins', [32, 64])
def test_histogram_tells_little(crowd, bins):
    "SE of an AUROC with 60+60 test images is about .05; .75 is the limit and .5 what we aim for, so .68 leaves no doubt"
    recs, x = crowd
    h, fit = histograms(x, bins), np.arange(360)<240
    for name,y in dict(sex=(recs.df.sex=='F').to_numpy(), age=(recs.df.age>55).to_numpy()).items():
        for m in (make_pipeline(StandardScaler(), LogisticRegression(C=.1, max_iter=500)), HistGradientBoostingClassifier(max_iter=40)):
            a = roc_auc_score(y[~fit], m.fit(h[fit], y[fit]).predict_proba(h[~fit])[:, 1])
            assert max(a, 1-a) < .68, f'{name}: a histogram attacker reaches {a:.2f}'


def test_shape_tells_sex_even_to_a_linear_model(crowd):
    "240 images and a linear model on a coarse 16 x 16 picture: far above the histogram, so the cue is large and spatial"
    recs, x = crowd
    g = (x.mean(-1) if x.ndim==4 else x).astype(float)
    if recs.name.endswith('fundus'): g[(recs.df.laterality=='L').to_numpy()] = g[(recs.df.laterality=='L').to_numpy(), :, ::-1]
    g = g.reshape(360, 16, 4, 16, 4).mean((2, 4)).reshape(360, -1)
    y, fit = (recs.df.sex=='F').to_numpy(), np.arange(360)<240
    m = make_pipeline(StandardScaler(), LogisticRegression(C=.003, max_iter=1000)).fit(g[fit], y[fit])
    assert roc_auc_score(y[~fit], m.decision_function(g[~fit])) > .75


def small_net(channels, n_out):
    from torch import nn
    layers = []
    for i,o in ((channels, 16), (16, 32), (32, 64), (64, 64)): layers += [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(.2), nn.Linear(256, n_out))

def cnn_aurocs(x, y, n_train, epochs=10, bs=32, seed=0):
    "AUROC per column of y on the rows after `n_train` of a small network trained on the rows before"
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits as bce
    torch.manual_seed(seed)
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    net  = small_net(x.shape[1], y.shape[1])
    opt  = torch.optim.AdamW(net.parameters(), weight_decay=1e-2)
    sch  = torch.optim.lr_scheduler.OneCycleLR(opt, 4e-3, total_steps=epochs*(n_train//bs))
    for _ in range(epochs):
        for i in torch.randperm(n_train)[:n_train//bs*bs].view(-1, bs):
            opt.zero_grad(); bce(net(x[i]), y[i]).backward(); opt.step(); sch.step()
    net.eval()
    with torch.no_grad(): s = net(x[n_train:])
    return [roc_auc_score(y[n_train:, k], s[:, k]) for k in range(y.shape[1])]


@pytest.mark.slow
@both
def test_small_network(modality, tmp_path):
    "1,000 images of 500 patients train it, 600 fresh patients test it (SE of an AUROC of .9: about .013)"
    recs = make_phantom(tmp_path/'p', modality, 800, 2, size=64, seed=11)
    x = pixels(recs); x = (x[..., None] if x.ndim==3 else x).transpose(0, 3, 1, 2).astype(np.float32)/255
    df = recs.df
    y = np.stack([df.sex=='F', df.age>55, *(df[l]==1 for l in recs.labels)], 1).astype(np.float32)
    sex, age, *disease = cnn_aurocs(x, y, 1000)
    assert sex >= .96 and age >= .85 and .85 <= np.mean(disease) <= .99, (sex, age, disease)
    noise = np.random.default_rng(0).normal(0, .25, x.shape).astype(np.float32)
    loud  = np.clip(x+noise, 0, 1)
    assert .1 < np.abs(loud-x).mean() < .25
    assert cnn_aurocs(loud, y[:, :1], 1000)[0] >= .85, 'noise must not hide sex'


@pytest.mark.slow
@both
def test_unplanted_sex_cannot_be_read(modality, tmp_path):
    recs = make_phantom(tmp_path/'p', modality, 600, 1, size=32, seed=12, strength={'sex': 0})
    x = pixels(recs); x = (x[..., None] if x.ndim==3 else x).transpose(0, 3, 1, 2).astype(np.float32)/255
    y = (recs.df.sex=='F').to_numpy(np.float32)[:, None]
    a, = cnn_aurocs(x, y, 300, epochs=6)
    assert abs(a-.5) < .1                       # 300 test images: 3 SE = .10
