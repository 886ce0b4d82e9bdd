"The command line as a user meets it: quick help, one line for a mistake, no stack trace"

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recsys_lab.cli.readme import readme_text

ROOT = Path(__file__).resolve().parents[1]
LAB = Path(sys.executable).parent / "recsys-lab"


def lab(*words, cwd=ROOT, **env):
    return subprocess.run(
        [LAB, *words], cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=300
    )


def test_help_is_quick():
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = lab("--help")
        seconds.append(time.perf_counter() - start)
    assert done.returncode == 0
    for verb in ("doctor", "fetch", "study", "report", "record", "params", "readme"):
        assert re.search(rf"\b{verb}\b", done.stdout), f"{verb} is not in --help"
    assert min(seconds) < 1, seconds


def test_help_loads_nothing_heavy():
    code = "import sys, recsys_lab.cli.app; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "numpy", "pandas", "plotly", "papermill", "nbconvert", "IPython"}
    assert not heavy & {m.split(".")[0] for m in done.stdout.split()}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["fetch", "ml100"], "did you mean 'ml100k'"),
        (["params", "model.eese"], "did you mean 'ease'"),
        (["study", "nbs/studies/99_nothing.ipynb", "x"], "no such study"),
        (["study", "nbs/studies/99_nothing.ipynb", "x", "modle"], "name=value"),
        (["serve", "--port", "99999"], "port: "),
    ],
    ids=["fetch", "params", "study", "given", "port"],
)
def test_a_mistake_is_one_line(words, says):
    done = lab(*words)
    assert done.returncode == 2 and done.stdout == ""
    assert says in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


def test_a_version_that_is_none_is_one_line(tmp_path):
    done = lab("registry", "promote", "abc", "--registry", str(tmp_path))
    assert done.returncode == 2 and "a number such as 3" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


def test_unknown_verbs_and_options():
    done = lab("studdy")
    assert done.returncode == 2 and "study" in done.stderr
    assert lab("fetch", "--no-such-option").returncode == 2
    assert lab("study").returncode == 2


def test_outside_the_project(tmp_path):
    done = lab("params", cwd=tmp_path, RECSYS_LAB_ROOT=str(tmp_path))
    assert done.returncode == 2 and "params.yaml does not exist" in done.stderr


def test_a_misspelt_parameter_is_refused(tmp_path):
    text = (ROOT / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(text.replace("\nevaluate:", "\nevaluat:"))
    done = lab("params", RECSYS_LAB_PARAMS=str(tmp_path / "params.yaml"))
    assert done.returncode == 2 and "did you mean 'evaluate'" in done.stderr


def test_fetch_asks_nothing_of_the_network_twice(tmp_path):
    "With every way out closed, data that is there is found there"
    closed = dict.fromkeys(
        ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9"
    )
    done = lab("fetch", **closed, PIP_NO_INDEX="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("there already") == 3


def test_doctor_here():
    done = lab("doctor")
    wrong = re.findall(r"^wrong .*", done.stdout, re.M)
    assert done.returncode == (1 if wrong else 0)
    assert re.search(r"^ok +packages", done.stdout, re.M), done.stdout
    assert re.search(r"^ok +data +ml100k", done.stdout, re.M), done.stdout


def test_doctor_finds_what_is_broken(tmp_path):
    "An empty project: data and pins are absent, each with the command that mends it"
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    done = lab("doctor", cwd=tmp_path, RECSYS_LAB_ROOT=str(tmp_path))
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    assert "recsys-lab fetch ml100k" in done.stdout
    lines = done.stdout.splitlines()
    for here, after in zip(lines, lines[1:], strict=False):
        if here.startswith("wrong"):
            assert "→" in after, f"no remedy: {here}"


def test_readme_is_the_index():
    assert (ROOT / "README.md").read_text() == readme_text(), "run `make docs`"
    assert lab("readme", "--check").returncode == 0


def test_readme_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    links = [t for t in re.findall(r"\]\(([^)\s#]+)", text) if not re.match(r"[a-z]+:", t)]
    assert len(links) > 8
    assert not [t for t in links if not (ROOT / t).exists()]


def test_readme_names_every_chapter_and_target():
    text = (ROOT / "README.md").read_text()
    chapters = {p.name for p in (ROOT / "nbs").iterdir() if re.match(r"\d\d_", p.name)}
    assert not {c for c in chapters if f"(nbs/{c})" not in text}
    makefile = (ROOT / "Makefile").read_text()
    assert not [t for t in re.findall(r"`make (\w[\w-]*)`", text) if f"\n{t}:" not in makefile]
