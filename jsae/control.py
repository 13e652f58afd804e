"""A proportional-integral controller that moves L0 to its target through the strength of the sparsity penalty."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

FIRST_STRENGTH = 0.1
"""Initial strength of a controlled penalty. A penalty that is too strong kills latents before they have learned."""

_GAIN = 30.0  # an L0 that is e times too large makes the strength e times larger within 1 / _GAIN of the run
_MEMORY = 0.8  # decay of the running mean of L0, to which the proportional part responds


class Control(NamedTuple):
    """The state of the controller, a part of the training state."""

    strength: Float[Array, ""]
    """The integral part, as a factor on the penalty."""
    first_l0: Float[Array, ""]
    """L0 of the first step."""
    l0: Float[Array, ""]
    """Running mean of L0 over the last few steps."""


def initial(target: float | None) -> Control:
    """Return the state before the first step. Without a target the strength is always 1."""
    return Control(jnp.float32(1 if target is None else FIRST_STRENGTH), jnp.float32(0), jnp.float32(0))


def strength(
    control: Control, target: float | None, proportional: float, number: Int[Array, ""], num_steps: int, lead: float
) -> Float[Array, ""]:
    """Return the factor on the penalty in a step: the integral part times exp(`proportional` * error).

    Args:
      control: the state before the step.
      target: the target L0, or None.
      proportional: the gain of the proportional part.
      number: number of the step, from 1.
      num_steps: number of steps of the run.
      lead: fraction of the run over which the desired L0 falls to the target.
    """
    if target is None:
        return control.strength
    error = _error(control.l0, control.first_l0, target, number, lead * num_steps)
    return control.strength * jnp.where(number == 1, 1, jnp.exp(proportional * error))


def update(
    control: Control, target: float | None, l0: Float[Array, ""], number: Int[Array, ""], num_steps: int, lead: float
) -> Control:
    """Return the state after a step.

    L0 falls by itself as an SAE learns, and a controller that aimed at the target at once would overshoot and kill
    latents. So the desired L0 falls from that of the first step to the target, linearly in its logarithm.

    Args:
      control: the state before the step.
      target: the target L0, or None.
      l0: L0 of the step's batch.
      number: number of the step, from 1.
      num_steps: number of steps of the run.
      lead: fraction of the run over which the desired L0 falls to the target.
    """
    if target is None:
        return control
    first_l0 = jnp.where(number == 1, l0, control.first_l0)
    error = _error(l0, first_l0, target, number, lead * num_steps)
    return Control(
        strength=control.strength * jnp.exp(_GAIN / num_steps * error),
        first_l0=first_l0,
        l0=jnp.where(number == 1, l0, _MEMORY * control.l0 + (1 - _MEMORY) * l0),
    )


def _error(
    l0: Float[Array, ""], first_l0: Float[Array, ""], target: float, number: Int[Array, ""], steps: float
) -> Float[Array, ""]:
    """Return log(L0 / desired L0), clipped to [-1, 1]."""
    left = jnp.maximum(1 - number / max(steps, 1), 0)
    desired = jnp.log(target) + left * jnp.log(jnp.maximum(first_l0, target) / target)
    return jnp.clip(jnp.log(jnp.maximum(l0, 1e-3)) - desired, -1, 1)
