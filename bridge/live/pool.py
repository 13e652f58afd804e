"""Rows of activations on their way to batches: what is left over waits for the next step of the training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float

Rows = Float[np.ndarray, "_ _"]


class Pool:
    """Rows of several hooks, of the same tokens, until there are enough for a batch.

    Args:
      batch_size: rows of a batch.
      widths: of the hooks.
    """

    def __init__(self, batch_size: int, widths: Sequence[int]):
        self._batch_size, self._widths = batch_size, tuple(widths)
        self.filled = 0
        """Rows that wait."""
        self._arrays = self._empty()

    @property
    def arrays(self) -> tuple[Rows, ...]:
        """The rows that wait, in arrays of a batch's size; zero behind them."""
        return tuple(np.concatenate([a[: self.filled], np.zeros_like(a[self.filled :])]) for a in self._arrays)

    def restore(self, arrays: Sequence[Rows], filled: int) -> None:
        """Set the rows that wait."""
        self._arrays, self.filled = tuple(np.array(a, np.float32) for a in arrays), filled

    def batches(self, parts: Sequence[Rows]) -> Iterator[tuple[Rows, ...]]:
        """Add rows, an array per hook; yield every batch that is full. Batches are new arrays, never written again."""
        start = 0
        while start < len(parts[0]):
            count = min(self._batch_size - self.filled, len(parts[0]) - start)
            for array, part in zip(self._arrays, parts, strict=True):
                array[self.filled : self.filled + count] = part[start : start + count]
            self.filled, start = self.filled + count, start + count
            if self.filled == self._batch_size:
                full, self._arrays, self.filled = self._arrays, self._empty(), 0
                yield full

    def _empty(self) -> tuple[Rows, ...]:
        return tuple(np.empty((self._batch_size, width), np.float32) for width in self._widths)
