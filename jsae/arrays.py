"""Sources of activations from a user's own arrays: in memory, memory-mapped, or from an iterator."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from jsae.data import Block, Filling, Source
from jsae.settings import require
from jsae.store.reading import Store
from jsae.store.source import StoreSource

Activations = Any
"""Activations that `source_of` reads: an array (rows, width), a list of arrays of the same tokens, an iterator, an
iterable or a generator function of these, a `jsae.store.Store`, or a `jsae.data.Source`."""

PIECE = 256
"""Rows that stay together when an array is read in random order."""


@runtime_checkable
class Rows(Protocol):
    """Anything whose rows are read like an array's: of numpy, jax, h5py or zarr, or a memory map."""

    shape: tuple[int, ...]
    dtype: Any

    def __getitem__(self, rows: Any) -> Any:
        """Return some rows."""
        ...


class ArraySource:
    """A source that reads arrays of the same tokens repeatedly, (rows, width) each.

    A block is read piece by piece, so that a memory map may be larger than the memory.

    Args:
      arrays: one array; a transcoder's input and target; or the layers of a crosscoder.
      seed: of the order in which pieces of `PIECE` rows are read, a new one in each pass; None reads in order.

    Raises:
      ConfigError: no array, an array that is not two-dimensional, empty or not of floats, or unequal lengths.
    """

    def __init__(self, *arrays: Any, seed: int | None = None):
        require(len(arrays) >= 1, "training needs at least one array of activations")
        check(arrays)
        self._arrays, self._seed, self._row = arrays, seed, 0
        self._rows = int(arrays[0].shape[0])
        self._pass: tuple[int, np.ndarray, np.ndarray] | None = None
        self.widths = [int(array.shape[1]) for array in arrays]
        self.d_in = self.widths[0]

    def fill(self, rows: int) -> Filling:
        """Return the next `rows` activations."""
        host = [None if isinstance(a, jax.Array) else np.empty((rows, a.shape[1]), _dtype(a)) for a in self._arrays]
        taken, indices = 0, []
        while taken < rows:
            start, stop = self._next(rows - taken)
            for array, block in zip(self._arrays, host, strict=True):
                if block is not None:
                    with np.errstate(over="ignore"):  # overflow to infinity is reported where numbers are checked
                        block[taken : taken + stop - start] = array[start:stop]
            indices.append(np.arange(start, stop))
            taken += stop - start
            yield taken / rows
        index = np.concatenate(indices)
        return _block([a[index] if b is None else b for a, b in zip(self._arrays, host, strict=True)])

    def position(self) -> dict[str, Any]:
        """Return the number of rows that were read."""
        return {"row": self._row}

    def seek(self, position: dict[str, Any]) -> None:
        """Move to a position that `position` returned."""
        self._row = int(position["row"])

    def _next(self, max_rows: int) -> tuple[int, int]:
        """Advance to the end of a piece, by at most `max_rows`; return the first row and the one after the last."""
        number, row = divmod(self._row, self._rows)
        if self._pass is None or self._pass[0] != number:
            self._pass = (number, *self._order(number))
        _, starts, ends = self._pass
        piece = int(np.searchsorted(ends, row, side="right"))
        last = min(int(starts[piece]) + PIECE, self._rows)
        first = last - (int(ends[piece]) - row)
        stop = min(last, first + max_rows)
        self._row += stop - first
        return first, stop

    def _order(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the first row of each piece of a pass, and the number of rows read at its end."""
        starts = np.arange(0, self._rows, PIECE)
        if self._seed is not None:
            starts = np.random.default_rng((self._seed, number)).permutation(starts)
        return starts, np.cumsum(np.minimum(PIECE, self._rows - starts))


class StreamSource:
    """A source of arrays with any number of rows, from an iterator or an iterable.

    At the end of the arrays an iterable starts again. A run is resumed by reading up to its position, so its numbers
    are the same only if the arrays are.

    Args:
      chunks: an iterator, which is read once; or an iterable, such as a DataLoader, or a function that returns an
        iterator, such as a generator function. It yields arrays (rows, width), or tuples of arrays of the same tokens.
      total: number of rows to read; the last block is filled up with its first rows. None reads whole blocks.

    Raises:
      ConfigError: it yields nothing, or objects that are not arrays of activations.
    """

    def __init__(self, chunks: Iterable[Any] | Callable[[], Iterable[Any]], total: int | None = None):
        self._restart = chunks if callable(chunks) else (None if _is_iterator(chunks) else lambda: chunks)
        self._chunks: Iterator[Any] = iter(chunks() if callable(chunks) else chunks)
        self._taken, self._read, self._total = 0, 0, total
        self.widths: list[int] = []
        self._rest = self._next_chunk()
        self.d_in = self.widths[0]

    def fill(self, rows: int) -> Filling:
        """Return the next `rows` activations; after the total, the first ones of the block again.

        Raises:
          ConfigError: the arrays end before.
        """
        pieces: list[list[Any]] = [[] for _ in self.widths]
        taken, target = 0, rows if self._total is None else min(rows, max(self._total - self._taken, 1))
        while taken < target:
            for piece, array in zip(pieces, self._take(target - taken), strict=True):
                piece.append(array)
            taken += len(pieces[0][-1])
            yield taken / target
        return _block([_filled(_joined(piece), rows) for piece in pieces])

    def position(self) -> dict[str, Any]:
        """Return the number of rows that were read."""
        return {"row": self._taken}

    def seek(self, position: dict[str, Any]) -> None:
        """Move to a position that `position` returned, by reading up to it.

        Raises:
          ConfigError: an iterator would have to go back.
        """
        row = int(position["row"])
        if row < self._taken or self._restart is not None:
            require(
                self._restart is not None,
                "an iterator of arrays cannot start again, so this run cannot be resumed from it: give an array, a "
                "memory map, or a generator function",
            )
            self._chunks, self._rest, self._taken, self._read = iter(self._restart()), [], 0, 0
        while self._taken < row:
            self._take(row - self._taken)

    def _take(self, max_rows: int) -> list[Any]:
        """Return the next rows of every array, at most `max_rows`."""
        if not self._rest or len(self._rest[0]) == 0:
            self._rest = self._next_chunk()
        taken = [array[:max_rows] for array in self._rest]
        self._rest = [array[max_rows:] for array in self._rest]
        self._taken += len(taken[0])
        return taken

    def _next_chunk(self) -> list[Any]:
        chunk = next(self._chunks, None)
        if chunk is None and self._read and self._restart is not None:
            self._chunks, self._read = iter(self._restart()), 0
            chunk = next(self._chunks, None)
        require(
            chunk is not None,
            f"the activations ended after {self._taken:,} rows"
            + (f", and {self._total:,} are needed" if self._total else "")
            + ": give more, lower num_activations, or give an array or a generator function, which are read again",
        )
        arrays = list(chunk) if isinstance(chunk, tuple | list) else [chunk]
        check(arrays)
        widths = [int(array.shape[1]) for array in arrays]
        require(self.widths in ([], widths), f"the first activations have widths {self.widths}, later ones {widths}")
        self.widths, self._read = widths, self._read + 1
        return arrays


def source_of(acts: Activations, seed: int | None = None, total: int | None = None) -> Source:
    """Return a source that reads a user's activations.

    Args:
      acts: an array (rows, width) of numpy or jax, a memory map, or another object with rows (h5py, zarr); a list of
        these of the same tokens; an iterator, iterable or generator function of arrays; a store of one hook; or a
        source, which is returned.
      seed: of the order in which an array or a store is read; see `ArraySource`.
      total: number of rows to read from an iterator; see `StreamSource`.

    Raises:
      ConfigError: an object that cannot be read as activations.
    """
    if isinstance(acts, Source):
        return acts
    if isinstance(acts, Store):
        return StoreSource(acts, seed=seed)
    if isinstance(acts, list | tuple):
        require(len(acts) >= 1, "training needs at least one array of activations")
        return ArraySource(*acts, seed=seed)
    if isinstance(acts, Rows) or _is_torch(acts):
        return ArraySource(acts, seed=seed)
    require(
        (callable(acts) or isinstance(acts, Iterable)) and not isinstance(acts, str | bytes | dict),
        "activations are an array (rows, width), a memory map (np.load(path, mmap_mode='r')), a list of arrays, or an "
        f"iterator of arrays, not {type(acts).__name__}",
    )
    return StreamSource(acts, total)


def check(arrays: Sequence[Any]) -> None:
    """Check that arrays are activations of the same tokens.

    Raises:
      ConfigError: they are not; says what was given and what to do.
    """
    for array in arrays:
        require(
            not _is_torch(array),
            "torch tensors must be converted to jax first: jsae.train(bridge.to_jax(acts), …), or for several tensors "
            "or a DataLoader each one, (bridge.to_jax(x) for x in loader)",
        )
        require(isinstance(array, Rows), f"activations are arrays of numpy or jax, (rows, width), not {_kind(array)}")
        shape = tuple(array.shape)
        require(
            len(shape) == 2 and min(shape) >= 1,
            f"activations are two-dimensional and not empty, (rows, width), but this array has the shape {shape}"
            + (": give acts.reshape(-1, acts.shape[-1])" if len(shape) > 2 else ""),
        )
        require(jnp.issubdtype(array.dtype, jnp.floating), f"activations are floating-point numbers, not {array.dtype}")
    lengths = sorted({int(array.shape[0]) for array in arrays})
    require(len(lengths) == 1, f"arrays of the same tokens have the same number of rows, but these have {lengths}")


def _is_torch(array: Any) -> bool:
    """Return whether an object is a torch tensor, without importing torch."""
    return any(kind.__module__.split(".")[0] == "torch" and kind.__name__ == "Tensor" for kind in type(array).__mro__)


def _is_iterator(chunks: Any) -> bool:
    return isinstance(chunks, Iterator)


def _kind(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")


def _dtype(array: Any) -> np.dtype:
    """Return the type in which an array is copied to the device: its own up to 32 bits, in native byte order."""
    dtype = np.dtype(array.dtype)
    return np.dtype(np.float32) if dtype.itemsize > 4 else dtype.newbyteorder("=")


def _joined(pieces: list[Any]) -> Any:
    if all(isinstance(piece, jax.Array) for piece in pieces):
        return jnp.concatenate(pieces)
    with np.errstate(over="ignore"):
        return np.concatenate([np.asarray(piece).astype(_dtype(piece)) for piece in pieces])


def _filled(array: Any, rows: int) -> Any:
    """Return an array of `rows` rows, extended by repeating it from its first row."""
    missing = np.arange(rows) % len(array)
    return array if len(array) == rows else array[missing]


def _block(arrays: list[Any]) -> Block:
    """Return arrays on the device, in at most 32 bits: a single array, or a tuple of several."""
    on_device = tuple(jnp.asarray(array, None if array.dtype.itemsize <= 4 else jnp.float32) for array in arrays)
    return on_device if len(on_device) > 1 else on_device[0]
