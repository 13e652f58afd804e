"""The state of training: everything that a step changes, its initialisation, and its sharding."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from jsae import axes, control, data, optim, pretrained
from jsae.architectures import SAE, SAEConfig, make
from jsae.config import TrainConfig
from jsae.control import Control
from jsae.ops import Ops
from jsae.settings import require

Acts = Float[Array | np.ndarray, "n d"] | tuple[Float[Array | np.ndarray, "n _"], ...]
"""Activations of n tokens: of one hook, of a transcoder's input and target, or of every layer of a crosscoder."""

_INIT_ROWS = 16384  # rows of the sample that initialise the weights
_SPANNED = 0.2  # share of the variance outside k principal components below which the default rate is lower
_LEAST_REMAINDER = 0.005  # such a share below which it is not lowered further


class TrainState(NamedTuple):
    """Everything that training changes. Donated to the step, and saved completely in a checkpoint."""

    sae: SAE
    opt: Any
    average: SAE | None
    """Exponential moving average of the weights, or None."""
    since_fired: Int[Array, " f"]
    """Tokens since each latent was last not zero."""
    scale: Float[Array, "*d"]
    """Factor on the input, estimated once; the SAE's weights are in scaled units until export."""
    scale_out: Float[Array, "*d"]
    """Factor on the target; equal to `scale` except for a transcoder."""
    control: Control
    """State of the controller of the sparsity penalty."""
    rate: Float[Array, ""]
    """Peak learning rate: the one that was given, or the default for the SAE and the sample."""
    step: Int[Array, ""]
    """Number of steps taken."""
    bad_step: Int[Array, ""]
    """The first step whose loss was not finite, or -1."""

    @property
    def exported(self) -> SAE:
        """The SAE to export: the average of the weights if there is one, otherwise the current weights."""
        return self.sae if self.average is None else self.average


def init(
    sae_config: SAEConfig,
    config: TrainConfig,
    ops: Ops,
    sample: Acts,
    optimizer: optim.Optimizer | None = None,
    mesh: Mesh | None = None,
    weights: Mapping[str, Array | np.ndarray] | None = None,
) -> TrainState:
    """Return the state before the first step, initialised from a sample of activations.

    `scale` normalises the sample's mean squared norm to its width, in a crosscoder for each layer. `b_dec` starts at
    the geometric median of the target, so that the SAE does not use latents for the mean. `W_enc` starts as `W_dec`
    times the factor that minimises the first reconstruction error (Gao et al. 2024, section A.1, match norms instead):
    otherwise many similar latents add up to several times the input, which takes a thousand steps to unlearn.

    Args:
      sae_config: the SAE.
      config: the training.
      ops: the implementation.
      sample: activations, concrete or abstract.
      optimizer: the optimiser; None: `optim.make`.
      mesh: devices over which the state is sharded; None: one device.
      weights: those of an exported SAE in plain form (`jsae.saelens.Plain`), to continue from instead of new ones; only
        the scales are then taken from the sample. `jsae.pretrained.Pretrained.check` says whether they fit.

    Raises:
      ConfigError: the widths of the activations are not those of the SAE.
      ActivationsError, DegenerateError: nothing can be learned from the sample; abstract arrays are not checked.
    """
    sample, key = _checked(sae_config, sample), jax.random.key(config.seed)
    rate = None if config.learning_rate is None else jnp.float32(config.learning_rate)
    return _init(sae_config, config, ops, sample, optimizer, mesh, weights, key, rate)


def _checked(sae_config: SAEConfig, sample: Acts) -> Acts:
    """Return a sample as arrays of jax, after the checks that `init` documents."""
    sample = jax.tree.map(jnp.asarray, sample)
    input_and_target(sae_config, sample)
    parts = sample if isinstance(sample, tuple) else (sample,)
    for number, part in enumerate(parts, 1):
        if not isinstance(part, jax.core.Tracer):
            which = f" (part {number} of {len(parts)})" if len(parts) > 1 else ""
            data.check(part, f"{len(part)} activations{which}")
    return sample


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 4, 5))
def _init(
    sae_config: SAEConfig,
    config: TrainConfig,
    ops: Ops,
    sample: Acts,
    optimizer: optim.Optimizer | None,
    mesh: Mesh | None,
    weights: Mapping[str, Array | np.ndarray] | None,
    key: Key[Array, ""],
    rate: Float[Array, ""] | None,
) -> TrainState:
    """Return the initial state. Key and given rate are arguments, so that other seeds and rates compile no program."""
    (x, y), (scale, scale_out) = _scaled(sae_config, sample)
    if weights is not None:
        sae = make(sae_config, key=key)
        pretrained.place(sae, weights, scale, scale_out)
    else:
        centre = data.geometric_median(y)
        sae = make(sae_config, key=key, b_dec=centre)
        sae.initialize(x, y - centre, ops)
    optimizer = optimizer or optim.make(config, sae_config, ops)
    state = TrainState(
        sae=sae,
        opt=optimizer.init(sae),
        average=None if config.average_fraction is None else jax.tree.map(jnp.copy, sae),
        since_fired=jnp.zeros(sae_config.d_sae, jnp.int32),
        scale=scale,
        scale_out=scale_out,
        control=control.initial(sae_config.target_l0),
        rate=config.rate_for(sae_config, *_rate_statistics(sae_config, y)) if rate is None else rate,
        step=jnp.int32(0),
        bad_step=jnp.int32(-1),
    )
    state = jax.tree.map(_strongly_typed, state)
    return state if mesh is None else jax.lax.with_sharding_constraint(state, shardings(state, mesh))


def _scaled(
    sae_config: SAEConfig, sample: Acts
) -> tuple[tuple[Float[Array, "m d"], Float[Array, "m o"]], tuple[Array, Array]]:
    """Return the first inputs and targets of a sample, scaled as in training, and both scales."""
    x, y = input_and_target(sae_config, sample)
    scale, scale_out = (data.scale_of(a, sae_config.layers) for a in (x, y))
    x, y = (a[:_INIT_ROWS].astype(jnp.float32) * s for a, s in ((x, scale), (y, scale_out)))
    return (x, y), (scale, scale_out)


class RateStatistics(NamedTuple):
    """Statistics of activations on which the default learning rate depends (`TrainConfig.rate_for`)."""

    heaviness: float
    remainder: float


def rate_statistics(sae_config: SAEConfig, sample: Acts) -> RateStatistics:
    """Return the statistics of a sample of activations on which the default learning rate depends.

    Args:
      sae_config: the SAE.
      sample: concrete activations.

    Raises:
      ConfigError, ActivationsError, DegenerateError: as `init`.
    """
    return RateStatistics(*(float(value) for value in _statistics_of(sae_config, _checked(sae_config, sample))))


@functools.partial(jax.jit, static_argnums=0)
def _statistics_of(sae_config: SAEConfig, sample: Acts) -> tuple[Float[Array, ""], Float[Array, ""]]:
    (_, y), _ = _scaled(sae_config, sample)
    return _rate_statistics(sae_config, y)


def _rate_statistics(sae_config: SAEConfig, y: Float[Array, "n o"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return the heaviness, at least 1, and the remainder, relative to `_SPANNED` and at most 1."""
    heaviness = jnp.maximum(data.heaviness(y), 1)
    if sae_config.remainder_exponent == 0:
        return heaviness, jnp.float32(1)
    remainder = data.remainder(y, max(round(sae_config.expected_l0), 1))
    return heaviness, jnp.clip(remainder, _LEAST_REMAINDER, _SPANNED) / _SPANNED


def _strongly_typed(leaf: Any) -> Any:
    """Return an array without JAX's weak type. A step returns none, and would be compiled twice if it took one."""
    return jnp.asarray(leaf).astype(jnp.result_type(leaf)) if getattr(leaf, "weak_type", True) else leaf


def shardings(state: TrainState, mesh: Mesh) -> TrainState:
    """Return the sharding of every array of a state, concrete or abstract, by the rules of `jsae.axes`."""
    return axes.shardings(state, mesh, latent_arrays=state.sae.initial_latents(state.sae.config))


def widths(config: SAEConfig) -> list[int]:
    """Return the widths of the activations of an SAE: of its layers, or of a transcoder's input and target."""
    width = config.d_in // config.layers
    return [width, config.width_out] if config.is_transcoder else [width] * config.layers


def input_and_target(config: SAEConfig, acts: Acts) -> tuple[Float[Array, "n d"], Float[Array, "n o"]]:
    """Return input and target of an SAE: the concatenated layers of a crosscoder, otherwise the first and last array.

    Raises:
      ConfigError: the number or the widths of the activations are not those of the SAE.
    """
    parts = acts if isinstance(acts, tuple) else (acts,)
    expected, actual = widths(config), [part.shape[1] for part in parts]
    require(actual == expected, f"this SAE needs activations of the widths {expected}, got {actual}")
    if config.layers > 1:
        parts = (jnp.concatenate(parts, axis=1),)
    return parts[0], parts[-1]  # type: ignore[return-value]  # traced, or jax arrays
