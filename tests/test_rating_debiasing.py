"Training losses are the estimators that they stand for; the judge of random ratings agrees with the other judges"

import numpy as np
import pytest
import torch

from recsys_lab.causal.drmf import DRMF, TwoFactors, dr_loss
from recsys_lab.causal.ipsmf import IPSMF, weighted_loss
from recsys_lab.causal.random_ratings import judge_random, random_board, take_sample, yardstick
from recsys_lab.causal.ratings import Factors, weights_of
from recsys_lab.causal.risk import Seen
from recsys_lab.data.fetching import fetch
from recsys_lab.data.protocols import load_protocol
from recsys_lab.data.ratings_world import RatingsWorld
from recsys_lab.data.split import Split
from recsys_lab.evaluation.pairs import compare_pairs, evaluate_pairs, judge_pairs
from recsys_lab.models.base import Recommender

QUICK = {"dim": 4, "reg": 0.3, "lr": 0.03, "epochs": 15}


@pytest.fixture(scope="module")
def world() -> RatingsWorld:
    return RatingsWorld(150, 100, alpha=0.5, density=0.15, seed=2)


@pytest.fixture(scope="module")
def split(world) -> Split:
    made = world.split(per_user=15)
    made.data.columns["true"] = world.truth.of(made.data.user, made.data.item)[1]
    return Split(made.data, made.part, made.kind, made.info)


def seen_errors(world, log, said, guess):
    "Errors of a log and of guesses, as the estimators of `causal.risk` take them"
    at = np.asarray(log.user), np.asarray(log.item)
    rating, p = world.truth.of(*at)
    imputed = (said - guess) ** 2
    shape = world.n_users, world.n_items
    return Seen(*at, (said[at] - rating) ** 2, shape, p, imputed[at], imputed.sum(1))


def test_losses_are_the_estimators_of_causal_risk(world):
    log, rng = world.log(), np.random.default_rng(0)
    said, guess = rng.uniform(1, 5, (2, world.n_users, world.n_items))
    seen = seen_errors(world, log, said, guess)
    share = len(log) / (world.n_users * world.n_items)
    weight = torch.as_tensor(weights_of(seen.propensity, share)).double()
    error, imputed = torch.as_tensor(seen.error), torch.as_tensor(seen.imputed)
    for kind, name in (("none", "naive"), ("ips", "ips"), ("snips", "snips")):
        loss = weighted_loss(error, weight, kind).item()
        assert loss == pytest.approx(seen.terms(name).value, rel=1e-6)
    every = torch.as_tensor((said - guess) ** 2).ravel()
    assert dr_loss(every, error, imputed, weight).item() == pytest.approx(
        seen.terms("dr").value, rel=1e-6
    )
    eib = dr_loss(every, error, imputed, torch.full_like(weight, share)).item()
    assert eib == pytest.approx(seen.terms("eib").value, rel=1e-6)


def test_weighted_losses_are_right_on_average(world):
    "Over many logs of one world, with the true propensities: IPS and DR hit the error of all pairs"
    rng = np.random.default_rng(1)
    said, guess = rng.uniform(1, 5, (2, world.n_users, world.n_items))
    real = ((said - world.truth.ratings()) ** 2).mean()
    found = {"ips": [], "dr": [], "naive": []}
    for draw in range(60):
        seen = seen_errors(world, world.log(draw), said, guess)
        for name, values in found.items():
            values.append(seen.terms(name).value)
    far = {k: (np.mean(v) - real) / (np.std(v, ddof=1) / np.sqrt(60)) for k, v in found.items()}
    assert abs(far["ips"]) < 3.5 and abs(far["dr"]) < 3.5 and abs(far["naive"]) > 10


@pytest.mark.parametrize("kind", ["jl", "mrdr", "eib", "dr"])
def test_neither_network_learns_through_the_other(kind):
    "A step of the loss of the predictions leaves the guesses alone, and the other way round"
    torch.manual_seed(0)
    model = DRMF(kind, dim=2, reg=0.0)
    model.share = 0.2
    net = TwoFactors(Factors(4, 5, 2), Factors(4, 5, 2))
    net.imputed.requires_grad_(kind != "dr")
    rows = torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2]), torch.tensor([5.0, 1.0, 3.0])
    drawn = torch.tensor([3, 3]), torch.tensor([3, 4])
    model._loss(net, (*rows, torch.tensor([1.0, 2.0, 0.5]), *drawn)).backward()
    slope = net.rating.items.weight.grad
    assert slope[3:].abs().min() > 0, "pairs that were only drawn teach the predictions"
    if kind == "dr":
        assert net.imputed.items.weight.grad is None
    else:
        assert net.imputed.items.weight.grad[3:].abs().max() == 0, "and not the guesses"


@pytest.mark.parametrize("make", [IPSMF, DRMF])
def test_saved_predictions_come_back(make, split, tmp_path):
    model = make(propensity="true", **QUICK).fit(split.train, valid=split.valid)
    again = Recommender.load(model.save(tmp_path / "m"))
    assert np.array_equal(again.predict(split.test), model.predict(split.test))


def test_true_propensities_help_on_average(world):
    "Three logs: the error of all pairs is smaller with weights, for every kind that has them"
    gain = {"snips": [], "jl": [], "mrdr": []}
    for draw in range(3):
        split = world.split(per_user=15, draw=draw)
        split.data.columns["true"] = world.truth.of(split.data.user, split.data.item)[1]
        split = Split(split.data, split.part, split.kind, split.info)
        common = QUICK | {"propensity": "true", "metric": "r2", "seed": draw}
        models = {"none": IPSMF("none", **common), "snips": IPSMF("snips", **common)}
        models |= {k: DRMF(k, **common) for k in ("jl", "mrdr")}
        error = {
            k: evaluate_pairs(m.fit(split.train, valid=split.valid), split).pooled()["rmse"]
            for k, m in models.items()
        }
        for name, values in gain.items():
            values.append(error["none"] - error[name])
    assert all(min(v) > 0 for v in gain.values()), gain


def test_settings_that_lack_something_are_refused(split):
    with pytest.raises(ValueError, match="no kind and no column"):
        IPSMF(propensity="nowhere").fit(split.train)
    with pytest.raises(ValueError, match="naive_bayes needs sample"):
        DRMF(propensity="naive_bayes").fit(split.train)
    split.train.columns["zero"] = np.zeros(len(split.train))
    with pytest.raises(ValueError, match="not above 0 in"):
        IPSMF(propensity="zero", floor=0.0).fit(split.train)


def test_the_board_agrees_with_the_judge_of_pairs(split):
    "Same users drawn, same differences and intervals as `compare_pairs`"
    rng = np.random.default_rng(0)
    truth = split.test.columns["rating"]
    said = {k: truth + rng.normal(0, s, len(truth)) for k, s in (("a", 1.0), ("b", 1.3))}
    judged = {k: judge_random(split.test, [v], resamples=500) for k, v in said.items()}
    mine = random_board(judged, "a").set_index(["method", "metric"]).loc[("b", "mae")]
    pairs = {k: judge_pairs(split.test, v) for k, v in said.items()}
    theirs = compare_pairs(pairs, "a", resamples=500).set_index("metric").loc["mae"]
    assert mine["difference"] == pytest.approx(theirs["difference"])
    assert mine["difference_low"] == pytest.approx(theirs["low"])
    assert mine["difference_high"] == pytest.approx(theirs["high"])
    assert mine["value"] == pytest.approx(pairs["b"].pooled()["mae"])


def test_two_seeds_are_averaged(split):
    truth = split.test.columns["rating"]
    one, two = truth + 1, truth - 2
    both = judge_random(split.test, [one, two], resamples=50)
    assert both.value["mse"] == pytest.approx(2.5) and both.by_seed["mae"].tolist() == [1, 2]
    assert np.allclose(both.draws["mse"], 2.5)


def test_coat(mirror, tmp_path):
    "Known pairs leave the test part; one rating of each person is taken out for the propensities"
    fetch(["coat"], data_dir=tmp_path)
    whole = load_protocol("coat", data_dir=tmp_path)
    assert whole.info["known_targets"] == 366 and len(whole.test) == 4640 - 366
    split, sample = take_sample(whole)
    assert np.bincount(sample.user, minlength=290).tolist() == [1] * 290
    assert (len(split.test), len(split.train) + len(split.valid)) == (3984, 6960)
    rare, common = (
        yardstick(split, sample)[split.valid.columns["rating"] == r].mean() for r in (1, 5)
    )
    assert rare > 1 > common
