"Cohorts: tables that add up, draws of whole patients that stay, joins that refuse, files that come back, names of splits"
import json
import os
import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st

from medprivacy.core import ConfigError, DataError, LeakageError
from medprivacy.data.clean import AGE_BANDS, AGE_EDGES, age_band
from medprivacy.data.cohort import (cap_images, cohort_table, count_people, images_per_patient, join_predictions, load_records,
                                    save_records, split_hash, subsample_patients)
from medprivacy.data.core import Predictions, Records, make_predictions
from medprivacy.data.split import check_disjoint, split_patients


def cohort(n=120, seed=0, task='multilabel', **kw):
    "Records of patients with 1 to 6 images, unknown sexes, ages and labels, ages that grow from image to image"
    rng  = np.random.default_rng(seed)
    size = rng.integers(1, 7, n)
    who  = np.repeat(np.arange(n), size)
    sex, age = rng.choice(['F', 'M', None], n, p=[.45, .45, .1]), np.where(rng.random(n) < .1, np.nan, rng.uniform(18, 88, n))
    y    = rng.choice([0, 1, np.nan], (len(who), 2), p=[.6, .3, .1]) if task == 'multilabel' else rng.choice([0, 1, 2, np.nan], (len(who), 1))
    df   = pd.DataFrame(dict(image_id=[f'i{k}' for k in range(len(who))], patient_id=[f'p{i}' for i in who], sex=sex[who], age=age[who]+rng.integers(0, 4, len(who)),
                             device=rng.choice(['A', 'B', None], len(who))))
    labels = ['x', 'y'][:y.shape[1]]
    return split_patients(Records(df.assign(path=df.image_id + '.png', **{l: y[:,j] for j,l in enumerate(labels)}), '.', labels, task, 'toy', **kw))

def mixed(recs, seed=0): return replace(recs, df=recs.df.sample(frac=1, random_state=seed))
def people(recs): return set(recs.df.patient_id)


# ---------------------------------------------------------------- bands and tables

def test_bands_are_closed_on_the_left():
    for a,b,name in zip(AGE_EDGES, AGE_EDGES[1:], AGE_BANDS): assert age_band([a, min(b, 200)-1e-9]).tolist() == [name]*2
    got = age_band(pd.Series([np.nan, 30, 120], index=[5, 6, 7]))
    assert got.tolist() == [None, '[30,60)', '[80,inf)'] and got.index.tolist() == [5, 6, 7]

def test_one_binning_for_all():
    from medprivacy import fairness, visualize
    assert fairness.age_band is age_band and fairness.AGE_BANDS is visualize.AGE_BANDS is AGE_BANDS and fairness.AGE_EDGES is AGE_EDGES
    assert visualize.count_people is count_people

def test_table_against_a_loop():
    "Every cell counted again, row by row"
    r, t = cohort(), cohort_table(cohort())
    key  = [(s, x if isinstance(x, str) else 'unknown', b or 'unknown') for s,x,b in zip(r.df.split, r.df.sex, age_band(r.df.age))]
    assert set(zip(t.split, t.sex, t.age_band)) == set(key) and len(t) == 2*len(set(key))
    for row in t.itertuples():
        rows = r.df[[k == (row.split, row.sex, row.age_band) for k in key]]; v = rows[row.label].dropna()
        assert (row.images, row.patients) == (len(rows), rows.patient_id.nunique())
        assert (row.positives, row.negatives, row.unknown) == (int((v == 1).sum()), int((v == 0).sum()), len(rows)-len(v))
        np.testing.assert_allclose(row.prevalence, v.mean() if len(v) else np.nan)

def test_the_unknown_are_rows_and_come_last():
    t = cohort_table(cohort()).query("label == 'x'")
    assert list(t.split.unique()) == ['train', 'valid', 'test']
    for (s, x), rows in t.groupby(['split', 'sex'], sort=False): assert list(rows.age_band) == [b for b in (*AGE_BANDS, 'unknown') if b in set(rows.age_band)]
    assert {'unknown'} <= set(t.sex) and {'unknown'} <= set(t.age_band) and t.images.sum() == len(cohort())
    bare = cohort_table(replace(cohort(), df=cohort().df.assign(sex=None, age=np.nan, split=None)))
    assert bare.iloc[0, :3].tolist() == ['none', 'unknown', 'unknown'] and len(bare) == 2

def test_tables_by_other_columns_and_tasks():
    r = cohort()
    assert cohort_table(r, 'device').device.unique().tolist() == ['A', 'B', 'unknown'] and cohort_table(r, ()).columns[0] == 'group'
    m = cohort(task='multiclass'); t = cohort_table(m, ())
    assert t.label.tolist() == ['x=0', 'x=1', 'x=2'] and t.positives.sum() == m.df.x.notna().sum() and np.isclose(t.prevalence.sum(), 1)
    soft = replace(r, df=r.df.assign(x=r.df.x.replace(1, .7)), soft=True); one = cohort_table(soft, ()).iloc[0]
    assert one.positives == (r.df.x == 1).sum() and np.isclose(one.prevalence, .7*r.df.x.mean())
    nameless = replace(r, patient_known=False)
    assert cohort_table(nameless).patients.isna().all() and images_per_patient(nameless).dropna().index.tolist() == ['images']
    with pytest.raises(DataError, match='no such column'): cohort_table(r, ['split', 'ward'])
    assert cohort_table(mixed(r)).equals(cohort_table(r))

def test_people_are_counted_once():
    r = cohort(); t = count_people(r)
    assert t.n_patients.sum() == r.df.patient_id.nunique() < cohort_table(r).query("label == 'x'").patients.sum()
    assert t.n_images.sum() == len(r)
    half = r.df.assign(sex=r.df.sex.where(r.df.patient_id.duplicated()))       # known on later images only
    assert (count_people(half).query("sex == 'unknown'").n_patients.sum()
            == (r.df.groupby('patient_id').size() == 1).sum() + r.df[r.df.sex.isna()].groupby('patient_id').size().gt(1).sum())
    assert count_people(r.df.drop(columns='part')).part.unique().tolist() == ['all']
    visits = pd.DataFrame(dict(patient_id='p', split='test', sex=[None, 'F', 'F'], age=[61., np.nan, 59.]))    # the youngest known age, in any order
    assert count_people(visits).iloc[0, 1:].tolist() == ['test', 'F', '[30,60)', 1, 3]

def test_images_per_patient_of_a_published_table():
    "NIH ChestX-ray14: mean 3.64, median 1, p99 35, max 184; 17,503 of 30,805 patients have one image"
    xrv = find_spec('torchxrayvision')      # found, not imported: its import is slow
    if xrv is None: pytest.skip('the public NIH table comes with torchxrayvision (extra dev)')
    df  = pd.read_csv(Path(xrv.origin).parent/'data'/'Data_Entry_2017_v2020.csv.gz', usecols=['Image Index', 'Patient ID'])
    got = images_per_patient(Records(df.set_axis(['image_id', 'patient_id'], axis=1), '.', ['x']))
    assert (got.patients, got.images, got['median'], got['max']) == (30805, 112120, 1, 184)
    assert round(got['mean'], 2) == 3.64 and round(got.p99) == 35 and round(got.share_one*30805) == 17503


# ---------------------------------------------------------------- draws

@settings(max_examples=12, deadline=None, derandomize=True)
@given(n=st.integers(1, 40), seed=st.integers(0, 99), stratify=st.sampled_from([None, 'sex', ['sex', 'x']]))
def test_whole_patients(n, seed, stratify):
    r = cohort(40, seed); s = subsample_patients(r, n, seed=seed, stratify=stratify)
    assert len(people(s)) == n and s.df.image_id.tolist() == r.df.image_id[r.df.patient_id.isin(people(s))].tolist()
    assert people(subsample_patients(mixed(r), n, seed=seed, stratify=stratify)) == people(s)      # no order of rows matters

def test_a_share_is_stable_and_nested():
    r = cohort(300); some = r.select(where=r.df.patient_id.isin(sorted(people(r))[::2]))
    for f in (.1, .5, .9):
        assert people(subsample_patients(some, frac=f)) == people(subsample_patients(r, frac=f)) & people(some)
        assert people(subsample_patients(r, frac=f)) <= people(subsample_patients(r, frac=1.)) == people(r)
    assert people(subsample_patients(r, 20)) <= people(subsample_patients(r, 50)) != people(subsample_patients(r, 50, seed=1))

def test_a_sample_is_no_part_of_the_split():
    "The same seed salts split, parts and sample apart: over 20 seeds a third of 300 patients holds 70 % training patients, ± 4 standard errors"
    r = cohort(300); share = []
    for seed in range(20):
        s = subsample_patients(split_patients(r, seed=seed), 100, seed=seed)
        share.append([(s.df.groupby('patient_id').split.first() == 'train').mean(), (s.df.groupby('patient_id').part.first() == 'attack').mean()])
    assert abs(np.mean(share, 0)-[.7, .5]).max() < 4*(.25/2000)**.5

def test_strata_keep_their_share():
    r = cohort(200); first = lambda x: x.df.groupby('patient_id').sex.first().fillna('?').value_counts()
    for kw in (dict(n=50), dict(frac=.25)):
        got = first(subsample_patients(r, stratify='sex', **kw))
        assert ((got-first(r)/4).abs() <= 1).all()

@pytest.mark.parametrize('kw,error', [(dict(), ConfigError), (dict(n=3, frac=.5), ConfigError), (dict(n=0), ConfigError), (dict(n=.5), ConfigError),
                                      (dict(frac=0), ConfigError), (dict(frac=1.5), ConfigError), (dict(n=121), DataError), (dict(frac=1e-9), DataError)])
def test_sizes_that_cannot_be(kw, error):
    with pytest.raises(error): subsample_patients(cohort(), **kw)

@settings(max_examples=12, deadline=None, derandomize=True)
@given(k=st.integers(1, 7), seed=st.integers(0, 99))
def test_caps(k, seed):
    "At most k of each patient, everybody stays, a smaller cap is inside a larger one, other patients and the order of rows change nothing"
    r = cohort(30, seed); c = cap_images(r, k, seed=seed)
    n = r.df.groupby('patient_id').size()
    assert c.df.groupby('patient_id').size().equals(n.clip(upper=k))
    assert set(c.df.image_id) <= set(cap_images(r, k+1, seed=seed).df.image_id)
    few = r.select(where=r.df.patient_id.isin(['p3', 'p7']))
    assert set(cap_images(few, k, seed=seed).df.image_id) == set(c.df.image_id) & set(few.df.image_id)
    assert set(cap_images(mixed(r), k, seed=seed).df.image_id) == set(c.df.image_id)
    check_disjoint(c)

def test_a_cap_is_a_fair_choice():
    "Over 200 seeds each of six images is the one that stays in a sixth of the cases, ± 4 standard errors"
    r = Records(pd.DataFrame(dict(image_id=list('abcdef'), patient_id='p', path='x')), '.', ['x'])
    got = pd.Series([cap_images(r, 1, seed=s).df.image_id[0] for s in range(200)]).value_counts(normalize=True)
    assert len(got) == 6 and (got-1/6).abs().max() < 4*(5/36/200)**.5

def test_caps_that_cannot_be():
    for k in (0, -1, 1.5):
        with pytest.raises(ConfigError, match='at least 1'): cap_images(cohort(5), k)
    with pytest.raises(DataError, match='names no patients'): cap_images(replace(cohort(5), patient_known=False), 2)


# ---------------------------------------------------------------- joins

def scored(r, model='net', seed=0):
    s = np.random.default_rng(seed).random((len(r), len(r.labels)))
    return make_predictions(r, r.df[list(r.labels)], s, r.labels, model=model)

def test_scores_find_their_images():
    r = cohort(); test = r.select(split='test'); p = scored(test)
    j = join_predictions(mixed(r), replace(p, df=p.df.sample(frac=1, random_state=1)))
    got = j.df.set_index('image_id').score_x
    assert got.loc[p.df.image_id].tolist() == p.df.score_x.tolist() and got.notna().sum() == len(test) and len(j) == len(r)
    assert j.labels == r.labels and j.df.drop(columns=['score_x', 'score_y']).equals(mixed(r).df.reset_index(drop=True))
    j.validate(files=False)

def test_models_side_by_side():
    r = cohort(); a, b = scored(r, 'a'), scored(r, 'b', 1)
    both = Predictions(pd.concat([a.df, b.df]), r.labels)
    with pytest.raises(DataError, match=re.escape("['a', 'b']; choose")): join_predictions(r, both)
    with pytest.raises(DataError, match="no model 'c'"): join_predictions(r, both, model='c')
    j = join_predictions(join_predictions(r, both, model='a'), both, model='b', suffix='_b').df
    assert j.score_x.tolist() == a.df.score_x.tolist() and j.score_x_b.tolist() == b.df.score_x.tolist()
    with pytest.raises(DataError, match='give a suffix'): join_predictions(join_predictions(r, a), b)

@pytest.mark.parametrize('damage,error,said', [
    (lambda d: d.assign(image_id='z' + d.image_id), DataError, r'\d+ of \d+ scored images are not among the \d+ of toy.*text'),
    (lambda d: pd.concat([d, d[:3]]), DataError, '3 images are scored twice'), (lambda d: d.assign(patient_id='p0'), DataError, 'another patient_id'),
    (lambda d: d.assign(split='train'), LeakageError, 'another split'), (lambda d: d.assign(y_x=1-d.y_x), DataError, "label 'x' of")])
def test_what_does_not_match(damage, error, said):
    r = cohort(); p = scored(r.select(split='test'))
    with pytest.raises(error, match=said): join_predictions(r, replace(p, df=damage(p.df)))

def test_attributes_classes_and_soft_labels():
    r = cohort(); sex = make_predictions(r, r.df.sex.map({'F': 1., 'M': 0.}), np.full(len(r), .5), ['sex'], model='m')
    assert join_predictions(r, sex).df.score_sex.eq(.5).all()
    m = cohort(task='multiclass'); p = make_predictions(m, m.df.x, np.full((len(m), 3), 1/3), ['x'], model='m', task='multiclass')
    assert [c for c in join_predictions(m, p).df if c.startswith('score_')] == ['score_x_0', 'score_x_1', 'score_x_2']
    soft = replace(r, df=r.df.assign(x=r.df.x.replace(1, .7)), soft=True)
    join_predictions(soft, scored(soft))


# ---------------------------------------------------------------- files

def test_round_trip(tmp_path):
    r = cohort(); r = replace(r, root=tmp_path/'images', df=r.df.assign(age_raw='058Y', age_topcoded=False, study_id=None))
    for x in (r, replace(cohort(task='multiclass'), root=tmp_path), replace(r, patient_known=False, soft=True), r.select(split='test')):
        back = load_records(save_records(x, tmp_path/'r.parquet'))
        pd.testing.assert_frame_equal(back.df, x.df)
        assert all(getattr(back, k) == getattr(x, k) for k in ('root', 'labels', 'task', 'name', 'patient_known', 'soft'))

def test_nulls_and_mixed_columns_come_back(tmp_path):
    r = cohort(20); raw = pd.Series([58, '058Y', None, 61.5, '>= 90'], dtype=object).reindex(range(len(r)))
    back = load_records(save_records(replace(r, df=r.df.assign(age_raw=raw)), tmp_path/'r.parquet'), 'x').df
    assert back.age_raw[:5].tolist() == ['58', '058Y', None, '61.5', '>= 90'] and back.view.isna().all() and back.sex.isna().sum() == r.df.sex.isna().sum()

@pytest.mark.parametrize('root,file,kept', [('a/images', 'a/r.parquet', 'images'), ('a', 'a/meta/r.parquet', '..'), ('a', 'a/r.parquet', '.'), ('a', 'b/r.parquet', None)])
def test_no_absolute_path(tmp_path, root, file, kept):
    f = save_records(replace(cohort(5), root=tmp_path/root), tmp_path/file)
    about = json.loads(pq.read_schema(f).metadata[b'medprivacy'])
    assert about['root'] == kept and str(tmp_path).encode() not in f.read_bytes() and tmp_path.name.encode() not in f.read_bytes()
    if kept is None:
        with pytest.raises(ConfigError, match='as root='): load_records(f)
    else: assert load_records(f).root == tmp_path/root
    assert load_records(f, 'elsewhere').root == Path('elsewhere')

def test_a_folder_that_moves_keeps_its_records(tmp_path):
    save_records(replace(cohort(5), root=tmp_path/'a'/'images'), tmp_path/'a'/'r.parquet')
    os.rename(tmp_path/'a', tmp_path/'b')
    assert load_records(tmp_path/'b'/'r.parquet').root == tmp_path/'b'/'images'

def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    f = save_records(cohort(5), tmp_path/'r.parquet'); old = f.read_bytes()
    monkeypatch.setattr(os, 'replace', lambda *a: (_ for _ in ()).throw(OSError('full')))
    with pytest.raises(OSError): save_records(cohort(9), f)
    assert f.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ['r.parquet']

def test_files_that_are_none(tmp_path):
    with pytest.raises(ConfigError, match='.parquet'): save_records(cohort(5), tmp_path/'r.csv')
    with pytest.raises(DataError, match='does not exist'): load_records(tmp_path/'none.parquet')
    f = save_records(cohort(5), tmp_path/'r.parquet'); f.write_bytes(f.read_bytes()[:-20])
    with pytest.raises(DataError, match='no readable parquet'): load_records(f)
    pd.DataFrame(dict(a=[1])).to_parquet(f)
    with pytest.raises(DataError, match='no file of records'): load_records(f)

def test_what_is_read_is_checked(tmp_path):
    r = cohort(20); bad = replace(r, df=r.df.assign(path='../x.png'))
    with pytest.raises(DataError, match='leaves the root'): load_records(save_records(bad, tmp_path/'r.parquet'), '.')


# ---------------------------------------------------------------- the name of a split

def test_a_name_for_a_split():
    "Another for any patient that moves, the same for any order, column and trip through a file"
    r = cohort(24); name = split_hash(r); home = r.df.groupby('patient_id')[['split', 'part']].first()
    assert re.fullmatch('[0-9a-f]{64}', name)
    names = {name}
    for p in home.index:
        me = r.df.patient_id == p
        moved = r.with_split(r.df.split.mask(me, 'valid' if home.split[p] == 'train' else 'train'))
        sided = r.with_split(r.df.split, r.df.part.mask(me, 'attack' if home.part[p] == 'defence' else 'defence'))
        names |= {split_hash(moved), split_hash(sided), split_hash(r.select(where=~me))}
    assert len(names) == 1+3*len(home)
    for seed in range(5): assert split_hash(mixed(r, seed)) == name
    for same in (cap_images(r, 1), replace(r, name='z', root='q', df=r.df.assign(x=0., path='y'))): assert split_hash(same) == name

def test_a_name_survives_a_csv(tmp_path):
    r = cohort(30); r = replace(r, df=r.df.assign(patient_id=r.df.patient_id.str[1:].astype(int)))
    r.df.to_csv(tmp_path/'t.csv', index=False)
    assert split_hash(replace(r, df=pd.read_csv(tmp_path/'t.csv'))) == split_hash(replace(r, df=r.df.assign(patient_id=r.df.patient_id.astype(float)))) == split_hash(r)

def test_names_are_not_made_of_glue():
    "Ids that hold quotes, commas and line ends cannot imitate another split"
    def named(*ids): return split_hash(Records(pd.DataFrame(dict(patient_id=ids, image_id=ids, path='x', split='train')), '.', ['x']))
    assert len({named('a', 'b'), named('a\nb'), named('a,train,\nb'), named('a", "train", ""]\n["b'), named('a,b')}) == 5

def test_no_split_no_name():
    with pytest.raises(DataError, match='call split_patients'): split_hash(replace(cohort(5), df=cohort(5).df.assign(split=None)))
