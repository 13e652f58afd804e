"""Sparse operations on one device: selection from whole rows of pre-activations, and batches in parts.

The one array of n x f numbers is the pre-activations.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jsae.ops.interface import Result, slice_rows
from jsae.ops.reference import check_k, first, times_fired
from jsae.ops.sparse import SparseOps
from jsae.ops.types import Codes, Input, Select


@dataclasses.dataclass(frozen=True)
class LocalOps(SparseOps):
    """Sparse operations over an encoder, a selection and three sums of rows. Abstract."""

    @abc.abstractmethod
    def largest(
        self, pre: Float[Array, "n f"], k: int, bias: Float[Array, " f"] | None, *, magnitudes: bool, in_order: bool
    ) -> Codes:
        """Return the k largest of every row of pre (+ bias), with `magnitudes` by |pre + bias|.

        With `in_order` the largest comes first, else they may come in any order. Minus infinity is the smallest.
        """

    @abc.abstractmethod
    def largest_of_batch(
        self, pre: Float[Array, "n f"], k: int, limit: Int[Array, ""] | None, bias: Float[Array, " f"] | None
    ) -> Codes:
        """Return the n k largest positive entries of pre (+ bias), as `Ops.batch_top_k` says."""

    @abc.abstractmethod
    def encoder(
        self, inputs: Input, W_enc: Float[Array, "f d"], b_enc: Float[Array, " f"], allowed: Bool[Array, " f"] | None
    ) -> Callable[[Float[Array, "m d"]], tuple[Float[Array, "m f"], Float[Array, " f"] | None]]:
        """Return a function from the x of some tokens to their pre-activations without a bias, and that bias.

        The bias of a latent that is not allowed is minus infinity; None is no bias. Nothing is differentiated.
        """

    @abc.abstractmethod
    def in_token_order(self, codes: Codes) -> Codes:
        """Return codes with rows in the order of their tokens, if `decoded` needs them so."""

    @abc.abstractmethod
    def encode_chunk(self, n: int, d_in: int, d_sae: int) -> int:
        """Return how many of n tokens are encoded at once: a divisor of n."""

    @abc.abstractmethod
    def sum_chunk(self, n: int, d_in: int, d_sae: int, gradients: bool) -> int:
        """Return how many of n tokens `sum_over_tokens` takes at once: a divisor of n."""

    def top_k(
        self,
        pre: Float[Array, "n f"],
        k: int,
        limit: Int[Array, ""] | None = None,
        bias: Float[Array, " f"] | None = None,
    ) -> Codes:
        """Select the largest, all of which have their value unless there is a limit."""
        check_k(k, pre.shape[1])
        return first(self.largest(pre, k, bias, magnitudes=False, in_order=limit is not None), limit)

    def abs_top_k(
        self,
        pre: Float[Array, "n f"],
        k: int,
        limit: Int[Array, ""] | None = None,
        bias: Float[Array, " f"] | None = None,
    ) -> Codes:
        """Select the largest magnitudes."""
        check_k(k, pre.shape[1])
        return first(self.largest(pre, k, bias, magnitudes=True, in_order=limit is not None), limit)

    def batch_top_k(
        self,
        pre: Float[Array, "n f"],
        k: int,
        limit: Int[Array, ""] | None = None,
        bias: Float[Array, " f"] | None = None,
    ) -> Codes:
        """Select from the whole batch."""
        check_k(k, pre.shape[1])
        return self.largest_of_batch(pre, k, limit, bias)

    def pick(
        self,
        select: Select,
        by_token: bool,
        inputs: Input,
        W_enc: Float[Array, "f d"],
        b_enc: Float[Array, " f"],
        allowed: Bool[Array, " f"] | None,
        limit: Int[Array, ""] | None,
    ) -> Codes:
        """Encode in parts of the batch, so that the pre-activations of all tokens need not exist at once."""
        encoded = self.encoder(inputs, W_enc, b_enc, allowed)

        def of_tokens(x: Float[Array, "m d"]) -> Codes:
            pre, bias = encoded(x)
            return select(pre, bias=bias, limit=limit)

        n, d = inputs.x.shape
        chunk = self.encode_chunk(n, d, len(W_enc)) if by_token else n
        parts = lax.map(of_tokens, inputs.x.reshape(-1, chunk, d)) if chunk < n else of_tokens(inputs.x)
        return jax.tree.map(lambda a: a.reshape(n, -1), parts)

    def times_fired(self, codes: Codes, f: int) -> Int[Array, " f"]:
        """Scatter ones."""
        return times_fired(codes, f)

    def rows_of_tokens(self, x: Float[Array, "n d"], tokens: Int[Array, " f"]) -> Float[Array, "f d"]:
        """Gather rows."""
        return x[tokens]

    def decode_parts(
        self, codes: Codes, W_dec: Float[Array, "f o"], level: Int[Array, "n k"], levels: int, n: int
    ) -> Float[Array, "l n o"]:
        """Decode all levels in one pass, each code into its own, and add them up."""
        inside = level < levels
        moved = Codes(jnp.where(inside, codes.values, 0), codes.indices, jnp.where(inside, level, 0) * n + codes.tokens)
        parts = self.decode(self.in_token_order(moved), W_dec, jnp.zeros((levels * n, W_dec.shape[1])))
        return jnp.cumsum(parts.reshape(levels, n, -1), axis=0)

    def sum_over_tokens(
        self, function: Callable[[Any], Result], arrays: Any, d_in: int, d_sae: int, *, gradients: bool
    ) -> Result:
        """Add up equal parts of the batch, one after the other."""
        n = len(jax.tree.leaves(arrays)[0])
        chunk = self.sum_chunk(n, d_in, d_sae, gradients)
        if chunk == n:
            return function(arrays)

        def add(i: Int[Array, ""], total: Result) -> Result:
            return jax.tree.map(jnp.add, total, function(slice_rows(arrays, i * chunk, chunk)))

        return lax.fori_loop(1, n // chunk, add, function(jax.tree.map(lambda a: a[:chunk], arrays)))
