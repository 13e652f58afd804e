"""The order in which the rows of a store are read: chunks are shuffled, and the rows of many of them are mixed."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jsae.settings import require
from jsae.store.layout import MIXED


class StreamPosition(NamedTuple):
    """The next row of a stream."""

    epoch: int
    group: int
    """Number of the group in the epoch."""
    offset: int
    """Rows of the group that were taken."""


class Order:
    """Permutations of the chunks of a store, dealt to streams and divided into groups.

    In every epoch the chunks are permuted by (seed, epoch) and dealt to the streams in turn. Consecutive chunks of a
    stream form groups, of which the rows that count are permuted together. Every row is taken once per epoch.

    Args:
      chunks: chunks of the store.
      seed: of all permutations.
      streams: number of streams.
      mixed: least number of chunks that all streams mix together, if the store has so many.

    Raises:
      ConfigError: fewer chunks than streams.
    """

    def __init__(self, chunks: int, seed: int, streams: int = 1, mixed: int = MIXED):
        require(
            1 <= streams <= chunks,
            f"the store has {chunks} chunks, which cannot be dealt to {streams} streams: write one with smaller chunks "
            "(shard_rows), or use fewer",
        )
        self.chunks, self.seed, self.streams, self.mixed = chunks, seed, streams, mixed
        self._per_group = -(-mixed // streams)

    @property
    def largest_group(self) -> int:
        """Largest number of chunks in a group."""
        most = -(-self.chunks // self.streams)  # chunks of a stream
        fewest = self.chunks // self.streams
        return max(-(-count // max(count // self._per_group, 1)) for count in (most, fewest))

    def groups(self, stream: int, epoch: int) -> list[np.ndarray]:
        """Return the chunks of every group of an epoch of a stream, in the order in which they are read."""
        order = np.random.default_rng((self.seed, epoch)).permutation(self.chunks)[stream :: self.streams]
        return np.array_split(order, max(len(order) // self._per_group, 1))

    def rows(self, stream: int, position: StreamPosition, kept: np.ndarray) -> np.ndarray:
        """Return the order of the rows of a group: those that count, permuted.

        Args:
          stream: number of the stream.
          position: epoch and group.
          kept: which rows of the group's chunks count.
        """
        rng = np.random.default_rng((self.seed, position.epoch, stream, position.group, 1))
        return rng.permutation(np.flatnonzero(kept))
