"Estimates of slates: equal to Open Bandit Pipeline's, and right where their assumption holds"

import json
from pathlib import Path

import numpy as np
import pytest

from recsys_lab.causal.slates import SLATES, SlateLog, estimate_slates, slate_terms
from recsys_lab.data.slate_world import SlateWorld, steps, taken

FILE = Path(__file__).parent / "golden/obp_estimates.json"
GOLDEN = {k: np.asarray(v) for k, v in json.loads(FILE.read_text())["slates"].items()}
ESTIMATES = GOLDEN.pop("estimates").item()


def each(cumulative: np.ndarray) -> np.ndarray:
    "Chances step by step from those of whole beginnings"
    first = np.ones((len(cumulative), 1))
    return cumulative / np.concatenate([first, cumulative[:, :-1]], axis=1)


def golden_log() -> SlateLog:
    q, action = GOLDEN["q"], GOLDEN["action"]
    return SlateLog(
        GOLDEN["reward"],
        each(GOLDEN["logging_cascade"]),
        each(GOLDEN["policy_cascade"]),
        GOLDEN["logging_marginal"],
        GOLDEN["policy_marginal"],
        taken(q, action),
        (GOLDEN["policy_steps"] * q).sum(2),
    )


def test_the_file_holds_every_estimator():
    assert set(ESTIMATES) == set(SLATES)


@pytest.mark.parametrize("name", SLATES)
def test_equal_to_the_reference(name):
    assert slate_terms(golden_log(), name).value == pytest.approx(ESTIMATES[name], abs=1e-9, rel=0)


def test_steps_are_the_reference_policies():
    for which in ("logging", "policy"):
        chance = steps(np.log(GOLDEN[f"{which}_weight"]), GOLDEN["action"])
        made = np.cumprod(taken(chance, GOLDEN["action"]), axis=1)
        assert np.abs(made - GOLDEN[f"{which}_cascade"]).max() < 1e-12


def test_order_of_slates_changes_nothing():
    log, order = golden_log(), np.random.default_rng(0).permutation(100)
    mixed = SlateLog(**{k: v[order] for k, v in vars(log).items()})
    for name in SLATES:
        assert slate_terms(mixed, name).value == pytest.approx(
            slate_terms(log, name).value, abs=1e-12
        )


@pytest.mark.parametrize("reward", ["independent", "cascade", "standard"])
def test_the_logging_policy_is_worth_what_it_earned(reward):
    "Judged by its own log all weights are one, whoever changes whom"
    world = SlateWorld(n_items=5, length=2, types=3, reward=reward, seed=1)
    log = world.log(2000)
    chance = taken(steps(world.logits()[log["kind"]], log["action"]), log["action"])
    table = estimate_slates(SlateLog(log["reward"], chance, chance), resamples=200)
    assert np.allclose(table.value, log["reward"].sum(1).mean())
    assert (table.low < world.value(world.logits())).all()
    assert (table.high > world.value(world.logits())).all()


@pytest.mark.parametrize("reward", ["independent", "cascade", "standard"])
def test_the_whole_slate_is_right_in_every_world(reward):
    "Another policy than the one that logged: the mean error of SIPS is within what chance explains"
    world = SlateWorld(n_items=5, length=2, types=3, reward=reward, strength=3.0, greed=0, seed=3)
    log, other = world.log(40_000), world.logits(-2.0)
    before, after = (
        taken(steps(f[log["kind"]], log["action"]), log["action"]) for f in (world.logits(), other)
    )
    terms = slate_terms(SlateLog(log["reward"], before, after), "sips").numerator[:, 0]
    gap, error = terms.mean() - world.value(other), terms.std() / np.sqrt(len(terms))
    assert abs(gap) < 4 * error
    assert abs(log["reward"].sum(1).mean() - world.value(other)) > 10 * error, "weights matter"
