"""The parts of the texts that a page shows: so many tokens around the examples of its records."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int, UInt16

from bridge.explorer.parts import Part

RADII = (128, 96, 64, 48, 32, 24, 16, 12, 8)
"""Tokens to show on either side of an example's strongest one; the first radius that fits is used."""
_CHUNK = 2**19  # tokens of a file of texts


@dataclass(frozen=True)
class Shown:
    """The cells (row * T + position) of the texts that the page shows: runs of them, from each start so many."""

    starts: Int[np.ndarray, " n"]
    lengths: Int[np.ndarray, " n"]
    row_length: int

    @classmethod
    def around_examples(cls, parts: Sequence[Part], shape: tuple[int, int], radius: int) -> "Shown":
        """Return all cells of texts of this shape, (rows, T), within a radius of an example, in its row."""
        edges = np.zeros(shape[0] * shape[1] + 1, np.int64)
        for part in parts:
            start, end = _windows(part, radius)
            edges += np.bincount(start, minlength=len(edges)) - np.bincount(end, minlength=len(edges))
        kept = np.diff((np.cumsum(edges) > 0).astype(np.int8), prepend=0)
        starts = np.flatnonzero(kept > 0)
        return cls(starts, np.flatnonzero(kept < 0) - starts, shape[1])

    @property
    def size(self) -> int:
        """The number of cells."""
        return int(self.lengths.sum())

    def cuts(self) -> list[int]:
        """Return the cells at which a new file of texts begins, each the first of a row."""
        cuts, size = [0], 0
        for start, length in zip(self.starts.tolist(), self.lengths.tolist(), strict=True):
            position = start
            while position < start + length:  # a run of cells may span many rows
                end = min(start + length, position - position % self.row_length + self.row_length)
                row = position - position % self.row_length
                if size + end - position > _CHUNK and row > cuts[-1]:
                    cuts.append(row)
                    size = 0
                size += end - position
                position = end
        return cuts

    def chunks(
        self, tokens: UInt16[np.ndarray, "rows T"]
    ) -> Iterator[tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"], UInt16[np.ndarray, " m"]]]:
        """Yield the content of every file of texts: starts and lengths of runs of cells, and their tokens in a row."""
        cuts = self.cuts()
        flat = tokens.reshape(-1)
        run_ends = self.starts + self.lengths
        for low, high in zip(cuts, [*cuts[1:], flat.size], strict=True):
            inside = (run_ends > low) & (self.starts < high)
            starts, stops = np.maximum(self.starts[inside], low), np.minimum(run_ends[inside], high)
            pieces = [flat[a:b] for a, b in zip(starts, stops, strict=True)]
            yield starts, stops - starts, np.concatenate(pieces) if pieces else flat[:0]


def radius_within(parts: Sequence[Part], shape: tuple[int, int], size: float) -> int:
    """Return the largest radius with which texts and activations take at most `size` bytes, else the smallest."""
    for radius in RADII:
        near = sum(int(np.count_nonzero(is_near(part, 0, part.store.header.d_sae, radius))) for part in parts)
        if 4 / 3 * (2 * Shown.around_examples(parts, shape, radius).size + 4 * near) <= size:
            return radius
    return RADII[-1]


def is_near(part: Part, first: int, last: int, radius: int) -> Bool[np.ndarray, " a"]:
    """Return which activations of the latents `first` to `last - 1` lie within a radius of their examples."""
    store = part.store
    low, high = int(store["example_offsets"][first]), int(store["example_offsets"][last])
    offsets = store["activation_offsets"][low : high + 1]
    centre = np.repeat(store["example_position"][low:high].astype(np.int64), np.diff(offsets))
    return np.abs(store["activation_position"][offsets[0] : offsets[-1]] - centre) <= radius


def _windows(part: Part, radius: int) -> tuple[Int[np.ndarray, " e"], Int[np.ndarray, " e"]]:
    """Return the first cell of each example's window, and the cell after its last."""
    store, length = part.store, part.store.texts.header.row_length
    row, position = part.first_row + store["example_row"].astype(np.int64), store["example_position"].astype(np.int64)
    return row * length + np.maximum(position - radius, 0), row * length + np.minimum(position + radius + 1, length)
