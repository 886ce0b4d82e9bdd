"Off-policy evaluation: bad logs, identities between estimators, blocks, intervals, warnings"

from dataclasses import replace

import numpy as np
import pandas as pd
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_lab.causal import policies
from recsys_lab.causal.diagnosis import diagnose
from recsys_lab.causal.estimate import estimate
from recsys_lab.causal.estimators import ESTIMATORS, weigh
from recsys_lab.causal.log import BanditLog
from recsys_lab.causal.policies import (
    probabilities,
    recommender_policy,
    softmax_policy,
    uniform_policy,
)
from recsys_lab.causal.value_intervals import (
    INTERVALS,
    counts_by_block,
    resampled_values,
    value_intervals,
)
from recsys_lab.data.loaders import load_bandit, load_dataset
from recsys_lab.models.ease import EASE

N, M, P = 60, 5, 3


def random_log(
    seed: int, n: int = N, m: int = M, **more
) -> tuple[BanditLog, np.ndarray, np.ndarray]:
    "A log with its logging policy, a target policy and predictions"
    rng = np.random.default_rng(seed)
    logging, target = rng.dirichlet(np.ones(m), (2, n))
    logging = (logging + 0.05) / (logging + 0.05).sum(1, keepdims=True)
    action = (rng.random((n, 1)) > logging.cumsum(1)).sum(1).clip(max=m - 1)
    chance = logging[np.arange(n), action]
    kinds = rng.integers(0, 3, m)[:, None]
    more = {"logging": logging, "action_context": kinds, "n_actions": m} | more
    return BanditLog(action, rng.random(n), chance, **more), target, rng.random((n, m))


def every(log, policy, q) -> dict[str, float]:
    rounds = weigh(log, policy, q)
    return {k: e.terms(rounds).value for k, e in ESTIMATORS.items()}


# Bad logs

ROUNDS = pd.DataFrame(
    {
        "item": ["b", "a", "b", "a"],
        "click": [1.0, 0, 0, 1],
        "p": [0.5, 0.5, 0.25, 0.75],
        "x": [0.1, 0.2, 0.3, 0.4],
        "kind": ["u", "v", "u", "v"],
        "place": [1, 2, 1, 2],
    }
)
READ = {
    "action": "item",
    "reward": "click",
    "propensity": "p",
    "context": ["x", "kind"],
    "position": "place",
}


def with_value(column: str, *values) -> pd.DataFrame:
    "The good rounds with these values at the end of a column"
    changed = ROUNDS[column].astype(object).tolist()
    changed[-len(values) :] = values
    return ROUNDS.assign(**{column: pd.Series(changed).infer_objects()})


BAD = {
    "propensity zero": (with_value("p", 0.0), r"p is zero in 1 of 4 rounds, first in row 3 \(0.0\)"),
    "propensity negative": (with_value("p", -0.5, -0.5), "p is negative in 2 of 4 rounds, first in row 2"),
    "propensity above one": (with_value("p", 1.5), "p is above one in 1 of 4.*divide by 100"),
    "propensity missing": (with_value("p", np.nan), "p is missing in 1 of 4 .*leave out"),
    "propensity is text": (ROUNDS.assign(p=["high"] * 4), "p must be numbers"),
    "reward missing": (with_value("click", np.nan), "click is missing or infinite in 1 of 4"),
    "reward infinite": (with_value("click", np.inf), "click is missing or infinite in 1 of 4"),
    "context missing": (with_value("x", np.nan), "x is missing in 1 of 4"),
    "context infinite": (with_value("x", np.inf), "x is missing or infinite in 1 of 4"),
    "text context missing": (with_value("kind", None), "kind is missing in 1 of 4"),
    "action missing": (with_value("item", None), "item is missing in 1 of 4 .*nothing was shown"),
    "action unknown": (with_value("item", "z", "z"), r"item is unknown in 2 of 4 .*row 2 \(z\)"),
    "position missing": (with_value("place", None), "place is missing in 1 of 4"),
    "empty": (ROUNDS[:0], "0 rounds"),
    "no such column": (ROUNDS.drop(columns="p"), "df has no column 'p'; it has"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
@pytest.mark.parametrize("kind", ["pandas", "polars"])
def test_bad_logs_are_refused(fault, kind):
    frame, message = BAD[fault]
    actions = pd.DataFrame({"item": ["a", "b"]})
    if kind == "polars":
        frame, actions = pl.from_pandas(frame), pl.from_pandas(actions)
    with pytest.raises(ValueError, match=message):
        BanditLog.from_frame(frame, **READ, actions=actions)


ARRAYS = {
    "lengths": ({"reward": [1.0]}, "lengths differ: action 2, reward 1, propensity 2"),
    "action below zero": ({"action": [0, -1]}, "action is unknown in 1 of 2 rounds"),
    "action too large": (
        {"n_actions": 1},
        r"action is unknown in 1 of 2 rounds, first in row 1 \(1\)",
    ),
    "action no code": ({"action": [0.5, 1]}, "from_frame takes ids of any type"),
    "ids twice": ({"action_ids": ["a", "a"]}, "1 of them different"),
    "context of one dimension": ({"context": [1.0, 2.0]}, "context has shape"),
    "features of another number": ({"action_context": [[1.0]]}, "action is unknown"),
    "position too large": ({"position": [0, 2], "n_positions": 2}, "position is unknown in 1 of 2"),
    "logging disagrees": ({"logging": [0.5, 0.5]}, "not the propensity of the logged action in 2"),
    "logging of another shape": ({"logging": [[0.5, 0.5]]}, "logging has shape"),
}


@pytest.mark.parametrize("fault", ARRAYS)
def test_bad_arrays_are_refused(fault):
    change, message = ARRAYS[fault]
    good = {"action": [0, 1], "reward": [1.0, 0.0], "propensity": [0.25, 0.75]}
    BanditLog(**good)
    with pytest.raises(ValueError, match=message):
        BanditLog(**good | change)


POLICIES = {
    "sum": (
        np.full((N, M), 0.3),
        "not summing to one in 60 of 60 rounds, first in round 0 .sum 1.5",
    ),
    "negative": (np.tile([1.5, -0.5, 0, 0, 0], (N, 1)), "negative in 60 of 60"),
    "nan": (np.full((N, M), np.nan), "not finite in 60 of 60"),
    "actions": (np.full((N, 4), 0.25), r"needs \(60, 5\)"),
    "rounds": (np.full((7, M), 0.2), r"needs \(60, 5\)"),
    "labels": (
        pd.DataFrame(np.full((N, M), 0.2), columns=list("edcba")),
        "policy is a DataFrame, whose labels would be lost.*order of log.action_ids",
    ),
    "mapping": (dict.fromkeys(range(M), 0.2), "policy is a dict, whose labels"),
    "function": (lambda part: np.full((len(part), 4), 0.25), "returned shape"),
}


@pytest.mark.parametrize("fault", POLICIES)
def test_bad_policies_are_refused(fault):
    policy, message = POLICIES[fault]
    with pytest.raises(ValueError, match=message):
        estimate(random_log(0)[0], policy)


def test_the_last_block_is_checked_too(monkeypatch):
    log, target, _ = random_log(0)
    target[-1] *= 1.01
    monkeypatch.setattr(policies.blocks, "__defaults__", (10,))
    with pytest.raises(ValueError, match="in 1 of 2 rounds, first in round 59"):
        probabilities(target, log)


# Identities

seeds = st.integers(0, 10**6)


@settings(max_examples=30, deadline=None)
@given(seed=seeds)
def test_without_a_model_dr_is_ips(seed):
    log, target, q = random_log(seed)
    got = every(log, target, np.zeros_like(q))
    assert got["dm"] == 0
    assert got["dr"] == pytest.approx(got["ips"], abs=1e-12)
    assert got["sndr"] == pytest.approx(got["snips"], abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(seed=seeds)
def test_a_model_that_is_right_needs_no_weights(seed):
    log, target, q = random_log(seed)
    right = replace(log, reward=q[np.arange(N), log.action])
    got = every(right, target, q)
    for name in ("dr", "sndr", "switch_dr", "dros"):
        assert got[name] == pytest.approx(got["dm"], abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(seed=seeds)
def test_dials_end_at_their_neighbours(seed):
    log, target, q = random_log(seed)
    rounds, value = weigh(log, target, q), every(log, target, q)
    at = lambda name, setting: ESTIMATORS[name](setting).terms(rounds).value
    for name in ("switch_dr", "dros"):
        assert at(name, 0) == pytest.approx(value["dm"], abs=1e-12)
        assert at(name, np.inf) == pytest.approx(value["dr"], abs=1e-12)
    assert at("dros", 1e14) == pytest.approx(value["dr"], abs=1e-9)
    assert at("clipped_ips", np.inf) == pytest.approx(value["ips"], abs=1e-12)
    assert at("clipped_ips", 0) == 0


@settings(max_examples=30, deadline=None)
@given(seed=seeds)
def test_mips_between_ips_and_the_mean(seed):
    log, target, q = random_log(seed)
    apart = every(replace(log, action_context=np.eye(M)), target, q)
    assert apart["mips"] == pytest.approx(apart["ips"], abs=1e-12)
    alike = every(replace(log, action_context=np.ones((M, 1))), target, q)
    assert alike["mips"] == pytest.approx(log.reward.mean(), abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(seed=seeds)
def test_the_logging_policy_earns_what_it_earned(seed):
    log, _, q = random_log(seed)
    got = every(log, log.logging, q)
    for name in ("ips", "snips", "mips", "clipped_ips"):
        assert got[name] == pytest.approx(log.reward.mean(), abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(seed=seeds)
def test_self_normalised_values_are_means(seed):
    log, target, q = random_log(seed)
    value = every(log, target, q)["snips"]
    assert log.reward.min() - 1e-12 <= value <= log.reward.max() + 1e-12


@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_the_order_of_rounds_changes_nothing(seed):
    log, target, q = random_log(seed)
    order = np.random.default_rng(seed).permutation(N)
    first, second = every(log, target, q), every(log.take(order), target[order], q[order])
    assert second == pytest.approx(first, abs=1e-12)
    facts = (diagnose(log, target).facts, diagnose(log.take(order), target[order]).facts)
    assert facts[1] == pytest.approx(facts[0], rel=1e-9, abs=1e-12)


def test_ips_is_right_on_average():
    "Over many logs the mean error vanishes, and so does that of DR with a model that is wrong"
    rng = np.random.default_rng(0)
    chance, target, worth = np.array([0.7, 0.2, 0.1]), np.array([0.1, 0.3, 0.6]), [0.2, 0.5, 0.9]
    values = []
    for _ in range(400):
        action = rng.choice(3, 200, p=chance)
        reward = (rng.random(200) < np.take(worth, action)) * 1.0
        log = BanditLog(action, reward, chance[action], n_actions=3)
        values.append(every_of(log, target, np.array([0.9, 0.1, 0.1]), ("ips", "dr", "dm")))
    got, truth = pd.DataFrame(values), float(target @ worth)
    error = (got - truth).mean() / got.std().clip(lower=1e-12) * np.sqrt(len(got))
    assert error[["ips", "dr"]].abs().max() < 4
    assert abs(got["dm"].mean() - truth) > 0.3


def every_of(log, policy, q, names) -> dict[str, float]:
    rounds = weigh(log, policy, q)
    return {k: ESTIMATORS[k].terms(rounds).value for k in names}


# Blocks, tables and functions


@pytest.mark.parametrize("cells", [1, M, 7 * M, 10**6])
def test_blocks_change_nothing(monkeypatch, cells):
    log, target, q = random_log(3)
    rounds, facts = weigh(log, target, q), diagnose(log, target).facts
    monkeypatch.setattr(policies.blocks, "__defaults__", (cells,))
    again = weigh(log, target, q)
    for name in ("weight", "logged", "policy", "marginal"):
        assert np.array_equal(getattr(rounds, name), getattr(again, name))
    assert np.array_equal(probabilities(target, log), target)
    assert diagnose(log, target).facts == pytest.approx(facts, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("cells", [M, 2 * M, 3 * M, 10**6])
def test_all_forms_of_a_policy_agree(monkeypatch, cells):
    "Also where a block has as many rounds as there are positions"
    monkeypatch.setattr(policies.blocks, "__defaults__", (cells,))
    rng = np.random.default_rng(0)
    place = rng.integers(0, P, N)
    log = random_log(1, position=place)[0]
    table = rng.dirichlet(np.ones(M), P)
    forms = [
        table,
        table[place],
        policies.GroupedPolicy(table, place),
        lambda part: table[part.position],
        lambda part: table[part.position].astype(np.float64).copy(),
    ]
    values = [weigh(log, form, table).weight for form in forms]
    for other in values[1:]:
        assert np.array_equal(values[0], other)


def test_positions_know_their_own_policy():
    log = BanditLog([0, 0], [1.0, 0.0], [0.5, 0.5], position=[0, 1], n_actions=2)
    by_place = np.array([[1.0, 0], [0, 1]])
    assert weigh(log.take([0]), by_place).weight.tolist() == [2]
    assert weigh(log.take([1]), by_place).weight.tolist() == [0]


def test_pandas_and_polars_agree():
    frame = pd.concat([ROUNDS] * 5, ignore_index=True)
    actions = pd.DataFrame(
        {"item": ["a", "b", "c"], "size": [1.0, 2.0, 2.0], "brand": ["x", "y", "y"]}
    )
    logs = [
        BanditLog.from_frame(frame, **READ, actions=actions),
        BanditLog.from_frame(pl.from_pandas(frame), **READ, actions=pl.from_pandas(actions)),
    ]
    for name in ("action", "reward", "propensity", "context", "position", "action_context"):
        assert np.array_equal(*(getattr(log, name) for log in logs))
    tables = [estimate(log, [0.2, 0.5, 0.3], q=[0.1, 0.2, 0.3], resamples=50) for log in logs]
    pd.testing.assert_frame_equal(*tables)


@pytest.mark.parametrize(
    "ids", [[10, 20, 30], ["x", "y", "z"], [2.5, 0.5, 1.5], [True, False, True]]
)
def test_ids_of_any_type(ids):
    frame = pd.DataFrame({"action": ids, "reward": [1, 0, 1], "propensity": [0.5] * 3})
    log = BanditLog.from_frame(frame)
    assert log.action_ids[log.action].tolist() == ids


def test_without_overlap_nothing_counts():
    log = BanditLog([0, 0], [1.0, 0.0], [0.5, 0.5], n_actions=2)
    table = estimate(log, [0.0, 1.0], q=[0.3, 0.4], resamples=20).set_index("estimator")
    assert table["warnings"].str.contains("no overlap").all()
    assert table.loc["dm", "value"] == 0.4 and table.loc["dm", "effective"] == 2
    assert table.loc["ips", ["value", "effective"]].tolist() == [0, 0]
    assert table.loc[["snips", "sndr"], "value"].isna().all()


def test_unknown_estimators_and_needs():
    log, target, _ = random_log(0)
    with pytest.raises(ValueError, match="did you mean 'switch_dr'"):
        estimate(log, target, estimators=["swich_dr"])
    with pytest.raises(ValueError, match="sndr needs q.*fit_reward_model"):
        estimate(log, target, estimators=["sndr"])
    with pytest.raises(ValueError, match="mips needs features"):
        estimate(replace(log, logging=None), target, estimators=["mips"])
    with pytest.raises(ValueError, match="q is missing or infinite in 60 of 60"):
        estimate(log, target, q=np.full((N, M), np.nan))
    assert estimate(log, target, resamples=10)["estimator"].tolist() == [
        "ips",
        "clipped_ips",
        "snips",
        "mips",
    ]


# Intervals


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), n=st.integers(1, 400), size=st.integers(1, 200))
def test_every_resample_has_all_draws(seed, n, size):
    counts = np.zeros((6, n), int)
    for rows, some, block in counts_by_block(n, 6, seed, size):
        counts[some, rows] += block
    assert (counts.sum(1) == n).all()


def test_draws_do_not_depend_on_threads(monkeypatch):
    log, target, q = random_log(0, 500)
    terms = {k: e.terms(weigh(log, target, q)) for k, e in ESTIMATORS.items()}
    values = []
    for threads in (1, 2, 3):
        monkeypatch.setattr("numba.config.NUMBA_NUM_THREADS", threads)
        values.append(resampled_values(terms, 300, seed=4))
    pd.testing.assert_frame_equal(values[0], values[1])
    pd.testing.assert_frame_equal(values[0], values[2])


def test_bootstrap_is_as_wide_as_the_standard_error():
    log, target, q = random_log(5, 3000)
    terms = {k: e.terms(weigh(log, target, q)) for k, e in ESTIMATORS.items()}
    tables = {k: value_intervals(terms, k, 2000).set_index("estimator") for k in INTERVALS}
    width = {k: t["high"] - t["low"] for k, t in tables.items()}
    assert ((width["bootstrap"] / width["t"]).sub(1).abs() < 0.12).all()
    plain = ["dm", "ips", "clipped_ips", "dr", "switch_dr", "dros", "mips"]
    assert (width["bernstein"] > width["t"])[plain].all()
    assert width["hoeffding"][["snips", "sndr"]].isna().all()


@pytest.mark.parametrize("interval", ["bootstrap", "t"])
def test_intervals_cover_where_weights_are_mild(interval):
    "150 logs of a world whose value is known; a binomial with p = 0.95 is below 0.89 once in a thousand"
    rng, names = np.random.default_rng(7), ["ips", "snips", "dr", "sndr"]
    chance, target, worth = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5]), [0.2, 0.5, 0.7]
    inside = []
    for _ in range(150):
        action = rng.choice(3, 400, p=chance)
        reward = (rng.random(400) < np.take(worth, action)) * 1.0
        rounds = weigh(
            BanditLog(action, reward, chance[action], n_actions=3), target, [0.5, 0.5, 0.5]
        )
        terms = {k: ESTIMATORS[k].terms(rounds) for k in names}
        table = value_intervals(terms, interval, 400, seed=len(inside))
        inside.append(table["low"].le(target @ worth) & table["high"].ge(target @ worth))
    assert (pd.DataFrame(inside).mean() >= 0.89).all()


def test_bounds_contain_every_term():
    for seed in range(20):
        log, target, q = random_log(seed)
        rounds = weigh(log, target, q)
        for name, e in ESTIMATORS.items():
            for form in (e, e(0.7), e(5.0)) if e.setting is not None else (e,):
                t = form.terms(rounds)
                if not e.normalised:
                    assert (
                        t.low - 1e-9 <= t.numerator.min() <= t.numerator.max() <= t.high + 1e-9
                    ), name


# Diagnosis

PLANTED = {
    "no overlap": lambda log, p: (
        replace(log, n_actions=M + 1, action_ids=None, action_context=None), np.eye(M + 1)[M]
    ),
    "wrong weights": lambda log, p: (replace(log, propensity=log.propensity / 2), p),
    "wrong propensities": lambda log, p: (replace(log, propensity=np.full(len(log), 0.1)), p),
}  # fmt: skip


def clean(n: int = 4000) -> tuple[BanditLog, np.ndarray]:
    rng = np.random.default_rng(0)
    kinds = np.arange(M)[:, None] % 2
    log = BanditLog(rng.integers(0, M, n), rng.random(n), np.full(n, 1 / M), action_context=kinds)
    return log, np.array([0.3, 0.25, 0.2, 0.15, 0.1])


@pytest.mark.parametrize("name", PLANTED)
def test_planted_faults_are_named(name):
    log, policy = clean()
    assert not diagnose(log, policy).warnings
    assert name in diagnose(*PLANTED[name](log, policy)).warnings


def test_a_short_log_is_named():
    "Open Bandit's clicks, asked about the policy that Thompson sampling was not"
    from_frame, names = BanditLog.from_frame, {"action": "item_id", "reward": "click"}
    names |= {"propensity": "propensity_score", "position": "position"}
    bts, chance = (from_frame(load_bandit(k, "men"), **names) for k in ("bts", "random"))
    warned = estimate(bts, uniform_policy, q=np.zeros(bts.n_actions), resamples=20)
    warned = warned.set_index("estimator")["warnings"]
    assert "short log" in warned["ips"] and "short log" not in warned["dm"]
    assert "short log" not in diagnose(chance, uniform_policy).warnings
    assert (
        "short log" in diagnose(replace(chance, reward=0 * chance.reward), uniform_policy).warnings
    )


def test_bounds_know_the_rarest_action():
    "A log without the rare action has the range that the logging policy tells, if it is known"
    told = BanditLog([0] * 9, [0, 1, 1] * 3, [0.99] * 9, n_actions=2, logging=[0.99, 0.01])
    untold = replace(told, logging=None)
    high = [ESTIMATORS["ips"].terms(weigh(log, [0, 1])).high for log in (told, untold)]
    assert high == pytest.approx([100, 1 / 0.99])


def test_heavy_weights_are_named():
    rng = np.random.default_rng(1)
    rare = rng.random(5000) < 0.001
    log = BanditLog(rare * 1, rng.random(5000), np.where(rare, 0.001, 0.999))
    found = estimate(log, [0.2, 0.8], q=[0.5, 0.5], resamples=50).set_index("estimator")["warnings"]
    assert "heavy weights" in found["ips"]
    assert "heavy weights" not in found["dm"]


# A recommender


def test_a_recommender_is_a_policy():
    "EASE on MovieLens-100K judged by rounds in which chance showed one of fifty films"
    train, rng = load_dataset("ml100k"), np.random.default_rng(0)
    films = train.item_ids[np.argsort(-train.item_counts())[:50]]
    people, n = train.user_ids[rng.integers(0, train.n_users, 3000)], 3000
    liked = set(zip(train.user_ids[train.user], train.item_ids[train.item], strict=True))
    shown = films[rng.integers(0, 50, n)]
    frame = pd.DataFrame({"user": people, "item": shown, "p": 1 / 50})
    frame["seen"] = [float(pair in liked) for pair in zip(people, shown, strict=True)]
    log = BanditLog.from_frame(
        frame, action="item", reward="seen", propensity="p", actions=pd.DataFrame({"item": films})
    )
    model = EASE(lam=500).fit(train)
    policy = recommender_policy(model, log.action_ids, users=people, temperature=0.1)
    table = estimate(log, policy, resamples=200).set_index("estimator")
    assert table.loc["snips", "low"] > log.reward.mean(), "it has seen what it predicts"
    scores = model.score(np.flatnonzero(train.user_ids == people[7]))[0]
    codes = pd.Index(train.item_ids).get_indexer(films)
    assert np.allclose(probabilities(policy, log)[7], softmax_policy(scores[codes], 0.1), atol=1e-6)
