"""The reference implementation: every operation as its formula says, gradients by differentiation. Not fast."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jsae.ops import formulas
from jsae.ops.formulas import Formula, Maps, PerLatent
from jsae.ops.interface import AdamScalars, AdamSettings, Moments, Ops, Result
from jsae.ops.types import Codes, Input, Select


@dataclasses.dataclass(frozen=True)
class PlainMaps(Ops):
    """Elementwise functions of latents as they are written, without kernels. Abstract."""

    def map_latents(
        self,
        inputs: Input,
        W_enc: Float[Array, "f d"],
        b_enc: Float[Array, " f"],
        formula: Formula,
        arrays: PerLatent,
    ) -> tuple[Maps, PerLatent]:
        """Evaluate the formula, then sum its terms."""
        return formulas.evaluate(formula, self.pre_activations(inputs, W_enc, b_enc), arrays)

    def latent_totals(self, latents: Float[Array, "n f"]) -> tuple[Int[Array, " f"], Float[Array, " f"]]:
        """Count and add."""
        return formulas.latent_totals(latents)


@dataclasses.dataclass(frozen=True)
class Reference(PlainMaps):
    """The oracle of every test, and the implementation of inference on a few tokens."""

    name: ClassVar[str] = "reference"

    def pre_activations(
        self, inputs: Input, W_enc: Float[Array, "f d"], b_enc: Float[Array, " f"]
    ) -> Float[Array, "n f"]:
        """Return (x * scale - b_in) W_enc^T + b_enc."""
        return self.matmul(inputs.read(), W_enc.T) + b_enc

    def top_k(
        self,
        pre: Float[Array, "n f"],
        k: int,
        limit: Int[Array, ""] | None = None,
        bias: Float[Array, " f"] | None = None,
    ) -> Codes:
        """Sort every row."""
        check_k(k, pre.shape[1])
        pre = pre if bias is None else pre + bias
        return first(Codes(*lax.top_k(pre, k)), limit)

    def abs_top_k(
        self,
        pre: Float[Array, "n f"],
        k: int,
        limit: Int[Array, ""] | None = None,
        bias: Float[Array, " f"] | None = None,
    ) -> Codes:
        """Sort the magnitudes of every row."""
        check_k(k, pre.shape[1])
        pre = pre if bias is None else pre + bias
        _, indices = lax.top_k(magnitudes(pre), k)
        return first(Codes(jnp.take_along_axis(pre, indices, axis=1), indices), limit)

    def batch_top_k(
        self,
        pre: Float[Array, "n f"],
        k: int,
        limit: Int[Array, ""] | None = None,
        bias: Float[Array, " f"] | None = None,
    ) -> Codes:
        """Sort the whole batch."""
        n, f = pre.shape
        check_k(k, f)
        pre = pre if bias is None else pre + bias
        values, where = lax.top_k(pre.ravel(), n * k)
        counts = values > 0
        if limit is not None:
            counts &= jnp.arange(n * k) < n * limit
        by_token = jnp.argsort(where)
        values, where = jnp.where(counts, values, 0)[by_token], where[by_token]
        return Codes(*(a.reshape(n, k) for a in (values, where % f, where // f)))

    def encode(
        self,
        inputs: Input,
        W_enc: Float[Array, "f d"],
        b_enc: Float[Array, " f"],
        select: Select,
        *,
        limit: Int[Array, ""] | None = None,
        allowed: Bool[Array, " f"] | None = None,
        by_token: bool = True,
    ) -> Codes:
        """Select from all pre-activations at once."""
        inputs = inputs._replace(scale=None if inputs.scale is None else lax.stop_gradient(inputs.scale))
        pre = self.pre_activations(inputs, W_enc, b_enc)
        shown = lax.stop_gradient(pre if allowed is None else jnp.where(allowed, pre, -jnp.inf))
        codes = select(shown, limit=limit, bias=jnp.zeros(len(W_enc), pre.dtype))
        counts = (codes.values != 0) & ~jnp.isneginf(codes.values)
        return codes._replace(values=jnp.where(counts, pre[codes.tokens, codes.indices], 0))

    def decode(self, codes: Codes, W_dec: Float[Array, "f o"], start: Float[Array, "n o"]) -> Float[Array, "n o"]:
        """Multiply the dense form of the codes by the decoder."""
        return start + self.matmul(codes.dense(len(start), len(W_dec)), W_dec)

    def decode_parts(
        self, codes: Codes, W_dec: Float[Array, "f o"], level: Int[Array, "n k"], levels: int, n: int
    ) -> Float[Array, "l n o"]:
        """Decode once per level."""
        start = jnp.zeros((n, W_dec.shape[1]))
        up_to = [codes._replace(values=jnp.where(level <= i, codes.values, 0)) for i in range(levels)]
        return jnp.stack([self.decode(some, W_dec, start) for some in up_to])

    def times_fired(self, codes: Codes, f: int) -> Int[Array, " f"]:
        """Scatter ones."""
        return times_fired(codes, f)

    def rows_of_tokens(self, x: Float[Array, "n d"], tokens: Int[Array, " f"]) -> Float[Array, "f d"]:
        """Gather rows."""
        return x[tokens]

    def if_any(self, condition: Bool[Array, ""], do: Callable[[], Result], otherwise: Callable[[], Result]) -> Result:
        """Return `do()` in any case."""
        return do()

    def sum_over_tokens(
        self, function: Callable[[Any], Result], arrays: Any, d_in: int, d_sae: int, *, gradients: bool
    ) -> Result:
        """Return `function(arrays)`."""
        return function(arrays)

    def adam(self, scalars: AdamScalars, settings: AdamSettings, g: Array, moments: Moments) -> Moments:
        """Update whole arrays."""
        p, mu, nu = moments
        d = scalars.clip * (tangent_rows(g, p) if settings.unit_rows else g)
        mu = settings.beta1 * mu + (1 - settings.beta1) * d
        nu = settings.beta2 * nu + (1 - settings.beta2) * jnp.square(d)
        rate = scalars.rate * settings.rate_factor
        p = p - rate * mu / (jnp.sqrt(scalars.spread * nu) + settings.epsilon)
        return Moments(p / jnp.linalg.norm(p, axis=1, keepdims=True) if settings.unit_rows else p, mu, nu)


def times_fired(codes: Codes, f: int) -> Int[Array, " f"]:
    """Return the number of codes of every latent that are not zero."""
    return jnp.zeros(f, jnp.int32).at[codes.indices].add(codes.values != 0)


def check_k(k: int, f: int) -> None:
    """Raise ValueError unless 1 <= k <= f."""
    if not 1 <= k <= f:
        raise ValueError(f"top-k with k={k} out of {f} latents: k must be between 1 and {f}")


def first(codes: Codes, limit: Int[Array, ""] | None) -> Codes:
    """Set the values behind the first `limit` of every token to 0."""
    if limit is None:
        return codes
    return codes._replace(values=jnp.where(jnp.arange(codes.values.shape[1]) < limit, codes.values, 0))


def magnitudes(pre: Float[Array, "n f"]) -> Float[Array, "n f"]:
    """Return |pre|, where minus infinity, which marks a latent that must not be selected, stays the smallest."""
    return jnp.where(jnp.isneginf(pre), pre, jnp.abs(pre))


def tangent_rows(g: Float[Array, "f d"], rows: Float[Array, "f d"]) -> Float[Array, "f d"]:
    """Return g without its part along every unit row, which normalising the row would undo."""
    return g - row_dots(g, rows)[:, None] * rows


def row_dots(a: Float[Array, "f d"], b: Float[Array, "f d"]) -> Float[Array, " f"]:
    """Return the dot product of every row of a with the same row of b, without an array of the products."""
    return jnp.einsum("fd,fd->f", a, b)
