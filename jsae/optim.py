"""Optimisers that keep decoder rows at norm 1: Adam, or any `optax.GradientTransformation`."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jsae import axes
from jsae.architectures import SAEConfig
from jsae.config import TrainConfig
from jsae.ops import AdamScalars, AdamSettings, Moments, Ops
from jsae.ops.reference import tangent_rows

EPSILON = 1e-8
_UNIT = "W_dec"  # the array whose rows keep norm 1
Rate = float | Float[Array, ""]


@runtime_checkable
class Optimizer(Protocol):
    """Interface of an optimiser. Instances are hashable, because they are static arguments of compiled programs."""

    def init(self, params: Any) -> Any:
        """Return the state before the first step."""

    def apply(self, grads: Any, state: Any, params: Any, rate: Rate, factor: float = 1.0) -> tuple[Any, Any]:
        """Return the weights after one update by `factor * grads`, with decoder rows of norm 1, and the new state.

        `rate` is the peak learning rate, which an optimiser may leave out of account.
        """


def schedule(config: TrainConfig) -> optax.Schedule:
    """Return the learning rate over its peak as a function of the step: linear warm-up, 1, and linear decay to zero."""
    steps = config.num_steps
    warmup, decay = round(config.warmup_fraction * steps), round(config.decay_fraction * steps)
    # The ramp goes from 1 / warmup to 1, so that the first step has a rate above zero.
    pieces = [
        optax.linear_schedule(1 / max(warmup, 1), 1.0, max(warmup - 1, 1)),
        optax.constant_schedule(1.0),
        optax.linear_schedule(1.0, 0.0, max(decay, 1)),
    ]
    return optax.join_schedules(pieces, [warmup, steps - decay])


@dataclasses.dataclass(frozen=True)
class UnitRowAdam:
    """Adam with clipping by global norm, whose decoder rows stay on the unit sphere.

    Computes the same update as a chain of `optax.clip_by_global_norm`, a projection of decoder gradients on the tangent
    space of the sphere, `optax.scale_by_adam`, `optax.scale_by_learning_rate` and a normalisation of decoder rows, in
    one pass over every weight.

    Args:
      config: schedule and constants.
      sae: the SAE, whose architecture has factors on the learning rate.
      ops: the implementation of the update.
    """

    config: TrainConfig
    sae: SAEConfig
    ops: Ops

    def init(self, params: Any) -> optax.ScaleByAdamState:
        """Return zero moments."""
        return optax.scale_by_adam(self.config.beta1, self.config.beta2, EPSILON).init(params)

    def apply(
        self, grads: Any, state: optax.ScaleByAdamState, params: Any, rate: Rate, factor: float = 1.0
    ) -> tuple[Any, optax.ScaleByAdamState]:
        """Return the weights after one update by `factor * grads`, and the new moments."""
        config, count = self.config, state.count + 1
        norm = factor * jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads)))
        scalars = AdamScalars(
            factor * jnp.minimum(1, config.clip_norm / norm),
            rate * schedule(config)(state.count) / (1 - config.beta1**count),
            1 / (1 - config.beta2**count),
        )
        factors = {"W_dec": self.sae.decoder_rate, **self.sae.sae.rate_factors}

        def update(path: tuple[Any, ...], g: Array, *arrays: Array) -> Moments:
            names = names_of(path)
            rate_factor = next((factors[n] for n in names if n in factors), 1.0)
            of_latents = any(axes.AXES.get(n, ("",))[0] == "f" for n in names)
            settings = AdamSettings(config.beta1, config.beta2, EPSILON, rate_factor, _UNIT in names, of_latents)
            return self.ops.adam(scalars, settings, g, Moments(*arrays))

        updated = jax.tree_util.tree_map_with_path(update, grads, params, state.mu, state.nu)
        params, mu, nu = (
            jax.tree.map(lambda m, i=i: m[i], updated, is_leaf=lambda m: isinstance(m, Moments)) for i in range(3)
        )
        return params, optax.ScaleByAdamState(count, mu, nu)


@dataclasses.dataclass(frozen=True)
class UnitRows:
    """An optax transformation with a projection of decoder gradients before it and a normalisation of rows after it.

    Args:
      inner: the transformation, including its learning rate.
    """

    inner: optax.GradientTransformation

    def init(self, params: Any) -> Any:
        """Return the state of the transformation."""
        return self.inner.init(params)

    def apply(self, grads: Any, state: Any, params: Any, rate: Rate, factor: float = 1.0) -> tuple[Any, Any]:
        """Return the weights after one update by `factor * grads`, and the new state; `rate` has no effect."""

        def project(path: tuple[Any, ...], g: Array, p: Array) -> Array:
            return factor * (tangent_rows(g, p) if _UNIT in names_of(path) else g)

        def normalise(path: tuple[Any, ...], p: Array) -> Array:
            return p / jnp.linalg.norm(p, axis=1, keepdims=True) if _UNIT in names_of(path) else p

        grads = jax.tree_util.tree_map_with_path(project, grads, params)
        updates, state = self.inner.update(grads, state, params)
        return jax.tree_util.tree_map_with_path(normalise, optax.apply_updates(params, updates)), state


def make(
    config: TrainConfig,
    sae: SAEConfig,
    ops: Ops,
    inner: optax.GradientTransformation | None = None,
) -> Optimizer:
    """Return the optimiser of an SAE: `UnitRowAdam`, or `UnitRows` around `inner`.

    Args:
      config: schedule and constants.
      sae: the SAE; its architecture's factors on the learning rate are not used with `inner`.
      ops: the implementation of the update.
      inner: an optax transformation to use instead of Adam.
    """
    if inner is not None:
        return UnitRows(inner)
    return UnitRowAdam(config, sae, ops)


def names_of(path: tuple[Any, ...]) -> list[str]:
    """Return the names along a path of a pytree."""
    return [str(getattr(p, "name", getattr(p, "key", ""))) for p in path]
