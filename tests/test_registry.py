"Versions under several processes, killed ones among them, and what a server imports"

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from recsys_lab.core.files import ManifestError, check_manifest, write_json, write_manifest
from recsys_lab.serving.bundle import save_bundle
from recsys_lab.serving.registry import Refused, Registry


def bundle(folder: Path, gain: float = 0.0, weight: int = 64) -> Path:
    "A planted bundle: 60 users, better than the base by `gain`"
    folder.mkdir(parents=True)
    values = np.random.default_rng(0).beta(1, 3, 60) + gain
    pl.DataFrame({"user": np.arange(60), "ndcg@10": values}).write_parquet(
        folder / "judged.parquet"
    )
    write_json(folder / "bundle.json", {"model": "m", "protocol": "tiny", "data_sha256": "ab"})
    (folder / "tensors.safetensors").write_bytes(bytes(weight))
    write_manifest(folder)
    return folder


def python(code: str, *args, **options) -> subprocess.Popen:
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, **options)


# Both start when they are told, after their imports
PROMOTE = """
import sys
from recsys_lab.evaluation import comparison
from recsys_lab.serving.bundle import save_bundle
from recsys_lab.serving.registry import Refused, Registry
registry, versions = Registry(sys.argv[1]), sys.argv[2:]
print("ready", flush=True)
sys.stdin.readline()
for version in versions:
    try:
        registry.promote(version, who=f"process of {versions[0]}")
        print("promoted", version, flush=True)
    except Refused as e:
        print("refused", version, e, flush=True)
"""


def test_two_processes_promote_at_once(tmp_path):
    "Every promotion is compared with the version that it replaces, and none is lost"
    registry = Registry(tmp_path / "r")
    for i in range(7):
        registry.add(bundle(tmp_path / f"b{i}"))
    registry.promote(1)
    both = [
        python(PROMOTE, registry.folder, *v, stdin=subprocess.PIPE) for v in ([2, 3, 4], [5, 6, 7])
    ]
    for p in both:
        assert p.stdout.readline() == "ready\n"
    for p in both:
        p.stdin.write("go\n")
        p.stdin.flush()
    seen = []
    while any(p.poll() is None for p in both):  # a reader meanwhile
        seen.append(registry.current()["version"])
    said = "".join(p.communicate()[0] for p in both)
    assert said.count("promoted") == 6, said
    lines = registry.history()
    assert [line["action"] for line in lines] == ["promote"] * 7
    assert [line["served"] for line in lines] == [None, *(x["version"] for x in lines[:-1])]
    assert registry.current()["version"] == lines[-1]["version"]
    assert registry.current()["previous"] == [x["version"] for x in lines[:-1]]
    order = [line["version"] for line in lines]
    assert set(seen) <= set(order) and [order.index(v) for v in seen] == sorted(
        map(order.index, seen)
    )


ADD = """
import sys
from recsys_lab.serving.bundle import save_bundle
from recsys_lab.serving.registry import Registry
for _ in range(5):
    print(Registry(sys.argv[1]).add(sys.argv[2]), flush=True)
"""


def test_numbers_are_given_once(tmp_path):
    source = bundle(tmp_path / "b")
    three = [python(ADD, tmp_path / "r", source) for _ in range(3)]
    numbers = [n for p in three for n in p.communicate()[0].split()]
    assert sorted(numbers) == [f"{i:04d}" for i in range(1, 16)]
    for n in numbers:
        Registry(tmp_path / "r").checked(n)


def test_killed_while_adding(tmp_path):
    "A half-copied version is no version, and blocks nobody"
    source = bundle(tmp_path / "b", weight=100_000_000)
    p = python(ADD, tmp_path / "r", source)
    home, until = tmp_path / "r/versions", time.monotonic() + 60
    while not list(home.glob(".*.tmp")) and time.monotonic() < until:
        time.sleep(0.002)
    p.send_signal(signal.SIGKILL)
    p.communicate()
    registry = Registry(tmp_path / "r")
    assert registry.versions() == []
    small = bundle(tmp_path / "small")
    assert registry.checked(registry.add(small)).is_dir()
    assert not list(home.glob(".*")), "what the killed one left is gone"
    (source / "tensors.safetensors").unlink()


@pytest.mark.parametrize("name", ["bundle.json", "judged.parquet", "tensors.safetensors"])
def test_a_flipped_byte_is_named(tmp_path, name):
    "On add, on promote, on rollback"
    registry = Registry(tmp_path / "r")
    for i in range(2):
        registry.promote(registry.add(bundle(tmp_path / f"b{i}")))
    for folder in (tmp_path / "b0", registry.folder / "versions/0001"):
        raw = bytearray((folder / name).read_bytes())
        raw[len(raw) // 2] ^= 4
        (folder / name).write_bytes(raw)
    with pytest.raises(ManifestError, match=name):
        registry.add(tmp_path / "b0")
    with pytest.raises(ManifestError, match=name):
        registry.promote(1, force=True, why="a test")
    with pytest.raises(ManifestError, match=name):
        registry.rollback()
    assert registry.current()["version"] == "0002"


def test_a_manifest_made_to_fit(tmp_path):
    "A changed file with a manifest written anew is no longer what was added"
    registry = Registry(tmp_path / "r")
    folder = registry.folder / "versions" / registry.add(bundle(tmp_path / "b"))
    (folder / "tensors.safetensors").write_bytes(bytes(63) + b"1")
    write_manifest(folder)
    check_manifest(folder)
    for act in (registry.promote, registry.load):
        with pytest.raises(ManifestError, match="manifest.json has changed since it was added"):
            act(1)


def real(folder: Path) -> Path:
    "A bundle that a server could answer from"
    catalogue = pl.DataFrame({"item_id": [7, 8, 9], "title": ["a", "b", "c"]})
    tensors = {"popularity": np.array([3.0, 2, 1], np.float32)}
    tensors |= {"seen.items": np.array([0, 1], np.int32), "seen.offsets": np.array([0, 1, 2])}
    return save_bundle(folder, {"kind": "popularity"}, catalogue, np.array([1, 2]), tensors)


def test_loading(tmp_path):
    "The version that answers, or any; whichever file has changed is named"
    registry = Registry(tmp_path / "r")
    for _ in range(2):
        registry.add(real(tmp_path / "b"))
    registry.promote(1)
    assert [registry.load(v).version for v in (None, 2, "0002")] == ["0001", "0002", "0002"]
    files = [f for f in (registry.folder / "versions/0001").iterdir() if f.is_file()]
    assert len(files) >= 5
    for file in files:
        good = file.read_bytes()
        for at in (0, len(good) // 2, len(good) - 1):
            file.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
            with pytest.raises(ManifestError, match=file.name):
                registry.load()
        file.write_bytes(good)
    assert registry.load().items.list([0]) == [7]


def test_a_damaged_served_version_can_be_replaced(tmp_path):
    "The gate cannot be asked then, so it takes a reason"
    registry = Registry(tmp_path / "r")
    registry.promote(registry.add(bundle(tmp_path / "b0")))
    registry.add(bundle(tmp_path / "b1"))
    (registry.folder / "versions/0001/judged.parquet").write_bytes(b"")
    with pytest.raises(Refused, match="cannot be compared with.*judged.parquet has changed"):
        registry.promote(2)
    registry.promote(2, force=True, why="the served files are damaged")
    assert registry.current()["version"] == "0002"
    assert registry.history()[-1]["forced"] is True


def test_no_judged_users(tmp_path):
    registry = Registry(tmp_path / "r")
    registry.promote(registry.add(bundle(tmp_path / "b0")))
    bare = bundle(tmp_path / "b1")
    (bare / "judged.parquet").unlink()
    write_manifest(bare)
    with pytest.raises(Refused, match="0002 has no judged.parquet"):
        registry.promote(registry.add(bare))
    line = json.loads((registry.folder / "history.jsonl").read_text().splitlines()[-1])
    assert line["action"] == "refuse" and "judged.parquet" in line["gate"]["refused"]


@pytest.mark.parametrize("module", ["gate", "registry"])
def test_imports_are_light(module):
    "Neither torch nor pandas nor IPython"
    code = f"import sys, recsys_lab.serving.{module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "pandas", "IPython", "redis"} & set(done.stdout.split())
