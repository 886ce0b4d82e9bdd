"A stage that trains a model depends on its plan, and a plan names every module that is loaded for it"

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from recsys_lab.core.params import read_params
from recsys_lab.reporting.plan import FREE, STUDIES, plan

ROOT = Path(__file__).resolve().parents[1]
LOADED = """
import json, sys
from recsys_lab.models.registry import make_model
make_model({key!r}, {protocol!r})
print(json.dumps([m for m in sys.modules if m.startswith("recsys_lab.")]))
"""


def stages() -> list:
    "Every stage that trains a model"
    found = []
    for file in ("dvc.yaml", "benchmark/dvc.yaml"):
        for name, stage in yaml.safe_load((ROOT / file).read_text())["stages"].items():
            todo = stage.get("do", stage)
            if any(study in todo["cmd"] for study in STUDIES):
                found.append(pytest.param(todo, id=f"{file}:{name}"))
    assert len(found) >= 8
    return found


@pytest.mark.parametrize("todo", stages())
def test_it_depends_on_its_plan(todo):
    words = dict(w.split("=", 1) for w in todo["cmd"].split() if "=" in w)
    assert f"artifacts/plan/{words['protocol']}/{words['model']}.json" in todo["deps"]
    assert next(s for s in STUDIES if s in todo["cmd"]) in todo["deps"]


def test_every_stage_that_runs_has_a_plan():
    "What DVC resolved depends on files that the plan stage writes"
    lock = yaml.safe_load((ROOT / "dvc.lock").read_text())["stages"]
    run = read_params(ROOT / "params.yaml")["run"]
    names = {s.removeprefix("evaluate-") for s in lock if s.startswith("evaluate-")}
    assert names == {f"{protocol}@{key}" for protocol, keys in run.items() for key in keys}
    for name in names:
        used = [d["path"] for d in lock[f"evaluate-{name}"]["deps"]]
        assert f"artifacts/plan/{name.replace('@', '/')}.json" in used


def test_somebody_makes_every_dependency():
    "In a clone each is in git, fetched with the data, or made by a stage"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    made, asked = [*listed.stdout.splitlines(), "data/"], []
    for file in ("dvc.yaml", "benchmark/dvc.yaml"):
        for name, stage in yaml.safe_load((ROOT / file).read_text())["stages"].items():
            todo, each = stage.get("do", stage), stage.get("foreach", [""])
            made += [next(iter(o)) if isinstance(o, dict) else o for o in todo.get("outs", [])]
            keys = each if isinstance(each, dict | list) else [""]
            for key in (k for k in keys if isinstance(k, str)):
                filled = [
                    dep.replace("${key}", key) if key else dep for dep in todo.get("deps", [])
                ]
                asked += [(f"{file}:{name}", dep) for dep in filled]
    fixed = {dep: dep.partition("${")[0] for _, dep in asked}
    made = [path.partition("${")[0] for path in made]
    known = lambda dep: any(p.startswith(fixed[dep]) or fixed[dep].startswith(p) for p in made)
    assert len(asked) > 50
    assert not [(stage, dep) for stage, dep in asked if not known(dep)]


@pytest.mark.parametrize(
    ("key", "protocol"),
    [("hybrid", "ml100k-ratio"), ("bprmf", "ml100k-time"), ("sasrec", "ml100k-time")],
)
def test_a_plan_names_what_is_loaded(key, protocol):
    "Modules that a fresh process has loaded once the model is made"
    code = LOADED.format(key=key, protocol=protocol)
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    loaded = {m for m in json.loads(told.stdout) if not m.startswith(FREE)}
    chapters = {f"recsys_lab.{c}" for c in ("core", "data", "evaluation", "training", "models")}
    missing = loaded - chapters - plan(key, protocol)["code"].keys()
    assert f"recsys_lab.models.{key}" in loaded
    assert not missing
