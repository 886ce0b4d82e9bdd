"Strangers and new items stay out of training and support; people's own layers are the only ones that change"

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from recsys_lab.data.features import bags
from recsys_lab.data.interactions import Interactions
from recsys_lab.data.loaders import load_dataset
from recsys_lab.data.shots import NEW, QUADRANTS, Shots, split_shots
from recsys_lab.data.split import PARTS, LeakError
from recsys_lab.data.tiny import tiny, tiny_items
from recsys_lab.models.base import NotFitted
from recsys_lab.models.local import Episodes, FewShotNet, adapt, adapt_all, answer_all, own_loss
from recsys_lab.models.melu import MeLU
from recsys_lab.models.rater import FoldIn, Offsets

SMALL = {"dim": 4, "layers": [8], "epochs": 6, "lr": 0.02, "shots": (0, 1, 3), "query": 4}


@pytest.fixture(scope="module")
def shots() -> Shots:
    return split_shots(tiny(), new_users=0.3, valid=0.2, most=3)


@pytest.fixture(scope="module")
def real() -> Shots:
    return split_shots(load_dataset("ml100k"))


def fitted(shots, **given) -> MeLU:
    films = tiny_items().drop(columns="title")
    check = {"valid": shots.asked("valid"), "shown": shots.shown(3, "valid"), "items": films}
    return MeLU(**SMALL | given).fit(shots.train, **check)


def pairs(data: Interactions) -> set:
    return set(zip(data.user.tolist(), data.item.tolist(), strict=True))


def weights(net: nn.Module) -> dict:
    return {k: v.clone() for k, v in net.state_dict().items()}


# The protocol


@pytest.mark.parametrize("part", ["valid", "test"])
def test_a_query_row_is_never_shown_nor_trained_on(real, part):
    asked = pairs(real.asked(part))
    assert len(asked) == len(real.asked(part)) > 1000
    assert not asked & pairs(real.train)
    assert not asked & pairs(real.shown(real.most, part))


def test_no_row_of_a_stranger_or_of_a_new_item_is_trained_on(real):
    assert (real.kind[real.train.user] == 0).all()
    assert not real.new_item[real.train.item].any()
    assert not real.new_item[real.shown(real.most).item].any()


def test_all_numbers_of_shots_ask_the_same_people_and_show_their_first_rows(real):
    asked, ten = real.asked(), real.shown(10)
    for n in (0, 1, 5, 10):
        some = real.shown(n)
        assert set(np.unique(some.user_counts()[np.unique(asked.user)])) == {n}
        place = np.arange(len(ten)) - ten.offsets[ten.user]
        assert np.array_equal(some.item, ten.item[place < n])


def test_nothing_that_is_shown_is_later_than_what_is_asked(real):
    last = pd.Series(real.shown(10).row).groupby(real.shown(10).user).max()
    time = lambda data, how: pd.Series(data.time).groupby(data.user).agg(how)
    assert (time(real.shown(10), "max") <= time(real.asked(), "min")).all() and len(last) > 800


def test_the_parts_are_the_same_each_time_and_do_not_depend_on_the_order_of_a_file():
    data = tiny()
    frame = data.to_frame().sample(frac=1, random_state=0)
    frame = frame[~frame.duplicated(["user_id", "timestamp"], keep=False)]
    again = Interactions.from_frame(frame.sort_values(["item_id"]))
    first = Interactions.from_frame(frame)
    parts = [split_shots(d, most=2).split.part.tolist() for d in (first, again, first)]
    assert parts[0] == parts[1] == parts[2]
    assert parts[0] != split_shots(first, most=2, seed=1).split.part.tolist()


def planted(shots: Shots, row: int, to: str) -> Shots:
    part = shots.split.part.copy()
    part[row] = PARTS[to]
    return replace(shots, split=replace(shots.split, part=part))


@pytest.mark.parametrize(
    ("what", "to", "said"),
    [
        ("row of a stranger", "train", "1 training rows are of strangers"),
        ("row of a new item", "train", "1 rows that are trained on or shown are of new items"),
        ("shown row of a new item", "fold_in", "of new items"),
        ("support row", "unused", "query rows are of users without 10 support rows"),
        ("query row that comes late", "fold_in", "come after a held-out row of the same user"),
    ],
)
def test_a_planted_leak_is_refused(real, what, to, said):
    data, part = real.split.data, real.split.part
    stranger, new = real.kind[data.user] == NEW, real.new_item[data.item]
    asked = real.asked().user_counts()[data.user] > 0
    rows = {
        "row of a stranger": stranger & (part == PARTS["fold_in"]),
        "row of a new item": ~stranger & new & (part == PARTS["test"]),
        "shown row of a new item": stranger & new & (part == PARTS["test"]),
        "support row": stranger & asked & (part == PARTS["fold_in"]),
        "query row that comes late": stranger & ~new & (part == PARTS["test"]),
    }[what]
    real.check()
    with pytest.raises(LeakError, match=said):
        planted(real, np.flatnonzero(rows)[0], to).check()


def test_every_test_row_has_its_quadrant(real):
    asked, place = real.asked(), real.quadrant()
    names = np.array(QUADRANTS)[place]
    new = np.char.startswith(names, "new users")
    assert np.array_equal(new, real.kind[asked.user] == NEW)
    assert np.array_equal(np.char.endswith(names, "new items"), real.new_item[asked.item])
    assert set(names) == set(QUADRANTS)


# What raters may see


@pytest.mark.parametrize("make", [Offsets, FoldIn, lambda: MeLU(**SMALL)])
def test_no_rating_of_an_asked_row_is_read(shots, make):
    model, asked = make().fit(shots.train), shots.asked()
    other = replace(asked, columns={"rating": 6 - np.asarray(asked.columns["rating"])})
    assert np.array_equal(
        model.predict(asked, shots.shown(3)), model.predict(other, shots.shown(3))
    )
    bare = replace(asked, columns={})
    assert np.array_equal(model.predict(asked, shots.shown(1)), model.predict(bare, shots.shown(1)))


@pytest.mark.parametrize("make", [Offsets, FoldIn, lambda: MeLU(**SMALL)])
def test_what_is_shown_counts_and_an_asked_pair_may_not_be_shown(shots, make):
    model, asked = make().fit(shots.train), shots.asked()
    three = model.predict(asked, shots.shown(3))
    assert np.abs(three - model.predict(asked, shots.shown(0))).max() > 1e-3
    with pytest.raises(LeakError, match=f"{len(asked)} of {len(asked)} asked pairs are shown"):
        model.predict(asked, asked)


@pytest.mark.parametrize("make", [Offsets, FoldIn, lambda: MeLU(**SMALL)])
def test_ratings_of_other_people_change_nothing(shots, make):
    model, asked, three = make().fit(shots.train), shots.asked(), shots.shown(3)
    u = asked.user[0]
    own, mine = asked.where(asked.user == u), three.where(three.user == u)
    together = model.predict(asked, three)[asked.user == u]
    np.testing.assert_allclose(model.predict(own, mine), together, atol=1e-5)


# Layers of one's own


def net_of(seed: int = 0) -> FewShotNet:
    torch.manual_seed(seed)
    users = [bags([0] * 9, 1), bags([1, 2, 0] * 3, 3)]
    items = [bags([1, 2, 3, 4, 0], 5), bags([1, 1, 2, 2, 0], 3)]
    net = FewShotNet(users, items, 3, [5]).double()
    for side in (net.users, net.items):
        side.x = side.x.double()
    return net


def batch(m: int = 8, k: int = 4):
    g = torch.Generator().manual_seed(1)
    user, item = torch.arange(m), torch.randint(4, (m, k), generator=g)
    y = torch.randn(m, k, generator=g).double()
    return user, item, y, (torch.arange(k) < torch.arange(m)[:, None] % (k + 1)).double()


def test_adaptation_changes_only_the_decision_layers():
    net, (user, item, y, real) = net_of(), batch()
    before = weights(net)
    own = adapt_all(net, net.pairs(user, item), y, real, lr=0.3, steps=2)
    assert set(own) == {k.removeprefix("decide.") for k in before if k.startswith("decide.")}
    for k, v in own.items():
        moved = (v - before[f"decide.{k}"]).flatten(1).abs().max(1).values
        assert (moved[real.sum(1) == 0] == 0).all()
        assert (moved[real.sum(1) > 0] > 0).any()
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_predicting_leaves_the_model_as_it_was(shots):
    model = fitted(shots)
    before, first = weights(model.net), model.predict(shots.asked(), shots.shown(3))
    assert all(torch.equal(before[k], v) for k, v in model.net.state_dict().items())
    assert np.array_equal(first, model.predict(shots.asked(), shots.shown(3)))


def test_zero_shots_are_the_common_model(shots):
    model, asked = fitted(shots, steps=3), shots.asked()
    none = model.predict(asked, shots.shown(0))
    user = torch.as_tensor(np.asarray(asked.user)).long()
    item = torch.as_tensor(np.asarray(asked.item)).long()
    with torch.no_grad():
        common = model.net.decide(model.net.pairs(user, item[:, None])).flatten().numpy()
    np.testing.assert_allclose(none, np.clip(model.mean + common, model.low, model.high), atol=1e-5)
    model.steps = 0
    np.testing.assert_allclose(model.predict(asked, shots.shown(3)), none, atol=1e-6)


def test_all_at_once_is_one_by_one():
    net, (user, item, y, real) = net_of(), batch()
    x = net.pairs(user, item)
    how = {"lr": 0.2, "steps": 3, "prior": 2.0}
    together = answer_all(net, adapt_all(net, x, y, real, **how), x)
    start = dict(net.decide.named_parameters())
    for i in range(len(user)):
        own = adapt(net.decide, start, x[i], y[i], real[i], **how)
        alone = torch.func.functional_call(net.decide, own, (x[i],)).squeeze(-1)
        torch.testing.assert_close(together[i], alone, rtol=0, atol=1e-12)


def outer(net: FewShotNet, second: bool) -> torch.Tensor:
    "Loss of a batch after the steps, as in training"
    user, item, y, real = batch()
    x = net.pairs(user, item)
    own = adapt_all(net, x, y, real, lr=0.3, steps=2, second=second)
    return ((answer_all(net, own, x) - y).square() * (1 - real)).sum()


def test_the_second_order_gradient_is_that_of_finite_differences():
    "Of every weight, vectors and layers; the first-order one is another"
    net = net_of()
    parameters = list(net.parameters())
    exact = torch.autograd.grad(outer(net, True), parameters)
    rough = torch.autograd.grad(outer(net, False), parameters)
    flat = nn.utils.parameters_to_vector(parameters).detach().clone()
    numeric = torch.zeros_like(flat)
    for j in range(len(flat)):
        for sign in (1, -1):
            moved = flat.clone()
            moved[j] += sign * 1e-6
            nn.utils.vector_to_parameters(moved, parameters)
            numeric[j] += sign * outer(net, True).item() / 2e-6
    nn.utils.vector_to_parameters(flat, parameters)
    at = 0  # The vector of an unknown number is kept at zero: no gradient goes there
    padded = {id(net.users.ids.weight), id(net.items.ids.weight)}
    for p, e in zip(parameters, exact, strict=True):
        n = numeric[at : at + p.numel()].view_as(p).clone()
        at += p.numel()
        if id(p) in padded:
            n[0] = 0
        torch.testing.assert_close(e, n, rtol=1e-5, atol=1e-6)
    gap = max((e - r).abs().max().item() for e, r in zip(exact, rough, strict=True))
    assert gap > 1e-3


def test_a_prior_makes_one_rating_pull_less_than_ten():
    layers = nn.Linear(1, 1, bias=False).double()
    layers.weight.data[:] = 0.0
    start, x, y = {"weight": layers.weight}, torch.ones(10, 1).double(), torch.ones(10).double()
    one, ten = (torch.arange(10) < 1).double(), torch.ones(10).double()
    move = lambda real, prior: adapt(layers, start, x, y, real, 0.1, 1, prior)["weight"].item()
    assert move(one, 0.0) == pytest.approx(move(ten, 0.0)) == pytest.approx(0.2)
    assert move(one, 5.0) == pytest.approx(0.2 / 6)
    assert move(ten, 5.0) == pytest.approx(0.2 * 10 / 15)
    assert own_loss(layers, start, x, y, one * 0).item() == 0


def test_episodes_never_ask_what_they_show(real):
    train = real.train
    stars = np.asarray(train.columns["rating"], np.float32)
    for earliest in (False, True):
        drawn = Episodes(train, stars, (0, 1, 5, 10), 10, 64, earliest)
        whole = train.csr("rating")
        for u, i, r, s, q in drawn.epoch(torch.Generator().manual_seed(3)):
            assert not (s & q).any() and (q.sum(1) > 0).all()
            used = s | q
            who, item = u[:, None].expand_as(i)[used].numpy().copy(), i[used].numpy().copy()
            found = np.asarray(whole[who, item]).ravel()
            assert np.array_equal(found, r[used].numpy())
            key = who * train.n_items + item
            assert len(np.unique(key)) == len(key)


def test_the_plain_network_without_steps_does_not_look_at_what_is_shown(shots):
    plain = fitted(shots, kind="plain", steps=0)
    said = [plain.predict(shots.asked(), shots.shown(n)) for n in (0, 1, 3)]
    assert np.array_equal(said[0], said[1]) and np.array_equal(said[0], said[2])


def test_a_new_item_has_no_vector_of_its_own(shots):
    model = fitted(shots)
    new = torch.as_tensor(np.flatnonzero(shots.new_item))
    assert (model.net.items.code[new] == 0).all()
    assert model.net.items.ids.weight[0].abs().max().item() == 0


def test_one_seed_one_model(shots):
    first, again, other = (fitted(shots, seed=s) for s in (0, 0, 1))
    said = [m.predict(shots.asked(), shots.shown(3)) for m in (first, again, other)]
    assert np.array_equal(said[0], said[1]) and not np.allclose(said[0], said[2])


def test_own_layers_learn_a_taste_that_common_ones_cannot_know():
    "People like one of two kinds of items, nothing is known of them: ratings tell, steps follow"
    rng = np.random.default_rng(0)
    taste, n_items = np.arange(80) % 2, 30
    items = np.stack([rng.permutation(n_items)[:16] for _ in taste])
    rating = np.where(items % 2 == taste[:, None], 4.5, 1.5) + rng.normal(0, 0.3, items.shape)
    data = Interactions.from_codes(
        np.repeat(np.arange(80), 16), items.ravel(), np.tile(np.arange(16), 80),
        item_ids=np.arange(n_items), columns={"rating": rating.ravel().astype(np.float32)},
    )  # fmt: skip
    films = pd.DataFrame(
        {"item_id": range(n_items), "kind": np.array(["a", "b"])[np.arange(n_items) % 2]}
    )
    few = split_shots(data, most=5)
    model = MeLU(
        shots=(0, 5), lr=0.02, local_lr=0.3, prior=0.0, epochs=40, steps=3, batch_size=16, query=6
    ).fit(few.train, items=films)
    told, untold = (model.error(few.asked(), few.shown(5), (n,)) for n in (5, 0))
    assert untold > 1.2 and told < 0.75 * untold


@pytest.mark.parametrize(
    "given, said",
    [
        ({"new_items": np.array([3, 5])}, "True or False for each of 40 items"),
        ({"new_items": np.arange(40) % 2}, "True or False for each of 40 items"),
        ({"new_items": np.zeros(41, bool)}, "True or False for each of 40 items"),
        ({"new_items": np.ones(40, bool)}, "nobody is asked"),
        ({"most": 50}, "nobody is asked: no user has more than 50"),
        ({"most": 2.5}, "a whole number `most`"),
    ],
)
def test_a_protocol_that_asks_nobody_or_cannot_be_read_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        split_shots(tiny(), **{"most": 3} | given)


def test_a_mask_of_new_items_may_be_a_list_or_a_column():
    mask = np.arange(40) < 8
    parts = [split_shots(tiny(), new_items=m, most=3).split.part for m in (mask, pd.Series(mask))]
    assert (parts[0] == parts[1]).all()


@pytest.mark.parametrize("make", [Offsets, FoldIn, lambda: MeLU(**SMALL)])
def test_what_is_forgotten_is_named(shots, make):
    nothing = shots.train.where(np.zeros(len(shots.train), bool))
    unrated = Interactions.from_codes(
        [0], [1], user_ids=shots.train.user_ids, item_ids=shots.train.item_ids
    )
    with pytest.raises(NotFitted, match=r"call fit\(train\) first"):
        make().predict(shots.asked(), shots.shown(1))
    with pytest.raises(ValueError, match="valid and shown belong together"):
        make().fit(shots.train, valid=shots.asked("valid"))
    with pytest.raises(ValueError, match="train has no rows"):
        make().fit(nothing)
    model = make().fit(shots.train)
    with pytest.raises(ValueError, match="shown has no column 'rating'"):
        model.predict(shots.asked(), unrated)
    with pytest.raises(ValueError, match="asked has no column 'rating'"):
        model.error(unrated, shots.shown(1))
