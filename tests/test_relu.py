"""The two penalties of ReLU SAEs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsae
from jsae.architectures import Context, Forward, make, sae_config
from jsae.ops import choose
from jsae.testing import toy

N, D, F = 40, 6, 16


def penalty_and_parts(**settings) -> tuple[float, np.ndarray]:
    """The penalty at half of the strength, and the latents times their decoder norms, in float64."""
    config = sae_config("relu", D, F, l1_coefficient=0.7, **settings)
    sae = make(config, key=jax.random.key(0), b_dec=jnp.linspace(-0.2, 0.3, D))
    sae.W_dec[...] = sae.W_dec * jnp.linspace(0.5, 2, F)[:, None]  # rows that are not unit, so that norms show
    x = jax.random.normal(jax.random.key(1), (N, D))
    context = Context(choose(), training=True, strength=jnp.float32(0.5))
    latents, extra = sae.activate(x, context)
    W_enc, W_dec, b_dec = (np.asarray(getattr(sae, n)[...], np.float64) for n in ("W_enc", "W_dec", "b_dec"))
    sizes = np.maximum((np.asarray(x) - b_dec) @ W_enc.T, 0) * np.linalg.norm(W_dec, axis=1)
    return float(sae.penalty(Forward(x, x, 0 * x, latents, extra, context))), sizes


def test_the_penalty_is_the_log_sum_of_latents_times_their_decoder_norms():
    value, sizes = penalty_and_parts(log_scale=0.05)
    s = 0.05 * np.sqrt(D)
    assert value == pytest.approx(0.5 * 0.7 * (s * np.log(1 + sizes / s)).sum(1).mean(), rel=1e-5)


def test_l1_is_the_sum_of_latents_times_their_decoder_norms_and_the_limit_of_a_large_scale():
    value, sizes = penalty_and_parts(sparsity_penalty="l1")
    assert value == pytest.approx(0.5 * 0.7 * sizes.sum(1).mean(), rel=1e-5)
    assert penalty_and_parts(log_scale=1e5)[0] == pytest.approx(value, rel=1e-2)


def test_the_scale_is_a_fraction_of_the_norm_of_the_target():
    assert sae_config("relu", 64, 128, log_scale=0.5).scale == 4.0
    assert sae_config("relu", 64, 128, log_scale=0.5, d_out=16).scale == 2.0


def test_latents_shrink_less_than_under_l1():
    """At one L0 the reconstruction that fits best is that of L1 times a factor above 1."""
    acts = toy.activations(20_000, 24)
    factors = {}
    for name in ("log", "l1"):
        config = sae_config("relu", 24, 64, target_l0=4.0, sparsity_penalty=name)
        sae = jsae.train(acts, config, jsae.TrainConfig(120_000, batch_size=400))
        x, y = acts - np.asarray(sae.b_dec), np.asarray(sae(acts)) - np.asarray(sae.b_dec)
        factors[name] = float((x * y).sum() / (y * y).sum())
        assert 3 < sae.metrics["l0"] < 5
    assert 0.99 < factors["log"] < 1.02 < factors["l1"], factors
