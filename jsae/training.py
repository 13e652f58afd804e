"""Training on a user's own activations: `fit` yields progress, `train` returns an SAE, `find_lr` a learning rate."""

import functools
import math
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax

from jsae import loop, metrics, pretrained, rates, state
from jsae.architectures import SAEConfig
from jsae.arrays import Activations, source_of
from jsae.checkpoint import Checkpoints
from jsae.config import RECIPE, TrainConfig
from jsae.data import Cursor, Shuffled, Source
from jsae.health import Watch
from jsae.locks import Lock
from jsae.ops import Ops
from jsae.pretrained import Pretrained
from jsae.progress import Progress as Shown
from jsae.rates import RateSweep
from jsae.settings import require
from jsae.trained import TrainedSAE

BLOCK = 65_536
"""Default number of activations that are shuffled together."""
_TAIL = 0.1  # fraction of the run that the last metrics cover


class Progress(NamedTuple):
    """A report of `fit`."""

    step: int
    num_steps: int
    metrics: dict[str, float]
    """Metrics of the steps since the last report, by the names of `jsae.metrics.summarize`, and `learning_rate` and
    `activations_per_second`. `dead_fraction` is the fraction of latents that did not fire for `dead_after` activations.
    The last report covers the last tenth of the run, or the part of it since the last checkpoint."""
    state: state.TrainState
    """The state after `step`. The next step donates it: copy arrays that you keep."""

    def trained(self) -> TrainedSAE:
        """Return the SAE after this step, in the units of the activations."""
        return TrainedSAE.from_state(self.state, self.metrics)

    def __str__(self) -> str:
        values = self.metrics
        return f"FVU {values['fvu']:.3f}  L0 {values['l0']:.1f}  dead {values['dead_fraction']:.1%}"


def fit(
    acts: Activations,
    sae: SAEConfig,
    config: TrainConfig,
    *,
    optimizer: optax.GradientTransformation | None = None,
    ops: Ops | None = None,
    block_size: int = BLOCK,
    data_seed: int = 0,
    report_every: int = 50,
    checkpoints: str | Path | None = None,
    checkpoint_every: int = 1_000_000,
    init_from: str | Path | TrainedSAE | None = None,
) -> Iterator[Progress]:
    """Train an SAE on activations; return an iterator of reports, one every `report_every` steps and after the last.

    Activations are trained on in random order. Arrays are read repeatedly, in a new order each time, until
    `num_activations` are trained on; an iterator is read once.

    Args:
      acts: an array (rows, d_in) of numpy or jax, or a memory map, which may be larger than the memory; a list of
        arrays of the same tokens, for a transcoder (input, target) or a crosscoder (layers); an iterator, iterable or
        generator function of these; a `jsae.store.Store`; or a `jsae.data.Source`. Convert torch tensors with
        `bridge.to_jax`.
      sae: sizes and settings, such as `jsae.TopK.Config(d_in=768, d_sae=6144, k=32)`.
      config: length of the run, batch size, learning rate and so on.
      optimizer: any optax transformation, with its own learning rate, instead of Adam. Decoder rows keep norm 1.
      ops: the implementation of operations; None chooses it by the device.
      block_size: activations that are shuffled together, rounded down to whole batches. Two blocks are kept in memory.
      data_seed: seed of the order of the activations.
      report_every: steps between reports.
      checkpoints: folder of checkpoints. If it contains one, the run continues from there with the same numbers,
        provided that `acts` gives the same activations. None saves no checkpoints.
      checkpoint_every: activations between checkpoints.
      init_from: an exported SAE that training continues, a directory as `jsae.load` takes it or what it returns. Its
        sizes must be those of `sae`, and its form that of the architecture. The scales of the input are estimated on
        `acts`, and moments start at zero. A run that has a checkpoint does not read it again.

    Raises:
      ConfigError: settings that cannot work, activations of another width, checkpoints of another run, or an SAE to
        continue from that is of another kind.
      FileNotFoundError, ValueError, ImportError: an SAE to continue from that cannot be read.
      ActivationsError, DegenerateError: activations that nothing can be learned from.
      NotFiniteError, DivergedError: the run failed. The last checkpoint is from before.
      OSError: a checkpoint cannot be read or written, or another process writes to the folder.
    """
    require(report_every >= 1, f"report_every is {report_every}: it must be at least 1")
    require(
        block_size >= config.batch_size,
        f"block_size={block_size} is less than one batch of {config.batch_size}: raise block_size",
    )
    config.anneals(sae)  # raises ConfigError if the architecture has no k
    source = source_of(acts, data_seed, config.num_steps * config.batch_size)
    _check_widths(source, sae)
    shuffle: dict[str, Any] = {
        "batch_size": config.batch_size,
        "batches_per_block": min(block_size // config.batch_size, config.num_steps),
        "seed": data_seed,
        "num_batches": config.num_steps,
    }
    member = loop.Member(sae, config, inner=optimizer)
    start = None if init_from is None else _start_of_run(init_from, sae, checkpoints)
    run = _Run(member, _chosen(member) if ops is None else ops, source, shuffle, report_every, start)
    if checkpoints is None:
        return run.steps(None, 0)
    return _saved(run, Path(checkpoints), max(checkpoint_every // config.batch_size, 1))


def train(
    acts: Activations,
    sae: SAEConfig,
    config: TrainConfig,
    *,
    progress: bool | Callable[[Progress], None] = False,
    **options: Any,
) -> TrainedSAE:
    """Train an SAE on activations; return it in their units, with the metrics of the last tenth of the run.

    Args:
      acts: as `fit` takes them.
      sae: sizes and settings, such as `jsae.TopK.Config(d_in=768, d_sae=6144, k=32)`.
      config: length of the run, batch size, learning rate and so on.
      progress: True shows a bar in a terminal or a notebook, and a plain line every ten seconds elsewhere, on stderr. A
        function is called with every report.
      options: further arguments of `fit`.

    Raises:
      ConfigError: settings that cannot work, activations of another width, or checkpoints of another run.
      ActivationsError, DegenerateError: activations that nothing can be learned from.
      NotFiniteError, DivergedError: the run failed. The last checkpoint is from before.
      OSError: a checkpoint cannot be read or written, or another process writes to the folder.
    """
    every = options.pop("report_every", max(config.num_steps // 50, 1))
    reports = fit(acts, sae, config, report_every=every, **options)
    if progress is True:
        with Shown("training", config.num_steps, "steps") as shown:
            return _last(reports, lambda report: shown.update(report.step, str(report)))
    return _last(reports, progress or (lambda report: None))


def find_lr(
    acts: Activations,
    sae: SAEConfig,
    config: TrainConfig,
    *,
    report: Callable[[RateSweep], None] | None = None,
    ops: Ops | None = None,
    block_size: int = BLOCK,
    data_seed: int = 0,
    init_from: str | Path | TrainedSAE | None = None,
) -> float:
    """Return the learning rate for training an SAE, from short runs at several rates (`jsae.rates.sweep`).

        config = dataclasses.replace(config, learning_rate=jsae.find_lr(acts, sae, config, report=print))

    About nine copies are trained for a twentieth of the run each, but for at least 150 and at most 1,000 steps.

    Args:
      acts: as `fit` takes them, but no iterator, which could be read once only.
      sae: sizes and settings.
      config: the run, without a learning rate.
      report: called with the sweep, for example `print`.
      ops: the implementation of operations; None chooses it by the device.
      block_size: activations that are shuffled together.
      data_seed: seed of the order of the activations.
      init_from: an exported SAE that training will continue, as in `fit`.

    Raises:
      ConfigError: settings that cannot work, a learning rate that is given, activations of another width, or an
        iterator.
      ActivationsError, DegenerateError: activations that nothing can be learned from.
      NotFiniteError: no rate trains with a finite loss.
    """
    require(
        config.learning_rate is None,
        f"learning_rate={config.learning_rate} is given: leave it out to find one",
    )
    require(
        not isinstance(acts, Iterator),
        "find_lr reads the activations several times, and an iterator can be read once: give an array, a memory map or "
        "a generator function",
    )
    require(block_size >= config.batch_size, f"block_size={block_size} is less than one batch of {config.batch_size}")
    config.anneals(sae)
    source = source_of(acts, data_seed)
    _check_widths(source, sae)
    begin, member = source.position(), loop.Member(sae, config)
    start = None if init_from is None else _start(init_from, sae)

    def open_stream(steps: int) -> tuple[Iterator[loop.Batch], loop.Batch]:
        per_block = min(block_size // config.batch_size, steps)
        settings: dict[str, Any] = {"batches_per_block": per_block, "seed": data_seed, "num_batches": steps}
        batches = Shuffled(source, batch_size=config.batch_size, cursor=Cursor(0, 0, begin), **settings)
        return ((batch,) for batch in batches), (batches.peek(),)

    (found,) = rates.sweep([member], open_stream, _chosen(member) if ops is None else ops, starts=[start])
    source.seek(begin)
    if report is not None:
        report(found)
    return found.rate


def _check_widths(source: Source, sae: SAEConfig) -> None:
    widths = getattr(source, "widths", None)
    require(
        widths in (None, state.widths(sae)),
        f"this SAE is for activations of widths {state.widths(sae)}, but these have {widths}",
    )


def _last(reports: Iterator[Progress], observe: Callable[[Progress], None]) -> TrainedSAE:
    for report in reports:
        observe(report)
        if report.step == report.num_steps:
            return report.trained()
    raise AssertionError("a run has a last step")


def _saved(run: "_Run", folder: Path, save_every: int) -> Iterator[Progress]:
    """Yield the reports of a run with checkpoints."""
    with Lock(folder), Checkpoints(folder) as checkpoints:
        yield from run.steps(checkpoints, save_every)


class _Run(NamedTuple):
    """An SAE, its activations, and how they are read and reported."""

    member: loop.Member
    ops: Ops
    source: Source
    shuffle: dict[str, Any]
    report_every: int
    start: Pretrained | FileNotFoundError | None
    """The SAE that training continues, or why it cannot be read, which does not matter where there is a checkpoint."""

    def steps(self, checkpoints: Checkpoints | None, save_every: int) -> Iterator[Progress]:
        """Yield the reports of the run, from its start or its last checkpoint."""
        batches, initial, last_metrics, settings = self._begin(checkpoints)
        num_steps, members, watch = self.member.train.num_steps, [self.member], Watch(advice=_ADVICE)
        if last_metrics is not None:
            yield Progress(num_steps, num_steps, last_metrics, initial[0])
            return
        window, tail, since, started = None, None, int(initial[0].step), time.perf_counter()
        add, programs = jax.jit(metrics.add), _programs(self.member, self.ops)
        for number, states, (sums,) in loop.fit(members, initial, ((acts,) for acts in batches), programs):
            window = sums if window is None else add(window, sums)
            if number > (1 - _TAIL) * num_steps:
                tail = sums if tail is None else add(tail, sums)
            last = number == num_steps
            due = checkpoints is not None and (number % save_every == 0 or last)
            if not (due or last or number % self.report_every == 0):
                continue
            loop.check_finite(states[0], window)
            (values,) = loop.summaries(members, number, states, (tail if last else window,))
            now = time.perf_counter()
            values["activations_per_second"] = (number - since) * self.member.train.batch_size / (now - started)
            watch.observe("", since + 1, number, values["fvu"])
            if due and (last or not watch.all_suspect):
                checkpoints.save(number, states, self._notes(batches, values, settings), values["fvu"])
                tail = None
            if last and checkpoints is not None:
                checkpoints.wait()
            yield Progress(number, num_steps, values, states[0])
            window, since, started = None, number, time.perf_counter()

    def _begin(
        self, checkpoints: Checkpoints | None
    ) -> tuple[Shuffled | None, loop.States, dict[str, float] | None, dict[str, Any]]:
        """Return the batches, the states, None and the settings; of a finished run the last metrics, and no batches."""
        if checkpoints is None or checkpoints.latest() is None:
            start = self.start
            if isinstance(start, FileNotFoundError):
                raise start
            batches = Shuffled(self.source, **self.shuffle)
            return (
                batches,
                loop.init([self.member], (batches.peek(),), self.ops, starts=[start]),
                None,
                self._settings(),
            )
        restored = checkpoints.restore(loop.abstract_states([self.member], self.ops))
        for damage in restored.damaged:
            warnings.warn(
                f"the checkpoint of step {damage.step} is damaged, and is now {damage.moved_to}: {damage.reason}",
                stacklevel=2,
            )
        settings = self._checked(restored.notes)
        if restored.step == self.member.train.num_steps:
            values = {name: math.nan if value is None else value for name, value in restored.notes["metrics"].items()}
            return None, restored.states, values, settings
        batches = Shuffled(self.source, cursor=Cursor(**restored.notes["cursor"]), **self.shuffle)
        return batches, restored.states, None, settings

    @staticmethod
    def _notes(batches: Shuffled, values: dict[str, float], settings: dict[str, Any]) -> dict[str, Any]:
        json_metrics = {name: value if math.isfinite(value) else None for name, value in values.items()}
        return {"cursor": batches.cursor().to_json(), "run": settings, "metrics": json_metrics}

    def _settings(self) -> dict[str, Any]:
        """Return all settings that a run's numbers depend on, except the activations and a given optimiser."""
        settings = {"sae": self.member.sae.to_json(), "train": self.member.train.to_json(), "shuffle": self.shuffle}
        flat = {f"{part}.{name}": value for part, values in settings.items() for name, value in values.items()}
        flat |= {"init_from": self.start.description.digest} if isinstance(self.start, Pretrained) else {}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in flat.items()}
        return plain | {"recipe": RECIPE}

    def _checked(self, notes: dict[str, Any]) -> dict[str, Any]:
        """Return the settings of the run, after a check that a checkpoint belongs to it.

        Raises:
          ConfigError: it belongs to another run; names the first setting that differs.
        """
        before, settings = notes.get("run"), self._settings()
        require(isinstance(before, dict), "these checkpoints are not of jsae.fit: give another folder")
        if isinstance(self.start, FileNotFoundError) and "init_from" in before:
            settings["init_from"] = before["init_from"]
        for name in sorted(before.keys() | settings.keys()):
            require(
                before.get(name) == settings.get(name),
                f"these checkpoints are of a run with {name}={before.get(name)!r}, and this one has "
                f"{settings.get(name)!r}: give the same settings to continue it, or another folder",
            )
        return settings


def _start_of_run(
    init_from: str | Path | TrainedSAE, sae: SAEConfig, checkpoints: str | Path | None
) -> Pretrained | FileNotFoundError:
    """Return the SAE that a run continues, or why it is not found if the run may have checkpoints already."""
    try:
        return _start(init_from, sae)
    except FileNotFoundError as error:
        if checkpoints is None or not Path(checkpoints).is_dir():
            raise
        return error


def _start(init_from: str | Path | TrainedSAE, sae: SAEConfig) -> Pretrained:
    """Return the SAE that training continues; warn of what changes in it.

    Raises:
      ConfigError: it is of another kind than `sae`.
      FileNotFoundError, ValueError, ImportError: it cannot be read.
    """
    if isinstance(init_from, TrainedSAE):
        start = pretrained.from_plain(init_from.plain, "the SAE given as init_from")
    else:
        start = pretrained.read(init_from)
    start.check(sae)
    if start.description.note is not None:
        warnings.warn(start.description.note, stacklevel=4)
    return start


def _chosen(member: loop.Member) -> Ops:
    """Return the implementation for the device; warn of a GPU without kernels."""
    choice = loop.choose_ops([member])
    if choice.ops.name == "xla":
        warnings.warn(f"steps are slower than they could be: {choice.reason}", stacklevel=3)
    return choice.ops


@functools.lru_cache(maxsize=4)
def _programs(member: loop.Member, ops: Ops) -> loop.Programs:
    """Return the compiled steps of an SAE; the last few are cached for training the same SAE again."""
    return loop.Programs([member], ops)


_ADVICE = "lower learning_rate or raise warmup_fraction"
