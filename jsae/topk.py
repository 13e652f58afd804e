"""Sparse codes: exact two-stage top-k, the decode of a few rows per token, and gradients that stay sparse.

The one array of n × f numbers that exists on this path is the pre-activations; forward and backward otherwise touch
only the k rows that a token uses. The dense forms are the tests' oracle.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int


class Codes(NamedTuple):
    """The active latents of n tokens: `values[n, j]` of latent `indices[n, j]`, largest first, distinct in a row."""

    values: Float[Array, "n k"]
    indices: Int[Array, "n k"]

    def dense(self, d_sae: int) -> Float[Array, "n f"]:
        """The same codes as an (n, d_sae) array."""
        rows = jnp.arange(self.values.shape[0])[:, None]
        return jnp.zeros((self.values.shape[0], d_sae), self.values.dtype).at[rows, self.indices].add(self.values)


def _group_size(f: int, k: int) -> int:
    """The divisor of f nearest to sqrt(f / k): it balances the two sorts. 1 where nothing is gained."""
    goal = math.sqrt(f / k)
    divisors = [g for g in range(1, int(2 * goal) + 1) if f % g == 0 and f // g >= k]
    return min(divisors, key=lambda g: abs(g - goal), default=1)


def top_k(pre: Float[Array, "n f"], k: int) -> Codes:
    """The k largest of every row, exactly, sorting about 2 sqrt(f k) numbers instead of f.

    Latents are dealt into groups; every one of the k largest lies in one of the k groups with the largest maxima
    (Dr. Top-k's delegates), so only those groups are sorted. Equal values may come in another order than `lax.top_k`'s.

    Raises:
      ValueError: k is not between 1 and f.
    """
    n, f = pre.shape
    if not 1 <= k <= f:
        raise ValueError(f"top_k of k={k} out of {f} latents: k must be between 1 and {f}")
    g = _group_size(f, k)
    if g == 1:
        return Codes(*lax.top_k(pre, k))
    grouped = pre.reshape(n, g, f // g)  # latent i*(f//g) + j is member i of group j: the maximum runs along vectors
    _, groups = lax.top_k(grouped.max(axis=1), k)
    members = jnp.take_along_axis(grouped, groups[:, None, :], axis=2).reshape(n, g * k)
    values, where = lax.top_k(members, k)
    indices = where // k * (f // g) + jnp.take_along_axis(groups, where % k, axis=1)
    return Codes(values, indices)


def _sum_of_rows(codes: Codes, W: Float[Array, "f d"]) -> Float[Array, "n d"]:
    """out[n] = sum_j values[n, j] * W[indices[n, j]], one j at a time so that (n, k, d) never exists."""

    def add(j: Int[Array, ""], total: Float[Array, "n d"]) -> Float[Array, "n d"]:
        return total + codes.values[:, j, None] * W[codes.indices[:, j]]

    zero = jnp.zeros((codes.values.shape[0], W.shape[1]), jnp.result_type(codes.values, W))
    return lax.fori_loop(0, codes.values.shape[1], add, zero)


def _rows_added(codes: Codes, x: Float[Array, "n d"], f: int) -> Float[Array, "f d"]:
    """out[i] = sum of values[n, j] * x[n] over all (n, j) with indices[n, j] = i: the gradient of a weight matrix."""

    def add(j: Int[Array, ""], total: Float[Array, "f d"]) -> Float[Array, "f d"]:
        return total.at[codes.indices[:, j]].add(codes.values[:, j, None] * x)

    return lax.fori_loop(0, codes.values.shape[1], add, jnp.zeros((f, x.shape[1]), x.dtype))


@jax.custom_vjp
def decode(codes: Codes, W_dec: Float[Array, "f d"]) -> Float[Array, "n d"]:
    """x_hat[n] = sum_j values[n, j] * W_dec[indices[n, j]]  (no bias)."""
    return _sum_of_rows(codes, W_dec)


def _decode_forward(codes: Codes, W_dec: Float[Array, "f d"]) -> tuple[Float[Array, "n d"], tuple]:
    return _sum_of_rows(codes, W_dec), (codes, W_dec)


def _decode_backward(saved: tuple, g: Float[Array, "n d"]) -> tuple[Codes, Float[Array, "f d"]]:
    codes, W_dec = saved

    def dot(j: Int[Array, ""], dvalues: Float[Array, "k n"]) -> Float[Array, "k n"]:
        return dvalues.at[j].set((g * W_dec[codes.indices[:, j]]).sum(-1))

    n, k = codes.values.shape
    dvalues = lax.fori_loop(0, k, dot, jnp.zeros((k, n), codes.values.dtype)).T
    return Codes(dvalues, _no_gradient(codes.indices)), _rows_added(codes, g, W_dec.shape[0])


decode.defvjp(_decode_forward, _decode_backward)


def pre_activations(
    x: Float[Array, "n d"], W_enc: Float[Array, "f d"], b_enc: Float[Array, " f"], b_dec: Float[Array, " d"]
) -> Float[Array, "n f"]:
    """(x - b_dec) W_enc^T + b_enc, with b_dec moved into the bias: its gradient needs no n × f × d product."""
    return jnp.matmul(x, W_enc.T, preferred_element_type=jnp.float32) + (b_enc - W_enc @ b_dec)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def encode(
    x: Float[Array, "n d"],
    W_enc: Float[Array, "f d"],
    b_enc: Float[Array, " f"],
    b_dec: Float[Array, " d"],
    allowed: Bool[Array, " f"] | None,
    k: int,
) -> Codes:
    """The k largest pre-activations of every token among the `allowed` latents (None: all), raw: no ReLU.

    Where fewer than k latents are allowed the rest of the row has value 0. Gradients reach only what was picked.
    """
    pre = pre_activations(x, W_enc, b_enc, b_dec)
    if allowed is None:
        return top_k(pre, k)
    codes = top_k(jnp.where(allowed, pre, -jnp.inf), k)
    return codes._replace(values=jnp.where(jnp.isneginf(codes.values), 0, codes.values))


def _encode_forward(x, W_enc, b_enc, b_dec, allowed, k):
    codes = encode(x, W_enc, b_enc, b_dec, allowed, k)
    return codes, (x, W_enc, b_dec, allowed, codes.indices)


def _encode_backward(k, saved, g):
    x, W_enc, b_dec, allowed, indices = saved
    dvalues = g.values if allowed is None else jnp.where(allowed[indices], g.values, 0)
    dcodes = Codes(dvalues, indices)
    db_enc = jnp.zeros(W_enc.shape[0], x.dtype).at[indices].add(dvalues)
    dW_enc = _rows_added(dcodes, x - b_dec, W_enc.shape[0])
    dx = _sum_of_rows(dcodes, W_enc)  # removed by the compiler where x is data
    return dx, dW_enc, db_enc, -(db_enc @ W_enc), None if allowed is None else _no_gradient(allowed)


encode.defvjp(_encode_forward, _encode_backward)


def _no_gradient(x: Array) -> np.ndarray:
    """The cotangent that jax asks for of an array that is not of floats."""
    return np.zeros(x.shape, jax.dtypes.float0)
