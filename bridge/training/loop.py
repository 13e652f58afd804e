"""The loop of a training run: steps of all SAEs, with reports, checkpoints and stop requests."""

import contextlib
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from bridge.run import Run
from bridge.training.report import Reporter
from jsae import loop, metrics
from jsae.checkpoint import Checkpoints
from jsae.data import Cursor, Shuffled
from jsae.health import ActivationsError, Watch
from jsae.loop import AllSums, Member, States
from jsae.ops import Ops

if TYPE_CHECKING:
    from bridge.stream import ActivationStream
    from bridge.training.config import RunConfig
    from bridge.training.plan import Trainee

StopRequests = Callable[[], contextlib.AbstractContextManager[Collection[object]]]
"""Returns a context manager; the collection it yields is empty until the run should be saved and stopped."""

_REPORTED = ("loss", "fvu", "l0", "mse", "cosine", "dead_fraction", "learning_rate")


def train(
    run: Path,
    config: "RunConfig",
    trainees: Sequence["Trainee"],
    source: "ActivationStream",
    stop_requests: StopRequests | None = None,
    guard: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ops: Ops | None = None,
) -> States | None:
    """Train from the start or the last checkpoint to the end.

    Args:
      run: its directory.
      config: its settings.
      trainees: its SAEs.
      source: the activations of their sites.
      stop_requests: entered while steps are taken; None never stops the run.
      guard: entered for every step after the first, which compiles, and left before reports, for example
        `bridge.stream.forbid_waiting`.
      ops: the implementation of operations; None chooses it by the device.

    Returns:
      The states after the last step, in the order of the trainees; None for a run that was saved and stopped.

    Raises:
      NotFiniteError: activations or a loss that are not finite; says which checkpoint is left and what to do.
      DivergedError: all SAEs became worse than untrained ones and did not recover. The last checkpoint is from before.
    """
    members = [trainee.member for trainee in trainees]
    num_steps = members[0].train.num_steps
    save_every = max(config.checkpoint_every // config.batch_size, 1)
    add = jax.jit(lambda totals, sums: tuple(map(metrics.add, totals, sums)))
    with Checkpoints(Run(run).checkpoints_folder) as checkpoints:
        batches, states = _begin(config, members, source, checkpoints, ops)
        first_states = states
        last_fvu, window, watch = float("nan"), None, Watch(len(trainees))
        with (
            _advice(run, checkpoints),
            Reporter(run, trainees, int(first_states[0].step), num_steps, config.wandb_project) as reporter,
            contextlib.nullcontext(()) if stop_requests is None else stop_requests() as requests,
        ):
            steps = loop.fit(members, first_states, batches, loop.Programs(members, ops))  # type: ignore[arg-type]
            enter: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
            while (taken := _next(steps, enter)) is not None:
                step, states, sums = taken
                enter = guard
                window = sums if window is None else add(window, sums)
                stop, last = bool(requests), step == num_steps  # a later request waits for the next step
                due = last or stop or step % save_every == 0
                reporter.step(step)
                if due or step % config.log_every == 0:
                    for trainee, state, total in zip(trainees, states, window, strict=True):
                        loop.check_finite(state, total, trainee.label if len(trainees) > 1 else None)
                    values = _values(members, step, states, window)
                    tokens, source.tokens_seen = source.tokens_seen, 0
                    reporter.report(step, values, tokens)
                    _watch(watch, trainees, step, values, config.batch_size)
                    last_fvu, window = float(np.mean([v["fvu"] for v in values])), None
                if due and (last or requests or not watch.all_suspect):
                    checkpoints.save(step, states, {"cursor": batches.cursor().to_json()}, last_fvu)
                if stop:
                    break
            checkpoints.wait()
    return None if requests else states


def _next(
    steps: Iterator[tuple[int, States, AllSums]], guard: Callable[[], contextlib.AbstractContextManager[None]]
) -> tuple[int, States, AllSums] | None:
    """Take the next step within a guard; return None at the end of the run."""
    with guard():
        return next(steps, None)


@contextlib.contextmanager
def _advice(run: Path, checkpoints: Checkpoints) -> Iterator[None]:
    """Add to a FloatingPointError which checkpoint is left, and what to do."""
    try:
        yield
    except FloatingPointError as error:
        checkpoints.wait()
        step = checkpoints.latest()
        left = "no checkpoint was saved" if step is None else f"the checkpoint of step {step} is from before"
        remedy = "other settings"
        if isinstance(error, ActivationsError):
            remedy = "a repaired model, or without that text in --data"
        advice = f"In {run} {left}; --resume would end here again: start anew with {remedy}"
        raise type(error)(f"{error}. {advice}") from error


def _watch(
    watch: Watch, trainees: Sequence["Trainee"], step: int, values: Sequence[dict[str, Any]], batch_size: int
) -> None:
    """Pass the reported metrics of every SAE to the watch; warn of an SAE that diverged while others did not."""
    for trainee, value in zip(trainees, values, strict=True):
        steps = round(value["activations"] / batch_size)
        problem = watch.observe(trainee.label if len(trainees) > 1 else "", step - steps + 1, step, value["fvu"])
        if problem is not None:
            print(f"warning: {problem}. The other SAEs continue", file=sys.stderr, flush=True)


def _begin(
    config: "RunConfig",
    members: Sequence[Member],
    source: "ActivationStream",
    checkpoints: Checkpoints,
    ops: Ops | None,
) -> tuple[Shuffled, States]:
    """Return batches and states: new ones, or those of the last intact checkpoint if the run is resumed."""
    shuffle: dict[str, Any] = {
        "batch_size": config.batch_size,
        "batches_per_block": config.block_size // config.batch_size,
        "seed": config.data_seed,
        "num_batches": members[0].train.num_steps,
    }
    if config.resume and checkpoints.latest() is not None:
        restored = checkpoints.restore(loop.abstract_states(members, ops))
        for step, reason, moved_to in restored.damaged:
            print(f"WARNING the checkpoint of step {step} is damaged, and is now {moved_to}: {reason}")
        print(f"continuing from the checkpoint of step {restored.step}", flush=True)
        return Shuffled(source, cursor=Cursor(**restored.notes["cursor"]), **shuffle), restored.states
    if config.resume:
        print("there is no checkpoint yet: starting with the first step", flush=True)
    batches = Shuffled(source, **shuffle)
    return batches, loop.init(members, batches.peek(), ops)  # type: ignore[arg-type]


def _values(members: Sequence[Member], step: int, states: States, window: AllSums) -> list[dict[str, Any]]:
    """Return the reported metrics of every SAE, from `window`, the sums since the last report."""
    summaries = loop.summaries(members, step, states, window)
    return [{name: summary[name] for name in _REPORTED} | {"activations": summary["tokens"]} for summary in summaries]
