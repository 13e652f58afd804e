"""The time that watching may take: measured against the training's own, and kept to a share of it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

_RECENT = 0.2  # weight of the last cost in the running mean
_JUDGED_AFTER = 20  # steps that were due, before slowness is reported
_MOSTLY_SKIPPED = 0.5


class Budget:
    """A share of the training's time. What is spent is everything between `measuring`, in seconds of the wall clock.

    Compiling and other preparations are counted apart: they happen once, and are reported.

    Args:
      share: the largest ratio of the time that is spent to the rest of the time.
      clock: returns seconds.
    """

    def __init__(self, share: float, clock: Callable[[], float] = time.perf_counter):
        self._share, self._clock = share, clock
        self._began: float | None = None
        self._cost = 0.0
        self._judged = False
        self.spent = 0.0
        """Seconds, without `setup`."""
        self.setup = 0.0
        """Seconds of preparations."""
        self.due = 0
        """Steps to which the training would have been listened to."""
        self.skipped = 0
        """Those of them that the share did not allow."""

    def begin(self) -> None:
        """Start the clock of the training; later calls do nothing."""
        if self._began is None:
            self._began = self._clock()

    @property
    def elapsed(self) -> float:
        """Seconds of the training alone since it began."""
        return 0.0 if self._began is None else max(self._clock() - self._began - self.spent - self.setup, 0.0)

    @property
    def ratio(self) -> float:
        """The time that was spent, over that of the training alone; 0 before it began."""
        return self.spent / self.elapsed if self.elapsed > 0 else 0.0

    @contextlib.contextmanager
    def measuring(self, setup: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Count the time within the context; `setup` says at its end whether it was for preparations."""
        start = self._clock()
        try:
            yield
        finally:
            self.add(self._clock() - start, setup())

    def add(self, seconds: float, setup: bool = False) -> None:
        """Count seconds."""
        if setup:
            self.setup += seconds
        else:
            self.spent += seconds

    def batch(self, seconds: float) -> None:
        """Learn from one step what the next one will cost; the time is not counted."""
        self._cost = seconds if self._cost == 0 else self._cost + _RECENT * (seconds - self._cost)

    def allows(self) -> bool:
        """Return whether the next step may be listened to: its cost, as that of others, is within the share."""
        self.due += 1
        allowed = self._cost == 0 or self.spent + self._cost <= self._share * self.elapsed
        self.skipped += not allowed
        return allowed

    def too_slow(self) -> str | None:
        """Return once, where most due steps are skipped, what the share pays for; None otherwise."""
        if self._judged or self.due < _JUDGED_AFTER or self.skipped < _MOSTLY_SKIPPED * self.due:
            return None
        self._judged = True
        return (
            f"a batch takes {self._cost:.2g} s, and {self._share:.3g} of the training's time pays for one in "
            f"{self.due / max(self.due - self.skipped, 1):.0f} of the steps that were due, so the others are skipped: "
            "take fewer tokens or latents, raise share, or give place='sidecar'"
        )
