"""Latents that are dedicated to one layer of a crosscoder: what they may not read or write stays 0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsae import loop
from jsae.architectures import SAEConfig, sae_config
from jsae.config import TrainConfig
from jsae.ops import Xla
from jsae.settings import ConfigError

pytestmark = pytest.mark.usefixtures("quickly_compiled")
D, F, OWN = 8, 40, 6
CONFIGS = {
    "topk": sae_config("topk", 3 * D, F, k=4, layers=3, exclusive=OWN),
    "batchtopk aligned": sae_config("batchtopk", 3 * D, F, k=4, layers=3, exclusive=OWN, aligned=True),
    "relu": sae_config("relu", 3 * D, F, layers=3, exclusive=OWN),
    "jumprelu": sae_config("jumprelu", 3 * D, F, layers=3, exclusive=OWN),
}


def forbidden() -> np.ndarray:
    """Where weights must be 0, from the words of the documentation."""
    mask = np.zeros((F, 3, D), bool)
    for layer in range(3):
        mask[layer * OWN : (layer + 1) * OWN] = True
        mask[layer * OWN : (layer + 1) * OWN, layer] = False
    return mask.reshape(F, 3 * D)


def acts(seed: int, rows: int = 64) -> tuple[jax.Array, ...]:
    draws = np.random.default_rng(seed).normal(1, 2, (3, rows, D)).astype(np.float32)
    return tuple(map(jnp.asarray, draws))


def states(config: SAEConfig, steps: int = 12, **train: object):
    """The state before the first step, and those after each."""
    settings = TrainConfig(num_activations=64 * steps, batch_size=64, learning_rate=0.01, dead_after=64, **train)
    members = [loop.Member(config, settings)]
    first = loop.init(members, (acts(0),), Xla())
    yield jax.tree.map(jnp.copy, first)[0]
    batches = ((acts(seed),) for seed in range(steps))
    for _, (state,), _ in loop.fit(members, first, batches, loop.Programs(members, Xla())):
        yield jax.tree.map(jnp.copy, state)


@pytest.mark.parametrize("resample_every", [None, 128])
@pytest.mark.parametrize("name", CONFIGS)
def test_they_stay_apart_through_training_revival_and_resampling(name, resample_every):
    mask, history = forbidden(), list(states(CONFIGS[name], resample_every=resample_every))
    for state in history:
        for weights in (state.sae.W_enc, state.sae.W_dec):
            assert not np.asarray(weights[...])[mask].any()
            assert np.asarray(weights[...])[~mask].all()
        for moments in (state.opt.mu, state.opt.nu):
            assert not np.asarray(moments.W_dec[...])[mask].any()
        np.testing.assert_allclose(np.linalg.norm(state.sae.W_dec[...], axis=1), 1, atol=1e-5)
    moved = np.abs(np.asarray(history[-1].sae.W_enc[...]) - np.asarray(history[0].sae.W_enc[...]))
    assert (moved[: 3 * OWN] > 0).any(1).mean() > 0.5  # they learn


def test_a_latent_of_one_layer_does_not_see_the_others():
    *_, state = states(CONFIGS["relu"], steps=3)
    x = jnp.concatenate(acts(9), axis=1)
    changed = x.at[:, D:].add(1.0)
    before, after = (np.asarray(state.sae.encode(v)) for v in (x, changed))
    np.testing.assert_array_equal(before[:, :OWN], after[:, :OWN])
    assert not np.allclose(before[:, OWN : 2 * OWN], after[:, OWN : 2 * OWN])


def test_the_others_train_as_they_would_without_a_mask():
    plain, none = (list(states(sae_config("topk", 3 * D, F, k=4, layers=3, **own))) for own in ({}, {"exclusive": 0}))
    jax.tree.map(np.testing.assert_array_equal, plain[-1], none[-1])


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"layers": 1, "exclusive": 2}, "only a crosscoder has exclusive latents"),
        ({"layers": 3, "exclusive": 14}, "14 exclusive latents for each of 3 layers leave none of d_sae=40"),
        ({"layers": 3, "exclusive": -1}, "exclusive is -1"),
    ],
)
def test_numbers_that_make_no_crosscoder_are_refused(settings, complaint):
    with pytest.raises(ConfigError, match=complaint):
        sae_config("topk", 3 * D, F, k=4, **settings)
