"""Aligned training: the inner product of every latent's encoder and decoder row stays 1."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from alone import begin, fit

import jsae
from jsae import step
from jsae.architectures import ARCHITECTURES, Context, make, sae_config
from jsae.config import TrainConfig
from jsae.ops import choose
from jsae.settings import ConfigError

pytestmark = pytest.mark.usefixtures("quickly_compiled")
D, F, N = 8, 24, 64
RUN = TrainConfig(num_activations=20 * N, batch_size=N, learning_rate=0.02, dead_after=2 * N, resample_every=5 * N)


def config(name: str, **settings):
    settings |= {"nested_widths": (6,)} if name == "matryoshka" else {}
    settings |= {"k": 3} if ARCHITECTURES[name].Config.k is not None else {}
    return sae_config(name, D, F, aligned=True, **settings)


def x(seed: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (N, D)) + 0.5


def products(sae) -> np.ndarray:
    return np.asarray((sae.W_enc[...] * sae.W_dec[...]).sum(1))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_inner_products_are_1_from_the_first_step_to_the_last(name):
    start = begin(config(name), RUN, x(0))
    np.testing.assert_allclose(products(start.sae), 1, atol=1e-5)
    before = np.asarray(start.sae.W_enc[...])
    for _, state, _ in fit(config(name), RUN, start, [x(seed) for seed in range(1, 21)]):
        np.testing.assert_allclose(products(state.sae), 1, atol=1e-5)
    assert np.abs(np.asarray(state.sae.W_enc[...]) - before).max() > 0.01
    np.testing.assert_allclose(np.linalg.norm(state.sae.W_dec[...], axis=1), 1, atol=1e-5)


def test_gradients_are_those_of_the_reparametrised_loss():
    sae = make(config("relu"), key=jax.random.key(0))
    sae.W_enc[...] = sae.W_enc[...] + 0.3 * jax.random.normal(jax.random.key(1), (F, D))
    context = Context(choose(), training=True)

    def loss(W_enc, W_dec):
        other = jax.tree.map(jnp.copy, sae)
        other.W_enc[...] = W_enc + (1 - (W_enc * W_dec).sum(1))[:, None] * W_dec
        other.W_dec[...] = W_dec
        return step.loss_of(other, x(2), x(2), context)[0] * (N / 2)

    expected = jax.grad(loss, (0, 1))(sae.W_enc[...], sae.W_dec[...])
    state = begin(config("relu"), RUN, x(0))._replace(sae=sae, scale_out=jnp.float32(1))
    _, gradients = step._gradients(state, x(2), x(2), context)
    np.testing.assert_allclose(gradients.W_enc[...], expected[0], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(gradients.W_dec[...], expected[1], rtol=1e-3, atol=1e-3)
    along = (np.asarray(gradients.W_enc[...]) * np.asarray(sae.W_dec[...])).sum(1)
    assert np.abs(along).max() < 1e-2, "no gradient along the decoder row"


def test_a_transcoder_or_an_sae_that_is_continued_cannot_be_aligned(tmp_path):
    with pytest.raises(ConfigError, match="inner product"):
        sae_config("relu", D, F, aligned=True, d_out=4)
    acts = np.asarray(x(3))
    how = dataclasses.replace(RUN, num_activations=N, resample_every=None)
    plain = dataclasses.replace(config("relu"), aligned=False)
    jsae.train(np.tile(acts, (40, 1)), plain, how).save(tmp_path / "sae")
    with pytest.raises(ConfigError, match="leave out aligned"):
        jsae.train(np.tile(acts, (40, 1)), config("relu"), how, init_from=tmp_path / "sae")
