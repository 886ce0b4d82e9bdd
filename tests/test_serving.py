"The server as a process: what it imports, what survives it, what it answers to anything"

import os
import socket
import subprocess
import sys
import threading
import time

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable

from recsys_lab.serving.app import make_app
from recsys_lab.serving.doors import ServerSettings
from recsys_lab.serving.events import EventLog
from recsys_lab.serving.load import Running, made_up_bundle
from recsys_lab.serving.registry import Registry

pytestmark = pytest.mark.xdist_group("serving")  # one module's server at a time
FUZZ = int(os.environ.get("RECSYS_LAB_FUZZ", 150))  # Requests a route; 1,500 make ten thousand


@pytest.fixture
def start(tmp_path):
    "Start servers; whatever still runs at the end is killed"
    running = []

    def start(place, *more):
        running.append(Running(place, tmp_path / "events.db", *more))
        return running[-1]

    yield start
    for server in running:
        server.stop()


def test_the_server_imports_no_workbench():
    "A serving machine needs neither torch nor the notebook's tools"
    heavy = "torch pandas scipy numba plotly IPython nbdev papermill matplotlib captum shap sklearn"
    code = f"import sys, recsys_lab.serving.app, recsys_lab.serving.page as p; p.page(); print([m for m in {heavy.split()} if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_acknowledged_feedback_survives_kill_9(start, tmp_path):
    "Killed while eight people talk: what was confirmed is there, once; what is sent again counts once"
    server = start(made_up_bundle(tmp_path / "bundle"))
    confirmed, lock = [], threading.Lock()

    def talk(who: int):
        for i in range(10_000):
            body = {"key": f"{who}-{i}", "user": who, "item": i % 50, "kind": "view"}
            try:
                status, _ = server.ask("POST", "/feedback", body)
            except (OSError, Exception):
                return
            if status == 200:
                with lock:
                    confirmed.append(body["key"])

    threads = [threading.Thread(target=talk, args=(w,)) for w in range(8)]
    for t in threads:
        t.start()
    time.sleep(1.5)
    server.stop()
    for t in threads:
        t.join()
    assert len(confirmed) > 5
    server = start(tmp_path / "bundle")
    for key in confirmed[-5:]:
        who, i = map(int, key.split("-"))
        body = {"key": key, "user": who, "item": i % 50, "kind": "view"}
        assert server.ask("POST", "/feedback", body) == (200, {"new": False})
    server.stop()
    with EventLog(tmp_path / "events.db") as log:
        keys = [event.key for _, event in log.replay()]
    assert len(keys) == len(set(keys))
    assert set(confirmed) <= set(keys)


def test_hot_swap_fails_no_request(start, tmp_path):
    "Versions change hands while clients ask without a pause"
    registry = Registry(tmp_path / "registry")
    for _ in range(2):
        registry.add(made_up_bundle(tmp_path / "bundle"))
    registry.promote("1")
    server, seen, end = start(registry.folder), [], threading.Event()

    def client():
        while not end.is_set():
            status, answer = server.ask("POST", "/recommend", {"user": 3})
            seen.append((status, answer.get("version"), answer.get("source")))

    threads = [threading.Thread(target=client) for _ in range(4)]
    for t in threads:
        t.start()
    for _ in range(2):
        time.sleep(0.8)
        registry.promote("2")
        time.sleep(0.8)
        registry.rollback()
    end.set()
    for t in threads:
        t.join()
    assert {status for status, _, _ in seen} == {200}
    assert {source for _, _, source in seen} == {"model"}
    assert len({version for _, version, _ in seen}) == 2


def test_two_workers_are_one_server(start, tmp_path):
    "What one process was told the other knows, and their numbers are added up"
    server = start(made_up_bundle(tmp_path / "bundle"), "--workers", "2")
    before = server.ask("POST", "/recommend", {"user": 3, "k": 3})[1]["items"]
    gone = before[0]["item_id"]
    body = {"key": "a", "user": 3, "item": gone, "kind": "dislike"}
    assert server.ask("POST", "/feedback", body)[0] == 200
    for _ in range(20):
        after = server.ask("POST", "/recommend", {"user": 3, "k": 3})[1]["items"]
        assert gone not in [i["item_id"] for i in after]
    # A request is counted after its answer has left, and a worker that still starts is not ready
    told = [
        'recsys_lab_requests_total{route="/recommend",status="200"} 21.0',
        "recsys_lab_ready 1.0",
    ]
    end, missing = time.monotonic() + 20, told
    while missing and time.monotonic() < end:
        numbers = server.ask("GET", "/metrics")[1]
        missing = [line for line in told if line not in numbers]
        time.sleep(0.05)
    assert not missing, numbers


def test_a_body_that_does_not_come_holds_no_place(start, tmp_path, monkeypatch):
    monkeypatch.setenv("RECSYS_LAB_SERVE_WAITING", "4")
    monkeypatch.setenv("RECSYS_LAB_SERVE_PATIENCE", "1")
    server = start(made_up_bundle(tmp_path / "bundle", 300, 8, 20, 5))
    head = b"POST /recommend HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{"
    slow = [socket.create_connection(("127.0.0.1", server.port), 10) for _ in range(4)]
    for s in slow:
        s.sendall(head)
    time.sleep(0.3)
    assert server.ask("POST", "/recommend", {"history": [1]})[0] == 503
    assert all(s.recv(1000).startswith(b"HTTP/1.1 408") for s in slow)
    assert server.ask("POST", "/recommend", {"history": [1]})[0] == 200


def test_a_flipped_byte_is_refused_by_name(tmp_path):
    "In every file of a bundle with an index, when it is added and when it is loaded"
    place = made_up_bundle(tmp_path / "bundle", 300, 8, 20, 5, indexed=True)
    registry = Registry(tmp_path / "registry")
    home = registry.folder / "versions" / registry.add(place)
    files = sorted(str(f.relative_to(home)) for f in home.rglob("*") if f.is_file())
    assert {"index/index.faiss", "tensors.safetensors", "manifest.json"} <= set(files)
    for file in files:
        sound = (home / file).read_bytes()
        wrong = bytearray(sound)
        wrong[len(wrong) // 2] ^= 1
        (home / file).write_bytes(wrong)
        with pytest.raises(ValueError, match=file):
            registry.load("1")
        (home / file).write_bytes(sound)
    assert registry.load("1").version == "0001"


def test_a_worse_model_is_refused(tmp_path):
    "The gate compares user by user"
    registry = Registry(tmp_path / "registry")
    for quality in (0.5, 0.4):
        registry.add(made_up_bundle(tmp_path / "bundle", quality=quality))
    registry.promote("1")
    with pytest.raises(ValueError, match="ndcg@10"):
        registry.promote("2")


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    "The application in this process, open and without limits"
    folder = tmp_path_factory.mktemp("fuzz")
    place, events = made_up_bundle(folder / "bundle"), folder / "events.db"
    return make_app(
        ServerSettings(place=str(place), events=str(events), open=True, rate="1000000/second")
    )


def test_nothing_makes_it_fail(app):
    "Any request that the documentation allows, and many that it does not: never a 5xx"
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    routes = [result.ok() for result in schema.get_all_operations()]
    assert len(routes) >= 9
    asked, failed = [], []

    def ask(case):
        "Send one request and keep what failed"
        answer = case.call()
        asked.append(answer.status_code)
        if answer.status_code >= 500:
            failed.append((case.method, case.path, case.body, case.query, answer.status_code))

    plan = settings(
        max_examples=FUZZ, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    for route in routes:
        for mode in schemathesis.GenerationMode:
            try:
                plan(given(case=route.as_strategy(generation_mode=mode))(ask))()
            except Unsatisfiable:  # Nothing can be wrong with a route that takes nothing
                assert not route.body and mode is schemathesis.GenerationMode.NEGATIVE
    print(f"{len(asked):,} requests, {sum(s < 300 for s in asked):,} answered")
    assert not failed, failed[:3]
    assert sum(s < 300 for s in asked) > FUZZ
