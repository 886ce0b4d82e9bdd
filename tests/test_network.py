"An exported network says what its model says, whatever it is asked"

import numpy as np
import pytest

from recsys_lab.data.interactions import Histories
from recsys_lab.data.tiny import tiny, tiny_items
from recsys_lab.models.bert4rec import BERT4Rec
from recsys_lab.models.gru4rec import GRU4Rec
from recsys_lab.models.hstu import HSTU
from recsys_lab.models.lrurec import LRURec
from recsys_lab.models.multvae import MultVAE
from recsys_lab.models.sasrec import SASRec
from recsys_lab.models.textrec import TextRec
from recsys_lab.serving.network import OnnxNetwork
from recsys_lab.serving.onnx_export import export_all, parity
from recsys_lab.serving.quality import Served

SMALL = {"epochs": 1, "seed": 0}
MODELS = {
    "sasrec": lambda: SASRec(dim=16, window=9, positions="rotary", **SMALL),
    "gru4rec": lambda: GRU4Rec(dim=16, hidden=24, layers=2, cell="lstm", window=9, **SMALL),
    "lrurec": lambda: LRURec(dim=16, window=9, **SMALL),
    "hstu": lambda: HSTU(dim=16, window=9, times=False, normalise=True, **SMALL),
    "bert4rec": lambda: BERT4Rec(dim=16, window=9, bias=True, **SMALL),
    "textrec": lambda: TextRec("words", ids=True, dim=16, window=9, **SMALL),
    "multvae": lambda: MultVAE(dim=8, hidden=16, **SMALL),
}


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tmp_path_factory):
    model = MODELS[request.param]().fit(tiny(), items=tiny_items())
    return model, export_all(model, tmp_path_factory.mktemp(request.param))


def asked(n_items, n=150):
    "Histories of every length from 0 to 14: shorter and longer than the window, with repeats"
    rng = np.random.default_rng(0)
    return [rng.integers(0, n_items, i % 15) for i in range(n)]


def test_scores_are_the_models_own(exported):
    model, files = exported
    network, people = OnnxNetwork(files["fp32"]), asked(model.n_items)
    assert parity(model, network, people[1:15]) < 1e-5
    packed = Histories.from_lists(people)
    own, other = model.score(histories=packed), Served(model, network).score(histories=packed)
    np.testing.assert_allclose(other, own, atol=1e-4 * np.abs(own[1:15]).max(), rtol=1e-4)


def test_alone_or_together(exported):
    network = OnnxNetwork(exported[1]["fp32"])
    people = asked(network.n_items, 40)
    together = network.queries(people)
    alone = np.concatenate([network.queries([h]) for h in people])
    np.testing.assert_allclose(together, alone, atol=1e-5 * np.abs(together).max())
    assert not together[[0, 15, 30]].any(), "an empty history gets zeros"


def test_smaller_files_stay_near(exported):
    model, files = exported
    people = [h for h in asked(model.n_items) if len(h)]
    for name, most in (("fp16", 5e-3), ("int8", 0.3)):
        network = OnnxNetwork(files[name])
        assert network.facts["precision"] == name and network.size > 0
        assert float(network.facts["parity"]) < most and parity(model, network, people) < most
