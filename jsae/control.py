"""The controller that moves L0 to its target by the strength of the sparsity penalty: proportional and integral."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

FIRST_STRENGTH = 0.1
"""Strength of a controlled penalty at first: one that is too strong kills latents before they have learned."""

_LEAD = 0.3  # the part of the run over which L0 is led from where it starts to its target
_GAIN = 30.0  # an L0 that is e times too large makes the strength e times larger within 1 / _GAIN of the run
_MEMORY = 0.8  # of the running mean of L0 that the proportional part answers to


class Control(NamedTuple):
    """The controller's state, which is part of the training state."""

    strength: Float[Array, ""]
    """The integral part, as a factor on the penalty."""
    first_l0: Float[Array, ""]
    """L0 of the first step."""
    l0: Float[Array, ""]
    """Running mean of L0 over the last few steps."""


def begin(target: float | None) -> Control:
    """Return the state before the first step. Without a target the strength is 1 throughout."""
    return Control(jnp.float32(1 if target is None else FIRST_STRENGTH), jnp.float32(0), jnp.float32(0))


def strength(
    control: Control, target: float | None, proportional: float, number: Int[Array, ""], num_steps: int
) -> Float[Array, ""]:
    """Return the factor on the penalty in step `number` >= 1: the integral part times exp(`proportional` * error)."""
    if target is None:
        return control.strength
    error = _error(control.l0, control.first_l0, target, number, num_steps)
    return control.strength * jnp.where(number == 1, 1, jnp.exp(proportional * error))


def after(
    control: Control, target: float | None, l0: Float[Array, ""], number: Int[Array, ""], num_steps: int
) -> Control:
    """Return the state after step `number`, whose batch had this L0.

    L0 falls by itself as an SAE learns, and a controller that asked for the end at once would overshoot and kill
    latents. So the wanted L0 goes from the first step's down to the target in a straight line of logarithms.
    """
    if target is None:
        return control
    first_l0 = jnp.where(number == 1, l0, control.first_l0)
    error = _error(l0, first_l0, target, number, num_steps)
    return Control(
        strength=control.strength * jnp.exp(_GAIN / num_steps * error),
        first_l0=first_l0,
        l0=jnp.where(number == 1, l0, _MEMORY * control.l0 + (1 - _MEMORY) * l0),
    )


def _error(
    l0: Float[Array, ""], first_l0: Float[Array, ""], target: float, number: Int[Array, ""], num_steps: int
) -> Float[Array, ""]:
    """Return log(L0 / wanted L0), clipped to [-1, 1]."""
    lead = jnp.maximum(1 - number / (_LEAD * num_steps), 0)
    wanted = jnp.log(target) + lead * jnp.log(jnp.maximum(first_l0, target) / target)
    return jnp.clip(jnp.log(jnp.maximum(l0, 1e-3)) - wanted, -1, 1)
