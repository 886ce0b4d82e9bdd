"A study ends when the process that started it ends, however that ends"

import os
import signal
import subprocess
import sys
import time

import nbformat
import pytest

LONG = "import os, pathlib, time\npathlib.Path('kernel.pid').write_text(str(os.getpid()))\ntime.sleep(120)"


def _study(folder, *cells):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in ("x = 1", *cells)])
    nb.cells[0].metadata["tags"] = ["parameters"]
    nb.metadata["kernelspec"] = {"name": "python3", "display_name": "python3", "language": "python"}
    (folder / "params.yaml").write_text("")
    nbformat.write(nb, folder / "study.ipynb")


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_kernel_dies_with_the_runner(tmp_path):
    _study(tmp_path, LONG)
    code = "from recsys_lab.reporting.studies import run_study; run_study('study.ipynb', 'x')"
    runner = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "RECSYS_LAB_ROOT": str(tmp_path)},
    )
    try:
        end = time.time() + 60
        while not (tmp_path / "kernel.pid").exists():
            assert time.time() < end and runner.poll() is None, "the kernel did not start"
            time.sleep(0.1)
        time.sleep(0.2)
        kernel = int((tmp_path / "kernel.pid").read_text())
        assert _alive(kernel)
    finally:
        runner.send_signal(signal.SIGKILL)
        runner.wait()
    end = time.time() + 5
    while _alive(kernel):
        assert time.time() < end, "the kernel outlived its runner"
        time.sleep(0.05)
    assert not list(tmp_path.glob("artifacts/_executed/study/x.ipynb"))


def test_leftovers_of_a_killed_run_go(tmp_path, monkeypatch):
    from recsys_lab.reporting.studies import run_study

    monkeypatch.setenv("RECSYS_LAB_ROOT", str(tmp_path))
    _study(tmp_path, "x")
    folder = tmp_path / "artifacts" / "_executed" / "study"
    folder.mkdir(parents=True)
    (folder / ".x.12345678.tmp.ipynb").write_text("{")
    done = run_study("study.ipynb", "x")
    assert [p.name for p in folder.iterdir()] == [done.name]


def test_a_kernel_that_is_killed_is_reported(tmp_path, monkeypatch):
    from recsys_lab.reporting.studies import StudyError, run_study

    monkeypatch.setenv("RECSYS_LAB_ROOT", str(tmp_path))
    _study(tmp_path, "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(StudyError, match="the kernel died"):
        run_study("study.ipynb", "x")
