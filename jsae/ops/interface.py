"""The operations of a training step whose implementation depends on the device."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jsae.ops import products
from jsae.ops.formulas import Formula, Maps, PerLatent
from jsae.ops.products import MatmulDtype
from jsae.ops.types import Codes, Input, Select

Result = TypeVar("Result")


class AdamScalars(NamedTuple):
    """The numbers of one Adam update that are the same for all weights."""

    clip: Float[Array, ""]
    """Factor on the gradient that brings its norm down to the largest allowed."""
    rate: Float[Array, ""]
    """Learning rate, divided by the bias correction of the first moment."""
    spread: Float[Array, ""]
    """One over the bias correction of the second moment."""


class AdamSettings(NamedTuple):
    """Constants of Adam for one weight array."""

    beta1: float
    beta2: float
    epsilon: float
    rate_factor: float
    """Factor on the learning rate of this array."""
    unit_rows: bool
    """Whether every row keeps norm 1: gradients are projected on the sphere, rows are normalised afterwards."""
    of_latents: bool = False
    """Whether the array has a row for every latent."""


class Moments(NamedTuple):
    """A weight array and its Adam moments."""

    p: Array
    mu: Array
    nu: Array


@dataclasses.dataclass(frozen=True)
class Ops(abc.ABC):
    """The plan of a step: an implementation of its operations, and the dtype of its products.

    An instance is frozen and hashable. It is chosen once (`jsae.ops.choose`) and passed down as a static argument.
    Every implementation computes the same functions and gradients; `Reference` is the definition.

    Shapes: n tokens, d = d_in, f = d_sae, o = d_out, k codes per token.
    """

    matmul_dtype: MatmulDtype = "float32"
    """The dtype that factors of matrix products are rounded to. Sums, weights and moments are float32."""

    name: ClassVar[str]
    """Name of the implementation."""
    narrow: ClassVar[bool] = False
    """Whether products with far more columns than their factors are stored in `matmul_dtype`."""

    def matmul(self, a: Float[Array, "n m"], b: Float[Array, "m o"]) -> Float[Array, "n o"]:
        """Return a @ b, with factors of `matmul_dtype` and sums in float32."""
        return products.matmul(a, b, self.matmul_dtype, self.narrow)

    # ---- encoder --------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def pre_activations(
        self, inputs: Input, W_enc: Float[Array, "f d"], b_enc: Float[Array, " f"]
    ) -> Float[Array, "n f"]:
        """Return (x * scale - b_in) W_enc^T + b_enc."""

    @abc.abstractmethod
    def map_latents(
        self,
        inputs: Input,
        W_enc: Float[Array, "f d"],
        b_enc: Float[Array, " f"],
        formula: Formula,
        arrays: PerLatent,
    ) -> tuple[Maps, PerLatent]:
        """Return the maps of a formula of the pre-activations and some arrays, and the sums of its terms over tokens.

        Args:
          inputs: n tokens.
          W_enc: encoder, one row per latent.
          b_enc: encoder bias.
          formula: an elementwise function.
          arrays: its arrays, (f,) each.

        Returns:
          The maps, (n, f) each, and the sums, (f,) each.
        """

    @abc.abstractmethod
    def latent_totals(self, latents: Float[Array, "n f"]) -> tuple[Int[Array, " f"], Float[Array, " f"]]:
        """Return of every latent the number of tokens on which it is not zero, and the sum of its magnitudes.

        Nothing is differentiated.
        """

    @abc.abstractmethod
    def top_k(
        self,
        pre: Float[Array, "n f"],
        k: int,
        limit: Int[Array, ""] | None = None,
        bias: Float[Array, " f"] | None = None,
    ) -> Codes:
        """Return the k largest of every row of pre (+ bias), largest first. Equal values may come in any order.

        Raises:
          ValueError: k is not between 1 and f.
        """

    @abc.abstractmethod
    def abs_top_k(
        self,
        pre: Float[Array, "n f"],
        k: int,
        limit: Int[Array, ""] | None = None,
        bias: Float[Array, " f"] | None = None,
    ) -> Codes:
        """Return the k entries of every row of pre (+ bias) with the largest magnitude, with their signs.

        Minus infinity counts as the smallest magnitude.

        Raises:
          ValueError: k is not between 1 and f.
        """

    @abc.abstractmethod
    def batch_top_k(
        self,
        pre: Float[Array, "n f"],
        k: int,
        limit: Int[Array, ""] | None = None,
        bias: Float[Array, " f"] | None = None,
    ) -> Codes:
        """Return the n k largest positive entries of pre (+ bias), in the order of their tokens.

        Where fewer are positive the remaining codes have value 0. Of equal values at the threshold any may be taken.

        Raises:
          ValueError: k is not between 1 and f.
        """

    @abc.abstractmethod
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
        """Return the codes that `select(pre, limit=, bias=)` picks of the pre-activations, raw: without ReLU.

        Gradients reach only what was picked with a value other than 0, and never the scale.

        Args:
          inputs: n tokens.
          W_enc: encoder, one row per latent.
          b_enc: encoder bias.
          select: a partial of `top_k`, `abs_top_k` or `batch_top_k`, or a function of the same form.
          limit: passed on to `select`.
          allowed: latents that may be picked; None allows all. A pick that had to fall on another has value 0.
          by_token: whether `select` treats every token by itself, so that tokens may be encoded in parts.
        """

    # ---- decoder --------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def decode(self, codes: Codes, W_dec: Float[Array, "f o"], start: Float[Array, "n o"]) -> Float[Array, "n o"]:
        """Return start[t] + sum of values[i, j] * W_dec[indices[i, j]] over the codes of token t."""

    @abc.abstractmethod
    def decode_parts(
        self, codes: Codes, W_dec: Float[Array, "f o"], level: Int[Array, "n k"], levels: int, n: int
    ) -> Float[Array, "l n o"]:
        """Return for every level l below `levels` the decoding of the codes of n tokens whose level is at most l."""

    def decode_levels(
        self, codes: Codes, W_dec: Float[Array, "f o"], widths: tuple[int, ...], n: int
    ) -> Float[Array, "l n o"]:
        """Return for every width w the decoding of the codes of n tokens with indices below w. Widths increase."""
        level = jnp.searchsorted(jnp.asarray(widths), codes.indices, side="right")
        return self.decode_parts(codes, W_dec, level, len(widths), n)

    @abc.abstractmethod
    def times_fired(self, codes: Codes, f: int) -> Int[Array, " f"]:
        """Return the number of codes of every latent that are not zero. A selected latent with value 0 did not fire."""

    @abc.abstractmethod
    def rows_of_tokens(self, x: Float[Array, "n d"], tokens: Int[Array, " f"]) -> Float[Array, "f d"]:
        """Return for every latent the row of x of its token."""

    # ---- whole step -----------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def if_any(self, condition: Bool[Array, ""], do: Callable[[], Result], otherwise: Callable[[], Result]) -> Result:
        """Return `do()`, or `otherwise()`, which gives the same where the condition is false and costs less."""

    @abc.abstractmethod
    def sum_over_tokens(
        self, function: Callable[[Any], Result], arrays: Any, d_in: int, d_sae: int, *, gradients: bool
    ) -> Result:
        """Return `function(arrays)`, where function is a sum over tokens, possibly added up over parts of the batch.

        Args:
          function: from a tree of arrays with n rows to a tree of sums.
          arrays: the tree.
          d_in: input width, from which the size of a part is chosen.
          d_sae: number of latents, from which the size of a part is chosen.
          gradients: whether the sums are gradients of all weights, so that few large parts are better.
        """

    @abc.abstractmethod
    def adam(self, scalars: AdamScalars, settings: AdamSettings, g: Array, moments: Moments) -> Moments:
        """Return one weight array and its moments after an update by the gradient g.

        With d = clip * g, projected on the tangent of unit rows where the settings ask for it:
        mu' = beta1 mu + (1 - beta1) d;  nu' = beta2 nu + (1 - beta2) d^2;
        p' = p - rate * mu' / (sqrt(spread * nu') + epsilon), rows normalised where the settings ask for it.
        """


def slice_rows(arrays: Any, start: Int[Array, ""], size: int) -> Any:
    """Return rows start to start + size of every array of a tree."""
    return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, size), arrays)
