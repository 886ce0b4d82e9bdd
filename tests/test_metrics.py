"""Metrics equal two independent libraries, and evaluation does not depend on what it must not depend on."""

import warnings

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_lab.data.interactions import Interactions
from recsys_lab.data.split import Split
from recsys_lab.evaluation.beyond import calibration, diversity, gini, popular_lists, serendipity
from recsys_lab.evaluation.evaluate import Evaluation, Validator, evaluate
from recsys_lab.evaluation.metrics import METRICS, hits_of, metric_table, topk
from recsys_lab.evaluation.ranking import ranking_task, sample_negatives

KS = (1, 3, 5, 10)
NAMES = [f"{m}@{k}" for m in METRICS for k in KS]
RANX = {"ndcg": "ndcg", "recall": "recall", "hitrate": "hit_rate", "precision": "precision"}
RANX |= {"mrr": "mrr", "map": "map"}
# ir-measures' spelling; reciprocal rank has no cut-off in trec_eval, so its ranx back end is not used
IR = {"ndcg": "nDCG", "recall": "R", "hitrate": "Success", "precision": "P", "map": "AP"}


def ragged(rng, n, n_items, low, high):
    "Random non-empty sets of items, one a user"
    sizes = rng.integers(low, high + 1, n)
    return [rng.choice(n_items, size, replace=False) for size in sizes]


def scored(name, seed=0):
    "Scores (n, n_items) and the items to find of each user: random and adversarial"
    rng = np.random.default_rng(seed)
    n, n_items = 40, 30
    scores, truth = rng.standard_normal((n, n_items)), ragged(rng, n, n_items, 1, 4)
    if name == "ties":
        scores = rng.integers(0, 3, (n, n_items)).astype(float)
    elif name == "all tied":
        scores = np.zeros((n, n_items))
    elif name == "no hits":
        for u, items in enumerate(truth):
            scores[u, items] = -np.inf
    elif name == "all hits":
        for u, items in enumerate(truth):
            scores[u, items] += 100
    elif name == "more truth than k":
        truth = ragged(rng, n, n_items, 11, 30)
    elif name == "fewer items than k":
        scores, truth = rng.standard_normal((n, 4)), ragged(rng, n, 4, 1, 4)
    elif name == "one user":
        scores, truth = scores[:1], truth[:1]
    elif name == "one item":
        scores, truth = np.ones((n, 1)), [np.array([0])] * n
    elif name == "float32":
        scores = scores.astype(np.float32)
    return scores, truth


CASES = ["random", "ties", "all tied", "no hits", "all hits", "more truth than k"]
CASES += ["fewer items than k", "one user", "one item", "float32"]


def as_csr(sets, n_items):
    "Sets of items as a sparse matrix"
    row = np.repeat(np.arange(len(sets)), [len(s) for s in sets])
    ones = np.ones(len(row), np.float32)
    return sp.csr_matrix((ones, (row, np.concatenate(sets))), (len(sets), n_items))


def ours(scores, truth):
    "Our lists and our table"
    top = topk(scores, max(KS))
    found = hits_of(top, as_csr(truth, scores.shape[1]))
    return top, metric_table(found, np.array([len(t) for t in truth]), NAMES)


def as_dicts(top, truth):
    "Lists and truth for other libraries; scores fall with the rank, so that no tie is left to them"
    run = {
        f"u{u}": {f"i{i}": float(len(row) - r) for r, i in enumerate(row) if i >= 0}
        or {"none": 1.0}
        for u, row in enumerate(top)
    }
    qrels = {f"u{u}": {f"i{i}": 1 for i in items} for u, items in enumerate(truth)}
    return run, qrels


@pytest.mark.parametrize("case", CASES)
def test_equal_to_ranx(case):
    from ranx import Qrels, Run
    from ranx import evaluate as ranx_evaluate

    top, table = ours(*scored(case))
    run, qrels = as_dicts(top, scored(case)[1])
    order = [f"u{u}" for u in range(len(top))]
    theirs = {f"{m}@{k}": f"{RANX[m]}@{k}" for m in METRICS for k in KS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = Run(run)
        ranx_evaluate(Qrels(qrels), result, list(theirs.values()), return_mean=False)
    for name, other in theirs.items():
        expected = [result.scores[other][u] for u in order]
        np.testing.assert_allclose(table[name], expected, rtol=0, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_equal_to_ir_measures(case):
    import ir_measures

    top, table = ours(*scored(case))
    run, qrels = as_dicts(top, scored(case)[1])
    wanted = {ir_measures.parse_measure(f"{IR[m]}@{k}"): f"{m}@{k}" for m in IR for k in KS}
    wanted[ir_measures.parse_measure("RR")] = "mrr@10"
    checked = 0
    for value in ir_measures.iter_calc(list(wanted), qrels, run):
        got = table[wanted[value.measure]][int(value.query_id[1:])]
        assert abs(got - value.value) <= 1e-9, (value, got)
        checked += 1
    assert checked == len(wanted) * len(top)


@pytest.mark.parametrize("case", CASES)
def test_topk_equals_a_stable_sort(case):
    scores, _ = scored(case, seed=1)
    k = min(10, scores.shape[1])
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    listed = np.where(np.take_along_axis(scores, order, 1) == -np.inf, -1, order)
    np.testing.assert_array_equal(topk(scores, k), listed)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 200),
    st.integers(1, 60),
    st.integers(1, 70),
    st.integers(1, 4),
)
def test_topk_with_mask_and_ties(seed, n, n_items, k, levels):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, levels, (n, n_items)).astype(rng.choice([np.float32, np.float64]))
    seen = sp.random(n, n_items, 0.3, "csr", random_state=seed)
    before = scores.copy()
    got = topk(scores, k, seen)
    masked = scores.copy()
    masked[seen.nonzero()] = -np.inf
    order = np.argsort(-masked, axis=1, kind="stable")[:, :k]
    best = np.where(np.take_along_axis(masked, order, 1) == -np.inf, -1, order)
    np.testing.assert_array_equal(got[:, : best.shape[1]], best)
    assert (got[:, best.shape[1] :] == -1).all()
    assert (scores == before).all()


class Table:
    "A model that looks its scores up, by user code"

    def __init__(self, scores):
        self.scores = scores

    def score(self, users=None, histories=None):
        return self.scores[users]


def world(seed, n=30, n_items=25):
    "A split with repeats, users without truth, and scores full of ties"
    rng = np.random.default_rng(seed)
    rows = 12 * n
    data = Interactions.from_codes(
        rng.integers(0, n, rows),
        rng.integers(0, n_items, rows),
        np.sort(rng.integers(0, 50, rows)),
        user_ids=np.arange(n),
        item_ids=np.arange(n_items),
    )
    part = np.where(data.time >= 40, 2, np.where(data.time >= 35, 1, 0)).astype(np.uint8)
    part[data.user == 3] = 0
    scores = rng.integers(0, 6, (n, n_items)).astype(np.float32)
    return data, part, scores


def run(data, part, scores, **options) -> Evaluation:
    return evaluate(Table(scores), Split(data, part, "time"), **options)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.sampled_from([None, 7]))
def test_block_size_changes_nothing(seed, block, negatives):
    data, part, scores = world(seed)
    genres = np.random.default_rng(seed).integers(0, 2, (25, 4))
    a = run(data, part, scores, negatives=negatives, features=genres)
    b = run(data, part, scores, negatives=negatives, features=genres, block=block)
    assert a.users.equals(b.users) and a.beyond == b.beyond and (a.top == b.top).all()
    assert a.summary(200).equals(b.summary(200))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([None, 7]))
def test_row_order_changes_nothing(seed, negatives):
    data, part, scores = world(seed)
    order = np.random.default_rng(seed).permutation(len(data))
    other = Interactions.from_codes(
        data.user[order],
        data.item[order],
        data.time[order],
        user_ids=data.user_ids,
        item_ids=data.item_ids,
    )
    part2 = np.where(other.time >= 40, 2, np.where(other.time >= 35, 1, 0)).astype(np.uint8)
    part2[other.user == 3] = 0
    a, b = (run(*w, scores, negatives=negatives) for w in ((data, part), (other, part2)))
    assert a.users.equals(b.users) and a.beyond == b.beyond and (a.top == b.top).all()
    assert a.summary(200).equals(b.summary(200))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([None, 7]))
def test_adding_a_user_changes_no_other(seed, negatives):
    data, part, scores = world(seed)
    rng = np.random.default_rng(seed + 1)
    user = np.append(data.user, np.full(6, 30, np.int32))
    more = Interactions.from_codes(
        user,
        np.append(data.item, rng.integers(0, 25, 6)),
        np.append(data.time, [1, 2, 3, 45, 46, 47]),
        user_ids=np.arange(31),
        item_ids=data.item_ids,
    )
    part2 = np.append(part, [0, 0, 0, 2, 2, 2]).astype(np.uint8)
    scores2 = np.vstack([scores, rng.random((1, 25)).astype(np.float32)])
    a, b = (
        run(data, part, scores, negatives=negatives),
        run(more, part2, scores2, negatives=negatives),
    )
    kept = b.users["user_id"] != 30
    accuracy = [c for c in a.users if "@" not in c or c in NAMES or c.split("@")[0] in METRICS]
    assert a.users[accuracy].equals(b.users.loc[kept, accuracy].reset_index(drop=True))
    assert (a.top == b.top[kept.to_numpy()]).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_metrics_keep_their_bounds_and_order(seed):
    rng = np.random.default_rng(seed)
    found = rng.random((20, 10)) < rng.random()
    n_truth = found.sum(1) + rng.integers(0, 5, 20)
    found, n_truth = found[n_truth > 0], n_truth[n_truth > 0]
    table = metric_table(found, n_truth, NAMES)
    assert ((table >= 0) & (table <= 1)).all().all()
    for k in KS:
        assert (table[f"hitrate@{k}"] >= table[f"mrr@{k}"]).all()
        assert ((table[f"ndcg@{k}"] > 0) == (table[f"hitrate@{k}"] > 0)).all()
    for a, b in zip(KS[:-1], KS[1:], strict=True):
        for m in ("recall", "hitrate", "mrr", "map"):
            assert (table[f"{m}@{b}"] >= table[f"{m}@{a}"]).all()


def test_a_silent_model_scores_zero_and_stays():
    data, part, scores = world(0)
    loud, silent = run(data, part, scores), run(data, part, np.full_like(scores, -np.inf))
    assert len(silent.users) == len(loud.users) > 0
    assert silent.users["ndcg@10"].sum() == 0
    assert silent.info["users_without_list"] == len(silent.users)


def test_validator_is_evaluate_on_the_validation_part():
    data, part, scores = world(0)
    split = Split(data, part, "time")
    full = evaluate(Table(scores), split, part="valid")
    quick = Validator(split.history("valid"), split.valid, "ndcg@10")
    assert quick(lambda codes: scores[codes]) == pytest.approx(
        full.users["ndcg@10"].mean(), abs=1e-12
    )


def test_validator_takes_tensors():
    import torch

    data, part, scores = world(0)
    split = Split(data, part, "time")
    quick = Validator(split.train, split.valid)
    tensor = torch.from_numpy(scores).requires_grad_()
    assert quick(lambda codes: tensor[codes]) == quick(lambda codes: scores[codes])


def test_negatives_are_new_and_different():
    data, part, _ = world(0, n_items=200)
    split = Split(data, part, "time")
    task = ranking_task(split.history("test"), split.test, split.seen("test"))
    drawn = sample_negatives(task, 50, seed=3)
    taken = (task.truth + task.seen).toarray() > 0
    for row, mine in zip(drawn, taken, strict=True):
        assert len(set(row.tolist())) == 50 and not mine[row].any()
    assert (drawn != sample_negatives(task, 50, seed=4)).any()


def test_nan_scores_are_refused():
    data, part, scores = world(0)
    scores[5, 7] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        run(data, part, scores)


def test_saved_and_loaded(tmp_path):
    data, part, scores = world(0)
    e = run(data, part, scores)
    (tmp_path / "curve.json").write_text("{}")
    first = {p.name: p.read_bytes() for p in e.save(tmp_path).iterdir()}
    assert set(first) == {"curve.json", "users.parquet", "top.parquet", "metrics.json"}
    back = Evaluation.load(tmp_path)
    assert back.users.equals(e.users) and (back.top == e.top).all() and back.beyond == e.beyond
    assert b"second" not in first["metrics.json"]
    assert {p.name: p.read_bytes() for p in back.save(tmp_path).iterdir()} == first


def lists_and_history(seed, n=20, n_items=15, k=5):
    "Random lists with empty places, histories, item vectors"
    rng = np.random.default_rng(seed)
    top = np.array([rng.choice(n_items, k, replace=False) for _ in range(n)])
    top[rng.random((n, k)) < 0.2] = -1
    history = sp.csr_matrix((rng.random((n, n_items)) < 0.3).astype(float))
    return top, history, rng.integers(0, 2, (n_items, 4)).astype(float)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_diversity_equals_a_loop_over_pairs(seed):
    top, _, vectors = lists_and_history(seed)
    length = np.maximum(np.sqrt((vectors**2).sum(1)), 1e-300)
    cosine = (vectors @ vectors.T) / length[:, None] / length
    expected = []
    for row in top:
        items = row[row >= 0]
        pairs = [1 - cosine[a, b] for i, a in enumerate(items) for b in items[:i]]
        expected.append(np.mean(pairs) if pairs else np.nan)
    np.testing.assert_allclose(diversity(top, vectors), expected, atol=1e-9)
    np.testing.assert_allclose(diversity(top, sp.csr_matrix(vectors), block=3), expected, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_gini_and_serendipity_equal_their_definitions(seed):
    top, history, _ = lists_and_history(seed)
    n_items, counts = history.shape[1], np.asarray(history.sum(0)).ravel()
    x = np.bincount(top[top >= 0], minlength=n_items)
    pairs = np.abs(x[:, None] - x[None, :]).sum() / (2 * n_items * x.sum())
    assert gini(top, n_items) == pytest.approx(pairs, abs=1e-9)
    masked = np.where(history.toarray() > 0, -np.inf, counts[None, :])
    popular = popular_lists(counts, history, top.shape[1])
    np.testing.assert_array_equal(popular, topk(masked, top.shape[1]))
    found = (np.random.default_rng(seed).random(top.shape) < 0.5) & (top >= 0)
    sets = [set(p.tolist()) for p in popular]
    loop = [
        sum(h and i not in s for h, i in zip(hs, row.tolist(), strict=True)) / len(row)
        for hs, row, s in zip(found, top, sets, strict=True)
    ]
    np.testing.assert_allclose(serendipity(top, found, popular), loop)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_calibration_is_zero_only_for_the_history_itself(seed):
    top, history, genres = lists_and_history(seed)
    kl = calibration(top, history, genres)
    assert (kl[~np.isnan(kl)] >= -1e-12).all()
    longest = max(np.diff(history.indptr).max(), 1)
    own = np.full((len(top), longest), -1)
    for u in range(len(top)):
        items = history.indices[history.indptr[u] : history.indptr[u + 1]]
        own[u, : len(items)] = items
    same = calibration(own, history, genres)
    np.testing.assert_allclose(same[~np.isnan(same)], 0, atol=1e-12)
