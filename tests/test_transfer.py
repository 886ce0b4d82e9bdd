"What is known elsewhere helps where it should, never enters the catalogue, and is gone when its weight is 0"

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_lab.data.domains import elsewhere_matrix, taken_elsewhere
from recsys_lab.data.interactions import Histories, Interactions
from recsys_lab.data.tiny import tiny, tiny_items
from recsys_lab.models.adapted import Adapted
from recsys_lab.models.crossease import CrossEASE
from recsys_lab.models.ease import EASE
from recsys_lab.models.ials import IALS
from recsys_lab.models.mapped import Mapped, linear_map, mapped

KINDS, PEOPLE, ITEMS = 4, 80, 40
SMALL = {"factors": 8, "epochs": 8}


def shop(seed: int, letter: str) -> Interactions:
    "Everyone takes about half of the articles of their kind, which repeats every four people"
    take = np.random.default_rng(seed).random((PEOPLE, ITEMS)) < 0.5
    own = np.arange(PEOPLE)[:, None] % KINDS == np.arange(ITEMS)[None, :] % KINDS
    user, item = np.nonzero(take & own)
    ids = [f"{letter}{i:02d}" for i in range(ITEMS)]
    return Interactions.from_codes(user, item, user_ids=np.arange(PEOPLE), item_ids=ids)


HERE, THERE = shop(1, "t"), taken_elsewhere(shop(2, "s"))
KNOWN, NEW = HERE.where(HERE.user < 60), np.arange(60, 80)
MODELS = {
    "both": lambda: CrossEASE(lam=5.0),
    "mapped": lambda: Mapped(**SMALL),
}


@pytest.mark.parametrize("name", MODELS)
def test_no_source_item_is_ever_recommended(name):
    model = MODELS[name]().fit(KNOWN, users=THERE)
    everything = model.recommend(np.arange(PEOPLE), k=ITEMS, exclude_seen=False)
    assert set(everything.item_id) == set(HERE.item_ids)
    assert not set(everything.item_id) & set(THERE.elsewhere.explode())
    assert model.score(users=NEW).shape == (len(NEW), ITEMS)


@pytest.mark.parametrize("name", MODELS)
def test_new_people_get_articles_of_their_kind_and_other_peoples_rows_do_not_help(name):
    def share(users):
        top = MODELS[name]().fit(KNOWN, users=users).recommend(NEW, k=5)
        return (top.item_id.str[1:].astype(int) % KINDS == top.user_id % KINDS).mean()

    order = np.random.default_rng(0).permutation(PEOPLE)
    mixed = THERE.assign(elsewhere=[THERE.elsewhere[i] for i in order])
    assert share(THERE) > 0.9 and share(None) < 0.5 and share(mixed) < 0.5


def test_with_weight_0_both_domains_are_the_target_alone():
    asked = {"users": np.arange(PEOPLE), "histories": KNOWN.histories()}
    zero = CrossEASE(5.0, weight=0.0, constant=0.0).fit(KNOWN, users=THERE).score(**asked)
    assert np.array_equal(zero, CrossEASE(5.0, 0.7, constant=0.0).fit(KNOWN).score(**asked))
    told = np.arange(PEOPLE) < 60
    ease = EASE(5.0).fit(KNOWN).score(**asked)
    assert np.allclose(zero[told], ease[told], atol=1e-4)
    assert np.array_equal(zero[~told], ease[~told])  # Nothing is known: what is popular
    some = CrossEASE(5.0, weight=0.7, constant=0.0).fit(KNOWN, users=THERE).score(**asked)
    assert np.abs(some - zero).max() > 0.01


def test_without_trust_the_mapped_factors_are_the_target_alone():
    zero = Mapped(**SMALL, trust=0.0).fit(KNOWN, users=THERE)
    plain = IALS(**SMALL).fit(KNOWN)
    given = KNOWN.histories(np.arange(60))
    assert np.allclose(zero.score(np.arange(60), given), plain.score(histories=given), atol=1e-5)
    assert np.array_equal(zero.score(users=NEW), np.tile(KNOWN.item_counts(), (20, 1)))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(0, 1000))
def test_a_planted_rotation_is_recovered(d, seed):
    "From twice as many people as dimensions, for people who were not among them"
    rng = np.random.default_rng(seed)
    turn, move = np.linalg.qr(rng.normal(size=(d, d)))[0], rng.normal(size=d)
    A, strangers = rng.normal(size=(2 * d + 2, d)), rng.normal(size=(5, d))
    M = linear_map(A, A @ turn + move, ridge=0.0)
    assert np.allclose(M[:-1], turn, atol=1e-6) and np.allclose(M[-1], move, atol=1e-6)
    assert np.allclose(mapped(strangers, M), strangers @ turn + move, atol=1e-5)


def test_people_without_rows_here_are_not_fitted_as_if_they_had_refused_everything():
    model = CrossEASE(lam=5.0).fit(KNOWN, users=THERE)
    assert model.rows.tolist() == list(range(60)) and model.S.shape[0] == PEOPLE
    fewer = THERE[THERE.user_id < 60]
    again = CrossEASE(lam=5.0).fit(KNOWN, users=fewer)
    assert np.allclose(
        model.score(users=np.arange(60)), again.score(users=np.arange(60)), atol=1e-5
    )


def test_a_table_of_users_may_hold_people_and_types_of_its_own():
    more = pd.DataFrame({"user_id": [3, 999], "elsewhere": [["s01", "s01"], ["s02"]]})
    X = elsewhere_matrix(more, np.arange(5))
    assert X.toarray().sum() == 1 and X[3].nnz == 1
    with pytest.raises(ValueError, match="none of 2 people"):
        elsewhere_matrix(more.assign(user_id=["3", "999"]), np.arange(5))


ITEM_TABLE = pd.DataFrame(
    {"item_id": HERE.item_ids, "genres": [[f"kind {i % KINDS}", "new"[: 3 * (i >= 32)]] for i in range(ITEMS)]}
)  # fmt: skip
ITEM_TABLE["genres"] = [[g for g in genres if g] for genres in ITEM_TABLE.genres]


def test_items_of_a_new_category_are_found_before_their_first_row_by_description_alone():
    old = HERE.where(HERE.item < 32)
    given = {"category": "new", "reg": 0.01, **SMALL}
    first = lambda **more: Adapted(**given, **more).fit(old, items=ITEM_TABLE).score()[:, 32:]
    right = np.arange(PEOPLE)[:, None] % KINDS == np.arange(32, ITEMS)[None, :] % KINDS
    scores = first(ridge=0.01)
    assert (
        np.where(right, scores, np.inf).min(1) > np.where(right, -np.inf, scores).max(1)
    ).mean() > 0.9
    assert not first(start="nothing").any()


def test_frozen_old_items_and_people_stay_and_many_rows_outweigh_the_description():
    given = {"category": "new", "ridge": 0.01, "reg": 0.001, **SMALL}
    before = Adapted(**given).fit(HERE.where(HERE.item < 32), items=ITEM_TABLE)
    after = Adapted(**given).fit(HERE, items=ITEM_TABLE)
    assert np.array_equal(before.U, after.U) and np.array_equal(before.V[:32], after.V[:32])
    wrong = ITEM_TABLE.copy()
    wrong["genres"] = [
        [f"kind {(i + (i >= 32)) % KINDS}"] + ["new"] * (i >= 32) for i in range(ITEMS)
    ]
    misled = Adapted(**given).fit(HERE, items=wrong)
    score = lambda model: model.score(histories=Histories.from_lists([[0, 4, 8, 12, 16]]))[0, 32:]
    assert np.argmax(score(after)) % KINDS == 0 and np.argmax(score(misled)) % KINDS == 0
    assert np.linalg.norm(after.V[32:] - misled.V[32:]) < np.linalg.norm(
        before.V[32:] - Adapted(**given).fit(HERE.where(HERE.item < 32), items=wrong).V[32:]
    )


def test_a_map_that_nobody_teaches_is_refused_and_gives_no_nan():
    strangers = THERE[THERE.user_id >= 60]
    here = HERE.where(HERE.user < 60)
    with pytest.raises(ValueError, match="none of 20 people known elsewhere has rows in train"):
        Mapped(**SMALL).fit(here, users=strangers)
    alone = Mapped(**SMALL, trust=0.0).fit(here, users=strangers)
    assert np.isfinite(alone.score(users=np.arange(PEOPLE))).all()


@pytest.mark.parametrize("freeze", [True, False])
def test_somebody_who_took_nothing_outside_the_new_category_is_folded_in_and_not_given_zeros(
    freeze,
):
    data, items = tiny(), tiny_items()
    kind = items.set_index("item_id").genres.loc[data.item_ids].str[0].to_numpy()
    data = data.where((data.user != 0) | (kind[data.item] == "Romance"))
    model = Adapted("Romance", factors=4, epochs=4, freeze=freeze).fit(data, items=items)
    own = data.histories(np.array([0]))
    assert len(own.items) and model.U[0].any()
    scores = model.score(users=[0])[0]
    assert len(np.unique(scores)) > 1
    if freeze:
        np.testing.assert_allclose(scores, model.score(histories=own)[0], atol=1e-5)
