"""Training: all that changes in one state, one donated step, and a loop that is a generator."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jsae import axes, data, dead, losses, metrics, saes
from jsae.config import SAEConfig, TrainConfig
from jsae.optim import optimizer
from jsae.topk import Codes

Step = Callable[["TrainState", Array], tuple["TrainState", metrics.Sums]]


class TrainState(NamedTuple):
    """Everything that training changes. It is donated to the step and saved whole in a checkpoint."""

    sae: saes.SAE
    opt: Any
    since_fired: Int[Array, " f"]
    """Tokens since each latent last had a value above zero."""
    scale: Float[Array, ""]
    """The factor on activations, estimated once; the SAE's weights live in scaled units until export."""
    step: Int[Array, ""]
    """Steps taken."""
    bad_step: Int[Array, ""]
    """The first step whose loss was not finite; -1 while there was none."""


_INIT_ROWS = 16384  # of the sample, for the geometric median


class NotFiniteError(FloatingPointError):
    """The loss became NaN or infinite: names the step."""


@functools.partial(jax.jit, static_argnums=(0, 1))
def init(sae_config: SAEConfig, config: TrainConfig, sample: Float[Array, "n d"]) -> TrainState:
    """The state before the first step, scaled and centred on a sample of activations (n, d_in).

    `scale` brings the sample's mean squared norm to d_in; `b_dec` starts at the geometric median, so that the SAE does
    not spend its latents on the mean; `W_enc` starts as `W_dec` times the one factor with which the first
    reconstruction fits best (Gao et al. 2024, section A.1, make its norm right), or many latents that point the same
    way add up to several times the input and the first thousand steps go into unlearning that.
    """
    scale = data.scale_of(sample)
    x = sample[:_INIT_ROWS].astype(jnp.float32) * scale
    centre = data.geometric_median(x)
    sae = saes.make(sae_config, key=jax.random.key(config.seed), b_dec=centre)
    made = sae.decode(sae.encode(x[:2048])) - centre
    # Every encoder is homogeneous while its biases are zero: scaling it scales what was made.
    gain = (made * (x[:2048] - centre)).sum() / jnp.square(made).sum()
    sae.W_enc[...] = sae.W_enc * gain
    return TrainState(
        sae=sae,
        opt=optimizer(config, sae_config.d_sae).init(sae),
        since_fired=jnp.zeros(sae_config.d_sae, jnp.int32),
        scale=scale,
        step=jnp.int32(0),
        bad_step=jnp.int32(-1),
    )


def place(state: TrainState, mesh: Mesh) -> TrainState:
    """The state cut over a mesh by the table of axes; the step then runs on all its devices."""
    return jax.device_put(state, axes.shardings(state, mesh))


def make_step(config: TrainConfig, d_sae: int) -> Step:
    """The training step, compiled: `(state, acts (n, d_in)) -> (state, sums of the batch)`. The state is donated."""
    tx = optimizer(config, d_sae)

    def step(state: TrainState, acts: Float[Array, "n d"]) -> tuple[TrainState, metrics.Sums]:
        x = acts.astype(jnp.float32) * state.scale
        is_dead = state.since_fired >= config.dead_after
        (loss, (latents, x_hat)), grads = jax.value_and_grad(_loss, has_aux=True)(state.sae, x, is_dead)
        updates, opt = tx.update(grads, state.opt, state.sae)
        sae = jax.tree.map(jnp.add, state.sae, updates)
        fired = dead.times_fired(latents, d_sae)
        since_fired = dead.after(state.since_fired, fired, x.shape[0])
        number = state.step + 1
        if config.resample_steps is not None:
            sae, opt, since_fired = _resampled(config, number, sae, opt, since_fired, x)
        bad = ~jnp.isfinite(loss) & (state.bad_step < 0)
        new = TrainState(sae, opt, since_fired, state.scale, number, jnp.where(bad, number, state.bad_step))
        sums = metrics.of(
            x / state.scale,
            x_hat / state.scale,
            _values(latents) / state.scale,
            fired,
            loss=loss,
            nonfinite=(~jnp.isfinite(acts)).sum(),
        )
        return new, sums

    return jax.jit(step, donate_argnums=0)


def fit(
    config: TrainConfig, state: TrainState, batches: Iterator[Array]
) -> Iterator[tuple[int, TrainState, metrics.Sums]]:
    """Trains from where `state` stands to the end of the run, one batch a step.

    Yields `(steps taken, state, sums of the batch)` after every step without waiting for the device. The state is
    the next step's to reuse: whoever keeps it must copy it before asking for the next.
    """
    step = make_step(config, state.sae.config.d_sae)
    for number in range(int(state.step) + 1, config.num_steps + 1):
        state, sums = step(state, next(batches))
        yield number, state, sums


def check_finite(state: TrainState, sums: metrics.Sums) -> None:
    """Waits for the device and stops a run that went wrong.

    Raises:
      NotFiniteError: some step so far had a loss that is NaN or infinite.
    """
    step = int(state.bad_step)
    if step >= 0:
        bad = int(sums.nonfinite)
        cause = (
            f"{bad} numbers in the activations since the last report are not finite: look at the model's output there"
            if bad
            else "the activations were finite: lower the learning rate or raise the warm-up"
        )
        raise NotFiniteError(f"the loss is not finite at step {step}; {cause}")


def _loss(
    sae: saes.SAE, x: Float[Array, "n d"], is_dead: Array
) -> tuple[Float[Array, ""], tuple[saes.Latents, Float[Array, "n d"]]]:
    """Squared error plus the architecture's penalty."""
    latents, seen = sae.activate(x)
    x_hat = sae.decode(latents)
    loss = losses.squared_error(x, x_hat) + sae.penalty(x, x_hat, latents, seen, is_dead)
    return loss, (latents, x_hat)


def _values(latents: saes.Latents) -> Array:
    return latents.values if isinstance(latents, Codes) else latents


def _resampled(
    config: TrainConfig, number: Array, sae: saes.SAE, opt: Any, since_fired: Array, x: Array
) -> tuple[saes.SAE, Any, Array]:
    """Resamples the dead where it is time to, but not while the learning rate decays."""
    last = round((1 - config.decay_fraction) * config.num_steps)
    due = (number % config.resample_steps == 0) & (number <= last)

    def renew() -> tuple[saes.SAE, Any, Array]:
        is_dead = since_fired >= config.dead_after
        key = jax.random.fold_in(jax.random.key(config.seed), number)
        return *dead.resample(sae, opt, is_dead, x, key), jnp.where(is_dead, 0, since_fired)

    return jax.lax.cond(due, renew, lambda: (sae, opt, since_fired))
