"""The loop of a training run: steps of all SAEs, with reports, checkpoints and stop requests."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from bridge.run import Run
from bridge.training.continuing import Starts
from bridge.training.memory import SAMPLE
from bridge.training.report import Reporter
from jsae import loop, metrics, processes, rates
from jsae.checkpoint import Checkpoints
from jsae.data import Block, Cursor, Shuffled
from jsae.health import ActivationsError, DivergedError, NotFiniteError, Watch
from jsae.loop import AllSums, Member, States
from jsae.ops import Ops
from jsae.rates import RateSweep

if TYPE_CHECKING:
    from bridge.stream import ActivationStream
    from bridge.training.config import RunConfig
    from bridge.training.plan import Trainee
    from jsae.store.source import SiteSource

StopRequests = Callable[[], contextlib.AbstractContextManager[Collection[object]]]
"""Returns a context manager; the collection it yields is empty until the run should be saved and stopped."""

_REPORTED = ("loss", "fvu", "l0", "mse", "cosine", "dead_fraction", "learning_rate")


@dataclasses.dataclass(frozen=True)
class Shards:
    """Parts of every batch, of which several processes have some each."""

    own: Sequence[int] = (0,)
    """The numbers of those of this process."""
    count: int = 1
    """Number of parts of a batch."""


def train(
    run: Path,
    config: "RunConfig",
    trainees: Sequence["Trainee"],
    source: "ActivationStream | SiteSource",
    stop_requests: StopRequests | None = None,
    guard: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ops: Ops | None = None,
    mesh: Mesh | None = None,
    shards: Shards | None = None,
    starts: Starts | None = None,
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
      mesh: the devices of all processes; None: one.
      shards: which parts of every batch the source gives; None: batches have one part.
      starts: the exported SAEs that the trainees continue; None: they are new.

    Returns:
      The states after the last step, in the order of the trainees; None for a run that was saved and stopped.

    Raises:
      NotFiniteError: activations or a loss that are not finite; says which checkpoint is left and what to do.
      DivergedError: all SAEs became worse than untrained ones and did not recover. The last checkpoint is from before.
      SharedError: in other processes than the first, where both of these are raised.
    """
    members, shards = [trainee.member for trainee in trainees], shards or Shards()
    num_steps = members[0].train.num_steps
    save_every = max(config.checkpoint_every // config.batch_size, 1)
    add = jax.jit(lambda totals, sums: tuple(map(metrics.add, totals, sums)))
    with Checkpoints(Run(run).checkpoints_folder) as checkpoints:
        batches, states = _begin(config, trainees, source, checkpoints, ops, mesh, shards, starts)
        first_states, stopped = states, False
        last_fvu, window, watch = float("nan"), None, Watch(len(trainees))
        with (
            _advice(run, checkpoints),
            Reporter(
                run,
                trainees,
                int(first_states[0].step),
                num_steps,
                config.wandb_project,
                silent=not processes.is_first(),
            ) as reporter,
            contextlib.nullcontext(()) if stop_requests is None else stop_requests() as requests,
        ):
            everyone = batches if mesh is None else _of_all(batches, mesh)
            steps = loop.fit(members, first_states, everyone, loop.Programs(members, ops, mesh))  # type: ignore[arg-type]
            agreement = Agreement(mesh)
            enter: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
            while (taken := _next(steps, enter)) is not None:
                step, states, sums = taken
                enter = guard
                window = sums if window is None else add(window, sums)
                # A later request waits for the next step.
                stopped, last = agreement.reached(step, bool(requests)), step == num_steps
                due = last or stopped or step % save_every == 0
                reporter.step(step)
                if due or step % config.log_every == 0:
                    with processes.same_everywhere(NotFiniteError):
                        for trainee, state, total in zip(trainees, states, window, strict=True):
                            loop.check_finite(state, total, trainee.label if len(trainees) > 1 else None)
                    values = _values(members, step, states, window)
                    tokens, source.tokens_seen = source.tokens_seen, 0
                    reporter.report(step, values, tokens * processes.count())
                    with processes.same_everywhere(DivergedError):
                        _watch(watch, trainees, step, values, config.batch_size)
                    last_fvu, window = float(np.mean([v["fvu"] for v in values])), None
                if due and (last or stopped or not watch.all_suspect):
                    cursor = _whole_cursor(batches.cursor(), source)
                    checkpoints.save(step, states, {"cursor": cursor}, last_fvu)
                if stopped:
                    break
            checkpoints.wait()
            stopped = stopped or processes.any_of(bool(requests))
    return None if stopped else states


class Agreement:
    """Agreement of all processes to stop at the same step, after some of them have been asked to.

    Args:
      mesh: the devices of all processes; None: there is one process.
    """

    EVERY = 8
    """Steps between two exchanges. An answer is read when the next question is asked, so that no step waits for it."""

    def __init__(self, mesh: Mesh | None):
        self._mesh, self._answer = mesh, None
        self._any = jax.jit(lambda asked: asked.any())

    def reached(self, step: int, asked: bool) -> bool:
        """Return whether to stop after this step.

        Args:
          step: its number.
          asked: whether this process was asked to stop.
        """
        if self._mesh is None:
            return asked
        if step % self.EVERY:
            return False
        previous, self._answer = self._answer, self._any(processes.batch_of(jnp.asarray([asked]), self._mesh))
        return previous is not None and bool(previous)


def _of_all(batches: Iterator[Block], mesh: Mesh) -> Iterator[Block]:
    """Yield the batches of all processes."""
    for batch in batches:
        yield jax.tree.map(lambda acts: processes.batch_of(acts, mesh), batch)


def _whole_cursor(cursor: Cursor, source: "ActivationStream | SiteSource") -> dict[str, Any]:
    """Return the cursors of all processes together, as JSON values."""
    positions = processes.gather(cursor.position)
    position = cursor.position if len(positions) == 1 else source.whole_position(positions)
    return dataclasses.replace(cursor, position=position).to_json()


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
        if processes.count() > 1:  # only this one may have failed
            left = "the last checkpoint is from before"
        else:
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
        if problem is not None and processes.is_first():
            print(f"warning: {problem}. The other SAEs continue", file=sys.stderr, flush=True)


def _begin(
    config: "RunConfig",
    trainees: Sequence["Trainee"],
    source: "ActivationStream | SiteSource",
    checkpoints: Checkpoints,
    ops: Ops | None,
    mesh: Mesh | None,
    shards: Shards,
    starts: Starts | None,
) -> tuple[Shuffled, States]:
    """Return batches and states: new ones, or those of the last intact checkpoint if the run is resumed."""
    members = [trainee.member for trainee in trainees]
    shuffle = _shuffle(config, members[0].train.num_steps, shards)
    if config.resume and checkpoints.latest() is not None:
        restored = checkpoints.restore(loop.abstract_states(members, ops, mesh))
        for step, reason, moved_to in restored.damaged:
            print(f"WARNING the checkpoint of step {step} is damaged, and is now {moved_to}: {reason}")
        print(f"continuing from the checkpoint of step {restored.step}", flush=True)
        return Shuffled(source, cursor=Cursor(**restored.notes["cursor"]), **shuffle), restored.states
    if config.resume:
        print("there is no checkpoint yet: starting with the first step", flush=True)
    batches = Shuffled(source, **shuffle)
    sample = _sample(batches, mesh, shards)
    with processes.together():
        pretrained = None if starts is None else [starts.read(trainee.name) for trainee in trainees]
    return batches, loop.init(members, sample, ops, mesh, pretrained)


def _shuffle(config: "RunConfig", num_batches: int, shards: Shards) -> dict[str, Any]:
    """Return the arguments of `jsae.data.Shuffled` for some steps of a run."""
    return {
        "batch_size": config.batch_size * len(shards.own) // shards.count,
        "batches_per_block": config.block_size // config.batch_size,
        "seed": config.data_seed,
        "num_batches": num_batches,
        "shards": shards.own,
        "shard_count": shards.count,
    }


def _sample(batches: Shuffled, mesh: Mesh | None, shards: Shards) -> Any:
    """Return the sample that initialises the states, the same in all processes."""
    return jax.tree.map(lambda acts: processes.sample_of(acts, len(shards.own), mesh), batches.sample(SAMPLE))


def find_rates(
    config: "RunConfig",
    trainees: Sequence["Trainee"],
    source: "ActivationStream | SiteSource",
    ops: Ops | None = None,
    mesh: Mesh | None = None,
    shards: Shards | None = None,
    starts: Starts | None = None,
) -> list[RateSweep]:
    """Find the learning rate of every SAE of a run by short runs on its stream (`jsae.rates.sweep`).

    The source is where it was afterwards.

    Args:
      config: the run.
      trainees: its SAEs.
      source: the activations of their sites.
      ops: the implementation of operations; None chooses it by the device.
      mesh: the devices of all processes; None: one.
      shards: which parts of every batch the source gives; None: batches have one part.
      starts: the exported SAEs that the trainees continue; None: they are new.

    Raises:
      NotFiniteError: no rate trains with a finite loss.
    """
    shards, begin = shards or Shards(), source.position()

    def open_stream(steps: int) -> tuple[Iterator[Any], Any]:
        batches = Shuffled(source, cursor=Cursor(0, 0, begin), **_shuffle(config, steps, shards))
        return batches if mesh is None else _of_all(batches, mesh), _sample(batches, mesh, shards)

    with processes.together():
        pretrained = None if starts is None else [starts.read(trainee.name) for trainee in trainees]
    sweeps = rates.sweep([trainee.member for trainee in trainees], open_stream, ops, mesh, pretrained)
    source.seek(begin)
    source.tokens_seen = 0
    return sweeps


def _values(members: Sequence[Member], step: int, states: States, window: AllSums) -> list[dict[str, Any]]:
    """Return the reported metrics of every SAE, from `window`, the sums since the last report.

    The steps count on how many tokens each latent fires anyway: its histogram costs no time on the device.
    """
    window = processes.fetch(window)
    summaries = loop.summaries(members, step, states, window)
    return [
        {name: summary[name] for name in _REPORTED}
        | {"density_histogram": metrics.density_histogram(sums)}
        | {"activations": summary["tokens"]}
        for summary, sums in zip(summaries, window, strict=True)
    ]
