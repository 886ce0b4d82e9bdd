"Whatever index answers, the list is the one that sorting all scores gives"

import subprocess
import sys

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_lab.ranking.build import build_index
from recsys_lab.ranking.index import VectorIndex

WHOLE = st.integers(0, 2**32 - 1)


def brute(x, q, k, excluded, mask):
    "Codes by sorting all scores, equal scores by the lower code; -1: none left"
    out = np.full((len(q), k), -1)
    for r, scores in enumerate(q @ x.T):
        scores = np.where(mask, scores, -np.inf)
        scores[excluded[r]] = -np.inf
        order = [i for i in np.argsort(-scores, kind="stable")[:k] if scores[i] > -np.inf]
        out[r, : len(order)] = order
    return out


@given(WHOLE, st.integers(1, 60), st.integers(1, 6), st.integers(1, 30), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_equals_brute_force(seed, n, d, k, rows):
    "Small whole numbers: scores are exact, and many are equal"
    rng = np.random.default_rng(seed)
    x, q = (rng.integers(-2, 3, (m, d)).astype(np.float32) for m in (n, rows))
    excluded = [rng.integers(0, n, rng.integers(0, n + 1)) for _ in q]
    mask = rng.random(n) < rng.random()
    index = build_index(x, "flat", quiet=True)
    codes, scores = index.search(q, k, excluded, mask)
    assert codes.dtype == np.int32 and scores.dtype == np.float32
    np.testing.assert_array_equal(codes, brute(x, q, k, excluded, mask))
    at = np.take_along_axis(q @ x.T, np.maximum(codes, 0), 1)
    np.testing.assert_array_equal(scores, np.where(codes < 0, -np.inf, at))
    plain = index.search(q, k)[0]
    np.testing.assert_array_equal(plain, brute(x, q, k, [[]] * rows, np.ones(n, bool)))


@pytest.fixture(scope="module", params=["flat", "ivf", "hnsw"])
def index(request):
    rng = np.random.default_rng(0)
    centre = rng.standard_normal((40, 16))
    x = centre[rng.integers(0, 40, 3000)] + 0.5 * rng.standard_normal((3000, 16))
    return build_index(x * rng.lognormal(0, 0.4, (3000, 1)), request.param, quiet=True)


@given(WHOLE, st.integers(1, 40), st.integers(0, 2999), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_what_is_excluded_or_not_allowed_never_comes(index, seed, k, many, share):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((3, 16)).astype(np.float32)
    excluded = [rng.choice(3000, m, replace=False) for m in (0, many, rng.integers(0, 2999))]
    mask = rng.random(3000) < share
    for allowed in (None, mask, np.flatnonzero(mask)):
        codes, scores = index.search(q, k, excluded, allowed)
        for r in range(3):
            found = codes[r][codes[r] >= 0]
            may = np.setdiff1d(
                np.arange(3000) if allowed is None else np.flatnonzero(mask), excluded[r]
            )
            assert np.isin(found, may).all() and len(set(found)) == len(found) == min(k, len(may))
            assert (np.diff(scores[r][: len(found)]) <= 0).all()
            alone = index.search(q[r : r + 1], k, [excluded[r]], allowed)[0][0]
            assert (alone == codes[r]).mean() > 0.8, "asked alone or together"


def test_many_allowed_items(index, monkeypatch):
    "A condition that holds for many is answered as well as no condition; one for short vectors too"
    monkeypatch.setattr("recsys_lab.ranking.index.FEW", (0, 0.05))
    rng = np.random.default_rng(2)
    q = rng.standard_normal((200, 16)).astype(np.float32)
    x = index.store.reconstruct_n(0, 3000) if index.kind != "ivf" else None
    if x is None:
        index.index.make_direct_map()
        x = index.index.reconstruct_n(0, 3000)
    length = np.linalg.norm(x, axis=1)
    excluded = [rng.choice(3000, 20, replace=False) for _ in q]
    for mask in (rng.random(3000) < 0.5, length < np.median(length)):
        codes, _ = index.search(q, 10, excluded, mask)
        assert mask[codes].all() and (codes >= 0).all()
        true = brute(x, q, 10, excluded, mask)
        assert np.mean([np.isin(a, b).mean() for a, b in zip(true, codes, strict=True)]) > 0.97


def test_saved_equals_loaded(index, tmp_path):
    folder = index.save(tmp_path / "index")
    q = np.random.default_rng(1).standard_normal((20, 16)).astype(np.float32)
    for mapped in (True, False):
        again = VectorIndex.load(folder, mapped=mapped)
        for a, b in zip(again.search(q, 7), index.search(q, 7), strict=True):
            np.testing.assert_array_equal(a, b)
        assert (again.kind, again.effort, again.card["recall"]) == (
            index.kind, index.effort, index.card["recall"],
        )  # fmt: skip


def test_a_warning_where_the_target_is_missed():
    x = np.random.default_rng(0).standard_normal((3000, 48)).astype(np.float32)
    with pytest.warns(UserWarning, match="is below"):
        build_index(x, "hnsw", quiet=True, target=1.0, M=2, efConstruction=4)


def test_light_imports():
    "A server that only searches loads no torch, no pandas, no IPython"
    code = "import sys, recsys_lab.ranking.index; print([m for m in ('torch', 'pandas', 'IPython', 'scipy') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_threads_are_set_per_search(index):
    faiss.omp_set_num_threads(2)
    index.search(np.zeros((1, 16), np.float32) + 1, 3)
    assert faiss.omp_get_max_threads() == 1
