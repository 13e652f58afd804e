"""Checks of activations, SAEs and training: degenerate data, useless SAEs, divergence. No jax, no torch."""

import math
from collections.abc import Mapping
from typing import NamedTuple

SMALLEST, LARGEST = 1e-12, 1e12
"""Range of the root mean square of activations. Beyond it, sums of squares leave float32."""
LEAST_VARIANCE = 1e-6
"""Smallest variance of activations, as a share of their mean square. Smaller ones drown in float32 rounding errors."""
DIVERGED = 100.0
"""FVU of a window above which training diverges: an SAE starts at 1 at most, and no penalty raises it far above."""
DIVERGED_STEPS = 100
"""Consecutive steps with such an FVU after which a run has diverged."""


class NotFiniteError(FloatingPointError):
    """Activations or a loss are NaN or infinite."""


class ActivationsError(NotFiniteError):
    """Activations are NaN or infinite. The cause is not the SAE, so another learning rate does not help."""


class DegenerateError(ValueError):
    """Activations from which no SAE can learn, such as constant ones."""


class DivergedError(FloatingPointError):
    """Training has become far worse than at its start and has not recovered."""


class Extent(NamedTuple):
    """Summary statistics of activations."""

    largest: float
    """Largest magnitude."""
    rms: float
    """Root mean square."""
    variance: float
    """Variance, as a share of the mean square."""
    nonfinite: int
    """Count of NaN and infinite numbers."""


def degenerate(extent: Extent, where: str) -> str | None:
    """Return why no SAE can learn from activations, and what to do about it; None if one can.

    Args:
      extent: statistics of the activations.
      where: the name of the activations, such as "activations at blocks.2.hook_resid_post".
    """
    if extent.nonfinite:
        return f"{extent.nonfinite} numbers of the {where} are not finite: check the model's weights and dtype"
    if not extent.largest > 0:
        return f"the {where} are all zero, or too small for float32: choose another hook"
    if not SMALLEST <= extent.rms <= LARGEST:
        return (
            f"the {where} have a root mean square of {extent.rms:.3g}; float32 sums of squares allow {SMALLEST:g} "
            f"to {LARGEST:g}: check the model's weights, or rescale the activations"
        )
    if not extent.variance >= LEAST_VARIANCE:
        return (
            f"the {where} are the same for every token (their variance is {extent.variance:.1e} of their mean square), "
            "so there is nothing to learn: check that the text is not a single repeated token, or choose another hook"
        )
    return None


def unusable(summary: Mapping[str, float]) -> str | None:
    """Return why an SAE with these metrics (`jsae.metrics.summarize`) is useless; None if it is not.

    An SAE with a fraction of variance unexplained (FVU) of 1 or more reconstructs no better than the mean activation.
    """
    nonfinite = [name for name in ("fvu", "mse", "l0", "cosine") if not math.isfinite(summary[name])]
    if nonfinite:
        return f"not finite: {', '.join(nonfinite)}"
    if summary["fvu"] >= 1:
        return f"FVU {summary['fvu']:.3g}, no better than predicting the mean"
    return None


class Watch:
    """A detector of divergence: a run diverges if a metric is above a limit, or NaN, for `DIVERGED_STEPS` steps.

    Args:
      count: number of runs that are trained together. Training continues as long as one of them has not diverged.
      limit: the limit of the metric; the default is for the FVU of an SAE.
      measure: name of the metric for messages, with a typical value.
      advice: the remedy for messages.
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
    def all_suspect(self) -> bool:
        """True if every run was above the limit in its last window, so that a checkpoint may be useless."""
        return len(self._since) == self._count

    def observe(self, name: str, first: int, last: int, value: float) -> str | None:
        """Record the metric of one run over a window of steps.

        Args:
          name: the run; empty if it is the only one.
          first: first step of the window.
          last: last step of the window.
          value: the metric.

        Returns:
          A message if the run has just diverged and others have not, otherwise None.

        Raises:
          DivergedError: all runs have been above the limit for `DIVERGED_STEPS` consecutive steps.
        """
        if value <= self._limit:
            self._since.pop(name, None)
            self._diverged.discard(name)
            return None
        since = self._since.setdefault(name, first)
        if name in self._diverged or last - since + 1 < DIVERGED_STEPS:
            return None
        self._diverged.add(name)
        subject = f" of {name}" if name else ""
        message = (
            f"the training{subject} has diverged: from step {since} to {last} the {self._measure} is above "
            f"{self._limit:.3g}, now {value:.3g}: {self._advice}"
        )
        if len(self._diverged) == self._count:
            raise DivergedError(message)
        return message
