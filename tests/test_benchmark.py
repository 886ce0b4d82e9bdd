"The committed benchmark: every published number that was to be reached is, by rows that say where they come from"

import pytest

from recsys_lab.core.params import params
from recsys_lab.reporting import records, tables

ROWS = records.read()
FOUND = tables.compare(ROWS)


@pytest.mark.parametrize(
    "row",
    FOUND[FOUND.target.notna()].to_dict("records"),
    ids=lambda r: f"{r['protocol']}-{r['model']}-{r['metric']}",
)
def test_target_is_met(row):
    assert row["verdict"] == "met", row
    assert row["low"] <= row["value"] <= row["high"], "an interval stands beside the mean"


def test_rows_say_where_they_come_from():
    assert ROWS[["hardware", "commit", "seed"]].notna().all().all()


def test_a_training_says_how_long_it_took():
    trained = ROWS[ROWS.params_sha256.notna()]
    silent = trained[~(trained.seconds > 0) | trained.peak_mb.isna()]
    assert silent.empty, sorted(set(zip(silent.protocol, silent.model, strict=True)))


def test_a_leaderboard_holds_its_models_only():
    "A study's row under a leaderboard's name would be read as that model's number"
    boards = {p: set(params("run").get(p, {})) for p in params("run")}
    for protocol, models in params("benchmark").items():
        boards[protocol] = boards.get(protocol, set()) | set(models)
    key = ROWS.model + ("-" + ROWS.variant.astype(object)).where(ROWS.variant.notna(), "")
    strange = [
        (p, k)
        for p, k in zip(ROWS.protocol, key, strict=True)
        if p in boards and k not in boards[p]
    ]
    assert not strange, sorted(set(strange))


def test_a_worse_number_is_missed():
    worse = ROWS.assign(value=ROWS.value / 2)
    judged = tables.compare(worse).dropna(subset="target")
    assert len(judged) == FOUND.target.notna().sum() > 20
    assert (judged.verdict == "missed").all()
