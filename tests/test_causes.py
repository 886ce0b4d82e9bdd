"Models with a part for each cause of a choice: their formulas, and what their samples consist of"

import numpy as np
import pytest
import torch

from recsys_lab.causal.cause import CausE, treated_rows
from recsys_lab.causal.dice import DICE, CauseBatches, distance_correlation
from recsys_lab.causal.macr import MACR, without_direct
from recsys_lab.data.interactions import Interactions
from recsys_lab.data.worlds import World
from recsys_lab.models.base import Recommender


@pytest.fixture(scope="module")
def log():
    "A skewed log without repeats"
    data = World(n_users=60, n_items=50, seed=3).interactions(3000)
    pairs = np.unique(data.user.astype(np.int64) * data.n_items + data.item)
    ids = {"user_ids": np.arange(60), "item_ids": np.arange(50)}
    return Interactions.from_codes(pairs // 50, pairs % 50, **ids)


def test_macr_is_its_formula(log):
    "Match, user and item of the network, put together by hand"
    model = MACR(dim=4, epochs=3, lr=0.05).fit(log)
    user, item = (x.ravel() for x in np.meshgrid(np.arange(60), np.arange(50), indexing="ij"))
    with torch.no_grad():
        match, a, b = model.net(torch.as_tensor(user), torch.as_tensor(item))
    for c in (-3.0, 0.0, 1.0, 40.0):
        expected = without_direct(match.numpy(), a.sigmoid().numpy(), b.sigmoid().numpy(), c)
        found = model.at(c).score()[user, item]
        assert np.allclose(found, expected, rtol=1e-4, atol=1e-5 * (1 + abs(c)))
    assert model.c == 1.0, "another strength must leave the model as it is"


def test_a_strength_is_saved(log, tmp_path):
    for model in (MACR(dim=4, epochs=2).fit(log).at(7.0), DICE(dim=4, epochs=2).fit(log).at(0.5)):
        model.save(tmp_path / "m")
        again = Recommender.load(tmp_path / "m")
        assert again.config() == model.config()
        assert np.array_equal(again.score(), model.score())


@pytest.mark.parametrize("margin", [0.0, 5.0, 1000.0])
def test_dice_draws_what_it_says(log, margin):
    "Drawn items were not taken, lie on a side nearly wherever there is one, and the side is right"
    batches = CauseBatches(log, 512, margin)
    user, item, drawn, side = map(
        torch.cat, zip(*batches.epoch(torch.Generator().manual_seed(0)), strict=True)
    )
    count, taken = log.item_counts(), log.csr().toarray() > 0
    gap = count[drawn] - count[item]
    assert np.array_equal(side.numpy(), np.where(abs(gap) > margin, np.sign(gap), 0))
    away = abs(count[None] - count[:, None]) > margin  # item, other item
    roomy = taken.mean(1)[user] < 0.5  # the draws are tried again so many times and no more
    assert not taken[user, drawn][roomy].any()
    there = away[item].any(1)
    assert (side.numpy()[there] != 0).sum() >= 0.9 * there.sum()


def test_dice_draws_both_sides_alike(log):
    "Where both sides exist, half of what is drawn is more popular; uniform draws are mostly less"
    middle = np.argsort(log.item_counts(), kind="stable")[45]
    asked, g = torch.full((20_000,), int(middle)), torch.Generator().manual_seed(1)
    up = [
        (log.item_counts()[CauseBatches(log, margin=0.0, sides=s).draw(asked, g)] > log.item_counts()[middle]).mean()
        for s in (True, False)
    ]  # fmt: skip
    assert abs(up[0] - 0.5) < 0.02 and up[1] < 0.2


def test_dice_adds_its_two_scores(log):
    model = DICE(dim=4, epochs=2, lr=0.05).fit(log)
    of = lambda t: (t.users.weight @ t.items.weight.T).detach().numpy()
    for w in (0.0, 0.5, 2.0):
        expected = of(model.net.interest) + w * of(model.net.conformity)
        assert np.allclose(model.at(w).score(), expected, atol=1e-5)


def test_distance_correlation_by_loops():
    "Its definition, row by row"
    rng = np.random.default_rng(0)
    x = rng.normal(size=(15, 3))
    y = np.c_[x[:, 0] ** 2, rng.normal(size=15)]

    def centred(z):
        d = np.array([[np.linalg.norm(p - q) for q in z] for p in z])
        return d - d.mean(0)[None] - d.mean(1)[:, None] + d.mean()

    A, B = centred(x), centred(y)
    expected = np.sqrt((A * B).mean() / np.sqrt((A * A).mean() * (B * B).mean()))
    found = distance_correlation(torch.as_tensor(x), torch.as_tensor(y)).item()
    assert abs(found - expected) < 1e-6


def test_treated_rows_count_items_alike(log):
    "The draw evens out what is taken, and as many rows are drawn as were asked for"
    draws = [treated_rows(log, share=0.1, seed=s) for s in range(200)]
    assert {d.sum() for d in draws} == {round(0.1 * len(log))}
    even = np.mean([np.bincount(log.item[d], minlength=50) for d in draws], 0)
    spread = lambda n: n.std() / n.mean()
    assert spread(even) < 0.3 * spread(log.item_counts())
    assert not np.array_equal(draws[0], draws[1])


def test_cause_without_a_penalty_leaves_untreated_items_alone(log):
    "The treated table of an item learns from treated rows and their draws only"
    data = Interactions(**{**vars(log), "columns": {"shown": np.zeros(len(log), np.int8)}})
    model = CausE(dim=4, epochs=2, lr=0.05, distance=0.0, treatment="shown").fit(data)
    first = CausE(dim=4, epochs=1, lr=1e-12, distance=0.0, treatment="shown").fit(data)
    assert np.allclose(model.at("treatment").V, first.at("treatment").V, atol=1e-6)
    assert not np.allclose(model.V, first.V, atol=1e-2)
    pulled = CausE(dim=4, epochs=2, lr=0.05, distance=10.0, treatment="shown").fit(data)
    assert np.abs(pulled.V - pulled.at("treatment").V).mean() < np.abs(model.V - first.V).mean()
