"""The implementation in plain XLA for accelerators: whole arrays, and a choice of how rows are summed."""

import dataclasses
import inspect
from typing import ClassVar, Literal

import jax
from jax import lax
from jaxtyping import Array, Float, Int

from jsae.ops import rows
from jsae.ops.cpu import adam_in_place
from jsae.ops.interface import AdamScalars, AdamSettings, Moments
from jsae.ops.types import Codes, Input
from jsae.ops.xla_ops import XlaOps


@dataclasses.dataclass(frozen=True)
class Xla(XlaOps):
    """Operations without pieces, as a compiler for GPUs fuses them. Needs no package beside jax."""

    name: ClassVar[str] = "xla"

    decoding: Literal["by part", "at once", "dense"] = "at once"
    """Decode one code of every token at a time; k codes in one sum; or as a product with the dense codes."""
    gradients: Literal["by part", "dense"] = "dense"
    """Add rows to the gradient of a weight matrix a part of the codes at a time, or as a product."""

    def sort(self, values: Float[Array, "n w"], k: int) -> tuple[Float[Array, "n k"], Int[Array, "n k"]]:
        """Run `lax.top_k`, on GPUs without the order of equal values where this version of jax can leave it out."""
        unstable = {"is_stable": False} if "is_stable" in inspect.signature(lax.top_k).parameters else {}
        values, indices = lax.top_k(values, k, **({} if jax.default_backend() == "cpu" else unstable))
        return values, indices

    def decoded(self, codes: Codes, W: Float[Array, "f d"], start: Float[Array, "n d"]) -> Float[Array, "n d"]:
        """Decode as `decoding` says. Codes with rows cannot be summed at once: a token may have any number of them."""
        how = self._decoding(codes, len(start))
        if how == "dense":
            return rows.decoded_densely(codes, W, start, self.matmul)
        return rows.decoded_at_once(codes, W, start) if how == "at once" else rows.decoded_by_part(codes, W, start)

    def dots(self, codes: Codes, g: Float[Array, "n d"], W: Float[Array, "f d"]) -> Float[Array, "m k"]:
        """Compute the dots of all latents, or of the gathered rows."""
        how = self._decoding(codes, len(g))
        if how == "dense":
            return self.matmul(g, W.T)[codes.tokens, codes.indices]
        if how == "at once":
            return (g[:, None] * W[codes.indices]).sum(-1)
        return rows.dots_by_token(codes, g, W) if codes.rows is None else rows.dots_by_part(codes, g, W)

    def latent_sums(self, codes: Codes, inputs: Input, f: int) -> Float[Array, "f d"]:
        """Add rows as `gradients` says."""
        if self.gradients == "dense":
            return rows.latent_sums_densely(codes, inputs, f, self.matmul)
        return rows.latent_sums_by_part(codes, inputs, f)

    def encode_chunk(self, n: int, d_in: int, d_sae: int) -> int:
        """Return n."""
        return n

    def sum_chunk(self, n: int, d_in: int, d_sae: int, gradients: bool) -> int:
        """Return n."""
        return n

    def adam(self, scalars: AdamScalars, settings: AdamSettings, g: Array, moments: Moments) -> Moments:
        """Update whole arrays in one pass."""
        return adam_in_place(scalars, settings, g, moments, lambda a: a, lambda _, new: new)

    def _decoding(self, codes: Codes, n: int) -> str:
        if self.decoding != "at once" or codes.rows is None:
            return self.decoding
        return "dense" if n == len(codes.values) else "by part"  # more tokens than the batch has: nested widths


PLAIN = Xla(decoding="by part", gradients="by part")
"""Nothing that helps only one kind of device: what `Cpu` is compared with."""
