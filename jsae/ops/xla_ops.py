"""The parts that implementations in plain XLA share: selection by sorting, products with a bias beside them."""

import abc
import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jsae.ops import selection
from jsae.ops.local import LocalOps
from jsae.ops.reference import PlainMaps
from jsae.ops.types import Codes, Input


@dataclasses.dataclass(frozen=True)
class XlaOps(PlainMaps, LocalOps):
    """Sparse operations that need no kernels of our own. Abstract."""

    @abc.abstractmethod
    def sort(self, values: Float[Array, "n w"], k: int) -> tuple[Float[Array, "n k"], Int[Array, "n k"]]:
        """Return the k largest of every row and their places, as `lax.top_k`, equal values in any order."""

    def largest(
        self, pre: Float[Array, "n f"], k: int, bias: Float[Array, " f"] | None, *, magnitudes: bool, in_order: bool
    ) -> Codes:
        """Select in two stages, the largest first in any case."""
        return selection.largest(pre, k, bias, self.sort, magnitudes=magnitudes)

    def largest_of_batch(
        self, pre: Float[Array, "n f"], k: int, limit: Int[Array, ""] | None, bias: Float[Array, " f"] | None
    ) -> Codes:
        """Search for the batch's threshold."""
        return selection.batch_top_k(pre, k, limit, bias)

    def encoder(
        self, inputs: Input, W_enc: Float[Array, "f d"], b_enc: Float[Array, " f"], allowed: Bool[Array, " f"] | None
    ) -> Callable[[Float[Array, "m d"]], tuple[Float[Array, "m f"], Float[Array, " f"] | None]]:
        """Return the product with the weights, and the bias, which selection adds."""
        centred, bias = self.centred(inputs, W_enc, b_enc)
        bias = bias if allowed is None else jnp.where(allowed, bias, -jnp.inf)
        return lambda x: (self.matmul(centred._replace(x=x).read(), W_enc.T), bias)

    def in_token_order(self, codes: Codes) -> Codes:
        """Return the codes as they are."""
        return codes

    def value_sums(self, codes: Codes, f: int) -> Float[Array, " f"]:
        """Scatter the values."""
        return jnp.zeros(f, codes.values.dtype).at[codes.indices].add(codes.values)
