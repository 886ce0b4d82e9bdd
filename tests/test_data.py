"Raw data arrives whole or not at all, tables survive any input, splits are exact, orders are the published ones"

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recsys_lab.data.fetching import FetchError, fetch, fetch_source
from recsys_lab.data.ingest import InputError, from_csv, from_frame
from recsys_lab.data.interactions import Interactions
from recsys_lab.data.loaders import load_dataset, load_items, load_users
from recsys_lab.data.prepare import dedup, k_core, prepare_parquet
from recsys_lab.data.protocols import load_protocol
from recsys_lab.data.sessions import with_sessions
from recsys_lab.data.sources import EMBEDDED, Source, data_folder, faults, source
from recsys_lab.data.split import (
    LeakError,
    ratio_counts,
    split_leave_one_out,
    split_ratio,
    split_time,
)
from recsys_lab.data.time_features import check_past, with_time

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

# -- published data ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def mirrored(mirror, tmp_path_factory) -> Path:
    "A data folder filled from the mirror"
    folder = tmp_path_factory.mktemp("mirrored")
    ours = ["ml1m_original", "ml1m_sasrec", "ml1m_ncf", "ml_latest_small", "kuairand"]
    fetch([*ours, "amazon_beauty", "diginetica", "cross_sport", "cross_phone"], folder)
    return folder


def pairs(path: Path) -> dict:
    return dict(np.loadtxt(path, dtype=np.int64).tolist())


def test_leave_one_out_is_the_published_file(mirrored):
    "Row by row, through the maps of the published file; film titles stand for film numbers"
    ours = load_protocol("ml1m-loo").data
    films = load_items("ml1m_original", mirrored)
    wheel = load_items("ml1m")
    assert (films["title"] == wheel["title"]).mean() > 0.99  # same films, same order
    number = dict(zip(wheel["item_id"], films["item_id"], strict=True))
    folder = data_folder("ml1m_sasrec", mirrored)
    rows = np.loadtxt(folder / "ml-1m.txt", dtype=np.int64)
    user_map, item_map = (pairs(folder / f"sas_to_original_{w}.txt") for w in ("users", "items"))
    published = {}
    for u, i in rows.tolist():
        published.setdefault(f"1m_{user_map[u]}", []).append(item_map[i])
    assert len(published) == ours.n_users == 6040 and len(rows) == len(ours) == 999_611
    for code, history in enumerate(ours.histories()):
        mine = [number[ours.item_ids[i]] for i in history]
        assert mine == published[ours.user_ids[code]], ours.user_ids[code]


def test_tables_of_kuairand_describe_everyone_in_the_log(mirrored):
    log = load_dataset("kuairand", mirrored)
    videos, people = load_items("kuairand", mirrored), load_users("kuairand", mirrored)
    assert set(log.item_ids) <= set(videos.item_id) and videos.item_id.is_unique
    assert set(log.user_ids) <= set(people.user_id) and people.user_id.is_unique
    assert {"title", "year", "genres", "author_id", "video_duration"} <= set(videos)
    assert (videos.genres.map(len) > 0).mean() > 0.95 and videos.year.notna().all()
    assert not {c for c in videos if c.endswith("_cnt")}, "counts over the whole log leak"


def test_the_wheel_keeps_the_original_order(mirrored):
    assert load_dataset("ml1m").order_hash() == load_dataset("ml1m_original", mirrored).order_hash()


def test_ncf_candidates(mirrored):
    "The test item and 99 others, none of them taken before"
    split = load_protocol("ml1m-ncf", data_dir=mirrored)
    assert split.candidates.shape == (6040, 100) and len(split.train) == 994_169
    assert np.array_equal(split.candidates[:, 0], split.test.item)
    taken = split.train.csr()
    rows = np.repeat(np.arange(6040), 99)
    assert taken[rows, split.candidates[:, 1:].ravel()].sum() == 0


def test_leave_one_out_of_amazon_beauty_is_by_line(mirrored):
    "The last item of each line is test, the one before it validation; nothing is dropped"
    split = load_protocol("amazon-beauty-loo", data_dir=mirrored)
    data, path = split.data, data_folder("amazon_beauty", mirrored) / "Beauty.txt"
    assert (len(data), data.n_users, data.n_items) == (198_502, 22_363, 12_101)
    assert data.user_counts().min() == data.item_counts().min() == 5
    lines = [[int(x) for x in line.split()] for line in path.read_text().splitlines()]
    for part, place in ((split.test, -1), (split.valid, -2)):
        assert part.user_ids[part.user].tolist() == [line[0] for line in lines]
        assert part.item_ids[part.item].tolist() == [line[place] for line in lines]
    before = split.history("test").histories()
    assert data.item_ids[before.items].tolist() == [x for line in lines for x in line[1:-1]]
    assert split.info["test"]["repeats"] == split.info["valid"]["repeats"] == 0


def test_the_two_domains_share_their_people_and_hold_no_test_row_in_training(mirrored):
    "Counts of the mirror's README, and of the files line by line"
    for key, (train, test, asked, items) in {
        "cross-sport": (50_558, 3_698, 4_998, 20_845),
        "cross-phone": (42_446, 3_999, 4_998, 13_655),
    }.items():
        split = load_protocol(key, data_dir=mirrored)
        data, folder = split.data, data_folder(key.replace("-", "_"), mirrored)
        assert (len(split.train), len(split.test), data.n_items) == (train, test, items)
        assert data.user_ids.tolist() == list(range(4_998)) and split.train.user_counts().min() >= 4
        assert split.train.csr().multiply(split.test.csr()).nnz == 0 and len(dedup(data)) == len(
            data
        )
        learned = set(np.loadtxt(folder / "train.txt", np.int64)[:, 1].tolist())
        every = np.loadtxt(folder / "test_original.txt", np.int64)
        known = np.isin(every[:, 1], list(learned))
        assert (len(every), int(known.sum())) == (asked, test)
        kept = split.test.to_frame()[["user_id", "item_id"]]
        assert set(map(tuple, every[known, :2].tolist())) == set(
            kept.itertuples(index=False, name=None)
        )


def test_cases_of_diginetica_are_the_published_ones(mirrored):
    "Every line of both files of SR-GNN, one by one and in their order within a session"
    split, folder = (
        load_protocol("diginetica", data_dir=mirrored),
        data_folder("diginetica", mirrored),
    )
    read = lambda name: [json.loads(x) for x in (folder / name).read_text().splitlines()]
    learn, cases = read("diginetica_train_sessions.jsonl"), read("diginetica_test.jsonl")
    ids, known = split.data.item_ids, split.view("train", "valid")
    assert (len(learn), sum(len(s) - 1 for s in learn), len(ids)) == (186_670, 719_470, 43_097)
    assert [ids[h].tolist() for h in known.histories(np.arange(len(learn)))] == learn
    past, user = split.history("test").histories(split.test.user), split.test.user
    ours = [[ids[h].tolist(), i] for h, i in zip(past, ids[split.test.item].tolist(), strict=True)]
    longest_first = np.lexsort((-np.diff(past.offsets), split.unit[user]))
    assert [ours[i] for i in longest_first] == cases and len(cases) == 60_858
    assert len(np.unique(split.unit[user])) == sum(len(shown) == 1 for shown, _ in cases) == 15_963
    assert np.isin(split.test.item, known.item).all()
    assert len(split.valid) == 18_667 and split.valid.user.min() >= 186_670 - 18_667


@pytest.mark.parametrize("key", EMBEDDED)
def test_embedded_data_is_right(key):
    assert faults(source(key), data_folder(key, ROOT / "data")) == []


def test_dvc_notices_one_byte(tmp_path):
    "Good data: 0. A wrong byte or an absent set: 1. Another folder in data/: harmless"
    for name in (".dvc/config", ".dvcignore", "data.dvc"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    with open(tmp_path / ".dvc/config", "a") as f:
        f.write("    no_scm = true\n")
    for key in EMBEDDED:
        shutil.copytree(ROOT / "data" / key, tmp_path / "data" / key)

    def status():
        command = [BIN / "dvc", "status", "-q", "data.dvc"]
        return subprocess.run(command, cwd=tmp_path, env=os.environ | {"CI": "1"}).returncode

    (tmp_path / "data/other").mkdir()
    (tmp_path / "data/other/file.txt").write_text("x")
    assert status() == 0
    path = tmp_path / "data/obd/bts/men/men.csv"
    whole = path.read_bytes()
    path.write_bytes(whole[:-2] + b"7\n")
    assert status() == 1
    path.write_bytes(whole)
    shutil.rmtree(tmp_path / "data/ml100k")
    assert status() == 1


# -- fetch ------------------------------------------------------------------------------------------------------------

TEXT = b"user_id,item_id\nann,Up\n" * 1000


def toy(key: str = "toy") -> Source:
    import hashlib

    digest = hashlib.sha256(TEXT).hexdigest()
    return Source(key, "A toy", "free", {"a.csv": digest, "deep/b.csv": digest})


def fill(folder: Path, key: str = "toy"):
    (folder / key / "deep").mkdir(parents=True)
    (folder / key / "a.csv").write_bytes(TEXT)
    (folder / key / "deep/b.csv.gz").write_bytes(gzip.compress(TEXT))


def test_fetch_from_a_mirror(tmp_path, monkeypatch):
    fill(tmp_path / "mirror")
    monkeypatch.setenv("RECSYS_LAB_MIRROR", str(tmp_path / "mirror"))
    assert fetch_source(toy(), tmp_path / "data") == "mirror"
    shutil.rmtree(tmp_path / "mirror")
    assert fetch_source(toy(), tmp_path / "data") == "there already"


@pytest.mark.parametrize("damage", ["cut", "byte", "absent"])
def test_bad_mirror_leaves_the_old_folder(tmp_path, monkeypatch, damage):
    fill(tmp_path / "mirror")
    packed = tmp_path / "mirror/toy/deep/b.csv.gz"
    raw = packed.read_bytes()
    bad = {"cut": raw[:-30], "byte": raw[:40] + bytes([raw[40] ^ 255]) + raw[41:]}
    packed.unlink() if damage == "absent" else packed.write_bytes(bad[damage])
    (tmp_path / "data/toy").mkdir(parents=True)
    (tmp_path / "data/toy/a.csv").write_text("old")
    monkeypatch.setenv("RECSYS_LAB_MIRROR", str(tmp_path / "mirror"))
    with pytest.raises(FetchError, match="nothing was written"):
        fetch_source(toy(), tmp_path / "data")
    assert [p.name for p in (tmp_path / "data").rglob("*")] == ["toy", "a.csv"]
    assert (tmp_path / "data/toy/a.csv").read_text() == "old"


def test_killed_fetch_leaves_no_half_folder(tmp_path, monkeypatch):
    "A mirror that stops in the middle of a file, and kill -9"
    fill(tmp_path / "mirror")
    pipe = tmp_path / "mirror/toy/deep/b.csv"
    os.mkfifo(pipe)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from tests.test_data import toy; from recsys_lab.data.fetching import fetch_source\n"
        "fetch_source(toy(), sys.argv[2])"
    )
    env = os.environ | {"RECSYS_LAB_MIRROR": str(tmp_path / "mirror")}
    run = subprocess.Popen([sys.executable, "-c", code, str(ROOT), str(tmp_path / "data")], env=env)
    with open(pipe, "wb") as f:  # opens when the child reads
        f.write(TEXT[:100])
        f.flush()
        time.sleep(0.2)
        run.send_signal(signal.SIGKILL)
        run.wait()
    assert not (tmp_path / "data/toy").exists()
    pipe.unlink()
    monkeypatch.setenv("RECSYS_LAB_MIRROR", str(tmp_path / "mirror"))
    assert fetch_source(toy(), tmp_path / "data") == "mirror"


# -- tables from outside ----------------------------------------------------------------------------------------------

ANY = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=3),
    st.dates(),
    st.lists(st.integers(), max_size=2),
)
KINDS = [st.integers(-9, 9), st.text(max_size=3), st.floats(), st.datetimes(), ANY]
COLUMN = st.sampled_from(KINDS)
NAMES = ["user_id", "item_id", "timestamp", "rating", "Time", "x"]


@st.composite
def tables(draw):
    n = draw(st.integers(0, 6))
    names = draw(st.lists(st.sampled_from(NAMES), max_size=5))
    values = [draw(st.lists(draw(COLUMN), min_size=n, max_size=n)) for _ in names]
    frame = pd.DataFrame(dict(enumerate(pd.Series(v, dtype=object) for v in values)))
    if draw(st.booleans()):
        frame = frame.infer_objects()
    frame.columns = names
    return frame


@quick
@given(tables(), st.sampled_from(["raise", "drop"]))
def test_any_table_gives_interactions_or_a_clear_error(frame, on_error):
    before = frame.copy()
    try:
        x = from_frame(frame, on_error=on_error)
    except InputError as e:
        assert len(str(e)) > 20 and ("column" in str(e) or "rows" in str(e))
    else:
        assert len(x) + sum(x.dropped.values()) == len(frame) and len(x) > 0
        assert x.user.max() < x.n_users and x.item.max() < x.n_items
        assert (np.diff(x.time[x.user == 0]) >= 0).all()
    pd.testing.assert_frame_equal(frame, before)


IDS = st.one_of(st.integers(-(2**62), 2**62), st.integers(0, 5))
WORDS = st.text(min_size=1, max_size=4)


@st.composite
def logs(draw, unique: bool = False):
    user, item = (draw(st.sampled_from([IDS, WORDS])) for _ in range(2))
    rows = draw(
        st.lists(
            st.tuples(user, item, st.integers(0, 30)),
            min_size=1,
            max_size=60,
            unique_by=(lambda r: r[:2]) if unique else None,
        )
    )
    frame = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"])
    return frame


@quick
@given(logs())
def test_rows_come_back_in_stable_order(frame):
    got = from_frame(frame).to_frame()
    want = frame.sort_values(["user_id", "timestamp"], kind="stable").reset_index(drop=True)
    assert got["user_id"].tolist() == want["user_id"].tolist()
    assert got["item_id"].tolist() == want["item_id"].tolist()
    assert got["timestamp"].tolist() == want["timestamp"].tolist()


@settings(quick, max_examples=20)
@given(logs())
def test_save_load_and_big_preparation_agree(tmp_path, frame):
    x = from_frame(frame)
    y = Interactions.load(x.save(tmp_path / "x"))
    pl.from_pandas(frame).write_parquet(tmp_path / "x.parquet")
    z = prepare_parquet(tmp_path / "x.parquet", tmp_path / "z")
    for other in (y, z):
        for name in ("user", "item", "time", "row", "offsets", "user_ids", "item_ids"):
            assert getattr(other, name).tolist() == getattr(x, name).tolist(), name


@quick
@given(logs(), st.integers(1, 3), st.integers(1, 3))
def test_k_core_is_the_largest_part_that_is_dense_enough(frame, user, item):
    rest = frame.copy()
    while True:
        users, items = rest["user_id"].value_counts(), rest["item_id"].value_counts()
        keep = rest["user_id"].map(users).ge(user) & rest["item_id"].map(items).ge(item)
        if keep.all():
            break
        rest = rest[keep]
    if len(rest) == 0:
        with pytest.raises(ValueError, match="would be dropped"):
            k_core(from_frame(frame), user, item)
        return
    core = k_core(from_frame(frame), user, item)
    assert sorted(core.row.tolist()) == sorted(rest.index.tolist())
    assert len(core) + sum(core.dropped.values()) == len(frame)


def test_csv_of_other_shapes(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes("user_id;item_id;timestamp\nJosé;日本;2001-01-01\n".encode())
    assert from_csv(path, separator=";").item_ids.tolist() == ["日本"]
    for text, word in (
        (b"\xff\xfe\x00", "x.csv"),
        (b"user_id,item_id\n1,2,3\n", "x.csv"),
        (b"a,b\n1,2\n", "user_id"),
    ):
        path.write_bytes(text)
        with pytest.raises(InputError, match=word):
            from_csv(path)


# -- splits -----------------------------------------------------------------------------------------------------------


def recbole_counts(n: int, ratios) -> list[int]:
    "The rule as RecBole writes it, one user at a time"
    ratios = [r / sum(ratios) for r in ratios]
    counts = [int(r * n) for r in ratios]
    counts[0] = n - sum(counts[1:])
    for i in range(1, len(ratios)):
        if counts[0] <= 1:
            break
        if 0 < ratios[-i] * n < 1:
            counts[-i] += 1
            counts[0] -= 1
    return counts


@pytest.mark.parametrize("ratios", [(8, 1, 1), (7, 2, 1), (0.6, 0.29, 0.11), (1, 0, 1)])
def test_ratio_counts_are_those_of_recbole(ratios):
    got = ratio_counts(np.arange(1, 400), ratios)
    assert got.tolist() == [recbole_counts(n, ratios) for n in range(1, 400)]


@quick
@given(logs(unique=True), st.integers(0, 3))
def test_ratio_split_covers_every_row_once(frame, seed):
    data = from_frame(frame)
    split = split_ratio(data, seed=seed)
    counts = np.stack([p.user_counts() for p in (split.train, split.valid, split.test)], 1)
    assert counts.tolist() == ratio_counts(data.user_counts()).tolist()


@quick
@given(logs())
def test_time_split_never_looks_ahead(frame):
    data = from_frame(frame)
    try:
        split = split_time(data)
    except ValueError as e:
        assert "too many ties" in str(e)
        return
    assert split.train.time.max() < split.valid.time.min()
    assert split.valid.time.max() < split.test.time.min()
    assert len(split.test) >= round(0.2 * len(data)) - 1


@quick
@given(logs())
def test_leave_one_out_takes_the_last_two(frame):
    data = dedup(from_frame(frame))
    split = split_leave_one_out(data)
    for u, h in enumerate(data.histories()):
        valid, test = (p.histories([u])[0].tolist() for p in (split.valid, split.test))
        assert (valid, test) == ((h[-2:-1].tolist(), h[-1:].tolist()) if len(h) > 2 else ([], []))


@quick
@given(logs(), st.sampled_from([0, "America/New_York"]))
def test_columns_of_time_never_look_ahead(frame, zone):
    "Whatever the log: ties, one row, one user"
    make = lambda x: with_sessions(with_time(x, zone), gap=2, n=3)
    names = check_past(make, from_frame(frame), (0.0, 0.3, 0.6, 1.0))
    assert {"gap", "place", "velocity_1h", "season", "session_place", "variety"} <= set(names)


def test_planted_leak_is_refused():
    data = load_dataset("ml100k")
    split = split_time(data)
    split.part[np.flatnonzero(split.part == 2)[:3]] = 0
    with pytest.raises(LeakError, match="3 rows before part"):
        split.check_leaks()
    copy = from_frame(pd.concat([data.to_frame(), data.to_frame().iloc[[5]]]))
    with pytest.raises(LeakError, match="also in the rows seen before"):
        for seed in range(50):
            split_ratio(copy, seed=seed)
