"Popularity: test rows that count items alike, and models that take it out"

import numpy as np
import pytest

from recsys_lab.causal.ipsbpr import IPSBPR
from recsys_lab.causal.pda import PDA
from recsys_lab.causal.popularity_bias import popularity_bias, popularity_groups
from recsys_lab.causal.posthoc import PostHoc, divergence, group_shares
from recsys_lab.causal.relmf import RelMF
from recsys_lab.data.interactions import Interactions
from recsys_lab.data.intervened import equal_draw, split_intervened
from recsys_lab.data.loaders import load_dataset
from recsys_lab.data.protocols import load_protocol
from recsys_lab.data.split import LeakError
from recsys_lab.evaluation.evaluate import evaluate
from recsys_lab.models.bprmf import BPRMF
from recsys_lab.models.ease import EASE
from recsys_lab.models.registry import models_of

PROTOCOLS = ("ml100k-intervened", "ml100k-ordinary")


@pytest.fixture(scope="module")
def splits():
    return [load_protocol(name) for name in PROTOCOLS]


def pairs(data) -> set:
    return set((np.asarray(data.user, np.int64) * data.n_items + data.item).tolist())


def test_published_shares(splits):
    "50,000 normal rows, 24,817 drawn; a quarter trains, a quarter is validation, half is asked for"
    train, valid, test = (len(splits[0].view(p)) for p in ("train", "valid", "test"))
    assert (train, valid, test) == (50_000 + 6_204, 6_204, 12_409)
    assert train + valid + test == 74_817
    assert splits[0].train.columns["intervened"].sum() == 6_204
    assert all(splits[0].view(p).columns["intervened"].all() for p in ("valid", "test"))


def test_no_leak_and_one_training(splits):
    equal, plain = splits
    assert (equal.part < 2).tolist() == (plain.part < 2).tolist()
    for split in splits:
        known, asked = pairs(split.train) | pairs(split.valid), pairs(split.test)
        assert not known & asked and len(asked) == len(split.test)
        assert split.check_leaks() == {"valid": 0, "test": 0}
    twice = Interactions.from_codes(np.repeat([0, 1], 40), np.tile(np.arange(20), 4))
    with pytest.raises(LeakError, match="prepare.dedup"):
        split_intervened(twice)


def test_the_draw_is_near_uniform():
    """Among items with enough rows each is drawn as often as any other

    200 items with 40 to 400 rows; of 4,000 draws each has about 20, which none can run out of. A draw in proportion
    to the rows would spread with them: deviation over mean 0.47. Uniform draws have 1 / sqrt(20) = 0.22.
    """
    counts = np.linspace(40, 400, 200).astype(int)
    items = np.repeat(np.arange(200), counts)
    seen = [
        np.bincount(items[equal_draw(items, 4_000, np.random.default_rng(s))]) for s in range(20)
    ]
    spread = np.mean([x.std() / x.mean() for x in seen])
    assert spread < 0.26
    mean = np.mean(seen, 0)
    assert abs(np.polyfit(counts, mean, 1)[0] * 360) < 0.15 * mean.mean()  # low to high, rows


def test_test_part_of_movielens_is_near_uniform(splits):
    "The films with most rows are asked for little more often than the rarer ones that have enough"
    equal, plain = (s.test.item_counts() for s in splits)
    rows = splits[0].data.item_counts()
    middle, top = (rows >= 100) & (rows < 200), rows >= 300
    assert equal[top].mean() < 1.5 * equal[middle].mean()
    assert plain[top].mean() > 2.3 * plain[middle].mean()
    assert equal.max() < 2.5 * equal[rows >= 100].mean()


def test_ordinary_rows_are_as_popular_as_the_log(splits):
    data = load_dataset("ml100k")
    mean = lambda rows: data.item_counts()[rows.item].mean()
    assert abs(mean(splits[1].test) / mean(data) - 1) < 0.03
    assert mean(splits[0].test) < 0.75 * mean(data)


def test_seeds_differ():
    x = Interactions.from_codes(np.repeat(np.arange(100), 40), np.tile(np.arange(40), 100))
    first, again, other = (split_intervened(x, seed=s).part for s in (0, 0, 1))
    assert (first == again).all() and (first != other).any()


@pytest.fixture(scope="module")
def ease(splits):
    return EASE().fit(splits[0].train)


@pytest.mark.parametrize("how", ["penalty", "calibrated"])
def test_no_price_changes_nothing(ease, how):
    assert np.array_equal(PostHoc.around(ease, how=how, lam=0.0).score(), ease.score())


def test_price_lowers_popularity(ease, splits):
    lifts = [
        popularity_bias(evaluate(PostHoc.around(ease, lam=lam), splits[1]), splits[1])[0]
        for lam in (0.0, 0.5, 2.0)
    ]
    means = [t["popularity_lift@10"].mean() for t in lifts]
    assert means[0] > means[1] > means[2]


def test_calibration_meets_the_person(ease, splits):
    "Lists come nearer to the shares of the history, person by person"
    split, groups = splits[1], popularity_groups(splits[1].train.item_counts())
    each = []
    for lam in (0.0, 0.9):
        e = evaluate(PostHoc.around(ease, how="calibrated", lam=lam), split)
        wanted = group_shares(split.train.histories().take(e.codes), groups)
        counts = np.eye(3)[groups[e.top[:, :10]]].sum(1)
        each.append(divergence(wanted, counts))
    assert (each[1] < each[0] + 1e-9).mean() > 0.95
    assert each[1].mean() < 0.3 * each[0].mean()


def test_a_stranger_is_calibrated_too(ease, splits):
    "By the history that is given, not by a known user's"
    model = PostHoc.around(ease, how="calibrated", lam=0.9)
    history = splits[0].train.histories().take(np.array([7]))
    assert np.allclose(model.score(histories=history), model.score([7]))


def test_pda_without_power_knows_no_popularity(splits):
    "gamma 0 takes popularity into account nowhere; wanted 0 ranks by the product of the vectors"
    few = {"dim": 8, "lr": 0.01, "epochs": 2}
    model = PDA(gamma=0.0, reg=0.0, **few).fit(splits[0].train)
    assert (model._part == 1).all()
    users = np.arange(20)
    assert np.array_equal(model.score(users), model.U[users] @ model.V.T)
    order = lambda m: np.argsort(-m.score(users), axis=1)[:, :10]
    assert not np.array_equal(order(model.at(1.0)), order(model))
    assert np.array_equal(order(model.at(0.0)), order(model))


def test_no_weight_is_no_correction(splits):
    few = {"dim": 8, "lr": 0.01, "epochs": 2}
    plain = BPRMF(**few).fit(splits[0].train)
    for by in ("item", "user"):
        same = IPSBPR(by=by, eta=0.0, **few).fit(splits[0].train)
        assert np.allclose(same.score([3]), plain.score([3]), atol=1e-4)
        other = IPSBPR(by=by, eta=1.0, **few).fit(splits[0].train)
        assert not np.allclose(other.score([3]), plain.score([3]), atol=1e-3)


def test_bias_left_out_of_the_ranking_only(splits):
    "The training is the same; the scores differ by the items' biases"
    few = {"dim": 8, "lr": 0.01, "epochs": 2}
    kept, out = (RelMF(bias=b, **few).fit(splits[0].train) for b in ("kept", "left_out"))
    assert np.allclose(kept.score([0]) - out.score([0]), kept.V[:, -1], atol=1e-5)


def test_the_measures_refuse_another_part(ease, splits):
    e = evaluate(ease, splits[0])
    with pytest.raises(ValueError, match="users"):
        popularity_bias(e, splits[1])
    with pytest.raises(ValueError, match="k=30"):
        popularity_bias(e, splits[0], k=30)


def test_the_study_compares_with_the_control():
    assert {"bprmf", "mf", "ease", "pda", "relmf", "ipsbpr"} <= set(models_of(PROTOCOLS[0]))
