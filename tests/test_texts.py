"Texts of items: vectors, a cache, items that training never had, titles that exist"

import json
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import BertProcessing

from recsys_lab.data.encoder import TextModel, model_folder
from recsys_lab.data.ingest import from_frame
from recsys_lab.data.interactions import Histories, Interactions
from recsys_lab.data.loaders import load_items
from recsys_lab.data.texts import Folder, item_texts, kept, learn_words
from recsys_lab.data.tiny import tiny, tiny_items
from recsys_lab.explain.gates import gated_scores
from recsys_lab.models.base import Recommender
from recsys_lab.models.checker import group_items, two_groups
from recsys_lab.models.text2text import Speaker, Text2Text, beam_search
from recsys_lab.models.textrec import TextRec
from recsys_lab.models.titles import START, build_trie, title_pieces, title_rows

SMALL = {"dim": 16, "window": 16, "blocks": 1, "inner": 32, "dropout": 0.0, "lr": 0.01}
WORDS = SMALL | {"encoder": "words", "epochs": 20}
TITLES = SMALL | {"lr": 0.005, "epochs": 3, "targets": 64}
TOY = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40}
TOY |= {"intermediate_size": 16, "max_position_embeddings": 16, "type_vocab_size": 2}
TOY |= {"layer_norm_eps": 1e-12, "hidden_act": "gelu", "model_type": "bert"}


def toy_folder(folder, seed=0):
    "A text model with drawn weights, as such models are published"
    folder.mkdir()
    words = {w for t in tiny_items().title for w in t.lower().split()}
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted(words)]
    cut = Tokenizer(WordPiece({w: i for i, w in enumerate(names)}, unk_token="[UNK]"))
    cut.normalizer, cut.pre_tokenizer = BertNormalizer(), BertPreTokenizer()
    cut.post_processor = BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    cut.save(str(folder / "tokenizer.json"))
    rng, w, d, p = torch.Generator().manual_seed(seed), {}, 8, "encoder.layer.0."
    for name, n in {"word": 40, "position": 16, "token_type": 2}.items():
        w[f"embeddings.{name}_embeddings.weight"] = torch.randn(n, d, generator=rng)
    sizes = {f"attention.self.{n}": (d, d) for n in ("query", "key", "value")}
    sizes |= {"attention.output.dense": (d, d), "intermediate.dense": (16, d)}
    for name, size in (sizes | {"output.dense": (d, 16)}).items():
        w[f"{p}{name}.weight"] = torch.randn(*size, generator=rng) / 2
        w[f"{p}{name}.bias"] = torch.zeros(size[0])
    for name in ("embeddings", f"{p}attention.output", f"{p}output"):
        w[f"{name}.LayerNorm.weight"], w[f"{name}.LayerNorm.bias"] = torch.ones(d), torch.zeros(d)
    save_file(w, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(TOY))
    return folder


def told(items: list[str]):
    "Rows and films of `tiny` without some of the films, and those"
    frame, films = tiny().to_frame(), tiny_items()
    new = films.item_id.isin(items)
    return from_frame(frame[~frame.item_id.isin(items)]), films[~new], films[new]


def test_the_encoder_gives_the_published_models_numbers():
    "First numbers of transformers 5.23 with mean pooling, for texts of ordinary and foreign letters"
    folder = model_folder()
    if folder is None:
        pytest.skip("no text model: recsys-lab fetch minilm")
    model = TextModel(folder)
    if not model.name.startswith("953f9c0d463486b1-53aa51172d142c89-be50c3628f2bf5bb"):
        pytest.skip("the text model is not the all-MiniLM-L6-v2 of the registry")
    asked = ["Toy Story. 1995. Animation, Children's, Comedy", "Les Misérables", ""]
    known = [
        [-0.069975, 0.030684, 0.036453, 0.007996, -0.008065, 0.027257],
        [-0.018768, -0.013403, 0.017307, -0.017958, 0.030522, 0.090287],
        [-0.118838, 0.048299, -0.002548, -0.011011, 0.051951, 0.010292],
    ]
    assert np.abs(model.vectors(asked)[:, :6] - known).max() < 2e-6


def test_vectors_have_length_one_or_zero():
    texts = [*item_texts(load_items("ml100k"), np.arange(1, 200)), "", "qqq"]
    size = np.linalg.norm(learn_words(texts[:-1], 32).vectors(texts), axis=1)
    assert np.allclose(size[:-2], 1, atol=1e-5) and (size[-2:] == 0).all()


def test_cached_vectors_with_a_flipped_byte_are_refused(tmp_path):
    made, texts = [], ["Up", "Heat"]

    def make(some):
        made.append(len(some))
        return np.arange(4, dtype=np.float32).reshape(2, 2)

    first = kept(texts, "m", make, tmp_path)
    assert np.array_equal(kept(texts, "m", make, tmp_path), first) and made == [2]
    file = next(tmp_path.glob("*/vectors.safetensors"))
    for at in (-1, 20):
        raw = bytearray(file.read_bytes())
        raw[at] ^= 4
        file.write_bytes(raw)
        with pytest.warns(UserWarning, match="refused and made again"):
            assert np.array_equal(kept(texts, "m", make, tmp_path), first)
    assert made == [2, 2, 2]
    (file.parent / "manifest.json").unlink()
    with pytest.warns(UserWarning, match="no manifest"):
        kept(texts, "m", make, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept(texts, "m", make, tmp_path)
        kept(["Up", "Heat "], "m", make, tmp_path)
        kept(texts, "other", make, tmp_path)
    assert made == [2] * 6


def test_an_item_that_training_never_had_is_recommended():
    "Two tastes: of two new films everybody is shown the one of their own genre first"
    data, _ = two_groups()
    new = pd.DataFrame({"item_id": ["x", "y"], "title": ["film", "film"], "genres": [["A"], ["B"]]})
    given = WORDS | {"temperature": 0.2, "text_dim": 8}
    model = TextRec(**given).fit(data, items=group_items()).with_items(new)
    first = model.recommend(k=1, candidates=["x", "y"])
    assert first.item_id.tolist() == ["x"] * 12 + ["y"] * 12
    assert {"x", "y"} <= set(model.recommend(k=8).item_id)
    assert np.isfinite(model.score(histories=Histories.from_lists([[24], []]))).all()


def test_a_text_that_nobody_took_changes_no_other_score():
    "An item of the catalogue without a row takes no part in training, whatever its text is"
    data, films = tiny(), tiny_items()
    train, code = data.where(data.item != 7), 7
    other = films.assign(title=np.where(films.item_id == "f07", "Electric Orbit", films.title))
    a, b = (TextRec(**WORDS | {"epochs": 3}).fit(train, items=t).score() for t in (films, other))
    rest = np.arange(40) != code
    assert np.array_equal(a[:, rest], b[:, rest]) and not np.array_equal(a[:, code], b[:, code])


@pytest.mark.parametrize("ids", [False, True])
def test_further_items_change_no_known_score(ids):
    train, old, new = told(["f04", "f11"])
    model = TextRec(**WORDS | {"epochs": 2}, ids=ids).fit(train, items=old)
    more = model.with_items(new[:1]).with_items(new[1:])
    assert np.array_equal(more.score()[:, : model.n_items], model.score())
    assert np.array_equal(more.score(), model.with_items(new).score())
    with pytest.raises(ValueError, match="1 are known"):
        more.with_items(new[:1])


def test_a_server_needs_no_text_model(tmp_path, monkeypatch):
    "A saved model answers without the folder; only further texts ask for it, and for the same one"
    train, old, new = told(["f04"])
    monkeypatch.setenv("RECSYS_LAB_ROOT", str(tmp_path))
    monkeypatch.setenv("RECSYS_LAB_TEXT_MODEL", str(toy_folder(tmp_path / "one")))
    model = TextRec(**SMALL, encoder="model", epochs=2).fit(train, items=old)
    assert isinstance(model.reader, Folder) and list(tmp_path.glob("artifacts/_texts/*"))
    model.save(tmp_path / "saved")
    later = model.with_items(new).score()
    assert np.array_equal(Recommender.load(tmp_path / "saved").with_items(new).score(), later)
    monkeypatch.setenv("RECSYS_LAB_TEXT_MODEL", str(toy_folder(tmp_path / "two", seed=1)))
    again = Recommender.load(tmp_path / "saved")
    assert np.array_equal(again.score(), model.score())
    with pytest.raises(ValueError, match="the folder holds"):
        again.with_items(new)
    monkeypatch.delenv("RECSYS_LAB_TEXT_MODEL")
    with pytest.raises(FileNotFoundError, match="recsys-lab fetch minilm"):
        Recommender.load(tmp_path / "saved").with_items(new)


def test_reasons_are_reasons_for_the_score():
    "With all gates open the gated score of an item is its score, a cosine over the temperature"
    model = TextRec(**WORDS | {"epochs": 2}).fit(tiny(), items=tiny_items())
    some = tiny().histories(np.arange(8)).last(model.window)
    targets = np.arange(8) * 5
    open_ = gated_scores(model, some, targets, np.ones(len(some.items)))
    assert np.allclose(open_, model.score(histories=some)[np.arange(8), targets], atol=1e-4)


def drawn_speaker(rows, seed):
    torch.manual_seed(seed)
    net = Speaker(
        torch.from_numpy(rows), int(rows.max()) + 1, 8, 4, 1, heads=2, inner=16, dropout=0.1
    )
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.5) if p.dim() == 2 else None
    return net.eval().requires_grad_(False)


def looked(net, items, size):
    read, real = net.read(torch.tensor(items), torch.tensor(size))
    seen = net.shown(real, torch.tensor(size).unsqueeze(1))
    return read, seen, net.ago.weight[-1].expand(len(size), 1, -1)


CATALOGUE = ["Alien", "Aliens", "Alien 3", "The Abyss", "The Thing", "The Thing", "", "Heat"]
CATALOGUE += ["The", "Heat and Dust", "heat", "Héat"]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("width", [1, 3, 12, 50])
def test_the_tree_gives_no_title_outside_the_catalogue(seed, width):
    "Titles that begin others, that are the same, that are empty; networks that want anything"
    rows = title_rows(title_pieces(CATALOGUE, 60), 6)
    tree, net = build_trie(rows), drawn_speaker(rows, seed)
    item, score = beam_search(net, tree, *looked(net, [[0, 3, 5], [6, 1, 1]], [3, 2]), width)
    for found, chance in zip(item, score, strict=True):
        real = found[found >= 0].tolist()
        assert len(real) == len(set(real)) == min(width, len(CATALOGUE))
        assert set(real) <= set(range(len(CATALOGUE)))
        assert (chance[found >= 0].diff() <= 1e-6).all()
        assert chance.exp().sum() <= 1 + 1e-5


def test_a_wide_beam_is_the_exact_answer():
    "Each title's chance, spelled with the right pieces and the ways on counted from the rows alone"
    rows = title_rows(title_pieces(CATALOGUE, 60), 6)
    net = drawn_speaker(rows, 3)
    read, seen, since = looked(net, [[0, 3, 5]], [3])
    item, score = beam_search(net, build_trie(rows), read, seen, since, 50)
    for i, chance in zip(item[0].tolist(), score[0].tolist(), strict=True):
        if i < 0:
            continue
        said = torch.tensor([[[START, *rows[i][:-1]]]])
        logits = net.say(said, read, seen, since)[0, 0] @ net.word.weight.T
        exact = 0.0
        for t in range(int((rows[i] > 0).sum())):
            ways = np.unique(rows[(rows[:, :t] == rows[i, :t]).all(1), t])
            exact += (logits[t, rows[i, t]] - logits[t, ways].logsumexp(0)).item()
        assert abs(exact - chance) < 1e-4


def test_what_the_beam_does_not_find_stands_behind_by_popularity():
    data = tiny()
    model = Text2Text(**TITLES, width=5).fit(data, items=tiny_items())
    scores = model.score(users=np.arange(6))
    order = np.argsort(-scores, axis=1, kind="stable")
    popular = np.argsort(-data.item_counts(), kind="stable")
    found = model._found(data.histories(np.arange(6)))[0].numpy()
    for row, first in zip(order, found, strict=True):
        assert row[:5].tolist() == first.tolist()
        assert row[5:].tolist() == [i for i in popular if i not in first]


def test_titles_are_all_that_is_said():
    "With equal titles in another order of the catalogue the same films are answered"
    data, films = tiny(), tiny_items()
    mixed = films.sample(frac=1, random_state=0)
    a, b = (Text2Text(**TITLES).fit(data, items=t).score() for t in (films, mixed))
    assert np.array_equal(a, b)
    other = Text2Text(**TITLES).fit(data, items=films.assign(title=films.title[::-1].tolist()))
    assert not np.array_equal(a, other.score())


def test_texts_of_another_kind_of_id_are_refused():
    rows = pd.DataFrame({"user_id": [0, 0, 1, 1], "item_id": [1, 2, 1, 3], "timestamp": range(4)})
    table = pd.DataFrame({"item_id": [1, 2, 3], "title": ["Up", "Heat", "Alien"]})
    model = TextRec(**WORDS | {"epochs": 1}).fit(Interactions.from_frame(rows), items=table)
    assert model.with_items(pd.DataFrame({"item_id": [9], "title": ["Aliens"]})).n_items == 4
    with pytest.raises(ValueError):
        model.with_items(pd.DataFrame({"item_id": ["nine"], "title": ["Aliens"]}))
