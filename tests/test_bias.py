"The report of biases and the debiased pipeline: what they refuse, and what changes nothing"

import numpy as np
import pandas as pd
import pytest

from recsys_lab.causal.bias_report import bias_report, item_totals
from recsys_lab.causal.pipeline import DebiasedPipeline, shown_chance
from recsys_lab.data.click_world import ClickWorld
from recsys_lab.data.ingest import from_frame
from recsys_lab.data.tiny import tiny
from recsys_lab.ranking.mmr import mmr


def log(**change) -> pd.DataFrame:
    world = ClickWorld(n_users=40, n_items=12, length=4, seed=0)
    return world.log(400, shuffle=0.5).assign(**change)


@pytest.mark.parametrize(
    ("change", "given", "says"),
    [
        ({}, {"click": "klick"}, "did you mean 'click'"),
        ({"click": 2}, {"click": "click"}, "1600 of 1600 rows are neither 0 nor 1"),
        ({"propensity": 0.0}, {"click": "click"}, r"outside \(0, 1\]"),
        ({"propensity": 1.5}, {"click": "click"}, r"outside \(0, 1\]"),
        ({"propensity": np.nan}, {"click": "click"}, r"outside \(0, 1\]"),
        ({}, {"click": "click", "satisfied": "liked"}, "no column 'liked'"),
    ],
)
def test_bad_input_is_named(change, given, says):
    with pytest.raises(ValueError, match=says):
        bias_report(from_frame(log(**change)), **given)


def test_what_cannot_be_measured_is_said():
    report = bias_report(tiny(), resamples=20)
    lacking = report[report.value.isna()]
    assert set(lacking.bias) == {"position", "clickbait"}
    assert lacking.measure.str.startswith("needs").all() and not lacking.present.any()
    assert "not measured" in report._repr_html_()


def test_totals_are_counts_and_resamples_belong_together():
    data = tiny()
    one, twice = item_totals(data, resamples=5), item_totals(data, 2 * np.ones(len(data)), 5)
    assert (one[0] == data.item_counts()).all() and (twice == 2 * one).all()


def test_row_order_changes_no_bias():
    frame = log()
    a, b = (bias_report(from_frame(f), click="click", resamples=20)
            for f in (frame, frame.sample(frac=1, random_state=1)))  # fmt: skip
    known = a.value.notna()
    np.testing.assert_allclose(a.value[known], b.value[known], atol=1e-12)


def test_equal_looks_and_chances_leave_the_regression_alone():
    "With one place and the same chance for every row the corrections are no corrections"
    frame = log()
    frame = frame[frame.position == 1].assign(propensity=0.25)
    world = ClickWorld(n_users=40, n_items=12, length=4, seed=0)
    users, items = np.arange(40), np.arange(12)
    plain = DebiasedPipeline(False, False, None).fit(frame, world.features).score(users, items)
    both = DebiasedPipeline(True, False, None).fit(frame, world.features).score(users, items)
    np.testing.assert_allclose(plain, both, atol=1e-10)


def test_chances_are_counted_where_none_were_logged():
    rows = pd.DataFrame({"item_id": list("aab"), "position": 1, "click": 0})
    np.testing.assert_allclose(shown_chance(rows), [2 / 3, 2 / 3, 1 / 3])


def test_mmr_by_score_alone_keeps_the_order():
    rng = np.random.default_rng(0)
    candidates, scores = np.tile(np.arange(20), (7, 1)), -np.sort(-rng.random((7, 20)))
    assert (mmr(candidates, scores, rng.random((20, 3)), 5, 1.0) == np.arange(5)).all()


def test_mmr_without_scores_skips_empty_places():
    candidates, scores = np.array([[-1, 0, 1, 2]]), np.array([[9.0, 1.0, 0.9, 0.0]])
    vectors = np.array([[1.0, 0], [1, 0], [0, 1]])
    assert mmr(candidates, scores, vectors, 4, 0.0).tolist() == [[0, 2, 1, -1]]
