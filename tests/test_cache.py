"Kept answers: shared by processes through a real Redis, which is killed, comes back and falls asleep"

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_lab.core.files import sha256
from recsys_lab.serving.cache import Cache, Far, PrecomputedTable, answer_key

WHY = "redis-server is not installed (Debian: apt install redis-server)"


class Server:
    "A Redis of our own on loopback; nothing is kept on disk"

    def __init__(self, *options):
        with socket.create_server(("127.0.0.1", 0)) as s:
            self.port = s.getsockname()[1]
        self.options, self.process = options, None
        self.address = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self):
        given = ["--port", self.port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        given += ["--enable-debug-command", "yes", *self.options]
        command = ["redis-server", *map(str, given)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        until = time.monotonic() + 30
        while True:
            try:
                return socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            except OSError:
                assert time.monotonic() < until and self.process.poll() is None, "no Redis"
                time.sleep(0.02)

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def server():
    "Makes servers; all are gone afterwards"
    if not shutil.which("redis-server"):
        (pytest.fail if os.environ.get("RECSYS_LAB_CI") else pytest.skip)(WHY)
    made: list[Server] = []

    def start(*options) -> Server:
        made.append(Server(*options))
        return made[-1]

    yield start
    for s in made:
        s.kill()


# A slow machine must not look like a slow Redis where that is not what is tested
PATIENT = {"slow": 5.0, "pause": 0.3}


def seconds(act) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def until(what, limit: float = 30.0):
    "Wait for it"
    end = time.monotonic() + limit
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_two_processes_share(server):
    "What one has computed the other finds in Redis, and then in itself"
    redis = server()
    code = (
        "import sys; from recsys_lab.serving.cache import Cache; c = Cache(sys.argv[1], slow=5.0); "
        "print(c.get('v:a')); c.put('v:b', b'[2]')"
    )
    cache = Cache(redis.address, **PATIENT)
    cache.put("v:a", b"[1]")
    done = subprocess.run(
        [sys.executable, "-c", code, redis.address], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "b'[1]'"
    assert [cache.get("v:b"), cache.get("v:b"), cache.get("v:c")] == [b"[2]", b"[2]", None]
    stats = cache.stats()
    assert stats["near"] == {"hits": 1, "misses": 2}
    assert {k: stats["redis"][k] for k in ("hits", "misses", "puts", "open")} == {
        "hits": 1,
        "misses": 1,
        "puts": 1,
        "open": False,
    }


def test_redis_is_killed_and_comes_back(server):
    "Answers go on, then Redis is used again; nobody sees an error"
    redis = server()
    cache, other = Cache(redis.address, **PATIENT), Cache(redis.address, **PATIENT)
    cache.put("a", b"[1]")
    assert other.get("a") == b"[1]"
    redis.kill()
    assert cache.get("a") == b"[1]", "this process still knows"
    assert seconds(lambda: [cache.get("b") for _ in range(50)]) < 1
    cache.put("b", b"[2]")
    assert cache.get("b") == b"[2]" and cache.stats()["redis"]["open"]
    assert cache.stats()["redis"]["skipped"] > 40
    redis.start()

    def used():
        cache.put("c", b"[3]")
        return not cache.stats()["redis"]["open"]

    until(used)
    until(lambda: other.get("c") == b"[3]")


def test_redis_falls_asleep(server):
    "It costs the limit once, not each time; afterwards answers belong to their questions"
    redis = server()
    cache = Cache(redis.address, slow=0.05, pause=0.5)
    for i in range(20):
        cache.far.put(f"k{i}", str(i).encode(), 60)
    until(lambda: cache.far.get("k0")[0] == "hits")
    sleeper = Far(redis.address, slow=10)
    nap = threading.Thread(target=lambda: sleeper._db.execute_command("DEBUG", "SLEEP", "1.5"))
    nap.start()
    time.sleep(0.3)
    first = seconds(lambda: cache.get("k1"))
    rest = [seconds(lambda i=i: cache.get(f"k{i}")) for i in range(2, 12)]
    assert first < 1 and sorted(rest)[5] < 0.02, (first, rest)
    assert cache.stats()["redis"]["failures"] >= 1 and cache.stats()["redis"]["skipped"] >= 5
    nap.join()
    until(lambda: cache.far.get("k0")[0] == "hits")
    for i in range(20):
        how, value = cache.far.get(f"k{i}")
        assert value == str(i).encode() or how != "hits"


@pytest.mark.parametrize("kind", ["silent", "full", "garbage", "closes"])
def test_what_is_no_redis(kind):
    "A socket that never answers, never accepts, answers nonsense, or hangs up"
    with socket.create_server(("127.0.0.1", 0), backlog=0 if kind == "full" else 16) as s:
        address, stop, fill = f"redis://127.0.0.1:{s.getsockname()[1]}", threading.Event(), []

        def answer():
            s.settimeout(0.05)
            while not stop.is_set():
                try:
                    c = s.accept()[0]
                except TimeoutError:
                    continue
                if kind == "garbage":
                    c.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                c.close()

        if kind == "full":
            for _ in range(3):
                fill.append(socket.socket())
                fill[-1].setblocking(False)
                fill[-1].connect_ex(s.getsockname())
        if kind in ("garbage", "closes"):
            talker = threading.Thread(target=answer)
            talker.start()
        cache = Cache(address, slow=0.02, pause=60)
        assert seconds(lambda: cache.get("a")) < 1
        assert seconds(lambda: [cache.get("a") for _ in range(100)]) < 1
        cache.put("a", b"[1]")
        assert cache.get("a") == b"[1]"
        stats = cache.stats()["redis"]
        assert stats["failures"] == 1 and stats["skipped"] == 101 and stats["open"], stats
        stop.set()
        if kind == "silent":
            s.settimeout(0.05)
            s.accept()[0].close()
            with pytest.raises(TimeoutError):  # it was tried once, not again at once
                s.accept()
        for f in fill:
            f.close()
        if kind in ("garbage", "closes"):
            talker.join()


def test_a_full_redis_and_a_password(server):
    "Errors of Redis itself are no errors of ours"
    full = server("--maxmemory", "100kb", "--maxmemory-policy", "noeviction")
    locked = server("--requirepass", "secret")
    for redis, word in ((full, "memory"), (locked, "Auth")):
        cache = Cache(redis.address, **PATIENT)
        cache.put("a", b"[1]")
        assert cache.get("a") == b"[1]"
        assert word.lower() in cache.stats()["redis"]["last"].lower()
    cache = Cache(locked.address.replace("//", "//:secret@"), **PATIENT)
    cache.put("a", b"[1]")
    assert cache.stats()["redis"]["puts"] == 1


def test_time_is_up_in_redis_too(server):
    redis = server()
    cache = Cache(redis.address, **PATIENT)
    cache.put("a", b"[1]", ttl=0.2)
    assert 0 < cache.far._db.pttl("recsys_lab:a") <= 200
    until(lambda: cache.far.get("a")[1] is None, 5)
    assert cache.get("a") is None


def test_nothing_but_the_command_is_sent(server):
    "A greeting would cost a round trip each, and each could be slow"
    redis = server()
    far = Far(redis.address, **PATIENT)
    far.get("a")
    seen = far._db.info("commandstats")
    assert set(seen) - {"cmdstat_info"} == {"cmdstat_get"}, set(seen)


def test_many_threads(server):
    "Every answer belongs to its question"
    address = server().address
    cache = Cache(address, room=20_000, slow=5.0)

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(300):
            key = f"k{rng.integers(50)}"
            found = cache.get(key)
            assert found in (None, key.encode())
            if found is None:
                cache.put(key, key.encode())

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, range(16)))
    stats = cache.stats()
    assert stats["near"]["hits"] + stats["near"]["misses"] == 16 * 300
    assert stats["redis"].get("failures", 0) == 0
    another = Cache(address, room=20_000, slow=5.0)  # Finds with Redis what the first put there
    assert [another.get(f"k{i}") for i in range(50)] == [f"k{i}".encode() for i in range(50)]
    assert another.stats()["redis"]["hits"] == 50


plain = st.none() | st.integers(-5, 5) | st.text(max_size=2)
parts = st.fixed_dictionaries(
    {
        "user": plain,
        "history": st.none() | st.lists(plain, max_size=2),
        "position": st.integers(0, 3),
        "k": st.integers(1, 3),
        "filters": st.dictionaries(st.sampled_from("ab"), plain, max_size=2),
    }
)


@settings(max_examples=300, deadline=None)
@given(parts, parts, st.sampled_from(["0001", "0002"]), st.sampled_from(["0001", "0002"]))
def test_keys_are_equal_when_everything_is(a, b, version, other):
    same = json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True) and version == other
    assert (answer_key(version, **a) == answer_key(other, **b)) is same


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    user=st.integers(-2, 8),
    k=st.integers(-1, 8),
)
def test_table(tmp_path_factory, rows, user, k):
    "Rows with `n` of 5 items: the best k, all where there are no more, nothing where it cannot know"
    codes, scores = np.full((len(rows), 5), -1, np.int32), np.zeros((len(rows), 5))
    for u, n in enumerate(rows):
        codes[u, :n], scores[u, :n] = np.arange(n) + 10 * u, -np.arange(n)
    file = PrecomputedTable.build(codes, scores).save(
        tmp_path_factory.mktemp("t") / "t.safetensors"
    )
    before, table = sha256(file), PrecomputedTable.load(file)
    got = table.get(user, k)
    n = rows[user] if 0 <= user < len(rows) else 0
    if k < 1 or n == 0 or (n == 5 and k > 5):
        assert got is None
    else:
        assert got[0].tolist() == codes[user, : min(k, n)].tolist()
        assert got[1].tolist() == scores[user, : min(k, n)].tolist()
    with pytest.raises(ValueError):  # the file is mapped, and nobody writes into it
        table.codes[0, 0] = 3
    assert sha256(file) == before


def test_import_is_light():
    "Neither torch nor pandas nor IPython; Redis only where there is one"
    code = "import sys, recsys_lab.serving.cache; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "pandas", "IPython", "redis"} & set(done.stdout.split())
