"Parameters are checked, and the small set has the shape of the real one"

import re
from pathlib import Path

import pytest

from recsys_lab.core.params import (
    Params,
    ParamsError,
    check_params,
    did_you_mean,
    params,
    read_params,
)
from recsys_lab.models.registry import make_model
from recsys_lab.reporting.studies import check_given

ROOT = Path(__file__).resolve().parents[1]
REAL, SMALL = (read_params(ROOT / f) for f in ("params.yaml", "params.ci.yaml"))


@pytest.mark.parametrize("raw", [REAL, SMALL], ids=["params.yaml", "params.ci.yaml"])
def test_valid(raw):
    p = check_params(raw)
    assert set(p.run) <= set(p.protocol)
    for name, models in p.run.items():
        assert set(models) <= set(p.model), f"run.{name} names a model without a section"
        assert all(module == key.partition("-")[0] for key, module in models.items())
        assert p.protocol[name].dataset in p.embedded, f"run.{name} needs data that is not fetched"
        lacking = set(models) - set(p.tuned.get(name, {}))
        assert not lacking, (
            f"tuned.{name} has no section for {lacking}; DVC needs one, {{}} will do"
        )


def test_the_small_set_has_the_same_shape():
    assert set(SMALL) == set(REAL)
    for section in ("protocol", "run", "benchmark", "model"):
        assert set(SMALL[section]) == set(REAL[section]), section
    for name, models in SMALL["benchmark"].items():
        assert set(models) <= set(REAL["benchmark"][name]), f"benchmark.{name}"
    for name, protocol in SMALL["protocol"].items():
        assert protocol["dataset"] == REAL["protocol"][name]["dataset"]
        assert protocol["split"] == REAL["protocol"][name]["split"]
    for name, models in SMALL["run"].items():
        assert set(models) <= set(REAL["run"][name]), f"run.{name}"


def test_keys_can_be_joined():
    "DVC joins keys with a hyphen and a file name is made of them"
    for key in [*REAL["protocol"], *REAL["model"]]:
        assert re.fullmatch(r"[a-z][a-z0-9_]*(-[a-z0-9_]+)*", key), key


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("sede",), 1, "did you mean 'seed'"),
        (("evaluate", "bootstap"), 1, "did you mean 'bootstrap'"),
        (("protocol", "ml100k-time", "min_ratng"), 1, "did you mean 'min_rating'"),
        (("protocol", "ml100k-time", "split"), "tiem", "protocol.ml100k-time.split"),
        (("protocol", "ml100k-time", "test"), 1.5, "less than 1"),
        (("evaluate", "block"), 0, "greater than or equal to 1"),
        (("seed",), "zero", "seed"),
    ],
    ids=lambda v: ".".join(v) if isinstance(v, tuple) else None,
)
def test_refused(path, value, says):
    raw = read_params(ROOT / "params.yaml")
    at = raw
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    with pytest.raises(ParamsError, match=re.escape(says)):
        check_params(raw)


def test_every_section_is_described_by_the_schema():
    assert set(REAL) <= set(Params.model_fields)
    assert params("seed", ROOT / "params.yaml") == REAL["seed"]


@pytest.mark.parametrize("raw", [REAL, SMALL], ids=["params.yaml", "params.ci.yaml"])
def test_models_take_their_parameters(raw):
    "Each model can be made from its section, and refuses an argument it does not have"
    for key, section in raw["model"].items():
        make_model(key, **section)
        with pytest.raises(ParamsError, match=f"model.{key}"):
            make_model(key, no_such_argument=1)


@pytest.mark.parametrize("raw", [REAL, SMALL], ids=["params.yaml", "params.ci.yaml"])
def test_studies_declare_what_they_are_given(raw):
    "A section of `study:` is a study's name, and what tells runs apart; its keys are parameters there"
    notebooks = {p.stem.partition("_")[2]: p for p in (ROOT / "nbs/studies").glob("[0-9]*.ipynb")}
    assert notebooks
    for name, given in raw.get("study", {}).items():
        studies = [n for n in notebooks if name == n or name.startswith(f"{n}_")]
        assert studies, f"study.{name}: {did_you_mean(name, notebooks)}"
        study = notebooks[max(studies, key=len)]
        assert check_given(study, given).keys() >= given.keys()
