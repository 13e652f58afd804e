"""Matrix products whose factors are rounded to bfloat16 and whose sums are float32, forward and backward."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

MatmulDtype = Literal["float32", "bfloat16"]


def matmul(a: Float[Array, "n m"], b: Float[Array, "m o"], dtype: MatmulDtype) -> Float[Array, "n o"]:
    """Return a @ b, summed in float32. With `bfloat16` the factors of this product and of its gradients are rounded."""
    return _in_bfloat16(a, b) if dtype == "bfloat16" else jnp.matmul(a, b, preferred_element_type=jnp.float32)


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
