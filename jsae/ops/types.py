"""Sparse codes, the input of an encoder, and the rule that selects latents."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Codes(NamedTuple):
    """Sparse activations: `values[i, j]` of latent `indices[i, j]` on token `rows[i, j]`.

    Without `rows`, row i is token i: every token has k codes. With `rows`, a token may have any number of codes, and
    the codes are in the order of their tokens.
    """

    values: Float[Array, "n k"]
    indices: Int[Array, "n k"]
    rows: Int[Array, "n k"] | None = None

    def dense(self, n: int, d_sae: int) -> Float[Array, "n f"]:
        """Return the codes of n tokens as an (n, d_sae) array."""
        return jnp.zeros((n, d_sae), self.values.dtype).at[self.tokens, self.indices].add(self.values)

    @property
    def tokens(self) -> Int[Array, "n #k"]:
        """The token of every code."""
        return jnp.arange(len(self.values))[:, None] if self.rows is None else self.rows


Latents = Codes | Float[Array, "n f"]
"""Activations of the latents: sparse codes, or an array with one column per latent."""


class Input(NamedTuple):
    """The input of an encoder, x * scale - b_in, in its parts. None leaves a part out."""

    x: Float[Array, "n d"]
    scale: Float[Array, "*d"] | None = None
    b_in: Float[Array, " d"] | None = None

    def read(self, tokens: Int[Array, " m"] | None = None) -> Float[Array, "m d"]:
        """Return x * scale - b_in of some tokens, or of all."""
        x = self.x if tokens is None else self.x[tokens]
        x = x if self.scale is None else x * self.scale
        return x if self.b_in is None else x - self.b_in


Select = Callable[..., Codes]
"""`select(pre, limit=, bias=)` returns codes of the pre-activations `pre + bias`, (n, f): raw values, without ReLU.
With a `limit` only the first so many per token, or so many times n per batch, keep their value; the others are 0."""
