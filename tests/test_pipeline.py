"The real pipeline on small parameters: complete, honest about its parameters, the same after kill -9"

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest
import yaml

from recsys_lab.cli.record import ran_with
from recsys_lab.core.params import read_yaml
from recsys_lab.reporting.studies import parse_given

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
pytestmark = pytest.mark.xdist_group("pipeline")


def environment(project: Path) -> dict:
    "Our programs, the copy's code, one thread, no identity needed for commits"
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("RECSYS_LAB", "PYTEST"))}
    keep |= dict.fromkeys(("OMP_NUM_THREADS", "POLARS_MAX_THREADS", "NUMBA_NUM_THREADS"), "1")
    keep |= {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(project)}
    keep |= {
        f"GIT_{who}_{what}": "test" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }
    return keep | {"DVC_NO_ANALYTICS": "1", "RECSYS_LAB_ROOT": str(project)}


def run(project: Path, *command: str, check: bool = True) -> str:
    done = subprocess.run(
        command, cwd=project, env=environment(project), capture_output=True, text=True, timeout=2400
    )
    text = done.stdout + done.stderr
    assert not check or done.returncode == 0, text[-6000:]
    return text


def copy_data(project: Path):
    for key in read_yaml(ROOT / "params.yaml")["embedded"]:
        if not (ROOT / "data" / key).is_dir():
            pytest.fail(f"data/{key} is not there; run: make fetch")
        shutil.copytree(ROOT / "data" / key, project / "data" / key)


@pytest.fixture(scope="session")
def project(tmp_path_factory) -> Path:
    "A copy of what is tracked, with the small parameters, run once and committed"
    project = tmp_path_factory.mktemp("pipeline") / "first"
    listed = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in names.split("\0"):
        if name and (ROOT / name).is_file():
            (project / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, project / name)
    shutil.copy(project / "params.ci.yaml", project / "params.yaml")
    (project / "dvc.lock").unlink(missing_ok=True)
    shutil.rmtree(project / "reports/metrics", ignore_errors=True)
    run(project, "git", "init", "-q")
    copy_data(project)
    run(project, "dvc", "status", "-q", "data.dvc")
    run(project, "dvc", "repro")
    run(project, "git", "add", "-A")
    run(project, "git", "commit", "-qm", "run once")
    return project


def outputs(project: Path) -> dict[str, list[str]]:
    "Stage -> paths it declares"
    lock = yaml.safe_load((project / "dvc.lock").read_text())["stages"]
    return {name: [o["path"] for o in stage.get("outs", [])] for name, stage in lock.items()}


def test_one_worker_runs_all_of_this(request):
    "Else every worker runs the pipeline; pytest 9.2 and xdist 3.8 lose the groups without a word"
    alone = "PYTEST_XDIST_WORKER" not in os.environ
    assert alone or request.node.nodeid.endswith("@pipeline"), "run with: --dist loadgroup"


def test_every_output_is_there(project):
    declared = outputs(project)
    assert len(declared) >= 12
    missing = [o for outs in declared.values() for o in outs if not (project / o).exists()]
    assert not missing
    assert not list(project.rglob("*.failed.ipynb")), "a study failed"
    assert not [p for p in (project / "artifacts").rglob(".*") if p.name != ".gitignore"]


def test_git_holds_no_times(project):
    "What git tracks of a run is the same wherever it runs: no clock, commit or machine in it"
    assert run(project, "git", "status", "--porcelain") == ""
    for file in (project / "reports/metrics").glob("*.json"):
        words = json.dumps(json.loads(file.read_text()))
        assert not any(w in words for w in ("seconds", "hardware", "commit", "_mb")), file.name


def test_each_result_is_of_the_model_asked_for(project):
    "A parameter lost on the way would give one model's numbers under every name"
    found = {}
    for folder in sorted((project / "artifacts/evaluate").glob("*/*")):
        saved = json.loads((folder / "model/model.json").read_text())
        assert saved["model"] == folder.name.partition("-")[0]
        lists = hashlib.sha256((folder / "top.parquet").read_bytes()).hexdigest()
        assert lists not in found, f"{folder} and {found.get(lists)} recommend the same"
        found[lists] = folder
    assert len(found) >= 8


def test_each_copy_ran_with_what_its_stage_gave(project):
    "The parameters stand in the executed copy, injected, one by one"
    stages = yaml.safe_load((project / "dvc.lock").read_text())["stages"]
    commands = [shlex.split(s["cmd"]) for s in stages.values() if " study " in s["cmd"]]
    assert len(commands) >= 12
    for _, _, notebook, name, *words in commands:
        study = re.sub(r"^\d+[a-z]?_", "", Path(notebook).stem)
        copy = project / "artifacts/_executed" / study / f"{name}.ipynb"
        given, ran = parse_given(words), ran_with(copy)
        assert {k: ran[k] for k in given} == given, copy.name
        tags = [t for c in nbformat.read(copy, 4).cells for t in c.metadata.get("tags", [])]
        assert tags.count("injected-parameters") == bool(given), copy.name


def test_a_second_run_does_nothing(project):
    start = time.perf_counter()
    text = run(project, "dvc", "repro")
    seconds = time.perf_counter() - start
    assert "up to date" in text and "Running stage" not in text
    assert seconds < 10, f"{seconds:.1f} s; on an idle machine it is under 2"


def test_a_changed_parameter_runs_its_model_only(project):
    "`dvc repro plan` writes the plans anew; `dvc status` then names what would run"
    file = project / "params.yaml"
    before = file.read_text()
    try:
        file.write_text(before.replace("ease: {lam: 200.0}", "ease: {lam: 300.0}"))
        assert file.read_text() != before
        run(project, "dvc", "repro", "plan")
        stale = json.loads(run(project, "dvc", "status", "--json"))
    finally:
        file.write_text(before)
        run(project, "dvc", "repro", "plan")
    models = {s.split("@")[1] for s in stale if s.startswith("evaluate")}
    assert models == {"ease"}, stale
    assert run(project, "git", "status", "--porcelain") == ""


def test_a_comment_runs_nothing(project):
    "Comments and docstrings of a module change no number"
    file = project / "recsys_lab/models/ease.py"
    before = file.read_text()
    try:
        file.write_text(before + "\n# one more\n")
        run(project, "dvc", "repro", "plan")
        assert json.loads(run(project, "dvc", "status", "--json", "dvc.yaml")) == {}
    finally:
        file.write_text(before)
        run(project, "dvc", "repro", "plan")


def test_a_wrong_byte_stops_it(project):
    file = project / "data/ml100k/ml-100k.item"
    before = file.read_bytes()
    try:
        file.write_bytes(b"\0" + before[1:])
        found = subprocess.run(
            ["dvc", "status", "-q", "data.dvc"], cwd=project, env=environment(project)
        )
        text = run(project, "recsys-lab", "verify", "--out", "artifacts/again.json", check=False)
    finally:
        file.write_bytes(before)
    assert found.returncode == 1
    assert "ml-100k.item" in text and "Traceback" not in text
    assert not (project / "artifacts/again.json").exists()


def test_several_tasks_are_judged(project):
    "Each question has a row for each network, judged by what suits it"
    given = ("protocol=ml100k-time", "out=build/tasks")
    run(project, "recsys-lab", "study", "nbs/studies/50_tasks.ipynb", "tasks", *given)
    board = pd.read_csv(project / "build/tasks/board.csv")
    metric = {"rating>=4": "auc", "rating": "rmse", "next_item": "hitrate@10"}
    metric |= {"genres": "accuracy", "popularity": "mse", "cluster": "accuracy"}
    assert dict(zip(board.task, board.metric, strict=True)) == metric
    assert (board.groupby("task").network.nunique() == 6).all()
    assert (board.low <= board.difference).all() and (board.difference <= board.high).all()
    assert (board.difference != 0).groupby(board.task).any().all()
    gain = board.difference.where(~board.metric.isin(["rmse", "mse"]), -board.difference)
    told = {
        "better": (gain > 0) & (board.p_holm < 0.05),
        "worse": (gain < 0) & (board.p_holm < 0.05),
    }
    for verdict, there in told.items():
        assert ((board.verdict == verdict) == there).all()


def test_a_search_is_kept_and_drawn(project):
    "The page shows the trials, one of which failed, and the parameters stay as they are"
    before = (project / "params.yaml").read_bytes()
    asked = ("ml100k-time", "ease", "itemknn", "--trials", "3", "--no-write")
    run(project, "recsys-lab", "tune", *asked, "--folder", "build/trials")
    kept = project / "build/trials/ml100k-time"
    failed = json.loads((kept / "ease.json").read_text())
    failed["trials"][0] |= {"value": None, "error": "too small"}
    (kept / "ease.json").write_text(json.dumps(failed))
    given = ("protocol=ml100k-time", "trials=build/trials", "out=build/search")
    run(project, "recsys-lab", "study", "nbs/studies/40_search.ipynb", "search", *given)
    board = pd.read_csv(project / "build/search/board.csv").set_index("model")
    for key in ("ease", "itemknn"):
        rows = json.loads((kept / f"{key}.json").read_text())["trials"]
        values = [r["value"] for r in rows if r["value"] is not None]
        assert board.trials[key] == 3 and board.failed[key] == 3 - len(values)
        assert board.best[key] == pytest.approx(max(values), abs=1e-6)
    assert np.isnan(board.before["ease"]) and board.gain["itemknn"] >= 0
    assert (project / "params.yaml").read_bytes() == before


def alive(project: Path) -> list[psutil.Process]:
    "Processes that work in this copy"
    found = []
    for p in psutil.process_iter():
        try:
            if p.status() != psutil.STATUS_ZOMBIE and Path(p.cwd()).is_relative_to(project):
                found.append(p)
        except (psutil.Error, OSError):
            continue
    return found


def wait_for(condition, seconds: float, what: str):
    end = time.time() + seconds
    while not (value := condition()):
        assert time.time() < end, what
        time.sleep(0.02)
    return value


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes by their folder")
def test_kill_9_in_the_middle(project):
    """A clone whose run is killed while a model trains, and run again, ends with the very same files

    The models and what is made of them; studies that train nothing of `run:` have nothing to resume."""
    clone = project.parent / "second"
    run(project, "git", "clone", "-q", str(project), str(clone))
    copy_data(clone)
    lock = (clone / "dvc.lock").read_text()
    trained = ["dvc", "repro", "leaderboard", "summary"]
    repro = subprocess.Popen(
        trained,
        cwd=clone,
        env=environment(clone),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        resume = clone / "artifacts/_resume"
        trains = lambda: repro.poll() is not None or list(resume.glob("[0-9a-f]*/state.json"))
        wait_for(trains, 2000, "no model was trained")
        assert repro.poll() is None, "the run ended before it could be killed"
    finally:
        repro.send_signal(signal.SIGKILL)
        repro.wait()
    wait_for(lambda: not alive(clone), 20, f"still working: {alive(clone)}")
    run(clone, *trained)
    assert (clone / "dvc.lock").read_text() == lock
    assert run(clone, "git", "status", "--porcelain") == ""
