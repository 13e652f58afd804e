"""Numbers that no SAE can learn from or that say a run is lost: what they are and what to do. No jax, no torch."""

import math
from collections.abc import Mapping
from typing import NamedTuple

SMALLEST, LARGEST = 1e-12, 1e12
"""Root mean squares of activations that training takes. Beyond them sums of squares leave float32."""
LEAST_VARIANCE = 1e-6
"""Of activations, as a share of their mean square. Below it float32 cannot tell their variance from rounding."""
DIVERGED = 100.0
"""A windowed FVU above this is no training: an SAE starts at 1 at most, and no penalty leads it far above."""
DIVERGED_STEPS = 100
"""Steps on end with such an FVU after which a run has diverged."""


class NotFiniteError(FloatingPointError):
    """Activations or a loss that are NaN or infinite."""


class ActivationsError(NotFiniteError):
    """Activations that are NaN or infinite, whatever the SAE: another learning rate does not help."""


class DegenerateError(ValueError):
    """Activations that nothing can be learned from."""


class DivergedError(FloatingPointError):
    """Training that got worse than any start and stayed there."""


class Extent(NamedTuple):
    """What is seen of activations at a glance."""

    largest: float
    """The largest magnitude of a number."""
    rms: float
    """Root mean square of the numbers."""
    variance: float
    """Mean squared distance from the mean activation, as a share of the mean square."""
    nonfinite: int
    """Numbers that are NaN or infinite."""


def degenerate(extent: Extent, where: str) -> str | None:
    """Return why nothing can be learned from activations, and what to do; None where something can.

    Args:
      extent: of the activations.
      where: names them, for example "activations at blocks.2.hook_resid_post".
    """
    if extent.nonfinite:
        return f"{extent.nonfinite} numbers of the {where} are not finite: the model's weights or its arithmetic fail"
    if not extent.largest > 0:
        return f"the {where} are all zero, or too small for float32: the model writes nothing there; read another hook"
    if not SMALLEST <= extent.rms <= LARGEST:
        return (
            f"the {where} have a root mean square of {extent.rms:.3g}, and float32 sums of squares hold {SMALLEST:g} "
            f"to {LARGEST:g}: look at the model's weights, or rescale what it writes there"
        )
    if not extent.variance >= LEAST_VARIANCE:
        return (
            f"the {where} are the same for every token (their variance is {extent.variance:.1e} of their mean square): "
            "there is nothing to learn. Is the text one token over and over? Else read another hook"
        )
    return None


def unusable(summary: Mapping[str, float]) -> str | None:
    """Return what is wrong with an SAE of these metrics (`jsae.metrics.summarize`); None if it is of use.

    An SAE with a fraction of variance unexplained of 1 or more reconstructs no better than the mean activation does.
    """
    odd = [name for name in ("fvu", "mse", "l0", "cosine") if not math.isfinite(summary[name])]
    if odd:
        return f"not finite: {', '.join(odd)}"
    if summary["fvu"] >= 1:
        return f"FVU {summary['fvu']:.3g}, no better than predicting the mean"
    return None


class Watch:
    """Notices runs that diverge: their measure is above a limit, or NaN, in every window of many steps on end.

    Args:
      count: runs that are stepped together. As long as one of them is well, all go on.
      limit: above it no training is; the default is of an SAE's FVU.
      measure: what is watched, with a word on what is usual.
      advice: what helps.
    """

    def __init__(
        self,
        count: int = 1,
        limit: float = DIVERGED,
        measure: str = "FVU (1 is predicting the mean)",
        advice: str = "lower --learning_rate or raise --warmup_fraction",
    ):
        self._count, self._limit, self._measure, self._advice = count, limit, measure, advice
        self._since: dict[str, int] = {}
        self._diverged: set[str] = set()

    @property
    def suspects_all(self) -> bool:
        """Whether the last window of every run was as bad: what is saved now may be lost already."""
        return len(self._since) == self._count

    def see(self, name: str, first: int, last: int, value: float) -> str | None:
        """Take the measure of the steps `first` to `last` of one run, whose name is empty if it is the only one.

        Returns:
          what to tell of the run if it has just diverged, but others are well; else None.

        Raises:
          DivergedError: all runs were above the limit for `DIVERGED_STEPS` steps on end; says since when.
        """
        if value <= self._limit:
            self._since.pop(name, None)
            self._diverged.discard(name)
            return None
        since = self._since.setdefault(name, first)
        if name in self._diverged or last - since + 1 < DIVERGED_STEPS:
            return None
        self._diverged.add(name)
        whose = f" of {name}" if name else ""
        told = (
            f"the training{whose} has diverged: from step {since} to {last} the {self._measure} is above "
            f"{self._limit:.3g}, {value:.3g} now: {self._advice}"
        )
        if len(self._diverged) == self._count:
            raise DivergedError(told)
        return told
