"""What a run says while it trains: a progress bar, a JSON line and TensorBoard events per report."""

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Reporter:
    """Writes metrics of a run that goes on from step `start`; a context manager.

    Lines of `metrics.jsonl` beyond `start`, left by a run that was killed, are dropped: they will come again.
    """

    def __init__(self, run: Path, start: int, num_steps: int, wandb_project: str | None = None):
        from torch.utils.tensorboard import SummaryWriter

        self._lines = run / "metrics.jsonl"
        _keep_until(self._lines, start)
        self._file = self._lines.open("a", encoding="utf-8")
        self._events = SummaryWriter(run / "tb", purge_step=start + 1)
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
        self._file.close()
        self._events.close()
        if self._wandb is not None:
            self._wandb.finish()

    def report(self, step: int, values: dict[str, Any]) -> None:
        """One line of metrics; `activations` in `values` since the last report becomes a rate."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        rates = {f"{name}_per_second": values.pop(name) / seconds for name in ("activations", "tokens")}
        line = {"step": step, **values, **rates}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in line.items():
            self._events.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(line, step=step)
        told = (
            f"FVU {line['fvu']:.3f}  L0 {line['l0']:.1f}  dead {line['dead_fraction']:.1%}  "
            f"{line['activations_per_second']:,.0f} activations/s"
        )
        self._progress.update(self._task, completed=step, description=told)


def _keep_until(lines: Path, step: int) -> None:
    if lines.is_file():
        kept = [line for line in lines.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        lines.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def _step_of(line: str) -> float:
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
