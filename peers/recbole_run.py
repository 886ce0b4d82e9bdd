"""Run one RecBole model on one of our splits: `python peers/recbole_run.py --help`.

Runs in RecBole's own environment and imports nothing of ours. Writes run.json, top.npy and top_judged.npy;
with --labels run.json and pairs.npy.
"""

import argparse
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path

BUSY = 3  # exit code: the machine is busy, nothing was run
IDLE_LOAD = 0.3  # one-minute load average up to which times count


def parse():
    """Arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--split", type=Path, required=True, help="folder with train.csv, valid.csv, test.csv"
    )
    parser.add_argument(
        "--model", required=True, help="RecBole's name: BPR, LightGCN, EASE, SASRec, ..."
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for run.json and the ranked lists"
    )
    parser.add_argument(
        "--config", type=json.loads, default={}, help="JSON object of RecBole settings to change"
    )
    parser.add_argument("--epochs", type=int, help="most epochs to train; default: RecBole's 300")
    parser.add_argument("--seed", type=int, default=2020)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--repeats", type=int, default=3, help="how often the test evaluation is timed"
    )
    parser.add_argument(
        "--test-history",
        choices=["train", "train+valid"],
        default="train+valid",
        help="what a sequence model reads before it ranks the test items",
    )
    features = parser.add_mutually_exclusive_group()
    features.add_argument(
        "--labels",
        action="store_true",
        help="pairs with a column `label`, and users.csv and items.csv: nothing is drawn or ranked",
    )
    features.add_argument(
        "--tables",
        action="store_true",
        help="read users.csv and items.csv too, for a model of features that ranks",
    )
    parser.add_argument(
        "--no-idle-check", action="store_true", help="run on a busy machine; its times mean nothing"
    )
    return parser.parse_args()


def refuse_when_busy(limit=IDLE_LOAD):
    """Leave with code 3 when other work would spoil the times."""
    if (load := os.getloadavg()[0]) > limit:
        print(
            f"load average {load:.2f} is over {limit}: not timed. Wait until the machine is idle, "
            "or pass --no-idle-check",
            file=sys.stderr,
        )
        sys.exit(BUSY)


def set_up(threads):
    """Environment that must stand before numpy and torch are imported."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    warnings.filterwarnings("ignore")
    sys.argv = sys.argv[:1]  # RecBole reads --name=value from the command line by itself


def save(out, report, lists):
    """Write the ranked lists or the predicted pairs, then run.json as the sign that the run is whole."""
    import numpy as np

    out.mkdir(parents=True, exist_ok=True)
    for name, rows in lists.items():
        np.save(out / f"{name}.npy", rows, allow_pickle=False)
    part = out / "run.json.part"
    part.write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")
    part.replace(out / "run.json")


def main():
    """Check the machine, run, save."""
    args = parse()
    load = os.getloadavg()[0]
    if not args.no_idle_check:
        refuse_when_busy()
    set_up(args.threads)
    args.split, args.out = args.split.resolve(), args.out.resolve()
    (args.out / "run.json").unlink(missing_ok=True)
    from recbole_files import read_split
    from recbole_train import train_and_judge

    split = read_split(args.split, ["label"] if args.labels else [])
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)  # RecBole leaves logs in the current folder
        report, lists = train_and_judge(args, split, Path(work))
        os.chdir("/")
    save(args.out, {"load_before": load, "idle_checked": not args.no_idle_check} | report, lists)


if __name__ == "__main__":
    main()
