"Every notebook runs, is small, is stripped, and the package is exactly what the notebooks export"

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from recsys_lab.reporting import library
from recsys_lab.reporting.library import LibraryRunner, keep, notebook_key, project_copy

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
LIB = sorted(ROOT.glob("nbs/*/[0-9]*.ipynb"))
LIB = [p for p in LIB if p.parent.name[0].isdigit()]
STUDIES = sorted(ROOT.glob("nbs/studies/[0-9]*.ipynb"))
TUTORIALS = sorted(ROOT.glob("nbs/tutorials/*.ipynb"))
EVERY = LIB + STUDIES + TUTORIALS + sorted(ROOT.glob("nbs/*.ipynb"))
EXPORT = re.compile(r"^#\| *exports?\b", re.M)
PATIENCE = 240  # seconds; a notebook runs under 10 where this one runs alone
# Done once, before the notebooks are split off: torch's first optimizer imports `torch._dynamo`, which
# alone takes 3 seconds, and Numba's first function a second
WARM = """
import captum.attr, lightgbm, networkx, numba, polars, scipy.stats, shap
import sklearn.ensemble, sklearn.linear_model, torch._dynamo, torch_geometric.nn
numba.njit(lambda: 0)()
"""


def name(path: Path) -> str:
    return str(path.relative_to(ROOT / "nbs").with_suffix(""))


def cells(path: Path, kind: str = "code") -> list[dict]:
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def environment(**more) -> dict:
    "One thread a notebook (two run at once), our programs first, nothing left over from a kernel"
    keep = {k: v for k, v in os.environ.items() if k not in ("IN_TEST", "PYTEST_CURRENT_TEST")}
    keep |= {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "MPLBACKEND": "Agg"}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "POLARS_MAX_THREADS", "NUMBA_NUM_THREADS"), "1")
    return keep | threads | {"RECSYS_LAB_ROOT": str(ROOT)} | more


def test_the_lists_are_not_empty():
    assert len(LIB) >= 20, "the pattern nbs/*/[0-9]*.ipynb finds almost nothing"
    assert STUDIES, "nbs/studies has no study"
    assert TUTORIALS, "nbs/tutorials has no tutorial"
    assert (ROOT / "nbs/index.ipynb") in EVERY
    found = {p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts}
    assert found == set(EVERY), f"no test looks at {sorted(map(str, found - set(EVERY)))}"


@pytest.fixture(scope="session")
def runner(tmp_path_factory) -> LibraryRunner:
    "Runs notebooks in a copy of the project, each in a process of its own"
    copy = project_copy(ROOT, tmp_path_factory.mktemp("library"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "_SPLIT", WARM + library._SPLIT)
        runner = LibraryRunner(copy, PATIENCE)
    yield runner
    runner.close()


@pytest.mark.parametrize("nb", LIB + TUTORIALS, ids=name)
def test_runs(nb, runner):
    "What it showed is kept for its page"
    nb = nb.relative_to(ROOT)
    key = notebook_key(ROOT, nb)
    failed = runner.run(runner.project / nb)
    keep(ROOT, nb, runner.project / nb, key, failed)
    assert not failed, failed


@pytest.mark.parametrize("nb", EVERY, ids=name)
def test_stripped(nb):
    bad = [c["id"] for c in cells(nb) if c["outputs"] or c["execution_count"]]
    assert not bad, f"cells {bad} hold outputs; run `make docs`"


@pytest.mark.parametrize("nb", EVERY, ids=name)
def test_cell_ids(nb):
    ids = Counter(c.get("id") for c in json.loads(nb.read_text())["cells"])
    assert None not in ids and max(ids.values()) == 1, "every cell needs an id of its own"


@pytest.mark.parametrize("nb", EVERY, ids=name)
def test_no_conflict_markers(nb):
    assert not re.search(r"<<<<<<<|>>>>>>>", nb.read_text())


@pytest.mark.parametrize("nb", EVERY, ids=name)
def test_every_cell_that_counts_is_run(nb):
    "An example that is not run is a claim that nobody checks"
    text = nb.read_text()
    assert not re.search(r"#\| *eval: *false", text), "`#| eval: false` is not used"
    assert "skip_exec" not in text, "a notebook with skip_exec counts as passed and is not run"


@pytest.mark.parametrize("nb", LIB, ids=name)
def test_export_cells_are_short(nb):
    for cell in cells(nb):
        if EXPORT.search(text := source(cell)):
            n = sum(1 for o in text.splitlines() if o.strip() and not o.startswith("#|"))
            assert n <= 25, f"{n} lines in an exported cell:\n{text[:300]}"


@pytest.mark.parametrize("nb", LIB, ids=name)
def test_head(nb):
    "Title, the point in one sentence, the module's name alone in the second cell"
    first, second = json.loads(nb.read_text())["cells"][:2]
    title = source(first)
    assert re.match(r"# \S", title), "the first cell starts with an H1"
    assert re.search(r"^> \S", title, re.M), "the first cell states the point in a `>` sentence"
    assert re.fullmatch(r"#\| *default_exp [a-z_.0-9]+\s*", source(second)), source(second)


def _mixed(text: str) -> bool:
    "Does a cell both import and do something else?"
    body = [o for o in text.splitlines() if not o.startswith(("%", "!"))]
    kinds = {isinstance(n, ast.Import | ast.ImportFrom) for n in ast.parse("\n".join(body)).body}
    return kinds == {True, False}


@pytest.mark.parametrize("nb", LIB, ids=name)
def test_imports_stand_alone(nb):
    bad = [source(c)[:200] for c in cells(nb) if _mixed(source(c))]
    assert not bad, "cells that import and do more:\n" + "\n--\n".join(bad)


@pytest.mark.parametrize("nb", EVERY, ids=name)
def test_no_star_imports(nb):
    bad = [source(c)[:100] for c in cells(nb) if re.search(r"^from \S+ import \*", source(c), re.M)]
    assert not bad, bad


@pytest.mark.parametrize("nb", STUDIES, ids=name)
def test_study(nb):
    "One parameters cell; nothing exported; short"
    tagged = [c for c in cells(nb) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1, f"{len(tagged)} cells are tagged `parameters`"
    assert not any(EXPORT.search(source(c)) for c in cells(nb)), "a study exports nothing"
    assert len(cells(nb)) <= 25, f"{len(cells(nb))} code cells: move some into the library"
    language = json.loads(nb.read_text())["metadata"].get("kernelspec", {}).get("language")
    assert language == "python", "papermill needs a kernelspec with its language"


def test_names_are_unique():
    "Pages are named without the number"
    pages = Counter((p.parent.name, re.sub(r"^[0-9]+[a-z]?_", "", p.stem)) for p in LIB)
    assert not [k for k, n in pages.items() if n > 1]
    modules = Counter(
        m for p in LIB for m in re.findall(r"default_exp (\S+?)[\\\"]", p.read_text())
    )
    assert not [m for m, n in modules.items() if n > 1], "two notebooks export one module"


def _tree(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*.py"))}


def test_export_in_sync(tmp_path):
    "A fresh export equals what is here, and no module lacks its notebook"
    skip = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for entry in ("nbs", "recsys_lab", "pyproject.toml", "README.md"):
        copy = shutil.copytree if (ROOT / entry).is_dir() else shutil.copy
        copy(
            ROOT / entry, tmp_path / entry, **({"ignore": skip} if copy is shutil.copytree else {})
        )
    for module in (tmp_path / "recsys_lab").rglob("*.py"):
        if module.name != "__init__.py":
            module.unlink()
    env = environment(RECSYS_LAB_ROOT=str(tmp_path))
    subprocess.run([BIN / "nbdev-export"], cwd=tmp_path, env=env, check=True, timeout=300)
    new, old = _tree(tmp_path / "recsys_lab"), _tree(ROOT / "recsys_lab")
    assert set(old) - set(new) == set(), "modules without a notebook"
    assert set(new) - set(old) == set(), "notebooks that were not exported; run `make docs`"
    assert not [f for f in new if new[f] != old[f]], "not in sync; run `make docs`"


@pytest.mark.parametrize("how", [["check"], ["format", "--check"]], ids=" ".join)
def test_lint(how):
    "Unused imports, undefined names, imports out of order; one format for all"
    command = [BIN / "ruff", *how, "--quiet", "nbs", "tests", "peers", "benchmark"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + "\nrun: make docs"


@pytest.mark.parametrize("nb", TUTORIALS, ids=name)
def test_tutorial_is_short(nb):
    "From a CSV to a saved model, from a log to a diagnosis: five cells each"
    code = cells(nb)
    assert len(code) == 5
    assert max(len(source(c).splitlines()) for c in code) <= 12
