"""Estimates equal those of Open Bandit Pipeline, kept in a file: nothing of it is needed here (peers/README.md)."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression

from recsys_lab.causal.estimators import ESTIMATORS, weigh
from recsys_lab.causal.learning import IPWLearner
from recsys_lab.causal.log import BanditLog
from recsys_lab.causal.open_bandit import open_bandit, shop_policy
from recsys_lab.causal.reward_model import fit_reward_model
from recsys_lab.causal.slates import SLATES, SlateLog, slate_terms
from recsys_lab.data.bandit_world import BanditWorld

GOLDEN = json.loads((Path(__file__).parent / "golden" / "obp_estimates.json").read_text())
LOGISTIC = {"C": 100, "max_iter": 10_000}


def bandit_log(name: str) -> tuple[BanditLog, dict]:
    "A log of the file, and everything else that stands there"
    g = GOLDEN["logs"][name]
    features = np.eye(3)[g["group"]]
    log = BanditLog(
        action=np.array(g["action"]),
        reward=np.array(g["reward"], float),
        propensity=np.array(g["propensity"]),
        position=np.array(g["position"]),
        logging=np.array(g["logging"]),
        action_context=features,
    )
    return log, g


@pytest.mark.parametrize("name", GOLDEN["logs"])
def test_estimates_are_those_of_obp(name):
    log, g = bandit_log(name)
    rounds = weigh(log, np.array(g["policy"]), np.array(g["q"]))
    assert {k.split()[0] for k in g["estimates"]} == set(ESTIMATORS)
    for key, theirs in g["estimates"].items():
        kind, *setting = key.split()
        e = ESTIMATORS[kind](float(setting[0])) if setting else ESTIMATORS[kind]
        assert e.terms(rounds).value == pytest.approx(theirs, abs=1e-9), key


def test_estimates_without_positions_are_the_same():
    log, g = bandit_log("binary")
    plain = BanditLog(log.action, log.reward, log.propensity)
    rounds = weigh(plain, np.array(g["policy"]), np.array(g["q"]))
    for kind in ("dm", "ips", "snips", "dr", "sndr"):
        assert ESTIMATORS[kind].terms(rounds).value == pytest.approx(g["estimates"][kind], abs=1e-9)


def conditional(cascade: list) -> np.ndarray:
    "Chances of each choice given those above, from those of all choices so far"
    c = np.array(cascade)
    return c / np.c_[np.ones(len(c)), c[:, :-1]]


def test_slate_estimates_are_those_of_obp():
    g = GOLDEN["slates"]
    action, q = np.array(g["action"]), np.array(g["q"])
    log = SlateLog(
        reward=g["reward"],
        logging=conditional(g["logging_cascade"]),
        policy=conditional(g["policy_cascade"]),
        logging_marginal=g["logging_marginal"],
        policy_marginal=g["policy_marginal"],
        q=np.take_along_axis(q, action[:, :, None], 2)[:, :, 0],
        q_policy=(q * np.array(g["policy_steps"])).sum(2),
    )
    assert set(g["estimates"]) == set(SLATES)
    for name, theirs in g["estimates"].items():
        assert slate_terms(log, name).value == pytest.approx(theirs, abs=1e-9), name


@pytest.mark.parametrize("g", GOLDEN["worlds"], ids=lambda g: f"seed {g['settings']['seed']}")
def test_world_is_the_one_of_obp(g):
    settings = {**g["settings"]}
    rounds = settings.pop("rounds")
    world = BanditWorld(scale="log", **settings)
    train, test = world.logs(rounds, rounds)
    assert test["action"].tolist() == g["action"] and test["reward"].tolist() == g["reward"]
    np.testing.assert_allclose(test["context"][:5], g["context"], atol=1e-12)
    np.testing.assert_allclose(test["propensity"][:5], g["propensity"], atol=1e-12)
    np.testing.assert_allclose(world.expected(test["context"])[:5], g["expected"], atol=1e-12)
    learner = IPWLearner(LogisticRegression(**LOGISTIC)).fit(BanditLog(**train))
    log = BanditLog(**test)
    policy = softmax(learner.predict(log), axis=1)
    q = fit_reward_model(log, model=LogisticRegression(**LOGISTIC), seed=12345)
    np.testing.assert_allclose(policy[:5], g["policy"], atol=1e-4)
    np.testing.assert_allclose(q[:5], g["q"], atol=1e-4)
    assert world.value(policy, log.context) == pytest.approx(g["value"], abs=1e-4)
    rows = weigh(log, policy, q)
    for kind, theirs in g["estimates"].items():
        assert ESTIMATORS[kind].terms(rows).value == pytest.approx(theirs, abs=1e-4), kind


def test_thompson_sampling_is_the_shops():
    g = GOLDEN["open_bandit"]
    theirs, ours = np.array(g["counts"]) / g["simulations"], shop_policy()
    error = np.sqrt(np.maximum(ours * (1 - ours), 1e-9) / g["simulations"])
    often = ours > 1e-4
    assert np.abs(theirs - ours).max() < 0.002
    assert 0.6 < np.mean(((theirs - ours) / error)[often] ** 2) < 1.4


def test_open_bandit_is_read_and_modelled_as_by_obp():
    g, whole = GOLDEN["open_bandit"], open_bandit()
    drawn = np.random.RandomState(0).choice(np.arange(len(whole)), size=len(whole))
    log = whole.take(drawn)
    first = {k: v[:3] for k, v in vars(log).items() if k in ("action", "position", "context")}
    for column, values in first.items():
        assert values.tolist() == g["first"][column]
    q = fit_reward_model(log, model=LogisticRegression(**LOGISTIC), seed=12345)
    np.testing.assert_allclose(q[:3], g["q"], rtol=1e-4)
    assert open_bandit("bts").reward.mean() == pytest.approx(g["truth"])
