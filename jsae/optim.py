"""The optimiser: one optax transformation, Adam on weights whose decoder rows stay on the sphere."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jsae.config import TrainConfig

_EPSILON = 1e-8
_THRESHOLD_RATE = 10.0  # learning rate of thresholds, relative to the rest's


class _Moved(NamedTuple):
    """What a step makes of one weight."""

    update: Array
    mu: Array
    nu: Array


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
    """Clip by global norm, project decoder gradients on the sphere, Adam, learning rate, back on the sphere.

    It is what a chain of `optax.clip_by_global_norm`, `tangent_rows`, `optax.scale_by_adam`,
    `optax.scale_by_learning_rate` and `unit_rows` computes, written as one pass over every weight: a chain writes and
    reads the gradients anew between its links. Thresholds get a higher rate: Adam moves the logarithm of a threshold by
    at most the learning rate a step, far less than a direction turns.
    """
    rate = schedule(config, d_sae)
    adam = optax.scale_by_adam(config.beta1, config.beta2, _EPSILON)

    def update(grads: Any, state: optax.ScaleByAdamState, params: Any) -> tuple[Any, optax.ScaleByAdamState]:
        count = state.count + 1
        # Scalars are worked out once, and not for every number that they multiply.
        clip, step, spread = jax.lax.optimization_barrier(
            (
                jnp.minimum(1, config.clip_norm / jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads)))),
                rate(state.count) / (1 - config.beta1**count),
                1 / (1 - config.beta2**count),
            )
        )

        def one(path: tuple[Any, ...], g: Array, p: Array, mu: Array, nu: Array) -> _Moved:
            name = _name(path)
            if name == "W_dec":
                g = tangent_rows(g, p)
            g = clip * g
            mu = config.beta1 * mu + (1 - config.beta1) * g
            nu = config.beta2 * nu + (1 - config.beta2) * jnp.square(g)
            u = -step * mu / (jnp.sqrt(spread * nu) + _EPSILON)
            if name == "log_threshold":
                u = _THRESHOLD_RATE * u
            return _Moved(unit_rows(u, p) if name == "W_dec" else u, mu, nu)

        moved = jax.tree_util.tree_map_with_path(one, grads, params, state.mu, state.nu)
        updates, mu, nu = (
            jax.tree.map(lambda m, i=i: m[i], moved, is_leaf=lambda m: isinstance(m, _Moved)) for i in range(3)
        )
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(adam.init, update)


def tangent_rows(g: Float[Array, "f d"], row: Float[Array, "f d"]) -> Float[Array, "f d"]:
    """Takes from the gradient of every unit row its part along the row, which the norm would undo."""
    return g - _dots(g, row)[:, None] * row


def unit_rows(u: Float[Array, "f d"], row: Float[Array, "f d"]) -> Float[Array, "f d"]:
    """Bends the update so that every row + update has norm 1."""
    moved = row + u
    return moved * jax.lax.rsqrt(_dots(moved, moved))[:, None] - row


def _dots(a: Float[Array, "f d"], b: Float[Array, "f d"]) -> Float[Array, " f"]:
    """Row by row, as a product, so that no array of the products is written."""
    return jnp.einsum("fd,fd->f", a, b)


def _name(path: tuple[Any, ...]) -> str | None:
    """The name of the weight at a path."""
    names = [getattr(p, "name", getattr(p, "key", None)) for p in path]
    return next((n for n in names if n in ("W_dec", "log_threshold")), None)
