"""The optimiser: one optax transformation, Adam on weights whose decoder rows stay on the sphere."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int

from jsae import paths
from jsae.config import TrainConfig

_EPSILON = 1e-8
_THRESHOLD_RATE = 10.0  # learning rate of thresholds, relative to the rest's


class _Scalars(NamedTuple):
    """What is one number for all weights."""

    clip: Float[Array, ""]
    """The factor on the gradient, which brings its norm down to the largest allowed."""
    rate: Float[Array, ""]
    """The learning rate, over the share of the first moment that is there already."""
    spread: Float[Array, ""]
    """One over that share of the second moment."""


class _Moved(NamedTuple):
    """One weight and its moments."""

    p: Array
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
    `optax.scale_by_learning_rate` and a norm of 1 for every decoder row computes, written as one pass over every
    weight: a chain writes and reads the gradients anew between its links. Thresholds get a higher rate: Adam moves the
    logarithm of a threshold by at most the learning rate a step, far less than a direction turns.
    """
    adam = optax.scale_by_adam(config.beta1, config.beta2, _EPSILON)

    def update(grads: Any, state: optax.ScaleByAdamState, params: Any) -> tuple[Any, optax.ScaleByAdamState]:
        new, state = apply(config, d_sae, grads, state, params)
        return jax.tree.map(jnp.subtract, new, params), state

    return optax.GradientTransformation(adam.init, update)


def apply(
    config: TrainConfig, d_sae: int, grads: Any, state: optax.ScaleByAdamState, params: Any, factor: float = 1.0
) -> tuple[Any, optax.ScaleByAdamState]:
    """The weights with `optimizer`'s update on them, and its state, a block of rows after the other.

    The gradient is `factor` times `grads`. Weights and moments are overwritten where they stand, so that a step takes
    no more memory than one block.
    """
    count = state.count + 1
    norm = factor * jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads)))
    scalars = _Scalars(
        factor * jnp.minimum(1, config.clip_norm / norm),
        schedule(config, d_sae)(state.count) / (1 - config.beta1**count),
        1 / (1 - config.beta2**count),
    )

    def one(path: tuple[Any, ...], *arrays: Array) -> _Moved:
        return _moved(config, _name(path), scalars, *arrays)

    moved = jax.tree_util.tree_map_with_path(one, grads, params, state.mu, state.nu)
    params, mu, nu = (
        jax.tree.map(lambda m, i=i: m[i], moved, is_leaf=lambda m: isinstance(m, _Moved)) for i in range(3)
    )
    return params, optax.ScaleByAdamState(count, mu, nu)


def _moved(
    config: TrainConfig, name: str | None, scalars: _Scalars, g: Array, p: Array, mu: Array, nu: Array
) -> _Moved:
    """One weight after the step."""
    is_rows = name == "W_dec"
    rate = scalars.rate * (_THRESHOLD_RATE if name == "log_threshold" else 1)

    def part(at: Callable[[Array], Array], put: Callable[[Array, Array], Array], now: _Moved) -> _Moved:
        p, mu, nu = now
        d = scalars.clip * (tangent_rows(at(g), at(p)) if is_rows else at(g))
        mu = put(mu, config.beta1 * at(mu) + (1 - config.beta1) * d)
        nu = put(nu, config.beta2 * at(nu) + (1 - config.beta2) * jnp.square(d))
        # Read back, or the compiler works them out a second time, from what it must then keep a copy of.
        new = at(p) - rate * at(mu) / (jnp.sqrt(scalars.spread * at(nu)) + _EPSILON)
        return _Moved(put(p, _unit(new) if is_rows else new), mu, nu)

    size = paths.chosen().block
    if size is None or g.ndim < 2 or (rows := paths.part_of(len(g), max(size // g.shape[1], 1))) == len(g):
        return part(lambda a: a, lambda _, new: new, _Moved(p, mu, nu))

    def block(i: Int[Array, ""], now: _Moved) -> _Moved:
        return part(
            lambda a: lax.dynamic_slice_in_dim(a, i * rows, rows),
            lambda a, new: lax.dynamic_update_slice_in_dim(a, new, i * rows, 0),
            now,
        )

    return lax.fori_loop(0, len(g) // rows, block, _Moved(p, mu, nu))


def tangent_rows(g: Float[Array, "f d"], row: Float[Array, "f d"]) -> Float[Array, "f d"]:
    """Takes from the gradient of every unit row its part along the row, which the norm would undo."""
    return g - _dots(g, row)[:, None] * row


def _unit(rows: Float[Array, "f d"]) -> Float[Array, "f d"]:
    return rows * lax.rsqrt(_dots(rows, rows))[:, None]


def _dots(a: Float[Array, "f d"], b: Float[Array, "f d"]) -> Float[Array, " f"]:
    """Row by row, as a product, so that no array of the products is written."""
    return jnp.einsum("fd,fd->f", a, b)


def _name(path: tuple[Any, ...]) -> str | None:
    """The name of the weight at a path."""
    names = [getattr(p, "name", getattr(p, "key", None)) for p in path]
    return next((n for n in names if n in ("W_dec", "log_threshold")), None)
