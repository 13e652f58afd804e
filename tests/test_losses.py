"""Every term of the loss against its definition, written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsae import losses
from jsae.ops import Cpu, Input, Ops, Reference, Xla

OPS: dict[str, Ops] = {"cpu": Cpu(), "xla": Xla(), "reference": Reference()}


@pytest.fixture(params=OPS)
def ops(request) -> Ops:
    return OPS[request.param]


def weights(seed: int, f: int, d: int) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(seed), 6)
    shapes = [(f, d), (f,), (f, d), (d,), (7, d), (7, d)]
    return tuple(jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))


def by_definition(x, residual, W_enc, b_enc, W_dec, b_dec, dead, k):
    e = np.asarray(residual, np.float64)
    pre = np.where(dead, np.asarray((x - b_dec) @ W_enc.T + b_enc, np.float64), -np.inf)
    e_hat = np.zeros_like(e)
    for n in range(len(e)):
        for i in np.argsort(-pre[n])[: min(k, int(dead.sum()))]:
            e_hat[n] += pre[n, i] * np.asarray(W_dec[i], np.float64)
    share = np.square(e - e_hat).sum() / np.square(e - e.mean(0)).sum()
    variance = np.square(np.asarray(x) - np.asarray(x).mean(0)).sum(1).mean()
    return min(dead.sum() / k, 1) * variance * share


def auxk(ops, inputs, residual, W_enc, b_enc, W_dec, dead, k) -> jax.Array:
    """The term as an SAE computes it, which reconstructs its input."""
    return losses.auxk(inputs.x, residual, ops.decode_dead(inputs, W_enc, b_enc, W_dec, dead, k), dead, k)


@pytest.mark.parametrize("n_dead", [0, 2, 4, 5, 16])
def test_auxk_equals_its_definition_for_no_few_and_many_dead_latents(ops, n_dead):
    W_enc, b_enc, W_dec, b_dec, x, residual = weights(1, 16, 5)
    dead = np.arange(16) >= 16 - n_dead
    ours = auxk(ops, Input(x, None, b_dec), residual, W_enc, b_enc, W_dec, jnp.asarray(dead), 4)
    np.testing.assert_allclose(ours, by_definition(x, residual, W_enc, b_enc, W_dec, b_dec, dead, 4), rtol=1e-4)


@pytest.mark.parametrize("n_dead", [2, 9])
def test_the_gradient_of_auxk_reaches_encoder_and_decoder_of_the_dead_only_and_not_the_residual(ops, n_dead):
    W_enc, b_enc, W_dec, b_dec, x, residual = weights(2, 16, 5)
    dead = jnp.arange(16) < n_dead

    def aux(residual, W_enc, b_enc, W_dec):
        return auxk(ops, Input(x, None, b_dec), residual, W_enc, b_enc, W_dec, dead, 4)

    to_residual, *to_weights = jax.grad(aux, (0, 1, 2, 3))(residual, W_enc, b_enc, W_dec)
    assert not np.asarray(to_residual).any()
    for gradient in to_weights:
        assert np.isfinite(gradient).all()
        assert np.asarray(gradient[:n_dead]).any()
        assert not np.asarray(gradient[n_dead:]).any()


def test_auxk_and_the_squared_error_keep_their_ratio_where_activations_are_scaled(ops):
    W_enc, b_enc, W_dec, b_dec, x, residual = weights(4, 16, 5)
    dead = jnp.arange(16) < 6

    def terms(factor):
        aux = auxk(
            ops, Input(factor * x, None, factor * b_dec), factor * residual, W_enc, factor * b_enc, W_dec, dead, 4
        )
        return aux / losses.mean_square(factor * residual)

    np.testing.assert_allclose(terms(1.0), terms(7.0), rtol=1e-4)


def test_auxk_of_a_residual_that_is_zero_is_zero_with_a_finite_gradient(ops):
    W_enc, b_enc, W_dec, b_dec, x, residual = weights(3, 16, 5)

    def aux(W_dec):
        return auxk(ops, Input(x, None, b_dec), residual * 0, W_enc, b_enc, W_dec, jnp.zeros(16, bool), 4)

    value, gradient = jax.value_and_grad(aux)(W_dec)
    assert float(value) == 0
    assert np.isfinite(gradient).all()


def test_l1_weighs_latents_by_their_decoder_norm():
    latents, W_dec = jnp.array([[1.0, 2.0], [0.0, 4.0]]), jnp.array([[3.0, 4.0], [0.0, 1.0]])
    assert float(losses.l1(latents.mean(0), W_dec)) == pytest.approx((1 * 5 + 2 * 1 + 0 + 4 * 1) / 2)


def test_squared_error_sums_over_width_and_averages_over_tokens():
    x, x_hat = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[0.0, 0.0], [3.0, 3.0]])
    assert float(losses.squared_error(x, x_hat)) == pytest.approx((1 + 4 + 0 + 1) / 2)
