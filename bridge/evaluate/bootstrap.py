"""Bootstrap intervals of means over classes, documents and latents."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, Shaped

DRAWS = 1000
LEVEL = 0.95
"""Probability that an interval covers."""


def two_level(
    values: Sequence[Shaped[np.ndarray, "m _"]],
    groups: Sequence[Int[np.ndarray, " _"]],
    draws: int = DRAWS,
    seed: int = 0,
) -> Float[np.ndarray, "m b"]:
    """Return bootstrap samples of m means over classes of means over examples.

    Every sample draws as many classes as there are, with replacement, and for each of them as many groups of its
    examples as it has, with replacement; the mean of a class is that over the examples of the drawn groups. All m
    quantities of an example are drawn together, so that differences of samples are paired.

    Args:
      values: for every class its examples' m quantities, (m, n of the class).
      groups: for every class the group of each example, such as its document.
      draws: number of samples.
      seed: of the random numbers.
    """
    rng = np.random.default_rng(seed)
    sums, sizes = zip(*(_by_group(v, g) for v, g in zip(values, groups, strict=True)), strict=True)
    classes = rng.integers(len(values), size=(len(values), draws))
    means = np.zeros((len(values[0]), draws))
    for drawn in classes:
        for i in np.unique(drawn):
            chosen = drawn == i
            count = len(sizes[i])
            weights = rng.multinomial(count, np.full(count, 1 / count), size=np.count_nonzero(chosen))
            means[:, chosen] += (weights @ sums[i].T / (weights @ sizes[i])[:, None]).T
    return means / len(values)


def of_mean(values: Sequence[float], draws: int = DRAWS, seed: int = 0) -> list[float] | None:
    """Return the interval of the mean of independent values, such as scores of latents; None without values."""
    if not len(values):
        return None
    numbers, rng = np.asarray(values, np.float64), np.random.default_rng(seed)
    return interval(np.array([numbers[rng.integers(len(numbers), size=len(numbers))].mean() for _ in range(draws)]))


def interval(samples: Float[np.ndarray, " b"]) -> list[float]:
    """Return the lower and upper bound of the central `LEVEL` of samples."""
    tail = (1 - LEVEL) / 2
    return [float(bound) for bound in np.quantile(samples, (tail, 1 - tail))]


def _by_group(values: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the sums of values over each group, (m, g), and the number of examples in each, (g,)."""
    _, index = np.unique(group, return_inverse=True)
    sums = np.stack([np.bincount(index, weights=row.astype(np.float64)) for row in values])
    return sums, np.bincount(index)
