"One set of pins, read by pip, conda and the package alike; what is installed is what is pinned"

import ast
import importlib.metadata as metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name as canonical

ROOT = Path(__file__).resolve().parents[1]
# Used as a command or a plug-in, or given as part of the stack that later chapters stand on
UNIMPORTED = {
    "torch-geometric": "graph models",
    "shap": "explanations",
    "captum": "explanations",
    "faiss-cpu": "retrieval",
    "jupyterlab": "make lab",
    "httptools": "uvicorn reads requests with it",
    "uvloop": "uvicorn's loop",
    "httpx": "FastAPI's client for tests",
    "onnxscript": "torch writes ONNX with it",
    "ipykernel": "papermill's kernel",
    "ipywidgets": "progress bars in a notebook",
    "anywidget": "plotly's FigureWidget",
    "nbdev": "export and test",
    "execnb": "nbdev runs notebooks with it; its versions drift together",
    "nbstripout": "make docs",
    "dvc": "make repro",
    "jsonschema": "later ones take two seconds to import",
    "ruamel-yaml-clib": "DVC reads params.yaml with it",
    "ruff": "make check",
    "pytest-xdist": "make test",
}
DISTRIBUTION = {"sklearn": "scikit-learn", "yaml": "pyyaml", "faiss": "faiss-cpu"}
DISTRIBUTION |= {"ruamel": "ruamel-yaml"}
# Come with something pinned and are its public face
WITH = {
    "jupyter_client": "nbclient",
    "jinja2": "nbconvert",
    "IPython": "ipykernel",
}
WITH |= {"traitlets": "nbconvert", "pygments": "nbconvert", "requests": "dvc", "bs4": "nbconvert"}
WITH |= {"click": "typer", "pytrec_eval": "ir-measures"}


def pins(file: str) -> dict[str, str]:
    "Package -> exact version; a line is an exact pin, perhaps for some Pythons only"
    found = {}
    for line in (ROOT / file).read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            need = Requirement(line)
            match = re.fullmatch(r"==([A-Za-z0-9.!_-]+)", str(need.specifier))
            assert match, f"{file}: {line!r} is no exact pin (or names a build such as +cpu)"
            name = canonical(need.name)
            assert name not in found, f"{file}: {name} stands twice"
            found[name] = match[1]
    return found


REQUIRED, CONSTRAINED = pins("requirements.txt"), pins("constraints.txt")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def installed(name: str) -> str:
    return metadata.version(name).partition("+")[0]


def test_torch_is_first_and_without_a_build():
    assert next(iter(REQUIRED.items())) == ("torch", "2.13.0")
    assert CONSTRAINED["torch"] == "2.13.0"


def test_requirements_are_constraints():
    assert {k: CONSTRAINED.get(k) for k in REQUIRED} == REQUIRED


def test_what_is_installed_is_what_is_pinned():
    "Every package that the requirements need, however deep, stands in constraints.txt"
    todo, seen = [Requirement(name) for name in REQUIRED], {}
    while todo:
        need = todo.pop()
        key = (canonical(need.name), frozenset(need.extras))
        if key in seen:
            continue
        seen[key] = installed(need.name)
        for text in metadata.requires(need.name) or []:
            more = Requirement(text)
            extras = need.extras or {""}
            if more.marker is None or any(more.marker.evaluate({"extra": e}) for e in extras):
                todo.append(more)
    found = {name: version for (name, _), version in seen.items()}
    differ = {n: (v, CONSTRAINED.get(n)) for n, v in found.items() if CONSTRAINED.get(n) != v}
    assert not differ, f"(installed, pinned): {differ}"


def test_conda_reads_the_same_pins():
    "environment.yml names no version of a Python package itself"
    env = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip,) = [d["pip"] for d in env["dependencies"] if isinstance(d, dict)]
    others = [d for d in env["dependencies"] if isinstance(d, str)]
    assert pip == ["-r requirements.txt", "-c constraints.txt", "-e ."]
    assert "python=3.11" in others and "pip" in others
    assert not {canonical(re.split(r"[=<>]", d)[0]) for d in others} & set(CONSTRAINED)
    referred = {option: file for option, file in (o.split() for o in pip)}
    assert pins(referred["-r"]) == REQUIRED and pins(referred["-c"]) == CONSTRAINED


def test_the_package_agrees_with_the_pins():
    "pyproject.toml asks for ranges that hold the pinned version, and for nothing that has no pin"
    project = PROJECT["project"]
    extras = project["optional-dependencies"]
    assert {"gpu", "scale", "dev"} <= set(extras)
    ours = [t for key, texts in extras.items() if key not in ("gpu", "scale") for t in texts]
    ours += project["dependencies"]
    for text in ours:
        need = Requirement(text)
        assert canonical(need.name) in REQUIRED, f"{need.name} has no pin in requirements.txt"
        assert need.specifier.contains(REQUIRED[canonical(need.name)]), text
    named = {canonical(Requirement(t).name) for t in ours}
    assert set(REQUIRED) <= named, f"pinned but in no extra: {set(REQUIRED) - named}"


def test_python_is_the_tested_one():
    assert sys.version_info[:2] >= (3, 11)
    assert PROJECT["project"]["requires-python"].startswith(">=3.11")


def _code():
    "Text of every cell and module that can import"
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] == "code":
                lines = "".join(cell["source"]).splitlines()
                yield path, "\n".join(o for o in lines if not o.startswith(("%", "!")))
    for path in sorted((ROOT / "tests").glob("*.py")):
        yield path, path.read_text()


def imported() -> dict[str, Path]:
    "Distribution -> a file that imports it"
    found = {}
    for path, text in _code():
        for node in ast.walk(ast.parse(text)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for top in {n.split(".")[0] for n in names} - set(sys.stdlib_module_names):
                found[canonical(DISTRIBUTION.get(top, WITH.get(top, top)))] = path
    local = {"recsys-lab", *(canonical(p.stem) for p in ROOT.glob("*/*.py"))}
    return {k: v for k, v in found.items() if k not in local}


def test_every_import_is_pinned():
    missing = {k: str(v.relative_to(ROOT)) for k, v in imported().items() if k not in REQUIRED}
    assert not missing, f"imported but not in requirements.txt: {missing}"


def test_every_pin_is_used():
    idle = set(REQUIRED) - set(imported()) - set(UNIMPORTED)
    assert not idle, f"nothing imports {sorted(idle)}: take them out of requirements.txt"


def test_peers_have_their_own_pins():
    "The peers' environments are frozen too, and ours does not hold them"
    theirs, bandits = (pins(f"peers/requirements-{p}.txt") for p in ("recbole", "obp"))
    assert theirs["recbole"] == "1.2.1" and theirs["torch"] == bandits["torch"] == "2.13.0"
    assert "obp" not in bandits and "obp==" in (ROOT / "Makefile").read_text()  # without its pins
    assert "recbole" not in CONSTRAINED and "obp" not in CONSTRAINED


def make(*words: str) -> str:
    done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_make_prints_its_targets():
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    named = set(re.findall(r"make (\w[\w-]*)", done.stdout))
    assert {"repro", "test", "lab", "report", "peers", "full", "docs", "hooks", "doctor"} <= named
    for target in named - {"help"}:
        assert make(target)


def test_repro_checks_the_data_before_it_computes():
    order = ["recsys-lab fetch", "dvc status -q data.dvc", "dvc repro", "recsys-lab report"]
    plan = make("repro")
    assert [plan.index(step) for step in order] == sorted(plan.index(step) for step in order)
    assert "pytest" in make("test") and "recsys-lab fetch" in make("test")


def test_continuous_integration_calls_make_test():
    text = (ROOT / ".ci/run").read_text()
    assert text.rstrip().endswith("make test") and "set -euo pipefail" in text


def set_up(folder: Path, unless: str) -> subprocess.CompletedProcess:
    "The set-up with a Python that fails at calls that match a shell pattern"
    fake = folder / "python"
    fake.write_text(f'#!/bin/sh\ncase "$*" in {unless}) exit 1;; esac\nexit 0\n')
    fake.chmod(0o755)
    env = {"PYTHON": str(fake), "PATH": "/usr/bin:/bin:/usr/sbin:/sbin"}
    return subprocess.run([ROOT / ".ci/setup"], env=env, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("unless", "said"),
    [
        ("*ensurepip*", "apt-get install -y python3-venv"),
        ("*libgomp.so.1*", "apt-get install -y libgomp1"),
        ("*", "3.11"),
    ],
)
def test_set_up_names_what_is_missing(tmp_path, unless, said):
    "No venv module, a library that cannot be loaded, an old Python: the line that helps is printed"
    done = set_up(tmp_path, unless)
    assert done.returncode == 1 and said in done.stderr


@pytest.mark.parametrize("script", [".ci/run", ".ci/setup", "Makefile"])
def test_no_script_pipes_into_a_reader_that_stops_early(script):
    "Under pipefail the writer's SIGPIPE makes `... | grep -q` fail now and then, though the line was found"
    assert not re.search(r"\|\s*(grep\s+-\w*[qm]|head\b)", (ROOT / script).read_text())
