"Who looked where: known looks are found again, what cannot be known is refused, weights do what they say"

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression

from recsys_lab.causal.examination import all_pairs, examine, in_random_order, regression_em
from recsys_lab.causal.impressions import Impressions, linked
from recsys_lab.causal.unbiased_ranking import LOSSES, ListRanker, Lists, weighted_loss
from recsys_lab.data.click_world import ClickWorld

SMALL = {"n_users": 60, "n_items": 20, "length": 5, "offset": -0.5}


def shown(world, requests=40_000, rankers=5, shuffle=0.0, **more) -> Impressions:
    weights = [world.ranker(0.5, number) for number in range(rankers)]
    return Impressions.from_frame(world.log(requests, weights, shuffle, **more))


def missed(theta, world) -> float:
    return float(np.abs(theta / world.examination - 1).max())


# ---- the world


def test_the_log_holds_no_truth_and_keeps_its_promises():
    world = ClickWorld(**SMALL)
    log = world.log(2000, shuffle=0.3)
    assert list(log) == [
        *("request_id", "user_id", "item_id", "position", "ranker", "propensity", "click"),
        "timestamp",
    ]
    assert len(log) == 2000 * 5 and log.position.between(1, 5).all()
    assert not log.duplicated(["request_id", "item_id"]).any()
    assert log.propensity.between(0, 1, inclusive="right").all()
    assert log.timestamp.is_monotonic_increasing
    assert log.equals(world.log(2000, shuffle=0.3)) and not log.equals(world.log(2000, seed=1))
    assert not np.array_equal(world.relevance(), ClickWorld(**SMALL, seed=1).relevance())


def test_expected_clicks_are_what_comes():
    world = ClickWorld(**SMALL, noise=0.1, trust=0.3)
    log = world.log(60_000)
    expected = world.value(world.top(world.ranker()))["clicks"].to_numpy()
    got = log.groupby("user_id")["click"].sum() / log.groupby("user_id")["request_id"].nunique()
    assert np.abs(got - expected).max() < 0.15
    assert abs(got.mean() - expected.mean()) < 0.01


def test_propensity_is_the_share_of_lists():
    world = ClickWorld(**SMALL | {"n_users": 2})
    weights = [world.ranker(0.5, number) for number in range(3)]
    log = world.log(60_000, weights, shuffle=0.5)
    each = log.groupby(["user_id", "item_id", "position"])["propensity"].agg(["size", "first"])
    asked = log.groupby("user_id")["request_id"].nunique()
    share = each["size"] / asked.loc[each.index.get_level_values(0)].to_numpy()
    assert np.abs(share - each["first"]).max() < 0.02


@pytest.mark.parametrize(
    "wrong",
    [{"eta": -1.0}, {"noise": 0.8, "trust": 0.4}, {"length": 30}, {"examination": [1.0] * 4}]
    + [{"examination": [1, 1, 1, 1, 0]}, {"n_users": 0}, {"conformity": "yes"}],
)
def test_impossible_worlds_are_refused(wrong):
    with pytest.raises(ValueError):
        ClickWorld(**SMALL | wrong)


def test_rounds_concentrate():
    world = ClickWorld(n_items=100, offset=-2.0, strength=0.5)
    top = lambda log: log[log["round"] == 4].groupby("item_id").size().nlargest(10).sum()
    still, moved = (world.rounds(5, 300, feedback=f) for f in (0.0, 0.3))
    assert top(moved) > 1.1 * top(still)
    assert still["request_id"].nunique() == 1500 and still.timestamp.is_monotonic_increasing


# ---- looks


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_looks_are_found_again(eta, seed):
    world = ClickWorld(**SMALL, eta=eta, seed=seed)
    log = shown(world)
    pairs = log.query_ids[log.query], log.item_ids[log.item]
    known = {"features": world.features(*pairs), "model": LogisticRegression(C=100), "tol": 1e-3}
    found = {
        "random order": in_random_order(shown(world, shuffle=1.0))[0],
        "regression-EM": regression_em(log)[0],
        "features": regression_em(log, **known)[0],
        "all pairs": all_pairs(log)[0],
    }
    assert {n: missed(t, world) for n, t in found.items() if missed(t, world) > 0.05} == {}


def test_looks_of_any_form():
    "Not only those that fall: an eye-catcher at the fourth place"
    world = ClickWorld(**SMALL, examination=[0.8, 0.4, 0.3, 0.9, 0.2])
    for theta, _ in (regression_em(shown(world)), all_pairs(shown(world))):
        assert np.abs(theta / (world.examination / 0.8) - 1).max() < 0.05


def test_propensities_stand_in_for_random_order():
    world = ClickWorld(**SMALL)
    rankers = [world.ranker(0.5)]
    log = world.log(150_000, rankers, shuffle=0.5)
    plain = in_random_order(Impressions.from_frame(log))[0]
    weighed = in_random_order(Impressions.from_frame(log, propensity="propensity"))[0]
    assert missed(weighed, world) < 0.05 < missed(plain, world)


def test_intervals_hold_the_truth():
    world = ClickWorld(**SMALL)
    found = examine(shown(world, 20_000), resamples=100)
    inside = (found.low <= world.examination) & (world.examination <= found.high)
    assert inside.sum() >= 4 and ((found.high - found.low)[1:] > 0).all()
    assert found.equals(examine(shown(world, 20_000), resamples=100))


def test_intervals_hold_at_their_level():
    "Over 100 logs of one world, at each place below the first"
    world, held = ClickWorld(**SMALL), []
    for seed in range(100):
        found = examine(shown(world, 1500, 1, 1.0, seed=seed), "random order", resamples=200)
        held.append((found.low <= world.examination) & (world.examination <= found.high))
    for hits in np.sum(held, 0)[1:]:
        assert binomtest(int(hits), 100, 0.95).pvalue > 1e-3, hits


def _likelihood(cells, theta, gamma):
    p = theta[cells.place] * gamma[cells.pair]
    return cells.clicks @ np.log(p) + (cells.shown - cells.clicks) @ np.log(1 - p)


def test_em_ends_where_the_likelihood_is_highest():
    world = ClickWorld(n_users=5, n_items=6, length=3, offset=0.0)
    log = shown(world, 4000)
    theta, gamma = regression_em(log, tol=1e-9, steps=2000)
    at = lambda x: 1 / (1 + np.exp(-x))
    start = np.zeros(3 + len(gamma))
    lost = lambda x: -_likelihood(log, at(x[:3]), at(x[3:]))
    best = minimize(lost, start, method="L-BFGS-B", options={"maxiter": 5000, "maxfun": 10**6})
    assert -_likelihood(log, theta, gamma) <= best.fun + 1e-3
    np.testing.assert_allclose(theta, at(best.x[:3]) / at(best.x[0]), rtol=0.01)


def test_all_pairs_is_the_published_objective():
    "Agarwal et al. 2019: the cross-entropy over ordered pairs of places, here by another optimiser"
    log = shown(ClickWorld(**SMALL), 5000)
    clicks, pairs = log.harvest.sum(0).reshape(2, 5, 5)
    row, column = np.triu_indices(5, 1)

    def lost(x):
        at, r = 1 / (1 + np.exp(-x)), np.zeros((5, 5))
        r[row, column] = r[column, row] = at[5:]
        p = np.clip(at[:5, None] * r, 1e-12, 1 - 1e-12)
        off = ~np.eye(5, dtype=bool)
        return -(clicks * np.log(p) + (pairs - clicks) * np.log(1 - p))[off].sum()

    best = minimize(lost, np.zeros(15), method="L-BFGS-B", options={"maxfun": 10**6}).x
    theta = 1 / (1 + np.exp(-best[:5]))
    np.testing.assert_allclose(all_pairs(log, tol=1e-9)[0], theta / theta[0], rtol=0.01)


def test_what_cannot_be_told_is_refused():
    single = shown(ClickWorld(**SMALL), rankers=1)
    assert linked(single).tolist() == [0, 1, 2, 3, 4]
    for way in (regression_em, all_pairs):
        with pytest.raises(ValueError, match="position of .1. and of .2."):
            way(single)
    with pytest.raises(ValueError, match="method must be one of"):
        examine(single, "all")
    with pytest.raises(ValueError, match="0 < level < 1"):
        examine(single, "random order", level=1)


ROWS = {"user_id": [1, 1, 2], "item_id": [1, 2, 1], "position": [1, 2, 1], "click": [0, 1, 0]}


@pytest.mark.parametrize("frame", [pd.DataFrame, pl.DataFrame])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"position": [1, 0, 1]}, "position must be a whole number from 1, the top; .* 1 rows"),
        ({"position": [1, -2, 1]}, "for example -2 in row 1"),
        ({"position": [1, 1.5, 1]}, "1.5 in row 1"),
        ({"position": [None, 2, 1]}, "in 1 rows"),
        ({"position": ["top", "2", "1"]}, "for example top in row 0"),
        ({"position": [1, 3, 1]}, "nothing was shown at position 2"),
        ({"click": [0, 2, 0]}, "click must be 0 or 1"),
        ({"click": [0, None, 0]}, "click must be 0 or 1"),
        ({"user_id": [1, None, 2]}, "user_id must be given"),
        ({"p": [0.5, 0.0, 1.0]}, "p must be above 0 and at most 1.* 0.0 in row 1"),
        ({"p": [0.5, 2.0, 1.0]}, "p must be above 0 and at most 1"),
        ({"p": [0.5, None, 1.0]}, "p must be above 0 and at most 1"),
    ],
)
def test_bad_logs_are_refused(frame, change, words):
    log = frame(ROWS | change, **({"strict": False} if frame is pl.DataFrame else {}))
    with pytest.raises(ValueError, match=words):
        Impressions.from_frame(log, propensity="p" if "p" in change else None)


def test_missing_columns_and_empty_logs_are_refused():
    with pytest.raises(ValueError, match="no column .'position'."):
        Impressions.from_frame(pd.DataFrame(ROWS).drop(columns="position"))
    with pytest.raises(ValueError, match="no rows"):
        Impressions.from_frame(pd.DataFrame(ROWS).iloc[:0])


def test_the_order_of_rows_does_not_matter():
    log = ClickWorld(**SMALL).log(3000, [ClickWorld(**SMALL).ranker(0.5, n) for n in range(3)])
    one, other = (Impressions.from_frame(x) for x in (log, log.sample(frac=1, random_state=0)))
    np.testing.assert_allclose(all_pairs(one)[0], all_pairs(other)[0], rtol=1e-3)
    assert one.shown.sum() == other.shown.sum() == len(log)


# ---- rankers


@pytest.fixture(scope="module")
def learned():
    "Lists of a small world, and what the world says of a ranker"
    world = ClickWorld(n_users=120, n_items=20, length=5, eta=1.5)
    log = world.log(4000, [world.ranker(0.2)], users=np.arange(60))
    log["liked"] = world.relevance()[log["user_id"], log["item_id"]]
    x = world.features(log["user_id"].to_numpy(), log["item_id"].to_numpy())
    test = np.arange(60, 120)
    candidates = world.features(test[:, None], np.arange(20))

    def judge(looks, gain="click", **settings):
        ranker = ListRanker(**settings).fit(Lists.from_frame(log, x, gain=gain), looks)
        order = np.argsort(-ranker.score(candidates), axis=1)[:, :5]
        return world.value(order, test)["ndcg@5"].to_numpy()

    return world, log, x, judge


@pytest.mark.parametrize("loss", LOSSES)
def test_weights_by_looks_gain(learned, loss):
    world, _, _, judge = learned
    naive, weighed = judge(None, loss=loss), judge(world.examination, loss=loss)
    told = judge(None, gain="liked", loss=loss)
    assert weighed.mean() > naive.mean() + 0.03
    assert abs(told.mean() - weighed.mean()) < 0.05


def test_flat_looks_change_nothing(learned):
    _, _, _, judge = learned
    for loss in LOSSES:
        np.testing.assert_array_equal(judge(np.ones(5), loss=loss), judge(None, loss=loss))


def test_dual_learning_finds_looks_that_fall(learned):
    world, log, x, judge = learned
    ranker = ListRanker().fit(Lists.from_frame(log, x), "dual")
    assert ranker.looks[0] == 1 and (np.diff(ranker.looks) < 0.02).all() and ranker.looks[-1] < 0.5
    assert judge("dual").mean() > judge(None).mean() + 0.03


def test_a_seed_is_a_ranker(learned):
    world, log, x, _ = learned
    lists = Lists.from_frame(log, x)
    fit = lambda seed: ListRanker(seed=seed, hidden=8, epochs=2).fit(lists, world.examination)
    one, same, other = (fit(seed).score(x[:50]) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("loss", LOSSES)
def test_shorter_lists_are_as_if_alone(loss):
    "What fills a short list up has no loss and no gradient"
    s = torch.tensor([[0.2, -0.4]], requires_grad=True)
    padded = torch.cat([s, torch.full((1, 3), -1e9)], 1)
    weight = torch.tensor([[1.0, 2.0]])
    wide = torch.cat([weight, torch.zeros(1, 3)], 1)
    a = weighted_loss(LOSSES[loss](s), weight)
    b = weighted_loss(LOSSES[loss](padded), wide)
    torch.testing.assert_close(a, b)
    one, other = (torch.autograd.grad(value, s)[0] for value in (a, b))
    torch.testing.assert_close(one, other)


def test_wrong_looks_and_lists_are_refused(learned):
    world, log, x, _ = learned
    lists = Lists.from_frame(log, x)
    for looks, words in [
        ([1, 0.5], "need looks of 5 places"),
        ([1, 0.5, 0, 0.2, -1], r"not at positions \[3, 5\]"),
        ([1, 0.5, np.nan, 0.2, 0.1], r"not at positions \[3\]"),
        ("dla", "or 'dual'"),
    ]:
        with pytest.raises(ValueError, match=words):
            ListRanker().fit(lists, looks)
    with pytest.raises(ValueError, match="need a list with a click"):
        ListRanker().fit(Lists.from_frame(log.assign(click=0), x))
    with pytest.raises(ValueError, match="features of"):
        Lists.from_frame(log, x[:10])
    with pytest.raises(ValueError, match="most must be a number above 0"):
        ListRanker(most=0)
