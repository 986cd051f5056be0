"Are two images of one patient? Pairs, networks, and chance where nothing is planted"
import numpy as np
import pytest
from medprivacy.core import DataError, LeakageError
from medprivacy.data.phantom import make_phantom, tiny_records
from medprivacy.data.split import split_patients
from medprivacy.identity import attack_identity, identity_dls, identity_pairs
from medprivacy.verification import verification_table

NOTHING = dict(disease=0, sex=0, age=0, identity=0, device=0)

def records_of(tmp_path, strength, n=160):
    recs = make_phantom(tmp_path/'p', 'cxr', n_patients=n, size=32, seed=5, strength=strength)
    return split_patients(recs, (.5, .1, .4), seed=0, stratify='sex', attack=.98)

def test_identity_is_read_where_it_is_planted_and_not_where_nothing_is(tmp_path):
    kw = dict(size=32, epochs=5, bs=32, device='cpu', kinds=('embedding', 'pixels'))
    t  = verification_table(attack_identity(records_of(tmp_path/'a', {'identity': 1}), **kw), n_boot=200).set_index('model')
    assert (t.auroc > .7).all()
    none = verification_table(attack_identity(records_of(tmp_path/'b', NOTHING), **kw), n_boot=200).set_index('model')
    error = np.sqrt(1/(6*none.n/2))          # of an AUROC of two halves: 1/sqrt(12 m n/(m+n+1)) with m = n
    assert (abs(none.auroc-.5) < 3*error).all()

@pytest.mark.parametrize('match', [(), ('sex',), ('sex', 'view')])
def test_pairs_are_of_one_patient_or_of_two_that_agree(match):
    recs  = tiny_records(n=40, size=32)
    pairs = identity_pairs(recs, 3, match=match, seed=2)
    df    = recs.df.astype(str)
    a, b  = df.iloc[pairs.a].reset_index(drop=True), df.iloc[pairs.b].reset_index(drop=True)
    assert ((a.patient_id == b.patient_id) == (pairs.same == 1)).all() and (pairs.a != pairs.b).all()
    for c in match: assert (a[c] == b[c]).all()

def test_a_patient_with_many_images_does_not_decide():
    recs = tiny_records(n=12, size=32, images_per_patient=6)
    pairs = identity_pairs(recs, most=4)
    count = recs.df.patient_id.to_numpy()[pairs.a[pairs.same == 1]]
    assert set(np.unique(count, return_counts=True)[1]) == {4}

def test_all_of_one_sex_has_no_strangers():
    recs = tiny_records(n=12, size=32)
    one  = recs.df.patient_id == recs.df.patient_id[0]
    with pytest.raises(DataError, match='every stranger differs'): identity_pairs(recs.select(where=one.to_numpy()), match=('sex',))

def test_training_pairs_are_drawn_anew_and_test_pairs_are_fixed():
    dls = identity_dls(tiny_records(n=40, size=32), 32, 8, device='cpu')
    seen = []
    for dl in (dls.train, dls.test):
        lists = []
        for _ in range(2): list(dl); lists.append(dl.pairs.tolist())
        seen.append(lists[0] == lists[1])
    assert seen == [False, True]

def test_patients_of_the_obfuscator_are_refused():
    recs = tiny_records(n=24, size=32)
    class Seen: patients = frozenset(recs.select(part='attack').df.patient_id)
    with pytest.raises(LeakageError, match='train the obfuscator'): attack_identity(recs, Seen(), size=32, device='cpu')
