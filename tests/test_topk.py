"""Sparse codes against their dense forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsae import topk
from jsae.topk import Codes


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize(("n", "f", "k"), [(7, 64, 4), (3, 96, 32), (5, 97, 3), (2, 10, 10), (4, 6144, 32), (1, 8, 1)])
def test_two_stage_top_k_is_exact(n, f, k):
    pre = normal(f, n, f)
    ours, (values, indices) = topk.top_k(pre, k), jax.lax.top_k(pre, k)
    np.testing.assert_array_equal(ours.values, values)
    np.testing.assert_array_equal(ours.indices, indices)


def test_top_k_with_ties_and_infinities_picks_distinct_latents_of_the_right_values():
    pre = jnp.round(normal(0, 50, 256) * 2) / 2
    pre = pre.at[:, ::3].set(-jnp.inf).at[0, 5].set(jnp.inf)
    codes = topk.top_k(pre, 40)
    np.testing.assert_array_equal(codes.values, jax.lax.top_k(pre, 40)[0])
    np.testing.assert_array_equal(jnp.take_along_axis(pre, codes.indices, 1), codes.values)
    assert all(len(set(row)) == 40 for row in np.asarray(codes.indices).tolist())


@pytest.mark.parametrize("k", [0, 65])
def test_top_k_refuses_a_k_that_is_not_there(k):
    with pytest.raises(ValueError, match=f"k={k} out of 64"):
        topk.top_k(normal(0, 2, 64), k)


def test_sparse_decode_and_its_gradients_equal_the_dense_product():
    W, g = normal(1, 48, 12), normal(2, 9, 12)
    codes = topk.top_k(normal(3, 9, 48), 5)

    def sparse(values, W):
        return (topk.decode(Codes(values, codes.indices), W) * g).sum()

    def dense(values, W):
        return ((Codes(values, codes.indices).dense(48) @ W) * g).sum()

    for ours, theirs in zip(
        jax.value_and_grad(sparse, (0, 1))(codes.values, W)[1],
        jax.value_and_grad(dense, (0, 1))(codes.values, W)[1],
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sparse(codes.values, W), dense(codes.values, W), rtol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_sparse_encoder_and_its_gradients_equal_the_dense_ones(masked):
    x, W, b_enc, b_dec, g = normal(1, 9, 12), normal(2, 48, 12), normal(3, 48), normal(4, 12), normal(5, 9, 48)
    allowed = (jnp.arange(48) % 4 == 0) if masked else None  # 12 allowed latents, of which 6 are picked

    def sparse(x, W, b_enc, b_dec):
        return (topk.encode(x, W, b_enc, b_dec, allowed, 6).dense(48) * g).sum()

    def dense(x, W, b_enc, b_dec):
        pre = (x - b_dec) @ W.T + b_enc
        seen = pre if allowed is None else jnp.where(allowed, pre, -jnp.inf)
        picked = seen >= jax.lax.top_k(seen, 6)[0][:, -1:]
        return (jnp.where(picked, pre, 0) * g).sum()

    args = (x, W, b_enc, b_dec)
    ours, theirs = jax.value_and_grad(sparse, (0, 1, 2, 3))(*args), jax.value_and_grad(dense, (0, 1, 2, 3))(*args)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_fewer_allowed_latents_than_k_leave_zeros_without_gradient():
    x, W = normal(1, 4, 6), normal(2, 20, 6)
    allowed = jnp.arange(20) < 3
    zero = jnp.zeros(20), jnp.zeros(6)
    codes = topk.encode(x, W, *zero, allowed, 8)
    assert (np.asarray(codes.values != 0).sum(1) == 3).all()
    gradient = jax.grad(lambda W: topk.encode(x, W, *zero, allowed, 8).values.sum())(W)
    assert np.isfinite(gradient).all()
    assert not np.asarray(gradient[3:]).any()


def test_the_training_path_holds_the_pre_activations_and_no_other_n_by_f_array():
    """Seen in the compiled program's own account: their product, and the same with the bias added."""
    n, f, d, k = 512, 4096, 16, 8

    def loss(W_enc, W_dec):
        codes = topk.encode(x, W_enc, jnp.zeros(f), jnp.zeros(d), None, k)
        return jnp.square(x - topk.decode(codes, W_dec)).sum()

    x = normal(0, n, d)
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(normal(1, f, d), normal(2, f, d)).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary < 2.2 * n * f * 4  # the dense form takes 4
