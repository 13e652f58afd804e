"""Matrix products whose factors are rounded to bfloat16 and whose sums are float32, forward and backward."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

MatmulDtype = Literal["float32", "bfloat16"]
_WIDER = 4  # how many times as many columns make a product wide


def matmul(
    a: Float[Array, "n m"], b: Float[Array, "m o"], dtype: MatmulDtype, narrow: bool = False
) -> Float[Array, "n o"]:
    """Return a @ b, summed in float32. With `bfloat16` the factors of this product and of its gradients are rounded.

    With `narrow`, a product in bfloat16 that is at least four times as wide as its first factor is rounded too: what is
    kept for the backward pass takes half the memory. So is the gradient of such a factor.
    """
    if dtype == "float32":
        return jnp.matmul(a, b, preferred_element_type=jnp.float32)
    return _in_bfloat16(a, b, narrow)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _in_bfloat16(a: Float[Array, "n m"], b: Float[Array, "m o"], narrow: bool) -> Float[Array, "n o"]:
    return _rounded(a, b, narrow)


def _forward(a: Array, b: Array, narrow: bool) -> tuple[Array, tuple[Array, Array]]:
    return _rounded(a, b, narrow), (a, b)


def _backward(narrow: bool, saved: tuple[Array, Array], g: Float[Array, "n o"]) -> tuple[Array, Array]:
    a, b = saved
    return _rounded(g, b.T, narrow), _rounded(a.T, g, False)


_in_bfloat16.defvjp(_forward, _backward)


def _rounded(a: Array, b: Array, narrow: bool) -> Array:
    wide = narrow and b.shape[1] >= _WIDER * b.shape[0]
    product = jnp.matmul(
        a.astype(jnp.bfloat16),
        b.astype(jnp.bfloat16),
        preferred_element_type=jnp.bfloat16 if wide else jnp.float32,
    )
    return product.astype(jnp.float32)
