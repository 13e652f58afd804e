"""The loop of a training run: every step of every SAE, reports and checkpoints between."""

import contextlib
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from bridge.run import Run
from bridge.training.report import Reporter
from jsae import loop, metrics, optim
from jsae.checkpoint import Checkpoints
from jsae.data import Cursor, Shuffled
from jsae.health import ActivationsError, Watch
from jsae.loop import AllSums, Member, States

if TYPE_CHECKING:
    from bridge.stream import ActivationStream
    from bridge.training.config import RunConfig
    from bridge.training.plan import Trainee

StopRequests = Callable[[], contextlib.AbstractContextManager[Collection[object]]]


def _none() -> contextlib.AbstractContextManager[Collection[object]]:
    return contextlib.nullcontext(())


def train(
    run: Path,
    config: "RunConfig",
    trainees: Sequence["Trainee"],
    source: "ActivationStream",
    stop_requests: StopRequests = _none,
) -> States | None:
    """Train from the start or the last checkpoint to the end; return None if it was asked to stop, after saving.

    `stop_requests` is entered while steps are taken; what it gives becomes true when the run is to stop.

    Raises:
      NotFiniteError: activations or a loss that are not finite; says what was kept and what to do.
      DivergedError: all SAEs got worse than any start, and stayed so. The last checkpoint is from before.
    """
    members = [trainee.member for trainee in trainees]
    num_steps = members[0].train.num_steps
    save_every = max(config.checkpoint_every // config.batch_size, 1)
    add = jax.jit(lambda totals, sums: tuple(map(metrics.add, totals, sums)))
    with Checkpoints(Run(run).checkpoints_folder) as checkpoints:
        batches, states = _begin(config, members, source, checkpoints)
        begun, start = states, int(states[0].step)
        last_fvu, window, watch = float("nan"), None, Watch(len(trainees))
        with (
            _explained(run, checkpoints),
            Reporter(run, trainees, start, num_steps, config.wandb_project) as reporter,
            stop_requests() as stopped,
        ):
            for step, states, sums in loop.fit(members, begun, batches):  # type: ignore[arg-type]
                window = sums if window is None else add(window, sums)
                stop, last = bool(stopped), step == num_steps  # a later request waits for the next step
                due = last or stop or step % save_every == 0
                reporter.step(step)
                if due or step % config.log_every == 0:
                    for trainee, state, total in zip(trainees, states, window, strict=True):
                        loop.check_finite(state, total, trainee.label if len(trainees) > 1 else None)
                    values = _values(members, step, states, window)
                    tokens, source.tokens_seen = source.tokens_seen, 0
                    reporter.report(step, values, tokens)
                    _look(watch, trainees, step, values, config.batch_size)
                    last_fvu, window = float(np.mean([v["fvu"] for v in values])), None
                if due and (last or stopped or not watch.all_suspect):
                    checkpoints.save(step, states, {"cursor": batches.cursor().to_json()}, last_fvu)
                if stop:
                    break
            checkpoints.wait()
    return None if stopped else states


@contextlib.contextmanager
def _explained(run: Path, checkpoints: Checkpoints) -> Iterator[None]:
    """Add to an error of numbers what is left of the run, and what helps."""
    try:
        yield
    except FloatingPointError as error:
        checkpoints.wait()
        step = checkpoints.latest()
        left = "no checkpoint was saved" if step is None else f"the checkpoint of step {step} is from before"
        helps = "other settings"
        if isinstance(error, ActivationsError):
            helps = "a repaired model, or without that text in --data"
        told = f"In {run} {left}; --resume would end here again: start anew with {helps}"
        raise type(error)(f"{error}. {told}") from error


def _look(
    watch: Watch, trainees: Sequence["Trainee"], step: int, values: Sequence[dict[str, Any]], batch_size: int
) -> None:
    """Show the reported metrics of every SAE to the watch, and warn of one that has diverged beside others."""
    for trainee, value in zip(trainees, values, strict=True):
        steps = round(value["activations"] / batch_size)
        told = watch.observe(trainee.label if len(trainees) > 1 else "", step - steps + 1, step, value["fvu"])
        if told is not None:
            print(f"warning: {told}. The other SAEs go on", file=sys.stderr, flush=True)


def _begin(
    config: "RunConfig", members: Sequence[Member], source: "ActivationStream", checkpoints: Checkpoints
) -> tuple[Shuffled, States]:
    """Return the stream and the states it belongs to: fresh ones, or those of the last intact checkpoint."""
    shuffle: dict[str, Any] = {
        "batch_size": config.batch_size,
        "batches_per_block": config.block_size // config.batch_size,
        "seed": config.data_seed,
        "num_batches": members[0].train.num_steps,
    }
    if config.resume and checkpoints.latest() is not None:
        sample = tuple({member.site: _abstract(member, source.d_in) for member in members}.values())
        like = jax.eval_shape(lambda x: loop.init(members, x), sample)
        found = checkpoints.restore(like)
        for step, reason, moved_to in found.damaged:
            print(f"WARNING the checkpoint of step {step} is damaged, and is now {moved_to}: {reason}")
        print(f"going on from the checkpoint of step {found.step}", flush=True)
        return Shuffled(source, cursor=Cursor(**found.notes["cursor"]), **shuffle), found.states
    if config.resume:
        print("there is no checkpoint yet: beginning with the first step", flush=True)
    batches = Shuffled(source, **shuffle)
    return batches, loop.init(members, batches.peek())  # type: ignore[arg-type]


def _abstract(member: Member, width: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The shapes of what a member's site gives."""
    parts = 2 if member.sae.is_transcoder else member.sae.layers
    return (jax.ShapeDtypeStruct((member.train.batch_size, width), np.float32),) * parts


def _values(members: Sequence[Member], step: int, states: States, window: AllSums) -> list[dict[str, Any]]:
    """The metrics of a window of steps, of every SAE."""
    found = []
    since_fired = jax.device_get([state.since_fired for state in states])
    for member, sums, silent in zip(members, jax.device_get(window), since_fired, strict=True):
        summary = metrics.summarize(sums)
        rate = float(optim.schedule(member.train, member.sae.d_sae)(step - 1))
        found.append(
            {
                **{name: summary[name] for name in ("loss", "fvu", "l0", "mse", "cosine")},
                "dead_fraction": float(np.mean(silent >= member.train.dead_after)),
                "learning_rate": rate,
                "activations": summary["tokens"],
            }
        )
    return found
