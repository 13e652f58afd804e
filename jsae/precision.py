"""In which numbers matrices are multiplied. Weights, moments, and the sums of products are float32 in any case."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Dtype = Literal["float32", "bfloat16"]

_chosen: contextvars.ContextVar[Dtype] = contextvars.ContextVar("dtype of products", default="float32")


@contextlib.contextmanager
def multiplying_in(dtype: Dtype) -> Iterator[None]:
    """Every `matmul` that is traced inside multiplies numbers of this type, forwards and backwards."""
    token = _chosen.set(dtype)
    try:
        yield
    finally:
        _chosen.reset(token)


def is_reduced() -> bool:
    """Whether `matmul` now rounds what it is given."""
    return _chosen.get() != "float32"


def matmul(a: Float[Array, "n m"], b: Float[Array, "m o"]) -> Float[Array, "n o"]:
    """The product of both, summed in float32."""
    return _in_bfloat16(a, b) if is_reduced() else jnp.matmul(a, b, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _in_bfloat16(a: Float[Array, "n m"], b: Float[Array, "m o"]) -> Float[Array, "n o"]:
    return _rounded(a, b)


def _forward(a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    return _rounded(a, b), (a, b)


def _backward(saved: tuple[Array, Array], g: Float[Array, "n o"]) -> tuple[Array, Array]:
    a, b = saved
    return _rounded(g, b.T), _rounded(a.T, g)


_in_bfloat16.defvjp(_forward, _backward)


def _rounded(a: Array, b: Array) -> Array:
    return jnp.matmul(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
