"A study that only the full benchmark runs works too: here each runs as it opens, on few people and few steps"

import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from recsys_lab.reporting.library import project_copy
from recsys_lab.reporting.studies import declared

ROOT = Path(__file__).resolve().parents[1]
LAB = Path(sys.executable).parent / "recsys-lab"
STUDY = re.compile(r"nbs/studies/\w+\.ipynb")


def named(*files: str) -> set[str]:
    return {study for file in files for study in STUDY.findall((ROOT / file).read_text())}


LONG = sorted(named("benchmark/dvc.yaml") - named("dvc.yaml", "tests/test_pipeline.py"))


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    return project_copy(ROOT, tmp_path_factory.mktemp("long"))


def test_there_are_some():
    assert len(LONG) >= 8


@pytest.mark.parametrize("study", LONG, ids=lambda s: Path(s).stem)
def test_it_runs_as_it_opens(study, project):
    "Its folder of results, where nothing that is recorded stands, holds tables with rows"
    out = declared(ROOT / study)["out"]
    assert out.startswith("build/")
    env = {**os.environ, "RECSYS_LAB_ROOT": str(project), "PYTHONPATH": str(project)}
    env |= dict.fromkeys(("OMP_NUM_THREADS", "POLARS_MAX_THREADS", "NUMBA_NUM_THREADS"), "1")
    command = [LAB, "study", study, f"long-{Path(study).stem}"]
    done = subprocess.run(
        command, cwd=project, env=env, capture_output=True, text=True, timeout=600
    )
    assert not done.returncode, (done.stdout + done.stderr)[-4000:]
    tables = {f.name: pd.read_csv(f) for f in sorted((project / out).rglob("*.csv"))}
    assert tables and all(len(t) for t in tables.values()), f"{study} left {sorted(tables)}"
