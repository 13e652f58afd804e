"""The implementation for NVIDIA GPUs: Triton kernels for what XLA does slowly or in an order that changes.

Products, elementwise passes and reductions are left to XLA. Kernels select latents, sum rows over codes by token and by
latent, and update unit rows. Their sums run in a fixed order, so that equal inputs give equal bits.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jsae.ops import formulas, rows, selection
from jsae.ops.cpu import adam_in_place
from jsae.ops.formulas import Formula, Maps, PerLatent
from jsae.ops.interface import AdamScalars, AdamSettings, Moments
from jsae.ops.local import LocalOps
from jsae.ops.types import Codes, Input

_ALIGNMENT = 64  # columns of a product: with 1,288 it takes 1.24 ms on an H200, with 1,344 1.12 ms


@dataclasses.dataclass(frozen=True)
class Gpu(LocalOps):
    """Operations with Triton kernels. The fields are sizes of parts; every choice gives the same, to rounding."""

    name: ClassVar[str] = "gpu"
    narrow: ClassVar[bool] = True

    chunk: int = 2**27
    """Pre-activations, about, that exist at once where codes are picked token by token."""
    tokens: int = 8192
    """Tokens, about, whose latents exist at once where all latents are computed and gradients are summed."""

    @property
    def storage(self) -> jnp.dtype:
        """The dtype of pre-activations, and of rows that kernels read: that of the products' factors."""
        return jnp.dtype(self.matmul_dtype)

    def encoder(
        self, inputs: Input, W_enc: Float[Array, "f d"], b_enc: Float[Array, " f"], allowed: Bool[Array, " f"] | None
    ) -> Callable[[Float[Array, "m d"]], tuple[Float[Array, "m f"], Float[Array, " f"] | None]]:
        """Return the product with the weights.

        In bfloat16 the bias is part of the product, as two more columns: its rounded value and the rest. So the sum is
        rounded once, and selection reads no bias.
        """
        masked = None if allowed is None else jnp.where(allowed, 0.0, -jnp.inf)
        if self.matmul_dtype == "float32":
            bias = b_enc if masked is None else b_enc + masked
            return lambda x: (self.matmul(inputs._replace(x=x).read(), W_enc.T), bias)
        rounded = lax.reduce_precision(b_enc, exponent_bits=8, mantissa_bits=7)
        columns = jnp.stack([rounded, b_enc - rounded], 1).astype(jnp.bfloat16)
        width = W_enc.shape[1] + 2
        padding = -width % (_ALIGNMENT if width > 4 * _ALIGNMENT else 8)
        weights = jnp.pad(jnp.concatenate([W_enc.astype(jnp.bfloat16), columns], 1), ((0, 0), (0, padding)))

        def encoded(x: Float[Array, "m d"]) -> tuple[Float[Array, "m f"], Float[Array, " f"] | None]:
            read = inputs._replace(x=x).read().astype(jnp.bfloat16)
            ones = jnp.ones((len(x), 2), jnp.bfloat16)
            whole = jnp.pad(jnp.concatenate([read, ones], 1), ((0, 0), (0, padding)))
            return jnp.matmul(whole, weights.T, preferred_element_type=jnp.bfloat16), masked

        return encoded

    def map_latents(
        self,
        inputs: Input,
        W_enc: Float[Array, "f d"],
        b_enc: Float[Array, " f"],
        formula: Formula,
        arrays: PerLatent,
    ) -> tuple[Maps, PerLatent]:
        """Read and write every array of all latents once, where the formula has a kernel."""
        from jsae.ops.kernels import latents

        if vars(type(formula)).get("name") not in latents.FORMULAS:
            return formulas.evaluate(formula, self.pre_activations(inputs, W_enc, b_enc), arrays)
        centred, bias = self.centred(inputs, W_enc, b_enc)
        pre = self.matmul(centred.read(), W_enc.T).astype(self.storage)
        maps, sums = latents.evaluate(formula, pre, bias, arrays)
        return tuple(one.astype(jnp.float32) for one in maps), sums

    def latent_totals(self, latents: Float[Array, "n f"]) -> tuple[Int[Array, " f"], Float[Array, " f"]]:
        """Count and add by a kernel, in the dtype that the latents have been stored in."""
        from jsae.ops.kernels import latents as kernels

        return kernels.totals(latents.astype(self.storage))

    def largest(
        self, pre: Float[Array, "n f"], k: int, bias: Float[Array, " f"] | None, *, magnitudes: bool, in_order: bool
    ) -> Codes:
        """Select by a kernel, or by XLA where a row is too long for one program."""
        from jsae.ops.kernels import selection as kernels

        if not kernels.fits(pre.shape[1], k):
            codes = selection.largest(pre, k, bias, _unstable_top_k, magnitudes=magnitudes)
            return codes._replace(values=codes.values.astype(jnp.float32))
        codes = kernels.top_k(pre, k, bias, magnitudes=magnitudes)
        return _descending(codes, magnitudes) if in_order else codes

    def largest_of_batch(
        self, pre: Float[Array, "n f"], k: int, limit: Int[Array, ""] | None, bias: Float[Array, " f"] | None
    ) -> Codes:
        """Search for the batch's threshold among the largest of small groups."""
        from jsae.ops.kernels import selection as kernels

        return kernels.batch_top_k(pre, k, limit, bias)

    def in_token_order(self, codes: Codes) -> Codes:
        """Sort the codes by token."""
        n, k = codes.values.shape
        order = jnp.argsort(codes.tokens.ravel(), stable=True)
        return Codes(*(a.ravel()[order].reshape(n, k) for a in (codes.values, codes.indices, codes.tokens)))

    def decoded(self, codes: Codes, W: Float[Array, "f d"], start: Float[Array, "n d"]) -> Float[Array, "n d"]:
        """Sum the rows of a token in one program."""
        from jsae.ops.kernels import pairs

        return pairs.decoded(codes, W.astype(self.storage), start)

    def dots(self, codes: Codes, g: Float[Array, "n d"], W: Float[Array, "f d"]) -> Float[Array, "m k"]:
        """Multiply a few gathered rows in one program."""
        from jsae.ops.kernels import pairs

        return pairs.dots(codes, g.astype(self.storage), W.astype(self.storage))

    def latent_sums(self, codes: Codes, inputs: Input, f: int) -> Float[Array, "f d"]:
        """Sum the rows of a latent in one program, or in several where it fires often."""
        from jsae.ops.kernels import pairs

        return pairs.latent_sums(codes, inputs.read().astype(self.storage), f)

    def value_sums(self, codes: Codes, f: int) -> Float[Array, " f"]:
        """Sum the values of a latent in one program."""
        from jsae.ops.kernels import pairs

        return pairs.value_sums(codes, f)[0]

    def encode_chunk(self, n: int, d_in: int, d_sae: int) -> int:
        """Return a number of tokens whose pre-activations take little memory, and fill the GPU."""
        return rows.divisor(n, max(self.chunk // d_sae, 1))

    def sum_chunk(self, n: int, d_in: int, d_sae: int, gradients: bool) -> int:
        """Return `tokens` where gradients of all weights are added, else n."""
        return rows.divisor(n, self.tokens) if gradients else n

    def adam(self, scalars: AdamScalars, settings: AdamSettings, g: Array, moments: Moments) -> Moments:
        """Update unit rows by a kernel; XLA needs one pass for all other arrays."""
        from jsae.ops.kernels import adam

        if settings.unit_rows and g.shape[1] <= adam.WIDEST:
            return adam.adam_of_unit_rows(scalars, settings, g, moments)
        return adam_in_place(scalars, settings, g, moments, lambda a: a, lambda _, new: new)


def _descending(codes: Codes, magnitudes: bool) -> Codes:
    """Return codes with the largest of every row first."""
    size = jnp.where(jnp.isneginf(codes.values) | (not magnitudes), codes.values, jnp.abs(codes.values))
    order = jnp.argsort(size, axis=1, descending=True)
    return Codes(*(jnp.take_along_axis(a, order, axis=1) for a in (codes.values, codes.indices)))


def _unstable_top_k(values: Float[Array, "n w"], k: int) -> tuple[Float[Array, "n k"], Int[Array, "n k"]]:
    values, indices = lax.top_k(values, k)
    return values, indices
