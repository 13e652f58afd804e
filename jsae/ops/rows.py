"""Sums over codes, one code of every token at a time, or by dense products: building blocks of the implementations."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jsae.ops.types import Codes, Input

_GATHERED = 256  # rows that are multiplied at once with the one of their token

Matmul = Callable[[Float[Array, "n m"], Float[Array, "m o"]], Float[Array, "n o"]]


class Part(NamedTuple):
    """As many codes as there are tokens: one of every token, or with `rows` the next so many."""

    values: Float[Array, " m"]
    indices: Int[Array, " m"]
    rows: Int[Array, " m"] | None


def part(codes: Codes, j: Int[Array, ""]) -> Part:
    """Return the j-th of k parts. Codes with rows are in the order of their tokens, so that a part touches few."""
    m, k = codes.values.shape
    if codes.rows is None:
        return Part(codes.values[:, j], codes.indices[:, j], None)
    return Part(*(a.reshape(k, m)[j] for a in codes))


def decoded_by_part(codes: Codes, W: Float[Array, "f d"], start: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """Decode one code of every token at a time, so that an array of n x k x d never exists."""

    def add(j: Int[Array, ""], total: Float[Array, "n d"]) -> Float[Array, "n d"]:
        one = part(codes, j)
        new = one.values[:, None] * W[one.indices]
        return total + new if one.rows is None else total.at[one.rows].add(new)

    return lax.fori_loop(0, codes.values.shape[1], add, start)


def decoded_at_once(codes: Codes, W: Float[Array, "f d"], start: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """Decode k codes of every token in one sum, which a compiler for GPUs fuses with the gather."""
    return start + (codes.values[..., None] * W[codes.indices]).sum(1)


def decoded_densely(
    codes: Codes, W: Float[Array, "f d"], start: Float[Array, "n d"], matmul: Matmul
) -> Float[Array, "n d"]:
    """Decode by a product with the dense form of the codes."""
    return start + matmul(codes.dense(len(start), len(W)), W)


def dots_by_part(codes: Codes, g: Float[Array, "n d"], W: Float[Array, "f d"]) -> Float[Array, "m k"]:
    """Return g[token] . W[latent] of codes with rows, a part at a time."""
    m, k = codes.values.shape

    def dot(j: Int[Array, ""], dvalues: Float[Array, "k m"]) -> Float[Array, "k m"]:
        one = part(codes, j)
        return dvalues.at[j].set((g[one.rows] * W[one.indices]).sum(-1))

    return lax.fori_loop(0, k, dot, jnp.zeros((k, m), codes.values.dtype)).reshape(m, k)


def dots_by_token(codes: Codes, g: Float[Array, "n d"], W: Float[Array, "f d"]) -> Float[Array, "n k"]:
    """Return g[token] . W[latent] of k codes of every token, for some tokens at a time."""
    n, k = codes.values.shape
    tokens = divisor(n, max(_GATHERED // k, 1))

    def product(some: tuple[Float[Array, "t d"], Int[Array, "t k"]]) -> Float[Array, "t k"]:
        return jnp.einsum("td,tkd->tk", some[0], W[some[1]])

    parts = (g.reshape(-1, tokens, g.shape[1]), codes.indices.reshape(-1, tokens, k))
    return lax.map(product, parts).reshape(n, k)


def latent_sums_by_part(codes: Codes, inputs: Input, f: int) -> Float[Array, "f d"]:
    """Scatter one code of every token at a time."""

    def add(j: Int[Array, ""], total: Float[Array, "f d"]) -> Float[Array, "f d"]:
        one = part(codes, j)
        return total.at[one.indices].add(one.values[:, None] * inputs.read(one.rows))

    return lax.fori_loop(0, codes.values.shape[1], add, jnp.zeros((f, inputs.x.shape[1]), inputs.x.dtype))


def latent_sums_densely(codes: Codes, inputs: Input, f: int, matmul: Matmul) -> Float[Array, "f d"]:
    """Multiply the transposed dense form of the codes by the inputs."""
    return matmul(codes.dense(len(inputs.x), f).T, inputs.read())


def divisor(whole: int, most: int) -> int:
    """Return the largest divisor of `whole` that is at most `most`; the whole where that is below an eighth of `most`.

    Chunks of one size are one program; a last one of another size would be another.
    """
    if whole <= most:
        return whole
    best = next(part for part in range(most, 0, -1) if whole % part == 0)
    return best if 8 * best >= most else whole
