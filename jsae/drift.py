"""Follow activations whose scale and mean drift, as those of a model that is being trained itself.

An SAE is trained on `scale * x`, so one that follows the scale sees activations of one size however the model grows,
and its decoder grows with them when it is exported. `b_dec`, which is also subtracted from the input, moves with the
mean, and keeps the distance from it that was learned.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jsae.state import TrainState

MEMORY = 100
"""Batches over which the running means forget."""


class Drift(NamedTuple):
    """Running means of the activations that one SAE reads and reconstructs."""

    mean: Float[Array, " d"]
    """Of the activations."""
    power: Float[Array, ""]
    """Of their mean square, |x|^2 / d."""
    batches: Int[Array, ""]
    """Number of batches."""


def init(acts: Float[Array, "n d"]) -> Drift:
    """Return the means of a first sample of activations, for a state that `jsae.state.init` made from it."""
    x = acts.astype(jnp.float32)
    return Drift(x.mean(0), jnp.square(x).mean(), jnp.int32(1))


def follow(state: TrainState, drift: Drift, acts: Float[Array, "n d"]) -> tuple[TrainState, Drift]:
    """Move the means towards those of a batch, and scale and `b_dec` with them, before the step on this batch.

        m' = m + r (mean(x) - m)        p' = p + r (mean(x^2) - p)        r = max(1 / MEMORY, 1 / batches)
        scale' = 1 / sqrt(p')           b_dec' = b_dec + scale' m' - scale m

    A batch with numbers that are not finite moves nothing.

    Args:
      state: of an SAE of one activation; `scale` is that of the means.
      drift: the means so far.
      acts: the batch.
    """
    x = acts.astype(jnp.float32)
    batches = drift.batches + 1
    rate = jnp.maximum(1 / MEMORY, 1 / batches)
    rate = jnp.where(jnp.isfinite(x).all(), rate, 0)
    x = jnp.where(jnp.isfinite(x), x, 0)
    mean = drift.mean + rate * (x.mean(0) - drift.mean)
    power = drift.power + rate * (jnp.square(x).mean() - drift.power)
    scale = jax.lax.rsqrt(power)
    shift = scale * mean - state.scale * drift.mean
    new = state._replace(
        sae=_shifted(state.sae, shift),
        average=None if state.average is None else _shifted(state.average, shift),
        scale=scale,
        scale_out=scale,
    )
    return new, Drift(mean, power, batches)


def _shifted(sae, shift: Float[Array, " d"]):
    """Return an SAE whose `b_dec` is moved."""
    new = jax.tree.map(lambda leaf: leaf, sae)
    new.b_dec[...] = new.b_dec[...] + shift
    return new
