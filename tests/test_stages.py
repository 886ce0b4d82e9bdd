"A stage that trains a model depends on every module that the model runs"

import ast
import re
from pathlib import Path

import pytest
import yaml

from recsys_lab.core.params import read_params

ROOT = Path(__file__).resolve().parents[1]
FREE = (
    "recsys_lab/core/",
    "recsys_lab/reporting/",
    "recsys_lab/data/ingest.py",
)  # change no number


def closure(module: Path, seen: set | None = None) -> set:
    "A module of ours and all of ours that it imports, as paths from the top"
    seen = set() if seen is None else seen
    name = str(module.relative_to(ROOT))
    if name in seen or not module.exists():
        return seen
    seen.add(name)
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = module.parents[node.level - 1] if node.level else ROOT
            path = base.joinpath(*(node.module or "").split("."))
            for file in (path.with_suffix(".py"), *(path / f"{a.name}.py" for a in node.names)):
                closure(file, seen)
    return seen


def stages() -> list:
    "Stage, model's module, dependencies: for every stage that trains a model"
    params = read_params(ROOT / "params.yaml")
    found = []
    for file, key in (("dvc.yaml", "run"), ("benchmark/dvc.yaml", "benchmark")):
        for name, stage in yaml.safe_load((ROOT / file).read_text())["stages"].items():
            todo = stage.get("do", stage)
            if "10_evaluate" not in todo["cmd"] and "30_ablation" not in todo["cmd"]:
                continue
            models, matrix = (
                params[key].get(name.removeprefix("evaluate-"), {}),
                stage.get("matrix", {}),
            )
            modules = set(models.values()) | set(matrix.get("model", []))
            modules |= {which["model"] for which in matrix.get("which", [])}
            found += [pytest.param(m, todo["deps"], id=f"{name}-{m}") for m in sorted(modules)]
    assert found
    return found


@pytest.mark.parametrize(("module", "deps"), stages())
def test_deps_cover_what_runs(module, deps):
    deps = [re.sub(r"\$\{item[a-z.]*\}", module, d) for d in deps]
    needed = closure(ROOT / f"recsys_lab/models/{module}.py")
    missing = [
        f
        for f in sorted(needed)
        if not f.startswith(FREE) and not any(f == d or f.startswith(f"{d}/") for d in deps)
    ]
    assert not missing, f"the stage does not depend on {missing}"
