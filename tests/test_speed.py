"The comparison with a peer: fair, refused on a busy machine, judged by the same lines for both"

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from recsys_lab.cli.app import app
from recsys_lab.data.loaders import load_dataset
from recsys_lab.reporting import speed, speedtasks, timing
from recsys_lab.reporting.speedtasks import TASKS
from recsys_lab.reporting.timing import Settings

ROOT = Path(__file__).resolve().parents[1]
QUIET = {"say": lambda text: None}
# A stand-in for RecBole: the same options, the same files, and the most popular items for everybody
STAND_IN = """
import argparse, json, time
from pathlib import Path
import numpy as np, pandas as pd
parser = argparse.ArgumentParser()
for name in ("split", "model", "out", "epochs", "config", "seed", "threads"):
    parser.add_argument(f"--{name}")
parser.add_argument("--no-idle-check", action="store_true")
args = parser.parse_args()
parts = {p: pd.read_csv(f"{args.split}/{p}.csv") for p in ("train", "valid", "test")}
best = parts["train"].item.value_counts(sort=True).index.to_numpy()
seen = pd.concat([parts["train"], parts["valid"]]).groupby("user").item.apply(set)
lists = [[u, *[i for i in best if i not in seen[u]][:20]] for u in sorted(parts["test"].user.unique())]
np.save(f"{args.out}/top.npy", np.array(lists, np.int32))
rows = [{"epoch": 1, "train_s": 2.0, "cumulative_train_s": 2.0, "ndcg@10": 0.001}]
facts = {"epochs": rows, "build_s": 0.5, "evaluate_s": [1.0, 2.0, 3.0], "versions": {"recbole": "0"}}
Path(args.out, "run.json").write_text(json.dumps(facts | {"threads": int(args.threads)}))
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    "A project folder of its own, with a stand-in for the peer and the real data"
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    (tmp_path / "data").symlink_to(ROOT / "data")
    (tmp_path / "peers").mkdir()
    (tmp_path / "peers" / "recbole_run.py").write_text(STAND_IN)
    monkeypatch.setenv("RECSYS_LAB_ROOT", str(tmp_path))
    for module in (speed, speedtasks):
        monkeypatch.setattr(module, "peer_python", lambda: Path(sys.executable))
    monkeypatch.setattr(speed, "commit", lambda: "a21d0bd")
    return tmp_path


def tiny(name: str, **change):
    "A task small enough for a test"
    return replace(TASKS[name], **{"repeats": 1, **change})


def test_a_comparison_from_end_to_end(place, monkeypatch):
    monkeypatch.setattr(speed, "TASKS", {"bprmf": tiny("bprmf", epochs=2)})
    for module in (speed, timing):
        monkeypatch.setattr(module, "wait_until", lambda measure, limit, *_, **__: 0.0)
    monkeypatch.setattr(timing, "DURING", 2.0)
    (found,) = speed.compare_speed(settings=Settings(threads=1, **QUIET))
    table = pd.read_csv(place / "reports" / "speed.csv")
    assert table.task.tolist()[0] == "bprmf epoch (ml100k)"
    assert table.peer_s.tolist()[0] == 2.0
    assert np.allclose(table.ratio, table.peer_s / table.ours_s, rtol=1e-3)
    saved = json.loads((place / "reports" / "speed.json").read_text())["bprmf"]
    assert saved["quality"]["n"] == found["quality"]["n"] > 900
    assert saved["to_best"]["ours_s"] > 0, "any training beats a mark of 0.001"
    assert 150 < table.ours_mb[0] < 2000 and 20 < table.peer_mb[0] < table.ours_mb[0]


def test_nothing_is_recorded_without_the_idle_check(place, monkeypatch):
    monkeypatch.setattr(speed, "TASKS", {"ease": tiny("ease")})
    settings = Settings(threads=1, idle=False, **QUIET)
    (found,) = speed.compare_speed(["ease"], settings)
    assert found["ratio"] > 0 and not (place / "reports").exists()


def test_both_sides_are_judged_alike(place):
    "The lists of our model, judged from the file, give what `evaluate` gives"
    from recsys_lab.data.split import Split
    from recsys_lab.evaluation.evaluate import evaluate
    from recsys_lab.models.ease import EASE

    task = tiny("ease")
    folder = speedtasks.split_folder(task)
    split = Split.load(folder / "split")
    model = EASE(**task.args).fit(split.train)
    own = evaluate(model, split)
    np.save(folder / "top.npy", np.column_stack([own.codes, own.top]))
    users = speed.judged([folder, folder], speedtasks.test_task(split))
    assert users["user_id"].tolist() == own.users["user_id"].tolist()
    assert np.allclose(users["ndcg@10"], own.users["ndcg@10"], atol=1e-15)
    np.save(folder / "top.npy", np.column_stack([own.codes, own.top])[1:])
    less = speed.judged([folder], speedtasks.test_task(split))
    assert less["ndcg@10"][0] == 0, "a user without a list scores 0 and stays in the mean"


def test_the_peer_reads_the_rows_of_the_split(place):
    folder = speedtasks.split_folder(tiny("sasrec"))
    parts = {p: pd.read_csv(folder / "csv" / f"{p}.csv") for p in ("train", "valid", "test")}
    data = load_dataset("ml100k")
    assert [len(p) for p in parts.values()] == [len(data) - 2 * data.n_users, 943, 943]
    whole = pd.concat(parts.values())
    pairs = [set(zip(x.user, x.item, strict=True)) for x in (whole, data)]
    assert pairs[0] == pairs[1]
    last = parts["train"].groupby("user").timestamp.max()
    assert (last <= parts["test"].set_index("user").timestamp).all()


def test_a_busy_machine_is_refused_with_status_3(monkeypatch):
    monkeypatch.setattr(speed, "peer_python", lambda: Path(sys.executable))
    monkeypatch.setattr(speed.psutil, "getloadavg", lambda: (1.5, 1.0, 1.0))
    done = CliRunner().invoke(app, ["speed", "ease", "--wait", "0"])
    assert done.exit_code == 3
    assert "load average of the last minute is 1.50, over 0.3: not timed" in done.output


def test_a_disturbed_run_is_made_again_and_then_refused(place, monkeypatch):
    calls, quiet = [], {"others": 0.01}

    def run(command, out, threads):
        calls.append(out.name)
        (out / "run.json").write_text("{}")
        return {"others": 0.5} if len(calls) < 2 else quiet

    monkeypatch.setattr(timing, "measured", run)
    monkeypatch.setattr(timing, "busy_share", lambda: 0.0)
    settings = Settings(**QUIET)
    found = timing.one_run(tiny("ease"), "ours", 0, settings)
    assert found["used"] == {"others": 0.01, "before": 0.0}
    assert len(calls) == 2
    quiet["others"], calls[:] = 0.4, []
    with pytest.raises(timing.Busy, match="other programs used 40% of the processors during"):
        timing.one_run(tiny("ease"), "ours", 0, settings)
    assert len(calls) == 2


def test_others_are_told_from_ourselves(tmp_path):
    "A process that keeps a core busy is seen; the run's own work is not counted as others'"
    spin = "import time\nend = time.time() + {}\nwhile time.time() < end: pass"
    alone = timing.measured([sys.executable, "-c", "sum(range(80_000_000))"], tmp_path)
    assert alone["cpu_s"] > 0.2 and alone["others"] < 1
    other = subprocess.Popen([sys.executable, "-c", spin.format(30)])
    try:
        beside = timing.measured([sys.executable, "-c", spin.format(1)], tmp_path)
    finally:
        other.kill()
        other.wait()
    assert beside["others"] > 0.1


def test_a_failed_run_says_where_to_look(place):
    (place / "peers" / "recbole_run.py").write_text("raise SystemExit('no such model')")
    with pytest.raises(speedtasks.SpeedError, match=r"no such model; see .*log\.txt"):
        timing.one_run(tiny("ease"), "peer", 0, Settings(idle=False, **QUIET))


def test_the_sides_take_turns(monkeypatch):
    order = []

    def run(task, side, number, settings, kind=""):
        order.append((side, number))
        return {"fit_s": 1.0, "build_s": 1.0, "used": {"peak_mb": 1.0}}

    monkeypatch.setattr(timing, "one_run", run)
    timing.run_task(TASKS["ease"], Settings(repeats=2, **QUIET))
    assert order == [("ours", 0), ("peer", 0), ("ours", 1), ("peer", 1)]


def test_ours_goes_on_until_it_stands_where_the_peer_did(monkeypatch):
    "Only where the first run did not, and for five times the epochs"
    rows = lambda *values: [
        {"ndcg@10": v, "train_s": 1.0, "cumulative_train_s": i} for i, v in enumerate(values, 1)
    ]

    def run(task, side, number, settings, kind=""):
        values = (0.1, 0.2) if side == "ours" and number == 0 else (0.3, 0.1)
        values = (0.1, 0.2, 0.2, 0.4) if kind == "-long" else values
        return {"epochs": rows(*values), "used": {"peak_mb": 1.0}, "asked": task.own_epochs}

    monkeypatch.setattr(timing, "one_run", run)
    monkeypatch.setattr(speed, "quality", lambda task, numbers, kind="": list(numbers))
    runs = timing.run_task(tiny("bprmf", repeats=2, epochs=2), Settings(**QUIET))
    assert {i: r["asked"] for i, r in runs["long"].items()} == {0: 10}
    more = speed._extras(runs["task"], runs)
    assert [e["ours_epoch"] for e in more["to_best"]["each"]] == [4, 1]
    assert more["to_best"]["ours_s"] == 2.5 and more["quality_long"] == [0]
