"Properties of the split: no patient on two sides, shares as asked, hashes that stay, strata that balance"
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st

from medprivacy.core import ConfigError, LeakageError
from medprivacy.data.core import Records
from medprivacy.data.split import assign_parts, check_disjoint, split_patients

FRACS = (.6, .15, .25)


def people(sizes, seed=0):
    "Records of patients with so many images each"
    rng = np.random.default_rng(seed); k = len(sizes)
    who = pd.DataFrame(dict(patient_id=[f'p{i}' for i in range(k)], sex=rng.choice(['F', 'M'], k), age=rng.uniform(20, 90, k), y=rng.integers(0, 2, k)))
    df = who.loc[np.repeat(np.arange(k), sizes)].reset_index(drop=True)
    df['image_id'] = df['path'] = [f'i{i}' for i in range(len(df))]
    return Records(df.sample(frac=1, random_state=seed), '.', ['y'])


def homes(recs, column='split'): return recs.df.groupby('patient_id')[column].first()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(1, 12), min_size=3, max_size=60), seed=st.integers(0, 10**6), attack=st.sampled_from([0., .3, .5, 1.]),
       stratify=st.sampled_from([None, 'sex', ['sex', 'y'], ['sex', 'age']]))
def test_patients_are_disjoint(sizes, seed, attack, stratify):
    "Every image of a patient stands in one split and one part, whatever the group sizes"
    r = split_patients(people(sizes), FRACS, stratify=stratify, seed=seed, attack=attack); check_disjoint(r)
    assert r.df.split.notna().all() and r.df.groupby('patient_id').split.nunique().max() == 1
    if attack: assert r.df.part.notna().all() and r.df.groupby('patient_id').part.nunique().max() == 1
    else:      assert r.df.part.isna().all()
    assert sum(len(r.select(split=s)) for s in ('train', 'valid', 'test')) == sum(sizes)


@pytest.mark.parametrize('seed', range(12))
def test_shares_of_a_hash(seed):
    "800 patients: each share within 4 standard errors of what was asked, which 36+12 binomial draws pass with chance above 0.996"
    r = split_patients(people([1 + k % 3 for k in range(800)]), FRACS, seed=seed)
    got = homes(r).value_counts(normalize=True)
    for s, f in zip(('train', 'valid', 'test'), FRACS): assert abs(got[s] - f) < 4*np.sqrt(f*(1-f)/800)
    assert abs((homes(r, 'part') == 'attack').mean() - .5) < 4*np.sqrt(.25/800)


@pytest.mark.parametrize('seed', range(6))
@pytest.mark.parametrize('stratify', ['sex', ['sex', 'y']])
def test_strata_are_balanced(seed, stratify):
    "In every stratum each split has its share to within one patient, and each part of it to within one and a half"
    r = split_patients(people([2]*203, seed), FRACS, stratify=stratify, seed=seed)
    one = r.df.groupby('patient_id').first()
    for _, g in one.groupby(stratify):
        for s, f in zip(('train', 'valid', 'test'), FRACS):
            here = g[g.split == s]
            assert abs(len(here) - f*len(g)) <= 1
            assert abs((here.part == 'attack').sum() - len(here)/2) <= 1


@pytest.mark.parametrize('seed', range(5))
def test_hash_stays_when_rows_are_added(seed):
    "New patients and new images move nobody"
    old, new = (split_patients(people(s), FRACS, seed=seed) for s in ([1, 2, 3]*20, [2, 3, 1]*40))
    for c in ('split', 'part'): pd.testing.assert_series_equal(homes(new, c).loc[homes(old, c).index], homes(old, c))


@pytest.mark.parametrize('stratify', [None, 'sex'])
def test_seed_alone_decides(stratify):
    r = people([2]*60)
    a, b, c = (split_patients(r, FRACS, stratify=stratify, seed=s).df for s in (1, 1, 2))
    assert a.split.tolist() == b.split.tolist() and a.part.tolist() == b.part.tolist() and a.split.tolist() != c.split.tolist()


def test_order_of_images_does_not_matter_to_a_hash():
    r = people([1, 4]*30); back = Records(r.df.iloc[::-1], '.', ['y'])
    pd.testing.assert_series_equal(homes(split_patients(r, FRACS)), homes(split_patients(back, FRACS)))


@pytest.mark.parametrize('seed', range(4))
def test_split_and_part_are_independent(seed):
    "2000 patients: the attack's share of each split is that of the whole, within 4 standard errors"
    r = split_patients(people([1]*2000), (.5, .2, .3), seed=seed)
    one = r.df.groupby('patient_id').first()
    for s, g in one.groupby('split'): assert abs((g.part == 'attack').mean() - .5) < 4*np.sqrt(.25/len(g))


def test_official_split_is_kept():
    "Parts may be added to a split that the data set came with"
    r = people([2]*90); home = dict(zip(pd.unique(r.df.patient_id), ['train', 'valid', 'test']*30))
    r = r.with_split(r.df.patient_id.map(home)); q = assign_parts(r, .4, stratify='sex', seed=3)
    assert q.df.split.tolist() == r.df.split.tolist() and set(q.df.part) == {'defence', 'attack'}
    check_disjoint(q.select(part='defence'), q.select(part='attack'))


@pytest.mark.parametrize('fracs', [(.5, .5), (.5, .5, .5), (1.2, -.1, -.1)])
def test_bad_shares(fracs):
    with pytest.raises(ConfigError, match='sum to 1'): split_patients(people([1]*4), fracs)


@pytest.mark.parametrize('attack', [-.1, 1.1])
def test_bad_attack_share(attack):
    with pytest.raises(ConfigError, match=r'\[0,1\]'): split_patients(people([1]*4), FRACS, attack=attack)


def test_image_split_is_refused():
    "The usual mistake, a split by image, is found"
    r = people([3]*40); wrong = r.with_split(np.random.default_rng(0).choice(['train', 'valid', 'test'], len(r)))
    with pytest.raises(LeakageError, match='split_patients'): check_disjoint(wrong)
    with pytest.raises(LeakageError, match='split_patients'): wrong.validate(files=False)
