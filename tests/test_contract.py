"""Every model of `params.yaml` keeps the contract, with settings small enough for a test"""

import pytest

from recsys_lab.core.params import params
from recsys_lab.models.checker import check_recommender
from recsys_lab.models.registry import make_model

SASREC = {"dim": 16, "window": 16, "blocks": 1, "inner": 32, "dropout": 0.0, "lr": 0.01}
MULTVAE = {"dim": 8, "hidden": 32, "epochs": 40, "lr": 0.02, "anneal": 20}
NEUMF = {"dim": 8, "layers": [16, 8], "negatives": 1, "epochs": 40, "lr": 0.03, "batch_size": 256}
GRAPHSAGE = {"dim": 16, "fanouts": [8, 8], "columns": None, "epochs": 60, "lr": 0.02}
CLICKS = {"dim": 8, "layers": [16], "epochs": 30, "lr": 0.02, "batch_size": 256, "dropout": 0.0}
TOWER = {"dim": 16, "epochs": 20, "lr": 0.05, "batch_size": 256}
RATINGS = {"dim": 2, "lr": 0.05, "batch_size": 256, "epochs": 40, "reg": 0.1}
TASKS = CLICKS | {"tasks": ["taken", "popularity"]}  # The contract's data have no ratings
# Key -> small settings; a model added to params.yaml needs a line here
SMALL = {
    "popularity": {},
    "popularity-7d": {},
    "popularity-decay": {},
    "itemknn": {},
    "userknn": {},
    "content": {},
    "content-bm25": {},
    "ease": {},
    "slim": {"l2": 1.0},
    "puresvd": {"factors": 2},
    "ials": {"factors": 4, "epochs": 8},
    "bprmf": {"dim": 8, "epochs": 60, "lr": 0.05},
    "lightgcn": {"dim": 8, "layers": 2, "epochs": 60, "lr": 0.05},
    "xsimgcl": {"dim": 8, "layers": 2, "epochs": 60, "lr": 0.05},
    "mf": {"dim": 8, "epochs": 60, "lr": 0.05},
    "mf-ccl": {"dim": 8, "epochs": 60, "lr": 0.05, "weight": 5.0},
    "graphmf": {"dim": 8, "layers": 1, "epochs": 60, "lr": 0.05},
    "xsimgcl-sgl": {"dim": 8, "layers": 2, "epochs": 60, "lr": 0.05},
    "gcn": {"dim": 8, "layers": 2, "epochs": 60, "lr": 0.05},
    "graphlightgcn": {"dim": 8, "layers": 2, "epochs": 60, "lr": 0.05},
    "graphsage": GRAPHSAGE,
    "gfcf": {"factors": 2},
    "gfcf-bspm": {"factors": 2},
    "hybrid": {"models": [{"model": "ease", "lam": 1.0}, {"model": "ials", "factors": 4}]},
    "multvae": MULTVAE,
    "multvae-dae": MULTVAE,
    "neumf": NEUMF,
    "neumf-gmf": NEUMF,
    "neumf-mlp": NEUMF,
    "svd": {"dim": 4, "ridge": 1.0},
    **dict.fromkeys(("ipsmf", "ipsmf-none", "ipsmf-snips", "ipsmf-missing"), RATINGS),
    **dict.fromkeys(("ipsmf-counts", "ipsmf-lowrank", "ipsmf-known"), RATINGS),
    **dict.fromkeys(("drmf", "drmf-dr", "drmf-mrdr", "drmf-eib"), RATINGS),
    "widedeep": CLICKS,
    "dcn": CLICKS,
    "deepfm": CLICKS,
    "boosted": {"trees": 20},
    "twotower": TOWER,
    "crossattention": {"tower": TOWER, "candidates": 5, "dim": 8, "epochs": 3},
    "mmoe": TASKS,
    "mmoe-shared": TASKS,
    "ple": TASKS,
    "sasrec": SASREC | {"epochs": 25},
    "sasrec-sampled": SASREC | {"negatives": 64, "epochs": 50},
    "macr": {"dim": 8, "epochs": 40, "lr": 0.05},
    "dice": {"dim": 4, "epochs": 40, "lr": 0.05},
    "cause": {"dim": 8, "epochs": 60, "lr": 0.05, "distance": 0.1},
    "cause-marked": {
        "dim": 8,
        "epochs": 60,
        "lr": 0.05,
        "treatment": None,
        "use": "treatment",
        "share": 0.5,
    },
    "bprmf-popular": {"dim": 8, "epochs": 60, "lr": 0.05},
    "ipsbpr": {"dim": 8, "epochs": 60, "lr": 0.05},
    "ipsbpr-user": {"dim": 8, "epochs": 60, "lr": 0.05},
    "ipsbpr-mse": {"dim": 8, "epochs": 60, "lr": 0.05},
    "relmf": {"dim": 8, "epochs": 60, "lr": 0.05},
    "pda": {"dim": 8, "epochs": 60, "lr": 0.05},
    "pda-wanted": {"dim": 8, "epochs": 60, "lr": 0.05},
    "posthoc": {"model": {"model": "ease", "lam": 1.0}},
    "posthoc-calibrated": {"model": {"model": "ease", "lam": 1.0}},
    "posthoc-ease": {"model": {"model": "ease", "lam": 1.0}},
    "posthoc-mf": {"model": {"model": "mf", "dim": 8, "epochs": 60, "lr": 0.05}},
}


@pytest.mark.parametrize("key", params().model)
def test_contract(key):
    assert key in SMALL, f"model {key!r} of params.yaml needs small settings in SMALL"
    skip = ("hidden_item",) if key.startswith("popularity") else ()
    check_recommender(lambda: make_model(key, **SMALL[key]), skip=skip)


def test_no_line_is_left_over():
    assert set(SMALL) == set(params().model)
