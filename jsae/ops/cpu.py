"""The implementation for processors: in pieces that fit their caches, rows summed in the order of their latents.

`python -m experiments.bench step --ops=plain` shows what that saves.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jsae.ops import rows
from jsae.ops.interface import AdamScalars, AdamSettings, Moments
from jsae.ops.reference import row_dots, tangent_rows
from jsae.ops.types import Codes, Input
from jsae.ops.xla_ops import XlaOps

_PAIRS = 1024  # codes that are added at once


@dataclasses.dataclass(frozen=True)
class Cpu(XlaOps):
    """Operations for a processor's caches and cores. The fields are sizes of pieces; every choice gives the same."""

    name: ClassVar[str] = "cpu"

    chunk: int = 2**20
    """Pre-activations, about, that exist at once where codes are picked token by token."""
    least: int = 128
    """Tokens that such a chunk has at least where d_sae is eight times d_in, and up to twice as many in a wider SAE: a
    product with fewer rows is slower, and beside the gradients of the weights a chunk then takes little memory."""
    tokens: int = 512
    """Tokens, about, whose latents exist at once where all latents are computed and gradients are summed."""
    block: int = 2**18
    """Numbers of a weight matrix, about, that the optimiser updates at once."""
    sorts: int = 16
    """Pieces that a top-k is cut into by tokens, for the cores to share: XLA runs one top-k on one core, and several
    side by side only if more than eight operations are ready at once."""

    def sort(self, values: Float[Array, "n w"], k: int) -> tuple[Float[Array, "n k"], Int[Array, "n k"]]:
        """Run one `lax.top_k` per piece of the tokens."""
        if self.sorts == 1 or len(values) % self.sorts:
            values, indices = lax.top_k(values, k)
            return values, indices
        pieces = [lax.top_k(piece, k) for piece in jnp.split(values, self.sorts)]
        values, indices = (jnp.concatenate(parts) for parts in zip(*pieces, strict=True))
        return values, indices

    def decoded(self, codes: Codes, W: Float[Array, "f d"], start: Float[Array, "n d"]) -> Float[Array, "n d"]:
        """Decode one code of every token at a time."""
        return rows.decoded_by_part(codes, W, start)

    def dots(self, codes: Codes, g: Float[Array, "n d"], W: Float[Array, "f d"]) -> Float[Array, "m k"]:
        """Multiply a few hundred gathered rows at a time."""
        if codes.rows is not None:
            return rows.dots_by_part(codes, g, W)
        return rows.dots_by_token(codes, g, W)

    def latent_sums(self, codes: Codes, inputs: Input, f: int) -> Float[Array, "f d"]:
        """Add rows in the order of their latents, so that each row of the sum is in the cache once."""
        k, count = codes.values.shape[1], codes.values.size
        order = sorting_order(codes.indices.ravel(), f)
        order = jnp.pad(order, (0, -count % _PAIRS), constant_values=count)  # codes of value 0, in the last row

        def add(i: Int[Array, ""], total: Float[Array, "f d"]) -> Float[Array, "f d"]:
            at = lax.dynamic_slice_in_dim(order, i * _PAIRS, _PAIRS)
            latents = codes.indices.ravel().at[at].get(mode="fill", fill_value=f - 1)
            values = codes.values.ravel().at[at].get(mode="fill", fill_value=0)
            tokens = at // k if codes.rows is None else codes.rows.ravel()[at]
            return total.at[latents].add(values[:, None] * inputs.read(tokens), indices_are_sorted=True)

        # Zeros that the compiler does not know: it would make known ones once, and a copy for every use.
        zero = jnp.minimum(lax.bitcast_convert_type(codes.values[0, 0], jnp.int32) & 1, 0).astype(codes.values.dtype)
        return lax.fori_loop(0, len(order) // _PAIRS, add, jnp.broadcast_to(zero, (f, inputs.x.shape[1])))

    def encode_chunk(self, n: int, d_in: int, d_sae: int) -> int:
        """Return a number of tokens whose pre-activations fit the cache."""
        return rows.divisor(n, max(self.chunk // d_sae, min(self.least * d_sae // (8 * d_in), 2 * self.least), 1))

    def sum_chunk(self, n: int, d_in: int, d_sae: int, gradients: bool) -> int:
        """Return as many tokens as are encoded at once, or `tokens` where gradients of all weights are added."""
        return rows.divisor(n, self.tokens) if gradients else self.encode_chunk(n, d_in, d_sae)

    def adam(self, scalars: AdamScalars, settings: AdamSettings, g: Array, moments: Moments) -> Moments:
        """Overwrite weights and moments where they stand, a block of rows after the other."""
        if g.ndim < 2 or (size := rows.divisor(len(g), max(self.block // g.shape[1], 1))) == len(g):
            return adam_in_place(scalars, settings, g, moments, lambda a: a, lambda _, new: new)

        def block(i: Int[Array, ""], now: Moments) -> Moments:
            return adam_in_place(
                scalars,
                settings,
                g,
                now,
                lambda a: lax.dynamic_slice_in_dim(a, i * size, size),
                lambda a, new: lax.dynamic_update_slice_in_dim(a, new, i * size, 0),
            )

        return lax.fori_loop(0, len(g) // size, block, moments)


def adam_in_place(
    scalars: AdamScalars,
    settings: AdamSettings,
    g: Array,
    moments: Moments,
    at: Callable[[Array], Array],
    put: Callable[[Array, Array], Array],
) -> Moments:
    """Update the part of the arrays that `at` reads and `put` writes, as `Ops.adam` says.

    Moments are written before they are read for the weights: otherwise XLA computes them twice, and must keep a copy.
    """
    p, mu, nu = moments
    d = scalars.clip * (tangent_rows(at(g), at(p)) if settings.unit_rows else at(g))
    mu = put(mu, settings.beta1 * at(mu) + (1 - settings.beta1) * d)
    nu = put(nu, settings.beta2 * at(nu) + (1 - settings.beta2) * jnp.square(d))
    rate = scalars.rate * settings.rate_factor
    new = at(p) - rate * at(mu) / (jnp.sqrt(scalars.spread * at(nu)) + settings.epsilon)
    if settings.unit_rows:
        new = new * lax.rsqrt(row_dots(new, new))[:, None]
    return Moments(put(p, new), mu, nu)


def sorting_order(indices: Int[Array, " c"], f: int) -> Int[Array, " c"]:
    """Return the permutation that sorts latents. One word of number and place sorts several times as fast as a pair."""
    count = indices.size
    if f * count > 2**32:
        return jnp.argsort(indices)
    words = indices.astype(jnp.uint32) * count + jnp.arange(count, dtype=jnp.uint32)
    return (lax.sort(words, is_stable=False) % count).astype(jnp.int32)
