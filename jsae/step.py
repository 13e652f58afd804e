"""One training step: loss, gradients, optimiser update, running statistics and dead latents."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jsae import control, dead, losses, metrics, optim
from jsae.architectures import SAE, Context, Forward
from jsae.config import TrainConfig
from jsae.ops import Codes, Input, Latents, Ops
from jsae.state import Acts, TrainState, input_and_target

_LEAST_STRENGTH = 1e-3  # of a penalty that balances the loss: the controller of L0 multiplies it

_LEAST_TOKENS = 512  # of a batch from which the loss of dead latents is estimated


class Outputs(NamedTuple):
    """Loss, latents, error and statistics of a batch, or of a part of it."""

    loss: Float[Array, ""]
    latents: Latents
    error: Float[Array, "n o"]
    statistics: dict[str, Float[Array, ""]]
    """Values of the SAE's running statistics on the batch."""


def update(
    config: TrainConfig,
    ops: Ops,
    state: TrainState,
    acts: Acts,
    room: int | None = None,
    optimizer: optim.Optimizer | None = None,
    output_gradient: Float[Array, "n o"] | None = None,
) -> tuple[TrainState, metrics.Sums]:
    """Return the state after one step on a batch, and the metric sums of the batch. Not compiled.

    With an output gradient the step minimises the loss plus a further term, such as the KL divergence of a model that
    reads the reconstruction. The term is linearised: only its gradient with respect to the reconstruction is needed,
    which another framework may compute from `reconstruct`. It is not part of the loss in the metric sums.

    Args:
      config: the training configuration.
      ops: the implementation.
      state: the state before the step.
      acts: the batch.
      room: number of codes per token while k is annealed from above the SAE's k; None afterwards.
      optimizer: the optimiser; None: Adam.
      output_gradient: gradient of the further term with respect to `reconstruct(config, ops, state, acts, room)`, in
        the units of the activations; the term has the units of the loss. None: no such term.
    """
    sae, number, n = state.sae, state.step + 1, len(jax.tree.leaves(acts)[0])
    optimizer = optimizer or optim.make(config, sae.config, ops)
    context = _context(config, ops, state, number, room)
    gradients = _sparse_gradients if sae.sparse else _dense_gradients
    pull = _pull(state, output_gradient)
    sums, grads, statistics = gradients(config, state, acts, context, pull)
    if sae.config.exclusive:
        grads = _of_allowed(sae, grads)
    new, opt = optimizer.apply(grads, state.opt, sae, state.rate, factor=2 / n)
    _move_statistics(new, sae, statistics, _statistics_rate(config, number))
    since_fired = dead.update(state.since_fired, sums.fired, n)
    if config.resample_steps is not None:
        new, opt, since_fired = _resampled(config, ops, state, number, new, opt, since_fired, acts)
        if new.config.exclusive:
            new.separate()
    if new.config.aligned:
        new.align()
    loss = sums.loss / n
    is_bad = ~jnp.isfinite(loss) | (sums.nonfinite > 0)
    target, steps = sae.config.target_l0, config.num_steps
    return (
        TrainState(
            sae=new,
            opt=opt,
            average=_averaged(config, state.average, new, number),
            since_fired=since_fired,
            scale=state.scale,
            scale_out=state.scale_out,
            control=control.update(state.control, target, _law(sae), sums.l0 / n, number, steps),
            rate=state.rate,
            step=number,
            bad_step=jnp.where(is_bad & (state.bad_step < 0), number, state.bad_step),
        ),
        sums,
    )


def reconstruct(
    config: TrainConfig, ops: Ops, state: TrainState, acts: Acts, room: int | None = None
) -> Float[Array, "n o"]:
    """Return the reconstruction that the loss of the next step is of, in the units of the activations. Not compiled.

    Where training selects latents in a whole batch, this does too. Arguments are those of `update`.
    """
    sae, context = state.sae, _context(config, ops, state, state.step + 1, room)
    if sae.config.aligned:
        sae = jax.tree.map(jnp.copy, sae)
        sae.align()
    x, _ = _floats(state, acts)
    latents, _ = sae.activate(x, context)
    return sae.decode(latents, Input(x, context.scale).read(), ops) / state.scale_out


def balanced_strength(
    config: TrainConfig, ops: Ops, state: TrainState, acts: Acts, output_gradient: Float[Array, "n o"] | None = None
) -> Float[Array, ""]:
    """Return the strength at which the sparsity penalty balances the rest of the loss on a batch. Not compiled.

    Where an SAE is trained, the gradients of its biases and thresholds vanish: those of the penalty, times its
    strength, are minus those of the rest. The least squares solution is returned, 1 where the penalty has no gradient.
    An exported SAE does not say how strong its penalty was; with this strength its L0 stays.

    Args:
      config: the training configuration.
      ops: the implementation.
      state: the state.
      acts: the batch.
      output_gradient: as of `update`, a part of the rest.
    """
    context = _context(config, ops, state, state.step + 1, None)
    pull = _pull(state, output_gradient)
    gradients = _sparse_gradients if state.sae.sparse else _dense_gradients

    def of_latents(strength: float) -> list[Array]:
        _, grads, _ = gradients(config, state, acts, context._replace(strength=jnp.float32(strength)), pull)
        return [getattr(grads, name)[...] for name in state.sae.initial_latents(state.sae.config)]

    rest, whole = of_latents(0.0), of_latents(1.0)
    penalty = [b - a for a, b in zip(rest, whole, strict=True)]
    square = sum(jnp.vdot(g, g) for g in penalty)
    product = sum(jnp.vdot(g, r) for g, r in zip(penalty, rest, strict=True))
    balanced = -product / jnp.where(square > 0, square, 1)
    return jnp.where(square > 0, jnp.maximum(balanced, _LEAST_STRENGTH), 1)


def loss_of(
    sae: SAE, x: Float[Array, "n d"], y: Float[Array, "n o"], context: Context
) -> tuple[Float[Array, ""], Outputs]:
    """Return the loss, mean_n |y_hat - y|^2 plus the architecture's penalty, and the outputs of the forward pass.

    Args:
      sae: the SAE.
      x: input, (n, d); scaled by `context.scale`.
      y: scaled target, (n, o).
      context: settings of the pass.

    Raises:
      TypeError: in training, `activate` returns sparse latents but the class declares dense ones, or vice versa.
    """
    latents, extra = sae.activate(x, context)
    if context.training and isinstance(latents, Codes) != sae.sparse:
        raise TypeError(f"{sae.name} declares sparse={sae.sparse}, but activate returned {type(latents).__name__}")
    error = sae.decode(latents, Input(x, context.scale).read(), context.ops, minus=y)
    forward = Forward(x, y, error, latents, extra, context)
    loss = losses.mean_square(error) + sae.penalty(forward)
    return loss, Outputs(loss, latents, error, sae.batch_statistics(forward))


def _law(sae: SAE) -> control.Law:
    """Return the law by which L0 is led to its target: the architecture's, with the fraction that is given."""
    fraction = sae.config.target_l0_fraction
    return sae.control_law if fraction is None else sae.control_law._replace(fraction=fraction)


def _context(config: TrainConfig, ops: Ops, state: TrainState, number: Int[Array, ""], room: int | None) -> Context:
    sae = state.sae
    target, steps = sae.config.target_l0, config.num_steps
    strength = control.strength(state.control, target, _law(sae), number, steps)
    return Context(
        ops=ops,
        training=True,
        strength=strength * _ramp(config, number),
        step=number,
        room=room,
        limit=None if room is None else _annealed_k(config, sae.config.k, number),
        scale=state.scale,
    )


def _pull(state: TrainState, output_gradient: Float[Array, "n o"] | None) -> Float[Array, "n o"] | None:
    """Return a gradient of the scaled reconstruction with the factor n / 2, as `_gradients` adds it."""
    return None if output_gradient is None else output_gradient * (len(output_gradient) / 2 / state.scale_out)


def _gradients(
    state: TrainState,
    x: Float[Array, "n d"],
    y: Float[Array, "n o"],
    context: Context,
    pull: Float[Array, "n o"] | None = None,
) -> tuple[Outputs, Any]:
    """Return the outputs of the forward pass, and the gradients of n / 2 times the loss.

    With this factor the gradient of the reconstruction is the error itself, to which `pull` is added: a further
    gradient of the scaled reconstruction, with the factor n / 2 of the whole batch. Running statistics get no gradient.
    """
    statistics = state.sae.initial_statistics(state.sae.config)

    def constant(path: tuple[Any, ...], leaf: Array) -> Array:
        return jax.lax.stop_gradient(leaf) if statistics.keys() & optim.names_of(path) else leaf

    def objective(sae: SAE) -> tuple[Float[Array, ""], Outputs]:
        sae = jax.tree_util.tree_map_with_path(constant, sae)
        if sae.config.aligned:
            sae.align()
        loss, outputs = loss_of(sae, x, y * state.scale_out, context)
        total = loss * (len(x) / 2)
        return (total if pull is None else total + jnp.vdot(pull, outputs.error)), outputs

    (_, outputs), grads = jax.value_and_grad(objective, has_aux=True)(state.sae)
    return outputs, grads


def _sparse_gradients(
    config: TrainConfig, state: TrainState, acts: Acts, context: Context, pull: Float[Array, "n o"] | None
) -> tuple[metrics.Sums, Any, dict[str, Array]]:
    """Return sums, gradients and statistics of a batch. AuxK is computed only while a latent is dead."""
    x, y = _floats(state, acts)
    is_dead = state.since_fired >= config.dead_window
    outputs, grads = context.ops.if_any(
        is_dead.any(),
        lambda: _gradients(state, x, y, context._replace(dead=is_dead), pull),
        lambda: _gradients(state, x, y, context, pull),
    )
    sums = _sums(state, acts, y, outputs, y.mean(0), context.ops)
    return sums, grads, outputs.statistics


def _dense_gradients(
    config: TrainConfig, state: TrainState, acts: Acts, context: Context, pull: Float[Array, "n o"] | None
) -> tuple[metrics.Sums, Any, dict[str, Array]]:
    """Return sums, gradients and statistics of a batch, added over parts of it.

    This is exact because every term of the loss is a mean over tokens, but that for dead latents, which is added.
    """
    y = _floats(state, acts)[1]
    n, mean, sizes = len(y), y.mean(0), state.sae.config
    context = context._replace(dead=state.since_fired >= config.dead_window)

    def part(arrays: tuple[Acts, Array | None]) -> tuple[metrics.Sums, Any, dict[str, Array]]:
        acts, pull = arrays
        x, y = _floats(state, acts)
        outputs, grads = _gradients(state, x, y, context, pull)
        sums = _sums(state, acts, y, outputs, mean, context.ops)
        return sums, grads, {name: value * (len(y) / n) for name, value in outputs.statistics.items()}

    sums, grads, statistics = context.ops.sum_over_tokens(part, (acts, pull), sizes.d_in, sizes.d_sae, gradients=True)
    sums, grads = context.ops.if_any(
        context.dead.any(), lambda: _with_dead(state, acts, context, sums, grads), lambda: (sums, grads)
    )
    return sums, grads, statistics


def _of_allowed(sae: SAE, grads: Any) -> Any:
    """Return gradients without those of weights that exclusive latents do not have; so these stay 0, as their moments.

    An optimiser keeps them at 0 if it moves no weight that is 0 and never had a gradient.
    """

    def allowed(path: tuple[Any, ...], g: Array) -> Array:
        return jnp.where(sae.config.allowed(g), g, 0) if {"W_enc", "W_dec"} & set(optim.names_of(path)) else g

    return jax.tree_util.tree_map_with_path(allowed, grads)


def _with_dead(
    state: TrainState, acts: Acts, context: Context, sums: metrics.Sums, grads: Any
) -> tuple[metrics.Sums, Any]:
    """Return sums and gradients with the term of the loss for dead latents, estimated from some of the tokens.

    These are every second or fourth token of a batch that leaves 512 of them: this term has a pass of its own.
    """
    n = len(jax.tree.leaves(acts)[0])
    every = next(every for every in (4, 2, 1) if every == 1 or n % (every * _LEAST_TOKENS) == 0)
    x, y = _floats(state, jax.tree.map(lambda a: a[::every], acts))
    y = y * state.scale_out

    def objective(sae: SAE) -> Float[Array, ""]:
        if sae.config.aligned:
            sae.align()
        latents, extra = sae.activate(x, context)
        error = sae.decode(latents, Input(x, context.scale).read(), context.ops, minus=y)
        term = sae.loss_of_dead(Forward(x, y, error, latents, extra, context))
        return jnp.zeros(()) if term is None else term

    loss, more = jax.value_and_grad(objective)(state.sae)
    return sums._replace(loss=sums.loss + n * loss), jax.tree.map(lambda a, b: a + (n / 2) * b, grads, more)


def _sums(
    state: TrainState, acts: Acts, y: Float[Array, "n o"], outputs: Outputs, mean: Float[Array, " o"], ops: Ops
) -> metrics.Sums:
    """Return the metric sums in the units of the activations; `mean` is the mean of the target over the batch."""
    latents, sizes = outputs.latents, state.sae.config
    sparse = isinstance(latents, Codes)  # codes may belong to any token, so only their values are split into parts

    def part(arrays: tuple[Acts, Array, Array, Array]) -> metrics.Sums:
        raw, y, error, values = arrays
        fired, magnitudes = (values != 0, jnp.abs(values)) if sparse else ops.latent_totals(values)
        return metrics.batch_sums(
            y,
            error * (1 / state.scale_out),
            l0=fired.sum(dtype=jnp.float32),  # more than int32 holds, in a large batch or a long window
            l1=magnitudes.sum() / state.scale_out.mean(),
            fired=0 if sparse else fired,
            loss=outputs.loss,
            nonfinite=sum((~jnp.isfinite(a)).sum() for a in jax.tree.leaves(raw)),
            mean=mean,
        )

    arrays = (acts, y, outputs.error, latents.values if isinstance(latents, Codes) else latents)
    sums = ops.sum_over_tokens(part, arrays, sizes.d_in, sizes.d_sae, gradients=False)
    return sums._replace(fired=ops.times_fired(latents, sizes.d_sae)) if isinstance(latents, Codes) else sums


def _floats(state: TrainState, acts: Acts) -> tuple[Float[Array, "n d"], Float[Array, "n o"]]:
    """Return input and target in float32."""
    x, y = input_and_target(state.sae.config, acts)
    return x.astype(jnp.float32), y.astype(jnp.float32)


def _ramp(config: TrainConfig, number: Int[Array, ""]) -> Float[Array, ""]:
    """Return the warm-up factor of penalties, from 0 to 1."""
    return jnp.minimum(number / max(config.sparsity_warmup_fraction * config.num_steps, 1), 1)


def _move_statistics(new: SAE, before: SAE, values: dict[str, Array], rate: Float[Array, ""]) -> None:
    """Set the running statistics of `new` to those of `before`, moved towards the batch's values by the share `rate`.

    Raises:
      TypeError: the class returns other statistics than it declares.
    """
    declared = before.initial_statistics(before.config)
    if declared.keys() != values.keys():
        raise TypeError(f"{before.name} declares the statistics {list(declared)}, but returned {list(values)}")
    for name, value in values.items():
        previous = getattr(before, name)[...]
        getattr(new, name)[...] = previous + rate * (value - previous)


def _statistics_rate(config: TrainConfig, number: Int[Array, ""]) -> Float[Array, ""]:
    """Return the update rate of running means over 1,000 steps, or over a twentieth of a shorter run."""
    return jnp.maximum(1 / jnp.clip(config.num_steps / 20, 1, 1000), 1 / number)


def _annealed_k(config: TrainConfig, k: int, number: Int[Array, ""]) -> Int[Array, ""]:
    """Return k at a step, annealed linearly from k_start to k."""
    share = jnp.minimum(number / config.anneal_steps, 1)
    return jnp.round(config.k_start + (k - config.k_start) * share).astype(jnp.int32)


def _averaged(config: TrainConfig, average: SAE | None, sae: SAE, number: Int[Array, ""]) -> SAE | None:
    if average is None:
        return None
    rate = jnp.maximum(1 / max(config.average_fraction * config.num_steps, 1), 1 / number)
    return jax.tree.map(lambda mean, new: mean + rate * (new - mean), average, sae)


def _resampled(
    config: TrainConfig,
    ops: Ops,
    state: TrainState,
    number: Array,
    sae: SAE,
    opt: Any,
    since_fired: Array,
    acts: Acts,
) -> tuple[SAE, Any, Array]:
    """Resample the dead latents every `resample_steps` steps, but not while the learning rate decays."""
    last = round((1 - config.decay_fraction) * config.num_steps)
    due = (number % config.resample_steps == 0) & (number <= last)
    x, y = _floats(state, acts)

    def resample() -> tuple[SAE, Any, Array]:
        is_dead = since_fired >= config.dead_window
        key = jax.random.fold_in(jax.random.key(config.seed), number)
        resampled = dead.resample(sae, opt, is_dead, x * state.scale, y * state.scale_out, key, ops)
        return *resampled, jnp.where(is_dead, 0, since_fired)

    return jax.lax.cond(due, resample, lambda: (sae, opt, since_fired))
