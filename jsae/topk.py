"""Which latents are active: exact top-k per token and per batch, without sorting all of them."""

import inspect
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jsae import paths
from jsae.codes import Codes


def top_k(
    pre: Float[Array, "n f"],
    k: int,
    limit: Int[Array, ""] | None = None,
    bias: Float[Array, " f"] | None = None,
) -> Codes:
    """The k largest of every row of pre (+ bias), largest first, sorting about 2 sqrt(f k) numbers instead of f.

    Latents are dealt into groups; every one of the k largest lies in one of the k groups with the largest maxima
    (Dr. Top-k's delegates), so only those groups are sorted. Equal values may come in another order than `lax.top_k`'s.
    With a `limit` only the first so many of them keep their value. The sum with the bias is never written down.

    Raises:
      ValueError: k is not between 1 and f.
    """
    n, f = pre.shape
    if not 1 <= k <= f:
        raise ValueError(f"top_k of k={k} out of {f} latents: k must be between 1 and {f}")
    bias = jnp.zeros(f, pre.dtype) if bias is None else bias
    g = _group_size(f, k)
    if g == 1:
        return _first(Codes(*_sorted_top_k(pre + bias, k)), limit)
    grouped = pre.reshape(n, g, f // g)  # latent i*(f//g) + j is member i of group j: the maximum runs along vectors
    biases = bias.reshape(g, f // g)
    _, groups = _sorted_top_k((grouped + biases).max(axis=1), k)
    members = jnp.take_along_axis(grouped, groups[:, None, :], axis=2) + biases[:, groups].transpose(1, 0, 2)
    values, where = _sorted_top_k(members.reshape(n, g * k), k)
    indices = where // k * (f // g) + jnp.take_along_axis(groups, where % k, axis=1)
    return _first(Codes(values, indices), limit)


def abs_top_k(
    pre: Float[Array, "n f"],
    k: int,
    limit: Int[Array, ""] | None = None,
    bias: Float[Array, " f"] | None = None,
) -> Codes:
    """The k of every row of pre (+ bias) with the largest magnitude, with their signs.

    Raises:
      ValueError: k is not between 1 and f.
    """
    pre = pre if bias is None else pre + bias
    codes = top_k(jnp.abs(pre), k)
    return _first(codes._replace(values=jnp.take_along_axis(pre, codes.indices, axis=1)), limit)


def batch_top_k(
    pre: Float[Array, "n f"],
    k: int,
    limit: Int[Array, ""] | None = None,
    bias: Float[Array, " f"] | None = None,
) -> Codes:
    """The n k largest positive numbers of the whole batch of pre (+ bias): on average k a token, in token order.

    Where fewer are positive the rest has value 0; of equal values at the threshold any may be taken. With a `limit`
    the n limit largest. Latents are dealt into groups, as for `top_k`: whatever is among the n k largest of all lies in
    one of the n k groups with the largest maxima, since these are n k numbers that are as large. So thresholds are
    searched twice among about n sqrt(f k) numbers, and nothing is sorted.

    Raises:
      ValueError: k is not between 1 and f.
    """
    n, f = pre.shape
    if not 1 <= k <= f:
        raise ValueError(f"batch_top_k of k={k} out of {f} latents: k must be between 1 and {f}")
    bias = jnp.zeros(f, pre.dtype) if bias is None else bias
    count = n * (k if limit is None else limit)
    g = _group_size(f, k)
    maxima = (pre.reshape(n, g, f // g) + bias.reshape(g, f // g)).max(axis=1)
    where, real = _chosen(maxima, count, n * k)
    latents = where[:, None] % (f // g) + jnp.arange(0, f, f // g)
    rows = where // (f // g)
    members = jnp.where(real[:, None], pre[rows[:, None], latents] + bias[latents], 0)
    where, real = _chosen(members.reshape(n, -1), count, n * k)
    found = (jnp.where(real, members.ravel()[where], 0), latents.ravel()[where], rows[where // g])
    return Codes(*(a.reshape(n, k) for a in found))


def kth_largest(values: Float[Array, "n w"], k: int | Int[Array, ""]) -> Float[Array, ""]:
    """The k-th largest of all positive numbers, exactly; 0 where fewer than k are positive.

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
    """Places of the `count` largest positive values, in order, padded to `size`; and which of them are real."""
    least = kth_largest(values, count)
    above, at = values > least, (values == least) & (values > 0)
    room = count - above.sum()
    # Of values that are all equal to the threshold only so many as there is room for.
    chosen = lax.cond(at.sum() > room, lambda: above | _first_true(at, room), lambda: above | at)
    (where,) = jnp.nonzero(chosen.ravel(), size=size, fill_value=values.size)
    return jnp.minimum(where, values.size - 1), where < values.size


def _first_true(mask: Bool[Array, "m w"], count: Int[Array, ""]) -> Bool[Array, "m w"]:
    return mask & (jnp.cumsum(mask.ravel()).reshape(mask.shape) <= count)


def least_active(codes: Codes) -> Float[Array, ""]:
    """The smallest value above 0: the batch's threshold. 0 where there is none."""
    least = jnp.where(codes.values > 0, codes.values, jnp.inf).min()
    return jnp.where(jnp.isinf(least), 0, least)


def _sorted_top_k(values: Float[Array, "n w"], k: int) -> tuple[Float[Array, "n k"], Int[Array, "n k"]]:
    """`lax.top_k`, without the order of equal values where jax can do without it: on a GPU that is the faster one."""
    unstable = {"is_stable": False} if "is_stable" in inspect.signature(lax.top_k).parameters else {}
    how = unstable if jax.default_backend() != "cpu" else {}
    pieces = paths.chosen().sorts
    if pieces == 1 or len(values) % pieces:
        return tuple(lax.top_k(values, k, **how))
    found = [lax.top_k(piece, k, **how) for piece in jnp.split(values, pieces)]
    return tuple(jnp.concatenate(parts) for parts in zip(*found, strict=True))


def _first(codes: Codes, limit: Int[Array, ""] | None) -> Codes:
    """Codes with the values behind the first `limit` of each token set to 0."""
    if limit is None:
        return codes
    return codes._replace(values=jnp.where(jnp.arange(codes.values.shape[1]) < limit, codes.values, 0))


def _group_size(f: int, k: int) -> int:
    """The divisor of f nearest to sqrt(f / k): it balances the two sorts. 1 where nothing is gained."""
    goal = math.sqrt(f / k)
    divisors = [g for g in range(1, int(2 * goal) + 1) if f % g == 0 and f // g >= k]
    return min(divisors, key=lambda g: abs(g - goal), default=1)
