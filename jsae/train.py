"""Training: all that changes in one state, one donated step, and a loop that is a generator."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jsae import axes, control, data, dead, losses, metrics, optim, paths, precision, saes
from jsae.codes import Codes, Input
from jsae.config import SPARSE, SAEConfig, TrainConfig, require
from jsae.control import Control
from jsae.health import ActivationsError, NotFiniteError

Acts = Float[Array, "n d"] | tuple[Float[Array, "n _"], ...]
"""Activations of n tokens: of one hook, of a transcoder's input and target, or of every layer of a crosscoder."""

_INIT_ROWS = 16384  # of the sample


class TrainState(NamedTuple):
    """Everything that training changes. It is donated to the step and saved whole in a checkpoint."""

    sae: saes.SAE
    opt: Any
    average: saes.SAE | None
    """The exponential mean of the weights, where one is kept."""
    since_fired: Int[Array, " f"]
    """Tokens since each latent last had a value other than zero."""
    scale: Float[Array, "*d"]
    """The factor on activations, estimated once; the SAE's weights live in scaled units until export."""
    scale_out: Float[Array, "*d"]
    """The same of what is reconstructed: another one for a transcoder."""
    control: Control
    """What the sparsity penalty is multiplied with, and how it is led."""
    step: Int[Array, ""]
    """Steps taken."""
    bad_step: Int[Array, ""]
    """The first step whose loss was not finite; -1 while there was none."""


Step = Callable[[TrainState, Acts], tuple[TrainState, metrics.Sums]]


def init(sae_config: SAEConfig, config: TrainConfig, sample: Acts | np.ndarray | tuple[np.ndarray, ...]) -> TrainState:
    """Return the state before the first step, scaled and centred on a sample of activations.

    `scale` brings the sample's mean squared norm to its width, in a crosscoder layer by layer; `b_dec` starts at the
    geometric median of what is to be made, so that the SAE does not spend its latents on the mean; `W_enc` starts as
    `W_dec` times the one factor with which the first reconstruction fits best (Gao et al. 2024, section A.1, make its
    norm right), or many latents that point the same way add up to several times the input and the first thousand steps
    go into unlearning that.

    Raises:
      ConfigError: activations of other widths than the SAE's.
      ActivationsError, DegenerateError: a sample that nothing can be learned from; an abstract one is not checked.
    """
    sample = jax.tree.map(jnp.asarray, sample)
    ends(sae_config, sample)
    parts = sample if isinstance(sample, tuple) else (sample,)
    for number, part in enumerate(parts, 1):
        if not isinstance(part, jax.core.Tracer):
            which = f" (part {number} of {len(parts)})" if len(parts) > 1 else ""
            data.check(part, f"{len(part)} activations{which}")
    return _init(sae_config, config, sample)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _init(sae_config: SAEConfig, config: TrainConfig, sample: Acts) -> TrainState:
    x, y = ends(sae_config, sample)
    scale, scale_out = (data.scale_of(a, sae_config.layers) for a in (x, y))
    x, y = (a[:_INIT_ROWS].astype(jnp.float32) * s for a, s in ((x, scale), (y, scale_out)))
    centre = data.geometric_median(y)
    sae = saes.make(sae_config, key=jax.random.key(config.seed), b_dec=centre)
    sae.fit(x, y - centre)
    return TrainState(
        sae=sae,
        opt=optim.optimizer(config, sae_config.d_sae).init(sae),
        average=None if config.average_fraction is None else jax.tree.map(jnp.copy, sae),
        since_fired=jnp.zeros(sae_config.d_sae, jnp.int32),
        scale=scale,
        scale_out=scale_out,
        control=control.begin(sae_config.target_l0),
        step=jnp.int32(0),
        bad_step=jnp.int32(-1),
    )


def place(state: TrainState, mesh: Mesh) -> TrainState:
    """The state cut over a mesh by the table of axes; the step then runs on all its devices."""
    return jax.device_put(state, axes.shardings(state, mesh))


def make_step(config: TrainConfig, d_sae: int, k: int | None = None) -> Step:
    """The training step, compiled once: `(state, acts) -> (state, sums of the batch)`. The state is donated.

    Args:
      config: how the SAE is trained.
      d_sae: its latents.
      k: for the steps in which more codes than the SAE's k are drawn, how many there is room for.
    """
    return _step(config, d_sae, k, paths.forced())


@functools.cache
def _step(config: TrainConfig, d_sae: int, k: int | None, _way: paths.Paths | None) -> Step:
    def step(state: TrainState, acts: Acts) -> tuple[TrainState, metrics.Sums]:
        return update(config, state, acts, k)

    return jax.jit(step, donate_argnums=0)


def update(config: TrainConfig, state: TrainState, acts: Acts, k: int | None = None) -> tuple[TrainState, metrics.Sums]:
    """One training step, not compiled: what `make_step` and a pass over many SAEs run."""
    read, wanted = _floats(state, acts)
    number, d_sae, n = state.step + 1, state.sae.config.d_sae, len(read)
    target, steps = state.sae.config.target_l0, config.num_steps
    strength = control.strength(state.control, target, state.sae.proportional, number, steps)
    limit = None if k is None else _k_now(config, state.sae.config.k, number)
    now = saes.Now(strength * _ramp(config, number), None, k, limit, state.scale)
    with precision.multiplying_in(config.matmul_dtype):
        if state.sae.config.architecture in SPARSE:
            made, grads = _sparse_gradients(state, read, wanted, now, state.since_fired >= config.dead_after)
            sums = _counted(state, acts, wanted, made, wanted.mean(0))
        else:
            made, (sums, grads) = None, _dense_gradients(state, acts, wanted.mean(0), now)
    sae, opt = optim.apply(config, d_sae, grads, state.opt, state.sae, factor=2 / n)
    if made is not None:
        sae.settle(made.latents, _settling_rate(config, number))
    since_fired = dead.after(state.since_fired, sums.fired, n)
    if config.resample_steps is not None:
        sae, opt, since_fired = _resampled(
            config, number, sae, opt, since_fired, read * state.scale, wanted * state.scale_out
        )
    loss = sums.loss / n
    bad = ~jnp.isfinite(loss) & (state.bad_step < 0)
    new = TrainState(
        sae=sae,
        opt=opt,
        average=_averaged(config, state.average, sae, number),
        since_fired=since_fired,
        scale=state.scale,
        scale_out=state.scale_out,
        control=control.after(state.control, target, sums.fired.sum() / n, number, steps),
        step=number,
        bad_step=jnp.where(bad, number, state.bad_step),
    )
    return new, sums


def fit(
    config: TrainConfig, state: TrainState, batches: Iterator[Acts]
) -> Iterator[tuple[int, TrainState, metrics.Sums]]:
    """Trains from where `state` stands to the end of the run, one batch a step.

    Yields `(steps taken, state, sums of the batch)` after every step without waiting for the device. The state is
    the next step's to reuse: whoever keeps it must copy it before asking for the next.
    """
    sae, steps = state.sae.config, {}
    for number in range(int(state.step) + 1, config.num_steps + 1):
        k = room(config, sae, number)
        if k not in steps:
            steps[k] = make_step(config, sae.d_sae, k)
        state, sums = steps[k](state, next(batches))
        yield number, state, sums


def room(config: TrainConfig, sae: SAEConfig, number: int) -> int | None:
    """How many codes a token may have in a step in which k is still above the SAE's; None afterwards."""
    return config.k_start if config.anneals(sae) and number <= config.anneal_steps else None


def ends(config: SAEConfig, acts: Acts) -> tuple[Float[Array, "n d"], Float[Array, "n o"]]:
    """What is read and what is to be made of it: the layers of a crosscoder side by side, else first and last.

    Raises:
      ConfigError: activations of other widths, or of more or fewer hooks, than the SAE's.
    """
    parts = acts if isinstance(acts, tuple) else (acts,)
    width = config.d_in // config.layers
    wanted = [width, config.width_out] if config.is_transcoder else [width] * config.layers
    widths = [part.shape[1] for part in parts]
    require(widths == wanted, f"this SAE is for activations of the widths {wanted}, but these have {widths}")
    if config.layers > 1:
        parts = (jnp.concatenate(parts, axis=1),)
    return parts[0], parts[-1]


def check_finite(state: TrainState, sums: metrics.Sums, name: str | None = None) -> None:
    """Waits for the device and stops a run that went wrong; `name` says which SAE of several.

    Raises:
      NotFiniteError: some step so far had a loss that is NaN or infinite; an ActivationsError where they are the cause.
    """
    step = int(state.bad_step)
    if step >= 0:
        bad = int(sums.nonfinite)
        cause = (
            f"{bad} numbers in the activations since the last report are not finite: look at the model's output there"
            if bad
            else "the activations were finite: lower the learning rate or raise the warm-up"
        )
        whose = "" if name is None else f" of {name}"
        raise (ActivationsError if bad else NotFiniteError)(f"the loss{whose} is not finite at step {step}; {cause}")


def trained(state: TrainState) -> saes.SAE:
    """The SAE to export: the averaged one where an average was kept, else the last."""
    return state.sae if state.average is None else state.average


class _Made(NamedTuple):
    """What a forward made of a batch, or of some of its tokens."""

    loss: Float[Array, ""]
    latents: saes.Latents
    error: Float[Array, "n o"]


def _floats(state: TrainState, acts: Acts) -> tuple[Float[Array, "n d"], Float[Array, "n o"]]:
    """What is read and what is to be made of it, in float32."""
    read, wanted = ends(state.sae.config, acts)
    return read.astype(jnp.float32), wanted.astype(jnp.float32)


def _differentiated(
    state: TrainState, x: Float[Array, "n d"], wanted: Float[Array, "n o"], now: saes.Now
) -> tuple[_Made, Any]:
    """What was made, and the gradients of n / 2 times the loss.

    So the gradient of what is reconstructed is the error itself, and no second array of that size exists beside it.
    """

    def objective(sae: saes.SAE) -> tuple[Float[Array, ""], _Made]:
        made = _Made(*_loss(sae, x, wanted * state.scale_out, now))
        return made.loss * (len(x) / 2), made

    (_, made), grads = jax.value_and_grad(objective, has_aux=True)(state.sae)
    return made, grads


def _sparse_gradients(
    state: TrainState, x: Float[Array, "n d"], wanted: Float[Array, "n o"], now: saes.Now, is_dead: Bool[Array, " f"]
) -> tuple[_Made, Any]:
    """As `_differentiated`; AuxK is left out of the whole program while no latent is dead."""
    return jax.lax.cond(
        is_dead.any(),
        lambda: _differentiated(state, x, wanted, now._replace(dead=is_dead)),
        lambda: _differentiated(state, x, wanted, now),
    )


def _dense_gradients(
    state: TrainState, acts: Acts, mean: Float[Array, " o"], now: saes.Now
) -> tuple[metrics.Sums, Any]:
    """The sums of a batch and the gradients of n / 2 times the loss, summed over parts of the batch.

    `mean` is that of what is to be made. Every term of such a loss is a mean over tokens, so that the latents of all
    tokens need not exist at once.
    """
    n, most = len(jax.tree.leaves(acts)[0]), paths.chosen().tokens
    some = n if most is None else paths.part_of(n, most)

    def part(acts: Acts) -> tuple[metrics.Sums, Any]:
        read, wanted = _floats(state, acts)
        made, grads = _differentiated(state, read, wanted, now)
        return _counted(state, acts, wanted, made, mean), grads

    def add(i: Int[Array, ""], total: tuple[metrics.Sums, Any]) -> tuple[metrics.Sums, Any]:
        cut = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, i * some, some), acts)
        return jax.tree.map(jnp.add, total, part(cut))

    if some == n:
        return part(acts)
    first = part(jax.tree.map(lambda a: a[:some], acts))
    return jax.lax.fori_loop(1, n // some, add, first)


def _loss(
    sae: saes.SAE, x: Float[Array, "n d"], y: Float[Array, "n o"], now: saes.Now
) -> tuple[Float[Array, ""], saes.Latents, Float[Array, "n o"]]:
    """Squared error plus the architecture's penalty; the latents; what the reconstruction has too much of."""
    latents, seen = sae.activate(x, now)
    error = sae.decode(latents, Input(x, now.scale).read(), less=y)
    loss = losses.mean_square(error) + sae.penalty(saes.Pass(x, y, error, latents, seen, now))
    return loss, latents, error


def _counted(
    state: TrainState, acts: Acts, wanted: Float[Array, "n o"], made: _Made, mean: Float[Array, " o"]
) -> metrics.Sums:
    """The sums of tokens in the activations' own units, `mean` being the batch's; chunk by chunk, in the cache."""
    back, d_sae = 1 / state.scale_out, state.sae.config.d_sae
    is_sparse = isinstance(made.latents, Codes)

    def count(raw: Acts, x: Array, error: Array, values: Array) -> metrics.Sums:
        nonfinite = sum((~jnp.isfinite(a)).sum() for a in jax.tree.leaves(raw))
        fired = 0 if is_sparse else dead.times_fired(values, d_sae)
        values = values / state.scale_out.mean()
        return metrics.of(x, error * back, values, fired, loss=made.loss, nonfinite=nonfinite, mean=mean)

    values = made.latents.values if is_sparse else made.latents
    whole = (acts, wanted, made.error, values)
    n = len(wanted)
    chunk = paths.chosen().chunk_of(n, state.sae.config.d_in, d_sae)

    def part(i: Int[Array, ""]) -> metrics.Sums:
        return count(*jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, i * chunk, chunk), whole))

    def summed() -> metrics.Sums:
        return jax.tree.map(lambda a: a.sum(0), jax.lax.map(part, jnp.arange(n // chunk)))

    sums = summed() if chunk < n else count(*whole)
    sums = sums._replace(l0=sums.l0.astype(jnp.float32))  # a long window's count is more than an integer holds
    return sums._replace(fired=dead.times_fired(made.latents, d_sae)) if is_sparse else sums


def _ramp(config: TrainConfig, number: Int[Array, ""]) -> Float[Array, ""]:
    """Rises from 0 to 1 over the warm-up of penalties."""
    return jnp.minimum(number / max(config.sparsity_warmup_fraction * config.num_steps, 1), 1)


def _settling_rate(config: TrainConfig, number: Int[Array, ""]) -> Float[Array, ""]:
    """Of the means that an SAE keeps: over the last 1,000 steps, or the last twentieth of a shorter run."""
    return jnp.maximum(1 / jnp.clip(config.num_steps / 20, 1, 1000), 1 / number)


def _k_now(config: TrainConfig, k: int, number: Int[Array, ""]) -> Int[Array, ""]:
    """The k of a step: from k_start down to k in a straight line."""
    share = jnp.minimum(number / config.anneal_steps, 1)
    return jnp.round(config.k_start + (k - config.k_start) * share).astype(jnp.int32)


def _averaged(config: TrainConfig, average: saes.SAE | None, sae: saes.SAE, number: Int[Array, ""]) -> saes.SAE | None:
    if average is None:
        return None
    rate = jnp.maximum(1 / max(config.average_fraction * config.num_steps, 1), 1 / number)
    return jax.tree.map(lambda mean, new: mean + rate * (new - mean), average, sae)


def _resampled(
    config: TrainConfig, number: Array, sae: saes.SAE, opt: Any, since_fired: Array, x: Array, y: Array
) -> tuple[saes.SAE, Any, Array]:
    """Resamples the dead where it is time to, but not while the learning rate decays."""
    last = round((1 - config.decay_fraction) * config.num_steps)
    due = (number % config.resample_steps == 0) & (number <= last)

    def renew() -> tuple[saes.SAE, Any, Array]:
        is_dead = since_fired >= config.dead_after
        key = jax.random.fold_in(jax.random.key(config.seed), number)
        return *dead.resample(sae, opt, is_dead, x, y, key), jnp.where(is_dead, 0, since_fired)

    return jax.lax.cond(due, renew, lambda: (sae, opt, since_fired))
