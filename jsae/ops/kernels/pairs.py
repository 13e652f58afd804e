"""Sums of rows over codes by Triton kernels."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jsae.ops.kernels import pair_kernels as kernels
from jsae.ops.kernels.launch import Shape, call
from jsae.ops.types import Codes

COLUMNS = 256
"""Columns of a row that one program sums. It has one warp, so that a sum over codes stays within a thread."""
SPAN = 256
"""Pairs of one latent that a program sums at most."""


class Sorted(NamedTuple):
    """Codes in the order of their latents."""

    keys: Int[Array, " c"]
    """The latent of every code."""
    order: Int[Array, " c"]
    """Its place among the codes."""
    starts: Int[Array, " s"]
    """Where the codes of each latent begin, and the end: one number more than latents."""


def sorted_by_latent(codes: Codes, f: int) -> Sorted:
    """Sort codes by latent; those of one latent stay in their order."""
    places = jnp.arange(codes.indices.size, dtype=jnp.int32)
    keys, order = lax.sort((codes.indices.ravel(), places), num_keys=1, is_stable=True)
    return Sorted(keys, order, starts(keys, f))


def starts(keys: Int[Array, " c"], f: int) -> Int[Array, " s"]:
    """Return for every number from 0 to f how many of the sorted keys are smaller."""
    block = 128
    (out,) = call(
        kernels.starts_kernel,
        keys,
        outputs=[Shape((f + 1,), jnp.int32)],
        grid=(-(-(f + 1) // block),),
        warps=4,
        COUNT=keys.size,
        LATENTS=f,
        STEPS=keys.size.bit_length(),
        BLOCK=block,
    )
    return out


def starts_of_tokens(codes: Codes, n: int) -> Int[Array, " s"]:
    """Return where the codes of each of n tokens begin, and the end; zeros that fill up the codes belong to no token.

    A batch with fewer positive latents than codes is filled up with zeros of its last token, which one program would go
    through alone.
    """
    return jnp.minimum(starts(codes.rows.ravel(), n), _used(codes))


def _used(codes: Codes) -> Int[Array, ""]:
    """Return how many codes there are up to the last that is not zero."""
    values = codes.values.ravel()
    return jnp.max(jnp.where(values != 0, jnp.arange(1, values.size + 1), 0))


def decoded(
    codes: Codes, W: Float[Array, "f d"], start: Float[Array, "n d"], *, columns: int = COLUMNS, together: int = 8,
    warps: int = 1
) -> Float[Array, "n d"]:  # fmt: skip
    """Return start[t] + sum of value * W[latent] over the codes of token t, which are in the order of their tokens."""
    n, d = start.shape
    ragged = codes.rows is not None
    (out,) = call(
        kernels.decode_kernel,
        codes.values,
        codes.indices,
        starts_of_tokens(codes, n) if ragged else codes.indices,
        W,
        start,
        outputs=[Shape((n, d), jnp.float32)],
        grid=(n, -(-d // columns)),
        warps=warps,
        D=d,
        K=codes.values.shape[1],
        RAGGED=ragged,
        BLOCK=columns,
        CODES=together,
    )
    return out


def dots(
    codes: Codes,
    g: Float[Array, "n d"],
    W: Float[Array, "f d"],
    *,
    columns: int = COLUMNS,
    together: int = 8,
    warps: int = 1,
) -> Float[Array, "m k"]:
    """Return g[token] . W[latent] of every code; the codes are in the order of their tokens.

    Those that fill up a batch have no gradient: zero.
    """
    m, k = codes.values.shape
    n, d = g.shape
    ragged = codes.rows is not None
    parts = -(-k // together)
    (out,) = call(
        kernels.dots_kernel,
        g,
        codes.indices,
        starts_of_tokens(codes, n) if ragged else codes.indices,
        W,
        outputs=[Shape((m, k), jnp.float32)],
        grid=(n, parts),
        warps=warps,
        D=d,
        K=k,
        RAGGED=ragged,
        BLOCK=columns,
        CODES=together,
        PARTS=parts,
    )
    return jnp.where(jnp.arange(out.size).reshape(out.shape) < _used(codes), out, 0) if ragged else out


def latent_sums(
    codes: Codes, rows: Float[Array, "n d"], f: int, *, columns: int = COLUMNS, together: int = 8, span: int = SPAN,
    warps: int = 1
) -> Float[Array, "f d"]:  # fmt: skip
    """Return out[i] = sum of value * row of the token over the codes of latent i."""
    d, tiles = rows.shape[1], -(-rows.shape[1] // columns)
    pairs = sorted_by_latent(codes, f)
    cuts = -(-pairs.keys.size // span)
    arrays = (codes.values, codes.indices if codes.rows is None else codes.rows, rows)
    constants: dict[str, Any] = {
        "D": d,
        "K": codes.values.shape[1],
        "RAGGED": codes.rows is not None,
        "SPAN": span,
        "BLOCK": columns,
        "PAIRS": together,
    }
    (partial,) = call(
        kernels.partial_sums_kernel,
        pairs.keys,
        pairs.order,
        pairs.starts,
        *arrays,
        outputs=[Shape((cuts, d), jnp.float32)],
        grid=(cuts, tiles),
        warps=warps,
        **constants,
    )
    (out,) = call(
        kernels.latent_sums_kernel,
        pairs.order,
        pairs.starts,
        *arrays,
        partial,
        outputs=[Shape((f, d), jnp.float32)],
        grid=(f, tiles),
        warps=warps,
        **constants,
    )
    return out


def value_sums(codes: Codes, f: int) -> tuple[Float[Array, " f"], Int[Array, " f"]]:
    """Return the sum of the values of every latent, and how many of them are not 0."""
    pairs = sorted_by_latent(codes, f)
    sums, counts = call(
        kernels.value_sums_kernel,
        pairs.order,
        pairs.starts,
        codes.values,
        outputs=[Shape((f,), jnp.float32), Shape((f,), jnp.int32)],
        grid=(f,),
        warps=1,
        LATENTS=f,
        BLOCK=128,
    )
    return sums, counts
