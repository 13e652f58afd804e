"""The quality of a shuffle: how alike neighbouring batches are, and how many documents a batch has."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int


class Quality(NamedTuple):
    """Statistics of batches; those of a perfect permutation are in brackets."""

    correlation: float
    """Correlation of the means of neighbouring batches (0): their mean scalar product, of the means' distances from the
    mean of all batches, divided by the mean squared distance. 1 if neighbours are the same."""
    variance: float
    """Mean squared distance of a batch's mean from the mean of all, times the batch's size, divided by the variance of
    the activations (1)."""
    documents: float
    """Mean number of documents in a batch."""


def quality(
    batches: Iterable[Int[np.ndarray, " n"]], acts: Float[np.ndarray, "rows d"], documents: Int[np.ndarray, " rows"]
) -> Quality:
    """Measure batches of rows of a store.

    Args:
      batches: numbers of rows, at least two batches of the same size.
      acts: activations of all rows, float32.
      documents: the numbers of their documents.

    Raises:
      ValueError: fewer than two batches.
    """
    means, distinct, size = [], [], 0
    for rows in batches:
        means.append(acts[rows].mean(0, dtype=np.float64))
        distinct.append(len(np.unique(documents[rows])))
        size = len(rows)
    if len(means) < 2:
        raise ValueError(f"{len(means)} batches: neighbours need at least two")
    centred = np.stack(means) - np.mean(means, axis=0)
    square = float(np.square(centred).sum(1).mean())
    product = float((centred[:-1] * centred[1:]).sum(1).mean())
    return Quality(
        product / square, size * square / float(acts.var(0, dtype=np.float64).sum()), float(np.mean(distinct))
    )
