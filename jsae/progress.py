"""Show how far a loop has come: a bar in a terminal or a notebook, elsewhere a plain line at least every ten seconds.

The bar is drawn by rich where it is installed; it is imported only when a bar is wanted.
"""

import abc
import contextlib
import importlib.util
import os
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from rich.console import Console

EVERY = 10.0
"""Seconds between plain lines."""


@runtime_checkable
class Stream(Protocol):
    """A stream of text, such as stderr."""

    def write(self, text: str, /) -> Any:
        """Write a text."""
        ...

    def flush(self) -> Any:
        """Write what is held back."""
        ...


class Display(abc.ABC):
    """Shows the progress of a loop while it is entered; a context manager."""

    @abc.abstractmethod
    def update(self, done: int, text: str = "") -> None:
        """Show that `done` of the units are done; `text` says more about them."""

    @abc.abstractmethod
    def close(self) -> None:
        """Stop showing."""

    def __enter__(self) -> "Display":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def display(total: int, *, start: int = 0, unit: str = "steps", stream: Stream | None = None) -> Display:
    """Return what fits the output: a bar in a terminal or a notebook, else plain lines.

    Args:
      total: units at the end.
      start: units that are done already.
      unit: what is counted, in the plural.
      stream: where to; None is stderr.
    """
    stream = sys.stderr if stream is None else stream
    console = _console(stream)
    return Lines(total, start=start, unit=unit, stream=stream) if console is None else Bar(total, start, unit, console)


class Lines(Display):
    """Plain lines, at least every so many seconds, also while nothing is heard of the loop; and one at the end.

    Args:
      total: units at the end.
      start: units that are done already.
      unit: what is counted, in the plural.
      stream: where to; what cannot be written is left out.
      every: seconds between lines.
      clock: gives the time in seconds.
    """

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        unit: str = "steps",
        stream: Stream,
        every: float = EVERY,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total, self._unit, self._stream, self._clock = total, unit, stream, clock
        self._done, self._text, self._begun = start, "", clock()
        self._first: tuple[float, int] | None = None  # when a rate can be told from: the loop runs, all is compiled
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._repeat, args=(every,), daemon=True)
        self._thread.start()

    def update(self, done: int, text: str = "") -> None:
        """Keep what the next line says."""
        with self._lock:
            self._done, self._text = done, text
            self._first = self._first or (self._clock(), done)

    def close(self) -> None:
        """Write the last line."""
        if not self._closed.is_set():
            self._closed.set()
            self._thread.join()
            self._write()

    def _repeat(self, every: float) -> None:
        while not self._closed.wait(every):
            self._write()

    def _write(self) -> None:
        with self._lock, contextlib.suppress(OSError, ValueError):  # a pipe that broke, a stream that was closed
            now = self._clock()
            since, first = self._first or (now, self._done)
            rate = (self._done - first) / (now - since) if now > since else 0.0
            print(line(self._done, self._total, rate, now - self._begun, self._unit, self._text), file=self._stream)
            self._stream.flush()


class Bar(Display):
    """A bar of rich."""

    def __init__(self, total: int, start: int, unit: str, console: "Console"):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
        self._progress = Progress(*columns, TextColumn("{task.description}"), console=console)
        self._task = self._progress.add_task("", total=total, completed=start)
        self._progress.start()

    def update(self, done: int, text: str = "") -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=done, description=text)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._progress.stop()


def line(done: int, total: int, rate: float, seconds: float, unit: str = "steps", text: str = "") -> str:
    """Return a plain line: the share that is done, the rate, and the time that is left or was taken.

    Args:
      done: units that are done.
      total: units at the end.
      rate: units per second; 0 where it is not known.
      seconds: since the beginning.
      unit: what is counted, in the plural.
      text: more about it.
    """
    parts = [f"{100 * done / max(total, 1):.0f} %", f"{done:,} of {total:,} {unit}"]
    if rate > 0:
        parts.append(f"{rate:,.1f} {unit}/s" if rate < 100 else f"{rate:,.0f} {unit}/s")
    if done >= total:
        parts.append(f"{_time(seconds)} taken")
    else:
        parts.append(f"{_time((total - done) / rate)} left" if rate > 0 else f"{_time(seconds)} so far")
    return "  ".join([*parts, text] if text else parts)


def _time(seconds: float) -> str:
    """Return a duration as hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _console(stream: Stream) -> "Console | None":
    """Return the console on which rich can draw a bar; None where the output is neither terminal nor notebook."""
    notebook = "ipykernel" in sys.modules
    terminal = getattr(stream, "isatty", lambda: False)() and os.environ.get("TERM") != "dumb"
    if not (notebook or terminal) or importlib.util.find_spec("rich") is None:
        return None
    if notebook and importlib.util.find_spec("ipywidgets") is None:  # without which rich draws nothing in a notebook
        return None
    from rich.console import Console

    return Console(file=None if notebook else stream)
