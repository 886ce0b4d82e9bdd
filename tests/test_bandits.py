"Bandits say their chances, learn in batches as they would one by one, and leave logs that judge others"

from functools import partial

import numpy as np
import pandas as pd
import pytest

from recsys_lab.causal.bandits import frozen, replay
from recsys_lab.causal.log import BanditLog
from recsys_lab.causal.policies import probabilities
from recsys_lab.data.bandit_world import BanditWorld
from recsys_lab.evaluation.intervals import bootstrap
from recsys_lab.ranking.bandits import UCB1, EpsilonGreedy, LinearThompson, LinUCB, Thompson, run

A, D = 4, 3
MAKERS = {
    "epsilon": partial(EpsilonGreedy, A),
    "ucb1": partial(UCB1, A),
    "thompson": partial(Thompson, A, draws=100),
    "linucb": partial(LinUCB, A, D),
    "linear thompson": partial(LinearThompson, A, D, draws=50),
}
ALL = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


@pytest.fixture(scope="module")
def rounds():
    "Contexts, actions and rewards"
    rng = np.random.default_rng(0)
    return rng.normal(size=(60, D)), rng.integers(0, A, 60), (rng.random(60) < 0.4) * 1.0


@ALL
def test_chances_are_distributions(make, rounds):
    "Before the first round and after; and they depend on the state alone"
    for bandit in (make(), make().update(*rounds)):
        p = bandit.chances(rounds[0])
        assert p.shape == (60, A) and (p >= 0).all()
        assert np.allclose(p.sum(1), 1)
        parts = [bandit.chances(rounds[0][i : i + 7]) for i in range(0, 60, 7)]
        assert np.allclose(np.concatenate(parts), p)


@pytest.mark.parametrize("name", ["ucb1", "linucb"])
def test_the_largest_index_is_certain(name, rounds):
    p = MAKERS[name]().update(*rounds).chances(rounds[0])
    assert set(np.unique(p)) == {0.0, 1.0}


@ALL
def test_one_batch_is_all_its_rounds(make, rounds):
    x, a, r = rounds
    whole, single = make().update(x, a, r), make()
    for i in range(60):
        single.update(x[i : i + 1], a[i : i + 1], r[i : i + 1])
    assert np.allclose(whole.chances(x), single.chances(x))
    assert np.array_equal(whole.count, np.bincount(a, minlength=A))


@ALL
def test_an_empty_batch_teaches_nothing(make, rounds):
    x, a, r = rounds
    bandit = make().update(x, a, r)
    before = bandit.chances(x)
    bandit.update(x[:0], a[:0], r[:0])
    assert np.array_equal(bandit.chances(x), before)


def test_ridge_by_recursion(rounds):
    "Sherman and Morrison, a round at a time"
    x, a, r = rounds
    inverse, moment = np.eye(D + 1), np.zeros(D + 1)
    for row, reward in zip(np.c_[np.ones(60), x][a == 2], r[a == 2], strict=True):
        step = inverse @ row
        inverse -= np.outer(step, step) / (1 + row @ step)
        moment += reward * row
    bandit = LinUCB(A, D, alpha=0.5).update(x, a, r)
    one = np.r_[1, x[0]]
    assert np.allclose(bandit.coefficients()[2], inverse @ moment)
    upper = one @ inverse @ moment + 0.5 * np.sqrt(one @ inverse @ one)
    assert np.isclose(bandit.index(x[:1])[0, 2], upper)


def test_ucb1_by_recursion(rounds):
    "A round at a time in a world, beside a loop that keeps two lists"
    world = BanditWorld(n_actions=A, dim=D, seed=3)
    log, _ = run(UCB1(A), world, 80, batch=1)
    count, total = [0] * A, [0.0] * A
    for t, (action, reward) in enumerate(zip(log["action"], log["reward"], strict=True)):
        if 0 in count:
            assert count[action] == 0
        else:
            upper = [total[i] / count[i] + np.sqrt(2 * np.log(t) / count[i]) for i in range(A)]
            assert np.isclose(upper[action], max(upper))
        count[action] += 1
        total[action] += reward


@ALL
def test_seeds(make):
    world = BanditWorld(n_actions=A, dim=D)
    play = lambda seed: run(make(), world, 200, seed=seed)
    (one, regret), (same, again), (other, _) = play(0), play(0), play(1)
    assert np.array_equal(one["action"], same["action"]) and np.array_equal(regret, again)
    assert not np.array_equal(one["reward"], other["reward"])
    assert np.allclose(BanditLog(**one).propensity, one["logging"][np.arange(200), one["action"]])


def test_two_bandits_meet_the_same_visitors():
    world = BanditWorld(n_actions=A, dim=D)
    one, two = (run(MAKERS[k](), world, 100)[0] for k in ("ucb1", "thompson"))
    assert np.array_equal(one["context"], two["context"])
    alike = one["action"] == two["action"]
    assert np.array_equal(one["reward"][alike], two["reward"][alike])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: EpsilonGreedy(A, epsilon=1.5), "epsilon must be a number from 0 to 1"),
        (lambda: UCB1(0), "n_actions must be a whole number of at least 1"),
        (lambda: Thompson(A, good=0), "good must be a number above 0"),
        (lambda: LinUCB(A, D, reg=0), "reg must be a number above 0"),
        (lambda: LinearThompson(A, D, draws=2.5), "draws must be a whole number"),
        (lambda: Thompson(A, seed=0.5), "seed must be a whole number of at least 0"),
        (lambda: LinUCB(A, D).chances(np.zeros((2, D + 1))), "LinUCB needs"),
        (lambda: LinUCB(A, D).update(np.zeros((1, D)), [A], [1]), "codes from 0 to 3"),
        (lambda: UCB1(A).update(np.zeros((1, D)), [-1], [1]), "codes from 0 to 3"),
        (lambda: UCB1(A).update(np.zeros((1, D)), [0], [np.nan]), "outside 0 to 1 in 1 of 1"),
        (lambda: UCB1(A).update(np.zeros((1, D)), [0, 1], [1, 0]), "as many actions and rewards"),
        (lambda: run(UCB1(A), BanditWorld(n_actions=A), batch=0), "batch must be"),
        (lambda: run(UCB1(A), BanditWorld(n_actions=A + 1)), "has 4 actions, the world 5"),
        (lambda: replay(UCB1(A), BanditLog([0, 1], [1, 0], [0.5, 0.5])), "has 4 actions, the log"),
    ],
)
def test_refusals(wrong, words):
    with pytest.raises(ValueError, match=words):
        wrong()


def test_thompson_learns_where_contexts_do_not_matter():
    "Ten worlds of one context each: less regret than chance, and ever less"
    worlds = [BanditWorld(n_actions=A, dim=D, types=1, seed=s) for s in range(10)]
    own = np.array([run(Thompson(A, draws=200), w, 1000)[1] for w in worlds])
    chance = np.array([run(EpsilonGreedy(A, epsilon=1.0), w, 1000)[1] for w in worlds])
    table = pd.DataFrame(
        {
            "saved": chance.sum(1) - own.sum(1),
            "slower": own[:, :300].mean(1) - own[:, -300:].mean(1),
        }
    )
    assert (bootstrap(table)["low"] > 0).all()


def test_a_log_that_learned_judges_what_another_learned():
    "Weighted by the chance of each round, with no more error than its standard error allows"
    world = BanditWorld(n_actions=A, dim=D, types=8, seed=5)
    learner = LinUCB(A, D)
    run(learner, world, 1000, seed=1)
    policy, error = frozen(learner), []
    for seed in range(10):
        log = BanditLog(**run(EpsilonGreedy(A, epsilon=0.4), world, 1500, seed=10 + seed)[0])
        terms = probabilities(policy, log)[np.arange(1500), log.action] / log.propensity
        truth = world.value(learner.chances)
        error.append(((terms * log.reward).mean() - truth) / (terms * log.reward).std() * 1500**0.5)
    assert np.abs(error).max() < 4 and abs(np.mean(error)) < 4 / np.sqrt(10)


def test_replay_keeps_what_would_have_been_shown():
    world = BanditWorld(n_actions=A, dim=D)
    log = BanditLog(**run(EpsilonGreedy(A, epsilon=1.0), world, 2000)[0])
    bandit = LinUCB(A, D)
    rows = replay(bandit, log, batch=1)
    assert (np.diff(rows) > 0).all() and bandit.count.sum() == len(rows)
    by_hand, kept = LinUCB(A, D), []
    for i in range(300):
        p = by_hand.chances(log.context[i : i + 1])[0]
        if p[log.action[i]] == 1:
            kept.append(i)
            by_hand.update(log.context[i : i + 1], log.action[i : i + 1], log.reward[i : i + 1])
        elif p[log.action[i]] > 0:
            assert p.max() < 1
            if i in rows:
                kept.append(i)
                by_hand.update(log.context[i : i + 1], log.action[i : i + 1], log.reward[i : i + 1])
    assert np.array_equal(kept, rows[rows < 300])
