"""Which latents are active, and sparse codes against their dense forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsae import codes, paths, topk


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
    picked = topk.top_k(pre, 40)
    np.testing.assert_array_equal(picked.values, jax.lax.top_k(pre, 40)[0])
    np.testing.assert_array_equal(jnp.take_along_axis(pre, picked.indices, 1), picked.values)
    assert all(len(set(row)) == 40 for row in np.asarray(picked.indices).tolist())


@pytest.mark.parametrize("k", [0, 65])
def test_top_k_refuses_a_k_that_is_not_there(k):
    with pytest.raises(ValueError, match=f"k={k} out of 64"):
        topk.top_k(normal(0, 2, 64), k)


def brute_batch_top_k(pre, count):
    positive = np.maximum(np.asarray(pre), 0)
    threshold = max(np.sort(positive.ravel())[-count], np.finfo(np.float32).tiny)
    return np.where(positive >= threshold, positive, 0)


@pytest.mark.parametrize(
    ("n", "f", "k", "shift"), [(50, 256, 4, 0), (64, 97, 3, 0), (8, 64, 16, -1), (3, 4096, 2, 10), (5, 12, 12, 0)]
)
def test_batch_top_k_keeps_the_largest_of_the_whole_batch(n, f, k, shift):
    """Also where one token (shifted by 10) has more of them than candidates, and where too few are positive."""
    pre = normal(n, n, f).at[0].add(shift)
    picked = jax.jit(functools.partial(topk.batch_top_k, k=k))(pre)
    assert picked.values.shape == (n, k)
    np.testing.assert_array_equal(picked.dense(n, f), brute_batch_top_k(pre, n * k))
    if (expected := brute_batch_top_k(pre, n * k)).any():
        assert float(topk.least_active(picked)) == expected[expected > 0].min()


def test_batch_top_k_takes_no_equal_values_in_the_place_of_larger_ones():
    pre = jnp.round(normal(0, 40, 64) * 2) / 2
    kept = np.asarray(topk.batch_top_k(pre, 4).dense(40, 64))
    np.testing.assert_array_equal(np.sort(kept[kept > 0]), np.sort(np.asarray(pre).ravel())[-160:])


def test_batch_top_k_gives_its_codes_in_the_order_of_the_tokens():
    rows = np.asarray(topk.batch_top_k(normal(1, 30, 64), 4).rows).ravel()
    assert (np.diff(rows) >= 0).all()
    assert len(set(rows.tolist())) > 20


def test_a_limit_lets_only_so_many_count():
    pre, limit = normal(3, 20, 64), jnp.int32(3)
    np.testing.assert_array_equal(topk.top_k(pre, 8, limit).dense(20, 64), topk.top_k(pre, 3).dense(20, 64))
    np.testing.assert_array_equal(topk.abs_top_k(pre, 8, limit).dense(20, 64), topk.abs_top_k(pre, 3).dense(20, 64))
    np.testing.assert_array_equal(topk.batch_top_k(pre, 8, limit).dense(20, 64), brute_batch_top_k(pre, 60))


def test_abs_top_k_keeps_signs():
    pre = jnp.array([[1.0, -3.0, 2.0, 0.5]])
    np.testing.assert_array_equal(topk.abs_top_k(pre, 2).dense(1, 4), [[0, -3, 2, 0]])


@pytest.mark.parametrize("count", [1, 7, 100, 101])
def test_kth_largest_is_exact(count):
    values = jnp.abs(normal(0, 10, 10)) * jnp.exp(3 * normal(1, 10, 10))
    expected = np.sort(np.asarray(values).ravel())[-count] if count <= 100 else 0
    assert float(topk.kth_largest(values, count)) == expected


SELECTIONS = {
    "top_k": functools.partial(topk.top_k, k=5),
    "abs_top_k": functools.partial(topk.abs_top_k, k=5),
    "batch_top_k": functools.partial(topk.batch_top_k, k=5),
}


@pytest.mark.parametrize("select", SELECTIONS.values(), ids=SELECTIONS)
def test_sparse_decode_and_its_gradients_equal_the_dense_product(select):
    W, g, start = normal(1, 48, 12), normal(2, 9, 12), normal(4, 9, 12)
    picked = select(normal(3, 9, 48))

    def sparse(values, W, start):
        return (codes.decode(picked._replace(values=values), W, 9, start) * g).sum()

    def dense(values, W, start):
        return ((start + picked._replace(values=values).dense(9, 48) @ W) * g).sum()

    for ours, theirs in zip(
        jax.value_and_grad(sparse, (0, 1, 2))(picked.values, W, start)[1],
        jax.value_and_grad(dense, (0, 1, 2))(picked.values, W, start)[1],
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sparse(picked.values, W, start), dense(picked.values, W, start), rtol=1e-5)
    alone = codes.decode(picked, W, 9)
    np.testing.assert_allclose(alone + start, codes.decode(picked, W, 9, start), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("select", SELECTIONS.values(), ids=SELECTIONS)
def test_sparse_encoder_and_its_gradients_equal_the_dense_ones(select, masked, centred, scaled):
    x, W, b_enc, g = normal(1, 9, 12), normal(2, 48, 12), normal(3, 48), normal(5, 9, 48)
    b_in, scale = normal(4, 12) if centred else None, 1 + jnp.arange(12) / 12 if scaled else None
    allowed = (jnp.arange(48) % 4 == 0) if masked and select is not SELECTIONS["abs_top_k"] else None

    def sparse(x, W, b_enc, b_in):
        given = codes.Input(x, scale, b_in)
        return (codes.encode(given, W, b_enc, allowed, None, select).dense(9, 48) * g).sum()

    def dense(x, W, b_enc, b_in):
        read = x if scale is None else x * scale
        pre = (read if b_in is None else read - b_in) @ W.T + b_enc
        picked = select(pre if allowed is None else jnp.where(allowed, pre, -jnp.inf)).dense(9, 48)
        return (jnp.where(picked != 0, pre, 0) * g).sum()

    args = (x, W, b_enc, b_in)
    wanted = (0, 1, 2, 3) if centred else (0, 1, 2)
    ours, theirs = jax.value_and_grad(sparse, wanted)(*args), jax.value_and_grad(dense, wanted)(*args)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_fewer_allowed_latents_than_k_leave_zeros_without_gradient():
    x, W = normal(1, 4, 6), normal(2, 20, 6)
    allowed = jnp.arange(20) < 3

    def picked(W):
        return codes.encode(codes.Input(x), W, jnp.zeros(20), allowed, None, functools.partial(topk.top_k, k=8)).values

    assert (np.asarray(picked(W) != 0).sum(1) == 3).all()
    gradient = jax.grad(lambda W: picked(W).sum())(W)
    assert np.isfinite(gradient).all()
    assert not np.asarray(gradient[3:]).any()


def test_the_training_path_never_holds_an_array_of_all_tokens_and_latents_nor_a_copy_of_its_input():
    """Seen in the compiled program's own account: a chunk of pre-activations, the error, some rows of a gradient."""
    n, f, d, k = 512, 4096, 256, 8

    def loss(W_enc, W_dec, b_dec, x):
        scale = jnp.float32(2)
        given = codes.Input(x, scale, b_dec)
        picked = codes.encode(given, W_enc, jnp.zeros(f), None, None, functools.partial(topk.top_k, k=k))
        return jnp.square(codes.decode(picked, W_dec, n, onto=b_dec - x * scale)).sum() / 2

    with paths.force(paths.CPU._replace(chunk=2**18, least=8)):
        gradients = jax.jit(jax.grad(loss, (0, 1, 2)))
        compiled = gradients.lower(normal(1, f, d), normal(2, f, d), normal(3, d), normal(0, n, d)).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary < 0.2 * n * f * 4  # the dense form takes 4
    assert temporary < 2.5 * n * d * 4
