"Whatever is broken, a valid request gets a list, marked as what it is; too many requests are sent away and told when to return"

import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from fastapi.testclient import TestClient

from recsys_lab.serving.app import make_app
from recsys_lab.serving.doors import ServerSettings
from recsys_lab.serving.load import made_up_bundle
from recsys_lab.serving.registry import Registry


@pytest.fixture
def client(tmp_path):
    "Start the application in this process; the clients of a test are closed behind it"
    opened = []

    def client(place, **given) -> TestClient:
        given = {
            "open": True,
            "rate": "100000/second",
            "events": str(tmp_path / "events.db"),
        } | given
        c = TestClient(make_app(ServerSettings(place=str(place), **given), follow=0.02))
        opened.append(c.__enter__())
        return c

    yield client
    for c in opened:
        c.__exit__(None, None, None)


@pytest.fixture
def bundle(tmp_path):
    return made_up_bundle(tmp_path / "bundle", 300, 8, 20, 5)


def ask(c: TestClient, **body) -> dict:
    "A list, which must come"
    answer = c.post("/recommend", json={"k": 5} | body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_no_model(client, tmp_path):
    c = client(tmp_path / "nothing")
    assert ask(c, user=1)["degraded"] == "no model"
    assert c.post("/recommend/batch", json={"users": [1, 2]}).json()["answers"][1]["items"] == []
    ready = c.get("/readyz")
    assert ready.status_code == 503 and ready.json()["faults"] == ["no model"]
    assert c.get("/healthz").status_code == 200
    refused = c.post("/explain", json={"history": [1], "item": 2})
    assert refused.status_code == 503 and refused.headers["Retry-After"]


def test_a_model_that_fails(client, bundle, monkeypatch):
    c = client(bundle, kept=0)
    before = ask(c, history=[1, 2])
    live = c.app.state.desk.served.live
    monkeypatch.setattr(live.scorer, "scores", lambda h: 1 / 0)
    answer = ask(c, history=[1, 2])
    assert (answer["source"], answer["degraded"], len(answer["items"])) == ("popular", "model", 5)
    monkeypatch.undo()
    assert ask(c, history=[1, 2]) == before


def test_a_model_that_hangs(client, bundle, monkeypatch):
    c = client(bundle, kept=0, timeout=0.1)
    live = c.app.state.desk.served.live
    scores = live.scorer.scores
    monkeypatch.setattr(live.scorer, "scores", lambda h: time.sleep(2) or scores(h))
    start = time.perf_counter()
    answer = ask(c, history=[1, 2])
    assert (answer["source"], answer["degraded"], len(answer["items"])) == ("popular", "timeout", 5)
    assert time.perf_counter() - start < 1.8


def test_an_index_that_cannot_be_used(client, tmp_path, monkeypatch):
    place = made_up_bundle(tmp_path / "indexed", 300, 8, 20, 5, indexed=True)
    sound = ask(client(place), history=[1, 2])
    from recsys_lab.ranking.index import VectorIndex

    def broken(*args, **kwargs):
        raise OSError("no such library")

    monkeypatch.setattr(VectorIndex, "load", broken)
    c = client(place)
    assert c.get("/readyz").json() == {"ready": True, "version": "", "faults": ["index"]}
    assert [i["item_id"] for i in ask(c, history=[1, 2])["items"]] == [
        i["item_id"] for i in sound["items"]
    ]


def test_a_damaged_version_does_not_answer(client, bundle, tmp_path):
    registry = Registry(tmp_path / "registry")
    for _ in range(2):
        registry.add(bundle)
    registry.promote("1")
    c = client(registry.folder)
    registry.promote("2")
    time.sleep(0.3)
    assert ask(c, user=1)["version"] == "0002"
    weights = registry.folder / "versions/0001/tensors.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="tensors.safetensors"):
        registry.rollback()
    assert ask(c, user=1)["version"] == "0002"
    shutil.rmtree(registry.folder)  # Even so: what answers is in memory
    time.sleep(0.1)
    assert ask(c, user=2)["source"] == "model"


@pytest.mark.parametrize("how", ["gone", "silent"])
def test_redis_gone_or_silent(client, bundle, how):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        if how == "silent":
            s.listen()
        c = client(bundle, redis=f"redis://127.0.0.1:{s.getsockname()[1]}")
        start = time.perf_counter()
        lists = [ask(c, user=u)["source"] for u in range(20)]
        assert set(lists) == {"model"}
        assert time.perf_counter() - start < 3


def test_strangers(client, bundle):
    c = client(bundle)
    popular = ask(c)["items"]
    for body in ({"user": "nobody"}, {"user": -1}, {"history": []}):
        answer = ask(c, **body)
        assert (answer["source"], answer["items"]) == ("popular", popular)
    unknown = ask(c, history=["what", 10**30, 9999])
    assert (unknown["source"], unknown["unknown_items"], unknown["items"]) == (
        "popular",
        3,
        popular,
    )
    assert ask(c, history=["what", 1])["source"] == "model"


def test_feedback_that_cannot_be_written(client, bundle, monkeypatch):
    c = client(bundle, kept=0)
    log = c.app.state.desk.events
    body = {"key": "a", "user": 1, "item": 2, "kind": "like"}
    before = ask(c, user=1)
    log.close()
    refused = c.post("/feedback", json=body)
    assert refused.status_code == 503 and refused.headers["Retry-After"]
    after = ask(c, user=1)
    assert (after["items"], after["degraded"]) == (before["items"], "feedback")


def test_too_many_are_sent_away(client, bundle, monkeypatch):
    c = client(bundle, kept=0, waiting=4, timeout=5)
    live = c.app.state.desk.served.live
    scores = live.scorer.scores
    monkeypatch.setattr(live.scorer, "scores", lambda h: time.sleep(0.1) or scores(h))
    with ThreadPoolExecutor(24) as crowd:
        got = list(crowd.map(lambda u: c.post("/recommend", json={"history": [u]}), range(24)))
    assert {r.status_code for r in got} == {200, 503}
    assert all(r.headers["Retry-After"] for r in got if r.status_code == 503)
    assert ask(c, history=[1])["source"] == "model"


def test_too_often(client, bundle):
    c = client(bundle, rate="5/minute")
    got = [c.post("/recommend", json={"user": 1}) for _ in range(8)]
    assert [r.status_code for r in got] == [200] * 5 + [429] * 3
    assert 1 <= int(got[-1].headers["Retry-After"]) <= 60


@pytest.mark.parametrize(
    "rule", ["[" * 700 + "]" * 700, "NaN", "1e400", "{}", "null", '["a", [1]]', '"\\ud800"']
)
def test_a_filter_that_is_no_filter(client, bundle, rule):
    c, start = client(bundle), time.perf_counter()
    for path, body in (("", '"history": [1]'), ("/batch", '"histories": [[1]]')):
        text = f'{{{body}, "filters": {{"title": {rule}}}}}'
        wrong = c.post(
            f"/recommend{path}", content=text, headers={"Content-Type": "application/json"}
        )
        assert wrong.status_code == 422, wrong.text
    assert time.perf_counter() - start < 2


def test_a_request_that_fails_alone(client, bundle, monkeypatch):
    c = client(bundle, kept=0, timeout=5)
    lists = c.app.state.desk.lists

    def broken(live, asks):
        time.sleep(0.05)
        if any(a.k == 7 for a in asks):
            raise RuntimeError("of one")
        return lists(live, asks)

    monkeypatch.setattr(c.app.state.desk, "lists", broken)
    c = TestClient(c.app, raise_server_exceptions=False)
    with ThreadPoolExecutor(12) as crowd:
        got = list(
            crowd.map(lambda k: c.post("/recommend", json={"k": k}).status_code, range(1, 13))
        )
    assert got == [500 if k == 7 else 200 for k in range(1, 13)]


def test_a_key_belongs_to_its_user(client, bundle):
    "Nobody learns of another's feedback by its key, and nobody takes it away"
    c = client(bundle)
    said = {"key": "a", "user": 1, "item": 23, "kind": "dislike"}
    assert c.post("/feedback", json=said).json() == {"new": True}
    other = c.post("/feedback", json=said | {"user": 2, "item": 3, "kind": "view"})
    assert other.json() == {"new": True}
    refused = c.post("/feedback", json=said | {"item": 3})
    assert refused.status_code == 409
    assert "23" not in refused.text and "dislike" not in refused.text


def test_a_stranger_holds_no_place(client, bundle):
    "Who has no key is refused before the body is read"
    c = client(bundle, open=False, keys="k" * 20)
    assert c.post("/recommend", content=(b"{}" for _ in range(1))).status_code == 401
    known = {"Authorization": f"Bearer {'k' * 20}"}
    assert c.post("/recommend", json={"k": 3}, headers=known).status_code == 200
    assert c.get("/", headers={}).status_code == 200


def test_a_log_that_cannot_be_written_names_no_folder(client, bundle, tmp_path, monkeypatch):
    c = client(bundle)

    def full(*args):
        raise OSError(28, "No space left on device", str(tmp_path / "events.db.lock"))

    monkeypatch.setattr("recsys_lab.serving.events.alone", full)
    refused = c.post("/feedback", json={"key": "a", "user": 1, "item": 2, "kind": "like"})
    assert refused.status_code == 503 and "No space left" in refused.text
    assert str(tmp_path) not in refused.text


def test_many_lists_count_as_many_requests(client, bundle):
    c = client(bundle, rate="50/minute")
    assert c.post("/recommend/batch", json={"users": list(range(500))}).status_code == 200
    got = [c.post("/recommend", json={"user": 1}).status_code for _ in range(5)]
    assert got[-1] == 429, got  # Not the first: a window may just have begun
    assert c.get("/search?q=x").status_code == 429  # Whatever is asked for


def test_an_id_with_a_slash(client, tmp_path):
    import numpy as np
    import polars as pl

    from recsys_lab.serving.bundle import save_bundle

    films = pl.DataFrame({"item_id": ["Face/Off", "Heat"], "title": ["Face/Off", "Heat"]})
    tensors = {
        "popularity": np.ones(2, np.float32),
        "seen.items": np.zeros(0, np.int32),
        "seen.offsets": np.zeros(1, np.int64),
    }
    place = save_bundle(tmp_path / "b", {"kind": "popularity"}, films, np.zeros(0, int), tensors)
    got = client(place).get("/similar/Face%2FOff").json()
    assert [i["item_id"] for i in got["items"]] == ["Heat"]


def test_nobody_is_redirected_to_a_host_of_their_choice(client, bundle):
    c = client(bundle)
    got = c.get("/search/", headers={"Host": "elsewhere.example"}, follow_redirects=False)
    assert got.status_code == 404
