"""Seconds to judge a policy by nine estimators with a thousand resamples, beside numpy's bootstrap alone.

    python benchmark/off_policy.py --rounds 250000 500000 1000000 --repeats 3

Each measurement runs in a process of its own; the medians are printed as one JSON line a size:
{"rounds", "actions", "ours_s", "numpy_s", "ratio", "peak_mb", ...}. Ours is `estimate` on a log that is in memory,
with the policy and the model's predictions as float32 tables of a hundred actions: weights, settings, values,
intervals and diagnosis. numpy is given the finished terms of the same estimators and only resamples them: rounds
drawn by index, once for all estimators. Compiling and importing are not counted.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import numpy as np
from preparation import peak_mb


def case(rounds: int, actions: int) -> tuple:
    "A log, a policy that depends on the context, and predictions; tables are filled in blocks"
    from recsys_lab.causal.log import BanditLog

    rng = np.random.default_rng(0)
    chance = rng.dirichlet(np.ones(actions)) / 2 + 0.5 / actions
    action = rng.choice(actions, rounds, p=chance).astype(np.int32)
    policy, q = (np.empty((rounds, actions), np.float32) for _ in range(2))
    for start in range(0, rounds, 20_000):
        some = slice(start, start + 20_000)
        rng.standard_exponential(out=policy[some], dtype=np.float32)
        policy[some] /= policy[some].sum(1, keepdims=True)
        rng.random(out=q[some], dtype=np.float32)
    reward = (rng.random(rounds) < 0.05) * 1.0
    kinds = np.arange(actions)[:, None] % 10
    return BanditLog(action, reward, chance[action], action_context=kinds), policy, q


def ours(rounds: int, actions: int, resamples: int) -> float:
    "Seconds of everything"
    from recsys_lab.causal.estimate import estimate

    log, policy, q = case(1000, actions)
    estimate(log, policy, q=q, resamples=300)
    log, policy, q = case(rounds, actions)
    start = time.perf_counter()
    table = estimate(log, policy, q=q, resamples=resamples)
    seconds = time.perf_counter() - start
    if len(table) != 9 or not np.isfinite(table[["value", "low", "high"]]).all(axis=None):
        raise SystemExit(f"an estimate is missing:\n{table}")
    return seconds


def numpy(rounds: int, actions: int, resamples: int) -> float:
    "Seconds of the bootstrap alone, as it is usually written"
    from recsys_lab.causal.estimators import ESTIMATORS, weigh

    every = weigh(*case(rounds, actions))
    terms = {k: e.terms(every) for k, e in ESTIMATORS.items()}
    start = time.perf_counter()
    rng, values = np.random.default_rng(0), {k: [] for k in terms}
    for _ in range(resamples):
        drawn = rng.integers(0, rounds, rounds)
        for k, t in terms.items():
            ratio = t.numerator[drawn].sum(0) / t.denominator[drawn].sum(0)
            values[k].append(ratio.sum())
    for each in values.values():
        np.quantile(each, [0.025, 0.975])
    return time.perf_counter() - start


def measure(kind: str, args, rounds: int) -> dict:
    "One measurement in a new process"
    limits = {f"{k}_THREADS": str(args.threads) for k in ("NUMBA_NUM", "OMP_NUM", "OPENBLAS_NUM")}
    sizes = map(str, (rounds, args.actions, args.resamples))
    command = [sys.executable, __file__, "--one", kind, *sizes]
    done = subprocess.run(command, env=os.environ | limits, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def compare(args, rounds: int) -> dict:
    "Medians of ours, and one run of numpy"
    runs = [measure("ours", args, rounds) for _ in range(args.repeats)]
    row = {"rounds": rounds, "actions": args.actions, "resamples": args.resamples}
    row["ours_s"] = round(statistics.median(r["seconds"] for r in runs), 3)
    row["peak_mb"] = round(max(r["peak_mb"] for r in runs))
    row["us_per_round"] = round(row["ours_s"] / rounds * 1e6, 4)
    if not args.alone:
        peer = measure("numpy", args, rounds)
        row |= {"numpy_s": round(peer["seconds"], 3), "numpy_peak_mb": round(peer["peak_mb"])}
        row["ratio"] = round(peer["seconds"] / row["ours_s"], 3)
    return row | {"repeats": args.repeats, "threads": args.threads}


def record(row: dict):
    "Put a comparison into reports/speed.csv"
    from recsys_lab.core.device import hardware
    from recsys_lab.reporting.records import upsert_speed
    from recsys_lab.reporting.studies import commit

    task = f"off-policy {row['rounds'] / 10**6:g}M rounds"
    row = {k: row[k] for k in ("ours_s", "repeats")} | {
        "task": task,
        "peer": "numpy, bootstrap alone",
        "peer_s": row["numpy_s"],
        "ours_mb": row["peak_mb"],
        "peer_mb": row["numpy_peak_mb"],
    }
    upsert_speed([row | {"hardware": hardware(), "commit": commit()}])


def main():
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--rounds", type=int, nargs="+", default=[250_000, 500_000, 1_000_000])
    cli.add_argument("--actions", type=int, default=100)
    cli.add_argument("--resamples", type=int, default=1000)
    cli.add_argument("--repeats", type=int, default=3)
    cli.add_argument("--threads", type=int, default=2)
    cli.add_argument("--alone", action="store_true", help="leave numpy out; records nothing")
    cli.add_argument("--record", action="store_true", help="write rows to reports/speed.csv")
    cli.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = cli.parse_args()
    if args.one:
        kind, *sizes = args.one
        seconds = {"ours": ours, "numpy": numpy}[kind](*map(int, sizes))
        print(json.dumps({"seconds": seconds, "peak_mb": peak_mb()}))
        return
    for rounds in args.rounds:
        row = compare(args, rounds)
        print(json.dumps(row), flush=True)
        if args.record and not args.alone:
            record(row)


if __name__ == "__main__":
    main()
