"""The state of training: all that a step changes, and how it starts."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jsae import axes, control, data, optim
from jsae.architectures import SAE, SAEConfig, make
from jsae.config import TrainConfig
from jsae.control import Control
from jsae.ops import Ops
from jsae.settings import require

Acts = Float[Array | np.ndarray, "n d"] | tuple[Float[Array | np.ndarray, "n _"], ...]
"""Activations of n tokens: of one hook, of a transcoder's input and target, or of every layer of a crosscoder."""

_INIT_ROWS = 16384  # of the sample


class TrainState(NamedTuple):
    """All that training changes. It is donated to the step and saved whole in a checkpoint."""

    sae: SAE
    opt: Any
    average: SAE | None
    """The exponential mean of the weights, where one is kept."""
    since_fired: Int[Array, " f"]
    """Tokens since each latent last had a value other than zero."""
    scale: Float[Array, "*d"]
    """Factor on activations, estimated once; the SAE's weights are in scaled units until export."""
    scale_out: Float[Array, "*d"]
    """Factor on the target: another one for a transcoder."""
    control: Control
    """The strength of the sparsity penalty, and how it is controlled."""
    step: Int[Array, ""]
    """Steps taken."""
    bad_step: Int[Array, ""]
    """The first step whose loss was not finite; -1 while there was none."""

    @property
    def exported(self) -> SAE:
        """The SAE to export: the averaged one where an average is kept, else the last."""
        return self.sae if self.average is None else self.average


def init(
    sae_config: SAEConfig, config: TrainConfig, ops: Ops, sample: Acts, optimizer: optim.Optimizer | None = None
) -> TrainState:
    """Return the state before the first step, scaled and centred on a sample of activations.

    `scale` brings the sample's mean squared norm to its width, in a crosscoder layer by layer; `b_dec` starts at the
    geometric median of the target, so that the SAE does not spend its latents on the mean; `W_enc` starts as `W_dec`
    times the one factor with which the first reconstruction fits best (Gao et al. 2024, section A.1, make its norm
    right), or many latents that point the same way add up to several times the input and the first thousand steps go
    into unlearning that.

    Raises:
      ConfigError: activations of other widths than the SAE's.
      ActivationsError, DegenerateError: a sample that nothing can be learned from; an abstract one is not checked.
    """
    sample = jax.tree.map(jnp.asarray, sample)
    input_and_target(sae_config, sample)
    parts = sample if isinstance(sample, tuple) else (sample,)
    for number, part in enumerate(parts, 1):
        if not isinstance(part, jax.core.Tracer):
            which = f" (part {number} of {len(parts)})" if len(parts) > 1 else ""
            data.check(part, f"{len(part)} activations{which}")
    return _init(sae_config, config, ops, sample, optimizer)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 4))
def _init(
    sae_config: SAEConfig, config: TrainConfig, ops: Ops, sample: Acts, optimizer: optim.Optimizer | None
) -> TrainState:
    x, y = input_and_target(sae_config, sample)
    scale, scale_out = (data.scale_of(a, sae_config.layers) for a in (x, y))
    x, y = (a[:_INIT_ROWS].astype(jnp.float32) * s for a, s in ((x, scale), (y, scale_out)))
    centre = data.geometric_median(y)
    sae = make(sae_config, key=jax.random.key(config.seed), b_dec=centre)
    sae.initialize(x, y - centre, ops)
    optimizer = optimizer or optim.make(config, sae_config.d_sae, ops, sae.rate_factors)
    return TrainState(
        sae=sae,
        opt=optimizer.init(sae),
        average=None if config.average_fraction is None else jax.tree.map(jnp.copy, sae),
        since_fired=jnp.zeros(sae_config.d_sae, jnp.int32),
        scale=scale,
        scale_out=scale_out,
        control=control.begin(sae_config.target_l0),
        step=jnp.int32(0),
        bad_step=jnp.int32(-1),
    )


def place(state: TrainState, mesh: Mesh) -> TrainState:
    """Cut the state over a mesh by the table of axes; the step then runs on all its devices."""
    return jax.device_put(state, axes.shardings(state, mesh, latent_arrays=state.sae.initial_latents(state.sae.config)))


def widths(config: SAEConfig) -> list[int]:
    """Return the widths of the activations of an SAE: of its layers, or of a transcoder's input and target."""
    width = config.d_in // config.layers
    return [width, config.width_out] if config.is_transcoder else [width] * config.layers


def input_and_target(config: SAEConfig, acts: Acts) -> tuple[Float[Array, "n d"], Float[Array, "n o"]]:
    """Return input and target of an SAE: the layers of a crosscoder side by side, else the first and last activation.

    Raises:
      ConfigError: activations of other widths, or of more or fewer hooks, than the SAE's.
    """
    parts = acts if isinstance(acts, tuple) else (acts,)
    expected, found = widths(config), [part.shape[1] for part in parts]
    require(found == expected, f"this SAE is for activations of the widths {expected}, but these have {found}")
    if config.layers > 1:
        parts = (jnp.concatenate(parts, axis=1),)
    return parts[0], parts[-1]  # type: ignore[return-value]  # traced, or jax arrays
