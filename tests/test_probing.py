"""Probes on classes that are known to be separable, or known not to be; labelled text made from a real corpus."""

import dataclasses
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_nanochat import tiny
from toy_saes import toy_sae

from bridge.evaluate import Site, classes, probing, random_sae, syntax
from bridge.evaluate import text as texts
from bridge.evaluate.probing import Examples
from bridge.nanochat import tokenizer as tokenizers
from jsae import extras

CLASSES = ["red", "green", "blue"]
N = 600


@pytest.fixture(scope="module")
def separable() -> Examples:
    """Latent c is the class c, latents 3 to 9 are noise; activations hold latents 0 to 4, and an offset."""
    rng = np.random.default_rng(0)
    kind = np.arange(N) % 3
    latents = np.abs(rng.normal(size=(N, 10))).astype(np.float32) * 0.3
    latents[np.arange(N), kind] += 3
    acts = latents @ decoder() + 7
    member = kind[:, None] == np.arange(3)
    return Examples(acts, latents, member, np.arange(N) % 5 > 0, CLASSES)


def decoder() -> np.ndarray:
    """Rows of ten latents in ten dimensions."""
    return np.eye(10, dtype=np.float32)


def test_one_latent_tells_a_class_that_has_a_latent(separable):
    found = probing.sparse_probing(separable)
    assert list(found["classes"]) == CLASSES
    for name in ("sae_top_1", "sae_top_2", "sae_top_5", "sae", "llm"):
        assert found[f"{name}_test_accuracy"] > 0.97, name
    assert found["examples"] == N
    assert found["sae_top_1_test_accuracy"] == pytest.approx(
        np.mean([by["sae_top_1_test_accuracy"] for by in found["classes"].values()])
    )


def test_the_latent_that_differs_most_is_the_one_that_is_used(separable):
    useless = separable.latents.copy()
    useless[:, :3] = 0
    found = probing.sparse_probing(Examples(separable.acts, useless, separable.member, separable.train, CLASSES))
    assert found["sae_top_1_test_accuracy"] == pytest.approx(0.5, abs=0.12)
    assert found["llm_test_accuracy"] > 0.97
    assert list(probing.by_difference(separable.latents, probing.tasks(separable)["green"])[:1]) == [1]


def test_more_latents_separate_classes_that_one_cannot():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 2, (2, 1000))
    latents = np.stack([a, b, rng.integers(0, 2, 1000)], axis=1).astype(np.float32)
    both = ((a + b) == 2)[:, None]
    found = probing.sparse_probing(Examples(latents, latents, both, np.arange(1000) % 5 > 0, ["both"]), (1, 2))
    assert found["sae_top_1_test_accuracy"] < 0.9
    assert found["sae_top_2_test_accuracy"] == 1


def test_every_baseline_has_its_accuracy_and_its_interval():
    """The activations have a channel per class; latents, and the random ones, hold little but noise."""
    rng = np.random.default_rng(0)
    kind = np.arange(N) % 3
    acts = np.abs(rng.normal(size=(N, 10))).astype(np.float32) * 0.3
    acts[np.arange(N), kind] += 3
    latents, noise = rng.random((2, N, 10), dtype=np.float32)
    latents[np.arange(N), kind] += 0.3
    member = kind[:, None] == np.arange(3)
    examples = Examples(acts, latents, member, np.arange(N) % 5 > 0, CLASSES, noise)
    found = probing.sparse_probing(examples)
    assert found["random_top_5_test_accuracy"] == pytest.approx(0.5, abs=0.12)
    assert found["llm_top_1_test_accuracy"] > 0.97 > 0.9 > found["sae_top_1_test_accuracy"] > 0.5
    assert found["pca_top_2_test_accuracy"] > 0.97  # the variance is between the classes
    assert found["advantage"]["1"]["baseline"] == "llm"
    for name, (low, high) in found["intervals"].items():
        assert 0 <= low <= found[name] <= high <= 1, name
    advantage = found["advantage"]["1"]
    assert advantage["difference"] == pytest.approx(found["sae_top_1_test_accuracy"] - found["llm_top_1_test_accuracy"])
    low, high = advantage["interval"]
    assert low <= advantage["difference"] <= high < 0


def test_latents_equal_to_a_baseline_have_no_advantage(separable):
    same = Examples(separable.latents, separable.latents, separable.member, separable.train, CLASSES)
    assert probing.sparse_probing(same)["advantage"]["1"] == {
        "baseline": "llm",
        "difference": 0,
        "interval": [0, 0],  # paired: every draw is the same for both
    }


def test_examples_of_one_document_are_resampled_together(separable):
    half = dataclasses.replace(separable, latents=np.random.default_rng(1).random((N, 10), dtype=np.float32))
    alone = probing.sparse_probing(half)["intervals"]["sae_top_1_test_accuracy"]
    few = dataclasses.replace(half, document=np.arange(N) // 100)
    together = probing.sparse_probing(few)["intervals"]["sae_top_1_test_accuracy"]
    assert together != alone


def test_a_probe_does_not_depend_on_the_unit_of_its_features(separable):
    (first, *_), task = [separable.latents], probing.tasks(separable)["red"]
    weights, bias = probing.fit(first[task.train], task.train_is)
    scaled_weights, scaled_bias = probing.fit(first[task.train] * 1000, task.train_is)
    np.testing.assert_allclose(scaled_weights * 1000, weights, rtol=1e-3, atol=1e-5)
    assert scaled_bias == pytest.approx(bias, rel=1e-3)


def test_taking_away_a_classs_own_latent_hurts_this_class_alone(separable):
    found = probing.tpp(separable, decoder(), (2, 5, 500))
    assert "tpp_threshold_500_total_metric" not in found  # more than there are
    assert found["tpp_threshold_2_intended_diff_only"] > 0.4  # to chance, from all
    assert abs(found["tpp_threshold_2_unintended_diff_only"]) < 0.1
    assert found["tpp_threshold_2_total_metric"] == pytest.approx(
        found["tpp_threshold_2_intended_diff_only"] - found["tpp_threshold_2_unintended_diff_only"]
    )


def test_only_latents_that_speak_for_a_class_are_taken_away(separable):
    task = probing.tasks(separable)["red"]
    weights = np.array([2.0, -1, -1, 0, 0, 0, 0, 0, 0, 0])
    chosen = probing._strongest(separable, task, weights, decoder(), 10)
    assert chosen[0] == 0
    assert not {1, 2} & set(chosen.tolist())  # less active in the class
    against = probing._strongest(separable, task, -weights, decoder(), 10)
    assert 0 not in against


def test_classes_with_too_few_examples_are_left_out():
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(100, 4)).astype(np.float32)
    member = np.zeros((100, 2), bool)
    member[:40, 0] = True
    member[:5, 1] = True
    examples = Examples(latents, latents, member, np.arange(100) % 5 > 0, ["many", "few"])
    found = probing.sparse_probing(examples)
    assert list(found["classes"]) == ["many"]
    assert probing.tpp(examples, np.ones((4, 4), np.float32)) == {}  # no other class to compare with


def test_without_scikit_learn_the_error_gives_advice(separable, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    for probe in (probing.sparse_probing, lambda examples: probing.tpp(examples, decoder())):
        with pytest.raises(ImportError, match=re.escape(extras.advice("eval")) + ".*--noprobes"):
            probe(separable)


# ---- labelled text ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> tokenizers.Tokenizer:
    return tokenizers.train([Path(np.__file__).read_text()], 350)


def test_units_of_the_standard_library_name_their_package():
    assert classes.package_of("text json/decoder.py 0123456789ab") == "json"
    assert classes.package_of("text test/support/os helper.py 0123456789ab") == "test"
    assert classes.package_of("text ast.py 0123456789ab") is None
    assert classes.package_of("text topic LAMBDA 0123456789ab") == "language reference"
    assert classes.package_of("text help(_bisect) 0123456789ab") == "help of compiled modules"


def test_passages_come_from_the_largest_packages_and_no_document_is_in_both_parts(tokenizer):
    found = classes.packages("stdlib", tokenizer, 40_000)
    assert 6 <= len(found.classes) <= 8
    counts = np.bincount(found.kind)
    assert counts.max() - counts.min() <= 0.2 * counts.max()
    assert (found.tokens[:, 0] == tokenizer.bos_token_id).all()
    assert (found.tokens[:, 1:] != tokenizer.bos_token_id).all()
    assert found.tokens.shape[1] == 128
    assert 0.75 < found.train.mean() < 0.85
    train = {row.tobytes() for row in found.tokens[found.train]}
    assert not train & {row.tobytes() for row in found.tokens[~found.train]}
    again = classes.packages("other.txt,stdlib", tokenizer, 40_000)
    np.testing.assert_array_equal(again.tokens, found.tokens)
    assert classes.packages("other.txt", tokenizer, 40_000) is None
    assert not set(found.document[found.train]) & set(found.document[~found.train])
    for document in np.unique(found.document):
        assert len(set(found.kind[found.document == document])) == 1


def test_passages_are_the_means_of_their_tokens(tokenizer):
    model = tiny("G5", vocab_size=tokenizer.vocab_size)
    sae = toy_sae("topk", 32, 64)
    tokens = np.random.default_rng(0).integers(0, 256, (5, 16)).astype(np.int32)
    tokens[:, 0] = tokenizer.bos_token_id
    passages = classes.Passages(tokens, np.array([0, 1, 0, 1, 1]), np.array([True] * 4 + [False]), ["x", "y"])
    site = Site(model, "blocks.1.hook_resid_post", (tokenizer.bos_token_id,), tokens_per_forward=32)
    found = classes.passage_examples(site, sae, passages)
    ((_, _, acts, _, mask),) = Site(model, site.hook_name, (tokenizer.bos_token_id,)).read([tokens])
    assert mask[:, 1:].all()
    np.testing.assert_allclose(found.acts, acts[:, 1:].mean(1), atol=1e-5)
    np.testing.assert_allclose(found.latents, sae.encode(acts[:, 1:]).mean(1), atol=1e-5)
    np.testing.assert_array_equal(found.member, [[1, 0], [0, 1], [1, 0], [0, 1], [0, 1]])
    random = random_sae.like(sae, acts[:2, 1:].reshape(-1, 32))  # two rows are a forward pass
    np.testing.assert_allclose(found.random, random.encode(acts[:, 1:]).mean(1), atol=1e-5)


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_the_random_sae_has_as_many_latents_and_the_same_l0(architecture):
    sae = toy_sae(architecture, 32, 64)
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(500, 32))).float() + 5
    random = random_sae.like(sae, x)
    assert random.d_sae == 64
    torch.testing.assert_close(random.W_dec.norm(dim=1), torch.ones(64))
    wanted = (sae.encode(x) != 0).sum(1).float().mean()
    assert (random.encode(x) != 0).sum(1).float().mean() == pytest.approx(float(wanted), abs=0.5)
    torch.testing.assert_close(random_sae.like(sae, x).W_dec, random.W_dec)


def test_tokens_of_known_syntax_are_drawn_evenly(tokenizer, tmp_path):
    source = (
        '"""Doc of a module."""\n# A comment of it.\ndef f(a, b=1):\n    return "some text", a\n' + "x = y + 1\n" * 20
    )
    for i in range(10):
        (tmp_path / f"{i}.py").write_text(source.replace("module", f"module {i}"))
    documents = texts.documents(f"{tmp_path}/*.py", "all", tokenizer)
    text = texts.read(documents, tokenizer, 50, 10_000)
    model, sae = tiny("G5", vocab_size=tokenizer.vocab_size), toy_sae("topk", 32, 64)
    site = Site(model, "blocks.1.hook_resid_post", (tokenizer.bos_token_id,), tokens_per_forward=200)
    found = classes.token_examples(site, sae, text)
    assert found.classes == list(classes.TOKEN_CLASSES)
    assert set(found.classes) <= set(syntax.CONTEXTS)
    assert found.member.sum(0).min() > 20
    assert (~found.member.any(1)).sum() > 20
    assert found.train.any()
    assert not found.train.all()
    assert set(probing.sparse_probing(found)["classes"]) == set(classes.TOKEN_CLASSES)
    np.testing.assert_allclose(found.latents, sae.encode(torch.from_numpy(found.acts)), atol=1e-6)


def test_text_that_is_no_python_has_no_token_classes(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("This is prose, and no Python at all. " * 50)
    text = texts.read(texts.documents(str(tmp_path / "a.txt"), "all", tokenizer), tokenizer, 50, 1000)
    site = Site(tiny("G5", vocab_size=tokenizer.vocab_size), "blocks.1.hook_resid_post", (tokenizer.bos_token_id,))
    assert classes.token_examples(site, toy_sae("topk", 32, 64), text) is None


def test_wide_saes_get_fewer_examples(tokenizer, monkeypatch):
    monkeypatch.setattr(classes, "_MOST_NUMBERS", 64 * 3)
    model = tiny("G5", vocab_size=tokenizer.vocab_size)
    tokens = np.random.default_rng(0).integers(0, 256, (9, 8)).astype(np.int32)
    passages = classes.Passages(tokens, np.zeros(9, int), np.ones(9, bool), ["x"])
    found = classes.passage_examples(Site(model, "blocks.1.hook_resid_post", ()), toy_sae("topk", 32, 64), passages)
    assert found.latents.shape == (3, 64)
