"""Activations that come in the order of the text and go out by latent: sorted in pieces on disk, memory bounded."""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Float32, Int64, Integer

_PIECE = 2**22  # activations that are sorted at once: 40 MB
_BLOCK = 2**24  # activations that are in memory at once when they go out: 130 MB, and again as much while sorted


class Block(NamedTuple):
    """All activations of the latents `first` to `first + len(offsets) - 1`, each latent's in the order of the text."""

    first: int
    offsets: Int64[np.ndarray, " latents_and_one"]
    """Those of latent `first + i` are `offsets[i]` to `offsets[i + 1]`."""
    cells: Integer[np.ndarray, " m"]
    values: Float32[np.ndarray, " m"]


class Spill:
    """Sorts activations by latent. Everything is in files of `folder`, ten bytes an activation with 16-bit latents.

    Args:
      folder: an empty one, to be removed by who made it.
      cells: how many cells the text has.
      d_sae: how many latents there are.
      piece: activations that are sorted at once.
    """

    def __init__(self, folder: Path, cells: int, d_sae: int, piece: int = _PIECE):
        self.d_sae, self._piece = d_sae, piece
        self._dtypes = {
            "codes": np.dtype(np.uint16 if d_sae <= 2**16 else np.uint32),  # latents in the order of the text
            "cells": np.dtype(np.uint32),  # these two by latent within each piece
            "values": np.dtype(np.float32),
        }
        self._paths = {name: folder / f"{name}.bin" for name in self._dtypes}
        self._files: dict[str, BinaryIO] = {name: path.open("wb") for name, path in self._paths.items()}
        self._lengths = np.zeros(cells, np.uint32)
        self.counted = np.zeros(cells, bool)
        """The cells that were looked at."""
        self._waiting: list[tuple[np.ndarray, ...]] = []
        self._pieces: list[np.ndarray] = []  # of every piece, where each latent begins in the files
        self._next_cell = self._size = 0

    def add(
        self,
        cells: Integer[np.ndarray, " n"],
        lengths: Integer[np.ndarray, " n"],
        latents: Integer[np.ndarray, " m"],
        values: Float32[np.ndarray, " m"],
    ) -> None:
        """Takes tokens and what fires on them.

        Args:
          cells: the tokens looked at, rising, and behind those of the call before.
          lengths: how many latents fire on each.
          latents: those of the first token, of the second and so on.
          values: how strongly; above 0.

        Raises:
          ValueError: cells out of order or out of the text, latents out of range, values not finite or not above 0.
        """
        if not len(cells):
            return
        if cells[0] < self._next_cell or cells[-1] >= len(self._lengths) or (np.diff(cells) <= 0).any():
            raise ValueError(f"cells must rise from {self._next_cell} and stay below {len(self._lengths)}")
        if len(latents) and (latents.min() < 0 or latents.max() >= self.d_sae):
            raise ValueError(f"latents must be from 0 to {self.d_sae - 1}, not {latents.min()} to {latents.max()}")
        if not (values > 0).all() or not np.isfinite(values.sum(dtype=np.float64)):
            raise ValueError("activations must be finite and above 0: this SAE gives others on this text")
        self._next_cell = int(cells[-1]) + 1
        self._lengths[cells] = lengths
        self.counted[cells] = True
        self._waiting.append(
            (latents.astype(self._dtypes["codes"]), np.repeat(cells.astype(np.uint32), lengths), values)
        )
        self._size += len(latents)
        if self._size >= self._piece:
            self._sort()

    def _sort(self) -> None:
        """Writes what is waiting as one sorted piece."""
        latents, cells, values = (np.concatenate(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting, self._size = [], 0
        order = np.argsort(latents, kind="stable")  # a radix sort, for 16 bits
        before = self._pieces[-1][-1] if self._pieces else 0
        counts = np.bincount(latents, minlength=self.d_sae)
        self._pieces.append(before + np.concatenate([[0], np.cumsum(counts)]))
        for name, column in (("codes", latents), ("cells", cells[order]), ("values", values[order])):
            self._files[name].write(column.data)

    def close(self) -> None:
        """Ends the coming in. To be called before what follows, and if the work is given up."""
        if self._waiting:
            self._sort()
        for file in self._files.values():
            file.close()

    @property
    def counts(self) -> Int64[np.ndarray, " f"]:
        """How often each latent fires."""
        return sum((np.diff(piece) for piece in self._pieces), np.zeros(self.d_sae, np.int64))

    def blocks(self, most: int = _BLOCK) -> Iterator[Block]:
        """All latents, in blocks of consecutive ones that have at most `most` activations (or are a single one)."""
        ends = np.concatenate([[0], np.cumsum(self.counts)])
        first = 0
        while first < self.d_sae:
            fitting = int(np.searchsorted(ends, ends[first] + most, side="right")) - 1
            last = max(fitting, first + 1)
            yield self._block(first, last, ends[first : last + 1] - ends[first])
            first = last

    def _block(self, first: int, last: int, offsets: np.ndarray) -> Block:
        """Latents `first` to `last - 1`, put together from all pieces."""
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
        """What fires on each cell: offsets, and latents, which are mapped, not read."""
        offsets = np.concatenate([[0], np.cumsum(self._lengths, dtype=np.int64)])
        if not offsets[-1]:
            return offsets, np.zeros(0, self._dtypes["codes"])
        return offsets, np.asarray(np.memmap(self._paths["codes"], self._dtypes["codes"], "r"))
