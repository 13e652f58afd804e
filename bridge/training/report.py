"""What a run says while it trains: a progress bar, a JSON line per report, TensorBoard events."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bridge.run import Run
from bridge.training.events import Events
from jsae import files

if TYPE_CHECKING:
    from bridge.training.plan import Trainee


class Reporter:
    """Writes metrics of a run that goes on from step `start`; a context manager.

    Every SAE has a line in the `metrics.jsonl` of its folder. Lines beyond `start`, left by a run that was killed, are
    dropped: they will come again.
    """

    def __init__(
        self,
        run: Path,
        trainees: Sequence["Trainee"],
        start: int,
        num_steps: int,
        wandb_project: str | None = None,
    ):
        self._trainees = trainees
        folders = dict.fromkeys(trainee.folder for trainee in trainees)
        for folder in folders:
            _keep_until(Run(folder).metrics_file, start)
        self._lines = {folder: files.Lines(Run(folder).metrics_file, sync=False) for folder in folders}
        self._events = Events(Run(run).events_folder, start + 1)
        self._wandb = None if wandb_project is None else _wandb(wandb_project, run)
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._task = self._progress.add_task("starting", total=num_steps, completed=start)
        self._last = time.perf_counter()

    def __enter__(self) -> "Reporter":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        for lines in self._lines.values():
            lines.close()
        if self._wandb is not None:
            self._wandb.finish()

    def report(self, step: int, values: Sequence[dict[str, Any]], tokens: int) -> None:
        """One line of metrics for every SAE; `activations` and `tokens` since the last report become rates."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        activations = values[0]["activations"]
        rates = {"activations_per_second": activations / seconds, "tokens_per_second": tokens / seconds}
        scalars: dict[str, float] = {}
        for trainee, found in zip(self._trainees, values, strict=True):
            told = {name: value for name, value in found.items() if name != "activations"} | rates
            line = {"step": step, "hook": trainee.name, **told}
            self._lines[trainee.folder].append(json.dumps(line))
            prefix = f"{trainee.label}/" if len(self._trainees) > 1 else ""
            scalars |= {prefix + name: value for name, value in told.items()}
        self._events.add(step, scalars)
        if self._wandb is not None:
            self._wandb.log(scalars, step=step)
        self._progress.update(self._task, completed=step, description=_told(values, rates["activations_per_second"]))


def _told(values: Sequence[dict[str, Any]], rate: float) -> str:
    """A line for the progress bar: of several SAEs from the least to the most."""

    def ends(name: str, form: str) -> str:
        found = [value[name] for value in values]
        return " to ".join(dict.fromkeys(format(end, form) for end in (min(found), max(found))))

    return (
        f"FVU {ends('fvu', '.3f')}  L0 {ends('l0', '.1f')}  dead {ends('dead_fraction', '.1%')}  "
        f"{rate:,.0f} activations/s"
    )


def _keep_until(lines: Path, step: int) -> None:
    """Drop the lines beyond a step, and one that was cut off."""
    if lines.is_file():
        kept = [line for line in lines.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        files.write(lines, "".join(line + "\n" for line in kept))


def _step_of(line: str) -> int | float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")  # cut off in the middle of a write


def _wandb(project: str, run: Path) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ImportError("--wandb_project needs the extra [wandb]: pip install 'jsae[wandb]'") from error
    return wandb.init(project=project, name=run.name, dir=run, resume="allow", id=run.name)
