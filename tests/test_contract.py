"""Every model keeps the contract: a model's own notebook checks it, a variant of `params.yaml` is checked here

Both with settings small enough for a test; what the notebooks check is not checked a second time."""

import re
from importlib import import_module
from pathlib import Path

import pytest

from recsys_lab.core.params import params
from recsys_lab.models.checker import check_recommender
from recsys_lab.models.registry import make_model, model_class

ROOT = Path(__file__).resolve().parents[1]
NEUMF = {"dim": 8, "layers": [16, 8], "negatives": 1, "epochs": 16, "lr": 0.03, "batch_size": 256}
CLICKS = {"dim": 8, "layers": [16], "epochs": 30, "lr": 0.02, "batch_size": 256, "dropout": 0.0}
RATINGS = {"dim": 2, "lr": 0.05, "batch_size": 256, "epochs": 40, "reg": 0.1}
SASREC = {"dim": 16, "window": 16, "blocks": 1, "inner": 32, "dropout": 0.0, "lr": 0.01}
# Key -> small settings; a variant added to params.yaml needs a line here
SMALL = {
    "popularity-7d": {},
    "popularity-decay": {},
    "content-bm25": {},
    "mf-ccl": {"dim": 8, "epochs": 30, "lr": 0.05, "weight": 5.0},
    "xsimgcl-sgl": {"dim": 8, "layers": 2, "epochs": 20, "lr": 0.05},
    "gfcf-bspm": {"factors": 2},
    "multvae-dae": {"dim": 8, "hidden": 32, "epochs": 16, "lr": 0.02},
    "neumf-gmf": NEUMF,
    "neumf-mlp": NEUMF,
    **dict.fromkeys(("ipsmf-none", "ipsmf-snips", "ipsmf-missing"), RATINGS),
    **dict.fromkeys(("ipsmf-counts", "ipsmf-lowrank", "ipsmf-known"), RATINGS),
    **dict.fromkeys(("drmf-dr", "drmf-mrdr", "drmf-eib"), RATINGS),
    "mmoe-shared": CLICKS
    | {"tasks": ["taken", "popularity"]},  # The contract's data have no ratings
    "gru4rec-lstm": {"dim": 16, "hidden": 32, "dropout": 0.0, "lr": 0.01, "epochs": 40},
    "bert4rec-teacher": SASREC | {"heads": 2, "epochs": 80},
    "textrec-words": SASREC | {"temperature": 0.2, "epochs": 60},
    "textrec-ids": SASREC | {"encoder": "words", "temperature": None, "epochs": 40},
    "sasrec-sampled": SASREC | {"negatives": 64, "epochs": 50},
    "cause-marked": {
        "dim": 8,
        "epochs": 60,
        "lr": 0.05,
        "treatment": None,
        "use": "treatment",
        "share": 0.5,
    },
    "bprmf-popular": {"dim": 8, "epochs": 30, "lr": 0.05},
    "ipsbpr-user": {"dim": 8, "epochs": 30, "lr": 0.05},
    "ipsbpr-mse": {"dim": 8, "epochs": 30, "lr": 0.05},
    "pda-wanted": {"dim": 8, "epochs": 30, "lr": 0.05},
    "posthoc-calibrated": {"model": {"model": "ease", "lam": 1.0}},
    "posthoc-ease": {"model": {"model": "ease", "lam": 1.0}},
    "posthoc-mf": {"model": {"model": "mf", "dim": 8, "epochs": 60, "lr": 0.05}},
}
VARIANTS = [key for key in params().model if "-" in key]


@pytest.mark.parametrize("key", VARIANTS)
def test_contract(key):
    assert key in SMALL, f"variant {key!r} of params.yaml needs small settings in SMALL"
    skip = ("hidden_item",) if key.startswith("popularity") else ()
    check_recommender(lambda: make_model(key, **SMALL[key]), skip=skip)


@pytest.mark.parametrize("key", sorted({key.partition("-")[0] for key in params().model}))
def test_notebook_checks_its_model(key):
    "The notebooks run in `test_notebooks`; here, that the model's own calls the checker on its class"
    kind = model_class(key)
    module = Path(import_module(kind.__module__).__file__).read_text()
    notebook = ROOT / re.search(r"File to edit: \.\./\.\./(\S+)\.$", module, re.M)[1]
    calls = re.findall(r"check_recommender\((.*)", notebook.read_text())
    assert any(kind.__name__ in call for call in calls), (
        f"{notebook} has no check_recommender({kind.__name__})"
    )


def test_no_line_is_left_over():
    assert set(SMALL) == set(VARIANTS)
