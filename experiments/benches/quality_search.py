"""Searches of the quality measurements: for a learning rate, for the strength that gives an L0, and between L0s."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

LONGEST_STEP = math.log(8)
"""Of the search for a strength: L0 hardly depends on it where the rate is far too low."""

LOGARITHMIC = frozenset({"fvu"})
"""Scores that are interpolated by their logarithm."""

_HOPELESS = math.log(3)
"""Distance in log L0 of the better of two tries from which on a search for a strength is given up."""
_AWAY = 0.05
"""The same of how much farther away a try is than the one before."""

_STEEPEST = 3.0
"""Largest |slope| that is believed: noise can make it any."""

FARTHEST = math.log(1.3)
"""Largest distance in log L0 over which scores are interpolated."""


def climb(cost: Callable[[int], float], start: int, low: int, high: int, steps: Iterable[int] = (2, 1)) -> int:
    """Return the place of the lowest cost, for a cost that falls and then rises; each place is asked for once.

    Neighbours at a distance of the first step are tried until both are worse, then those of the next step. Without
    steps the cost of the first place alone is asked for.

    Args:
      cost: of a place.
      start: first place.
      low: first place that is allowed.
      high: last place that is allowed.
      steps: distances of neighbours, from the longest to the shortest.
    """
    costs: dict[int, float] = {}

    def at(place: int) -> float:
        if place not in costs:
            found = cost(place)
            costs[place] = math.inf if math.isnan(found) else found
        return costs[place]

    best = min(max(start, low), high)
    at(best)
    for step in steps:
        while True:
            around = [place for place in (best, best - step, best + step) if low <= place <= high]
            nearest = min(around, key=at)  # the first of equals: it ends
            if nearest == best:
                break
            best = nearest
    return best


def distance(l0: float, target: float) -> float:
    """Return |log(L0 / target)|; infinite for an L0 that is not finite."""
    return abs(math.log(max(l0, 0.1) / target)) if math.isfinite(l0) else math.inf


def next_strength(tries: Sequence[tuple[float, float]], target: float) -> float:
    """Return the strength to try next: on the line through the two closest points, or of slope -1 through one.

    Args:
      tries: strengths and the L0s that they gave, NaN where training diverged; the last one is halved if all did.
      target: the L0.
    """
    points = sorted((t for t in tries if math.isfinite(t[1])), key=lambda t: distance(t[1], target))
    if not points:
        return tries[-1][0] / 2
    x, y = zip(*((math.log(strength), math.log(max(l0, 0.1) / target)) for strength, l0 in points), strict=True)
    slope = (y[1] - y[0]) / (x[1] - x[0]) if len(points) > 1 and x[0] != x[1] else -1.0
    step = -y[0] / min(max(slope, -3.0), -0.3)
    return math.exp(x[0] + min(max(step, -LONGEST_STEP), LONGEST_STEP))


def first_strength(found: Mapping[float, float], rate: float, otherwise: float) -> float:
    """Return the strength to try first at a learning rate: on the line through those of the two nearest rates, in logs.

    Where one rate alone is known, or the slope of the line is not between -2 and 1, it is the strength of the nearest.

    Args:
      found: strengths that gave the target L0, by rate.
      rate: the rate.
      otherwise: the strength where none is found yet.
    """
    nearest = sorted(found, key=lambda other: abs(math.log(other / rate)))[:2]
    if not nearest:
        return otherwise
    known = found[nearest[0]]
    if len(nearest) == 1:
        return known
    slope = math.log(found[nearest[1]] / known) / math.log(nearest[1] / nearest[0])
    return known * (rate / nearest[0]) ** slope if -2 <= slope <= 1 else known


def is_hopeless(l0s: Sequence[float], target: float) -> bool:
    """Return whether a search for a strength is given up: after two tries L0 is still far away, or a try leads away.

    A second try that is farther away on the other side of the target does not: the next one lies between the two.

    Args:
      l0s: what the tries gave, in their order; NaN where training diverged.
      target: the L0.
    """
    if len(l0s) < 2:
        return False
    distances = [distance(l0, target) for l0 in l0s]
    is_between = len(l0s) == 2 and min(l0s) < target < max(l0s)
    return min(distances) > _HOPELESS or (distances[-1] > distances[-2] + _AWAY and not is_between)


def slopes(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
    """Return how each score changes with log L0, from the scores of two SAEs: d log score for `LOGARITHMIC` ones.

    A slope is limited to [-3, 3], and is 0 where a score is missing or not finite, or the L0s differ by less than 2 %.
    """
    apart = math.log(b["l0"] / a["l0"]) if min(a["l0"], b["l0"]) > 0 else 0.0
    found = {}
    for name in a.keys() & b.keys():
        first, second = (_scale(name, scores[name]) for scores in (a, b))
        slope = (second - first) / apart if abs(apart) > 0.02 else 0.0
        found[name] = min(max(slope, -_STEEPEST), _STEEPEST) if math.isfinite(slope) else 0.0
    return found


def at_l0(
    scores: Mapping[str, float], slope: Mapping[str, float], target: float, names: Iterable[str]
) -> dict[str, float]:
    """Return scores moved along their slopes to an L0.

    Those that are not in `names` stay as they are, and all do where the L0 is farther away than `FARTHEST`.
    """
    moved = dict(scores)
    if distance(scores["l0"], target) > FARTHEST:
        return moved
    shift = math.log(target / scores["l0"])
    for name in names & scores.keys():
        by = slope.get(name, 0.0) * shift
        moved[name] = scores[name] * math.exp(by) if name in LOGARITHMIC else scores[name] + by
    return moved


def _scale(name: str, value: float) -> float:
    if name not in LOGARITHMIC:
        return value
    return math.log(value) if value > 0 else math.nan
