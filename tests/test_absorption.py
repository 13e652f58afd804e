"""Splitting and absorption where both are planted."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from tiny_nanochat import tiny
from toy_saes import toy_sae

from bridge.evaluate import Site, absorption, classes, probing
from bridge.evaluate import text as texts
from bridge.evaluate.probing import Examples
from bridge.nanochat import tokenizer as tokenizers

N, D, F = 2000, 12, 10
KIND = np.arange(N) % 4  # 0 and 1: in the concept; 1: a special case of it
TRAIN = np.arange(N) % 5 > 0


def decoder() -> np.ndarray:
    """Rows along the axes, but latent 1 also writes half of what latent 0 writes."""
    W_dec = np.eye(F, D, dtype=np.float32)
    W_dec[1] = 0
    W_dec[1, [0, 1]] = 0.8, 0.6
    return W_dec


def examples(absorbed: bool) -> Examples:
    """The activations hold the concept on axis 0; latent 0 stands for it, but, if absorbed, not in the special case."""
    rng = np.random.default_rng(0)
    latents = np.abs(rng.normal(size=(N, F))).astype(np.float32) * 0.1
    latents[:, :2] = 0
    latents[KIND == 0, 0] = 4
    latents[KIND == 1, 0] = 0 if absorbed else 4
    latents[KIND == 1, 1] = 5 if absorbed else 0
    acts = latents @ decoder() + 0.1 * rng.normal(size=(N, D)).astype(np.float32) + 3
    return Examples(acts, latents, (KIND < 2)[:, None], TRAIN, ["concept"])


B_DEC = np.full(D, 3, np.float32)


def test_a_special_case_that_another_latent_carries_is_absorbed():
    """Half of the concept's tokens are the special case, where latent 1 carries all: with both, splitting is 2."""
    one = dataclasses.replace(examples(True))
    found = absorption.absorption(one, decoder(), B_DEC)
    concept = found["concepts"]["concept"]
    assert concept["probe_f1"] > 0.97
    assert concept["latents"] == 2  # the second gains much: the concept is split between them
    assert set(concept["main_latents"]) == {0, 1}
    assert concept["rate"] == concept["fraction"] == 0

    p = np.eye(D)[0]
    task = probing.tasks(one)["concept"]
    hit = task.test[task.test_is]
    scores = absorption._absorbed(one, hit, p, np.array([0]), decoder(), B_DEC)
    special = (KIND[hit] == 1).mean()
    assert scores["rate"] == pytest.approx(special)
    assert scores["fraction"] == pytest.approx(special)


def test_a_share_that_others_carry_is_counted_as_such():
    """Main latent 0 writes 4, latent 1 another 4 of a projection of 8: half of it."""
    latents = np.zeros((4, F), np.float32)
    latents[:, 0], latents[:, 1] = 4, 5
    plain = Examples(latents @ decoder(), latents, np.ones((4, 1), bool), np.zeros(4, bool), ["c"])
    rows, p, main, none = np.arange(4), np.eye(D)[0], np.array([0]), np.zeros(D, np.float32)
    scores = absorption._absorbed(plain, rows, p, main, decoder(), none)
    assert scores == {"fraction": pytest.approx(0.5), "rate": 0}
    weak = dataclasses.replace(plain, latents=latents * np.where(np.arange(F) == 1, 0.4, 1).astype(np.float32))
    assert (
        absorption._absorbed(weak, rows, p, main, decoder(), none)["fraction"] == 0
    )  # a fifth is below the least share


def test_without_absorption_one_latent_is_the_concept():
    found = absorption.absorption(examples(False), decoder(), B_DEC)
    assert (found["latents"], found["rate"], found["fraction"]) == (1, 0, 0)
    assert found["intervals"]["rate"] == [0, 0]
    assert found["main_f1"] == found["concepts"]["concept"]["f1"][0] > 0.97
    assert found["left_out"] == {}
    json.dumps(found, allow_nan=False)


def test_concepts_that_the_activations_do_not_hold_are_left_out():
    noise = np.random.default_rng(1).normal(size=(N, D)).astype(np.float32)
    found = absorption.absorption(dataclasses.replace(examples(True), acts=noise), decoder(), B_DEC)
    assert found["concepts"] == {}
    assert found["rate"] is None
    assert 0.2 < found["left_out"]["concept"] < absorption.PROBE_F1


def test_letters_are_those_of_the_tokens(tmp_path):
    source = Path(json.__file__).read_text()
    for i in range(10):
        (tmp_path / f"{i}.py").write_text(source[i * 100 :])
    tokenizer = tokenizers.train([source], 400)
    text = texts.read(texts.documents(f"{tmp_path}/*.py", "all", tokenizer), tokenizer, 50, 20_000)
    site = Site(tiny("G5", vocab_size=tokenizer.vocab_size), "blocks.1.hook_resid_post", (tokenizer.bos_token_id,))
    found = classes.letter_examples(site, toy_sae("topk", 32, 64), text, tokenizer)
    assert found.classes[-1] == "capitalised word"
    assert len(found.classes) == 1 + classes.MOST_LETTERS
    assert found.member[:, :-1].sum(1).max() == 1  # a token has one first letter
    assert found.member.sum(0).min() >= 10
    assert not set(found.document[found.train]) & set(found.document[~found.train])
