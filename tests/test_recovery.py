"""Scores of recovery: worked out by hand, and against SAELens's own evaluation."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import sae_lens
import torch
from sae_lens import synthetic as peer
from test_synthetic import TINY

import jsae
from jsae import recovery
from jsae.saelens import Plain
from jsae.settings import ConfigError
from jsae.synthetic import SyntheticWorld, features

SAMPLES = 9_000
SETTINGS = {
    "topk": {"k": 4},
    "abstopk": {"k": 4},
    "batchtopk": {"k": 4},
    "matryoshka": {"k": 4, "nested_widths": (8, 20)},
    "relu": {"l1_coefficient": 0.5},
    "gated": {"l1_coefficient": 0.5},
    "jumprelu": {"l0_coefficient": 0.5},
}


@pytest.fixture(scope="module")
def world():
    return SyntheticWorld(TINY)


def sae_of(features, bias, **changes):
    """Return a ReLU SAE whose latents read features along their own directions."""
    f, d = features.shape
    cfg = {"architecture": "standard", "d_in": d, "d_sae": f, "apply_b_dec_to_input": True, "metadata": {}}
    weights = {"W_enc": features.T, "b_enc": np.zeros(f), "W_dec": features, "b_dec": bias}
    arrays = {name: np.asarray(array, np.float32) for name, array in (weights | changes).items()}
    return jsae.TrainedSAE(Plain(cfg, arrays, 1))


def test_an_sae_that_is_the_truth_has_the_best_scores():
    config = dataclasses.replace(TINY, d_in=64, orthogonal_steps=0)
    vectors = np.linalg.qr(np.random.default_rng(0).standard_normal((64, 60)))[0].T
    world = SyntheticWorld(config, parts=features.make(config)._replace(features=jnp.asarray(vectors, jnp.float32)))
    found = recovery.scores(sae_of(vectors, world.bias, b_enc=np.full(60, -1e-3)), world, SAMPLES)
    assert found.mcc == pytest.approx(1)
    assert found.uniqueness == 1
    assert min(found.f1, found.precision, found.recall, found.accuracy) > 0.999
    assert found.fvu < 1e-5
    assert found.l0 == pytest.approx(found.true_l0, rel=1e-3)
    assert found.dead_latents == 0


def test_a_latent_that_is_dead_or_a_copy_costs_what_the_definitions_say(world):
    vectors = np.array(world.features)
    doubled = np.concatenate([vectors[:40], vectors[:20]])
    found = recovery.scores(sae_of(doubled, world.bias, b_enc=np.r_[np.zeros(50), np.full(10, -1e6)]), world, SAMPLES)
    assert found.uniqueness == pytest.approx(40 / 60)
    assert found.dead_latents == 10
    assert found.dead_fraction == pytest.approx(1 / 6)
    alive = recovery.scores(sae_of(doubled[:50], world.bias), world, SAMPLES)
    assert found.precision == pytest.approx(alive.precision * 50 / 60)
    assert found.recall == pytest.approx(alive.recall * 50 / 60)


def test_several_saes_are_scored_on_the_same_samples(world):
    samples = list(recovery.heldout(world, 5_000, seed=3))
    assert [len(batch.activations) for batch in samples] == [4_096, 904]
    for scale in (1, 2):
        sae = sae_of(scale * np.array(world.features), world.bias)
        assert recovery.scores(sae, world, samples=samples) == recovery.scores(sae, world, 5_000, seed=3)
    with pytest.raises(ConfigError, match="samples is empty"):
        recovery.scores(sae, world, samples=[])


def test_the_assignment_is_one_to_one_and_the_best():
    cosines = np.array([[0.9, 0.8], [0.85, 0.1], [0.2, 0.3]])
    assert recovery.mcc(cosines) == pytest.approx((0.8 + 0.85) / 2)


class Replayed:
    """The samples of a world, in the form in which SAELens's evaluation asks for them."""

    def __init__(self, world):
        self._world, self._row = world, 0

    def sample(self, n):
        self._row += n
        return torch.from_numpy(np.array(self._world.sample(self._row - n, n).feature_activations))


def truth_of(world):
    dictionary = peer.FeatureDictionary(*world.features.shape, bias=True, initializer=None)
    dictionary.feature_vectors.data = torch.from_numpy(np.array(world.features))
    dictionary.bias.data = torch.from_numpy(np.array(world.bias))
    return dictionary


@pytest.mark.parametrize("name", SETTINGS)
def test_scores_are_those_of_saelens(world, tmp_path, name):
    config = jsae.TrainConfig(20_000, batch_size=100, learning_rate=3e-3, dead_after=20_000)
    sae = jsae.train(world.with_samples(0), jsae.sae_config(name, 16, 40, **SETTINGS[name]), config)
    folder = sae.save(tmp_path / "sae")
    theirs = peer.eval_sae_on_synthetic_data(
        sae_lens.SAE.load_from_disk(str(folder)), truth_of(world), Replayed(world.with_samples(1)), SAMPLES, 4096
    )
    ours = recovery.scores(folder, world, SAMPLES)
    assert ours == recovery.scores(sae, world, SAMPLES)
    classification = theirs.classification
    expected = {
        "mcc": theirs.mcc,
        "uniqueness": theirs.uniqueness,
        "explained_variance": theirs.explained_variance,
        "shrinkage": theirs.shrinkage,
        "l0": theirs.sae_l0,
        "true_l0": theirs.true_l0,
        "dead_latents": theirs.dead_latents,
        "f1": classification.f1_score,
        "precision": classification.precision,
        "recall": classification.recall,
        "accuracy": classification.accuracy,
    }
    for score, value in expected.items():
        assert getattr(ours, score) == pytest.approx(value, rel=1e-6, abs=1e-6), score
    assert 0.1 < ours.f1 < 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 0}, "that of the world's own samples"),
        ({"num_samples": 0}, "num_samples is 0"),
    ],
)
def test_samples_that_cannot_be_scored_on_are_refused(world, change, message):
    with pytest.raises(jsae.ConfigError, match=message):
        recovery.scores(sae_of(np.array(world.features), world.bias), world, **{"num_samples": 10} | change)


def test_an_sae_of_another_width_is_refused(world):
    with pytest.raises(jsae.ConfigError, match="of width 8 and returns 8: the world has 16"):
        recovery.scores(sae_of(np.eye(8), np.zeros(8)), world, 10)
