"What several tests share: the project's root, the mirror of data sets, the list of slow notebooks"

import os
from pathlib import Path

import pytest

# Two workers with two threads each wait for each other: on two cores one contract took 79 s instead of 4.
# Set before anything imports torch or numpy, which read it once
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")

ROOT = Path(__file__).resolve().parents[1]
CI = bool(os.environ.get("RECSYS_LAB_CI"))
CHROMIUM = "/usr/bin/chromium"
ARGS = (
    "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update "
    "--disable-sync --no-first-run"
).split()


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def mirror() -> Path:
    "Folder with copies of the published data sets; without it a test that needs it is skipped"
    given = os.environ.get("RECSYS_LAB_MIRROR")
    if not given:
        pytest.skip("RECSYS_LAB_MIRROR is not set")
    if not Path(given).is_dir():
        pytest.fail(f"RECSYS_LAB_MIRROR={given} is no folder")
    return Path(given)


@pytest.fixture(scope="module")
def browser():
    "Debian's Chromium; without it a test that needs it is skipped"
    if not Path(CHROMIUM).exists():
        pytest.skip(f"{CHROMIUM} is not installed: apt install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield b
        b.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    "Where continuous integration gave a mirror, a test that needs it and skips has failed"
    report = yield
    if CI and report.skipped and "mirror" in getattr(item, "fixturenames", ()):
        if os.environ.get("RECSYS_LAB_MIRROR") and not hasattr(report, "wasxfail"):
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid} needs the mirror, which is there, and skipped"
    return report


def pytest_terminal_summary(terminalreporter):
    "The five slowest notebooks"
    ran = [
        (r.duration, r.nodeid.partition("[")[2].rstrip("]"))
        for outcome in ("passed", "failed")
        for r in terminalreporter.stats.get(outcome, [])
        if r.when == "call" and "::test_runs[" in r.nodeid
    ]
    if ran:
        terminalreporter.section("slowest notebooks", sep="-")
        for seconds, name in sorted(ran, reverse=True)[:5]:
            terminalreporter.write_line(f"{seconds:6.1f} s  {name}")
