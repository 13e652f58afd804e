"""Sparse codes: encode and decode that touch only the rows a token uses, with gradients that stay sparse.

The one array of n × f numbers that exists on this path is the pre-activations. The dense forms are the tests' oracle.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jsae import paths, precision


class Codes(NamedTuple):
    """Active latents: `values[i, j]` of latent `indices[i, j]` for token `rows[i, j]`.

    Without `rows`, row i is token i: k codes for every token. With them, tokens may have any number of codes.
    """

    values: Float[Array, "n k"]
    indices: Int[Array, "n k"]
    rows: Int[Array, "n k"] | None = None

    def dense(self, n: int, d_sae: int) -> Float[Array, "n f"]:
        """The same codes as an (n, d_sae) array."""
        return jnp.zeros((n, d_sae), self.values.dtype).at[self.tokens, self.indices].add(self.values)

    @property
    def tokens(self) -> Int[Array, "n #k"]:
        """The token of every code."""
        return jnp.arange(len(self.values))[:, None] if self.rows is None else self.rows


class Input(NamedTuple):
    """What an encoder reads of n tokens, x * scale - b_in, never written down whole; None leaves a part out."""

    x: Float[Array, "n d"]
    scale: Float[Array, "*d"] | None = None
    b_in: Float[Array, " d"] | None = None

    def read(self, tokens: Int[Array, " m"] | None = None) -> Float[Array, "m d"]:
        """What is read of some tokens, or of all."""
        x = self.x if tokens is None else self.x[tokens]
        x = x if self.scale is None else x * self.scale
        return x if self.b_in is None else x - self.b_in


Select = Callable[..., Codes]
"""`select(product, bias=bias, limit=limit)` picks codes out of pre-activations `product + bias`, (n, f): their raw
values. With a `limit` only so many per token count; the others have value 0."""


def decode(
    codes: Codes, W_dec: Float[Array, "f d"], n: int, onto: Float[Array, "n d"] | None = None
) -> Float[Array, "n d"]:
    """out[t] = sum of values[i, j] * W_dec[indices[i, j]] over the codes of token t, added `onto` what is given."""
    return _decode(codes, W_dec, onto, n)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _decode(codes: Codes, W_dec: Float[Array, "f d"], onto: Float[Array, "n d"] | None, n: int) -> Float[Array, "n d"]:
    return _sum_of_rows(codes, W_dec, n, onto)


def _decode_forward(codes, W_dec, onto, n):
    return _sum_of_rows(codes, W_dec, n, onto), (codes, W_dec, onto is None)


def _decode_backward(n, saved, g):
    codes, W_dec, alone = saved
    return _cotangent(codes, _dots(codes, g, W_dec)), _rows_added(codes, Input(g), len(W_dec)), None if alone else g


_decode.defvjp(_decode_forward, _decode_backward)


_GATHERED = 256  # rows that are multiplied at once with the one of their token


def _dots(codes: Codes, g: Float[Array, "n d"], W_dec: Float[Array, "f d"]) -> Float[Array, "m k"]:
    """g[token] . W_dec[latent] of every code."""
    way = _way(codes, len(g))
    if way == "dense":
        return precision.matmul(g, W_dec.T)[codes.tokens, codes.indices]
    if way == "at once":
        return (g[:, None] * W_dec[codes.indices]).sum(-1)

    m, k = codes.values.shape
    if codes.rows is None:
        few = paths.part_of(m, max(_GATHERED // k, 1))

        def product(part: tuple[Float[Array, "t d"], Int[Array, "t k"]]) -> Float[Array, "t k"]:
            return jnp.einsum("td,tkd->tk", part[0], W_dec[part[1]])

        parts = (g.reshape(-1, few, g.shape[1]), codes.indices.reshape(-1, few, k))
        return lax.map(product, parts).reshape(m, k)

    def dot(j: Int[Array, ""], dvalues: Float[Array, "k m"]) -> Float[Array, "k m"]:
        part = _part(codes, j)
        return dvalues.at[j].set((g[part.rows] * W_dec[part.indices]).sum(-1))

    return lax.fori_loop(0, k, dot, jnp.zeros((k, m), codes.values.dtype)).reshape(m, k)


def pre_activations(given: Input, W_enc: Float[Array, "f d"], b_enc: Float[Array, " f"]) -> Float[Array, "n f"]:
    """(x * scale - b_in) W_enc^T + b_enc, with b_in moved into the bias: its gradient needs no n × f × d product."""
    centred, bias = _centred(given, W_enc, b_enc)
    return precision.matmul(centred.read(), W_enc.T) + bias


def _centred(given: Input, W_enc: Float[Array, "f d"], b_enc: Float[Array, " f"]) -> tuple[Input, Float[Array, " f"]]:
    """What pre-activations are the product with, and the bias beside it: a selection need not write their sum down.

    Where numbers are rounded before they are multiplied, what they have in common is taken away from them before, or
    it would cost the digits that tell them apart. It goes by a copy that has no gradient; the bias has the gradient.
    """
    if given.b_in is None:
        return given, b_enc
    if not precision.is_reduced():
        return given._replace(b_in=None), b_enc - W_enc @ given.b_in
    centre = lax.stop_gradient(given.b_in)
    return given._replace(b_in=centre), b_enc - W_enc @ (given.b_in - centre)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def encode(
    given: Input,
    W_enc: Float[Array, "f d"],
    b_enc: Float[Array, " f"],
    allowed: Bool[Array, " f"] | None,
    limit: Int[Array, ""] | None,
    select: Select,
    by_token: bool = True,
) -> Codes:
    """The codes that `select` picks out of the pre-activations of the `allowed` latents (None: all), raw: no ReLU.

    A pick that had to fall on a latent that is not allowed has value 0. Gradients reach only what was picked, and none
    reaches the scale. Where `select` picks `by_token`, whatever the other tokens are, the pre-activations of all tokens
    need not exist at once.
    """
    centred, bias = _centred(given, W_enc, b_enc)
    if allowed is not None:
        bias = jnp.where(allowed, bias, -jnp.inf)

    def pick(x: Float[Array, "m d"]) -> Codes:
        return select(precision.matmul(centred._replace(x=x).read(), W_enc.T), bias=bias, limit=limit)

    n, d = given.x.shape
    chunk = paths.chosen().chunk_of(n, d, len(W_enc)) if by_token else n
    chunks = lax.map(pick, given.x.reshape(-1, chunk, d)) if chunk < n else pick(given.x)
    codes = jax.tree.map(lambda a: a.reshape(n, -1), chunks)
    if allowed is None:
        return codes
    return codes._replace(values=jnp.where(jnp.isneginf(codes.values), 0, codes.values))


def _encode_forward(given, W_enc, b_enc, allowed, limit, select, by_token):
    codes = encode(given, W_enc, b_enc, allowed, limit, select, by_token)
    return codes, (given, W_enc, allowed, limit, codes)


def _encode_backward(select, by_token, saved, g):
    given, W_enc, allowed, limit, codes = saved
    # What was only picked to fill up has value 0 and is no function of the weights.
    dvalues = jnp.where(codes.values == 0, 0, g.values)
    dcodes = codes._replace(values=dvalues)
    db_enc = jnp.zeros(len(W_enc), dvalues.dtype).at[codes.indices].add(dvalues)
    dW_enc = _rows_added(dcodes, given, len(W_enc))
    dx = _sum_of_rows(dcodes, W_enc, len(given.x))  # removed by the compiler where x is data
    dgiven = Input(
        dx if given.scale is None else dx * given.scale,
        None if given.scale is None else jnp.zeros_like(given.scale),
        None if given.b_in is None else -(db_enc @ W_enc),
    )
    nothing = [None if a is None else _no_gradient(a) for a in (allowed, limit)]
    return dgiven, dW_enc, db_enc, *nothing


encode.defvjp(_encode_forward, _encode_backward)


class _Part(NamedTuple):
    """As many codes as there are tokens: one of every token, or with `rows` the next so many."""

    values: Float[Array, " m"]
    indices: Int[Array, " m"]
    rows: Int[Array, " m"] | None


def _part(codes: Codes, j: Int[Array, ""]) -> _Part:
    """The j-th of k parts. Codes with rows are in the order of their tokens, so that a part touches few of them."""
    m, k = codes.values.shape
    if codes.rows is None:
        return _Part(codes.values[:, j], codes.indices[:, j], None)
    return _Part(*(a.reshape(k, m)[j] for a in codes))


def _way(codes: Codes, n: int) -> str:
    """How codes of n tokens are decoded: what has any number of codes a token cannot be summed up at once."""
    way = paths.chosen().decode
    if way != "at once" or codes.rows is None:
        return way
    return "dense" if n == len(codes.values) else "by part"  # of more tokens than the batch has: nested widths


def _sum_of_rows(
    codes: Codes, W: Float[Array, "f d"], n: int, onto: Float[Array, "n d"] | None = None
) -> Float[Array, "n d"]:
    """The decode, a part of the codes at a time, so that an array of n × k × d never exists."""
    start = jnp.zeros((n, W.shape[1]), jnp.result_type(codes.values, W)) if onto is None else onto
    way = _way(codes, n)
    if way == "dense":
        return start + precision.matmul(codes.dense(n, len(W)), W)
    if way == "at once":
        return start + (codes.values[..., None] * W[codes.indices]).sum(1)

    def add(j: Int[Array, ""], total: Float[Array, "n d"]) -> Float[Array, "n d"]:
        part = _part(codes, j)
        new = part.values[:, None] * W[part.indices]
        return total + new if part.rows is None else total.at[part.rows].add(new)

    return lax.fori_loop(0, codes.values.shape[1], add, start)


def _rows_added(codes: Codes, given: Input, f: int) -> Float[Array, "f d"]:
    """out[i] = sum of values * what is read of token, over all codes of latent i: the gradient of a weight matrix."""
    way = paths.chosen().gradients
    if way == "sorted":
        return _rows_added_in_order(codes, given, f)
    if way == "dense":
        return precision.matmul(codes.dense(len(given.x), f).T, given.read())

    def add(j: Int[Array, ""], total: Float[Array, "f d"]) -> Float[Array, "f d"]:
        part = _part(codes, j)
        return total.at[part.indices].add(part.values[:, None] * given.read(part.rows))

    return lax.fori_loop(0, codes.values.shape[1], add, jnp.zeros((f, given.x.shape[1]), given.x.dtype))


_PAIRS = 1024  # codes that are added at once


def _rows_added_in_order(codes: Codes, given: Input, f: int) -> Float[Array, "f d"]:
    """The same with the codes in the order of their latents, so that each row of the sum is in the cache but once."""
    k, count = codes.values.shape[1], codes.values.size
    order = _order(codes.indices.ravel(), f)
    order = jnp.pad(order, (0, -count % _PAIRS), constant_values=count)  # codes of value 0, in the last row

    def add(i: Int[Array, ""], total: Float[Array, "f d"]) -> Float[Array, "f d"]:
        at = lax.dynamic_slice_in_dim(order, i * _PAIRS, _PAIRS)
        latents = codes.indices.ravel().at[at].get(mode="fill", fill_value=f - 1)
        values = codes.values.ravel().at[at].get(mode="fill", fill_value=0)
        tokens = at // k if codes.rows is None else codes.rows.ravel()[at]
        return total.at[latents].add(values[:, None] * given.read(tokens), indices_are_sorted=True)

    # Zeros that the compiler does not know: it would make known ones once, and a copy for every use.
    zero = jnp.minimum(lax.bitcast_convert_type(codes.values[0, 0], jnp.int32) & 1, 0).astype(codes.values.dtype)
    return lax.fori_loop(0, len(order) // _PAIRS, add, jnp.broadcast_to(zero, (f, given.x.shape[1])))


def _order(indices: Int[Array, " c"], f: int) -> Int[Array, " c"]:
    """The permutation that sorts latents. Number and place in one word sort several times as fast as a pair of them."""
    count = indices.size
    if f * count > 2**32:
        return jnp.argsort(indices)
    words = indices.astype(jnp.uint32) * count + jnp.arange(count, dtype=jnp.uint32)
    return (lax.sort(words, is_stable=False) % count).astype(jnp.int32)


def _cotangent(codes: Codes, dvalues: Float[Array, "n k"]) -> Codes:
    rows = None if codes.rows is None else _no_gradient(codes.rows)
    return Codes(dvalues, _no_gradient(codes.indices), rows)


def _no_gradient(x: Array) -> np.ndarray:
    """The cotangent that jax asks for of an array that is not of floats."""
    return np.zeros(x.shape, jax.dtypes.float0)
