"""Predicates and syntax of tokens on small Python sources; labels of latents that fire on known tokens."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bridge.evaluate import Site, labels, predicates, syntax
from bridge.evaluate import text as texts
from bridge.nanochat import tokenizer as tokenizers
from bridge.nanochat.corpus import Corpus
from bridge.torch_sae import TorchSAE

SOURCE = '''"""Doc."""
import os, sys  # why é
@deco(1)
class A(Base, metaclass=M):
    """Of A."""
    x: int = 3
    def f(self, a: str = "ü", *b) -> dict[str, int]:
        for i in range(3): y = self.g(a, key=f"v{i}")
        return [k for k in b if k > 2][0]
é = "ö"; z = lambda q: q
'''
# Every context, and the stretches of SOURCE that it covers, read by eye.
BY_EYE = {
    "in a docstring": ['"""Doc."""', '"""Of A."""'],
    "in a comment": ["# why é"],
    "in a string": ['"ü"', 'f"v{i}"', '"ö"'],
    "in an f-string": ['f"v{i}"'],
    "in a number": ["1", "3", "3", "2", "0"],
    "in a function signature": ['def f(self, a: str = "ü", *b) -> dict[str, int]'],
    "in a class header": ["class A(Base, metaclass=M)"],
    "in a decorator": ["@deco(1)"],
    "in an import": ["import os, sys  # why é"],
    "in a return statement": ["return [k for k in b if k > 2][0]"],
    "in a for or with header": ["for i in range(3)"],
    "in parentheses": ["1", "Base, metaclass=M", 'self, a: str = "ü", *b', "3", 'a, key=f"v{i}"'],
    "in square brackets": ["str, int", "k for k in b if k > 2", "0"],
    "name of a function that is defined": ["f"],
    "name of a class that is defined": ["A"],
    "attribute name": ["g"],
    "name that is called": ["deco", "range", "g"],
    "parameter name": ["self", "a", "b", "q"],
    "keyword argument name": ["metaclass", "key"],
    "annotation": ["int", "str", "dict[str, int]"],
    "target of an assignment": ["x", "y", "é", "z"],
    "in a subscript": ["str, int", "0"],
    "in a comprehension": ["[k for k in b if k > 2]"],
    "in a lambda": ["lambda q: q"],
    "in call arguments": ["1", "3", "a", 'key=f"v{i}"'],
    "in a comparison": ["k > 2"],
    "in a class body, outside of functions": ['"""Of A."""', "x: int = 3"],
    "at module level": ['"""Doc."""', "import os, sys", 'é = "ö"', "z = lambda q: q"],
}


def stretches(name: str, source: bytes) -> list[str]:
    """Return the parts of the source that a context covers."""
    bit = np.uint64(1 << syntax.CONTEXTS.index(name))
    inside = np.pad((syntax.contexts(source)[:-1] & bit) > 0, 1)
    bounds = np.flatnonzero(inside[1:] != inside[:-1]).reshape(-1, 2)
    return [source[start:end].decode() for start, end in bounds]


@pytest.mark.parametrize("name", BY_EYE)
def test_syntax_contexts_cover_the_right_source(name):
    assert stretches(name, SOURCE.encode()) == BY_EYE[name]


def test_syntax_knows_the_rest_of_the_statements():
    source = b"""async def g():
    if a and (b or [1]):
        raise E
    elif c: assert d
    try: pass
    except E as e:
        def h(): return 1
"""
    assert stretches("in a function signature", source) == ["def g()", "def h()"]
    assert stretches("in an if or while condition", source) == ["if a and (b or [1])", "elif c"]
    assert stretches("in a raise statement", source) == ["raise E"]
    assert stretches("in an except clause", source) == ["except E as e"]
    assert stretches("in nested brackets", source) == ["1"]
    nested = b"def f():\n    def g():\n        x = {1: 2}\n"
    assert stretches("in a nested function", nested) == ["x = {1: 2}"]
    assert stretches("in braces", nested) == ["1: 2"]


@pytest.mark.parametrize(
    "source",
    [b"print 'two'\n", b"a prose sentence.", b"x = '\xff'", b"\x00", b"(" * 3000, b"a = 1\rb = 2\n", b"x = 'open"],
    ids=["Python 2", "prose", "not UTF-8", "a null byte", "too deep", "old line ends", "an open string"],
)
def test_text_that_is_not_python_has_no_syntax(source):
    assert syntax.contexts(source) is None


def test_odd_escapes_and_windows_line_ends_are_python():
    assert stretches("in a string", rb"x = '\d'" + b"\n") == [r"'\d'"]
    assert stretches("in a comment", b"a = 1\r\n# b\r\n") == ["# b"]


# ---- text ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> tuple[str, tokenizers.Tokenizer]:
    """Return a dozen files of the standard library, and a tokenizer trained on them."""
    folder = tmp_path_factory.mktemp("text")
    for i, path in enumerate(sorted(Path(json.__file__).parent.glob("*.py"))):
        (folder / f"{i}.py").write_text(path.read_text(), newline="")
    for i in range(12):
        (folder / f"own{i}.py").write_text(SOURCE * 3 + f"\nself.value = {i}\n" * 20)
    tokenizer = tokenizers.train([path.read_text() for path in folder.iterdir()], 500)
    return f"{folder}/*.py", tokenizer


def read(corpus, row_len: int = 64, max_tokens: int = 20_000) -> texts.Text:
    spec, tokenizer = corpus
    return texts.read(texts.documents(spec, "all", tokenizer), tokenizer, row_len, max_tokens)


def test_rows_are_those_of_the_corpus(corpus):
    spec, tokenizer = corpus
    rows = np.stack(list(Corpus(spec, tokenizer, split="all", row_len=64).one_pass()))
    np.testing.assert_array_equal(read(corpus, max_tokens=10**9).tokens, rows)
    assert len(read(corpus, max_tokens=640).tokens) == 10


def test_every_token_knows_its_place(corpus):
    text, tokenizer = read(corpus), corpus[1]
    bos = text.tokens == tokenizer.bos_token_id
    assert (text.document[bos] == -1).all()
    assert (text.document[~bos] >= 0).all()
    for token, document, place in zip(text.tokens[~bos], text.document[~bos], text.place[~bos], strict=True):
        spelled = tokenizer.token_bytes_of(int(token))
        visible = spelled.lstrip() if spelled.strip() else spelled
        assert text.sources[document][place:].startswith(visible)


def test_text_that_fills_no_row_is_refused(corpus):
    with pytest.raises(ValueError, match="does not fill one row of 100000 tokens"):
        read(corpus, row_len=100_000)


def test_predicates_hold_where_they_should(corpus):
    text, tokenizer = read(corpus), corpus[1]
    found = predicates.build(text, tokenizer)
    assert len(found.names) == len(set(found.names)) > 150
    truth = dict(zip(found.names, found.truth.T, strict=True))
    for name, spelled in (("line break", "\n"), ("digits", "3"), ("Python keyword", "import"), ("comma", ",")):
        (token,) = tokenizer.encode(spelled)
        assert truth[name][text.tokens.reshape(-1) == token].all(), name
    place, document = text.place.reshape(-1), text.document.reshape(-1)
    for name, before in (("after 'self.'", b"self."), ("after 'import'", b"import ")):
        assert truth[name].any()
        for i in np.flatnonzero(truth[name])[:50]:
            assert text.sources[document[i]][: place[i]].endswith(before), name
    marks, known = text.syntax
    assert known[document >= 0].all()
    bit = np.uint64(1 << syntax.CONTEXTS.index("in a docstring"))
    np.testing.assert_array_equal(truth["in a docstring"], (marks & bit) > 0)


def test_chats_and_other_languages_have_predicates_without_syntax(tmp_path):
    chat = {"messages": [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "It is a word."}]}
    (tmp_path / "chats.jsonl").write_text((json.dumps(chat) + "\n") * 40)
    tokenizer = tokenizers.train(["What is it? It is a word."] * 3, 268)
    text = read((str(tmp_path / "chats.jsonl"), tokenizer), row_len=32)
    found = predicates.build(text, tokenizer)
    assert not set(syntax.CONTEXTS) & set(found.names)
    truth = dict(zip(found.names, found.truth.T, strict=True))
    spelled = [tokenizer.token_text(int(i)) for i in text.tokens.reshape(-1)]
    speaking = "".join(s for s, said in zip(spelled, truth["in a user's message"], strict=True) if said)
    assert "What is it?" in speaking
    assert "word" not in speaking
    assert "special token" in truth


# ---- labels -------------------------------------------------------------------------------------------------------


def firings(fires: list[np.ndarray]) -> labels.Firings:
    """Return firings of latents with the given activations of every token."""
    table = np.stack(fires, axis=1).astype(np.float32)
    token, latent = np.nonzero(table > 0)
    counts = np.ones(len(table), bool)
    return labels.Firings(latent, token, table[token, latent], counts, table.shape[1])


def test_latents_are_labelled_by_the_tokens_they_fire_on(corpus):
    text, tokenizer = read(corpus, max_tokens=60_000), corpus[1]
    found = predicates.build(text, tokenizer)
    truth = dict(zip(found.names, found.truth.T.astype(float), strict=True))
    ids = text.tokens.reshape(-1)
    (digit,) = tokenizer.encode("3")
    (equals,) = tokenizer.encode("=")
    rng = np.random.default_rng(0)
    noise = rng.random(len(ids))
    named = labels.search(
        firings(
            [
                (ids == digit) * 1.0,
                truth["in a comment"],
                np.roll(ids == equals, 1) * 1.0,
                truth["in a docstring"] + 0.1 * (noise < 0.5),  # weak everywhere, strong where it means something
                truth["name that is called"] * (noise < 0.5),
                np.zeros(len(ids)),
            ]
        ),
        labels.Material.of_text(text, tokenizer),
    )
    assert [label.label for label in named[:4]] == ["token '3'", "in a comment", "after '='", "in a docstring"]
    assert named[0].f1 == named[0].precision == named[0].recall == 1
    assert named[1].f1 == 1
    assert named[3].f1 == 1
    assert named[3].threshold > 0.1
    assert named[4].label == "name that is called"
    assert named[4].precision == 1
    assert named[4].recall == pytest.approx(0.5, abs=0.1)
    assert named[5] == labels.Label(None, None, None, None, 0, None)
    table = labels.table(named)
    assert table["0"] == {"label": "token '3'", "f1": 1.0, "precision": 1.0, "recall": 1.0, "n": named[0].n} | {
        "threshold": 0.0,
        "balanced_accuracy": 1.0,
    }
    json.dumps(table, allow_nan=False)
    assert labels.summary(named)["labelled"] == 5
    assert next(iter(labels.best(named, 1)))[1].f1 == 1


FIRST = {4: np.arange(8) < 4, 5: np.arange(10) < 5}


def test_one_half_chooses_and_the_other_gives_the_numbers():
    # Eight tokens: in the first half the latent fires with the predicate, in the second never where it holds.
    found = firings([np.array([1, 1, 1, 0, 1, 1, 1, 0])])
    holds = predicates.Predicates(["it"], np.array([1, 1, 1, 0, 0, 0, 0, 1], bool)[:, None])
    (label,) = labels.search(found, labels.Material(holds, {}, str, FIRST[4]))
    assert label == labels.Label("it", 0.0, 0.0, 0.0, 3, 0.0, 0.0)  # the one other token is named, too


def test_f1_is_as_worked_out_by_hand():
    # Second half: fires on tokens 5, 6, 7; the predicate holds on 6, 7, 8, 9.
    found = firings([np.array([1, 1, 0, 0, 0, 1, 1, 1, 0, 0])])
    holds = predicates.Predicates(["it"], np.array([1, 1, 0, 0, 0, 0, 1, 1, 1, 1], bool)[:, None])
    (label,) = labels.search(found, labels.Material(holds, {}, str, FIRST[5]))
    assert (label.precision, label.recall, label.n) == (2 / 3, 2 / 4, 3)
    assert label.f1 == pytest.approx(4 / 7)
    assert label.balanced_accuracy == pytest.approx((2 / 3 + 0 / 2) / 2)


def test_scores_of_detection_are_means_over_the_latents_that_fire_often():
    often = [labels.Label("a", 0.5, 1.0, 1 / 3, 10, 0.0, 0.9), labels.Label("b", 1.0, 1.0, 1.0, 99, 0.0, 1.0)]
    seldom = [labels.Label("c", 0.1, 0.1, 0.1, 9, 0.0, 0.5), labels.Label(None, None, None, None, 50, None)]
    found = labels.detection(often + seldom)
    assert found["latents"] == 2
    assert (found["f1"], found["balanced_accuracy"]) == (0.75, 0.95)
    assert (found["precision"], found["recall"]) == (pytest.approx(2 / 3), 1.0)
    assert found["intervals"]["f1"] == [0.5, 1.0]
    assert found["intervals"]["recall"] == [1.0, 1.0]
    nothing = labels.detection(seldom)
    assert (nothing["latents"], nothing["f1"], nothing["intervals"]["f1"]) == (0, None, None)


def test_a_predicate_that_fits_few_tokens_by_chance_is_not_chosen():
    # The latent fires with the predicate, and strongest at two tokens 7 that it will not meet again.
    rng = np.random.default_rng(0)
    holds = rng.random(400) < 0.3
    ids = {"token": rng.integers(0, 7, 400)}
    fires = holds * 1.0
    for i in np.flatnonzero(holds[:200])[:2]:
        fires[i], ids["token"][i] = 3, 7
    table = predicates.Predicates(["it"], holds[:, None])
    (label,) = labels.search(firings([fires]), labels.Material(table, ids, str, np.arange(400) < 200))
    assert label == labels.Label("it", 1.0, 1.0, 1.0, int(holds[200:].sum()), 0.0, 1.0)


def test_tokens_that_do_not_count_are_in_no_number():
    found = firings([np.array([1, 1, 1, 0, 1, 1, 0, 0])])
    found = dataclasses.replace(found, counts=np.array([1, 1, 1, 1, 1, 1, 1, 0], bool))
    holds = predicates.Predicates(["it"], np.array([1, 1, 1, 0, 1, 1, 0, 1], bool)[:, None])
    (label,) = labels.search(found, labels.Material(holds, {}, str, FIRST[4]))
    assert label.recall == 1  # the last token, where it holds and nothing fires, does not count


class Spelled(nn.Module):
    """A model whose activation at the hook is the one-hot vector of the token."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.wte = nn.Embedding.from_pretrained(torch.eye(vocab_size))
        self.transformer = nn.ModuleDict({"h": nn.ModuleList([nn.Identity()])})

    def forward(self, tokens):
        return self.transformer.h[0](self.wte(tokens))


def test_a_model_and_its_sae_are_read_as_they_run(corpus):
    text, tokenizer = read(corpus), corpus[1]
    (comma,), (digit,) = tokenizer.encode(","), tokenizer.encode("3")
    W_enc = torch.zeros(tokenizer.vocab_size, 3)
    W_enc[comma, 0], W_enc[digit, 1], W_enc[tokenizer.bos_token_id, 2] = 2.0, 3.0, 1.0
    weights = {"W_enc": W_enc, "W_dec": W_enc.T.contiguous(), "b_enc": torch.zeros(3), "b_dec": torch.zeros(len(W_enc))}
    sae = TorchSAE({"architecture": "standard", "d_in": len(W_enc), "d_sae": 3}, weights)
    site = Site(Spelled(len(W_enc)), "blocks.0.hook_resid_post", (tokenizer.bos_token_id,), tokens_per_forward=640)
    found = labels.firings(site, sae, text)
    assert set(found.value.tolist()) == {2.0, 3.0}
    assert set(text.tokens.reshape(-1)[found.token[found.latent == 0]].tolist()) == {comma}
    assert found.counts.sum() == (text.document >= 0).sum()
    named = labels.search(found, labels.Material.of_text(text, tokenizer))
    assert [label.label for label in named] == ["token ','", "token '3'", None]
    assert named[0].f1 == named[1].f1 == 1


def test_of_a_latent_that_may_be_negative_the_positive_side_is_named(corpus):
    text, tokenizer = read(corpus), corpus[1]
    (comma,), (digit,) = tokenizer.encode(","), tokenizer.encode("3")
    W_enc = torch.zeros(tokenizer.vocab_size, 1)
    W_enc[comma, 0], W_enc[digit, 0] = 2.0, -3.0
    weights = {"W_enc": W_enc, "W_dec": W_enc.T.contiguous(), "b_enc": torch.zeros(1), "b_dec": torch.zeros(len(W_enc))}
    sae = TorchSAE({"architecture": "abstopk", "d_in": len(W_enc), "d_sae": 1, "k": 1}, weights)
    site = Site(Spelled(len(W_enc)), "blocks.0.hook_resid_post", (tokenizer.bos_token_id,), tokens_per_forward=640)
    found = labels.firings(site, sae, text)
    assert set(found.value.tolist()) == {2.0}
    (named,) = labels.search(found, labels.Material.of_text(text, tokenizer))
    assert (named.label, named.f1) == ("token ','", 1)


def test_the_text_is_cut_where_an_sae_fires_too_often(corpus, monkeypatch):
    text, tokenizer = read(corpus), corpus[1]
    monkeypatch.setattr(labels, "MOST_FIRINGS", 700)
    V = tokenizer.vocab_size
    weights = {"W_enc": torch.ones(V, 4), "W_dec": torch.ones(4, V), "b_enc": torch.zeros(4), "b_dec": torch.zeros(V)}
    sae = TorchSAE({"architecture": "standard", "d_in": V, "d_sae": 4}, weights)
    site = Site(Spelled(V), "blocks.0.hook_resid_post", (tokenizer.bos_token_id,), tokens_per_forward=64)
    found = labels.firings(site, sae, text)
    assert 700 < len(found.token) < 1000
    assert found.counts.reshape(-1, 64)[:3].any()
    assert not found.counts.reshape(-1, 64)[4:].any()
    assert all(label.n > 0 for label in labels.search(found, labels.Material.of_text(text, tokenizer)))
