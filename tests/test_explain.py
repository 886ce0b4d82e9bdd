"Every method on every kind of model: what holds for one must hold for all"

import functools
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_lab.data.interactions import Histories
from recsys_lab.data.loaders import load_dataset, load_items
from recsys_lab.data.tiny import tiny, tiny_items
from recsys_lab.explain.explain import explain, explain_many
from recsys_lab.explain.explanation import Explanation
from recsys_lab.explain.methods import METHODS, attribute, methods_for
from recsys_lab.explain.removal import base_scores
from recsys_lab.explain.subsets import history_sums, keep, owner, target_scores
from recsys_lab.models.bert4rec import BERT4Rec
from recsys_lab.models.ease import EASE
from recsys_lab.models.ials import IALS
from recsys_lab.models.itemknn import ItemKNN
from recsys_lab.models.multvae import MultVAE
from recsys_lab.models.neumf import NeuMF
from recsys_lab.models.puresvd import PureSVD
from recsys_lab.models.registry import model_class
from recsys_lab.models.sasrec import SASRec
from recsys_lab.models.userknn import UserKNN

MODELS = {
    "ease": lambda: EASE(lam=10.0),
    "itemknn": lambda: ItemKNN(neighbours=10),
    "ials": lambda: IALS(factors=4, epochs=3),
    "puresvd": lambda: PureSVD(factors=4),
    "userknn": lambda: UserKNN(neighbours=10),
    "multvae": lambda: MultVAE(dim=4, hidden=8, epochs=3),
    "neumf": lambda: NeuMF(dim=4, epochs=3),
    "sasrec": lambda: SASRec(dim=8, epochs=3, window=8),
    "sasrec-timed": lambda: SASRec(
        dim=8, epochs=3, lr=0.1, window=8, positions="rotary", times=True
    ),
    "bert4rec": lambda: BERT4Rec(dim=8, epochs=3, window=8),
}
QUICK = {"shapley": {"permutations": 4}, "gate-shapley": {"samples": 2}, "lime": {"samples": 60}}
QUICK |= {"shap": {"budget": 60}, "lxr": {"epochs": 1}}
BATCHED = {"random", "gate-shapley", "lxr"}  # What they draw depends on the batch


@functools.cache
def fitted(key):
    return MODELS[key]().fit(tiny(), items=tiny_items())


def people(n=12):
    "Histories of several lengths, and an item that each person has not taken"
    data = tiny()
    some = data.histories().take(np.arange(n))
    held = some.csr(data.n_items).toarray() > 0
    return some, held.argmin(1)


def told(model, histories, targets, method):
    return attribute(fitted(model), histories, targets, method, **QUICK.get(method, {})).values


PAIRS = [(m, k) for m in MODELS for k in methods_for(fitted(m))]


def test_every_method_serves_a_model():
    assert {k for _, k in PAIRS} == set(METHODS)


@pytest.mark.parametrize(("model", "method"), PAIRS)
def test_values_are_sound(model, method):
    "Finite, aligned, the same again, the input untouched, and adding up where that is promised"
    some, asked = people()
    before = some.items.copy(), some.offsets.copy()
    first, second = (
        attribute(fitted(model), some, asked, method, **QUICK.get(method, {})) for _ in range(2)
    )
    assert first.values.shape == some.items.shape and first.values.dtype == np.float64
    assert np.isfinite(first.values).all()
    np.testing.assert_array_equal(first.values, second.values)
    np.testing.assert_array_equal(some.items, before[0])
    np.testing.assert_array_equal(some.offsets, before[1])
    if METHODS[method].additive:
        total = first.base + history_sums(first.values, some)
        np.testing.assert_allclose(total, first.score, atol=2e-3 * np.abs(first.score).max())


@pytest.mark.parametrize(("model", "method"), [p for p in PAIRS if p[1] not in BATCHED])
def test_a_batch_is_its_rows(model, method):
    "An explanation does not depend on who else is explained"
    some, asked = people(5)
    whole = told(model, some, asked, method)
    for i in range(len(some)):
        one = told(model, some.take([i]), asked[[i]], method)
        np.testing.assert_allclose(one, whole[some.offsets[i] : some.offsets[i + 1]], atol=1e-5)


@pytest.mark.parametrize(
    "key", "neumf dcn deepfm widedeep mmoe ple crossattention macr pda relmf".split()
)
def test_nothing_is_worth_a_score(key):
    "And not a count of people, which these models give a stranger who is like nobody"
    model, (some, asked) = model_class(key)(epochs=1).fit(tiny(), items=tiny_items()), people()
    size = np.abs(target_scores(model, some, asked)).max()
    assert np.abs(base_scores(model, some, asked)).max() < 1 + 2 * size


@pytest.mark.parametrize(("model", "method"), [p for p in PAIRS if p[1] not in BATCHED])
def test_many_explanations_are_the_single_ones(model, method):
    fit, users, films = fitted(model), ["u03", "u00", "u07", "u03"], ["f01", "f05", "f02", "f02"]
    options = QUICK.get(method, {})
    many = explain_many(fit, users, films, method=method, **options)
    for got, user, film in zip(many, users, films, strict=True):
        one = explain(fit, user, film, method=method, **options)
        for name in ("user", "item", "title", "method", "model", "additive", "signed", "warning"):
            assert getattr(got, name) == getattr(one, name)
        assert list(got.parts) == list(one.parts)
        for column in ("kind", "name", "title"):
            assert got.parts[column].tolist() == one.parts[column].tolist()
        if "error" in one.parts:
            np.testing.assert_allclose(got.parts.error, one.parts.error, atol=2e-5)
        np.testing.assert_allclose(got.parts.contribution, one.parts.contribution, atol=2e-5)
        np.testing.assert_allclose([got.score, got.base], [one.score, one.base], atol=2e-5)


@pytest.mark.parametrize(("model", "method"), [p for p in PAIRS if p[0] in ("ease", "multvae")])
def test_nobody_gets_no_explanation(model, method):
    fit, options = fitted(model), QUICK.get(method, {})
    assert explain_many(fit, [], method=method, **options) == []
    assert explain_many(fit, history=[], method=method, **options) == []
    assert len(explain_many(fit, history=[[]], items=["f01"], method=method, **options)[0]) == 0


def test_many_explanations_cost_a_tenth():
    data = load_dataset("ml100k")
    fit = EASE().fit(data, items=load_items("ml100k"))
    users = data.user_ids.tolist()
    films = fit.recommend(users, k=1).item_id.tolist()

    def seconds(work) -> float:
        start = time.process_time()  # What other programs do meanwhile does not count
        work()
        return time.process_time() - start

    one = lambda: [explain(fit, u, f) for u, f in zip(users[:50], films[:50], strict=True)]
    alone = min(seconds(one) for _ in range(3)) / 50
    batch = min(seconds(lambda: explain_many(fit, users, films)) for _ in range(3)) / len(users)
    assert alone / batch > 10


def test_what_is_heavy_is_loaded_when_used():
    code = "import sys, recsys_lab.explain.explain; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert not {"captum", "shap", "matplotlib", "plotly"} & set(loaded.stdout.split())
    assert "recsys_lab.explain.explain" in loaded.stdout


@pytest.mark.parametrize("model", ["ease", "itemknn"])
def test_exact_is_the_product(model):
    "Against a product in double precision that shares no code with it"
    some, asked = people()
    table = fitted(model).B
    table = (table.toarray() if hasattr(table, "toarray") else table).astype(np.float64)
    product = (some.csr(len(table)).toarray().astype(np.float64) @ table)[
        np.arange(len(some)), asked
    ]
    told = attribute(fitted(model), some, asked, "exact")
    np.testing.assert_allclose(history_sums(told.values, some), product, atol=1e-9)


@pytest.mark.parametrize("model", list(MODELS))
def test_leaving_out_is_rescoring(model):
    "`loo` against one call of the model for each removal"
    some, asked = people(4)
    told = attribute(fitted(model), some, asked, "loo").values
    one = fitted(model)
    for place, row in enumerate(owner(some)):
        here = slice(*some.offsets[row : row + 2])
        both = [(x, np.delete(x, place - here.start)) for x in (some.items[here], some.times[here])]
        whole, left = one._score_histories(Histories.from_lists(*both))[:, asked[row]]
        assert told[place] == pytest.approx(whole - left, abs=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 39), max_size=9), min_size=1, max_size=5), st.data())
def test_any_history_adds_up(lists, data):
    "Empty, single and repeated items"
    some = Histories.from_lists(lists)
    asked = np.array([data.draw(st.integers(0, 39)) for _ in lists])
    for key in ("ease", "ials", "puresvd"):
        told = attribute(fitted(key), some, asked, "exact")
        np.testing.assert_allclose(history_sums(told.values, some), told.score, atol=1e-5)
    everything = keep(some, np.ones(len(some.items), bool))
    score = target_scores(fitted("multvae"), some, asked)
    np.testing.assert_array_equal(target_scores(fitted("multvae"), everything, asked), score)


@settings(max_examples=50, deadline=None)
@given(st.text(), st.text(), st.floats(-1e6, 1e6), st.integers(0, 2**40))
def test_any_explanation_survives_json(title, warning, score, item):
    why = explain(fitted("ease"), "u00")
    odd = Explanation(
        item, score, why.parts.assign(title=title), "exact", title=title, warning=warning
    )
    again = Explanation.from_json(odd.to_json())
    assert again.to_json() == odd.to_json()
    assert (again.item, again.score, again.title) == (item, score, title)
    assert "<script" not in odd._repr_html_().lower()
