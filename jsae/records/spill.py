"""External sort of activations from the order of the text to the order of latents, on disk, with bounded memory."""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Float32, Int64, Integer

_PIECE = 2**22  # activations that are sorted at a time: 40 MB
_BLOCK = 2**24  # activations that are read at a time: 130 MB, and as much again while they are sorted


class Block(NamedTuple):
    """All activations of consecutive latents from `first` on, by latent, each latent's in the order of the text."""

    first: int
    offsets: Int64[np.ndarray, " latents_and_one"]
    """The activations of latent `first + i` are `offsets[i]` to `offsets[i + 1]`."""
    cells: Integer[np.ndarray, " m"]
    values: Float32[np.ndarray, " m"]


class Spill:
    """A sorter of activations by latent, in temporary files of ten bytes per activation for up to 2**16 latents.

    Args:
      folder: an empty folder for the files; the caller removes it.
      cells: number of tokens in the text. A cell is the index of a token, row * row length + position.
      d_sae: number of latents.
      piece: activations that are sorted at a time.
    """

    def __init__(self, folder: Path, cells: int, d_sae: int, piece: int = _PIECE):
        self.d_sae, self._piece = d_sae, piece
        self._dtypes = {
            "codes": np.dtype(np.uint16 if d_sae <= 2**16 else np.uint32),  # latents in the order of the text
            "cells": np.dtype(np.uint32),  # cells and values are sorted by latent within each piece
            "values": np.dtype(np.float32),
        }
        self._paths = {name: folder / f"{name}.bin" for name in self._dtypes}
        self._files: dict[str, BinaryIO] = {name: path.open("wb") for name, path in self._paths.items()}
        self._lengths = np.zeros(cells, np.uint32)
        self.counted = np.zeros(cells, bool)
        """Mask of the cells that were added."""
        self._pending: list[tuple[np.ndarray, ...]] = []
        self._pieces: list[np.ndarray] = []  # for every piece, the offsets of the latents in the files
        self._next_cell = self._size = 0

    def add(
        self,
        cells: Integer[np.ndarray, " n"],
        lengths: Integer[np.ndarray, " n"],
        latents: Integer[np.ndarray, " m"],
        values: Float32[np.ndarray, " m"],
    ) -> None:
        """Add tokens and the latents that fire on them.

        Args:
          cells: the tokens, in ascending order, after those of the previous call.
          lengths: number of latents that fire on each token.
          latents: latents of the first token, then of the second, and so on.
          values: their activations, above 0.

        Raises:
          ValueError: cells are not ascending or outside the text, latents are out of range, or values are not finite
            and above 0.
        """
        if not len(cells):
            return
        if cells[0] < self._next_cell or cells[-1] >= len(self._lengths) or (np.diff(cells) <= 0).any():
            raise ValueError(f"cells must ascend from {self._next_cell} and be below {len(self._lengths)}")
        if len(latents) and (latents.min() < 0 or latents.max() >= self.d_sae):
            raise ValueError(f"latents must be from 0 to {self.d_sae - 1}, got {latents.min()} to {latents.max()}")
        if not (values > 0).all() or not np.isfinite(values.sum(dtype=np.float64)):
            raise ValueError("activations must be finite and above 0; this SAE returns others on this text")
        self._next_cell = int(cells[-1]) + 1
        self._lengths[cells] = lengths
        self.counted[cells] = True
        self._pending.append(
            (latents.astype(self._dtypes["codes"]), np.repeat(cells.astype(np.uint32), lengths), values)
        )
        self._size += len(latents)
        if self._size >= self._piece:
            self._sort()

    def _sort(self) -> None:
        """Write the pending activations as one sorted piece."""
        latents, cells, values = (np.concatenate(parts) for parts in zip(*self._pending, strict=True))
        self._pending, self._size = [], 0
        order = np.argsort(latents, kind="stable")  # a radix sort for 16 bits
        start = self._pieces[-1][-1] if self._pieces else 0
        counts = np.bincount(latents, minlength=self.d_sae)
        self._pieces.append(start + np.concatenate([[0], np.cumsum(counts)]))
        for name, column in (("codes", latents), ("cells", cells[order]), ("values", values[order])):
            self._files[name].write(column.data)

    def close(self) -> None:
        """Finish adding and close the files. Call it before the methods below, and after an error."""
        if self._pending:
            self._sort()
        for file in self._files.values():
            file.close()

    @property
    def counts(self) -> Int64[np.ndarray, " f"]:
        """Number of activations of each latent."""
        return sum((np.diff(piece) for piece in self._pieces), np.zeros(self.d_sae, np.int64))

    def blocks(self, limit: int = _BLOCK) -> Iterator[Block]:
        """Yield all latents in blocks of at most `limit` activations, or of a single latent."""
        offsets = np.concatenate([[0], np.cumsum(self.counts)])
        first = 0
        while first < self.d_sae:
            fitting = int(np.searchsorted(offsets, offsets[first] + limit, side="right")) - 1
            last = max(fitting, first + 1)
            yield self._block(first, last, offsets[first : last + 1] - offsets[first])
            first = last

    def _block(self, first: int, last: int, offsets: np.ndarray) -> Block:
        """Return the latents `first` to `last - 1`, merged from all pieces."""
        latents = np.concatenate(
            [np.zeros(0, self._dtypes["codes"])]
            + [
                np.repeat(np.arange(last - first), np.diff(piece[first : last + 1])).astype(self._dtypes["codes"])
                for piece in self._pieces
            ]
        )
        order = np.argsort(latents, kind="stable")
        cells, values = (self._read(name, first, last)[order] for name in ("cells", "values"))
        return Block(first, offsets, cells, values)

    def _read(self, name: str, first: int, last: int) -> np.ndarray:
        dtype = self._dtypes[name]
        parts = [np.zeros(0, dtype)]
        with self._paths[name].open("rb") as file:
            for piece in self._pieces:
                start, end = int(piece[first]), int(piece[last])
                file.seek(start * dtype.itemsize)
                parts.append(np.fromfile(file, dtype, end - start))
        return np.concatenate(parts)

    def codes(self) -> tuple[Int64[np.ndarray, " cells_and_one"], Integer[np.ndarray, " m"]]:
        """Return the latents that fire on each cell, as offsets by cell and memory-mapped latents."""
        offsets = np.concatenate([[0], np.cumsum(self._lengths, dtype=np.int64)])
        if not offsets[-1]:
            return offsets, np.zeros(0, self._dtypes["codes"])
        return offsets, np.asarray(np.memmap(self._paths["codes"], self._dtypes["codes"], "r"))
