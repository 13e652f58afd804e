"""Scores of steering against values worked out by hand, and on a model whose unembedding is known."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_nanochat import tiny
from torch import nn
from toy_saes import toy_sae

from bridge import steering
from bridge.evaluate import Site, concepts, labels, steered, steering_sample, steering_score
from bridge.evaluate import text as texts
from bridge.evaluate.concepts import Concepts
from bridge.evaluate.labels import Label
from bridge.evaluate.steered import Trial
from bridge.nanochat import tokenizer as tokenizers
from bridge.runtime import InterpretableModel, Steer
from bridge.steering import Feature
from bridge.torch_sae import TorchSAE

A, B, BOS = range(3)
BYTES = np.array([1, 2, 0], np.int32)
LAST = "blocks.3.hook_resid_post"


class ByHand(nn.Module):
    """At the hook a is (2, 0), b (0, 2), BOS (2, 2). Logits: (ln 2 x0, ln 3 x1, 0)."""

    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding.from_pretrained(torch.tensor([[1.0, 0], [0, 1], [1, 1]]))
        self.transformer = nn.ModuleDict({"h": nn.ModuleList([nn.Linear(2, 2, bias=False)])})
        self.head = nn.Linear(2, 3, bias=False)
        with torch.no_grad():
            self.transformer.h[0].weight.copy_(2 * torch.eye(2))
            self.head.weight.copy_(torch.tensor([[math.log(2), 0], [0, math.log(3)], [0, 0]]))
        self.requires_grad_(False)

    def forward(self, tokens):
        return self.head(self.transformer.h[0](self.wte(tokens)))


SITE = Site(ByHand(), "blocks.0.hook_resid_post", (BOS,))
ROWS = np.array([[BOS, B, A, B], [BOS, A, A, B]])


def trial(direction, strength: float, positions=None, targets=((A,),)) -> Trial:
    where = torch.ones(2, 4, dtype=torch.bool) if positions is None else torch.tensor(positions)
    sets = torch.zeros(len(targets), 3, dtype=torch.bool)
    for row, ids in zip(sets, targets, strict=True):
        row[list(ids)] = True
    return Trial(Feature(torch.tensor(direction), lambda h: h[..., 0]), strength, sets, where)


def test_effect_and_side_effects_are_as_worked_out_by_hand():
    # Only the two positions of b in the first row: probabilities go as (1, 9, 1), and with x0 raised by 1 as (2, 9, 1).
    only_b = [[True, True, False, True], [False, False, False, False]]
    (outcome,) = steered.measure(SITE, ROWS, [trial([1.0, 0.0], 1.0, only_b, ((A,), (A, B)))], BYTES)
    before, after = np.array([1, 9, 1]) / 11, np.array([2, 9, 1]) / 12
    assert outcome.divergence == pytest.approx((before * np.log(before / after)).sum(), rel=1e-5)
    assert outcome.gain == pytest.approx([math.log(after[0] / before[0]), math.log(11 / 12 / (10 / 11))], rel=1e-5)
    assert outcome.share == pytest.approx([2 / 12, 11 / 12], rel=1e-5)
    assert outcome.share_before == pytest.approx([1 / 11, 10 / 11], rel=1e-5)
    # b is followed by a, of one byte, and then by nothing.
    assert outcome.bits_per_byte == pytest.approx(-math.log2(2 / 12), rel=1e-5)
    assert outcome.bits_per_byte_before == pytest.approx(-math.log2(1 / 11), rel=1e-5)


def test_trials_that_share_a_pass_do_not_mix():
    trials = [trial([1.0, 0.0], 1.0), trial([0.0, 0.0], 5.0), trial([0.0, 1.0], -2.0)]
    together = steered.measure(SITE, ROWS, trials, BYTES)
    alone = [
        steered.measure(Site(ByHand(), SITE.hook_name, (BOS,), tokens_per_forward=4), ROWS, [t], BYTES)[0]
        for t in trials
    ]
    for one, other in zip(together, alone, strict=True):
        assert one.divergence == pytest.approx(other.divergence, rel=1e-5, abs=1e-9)
        assert one.gain == pytest.approx(other.gain, rel=1e-5)
        assert one.bits_per_byte == pytest.approx(other.bits_per_byte, rel=1e-5)
    assert [together[1].divergence, together[1].gain[0]] == pytest.approx([0, 0], abs=1e-6)  # the direction is zero
    assert together[1].bits_per_byte == pytest.approx(together[1].bits_per_byte_before, abs=1e-6)


def test_effects_are_compared_at_the_same_side_effect():
    # Exactly linear in the root of KL, and in KL.
    assert steered.at_divergence([0.04, 0.16, 0.64], [1.0, 2.0, 4.0], 0.09) == (pytest.approx(1.5), True)
    assert steered.at_divergence([0.04, 0.16], [1.0, 2.0], 0.01) == (pytest.approx(0.5), True)
    assert steered.at_divergence([0.04, 0.16], [1.0, 2.0], 0.10, power=1.0) == (pytest.approx(1.5), True)
    assert steered.at_divergence([0.04, 0.16], [1.0, 2.0], 0.5) == (2, False)
    assert steered.at_divergence([0.0, 0.0], [0.0, 0.0], 0.1) == (0, False)


# ---- on a nanochat -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> tuple[texts.Text, tokenizers.Tokenizer]:
    folder = tmp_path_factory.mktemp("text")
    for path in sorted(Path(json.__file__).parent.glob("*.py")):
        (folder / path.name).write_text(path.read_text())
    tokenizer = tokenizers.train([path.read_text() for path in folder.iterdir()], 400)
    documents = texts.documents(f"{folder}/*.py", "all", tokenizer)
    return texts.read(documents, tokenizer, 64, 64 * 40), tokenizer


PLANTED = 40


@pytest.fixture(scope="module")
def planted(corpus):
    """An SAE after the last block whose latent 0 writes the unembedding of one token, among random latents."""
    _, tokenizer = corpus
    model = tiny("G0", vocab_size=tokenizer.vocab_size)
    sae = toy_sae("standard", 32, 16)
    row = torch.nn.functional.normalize(model.lm_head.weight[PLANTED].float(), dim=0)
    weights = {name: weight.clone() for name, weight in sae.named_parameters()}
    weights["W_dec"][0], weights["W_enc"][:, 0] = row, row
    return model, TorchSAE(sae.cfg, weights).eval()


def test_a_planted_unembedding_scores_far_above_random_directions(corpus, planted):
    text, tokenizer = corpus
    model, sae = planted
    name = f"token {tokenizer.token_text(PLANTED)!r}"
    named = [Label(name, 1.0, 1.0, 1.0, 50, 0.0)] + [Label(None, None, None, None, 0, None)] * 15
    extent = steering_score.Extent(latents=(0,), tokens=512)
    site = Site(model, LAST, (tokenizer.bos_token_id,))
    found = steering_score.score(site, sae, text, tokenizer, named, extent)
    entry = found["latents"]["0"]
    assert {"following", "label", "promoted"} == set(entry["directions"]["latent"]["at_kl"])
    assert entry["promoted"][0] == tokenizer.token_text(PLANTED)
    at = {name: direction["at_kl"] for name, direction in entry["directions"].items()}
    assert at["latent"]["label"]["reached"]
    assert at["latent"]["label"]["gain"] > 1  # nats
    assert at["latent"]["label"]["gain"] > 5 * abs(at["random"]["label"]["gain"])
    assert found["summary"]["label"]["latent"]["median"] == at["latent"]["label"]["gain"]
    assert found["summary"]["label"]["latent"]["latents"] == 1
    json.dumps(found, allow_nan=False)


def test_a_zero_direction_scores_zero(corpus, planted):
    text, tokenizer = corpus
    model, _ = planted
    site = Site(model, LAST, (tokenizer.bos_token_id,))
    rows = text.tokens[:4, :32]
    targets = {"x": np.arange(tokenizer.vocab_size) == PLANTED}
    everywhere = torch.ones(4, 32, dtype=torch.bool)
    zero = Feature(torch.zeros(32), lambda h: h[..., 0])
    found = steering_score.curve(site, rows, zero, 3.0, targets, everywhere, tokenizer.token_bytes)
    assert found["at_kl"]["x"]["gain"] == pytest.approx(0, abs=1e-5)
    assert not found["at_kl"]["x"]["reached"]
    assert found["bits_per_byte_at_kl"] == pytest.approx(0, abs=1e-5)


def test_what_is_measured_is_what_users_steer(corpus, planted):
    """The log-probabilities are those of the runtime under the same request."""
    text, tokenizer = corpus
    model, sae = planted
    rows = text.tokens[:2, :32]
    sets = torch.zeros(1, tokenizer.vocab_size, dtype=torch.bool)
    sets[0, PLANTED] = True
    one = Trial(steering.feature(sae, 0), 2.5, sets, torch.ones(2, 32, dtype=torch.bool))
    (outcome,) = steered.measure(Site(model, LAST, ()), rows, [one], tokenizer.token_bytes)
    runtime = InterpretableModel(model, {LAST: sae}, tokenizer)
    tokens = torch.from_numpy(rows.astype(np.int64))
    plain = model(tokens).log_softmax(-1)
    with runtime.steering_enabled([Steer(LAST, 0, "additive", 2.5)]):
        changed = runtime(tokens).log_softmax(-1)
    assert outcome.gain[0] == pytest.approx((changed - plain)[..., PLANTED].mean().item(), rel=1e-4)
    assert outcome.divergence == pytest.approx((plain.exp() * (plain - changed)).sum(-1).mean().item(), rel=1e-4)


def test_the_latent_is_steered_only_where_it_is_silent_and_bos_is_not_measured(corpus, planted):
    text, tokenizer = corpus
    model, sae = planted
    site = Site(model, LAST, (tokenizer.bos_token_id,))
    silent = steering_sample.silent(site, sae, text.tokens[:3], [0, 5])
    ((_, ids, acts, _, _),) = site.read([text.tokens[:3]])
    expected = (sae.encode(acts)[..., [0, 5]] == 0).movedim(-1, 0) & (ids != tokenizer.bos_token_id)
    assert torch.equal(silent, expected)
    assert 0 < silent[0].float().mean() < 1


def test_the_sample_covers_rare_and_frequent_latents(corpus, planted):
    text, _ = corpus
    model, sae = planted
    calibration = steering_sample.calibrate(Site(model, LAST, ()), sae, concepts.sample(text, 20))
    chosen = steering_sample.chosen(sae, calibration, (), 4)
    frequency = calibration.firings[chosen]
    assert len(chosen) == 4
    assert (np.diff(frequency) >= 0).all()
    assert steering_sample.chosen(sae, calibration, (), 100) == steering_sample.chosen(sae, calibration, (), 16)
    with pytest.raises(ValueError, match="no latent 16: this SAE has latents 0 to 15"):
        steering_sample.chosen(sae, calibration, (3, 16), 4)


def test_too_little_text_and_other_kinds_of_saes_are_refused(corpus, planted):
    text, tokenizer = corpus
    model, sae = planted
    with pytest.raises(ValueError, match="at least two rows of text"):
        steering_score.score(Site(model, LAST, ()), sae, concepts.sample(text, 1), tokenizer)
    crosscoder = TorchSAE(sae.cfg, dict(sae.named_parameters()), layers=2)
    with pytest.raises(ValueError, match="give an SAE of one hook"):
        steering_score.score(Site(model, LAST, ()), crosscoder, text, tokenizer)


# ---- concepts ------------------------------------------------------------------------------------------------------


def test_labels_are_read_back_to_where_they_hold_and_what_they_name(corpus):
    text, tokenizer = corpus
    named = Concepts(text, tokenizer)
    token = int(tokenizer.encode("self")[0])
    spelt = repr(tokenizer.token_text(token))
    flat = text.tokens
    assert np.flatnonzero(named.tokens(f"token {spelt}")).tolist() == [token]
    assert np.flatnonzero(named.tokens(f"before {spelt}")).tolist() == [token]
    assert named.tokens(f"after {spelt}") is None
    np.testing.assert_array_equal(named.holds(f"token {spelt}").reshape(flat.shape), flat == token)
    np.testing.assert_array_equal(named.holds(f"before {spelt}").reshape(flat.shape)[:, :-1], flat[:, 1:] == token)
    np.testing.assert_array_equal(named.holds(f"after {spelt}").reshape(flat.shape)[:, 1:], flat[:, :-1] == token)
    digits = named.tokens("before: digits")
    assert [tokenizer.token_text(int(i)) for i in np.flatnonzero(digits)][:3] == ["0", "1", "2"]
    assert named.tokens("in a docstring") is None
    assert named.holds("in a docstring").any()
    assert named.holds("no such label") is None
    assert named.tokens(None) is named.holds(None) is None


def test_what_follows_a_concept_is_what_comes_after_it_more_often_than_elsewhere(corpus):
    _, tokenizer = corpus
    ids = np.random.default_rng(0).integers(0, 200, (4, 100)).astype(np.int32)
    ids[:, 10::10], ids[:, 11::10] = 210, 211  # 211 follows 210 and nothing else
    ids[:, 15::10] = 212  # frequent, but not after 210
    text = texts.Text(ids, np.zeros_like(ids), np.zeros_like(ids), [b""])
    named = Concepts(text, tokenizer)
    assert np.flatnonzero(named.following(ids.reshape(-1) == 210, 3)).tolist()[-1] == 211
    found = named.following(ids.reshape(-1) == 210, 1)
    assert np.flatnonzero(found).tolist() == [211]
    assert named.following(np.arange(400) < 5, 3) is None
    assert named.followed_by(found).sum() == (ids[:, 1:] == 211).sum()


def test_every_label_that_the_evaluation_finds_is_known(corpus, planted):
    text, tokenizer = corpus
    model, sae = planted
    fires = labels.firings(Site(model, LAST, (tokenizer.bos_token_id,)), sae, text)
    named = Concepts(text, tokenizer)
    for label in labels.search(fires, labels.Material.of_text(text, tokenizer)):
        assert label.label is None or "\ufffd" in label.label or named.holds(label.label) is not None, label.label
