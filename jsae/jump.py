"""The jump: ReLU and step with a learned threshold, and gradients through a window around it."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def _window(pre: Float[Array, "n f"], threshold: Float[Array, " f"], width: float) -> Float[Array, "n f"]:
    """Return the rectangle kernel: 1 within width / 2 of the threshold, else 0."""
    return (jnp.abs(pre - threshold) < width / 2).astype(pre.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def jump_relu(
    pre: Float[Array, "n f"], threshold: Float[Array, " f"], width: float, to_input: bool
) -> Float[Array, "n f"]:
    """Return every pre-activation that exceeds its threshold, unchanged, and 0 in the place of the others.

    Rajamanoharan et al. 2024, "Jumping ahead" (arXiv 2407.14435), equations 11 and 12: the gradient of the threshold
    is -threshold / width within the window. With `to_input` the pre-activation gets the opposite of it besides its own,
    as in Anthropic's update of January 2025.
    """
    return jnp.where(pre > threshold, pre, 0)


def _jump_forward(pre, threshold, width, to_input):
    return jump_relu(pre, threshold, width, to_input), (pre, threshold)


def _jump_backward(width, to_input, saved, g):
    pre, threshold = saved
    through = threshold / width * _window(pre, threshold, width) * g
    dpre = jnp.where(pre > threshold, g, 0)
    return (dpre + through if to_input else dpre), -through.sum(0)


jump_relu.defvjp(_jump_forward, _jump_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def step(pre: Float[Array, "n f"], threshold: Float[Array, " f"], width: float) -> Float[Array, "n f"]:
    """Return 1 where pre exceeds its threshold, else 0.

    The gradient of the threshold is -1 / width within the window (equation 12).
    """
    return (pre > threshold).astype(pre.dtype)


def _step_forward(pre, threshold, width):
    return step(pre, threshold, width), (pre, threshold)


def _step_backward(width, saved, g):
    pre, threshold = saved
    return jnp.zeros_like(pre), -(_window(pre, threshold, width) * g / width).sum(0)


step.defvjp(_step_forward, _step_backward)
