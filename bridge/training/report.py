"""Reports of a training run: progress, a JSON line per report, TensorBoard events."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from bridge.run import Run
from bridge.training.events import Events
from jsae import extras, files, jsons
from jsae.progress import Progress

if TYPE_CHECKING:
    from bridge.training.plan import Trainee


class Reporter:
    """Show and write the metrics of a run; a context manager.

    Every SAE gets a line per report in the `metrics.jsonl` of its folder. Lines after step `start`, left by a killed
    run, are dropped: they are written again.

    Args:
      run: the directory of the run.
      trainees: its SAEs.
      start: steps taken before.
      num_steps: steps of the whole run.
      wandb_project: also log to this project of Weights & Biases.
      silent: show and write nothing: another process does.

    Raises:
      OSError: the files cannot be written.
      ImportError: wandb is not installed.
    """

    def __init__(
        self,
        run: Path,
        trainees: Sequence["Trainee"],
        start: int,
        num_steps: int,
        wandb_project: str | None = None,
        silent: bool = False,
    ):
        self._trainees, self._silent = trainees, silent
        if silent:
            return
        folders = dict.fromkeys(trainee.folder for trainee in trainees)
        for folder in folders:
            keep_until(Run(folder).metrics_file, start)
        self._lines = {folder: files.Lines(Run(folder).metrics_file, sync=False) for folder in folders}
        self._events = Events(Run(run).events_folder, start + 1)
        self._wandb = None if wandb_project is None else _wandb(wandb_project, run)
        self._progress = Progress("training", num_steps, "steps", start)
        self._note = ""
        self._last = time.perf_counter()

    def __enter__(self) -> "Reporter":
        if not self._silent:
            self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._silent:
            return
        self._progress.__exit__(kind, error, trace)
        for lines in self._lines.values():
            lines.close()
        if self._wandb is not None:
            self._wandb.finish()

    def step(self, step: int) -> None:
        """Show that a step is done."""
        if not self._silent:
            self._progress.update(step, self._note)

    def report(self, step: int, values: Sequence[dict[str, Any]], tokens: int) -> None:
        """Write the metrics of every SAE.

        Args:
          step: steps taken.
          values: the metrics of every SAE since the last report, and `activations`, the number since then. A metric
            that is no number, such as a histogram, is only in the line.
          tokens: tokens that the model read since the last report.
        """
        if self._silent:
            return
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        activations = values[0]["activations"]
        rates = {"activations_per_second": activations / seconds, "tokens_per_second": tokens / seconds}
        scalars: dict[str, float] = {}
        for trainee, own in zip(self._trainees, values, strict=True):
            metrics = {name: value for name, value in own.items() if name != "activations"} | rates
            line = {"step": step, "hook": trainee.name, **metrics}
            self._lines[trainee.folder].append(json.dumps(line))
            prefix = f"{trainee.label}/" if len(self._trainees) > 1 else ""
            scalars |= {prefix + name: value for name, value in metrics.items() if not isinstance(value, dict)}
        self._events.add(step, scalars)
        if self._wandb is not None:
            self._wandb.log(scalars, step=step)
        self._note = _note(values, rates["activations_per_second"])
        self._progress.update(step, self._note)


def _note(values: Sequence[dict[str, Any]], rate: float) -> str:
    """Return the metrics to show with the progress; for several SAEs their range."""

    def bounds(name: str, form: str) -> str:
        metric = [value[name] for value in values]
        return " to ".join(dict.fromkeys(format(bound, form) for bound in (min(metric), max(metric))))

    return (
        f"FVU {bounds('fvu', '.3f')}  L0 {bounds('l0', '.1f')}  dead {bounds('dead_fraction', '.1%')}  "
        f"{rate:,.0f} activations/s"
    )


def keep_until(lines: Path, step: int) -> None:
    """Drop the lines after a step, and an incomplete line."""
    if lines.is_file():
        kept = [line for line, values in jsons.objects(lines) if _step_of(values) <= step]
        files.write(lines, b"".join(line + b"\n" for line in kept))


def _step_of(values: dict[str, Any] | None) -> int | float:
    step = (values or {}).get("step")
    return step if isinstance(step, int | float) else float("inf")  # an incomplete line of a killed process


def _wandb(project: str, run: Path) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ImportError(f"--wandb_project needs wandb: {extras.advice('wandb')}") from error
    return wandb.init(project=project, name=run.name, dir=run, resume="allow", id=run.name)
