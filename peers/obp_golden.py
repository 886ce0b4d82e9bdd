"""Estimates of Open Bandit Pipeline on small logs, written to tests/golden/obp_estimates.json.

Runs in an environment of its own (`make golden`); imports nothing of recsys_lab. Inputs are short decimals or
fractions of 64, so that the file holds them exactly; outputs keep all digits.
"""

import argparse
import json
import logging
import warnings
from itertools import permutations
from pathlib import Path

import numpy as np
import obp
from obp.dataset import OpenBanditDataset, SyntheticBanditDataset, logistic_reward_function
from obp.ope import (
    DirectMethod,
    DoublyRobust,
    DoublyRobustWithShrinkage,
    InverseProbabilityWeighting,
    MarginalizedInverseProbabilityWeighting,
    RegressionModel,
    SelfNormalizedDoublyRobust,
    SelfNormalizedInverseProbabilityWeighting,
    SelfNormalizedSlateIndependentIPS,
    SelfNormalizedSlateRewardInteractionIPS,
    SelfNormalizedSlateStandardIPS,
    SlateCascadeDoublyRobust,
    SlateIndependentIPS,
    SlateRewardInteractionIPS,
    SlateStandardIPS,
    SwitchDoublyRobust,
)
from obp.policy import BernoulliTS, IPWLearner
from sklearn.linear_model import LogisticRegression

PARTS = 64  # Probabilities are whole parts of this


def shares(rng, n, k):
    "n distributions over k, every entry at least one part of 64"
    even = np.full(k, 1 / k)
    drawn = [
        rng.multinomial(PARTS - k, rng.dirichlet(np.ones(k)) * 0.8 + even * 0.2) for _ in range(n)
    ]
    return (np.array(drawn) + 1) / PARTS


def bandit_log(rng, n, k, positions, rewards):
    "A log with a logging policy, a target policy and predictions, at each row's own position"
    pi_b, pi_e = shares(rng, n, k), shares(rng, n, k)
    action = np.array([rng.choice(k, p=p) for p in pi_b])
    reward = rng.integers(0, 2, n) if rewards == "binary" else rng.integers(-200, 500, n) / 100
    return {
        "action": action,
        "reward": reward.astype(float),
        "propensity": pi_b[np.arange(n), action],
        "position": rng.integers(0, positions, n),
        "logging": pi_b,
        "policy": pi_e,
        "q": rng.integers(0, PARTS + 1, (n, k)) / PARTS,
        "group": np.arange(k) % 3,
    }


def at_positions(table, position):
    "A table as OBP takes it, shape (n, k, positions); uniform where the row does not stand"
    n, k = table.shape
    full = np.full((n, k, position.max() + 1), 1 / k)
    full[np.arange(n), :, position] = table
    return full


def estimates(log):
    "Every estimator on one log"
    given = {
        "reward": log["reward"],
        "action": log["action"],
        "position": log["position"],
        "pscore": log["propensity"],
        "action_dist": at_positions(log["policy"], log["position"]),
        "estimated_rewards_by_reg_model": at_positions(log["q"], log["position"]),
    }
    k = log["q"].shape[1]
    of_group = np.eye(3)[log["group"]][:, :, None]
    out = {
        "dm": DirectMethod(),
        "ips": InverseProbabilityWeighting(),
        "snips": SelfNormalizedInverseProbabilityWeighting(),
        "dr": DoublyRobust(),
        "sndr": SelfNormalizedDoublyRobust(),
    }
    out |= {f"clipped_ips {c}": InverseProbabilityWeighting(lambda_=c) for c in (0.5, 2, 8)}
    out |= {f"switch_dr {t}": SwitchDoublyRobust(lambda_=t) for t in (0.5, 2, 8)}
    out |= {f"dros {t}": DoublyRobustWithShrinkage(lambda_=t) for t in (0.5, 5, 100)}
    values = {name: e.estimate_policy_value(**given) for name, e in out.items()}
    values["mips"] = MarginalizedInverseProbabilityWeighting(n_actions=k).estimate_policy_value(
        reward=log["reward"],
        action=log["action"],
        action_embed=log["group"][log["action"]][:, None],
        pi_b=at_positions(log["logging"], log["position"]),
        action_dist=given["action_dist"],
        position=log["position"],
        p_e_a=of_group,
    )
    return values


def plackett_luce(weight, slate):
    "Chances of each choice given those before it, and of each item at each place at all"
    k, length = len(weight), len(slate)
    marginal = np.zeros((length, k))
    for order in permutations(range(k), length):
        left, chance = weight.sum(), 1.0
        for item in order:
            chance, left = chance * weight[item] / left, left - weight[item]
        marginal[np.arange(length), list(order)] += chance
    steps, each = np.zeros((length, k)), np.zeros(length)
    free = np.ones(k, bool)
    for place, item in enumerate(slate):
        steps[place, free] = weight[free] / weight[free].sum()
        each[place], free[item] = steps[place, item], False
    return {
        "steps": steps,
        "cascade": each.cumprod(),
        "marginal": marginal[np.arange(length), slate],
    }


def slate_log(rng, n, k, length):
    "Slates without repetition, of Plackett-Luce policies with whole weights"
    logging, policy = rng.integers(1, 9, (n, k)), rng.integers(1, 9, (n, k))
    slates = [rng.choice(k, length, replace=False, p=w / w.sum()) for w in logging]
    b = [plackett_luce(w, s) for w, s in zip(logging, slates, strict=True)]
    e = [plackett_luce(w, s) for w, s in zip(policy, slates, strict=True)]
    out = {
        "action": np.array(slates),
        "reward": rng.integers(0, 2, (n, length)).astype(float),
        "logging_weight": logging,
        "policy_weight": policy,
        "q": rng.integers(0, PARTS + 1, (n, length, k)) / PARTS,
    }
    for name, found in (("logging", b), ("policy", e)):
        out |= {
            f"{name}_{key}": np.array([f[key] for f in found]) for key in ("cascade", "marginal")
        }
    return out | {"policy_steps": np.array([f["steps"] for f in e])}


def slate_estimates(log):
    "Every slate estimator"
    n, length, k = log["q"].shape
    flat = {key: log[key].ravel() for key in log if log[key].shape == (n, length)}
    whole = {who: np.repeat(log[f"{who}_cascade"][:, -1], length) for who in ("logging", "policy")}
    rows = {
        "slate_id": np.repeat(np.arange(n), length),
        "position": np.tile(np.arange(length), n),
        "reward": flat["reward"],
    }
    joint = {"pscore": whole["logging"], "evaluation_policy_pscore": whole["policy"]}
    single = {
        "pscore_item_position": flat["logging_marginal"],
        "evaluation_policy_pscore_item_position": flat["policy_marginal"],
    }
    cascade = {
        "pscore_cascade": flat["logging_cascade"],
        "evaluation_policy_pscore_cascade": flat["policy_cascade"],
    }
    kinds = {
        "sips": (SlateStandardIPS, joint),
        "iips": (SlateIndependentIPS, single),
        "rips": (SlateRewardInteractionIPS, cascade),
        "snsips": (SelfNormalizedSlateStandardIPS, joint),
        "sniips": (SelfNormalizedSlateIndependentIPS, single),
        "snrips": (SelfNormalizedSlateRewardInteractionIPS, cascade),
    }
    values = {
        n_: c(len_list=length).estimate_policy_value(**rows, **g) for n_, (c, g) in kinds.items()
    }
    values["cascade_dr"] = SlateCascadeDoublyRobust(
        len_list=length, n_unique_action=k
    ).estimate_policy_value(
        action=flat["action"],
        q_hat=log["q"].ravel(),
        evaluation_policy_action_dist=log["policy_steps"].ravel(),
        **rows,
        **cascade,
    )
    return values


def logistic():
    "The reward model and the learner's classifier of OBP's examples"
    return LogisticRegression(C=100, max_iter=10_000, random_state=12345)


def world(seed, rounds, actions, dim, beta):
    "The first rounds that OBP's synthetic data set draws, and what its example does with them"
    data = SyntheticBanditDataset(
        n_actions=actions,
        dim_context=dim,
        reward_function=logistic_reward_function,
        beta=beta,
        random_state=seed,
    )
    train, test = (data.obtain_batch_bandit_feedback(n_rounds=rounds) for _ in range(2))
    learner = IPWLearner(n_actions=actions, base_classifier=logistic())
    learner.fit(**{k: train[k] for k in ("context", "action", "reward", "pscore")})
    policy = learner.predict_proba(context=test["context"])
    q = RegressionModel(
        n_actions=actions, action_context=data.action_context, base_model=logistic()
    ).fit_predict(
        **{k: test[k] for k in ("context", "action", "reward")}, n_folds=3, random_state=12345
    )
    given = {"reward": test["reward"], "action": test["action"], "pscore": test["pscore"]}
    given |= {"action_dist": policy, "estimated_rewards_by_reg_model": q}
    kinds = {"dm": DirectMethod(), "ips": InverseProbabilityWeighting(), "dr": DoublyRobust()}
    first = slice(0, 5)
    return {
        "settings": {
            "n_actions": actions,
            "dim": dim,
            "beta": beta,
            "seed": seed,
            "rounds": rounds,
        },
        "context": test["context"][first],
        "action": test["action"],
        "reward": test["reward"],
        "propensity": test["pscore"][first],
        "expected": test["expected_reward"][first],
        "policy": policy[first, :, 0],
        "q": q[first, :, 0],
        "value": data.calc_ground_truth_policy_value(test["expected_reward"], policy),
        "estimates": {k: e.estimate_policy_value(**given) for k, e in kinds.items()},
    }


def open_bandit(simulations):
    "Thompson sampling of the shop, and one resampled log judged as in OBP's example"
    shop = OpenBanditDataset(behavior_policy="random", campaign="all")
    sampler = BernoulliTS(
        n_actions=80, len_list=3, random_state=12345, is_zozotown_prior=True, campaign="all"
    )
    dist = sampler.compute_batch_action_dist(n_sim=simulations)
    log = shop.sample_bootstrap_bandit_feedback(random_state=0)
    q = RegressionModel(
        n_actions=80, len_list=3, action_context=shop.action_context, base_model=logistic()
    ).fit_predict(
        **{k: log[k] for k in ("context", "action", "reward", "position", "pscore")},
        n_folds=3,
        random_state=12345,
    )
    first = slice(0, 3)
    return {
        "simulations": simulations,
        "counts": np.rint(dist[0].T * simulations).astype(int),
        "truth": OpenBanditDataset.calc_on_policy_policy_value_estimate("bts", "all"),
        "first": {k: log[k][first] for k in ("action", "position", "reward", "pscore", "context")},
        "q": q[np.arange(3), :, log["position"][first]],
    }


def plain(value):
    "Arrays and numbers as JSON takes them; whole numbers without a fraction"
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | np.ndarray):
        return [plain(v) for v in value]
    if isinstance(value, str):
        return value
    return int(value) if float(value).is_integer() else float(value)


def main():
    "Make the logs, estimate, write"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("tests/golden/obp_estimates.json"))
    parser.add_argument("--simulations", type=int, default=200_000)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    rng = np.random.default_rng(7)
    logs = {
        "binary": bandit_log(rng, 300, 6, 1, "binary"),
        "positions": bandit_log(rng, 300, 6, 3, "real"),
    }
    slates = slate_log(rng, 100, 4, 3)
    golden = {
        "obp": obp.__version__,
        "logs": {name: log | {"estimates": estimates(log)} for name, log in logs.items()},
        "slates": slates | {"estimates": slate_estimates(slates)},
        "worlds": [world(seed, 600, 6, 3, -3.0) for seed in (0, 1)],
        "open_bandit": open_bandit(args.simulations),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(plain(golden), separators=(",", ":")) + "\n")
    print(f"{args.out}: {args.out.stat().st_size:,} bytes, obp {obp.__version__}")


if __name__ == "__main__":
    main()
