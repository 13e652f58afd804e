"""JumpReLU and the step function with a learned threshold, whose gradients use a window around the threshold."""

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
    """Return the pre-activations that exceed their thresholds, and 0 for all others.

    Rajamanoharan et al. 2024, "Jumping ahead" (arXiv 2407.14435), equations 11 and 12: the gradient of the threshold
    is -threshold / width within the window.

    Args:
      pre: pre-activations, (n, f).
      threshold: thresholds, (f,).
      width: width of the window.
      to_input: whether the pre-activation also gets the gradient threshold / width within the window, as in
        Anthropic's circuits update of January 2025.
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
    """Return 1 where a pre-activation exceeds its threshold, else 0.

    The gradient of the threshold is -1 / width within the window (arXiv 2407.14435, equation 12), that of `pre` zero.
    """
    return (pre > threshold).astype(pre.dtype)


def _step_forward(pre, threshold, width):
    return step(pre, threshold, width), (pre, threshold)


def _step_backward(width, saved, g):
    pre, threshold = saved
    return jnp.zeros_like(pre), -(_window(pre, threshold, width) * g / width).sum(0)


step.defvjp(_step_forward, _step_backward)
