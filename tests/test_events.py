"The feedback log: killed writers, several processes, repeated sends"

import multiprocessing
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recsys_lab.serving.events import KINDS, Conflict, Event, EventLog, Unavailable


def event(key: str, user: str = "u", kind: str = "like", at: float = 0.0) -> Event:
    return Event(key, user, "1", kind, at)


# Eight callers send at once; a key is printed when its event is acknowledged
WRITER = r"""
import itertools, os, sys, threading
from recsys_lab.serving.events import Event, EventLog
log, name = EventLog(sys.argv[1]), sys.argv[2]
def call(c):
    for i in itertools.count():
        key = f"{name}-{c}-{i}"
        log.append([Event(key, f"u{c}", str(i), "like", 0.0)])
        os.write(1, f"{key}\n".encode())  # one write: lines of threads do not mix
threads = [threading.Thread(target=call, args=(c,), daemon=True) for c in range(8)]
for t in threads: t.start()
for t in threads: t.join()
"""


def writer(path: Path, name: str) -> subprocess.Popen:
    command = [sys.executable, "-c", WRITER, str(path), name]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("round", range(3))
def test_killed_writer_loses_nothing(tmp_path, round):
    "Every acknowledged event is there exactly once, and sending it again changes nothing"
    path = tmp_path / "events.db"
    p = writer(path, "k")
    said = [p.stdout.readline().strip() for _ in range(100 + 37 * round)]
    p.send_signal(signal.SIGKILL)
    said += p.communicate()[0].split("\n")[:-1]  # a line without its end was not said
    with EventLog(path) as log:
        there = Counter(e.key for _, e in log.replay())
        assert not set(said) - set(there) and max(there.values()) == 1
        assert len(set(said)) == len(said) >= 100
        again = [Event(k, f"u{k.split('-')[1]}", k.split("-")[2], "like", 9.0) for k in said]
        assert log.append(again) == [False] * len(said)
        assert Counter(e.key for _, e in log.replay()) == there
        assert log._read("PRAGMA integrity_check") == [("ok",)]


def test_killed_among_others(tmp_path):
    "Three processes open a new file at once; one is killed, the others go on"
    path = tmp_path / "events.db"
    three = [writer(path, name) for name in "abc"]
    said = [[p.stdout.readline().strip() for _ in range(40)] for p in three]
    three[0].send_signal(signal.SIGKILL)
    said[0] += three[0].communicate()[0].split("\n")[:-1]
    for p, keys in zip(three[1:], said[1:], strict=True):
        keys += [p.stdout.readline().strip() for _ in range(40)]
        p.send_signal(signal.SIGKILL)
        keys += p.communicate()[0].split("\n")[:-1]
    with EventLog(path) as log:
        found = list(log.replay())
    numbers, keys = [n for n, _ in found], Counter(e.key for _, e in found)
    assert numbers == sorted(set(numbers)) and max(keys.values()) == 1
    assert not {k for part in said for k in part} - set(keys)


def _send(path, keys, barrier, answers):
    with EventLog(path) as log:
        barrier.wait()
        answers.put(sum(new for k in keys for new in log.append([event(k)])))


def test_processes_send_the_same_keys(tmp_path):
    "Each key is new for one of them only"
    path, keys = tmp_path / "events.db", [f"k{i}" for i in range(60)]
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(3), context.Queue()
    workers = [context.Process(target=_send, args=(path, keys, barrier, answers)) for _ in range(3)]
    for w in workers:
        w.start()
    assert sum(answers.get(timeout=120) for _ in workers) == len(keys)
    for w in workers:
        w.join()
    with EventLog(path) as log:
        assert sorted(e.key for _, e in log.replay()) == sorted(keys)


text = st.text(min_size=1, max_size=8)
events = st.builds(
    Event,
    key=st.sampled_from("abcdef"),
    user=st.sampled_from(["ann", "bob"]),
    item=st.sampled_from(["1", "2"]),
    kind=st.sampled_from(sorted(KINDS)),
    time=st.floats(0, 2e9),
    version=st.none() | st.just("0001"),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(calls=st.lists(st.lists(events, max_size=4), max_size=8))
def test_idempotent(tmp_path_factory, calls):
    "The log holds what a dictionary would, whatever is repeated, in whatever grouping"
    held: dict[tuple, Event] = {}
    of, content = lambda e: (e.user, e.key), lambda e: (e.item, e.kind)
    with EventLog(tmp_path_factory.mktemp("log") / "e.db") as log:
        for call in calls:
            trial, new = dict(held), []
            for e in call:
                new.append(of(e) not in trial)
                trial.setdefault(of(e), e)
            if all(content(trial[of(e)]) == content(e) for e in call):
                before = {u: log.position(u) for u in ("ann", "bob")}
                assert log.append(call) == new
                held = trial
                gained = {e.user for e, n in zip(call, new, strict=True) if n}
                assert {u for u in before if log.position(u) > before[u]} == gained
            else:
                with pytest.raises(Conflict):
                    log.append(call)
            assert [e for _, e in log.replay()] == list(held.values())
        for user in ("ann", "bob"):
            assert log.of(user) == [e for e in held.values() if e.user == user]


@settings(max_examples=50, deadline=None)
@given(key=text, user=text, item=text, at=st.floats(0, 2.5e11))
def test_any_text_comes_back(tmp_path_factory, key, user, item, at):
    "Zero characters, quotes and accents too"
    e = Event(key, user, item, "view", at, "v")
    with EventLog(tmp_path_factory.mktemp("log") / "e.db") as log:
        assert log.append([e]) == [True] and log.of(user) == [e]
        assert log.append([e]) == [False]


def test_a_conflict_is_its_callers_alone(tmp_path):
    "Others in the same transaction are written"
    with EventLog(tmp_path / "e.db", gather=0.05) as log:
        log.append([event("k")])
        log._last = 3  # wait for three callers
        wrong = log.submit([event("x"), event("k", kind="dislike")])
        right = [log.submit([event("y")]), log.submit([event("k", at=5.0)])]
        assert [f.result() for f in right] == [[True], [False]]
        with pytest.raises(Conflict, match="take a new key"):
            wrong.result()
        assert [e.key for _, e in log.replay()] == ["k", "y"]


def test_callers_share_a_transaction(tmp_path):
    with EventLog(tmp_path / "e.db") as log:
        commits = []
        log._writer.set_trace_callback(lambda sql: commits.append(sql) if sql == "COMMIT" else None)
        with ThreadPoolExecutor(32) as pool:
            sent = pool.map(lambda i: log.append([event(f"k{i}")]), range(640))
            assert all(new == [True] for new in sent)
        assert len(commits) < 320


def test_a_locked_log_says_so_and_goes_on(tmp_path):
    "Another program holds the database; afterwards the same events are taken"
    with EventLog(tmp_path / "e.db") as log:
        log._writer.execute("PRAGMA busy_timeout = 100")
        other = sqlite3.connect(tmp_path / "e.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(Unavailable, match="locked.*same keys"):
            log.append([event("k")])
        other.execute("ROLLBACK")
        other.close()
        assert log.append([event("k")]) == [True]


def test_a_caller_that_gave_up(tmp_path):
    "Cancelled while it waits: not written, and the others are served"
    with EventLog(tmp_path / "e.db") as log, sqlite3.connect(tmp_path / "e.db") as other:
        other.execute("BEGIN IMMEDIATE")
        first = log.submit([event("a")])
        until = time.monotonic() + 10
        while not first.running() and time.monotonic() < until:
            time.sleep(0.001)
        second, third = log.submit([event("b")]), log.submit([event("c")])
        assert second.cancel()
        other.rollback()
        assert first.result() == third.result() == [True]
        with pytest.raises(CancelledError):
            second.result()
        assert [e.key for _, e in log.replay()] == ["a", "c"]


def test_closing_writes_what_waits(tmp_path):
    log = EventLog(tmp_path / "e.db")
    sent = [log.submit([event(f"k{i}")]) for i in range(50)]
    closers = [threading.Thread(target=log.close) for _ in range(3)]
    for c in closers:
        c.start()
    for c in closers:
        c.join()
    assert all(f.result() == [True] for f in sent)
    with EventLog(tmp_path / "e.db") as again:
        assert len(list(again.replay())) == 50


def test_a_newer_file_is_refused(tmp_path):
    EventLog(tmp_path / "e.db").close()
    with sqlite3.connect(tmp_path / "e.db") as db:
        db.execute("PRAGMA user_version = 2")
    with pytest.raises(ValueError, match="schema 2"):
        EventLog(tmp_path / "e.db")


def test_an_export_that_was_cut_short(tmp_path, monkeypatch):
    "The next one leaves each event once"
    with EventLog(tmp_path / "e.db") as log:
        log.append([event(f"k{i}", at=i * 40_000) for i in range(10)])
        log.export(tmp_path / "out")
        log.append([event(f"n{i}", at=i * 40_000) for i in range(10)])
        whole, done = EventLog._day, []

        def fails(self, day, upto):
            if done:
                raise OSError("disk full")
            done.append(day)
            return whole(self, day, upto)

        monkeypatch.setattr(EventLog, "_day", fails)
        with pytest.raises(OSError, match="disk full"):
            log.export(tmp_path / "out")
        monkeypatch.setattr(EventLog, "_day", whole)
        assert len(log.export(tmp_path / "out")) == 5
        table = pq.read_table(tmp_path / "out").to_pydict()
        found = list(log.replay())
        assert sorted(table["seq"]) == [n for n, _ in found]
        assert Counter(table["key"]) == Counter(e.key for _, e in found)


def test_import_is_light():
    "Neither torch nor pandas nor IPython"
    code = "import sys, recsys_lab.serving.events; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "pandas", "IPython", "pyarrow"} & set(done.stdout.split())
