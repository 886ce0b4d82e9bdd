"""Seconds to prepare generated logs, against polars' bare sort of the same columns.

    python benchmark/preparation.py --rows 1000000 10000000 100000000 --repeats 3

Each measurement runs in a process of its own; the medians are printed as one JSON line a size:
{"rows", "ours_s", "polars_sort_s", "ratio", "peak_mb", ...}. Ours is everything from the Parquet file to saved,
checksummed, memory-mapped histories; polars only sorts a frame that is already in memory, by (user, time).
Compiling and importing are not counted: both are warmed up on a thousand rows first.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def log(rows: int, folder: Path) -> Path:
    "A generated log of that many rows, made once"
    from recsys_lab.data.worlds import World

    path = folder / f"log_{rows}.parquet"
    if not path.exists():
        users, items = max(1000, rows // 100), max(500, min(200_000, rows // 200))
        World(n_users=users, n_items=items, seed=1).write_parquet(path, rows)
    return path


def ours(path: Path, warm: Path, folder: Path) -> float:
    "Seconds from Parquet to memory-mapped histories"
    from recsys_lab.data.prepare import prepare_parquet

    prepare_parquet(warm, folder / "prepared")
    start = time.perf_counter()
    prepare_parquet(path, folder / "prepared")
    return time.perf_counter() - start


def polars_sort(path: Path, warm: Path, folder: Path) -> float:
    "Seconds of polars' sort in memory"
    import polars as pl

    pl.read_parquet(warm).sort("user_id", "timestamp")
    frame = pl.read_parquet(path)
    start = time.perf_counter()
    frame.sort("user_id", "timestamp")
    return time.perf_counter() - start


def peak_mb() -> float:
    "Largest memory this process has held, in 10^6 bytes; torch is not imported here"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def measure(kind: str, path: Path, warm: Path, folder: Path, threads: int) -> dict:
    "One measurement in a new process"
    limits = {f"{k}_THREADS": str(threads) for k in ("POLARS_MAX", "NUMBA_NUM", "OMP_NUM")}
    command = [sys.executable, __file__, "--one", kind, str(path), str(warm), str(folder)]
    done = subprocess.run(command, env=os.environ | limits, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def compare(rows: int, repeats: int, folder: Path, threads: int) -> dict:
    "Medians of both, taken in turns"
    path, warm = log(rows, folder), log(1000, folder)
    runs = [
        {k: measure(k, path, warm, folder, threads) for k in ("ours", "polars_sort")}
        for _ in range(repeats)
    ]
    ours_s, sort_s = (statistics.median(r[k]["seconds"] for r in runs) for k in runs[0])
    return {
        "rows": rows,
        "ours_s": round(ours_s, 3),
        "polars_sort_s": round(sort_s, 3),
        "ratio": round(ours_s / sort_s, 3),
        "peak_mb": round(max(r["ours"]["peak_mb"] for r in runs)),
        "polars_peak_mb": round(max(r["polars_sort"]["peak_mb"] for r in runs)),
        "us_per_row": round(ours_s / rows * 1e6, 4),
        "repeats": repeats,
        "threads": threads,
    }


def record(row: dict):
    "Put a comparison into reports/speed.csv"
    from recsys_lab.core.device import hardware
    from recsys_lab.reporting.records import upsert_speed
    from recsys_lab.reporting.studies import commit

    task = f"prepare {row['rows'] // 10**6}M rows"
    row = {k: row[k] for k in ("ours_s", "repeats")} | {
        "task": task,
        "peer": "polars, sort alone",
        "peer_s": row["polars_sort_s"],
        "ours_mb": row["peak_mb"],
        "peer_mb": row["polars_peak_mb"],
    }
    upsert_speed([row | {"hardware": hardware(), "commit": commit()}])


def main():
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--rows", type=int, nargs="+", default=[10**6, 10**7, 10**8])
    cli.add_argument("--repeats", type=int, default=3)
    cli.add_argument("--threads", type=int, default=2)
    cli.add_argument(
        "--folder", type=Path, help="where logs are made; kept (default: a temporary folder)"
    )
    cli.add_argument("--record", action="store_true", help="write rows to reports/speed.csv")
    cli.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = cli.parse_args()
    if args.one:
        kind, *paths = args.one
        seconds = {"ours": ours, "polars_sort": polars_sort}[kind](*map(Path, paths))
        print(json.dumps({"seconds": seconds, "peak_mb": peak_mb()}))
        return
    with tempfile.TemporaryDirectory() as temp:
        folder = args.folder or Path(temp)
        folder.mkdir(parents=True, exist_ok=True)
        for rows in args.rows:
            row = compare(rows, args.repeats, folder, args.threads)
            print(json.dumps(row), flush=True)
            if args.record:
                record(row)


if __name__ == "__main__":
    main()
