"""A proportional-integral controller that moves L0 to its target through the strength of the sparsity penalty."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

FIRST_STRENGTH = 0.1
"""Initial strength of a controlled penalty. A penalty that is too strong kills latents before they have learned."""

_GAIN = 30.0  # at the end of a run an L0 that is e times too large makes the strength e times larger in 1 / _GAIN of it
_MEMORY = 0.8  # decay of the running mean of L0, to which the proportional part responds


class Law(NamedTuple):
    """Law by which the controller leads an architecture's L0 to its target."""

    proportional: float = 1.0
    """Gain of the proportional part; higher where the penalty acts more quickly."""
    exponent: float = 0.2
    """The desired L0 falls as this power of the share of the run that has passed."""
    fraction: float = 0.85
    """Share of the run after which the desired L0 is the target."""
    growth: float = 1.0
    """The gain of the integral part grows as this power of the share of the run."""


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
    control: Control, target: float | None, law: Law, number: Int[Array, ""], num_steps: int
) -> Float[Array, ""]:
    """Return the factor on the penalty in a step: the integral part times exp(`proportional` * error).

    Args:
      control: the state before the step.
      target: the target L0, or None.
      law: that of the architecture.
      number: number of the step, from 1.
      num_steps: number of steps of the run.
    """
    if target is None:
        return control.strength
    error = _error(control.l0, control.first_l0, target, law, number / num_steps)
    return control.strength * jnp.where(number == 1, 1, jnp.exp(law.proportional * error))


def update(
    control: Control, target: float | None, law: Law, l0: Float[Array, ""], number: Int[Array, ""], num_steps: int
) -> Control:
    """Return the state after a step.

    Under a constant penalty L0 falls as an SAE learns, first quickly and then ever more slowly. A controller that aimed
    at the target at once would have to raise the penalty far above the strength that it needs in the end, which kills
    latents and leaves worse ones. So the desired L0 falls as it would under a nearly constant penalty, as a power of
    the share of the run, and the gain of the integral part grows with that share.

    Args:
      control: the state before the step.
      target: the target L0, or None.
      law: that of the architecture.
      l0: L0 of the step's batch.
      number: number of the step, from 1.
      num_steps: number of steps of the run.
    """
    if target is None:
        return control
    first_l0, share = jnp.where(number == 1, l0, control.first_l0), number / num_steps
    error = _error(l0, first_l0, target, law, share)
    return Control(
        strength=control.strength * jnp.exp(_GAIN * share**law.growth / num_steps * error),
        first_l0=first_l0,
        l0=jnp.where(number == 1, l0, _MEMORY * control.l0 + (1 - _MEMORY) * l0),
    )


def _error(
    l0: Float[Array, ""], first_l0: Float[Array, ""], target: float, law: Law, share: Float[Array, ""]
) -> Float[Array, ""]:
    """Return log(L0 / desired L0), clipped to [-1, 1]. The desired L0 is never above that of the first step."""
    above = law.exponent * jnp.maximum(jnp.log(law.fraction / share), 0)
    desired = jnp.log(target) + jnp.minimum(above, jnp.log(jnp.maximum(first_l0, target) / target))
    return jnp.clip(jnp.log(jnp.maximum(l0, 1e-3)) - desired, -1, 1)
