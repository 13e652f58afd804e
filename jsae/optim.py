"""Optimisers: Adam on weights whose decoder rows keep norm 1, and any `optax.GradientTransformation` in its place."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jsae.config import TrainConfig
from jsae.ops import AdamScalars, AdamSettings, Moments, Ops
from jsae.ops.reference import tangent_rows

EPSILON = 1e-8
_UNIT = "W_dec"  # the array whose rows keep norm 1


@runtime_checkable
class Optimizer(Protocol):
    """What a step needs of an optimiser. Instances are hashable: they are part of a compiled program."""

    def init(self, params: Any) -> Any:
        """Return the state before the first step."""

    def apply(self, grads: Any, state: Any, params: Any, factor: float = 1.0) -> tuple[Any, Any]:
        """Return the weights after one update by `factor * grads`, decoder rows of norm 1, and the new state."""


def schedule(config: TrainConfig, d_sae: int) -> optax.Schedule:
    """Return step -> learning rate: linear warm-up, a plateau, linear decay to zero over the last part of the run."""
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


@dataclasses.dataclass(frozen=True)
class UnitRowAdam:
    """Clip by global norm, project decoder gradients on the sphere, Adam, learning rate, back on the sphere.

    It computes what a chain of `optax.clip_by_global_norm`, the projection, `optax.scale_by_adam`,
    `optax.scale_by_learning_rate` and a norm of 1 for every decoder row computes, in one pass over every weight.

    Args:
      config: rates and constants.
      d_sae: number of latents, for the default rate.
      ops: the implementation of the update.
      rate_factors: factors on the learning rate by the name of the array, as pairs.
    """

    config: TrainConfig
    d_sae: int
    ops: Ops
    rate_factors: tuple[tuple[str, float], ...] = ()

    def init(self, params: Any) -> optax.ScaleByAdamState:
        """Return moments of zero."""
        return optax.scale_by_adam(self.config.beta1, self.config.beta2, EPSILON).init(params)

    def apply(
        self, grads: Any, state: optax.ScaleByAdamState, params: Any, factor: float = 1.0
    ) -> tuple[Any, optax.ScaleByAdamState]:
        """Return the weights after one update by `factor * grads`, and the new moments."""
        config, count = self.config, state.count + 1
        norm = factor * jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads)))
        scalars = AdamScalars(
            factor * jnp.minimum(1, config.clip_norm / norm),
            schedule(config, self.d_sae)(state.count) / (1 - config.beta1**count),
            1 / (1 - config.beta2**count),
        )
        factors = dict(self.rate_factors)

        def one(path: tuple[Any, ...], g: Array, *arrays: Array) -> Moments:
            names = names_of(path)
            rate_factor = next((factors[n] for n in names if n in factors), 1.0)
            settings = AdamSettings(config.beta1, config.beta2, EPSILON, rate_factor, _UNIT in names)
            return self.ops.adam(scalars, settings, g, Moments(*arrays))

        moved = jax.tree_util.tree_map_with_path(one, grads, params, state.mu, state.nu)
        params, mu, nu = (
            jax.tree.map(lambda m, i=i: m[i], moved, is_leaf=lambda m: isinstance(m, Moments)) for i in range(3)
        )
        return params, optax.ScaleByAdamState(count, mu, nu)


@dataclasses.dataclass(frozen=True)
class UnitRows:
    """Any optax transformation, between a projection of decoder gradients on the sphere and a norm of 1 for every row.

    Args:
      inner: the transformation; it contains its own learning rate.
    """

    inner: optax.GradientTransformation

    def init(self, params: Any) -> Any:
        """Return the state of the transformation."""
        return self.inner.init(params)

    def apply(self, grads: Any, state: Any, params: Any, factor: float = 1.0) -> tuple[Any, Any]:
        """Return the weights after one update by `factor * grads`, and the new state."""

        def project(path: tuple[Any, ...], g: Array, p: Array) -> Array:
            return factor * (tangent_rows(g, p) if _UNIT in names_of(path) else g)

        def normalise(path: tuple[Any, ...], p: Array) -> Array:
            return p / jnp.linalg.norm(p, axis=1, keepdims=True) if _UNIT in names_of(path) else p

        grads = jax.tree_util.tree_map_with_path(project, grads, params)
        updates, state = self.inner.update(grads, state, params)
        return jax.tree_util.tree_map_with_path(normalise, optax.apply_updates(params, updates)), state


def make(
    config: TrainConfig,
    d_sae: int,
    ops: Ops,
    rate_factors: Mapping[str, float] | None = None,
    inner: optax.GradientTransformation | None = None,
) -> Optimizer:
    """Return the optimiser of an SAE: `UnitRowAdam`, or `UnitRows` around a transformation that is given."""
    if inner is not None:
        return UnitRows(inner)
    return UnitRowAdam(config, d_sae, ops, tuple(sorted((rate_factors or {}).items())))


def names_of(path: tuple[Any, ...]) -> list[str]:
    """Return the names along a path of a pytree."""
    return [str(getattr(p, "name", getattr(p, "key", ""))) for p in path]
