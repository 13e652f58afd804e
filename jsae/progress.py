"""Progress of long work: a bar on a terminal and in a notebook, otherwise a plain line every ten seconds.

    with Progress("training", total=4_000_000, unit="activations") as progress:
        for done in ...:
            progress.update(done, note="FVU 0.081")

prints, where the output is a file or a pipe,

    training: 43 %, 31,204 activations/s, 1:13 left, FVU 0.081
"""

import contextlib
import importlib.util
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

Item = TypeVar("Item")

EVERY = 10
"""Seconds between two plain lines."""
_SHORTEST_WAIT = 0.05  # of the thread that repeats lines, as a part of `every`


class Progress:
    """Show how far some work is, phase by phase; a context manager.

    Everything goes to stderr. On a terminal and in a notebook that is a bar, which disappears at the end. Elsewhere it
    is a line with the share done, the rate and the time left, repeated by a thread when the work reports nothing for
    `every` seconds. A phase that printed lines, or has a note, ends with a line that says how long it took.

    Args:
      name: what is being done in the first phase.
      total: how many units that is; None if it is not known.
      unit: what is counted, in the plural; "" for a share between 0 and 1.
      start: units that were done before.
      every: seconds between two lines; None is `EVERY`.
      console: where to write; None is stderr.
      clock: returns seconds that never decrease; tests replace it.
    """

    def __init__(
        self,
        name: str,
        total: int | float | None = 1,
        unit: str = "",
        start: int | float = 0,
        *,
        every: int | float | None = None,
        console: Console | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._console = console or Console(stderr=True)
        self._every, self._clock = EVERY if every is None else every, clock
        self._lock = threading.RLock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name="progress", daemon=True)
        self._bar = _bar(self._console) if shows_bar(self._console) else None
        self._task = None if self._bar is None else self._bar.add_task(name)
        self._begin(name, total, unit, start)

    def __enter__(self) -> "Progress":
        with self._lock:
            self._since = self._last = self._clock()
        if self._bar is not None:
            self._bar.start()
        else:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._bar is not None:
            self._bar.stop()
        else:
            self._thread.join()
        if error is None:
            self._finish()

    def phase(self, name: str, total: int | float | None = 1, unit: str = "", start: int | float = 0) -> None:
        """End the current phase and begin another one; the arguments are those of the class."""
        with self._lock:
            self._finish()
            self._begin(name, total, unit, start)

    def update(self, done: int | float, note: str = "") -> None:
        """Report that `done` units of the phase are done in all; `note` is shown beside until the next report."""
        with self._lock:
            self._done, self._note = done, note
            if self._bar is not None:
                description = self._name + f"  {note}" * bool(note)
                self._bar.update(self._task, completed=done, description=description)
            elif self._clock() - self._last >= self._every:
                self._print_line()

    def advance(self, units: int | float = 1) -> None:
        """Report that `units` more are done."""
        with self._lock:
            self.update(self._done + units, self._note)

    def each(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items, and advance by one after each."""
        for item in items:
            yield item
            self.advance()

    def share(self, name: str, share: int | float) -> None:
        """Report the share of a phase that is done, from 0 to 1; a name that is new begins the next phase."""
        with self._lock:
            if name != self._name:
                self.phase(name)
            self.update(share)

    @contextlib.contextmanager
    def tokens_of(self, model: Any) -> Iterator[None]:
        """Advance by the number of tokens whenever `model`, a torch module, is called within the context."""
        handle = model.register_forward_pre_hook(lambda module, inputs: self.advance(inputs[0].numel()))
        try:
            yield
        finally:
            handle.remove()

    def _begin(self, name: str, total: int | float | None, unit: str, start: int | float) -> None:
        self._name, self._total, self._unit = name, total, unit
        self._start = self._done = start
        self._note, self._lines = "", 0
        self._since = self._clock()
        self._last = getattr(self, "_last", self._since)
        if self._bar is not None:
            self._bar.reset(self._task, total=total, completed=start, description=name)  # type: ignore[arg-type]

    def _finish(self) -> None:
        if self._lines or self._note:
            self._write(self._text(f"took {_time(self._clock() - self._since)}"))

    def _print_line(self) -> None:
        self._last = self._clock()
        self._lines += 1
        self._write(self._text(self._left()))

    def _text(self, end: str) -> str:
        """A line: the phase, how much of it is done, the rate, and `end`."""
        parts = []
        if self._total:
            parts.append(f"{100 * min(self._done / self._total, 1):.0f} %")
        if rate := self._rate():
            digits = 0 if rate >= 10 else 1
            parts.append(f"{rate:,.{digits}f} {self._unit}/s" if self._unit else f"{6000 * rate:.1f} %/min")
        return f"{self._name}: {', '.join([*parts, end, *filter(None, [self._note])])}"

    def _left(self) -> str:
        rate = self._rate()
        if self._total is None or not rate:
            return f"{_time(self._clock() - self._since)} so far"
        return f"{_time(max(self._total - self._done, 0) / rate)} left"

    def _rate(self) -> float:
        """Units per second since the phase began."""
        seconds = self._clock() - self._since
        return (self._done - self._start) / seconds if seconds > 0 else 0.0

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # a closed output must not end the work
            self._console.print(Text(text), soft_wrap=True)

    def _repeat(self) -> None:
        """Print a line whenever the last one is `every` seconds old; runs in a thread of its own."""
        wait = self._every
        while not self._ended.wait(wait):
            with self._lock:
                if self._ended.is_set():
                    return
                if self._clock() - self._last >= self._every:
                    self._print_line()
                wait = max(self._every - (self._clock() - self._last), _SHORTEST_WAIT * self._every)


def shows_bar(console: Console) -> bool:
    """Return whether a bar can be drawn: on a terminal that moves its cursor, or in a notebook."""
    if console.is_jupyter:
        return importlib.util.find_spec("ipywidgets") is not None  # without which rich draws nothing in a notebook
    return console.is_terminal and not console.is_dumb_terminal


def _bar(console: Console) -> Bar:
    columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}", markup=False), TimeRemainingColumn())
    return Bar(*columns, console=console, transient=True, refresh_per_second=4)


def _time(seconds: int | float) -> str:
    """Seconds as minutes:seconds, or hours:minutes:seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
