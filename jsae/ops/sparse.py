"""Operations that touch only the rows a token uses, with gradients that stay sparse.

What every fast implementation shares: the derivatives. How latents are selected and rows are summed is left to the
implementation.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jsae.ops.interface import Ops, Result
from jsae.ops.types import Codes, Input, Select


@dataclasses.dataclass(frozen=True)
class SparseOps(Ops):
    """Sparse forward and backward passes over implementations of three sums of rows. Abstract."""

    @abc.abstractmethod
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
        """Return the codes that `encode` selects; those of latents that are not allowed have minus infinity.

        Nothing is differentiated.
        """

    @abc.abstractmethod
    def decoded(self, codes: Codes, W: Float[Array, "f d"], start: Float[Array, "n d"]) -> Float[Array, "n d"]:
        """Return start[t] + sum of values[i, j] * W[indices[i, j]] over the codes of token t."""

    @abc.abstractmethod
    def dots(self, codes: Codes, g: Float[Array, "n d"], W: Float[Array, "f d"]) -> Float[Array, "m k"]:
        """Return g[token] . W[latent] of every code: the gradient of its value."""

    @abc.abstractmethod
    def latent_sums(self, codes: Codes, inputs: Input, f: int) -> Float[Array, "f d"]:
        """Return out[i] = sum of value * input[token] over the codes of latent i: the gradient of a weight matrix."""

    @abc.abstractmethod
    def value_sums(self, codes: Codes, f: int) -> Float[Array, " f"]:
        """Return the sum of the values of every latent: the gradient of an encoder bias."""

    def pre_activations(
        self, inputs: Input, W_enc: Float[Array, "f d"], b_enc: Float[Array, " f"]
    ) -> Float[Array, "n f"]:
        """Return (x * scale) W_enc^T + (b_enc - b_in W_enc^T): the gradient of b_in needs no n x f x d product."""
        centred, bias = self.centred(inputs, W_enc, b_enc)
        return self.matmul(centred.read(), W_enc.T) + bias

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
        """Pick codes; their gradients reach only the rows of their latents."""
        return _encode(self, select, by_token, inputs, W_enc, b_enc, allowed, limit)

    def decode(self, codes: Codes, W_dec: Float[Array, "f o"], start: Float[Array, "n o"]) -> Float[Array, "n o"]:
        """Sum the rows that the codes name."""
        return _decode(self, codes, W_dec, start)

    def if_any(self, condition: Bool[Array, ""], do: Callable[[], Result], otherwise: Callable[[], Result]) -> Result:
        """Decide on the device."""
        return lax.cond(condition, do, otherwise)

    def centred(
        self, inputs: Input, W_enc: Float[Array, "f d"], b_enc: Float[Array, " f"]
    ) -> tuple[Input, Float[Array, " f"]]:
        """Return inputs and bias whose product and sum are the pre-activations, with b_in moved into the bias.

        Where factors are rounded, the input is centred before it is rounded: what all tokens have in common would cost
        the digits that tell them apart. That uses a copy of b_in without a gradient; the bias has the gradient.
        """
        if inputs.b_in is None:
            return inputs, b_enc
        if self.matmul_dtype == "float32":
            return inputs._replace(b_in=None), b_enc - W_enc @ inputs.b_in
        centre = lax.stop_gradient(inputs.b_in)
        return inputs._replace(b_in=centre), b_enc - W_enc @ (inputs.b_in - centre)


# ---- derivatives --------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _decode(ops: SparseOps, codes: Codes, W_dec: Float[Array, "f d"], start: Float[Array, "n d"]) -> Array:
    return ops.decoded(codes, W_dec, start)


def _decode_forward(ops, codes, W_dec, start):
    return ops.decoded(codes, W_dec, start), (codes, W_dec)


def _decode_backward(ops, saved, g):
    codes, W_dec = saved
    rows = None if codes.rows is None else _no_gradient(codes.rows)
    dcodes = Codes(ops.dots(codes, g, W_dec), _no_gradient(codes.indices), rows)
    return dcodes, ops.latent_sums(codes, Input(g), len(W_dec)), g


_decode.defvjp(_decode_forward, _decode_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _encode(
    ops: SparseOps,
    select: Select,
    by_token: bool,
    inputs: Input,
    W_enc: Float[Array, "f d"],
    b_enc: Float[Array, " f"],
    allowed: Bool[Array, " f"] | None,
    limit: Int[Array, ""] | None,
) -> Codes:
    codes = ops.pick(select, by_token, inputs, W_enc, b_enc, allowed, limit)
    if allowed is None:
        return codes
    return codes._replace(values=jnp.where(jnp.isneginf(codes.values), 0, codes.values))


def _encode_forward(ops, select, by_token, inputs, W_enc, b_enc, allowed, limit):
    codes = _encode(ops, select, by_token, inputs, W_enc, b_enc, allowed, limit)
    return codes, (inputs, W_enc, allowed, limit, codes)


def _encode_backward(ops, select, by_token, saved, g):
    inputs, W_enc, allowed, limit, codes = saved
    # A code of value 0 only fills up the array and is no function of the weights.
    dvalues = jnp.where(codes.values == 0, 0, g.values)
    dcodes = codes._replace(values=dvalues)
    db_enc = ops.value_sums(dcodes, len(W_enc))
    dW_enc = ops.latent_sums(dcodes, inputs, len(W_enc))
    # The gradient of x is removed by the compiler where x is data.
    dx = ops.decoded(dcodes, W_enc, jnp.zeros((len(inputs.x), W_enc.shape[1]), jnp.result_type(dvalues, W_enc)))
    dinputs = Input(
        dx if inputs.scale is None else dx * inputs.scale,
        None if inputs.scale is None else jnp.zeros_like(inputs.scale),
        None if inputs.b_in is None else -(db_enc @ W_enc),
    )
    nothing = [None if a is None else _no_gradient(a) for a in (allowed, limit)]
    return dinputs, dW_enc, db_enc, *nothing


_encode.defvjp(_encode_forward, _encode_backward)


def _no_gradient(x: Array) -> np.ndarray:
    """Return the cotangent that jax expects for an array of integers or booleans."""
    return np.zeros(x.shape, jax.dtypes.float0)
