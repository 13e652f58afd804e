"""Which latents are active: exact top-k per token and per batch, without sorting all of them."""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

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
        return _first(Codes(*lax.top_k(pre + bias, k)), limit)
    grouped = pre.reshape(n, g, f // g)  # latent i*(f//g) + j is member i of group j: the maximum runs along vectors
    biases = bias.reshape(g, f // g)
    _, groups = lax.top_k((grouped + biases).max(axis=1), k)
    members = jnp.take_along_axis(grouped, groups[:, None, :], axis=2) + biases[:, groups].transpose(1, 0, 2)
    values, where = lax.top_k(members.reshape(n, g * k), k)
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
    the n limit largest. The threshold is found among the 4k largest of every token, which hold all that are above it
    unless some token has more; then it is found among all.

    Raises:
      ValueError: k is not between 1 and f.
    """
    n, f = pre.shape
    count = n * (k if limit is None else limit)
    best = top_k(pre, min(4 * k, f), bias=bias)
    threshold = kth_largest(best.values, count)
    # A token whose smallest candidate is itself above the threshold may have lost others that are, too.
    cut_off = (best.values[:, -1] >= jnp.maximum(threshold, _TINY)).any() & (best.values.shape[1] < f)

    def among_the_best() -> Codes:
        return _above(best.values, best.indices, threshold, k)

    def among_all() -> Codes:
        every = pre if bias is None else pre + bias
        return _above(every, jnp.broadcast_to(jnp.arange(f), (n, f)), kth_largest(every, count), k)

    return lax.cond(cut_off, among_all, among_the_best)


def kth_largest(values: Float[Array, "..."], k: int | Int[Array, ""]) -> Float[Array, ""]:
    """The k-th largest of all positive numbers, exactly; 0 where fewer than k are positive.

    Positive floats are ordered like their bits: the answer is built bit by bit, with one count over all values each.
    """
    bits = jnp.where(values > 0, lax.bitcast_convert_type(values, jnp.int32), 0)

    def decide(i: Int[Array, ""], found: Int[Array, ""]) -> Int[Array, ""]:
        bit = found | (jnp.int32(1) << (30 - i))
        return jnp.where((bits >= bit).sum() >= k, bit, found)

    return lax.bitcast_convert_type(lax.fori_loop(0, 31, decide, jnp.int32(0)), jnp.float32)


def least_active(codes: Codes) -> Float[Array, ""]:
    """The smallest value above 0: the batch's threshold. 0 where there is none."""
    least = jnp.where(codes.values > 0, codes.values, jnp.inf).min()
    return jnp.where(jnp.isinf(least), 0, least)


def _first(codes: Codes, limit: Int[Array, ""] | None) -> Codes:
    """Codes with the values behind the first `limit` of each token set to 0."""
    if limit is None:
        return codes
    return codes._replace(values=jnp.where(jnp.arange(codes.values.shape[1]) < limit, codes.values, 0))


_TINY = 1.1754944e-38  # the smallest normal float32


def _above(values: Float[Array, "n w"], indices: Int[Array, "n w"], threshold: Float[Array, ""], k: int) -> Codes:
    """The first n k positive values from the threshold up, as n rows of k codes; filled up with zeros of token 0."""
    n, w = values.shape
    chosen: Bool[Array, "n w"] = (values >= threshold) & (values > 0)
    (where,) = jnp.nonzero(chosen.ravel(), size=n * k, fill_value=n * w)
    real = where < n * w
    where = jnp.minimum(where, n * w - 1)
    kept = jnp.where(real, values.ravel()[where], 0)
    return Codes(*(a.reshape(n, k) for a in (kept, indices.ravel()[where], where // w)))


def _group_size(f: int, k: int) -> int:
    """The divisor of f nearest to sqrt(f / k): it balances the two sorts. 1 where nothing is gained."""
    goal = math.sqrt(f / k)
    divisors = [g for g in range(1, int(2 * goal) + 1) if f % g == 0 and f // g >= k]
    return min(divisors, key=lambda g: abs(g - goal), default=1)
