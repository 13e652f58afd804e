"""Exact selection without sorting all latents: two-stage top-k per token, and thresholds for a whole batch."""

import math
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jsae.ops import reference
from jsae.ops.types import Codes

Sort = Callable[[Float[Array, "n w"], int], tuple[Float[Array, "n k"], Int[Array, "n k"]]]
"""`lax.top_k`, or something that returns the same."""


def largest(
    pre: Float[Array, "n f"], k: int, bias: Float[Array, " f"] | None, sort: Sort, *, magnitudes: bool
) -> Codes:
    """Return the k largest of every row of pre (+ bias), or those of the largest magnitude, the largest first."""
    if not magnitudes:
        return top_k(pre, k, bias, sort)
    pre = pre if bias is None else pre + bias
    codes = top_k(reference.magnitudes(pre), k, None, sort)
    return codes._replace(values=jnp.take_along_axis(pre, codes.indices, axis=1))


def top_k(pre: Float[Array, "n f"], k: int, bias: Float[Array, " f"] | None, sort: Sort) -> Codes:
    """Return the k largest of every row of pre (+ bias), sorting about 2 sqrt(f k) numbers instead of f.

    Latents are dealt into groups; every one of the k largest lies in one of the k groups with the largest maxima
    (the delegates of Dr. Top-k, Gaihre et al. 2021), so only those groups are sorted. The sum with the bias is never
    an array of its own.
    """
    n, f = pre.shape
    bias = jnp.zeros(f, pre.dtype) if bias is None else bias
    g = group_size(f, k)
    if g == 1:
        return Codes(*sort(pre + bias, k))
    grouped = pre.reshape(n, g, f // g)  # latent i*(f//g) + j is member i of group j: the maximum runs along vectors
    biases = bias.reshape(g, f // g)
    _, groups = sort((grouped + biases).max(axis=1), k)
    members = jnp.take_along_axis(grouped, groups[:, None, :], axis=2) + biases[:, groups].transpose(1, 0, 2)
    values, where = sort(members.reshape(n, g * k), k)
    indices = where // k * (f // g) + jnp.take_along_axis(groups, where % k, axis=1)
    return Codes(values, indices)


def batch_top_k(
    pre: Float[Array, "n f"], k: int, limit: Int[Array, ""] | None, bias: Float[Array, " f"] | None
) -> Codes:
    """Return the n k largest positive entries of pre (+ bias), in the order of their tokens; nothing is sorted.

    Latents are dealt into groups as in `top_k`: whatever is among the n k largest of all lies in one of the n k groups
    with the largest maxima, since these are n k numbers that are as large. So a threshold is searched twice among
    about n sqrt(f k) numbers.
    """
    n, f = pre.shape
    bias = jnp.zeros(f, pre.dtype) if bias is None else bias
    count = n * (k if limit is None else limit)
    g = group_size(f, k)
    maxima = (pre.reshape(n, g, f // g) + bias.reshape(g, f // g)).max(axis=1)
    where, real = _chosen(maxima, count, n * k)
    latents = where[:, None] % (f // g) + jnp.arange(0, f, f // g)
    rows = where // (f // g)
    members = jnp.where(real[:, None], pre[rows[:, None], latents] + bias[latents], 0)
    where, real = _chosen(members.reshape(n, -1), count, n * k)
    parts = (jnp.where(real, members.ravel()[where], 0), latents.ravel()[where], rows[where // g])
    return Codes(*(a.reshape(n, k) for a in parts))


def kth_largest(values: Float[Array, "n w"], k: int | Int[Array, ""]) -> Float[Array, ""]:
    """Return the k-th largest of all positive numbers, exactly; 0 where fewer than k are positive.

    Positive floats are ordered like their bits: the answer is built bit by bit, with one count over all values each.
    """
    bits = jnp.where(values > 0, lax.bitcast_convert_type(values, jnp.int32), 0)
    ones = jnp.ones(values.shape[1], jnp.float32)

    def decide(i: Int[Array, ""], found: Int[Array, ""]) -> Int[Array, ""]:
        bit = found | (jnp.int32(1) << (30 - i))
        counts = (bits >= bit).astype(jnp.float32) @ ones  # row by row: a product counts faster than a sum
        return jnp.where(counts.astype(jnp.int32).sum() >= k, bit, found)

    return lax.bitcast_convert_type(lax.fori_loop(0, 31, decide, jnp.int32(0)), jnp.float32)


def _chosen(
    values: Float[Array, "m w"], count: int | Int[Array, ""], size: int
) -> tuple[Int[Array, " size"], Bool[Array, " size"]]:
    """Return the places of the `count` largest positive values, in order, padded to `size`; and what is no padding."""
    least = kth_largest(values, count)
    above, at = values > least, (values == least) & (values > 0)
    room = count - above.sum()
    # Of values that are all equal to the threshold only so many as there is room for.
    chosen = lax.cond(at.sum() > room, lambda: above | _first_true(at, room), lambda: above | at)
    (where,) = jnp.nonzero(chosen.ravel(), size=size, fill_value=values.size)
    return jnp.minimum(where, values.size - 1), where < values.size


def _first_true(mask: Bool[Array, "m w"], count: Int[Array, ""]) -> Bool[Array, "m w"]:
    return mask & (jnp.cumsum(mask.ravel()).reshape(mask.shape) <= count)


def group_size(f: int, k: int) -> int:
    """Return the divisor of f nearest to sqrt(f / k), which balances the two sorts; 1 where nothing is gained."""
    goal = math.sqrt(f / k)
    divisors = [g for g in range(1, int(2 * goal) + 1) if f % g == 0 and f // g >= k]
    return min(divisors, key=lambda g: abs(g - goal), default=1)
