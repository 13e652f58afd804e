"""The optimiser: one optax chain, in which the constraint on decoder rows is two of the links."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jsae.config import TrainConfig

_THRESHOLD_RATE = 10.0  # learning rate of thresholds, relative to the rest's


def schedule(config: TrainConfig, d_sae: int) -> optax.Schedule:
    """Linear warm-up, a plateau, then linear decay to zero over the last part of the run; step to learning rate."""
    steps = config.num_steps
    warmup, decay = round(config.warmup_fraction * steps), round(config.decay_fraction * steps)
    peak = config.peak_rate(d_sae)
    # The first step already moves: the ramp goes from peak / warmup to peak.
    pieces = [
        optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1)),
        optax.constant_schedule(peak),
        optax.linear_schedule(peak, 0.0, max(decay, 1)),
    ]
    return optax.join_schedules(pieces, [warmup, steps - decay])


def optimizer(config: TrainConfig, d_sae: int) -> optax.GradientTransformation:
    """Clip, project decoder gradients on the sphere, Adam, learning rate (thresholds get more), back on the sphere.

    Adam moves the logarithm of a threshold by at most the learning rate a step, far less than a direction turns.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        tangent_rows(),
        optax.scale_by_adam(config.beta1, config.beta2),
        optax.scale_by_learning_rate(schedule(config, d_sae)),
        _on("log_threshold", lambda u, _: _THRESHOLD_RATE * u),
        unit_rows(),
    )


def tangent_rows() -> optax.GradientTransformation:
    """Takes from the update of every row of `W_dec` its part along the row, which a unit norm would undo."""

    def project(g: Float[Array, "f d"], row: Float[Array, "f d"]) -> Float[Array, "f d"]:
        return g - (g * row).sum(-1, keepdims=True) * row / jnp.square(row).sum(-1, keepdims=True)

    return _on("W_dec", project)


def unit_rows() -> optax.GradientTransformation:
    """Bends the update so that every row of `W_dec` + update has norm 1. The last link of a chain."""

    def bend(u: Float[Array, "f d"], row: Float[Array, "f d"]) -> Float[Array, "f d"]:
        moved = row + u
        return moved / jnp.linalg.norm(moved, axis=-1, keepdims=True) - row

    return _on("W_dec", bend)


def _on(name: str, change: Callable[[Array, Array], Array]) -> optax.GradientTransformation:
    """A stateless link that applies `change(update, parameter)` to one weight and leaves the rest alone."""

    def at(path: tuple[Any, ...], update: Array, parameter: Array) -> Array:
        mine = any(getattr(p, "name", getattr(p, "key", None)) == name for p in path)
        return change(update, parameter) if mine else update

    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(at, updates, params))
