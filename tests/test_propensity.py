"Propensities, the error over all pairs, and worlds of ratings: what is refused, and what must hold for any input"

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression

from recsys_lab.causal import risk
from recsys_lab.causal.overlap import calibration, held_out_gain, overlap, weight_facts
from recsys_lab.causal.propensity import KINDS, fit_propensity
from recsys_lab.causal.risk import Seen, additive, estimate_risk, seen_errors, spread, stratified
from recsys_lab.data import ratings_world
from recsys_lab.data.interactions import Interactions
from recsys_lab.data.ratings_world import RatingsWorld

WORLD = RatingsWorld(40, 30, density=0.2, seed=1)
LOG = WORLD.log()
ITEMS, USERS = WORLD.tables()
MORE = {"items": ITEMS, "users": USERS, "sample": WORLD.uniform(5)}
FAST = {"logistic": {"steps": 20}, "low_rank": {"steps": 20, "rank": 2}}
TWICE = Interactions.from_codes([0, 0], [1, 1], columns={"rating": [1.0, 2.0]})
EMPTY = LOG.where(np.zeros(len(LOG), bool))
ONE = {"user": [0], "item": [0], "error": [1.0], "shape": (1, 1)}


def fitted(kind, data=LOG, **more):
    return fit_propensity(kind, data, **MORE, **FAST.get(kind, {}), **more)


BAD = {
    "kind": (lambda: fit_propensity("ips", LOG), "kind must be one of"),
    "gamma below 0": (lambda: fit_propensity("popularity", LOG, gamma=-0.1), "gamma must be"),
    "gamma NaN": (lambda: fit_propensity("popularity", LOG, gamma=np.nan), "gamma must be"),
    "clip of one": (lambda: fit_propensity("item", LOG, clip=1.0), "clip must be"),
    "clip below 0": (lambda: fit_propensity("item", LOG, clip=-0.1), "clip must be"),
    "no features": (lambda: fit_propensity("logistic", LOG), "logistic needs features"),
    "no sample": (lambda: fit_propensity("naive_bayes", LOG), "naive_bayes needs sample"),
    "empty sample": (lambda: fit_propensity("naive_bayes", LOG, sample=[]), "0 of 0 ratings"),
    "sample of halves": (lambda: fit_propensity("naive_bayes", LOG, sample=[1.5]), "1 of 1 ratings"),
    "rank": (lambda: fit_propensity("low_rank", LOG, rank=0), "rank must be"),
    "reg": (lambda: fit_propensity("logistic", LOG, items=ITEMS, reg=0), "reg must be"),
    "setting": (lambda: fit_propensity("item", LOG, rank=2), "item has no setting"),
    "no rows": (lambda: fit_propensity("item", EMPTY), "0 rows"),
    "a pair twice": (lambda: fit_propensity("item", TWICE), "prepare.dedup"),
    "ratings unknown": (lambda: fitted("naive_bayes").matrix(), "give ratings"),
    "half a rating": (lambda: fitted("naive_bayes").of([0], [0], [2.5]), "1 of 1 ratings"),
    "propensity 0": (lambda: Seen(**ONE, propensity=[0.0]), "above 0 and at most 1"),
    "propensity above 1": (lambda: Seen(**ONE, propensity=[1.01]), "above 0 and at most 1"),
    "propensity NaN": (lambda: Seen(**ONE, propensity=[np.nan]), "propensity is not finite"),
    "propensities of another log": (lambda: Seen(**ONE, propensity=[1, 1]), "shape (1,), got (2,)"),
    "error NaN": (lambda: Seen(**ONE | {"error": [np.nan]}), "error is not finite"),
    "half of the stand-ins": (lambda: Seen(**ONE, imputed=[1.0]), "go together"),
    "nothing seen": (lambda: Seen([], [], [], (1, 1)), "0 rows"),
    "prediction NaN": (lambda: seen_errors(LOG, LOG.time * np.nan), "predictions is not finite"),
    "loss": (lambda: seen_errors(LOG, LOG.time, loss="log"), "loss must be one of"),
    "ips without propensities": (lambda: Seen(**ONE).terms("ips"), "ips needs ['propensity']"),
    "estimator": (lambda: Seen(**ONE).terms("magic"), "estimator must be one of"),
    "unit": (lambda: estimate_risk(Seen(**ONE), by="item"), "by must be one of"),
    "folds": (lambda: Seen(**ONE).stand_in("one", folds=1), "folds must be"),
    "stratum with one row": (lambda: stratified(Seen(**ONE), [0], shares=[1]), "fewer than 2 errors"),
    "weights of nothing": (lambda: weight_facts([]), "0 of 0"),
    "share": (lambda: held_out_gain("item", LOG, share=1), "share must be"),
    "bins": (lambda: overlap(fitted("item"), LOG, bins=0), "bins must be"),
    "another log": (lambda: calibration(fitted("item"), TWICE), "does not fit"),
    "alpha": (lambda: RatingsWorld(alpha=0), "alpha must be"),
    "density": (lambda: RatingsWorld(density=1), "density must be"),
    "conformity": (lambda: RatingsWorld(conformity=2), "conformity must be"),
    "no users": (lambda: RatingsWorld(n_users=0), "n_users must be"),
    "not complete": (lambda: RatingsWorld.from_matrix([[np.nan]]), "1 values that are not finite"),
    "no stars": (lambda: RatingsWorld.from_matrix([[0.5]], None), "whole stars"),
    "too many drawn": (lambda: WORLD.uniform(31), "per_user must be from 1 to 30"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_name(case):
    call, message = BAD[case]
    with pytest.raises(ValueError) as refusal:
        call()
    assert message in str(refusal.value), refusal.value


@pytest.mark.parametrize("kind", KINDS)
def test_one_form(kind):
    "Pairs, blocks and rows agree; all lie between clip and one; fitting does not change the log"
    before = LOG.item.copy(), LOG.columns["rating"].copy()
    p, R = fitted(kind, clip=0.02), WORLD.truth.ratings()
    M = p.matrix(ratings=R)
    assert M.shape == R.shape and (M >= 0.02).all() and (M <= 1).all()
    user, item = np.divmod(np.arange(R.size), R.shape[1])
    np.testing.assert_allclose(p.of(user, item, R.ravel()), M.ravel())
    np.testing.assert_allclose(p.matrix(np.array([3, 1]), R[[3, 1]]), M[[3, 1]])
    np.testing.assert_allclose(p.rows(LOG), M[LOG.user, LOG.item])
    assert (LOG.item == before[0]).all() and (LOG.columns["rating"] == before[1]).all()


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("low_rank", "naive_bayes")])
def test_as_many_ratings_as_there_are(kind):
    "The expected number of rows is that of the log"
    p = fit_propensity(kind, LOG, **MORE, **({"steps": 500} if kind == "logistic" else {}))
    raw = p.left @ p.right.T
    total = (1 / (1 + np.exp(-raw)) if p.link == "logistic" else raw).sum()
    assert total == pytest.approx(len(LOG), rel=1e-3)


def test_logistic_is_scikit_learns():
    table = pd.DataFrame({"item_id": range(30), "kind": np.arange(30) % 3})
    ours = fit_propensity("logistic", LOG, items=table, offsets=False, steps=500, reg=2.0).matrix()
    X = pd.get_dummies(np.tile(table["kind"], 40)).to_numpy(float)
    theirs = LogisticRegression(C=0.5, tol=1e-9).fit(X, LOG.csr().toarray().ravel())
    np.testing.assert_allclose(ours.ravel(), theirs.predict_proba(X)[:, 1], atol=2e-4)


def test_naive_bayes_by_hand():
    "Counted one by one, with one more of each value"
    drawn = MORE["sample"].columns["rating"]
    p = fitted("naive_bayes").rows(LOG)
    for r in range(1, 6):
        chosen = [(x == r) for x in LOG.columns["rating"]]
        seen = (sum(chosen) + 1) / (len(LOG) + 5)
        given_all = (sum(x == r for x in drawn) + 1) / (len(drawn) + 5)
        expected = min(1, seen * len(LOG) / 1200 / given_all)
        np.testing.assert_allclose(p[np.array(chosen)], expected)


def test_normalised_weights_add_up():
    p = fitted("low_rank").normalised(LOG)
    assert (1 / p.rows(LOG)).sum() == pytest.approx(1200)


@st.composite
def judged(draw):
    "A full matrix of errors, a part of it that is seen, propensities and stand-ins"
    n, m = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    S = rng.random((n, m)) < draw(st.floats(0.1, 1))
    S[rng.integers(n), rng.integers(m)] = True
    return rng.exponential(size=(n, m)), S, rng.uniform(0.01, 1, (n, m)), rng.normal(size=(n, m))


def seen_of(E, S, p=None, stands=None):
    "What a log shows of them"
    user, item = S.nonzero()
    more = {} if stands is None else {"imputed": stands[S], "imputed_sum": stands.sum(1)}
    return Seen(user, item, E[S], S.shape, None if p is None else p[S], **more)


@given(judged(), st.floats(0.01, 1))
@settings(deadline=None)
def test_equal_propensities_are_the_naive_mean(world, c):
    E, S, _, _ = world
    naive = seen_of(E, S).terms("naive").value
    assert naive == pytest.approx(E[S].mean())
    assert seen_of(E, S, np.full(E.shape, c)).terms("snips").value == pytest.approx(naive)
    assert seen_of(E, S, np.full(E.shape, S.mean())).terms("ips").value == pytest.approx(naive)


@given(judged())
@settings(deadline=None)
def test_propensities_of_one(world):
    "With all pairs seen for certain everything is the truth; else DR is imputation"
    E, S, _, stands = world
    ones = np.ones(E.shape)
    full = seen_of(E, ones > 0, ones, stands)
    for name in risk.NEEDS:
        assert full.terms(name).value == pytest.approx(E.mean()), name
    part = seen_of(E, S, ones, stands)
    assert part.terms("dr").value == pytest.approx(part.terms("eib").value)
    assert part.terms("snips").value == pytest.approx(part.terms("naive").value)


@given(judged())
@settings(deadline=None)
def test_right_stand_ins_are_enough(world):
    "The truth in every log, whatever the propensities"
    E, S, p, _ = world
    for name in ("dr", "eib"):
        terms = seen_of(E, S, p, E).terms(name)
        assert terms.value == pytest.approx(E.mean()), name
        np.testing.assert_allclose(terms.influence("pair"), 0, atol=1e-12)


@given(judged())
@settings(deadline=None)
def test_stand_ins_of_zero_are_none(world):
    E, S, p, _ = world
    seen = seen_of(E, S, p, np.zeros(E.shape))
    assert seen.terms("dr").value == pytest.approx(seen.terms("ips").value)


@given(judged(), st.integers(0, 99))
@settings(deadline=None, max_examples=50)
def test_the_order_of_rows_says_nothing(world, seed):
    E, S, p, stands = world
    seen = seen_of(E, S, p, stands)
    order = np.random.default_rng(seed).permutation(len(seen.error))
    rows = (np.asarray(x)[order] for x in (seen.user, seen.item, seen.error))
    other = Seen(*rows, S.shape, seen.propensity[order], seen.imputed[order], seen.imputed_sum)
    for by in ("user", "pair"):
        a, b = (estimate_risk(s, by=by) for s in (seen, other))
        np.testing.assert_allclose(a["value"], b["value"])
        np.testing.assert_allclose(a["error"], b["error"], rtol=1e-6, atol=1e-9)


@given(judged())
@settings(deadline=None, max_examples=50)
def test_strata_are_ips_with_counted_propensities(world):
    "Rows of a stratum weigh its number of pairs over its number of rows"
    E, S, _, _ = world
    kind = np.arange(S.shape[1]) % 2 * np.ones(S.shape, int)
    count, pairs = (np.bincount(k, minlength=2) for k in (kind[S], kind.ravel()))
    assume((count[pairs > 0] >= 2).all())
    p = np.minimum(1, count / np.maximum(pairs, 1))[kind]
    ips = seen_of(E, S, np.maximum(p, 1e-9)).terms("ips").value
    assert stratified(seen_of(E, S), kind[S], shares=pairs / E.size).value == pytest.approx(ips)


def test_additive_is_least_squares():
    "With hardly any ridge, after many turns"
    seen = seen_of(
        *(
            f(np.random.default_rng(0))
            for f in (lambda r: r.random((8, 7)), lambda r: r.random((8, 7)) < 0.8)
        )
    )
    weight = np.random.default_rng(1).uniform(0.5, 2, len(seen.error))
    mean, a, b = additive(seen, weight, reg=1e-9, steps=2000)
    X = np.hstack([np.eye(8)[seen.user], np.eye(7)[seen.item]]) * np.sqrt(weight)[:, None]
    best = X @ np.linalg.lstsq(X, seen.error * np.sqrt(weight))[0]
    ours = (mean + a[seen.user] + b[seen.item]) * np.sqrt(weight)
    np.testing.assert_allclose(ours, best, atol=1e-6)


def test_stand_ins_of_a_fold_do_not_know_its_errors():
    "An error moves no stand-in of its own fold, and the sums are those of the whole matrix"
    rng = np.random.default_rng(0)
    E, S = rng.random((10, 9)), np.ones((10, 9), bool)
    first, second = (
        seen_of(E, S).stand_in("one"),
        seen_of(E + 5.0 * (E == E.max()), S).stand_in("one"),
    )
    moved = np.flatnonzero(E[S] == E.max())
    assert first.imputed[moved] == pytest.approx(second.imputed[moved])
    assert not np.allclose(first.imputed, second.imputed)
    np.testing.assert_allclose(np.bincount(first.user, first.imputed), first.imputed_sum)


def test_unbiased_and_its_interval_holds():
    "Over 300 logs: IPS and DR within four standard errors, intervals near their level"
    said = np.full((40, 30), 2.5)
    real, off, held = WORLD.truth.value(said)["mse"], [], []
    for draw in range(300):
        log = WORLD.log(draw)
        seen = seen_errors(log, said[log.user, log.item], WORLD.truth.of(log.user, log.item)[1])
        terms = [seen.stand_in().terms(k) for k in ("ips", "dr", "snips")]
        off.append([t.value - real for t in terms])
        held.append([abs(t.value - real) <= spread(t.influence("pair"))[1] for t in terms])
    z = np.mean(off, 0) / (np.std(off, 0) / np.sqrt(300))
    assert (np.abs(z[:2]) < 4).all(), z
    for hits in np.sum(held, 0):
        assert binomtest(int(hits), 300, 0.95).pvalue > 1e-4, hits


def test_a_world_does_not_depend_on_the_size_of_its_blocks(monkeypatch):
    "Nor on which part of the matrix is asked for"
    monkeypatch.setattr(ratings_world, "PAIRS", 70)
    again = RatingsWorld(40, 30, density=0.2, seed=1)
    np.testing.assert_array_equal(again.truth.ratings(), WORLD.truth.ratings())
    again.k = WORLD.k  # Found on some users where the world is large
    log = again.log()
    np.testing.assert_array_equal(log.item, LOG.item)
    np.testing.assert_array_equal(log.columns["rating"], LOG.columns["rating"])
    said = np.random.default_rng(0).uniform(1, 5, (40, 30))
    assert again.truth.value(said) == pytest.approx(WORLD.truth.value(said))


def test_a_log_holds_no_propensity():
    split = WORLD.split(per_user=4)
    for data in (LOG, WORLD.uniform(3), split.data):
        assert list(data.columns) == ["rating"]
    pairs = lambda d: set(zip(d.user.tolist(), d.item.tolist(), strict=True))
    assert not pairs(split.train) & pairs(split.test)
    assert (split.test.user_counts() == 4).all()


@pytest.mark.parametrize("how", [{}, {"alpha": 1}, {"popularity": 2.0}, {"density": 0.5}], ids=str)
def test_density_is_the_mean_propensity(how):
    world = RatingsWorld(80, 60, **how)
    assert world.truth.propensities().mean() == pytest.approx(world.density, rel=1e-6)
    n = np.mean([len(world.log(d)) for d in range(20)]) / 4800
    assert n == pytest.approx(world.density, rel=0.1)
