"""Selection of latents: every implementation against sorting all numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementations import ALL

from jsae.architectures.selecting import least_active
from jsae.ops import Ops, selection

pytestmark = pytest.mark.usefixtures("quickly_compiled")
SHAPES = [(7, 64, 4), (3, 96, 32), (5, 97, 3), (2, 10, 10), (4, 6144, 32), (1, 8, 1), (97, 101, 7), (60, 96, 5)]


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.fixture(params=["reference", "cpu", "in pieces", "xla"])  # the others select as one of these
def ops(request) -> Ops:
    return ALL[request.param]


@pytest.mark.parametrize(("n", "f", "k"), SHAPES)
def test_top_k_is_exact(ops, n, f, k):
    pre = normal(f, n, f)
    ours, (values, indices) = ops.top_k(pre, k), jax.lax.top_k(pre, k)
    np.testing.assert_array_equal(ours.values, values)
    np.testing.assert_array_equal(ours.indices, indices)
    assert ours.rows is None


def test_top_k_with_ties_and_infinities_picks_distinct_latents_of_the_right_values(ops):
    pre = jnp.round(normal(0, 50, 256) * 2) / 2
    pre = pre.at[:, ::3].set(-jnp.inf).at[0, 5].set(jnp.inf)
    picked = ops.top_k(pre, 40)
    np.testing.assert_array_equal(picked.values, jax.lax.top_k(pre, 40)[0])
    np.testing.assert_array_equal(jnp.take_along_axis(pre, picked.indices, 1), picked.values)
    assert all(len(set(row)) == 40 for row in np.asarray(picked.indices).tolist())


@pytest.mark.parametrize("k", [0, 65])
@pytest.mark.parametrize("name", ["top_k", "abs_top_k", "batch_top_k"])
def test_a_selection_refuses_a_k_that_is_not_there(ops, name, k):
    with pytest.raises(ValueError, match=f"k={k} out of 64"):
        getattr(ops, name)(normal(0, 2, 64), k)


def brute_batch_top_k(pre, count):
    positive = np.maximum(np.asarray(pre), 0)
    threshold = max(np.sort(positive.ravel())[-count], np.finfo(np.float32).tiny)
    return np.where(positive >= threshold, positive, 0)


@pytest.mark.parametrize(
    ("n", "f", "k", "shift"),
    [(50, 256, 4, 0), (64, 97, 3, 0), (8, 64, 16, -1), (3, 4096, 2, 10), (5, 12, 12, 0), (97, 101, 7, 0)],
)
def test_batch_top_k_keeps_the_largest_of_the_whole_batch(ops, n, f, k, shift):
    """Also where one token (shifted by 10) has more of them than candidates, and where too few are positive."""
    pre = normal(n, n, f).at[0].add(shift)
    picked = jax.jit(functools.partial(ops.batch_top_k, k=k))(pre)
    assert picked.values.shape == (n, k)
    np.testing.assert_array_equal(picked.dense(n, f), brute_batch_top_k(pre, n * k))
    if (expected := brute_batch_top_k(pre, n * k)).any():
        assert float(least_active(picked)) == expected[expected > 0].min()


def test_batch_top_k_takes_no_equal_values_in_the_place_of_larger_ones(ops):
    pre = jnp.round(normal(0, 40, 64) * 2) / 2
    kept = np.asarray(ops.batch_top_k(pre, 4).dense(40, 64))
    np.testing.assert_array_equal(np.sort(kept[kept > 0]), np.sort(np.asarray(pre).ravel())[-160:])


def test_batch_top_k_with_infinities_keeps_the_positive_one_and_no_negative_one(ops):
    pre = normal(2, 20, 64).at[:, ::2].set(-jnp.inf).at[3, 7].set(jnp.inf)
    kept = np.asarray(ops.batch_top_k(pre, 4).dense(20, 64))
    np.testing.assert_array_equal(kept, brute_batch_top_k(pre, 80))


def test_a_batch_without_positive_numbers_has_no_codes_and_a_threshold_of_zero(ops):
    picked = ops.batch_top_k(-jnp.abs(normal(0, 6, 32)), 3)
    assert not np.asarray(picked.values).any()
    assert float(least_active(picked)) == 0


def test_batch_top_k_gives_its_codes_in_the_order_of_the_tokens(ops):
    rows = np.asarray(ops.batch_top_k(normal(1, 30, 64), 4).rows).ravel()
    assert (np.diff(rows) >= 0).all()
    assert len(set(rows.tolist())) > 20


def test_a_limit_lets_only_so_many_count(ops):
    pre, limit = normal(3, 20, 64), jnp.int32(3)
    np.testing.assert_array_equal(ops.top_k(pre, 8, limit).dense(20, 64), ops.top_k(pre, 3).dense(20, 64))
    np.testing.assert_array_equal(ops.abs_top_k(pre, 8, limit).dense(20, 64), ops.abs_top_k(pre, 3).dense(20, 64))
    np.testing.assert_array_equal(ops.batch_top_k(pre, 8, limit).dense(20, 64), brute_batch_top_k(pre, 60))


@pytest.mark.parametrize("name", ["top_k", "abs_top_k", "batch_top_k"])
def test_a_bias_is_added_before_the_selection(ops, name):
    pre, bias = normal(4, 30, 96), normal(5, 96)
    ours = getattr(ops, name)(pre, 5, None, bias).dense(30, 96)
    np.testing.assert_allclose(ours, getattr(ops, name)(pre + bias, 5).dense(30, 96), rtol=1e-6)


def test_abs_top_k_keeps_signs(ops):
    pre = jnp.array([[1.0, -3.0, 2.0, 0.5]])
    np.testing.assert_array_equal(ops.abs_top_k(pre, 2).dense(1, 4), [[0, -3, 2, 0]])


@pytest.mark.parametrize(("n", "f", "k"), SHAPES)
def test_abs_top_k_is_exact(ops, n, f, k):
    pre = normal(f, n, f)
    indices = np.argsort(-np.abs(pre), axis=1)[:, :k]
    np.testing.assert_array_equal(ops.abs_top_k(pre, k).values, np.take_along_axis(np.asarray(pre), indices, 1))


def test_minus_infinity_is_the_smallest_magnitude(ops):
    """It marks latents that must not be selected."""
    pre = normal(6, 20, 96).at[:, ::4].set(-jnp.inf)
    assert not (np.asarray(ops.abs_top_k(pre, 5).indices) % 4 == 0).any()


@pytest.mark.parametrize("count", [1, 7, 100, 101])
def test_kth_largest_is_exact(count):
    values = jnp.abs(normal(0, 10, 10)) * jnp.exp(3 * normal(1, 10, 10))
    expected = np.sort(np.asarray(values).ravel())[-count] if count <= 100 else 0
    assert float(selection.kth_largest(values, count)) == expected
