"""A stream of a store's rows: the group that is read from, and the next one, which threads of TensorStore read."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np

from jsae.store.backend import Pending
from jsae.store.order import Order, StreamPosition
from jsae.store.reading import Store


class Stream:
    """One stream of an order: the group that is read from, and the next one, which is being read.

    Args:
      store: the store.
      hooks: the hooks on whose rows it is.
      order: the order.
      number: of the stream.
    """

    def __init__(self, store: Store, hooks: Sequence[str], order: Order, number: int):
        self._store, self._hooks, self._order, self.number = store, hooks, order, number
        self.rows_read, self.waited = 0, 0.0
        self.seek(StreamPosition(0, 0, 0))

    def seek(self, position: StreamPosition) -> None:
        """Continue from a position."""
        self.position = position
        self._group: Group | None = None
        self._ahead: tuple[StreamPosition, Group] | None = None
        self._unused: list[dict[str, np.ndarray]] = []  # memory of groups that were read; new pages take time
        self._epoch: tuple[int, list[np.ndarray]] | None = None
        self._empty = 0

    def take(self, most: int, blocks: dict[str, np.ndarray], first: int) -> int:
        """Copy the next rows, at most `most`, into blocks from row `first` on; return their number."""
        group = self._current(data=True)
        indices = group.order[self.position.offset : self.position.offset + most]
        for name, block in blocks.items():
            out = block[first : first + len(indices)]
            # numpy copies numbers of its own faster; with "clip" it needs no buffer.
            np.take(_bits(group.arrays[name]), indices, axis=0, out=_bits(out), mode="clip")
        self._advance(len(indices))
        return len(indices)

    def numbers(self, rows: int) -> np.ndarray:
        """Return the numbers of the next rows, and advance."""
        parts, missing = [], rows
        while missing:
            group = self._current(data=False)
            indices = group.order[self.position.offset : self.position.offset + missing]
            parts.append(group.row_numbers[indices])
            missing -= len(indices)
            self._advance(len(indices))
        return np.concatenate(parts)

    def _advance(self, rows: int) -> None:
        self.position = self.position._replace(offset=self.position.offset + rows)

    def _current(self, data: bool) -> Group:
        """Return the group of the next row; go on to the next group at the end of one."""
        while True:
            if self._group is None:
                self._group = self._open(data)
            if self.position.offset < len(self._group.order):
                self._empty = 0
                return self._group
            self._empty += not len(self._group.order)
            if self._empty > 2 * len(self._groups(self.position.epoch)):
                raise ValueError(
                    f"no row of {self._store.location} counts at {', '.join(self._hooks)}: all are excluded tokens or "
                    "of extreme norm"
                )
            if self._group.arrays:
                self._unused.append(self._group.memory)
            self.position, self._group = self._next(self.position), None

    def _open(self, data: bool) -> Group:
        """Wait for the group of the current position, and begin to read the one behind it."""
        position = self.position._replace(offset=0)
        ahead, self._ahead = self._ahead, None
        group = ahead[1] if ahead is not None and ahead[0] == position else self._begin(position, data)
        behind = self._next(position)
        if data:
            self._ahead = (behind, self._begin(behind, data))
        started = time.perf_counter()
        group.wait()
        self.waited += time.perf_counter() - started
        group.order = self._order.rows(self.number, position, group.kept)
        self.rows_read += len(group.kept)
        return group

    def _begin(self, position: StreamPosition, data: bool) -> Group:
        names = [name for hook in self._hooks for name in arrays_of(self._store, hook)] if data else []
        memory = self._unused.pop() if data and self._unused else self._memory(names)
        return Group(self._store, self._hooks, memory, self._groups(position.epoch)[position.group])

    def _memory(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Return arrays for the largest group."""
        rows = self._order.largest_group * self._store.layout.chunk_rows
        return {name: np.empty((rows, *shape), dtype) for name, shape, dtype in forms_of(self._store, names)}

    def _groups(self, epoch: int) -> list[np.ndarray]:
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._order.groups(self.number, epoch))
        return self._epoch[1]

    def _next(self, position: StreamPosition) -> StreamPosition:
        last = position.group + 1 == len(self._groups(position.epoch))
        return (
            StreamPosition(position.epoch + 1, 0, 0) if last else StreamPosition(position.epoch, position.group + 1, 0)
        )


class Group:
    """The rows of some chunks, which TensorStore reads in threads of its own.

    Args:
      store: the store.
      hooks: the hooks at which rows must count.
      memory: where arrays are read to, by their names, for at least as many rows.
      chunks: numbers of the chunks.
    """

    def __init__(self, store: Store, hooks: Sequence[str], memory: dict[str, np.ndarray], chunks: np.ndarray):
        size = store.layout.chunk_rows
        bounds = [(int(chunk) * size, min((int(chunk) + 1) * size, store.rows)) for chunk in chunks]
        self.row_numbers = np.concatenate([np.arange(*bound) for bound in bounds])
        self.order, self.kept = np.empty(0, np.int64), np.empty(0, bool)
        rows = len(self.row_numbers)
        self.memory, self.arrays = memory, {name: array[:rows] for name, array in memory.items()}
        self._masks = {f"kept/{hook}": np.empty(rows, np.uint8) for hook in hooks}
        self._reads: list[Pending] = []
        for name, out in (*self._masks.items(), *self.arrays.items()):
            first = 0
            for start, stop in bounds:
                read = store.array(name).begin_read(start, stop, out[first : first + stop - start])
                self._reads.append(read)
                first += stop - start

    def wait(self) -> None:
        """Wait until all is read."""
        for read in self._reads:
            read.result()
        self.kept = np.stack(list(self._masks.values())).min(axis=0).astype(bool)


def arrays_of(store: Store, hook: str) -> list[str]:
    """Return the names of the arrays that hold a hook's activations."""
    return [f"acts/{hook}"] + ([f"scale/{hook}"] if store.layout.storage == "int8" else [])


def forms_of(store: Store, names: Sequence[str]) -> Iterator[tuple[str, tuple[int, ...], np.dtype]]:
    """Yield name, shape of a row, and type of some arrays."""
    for form in store.layout.forms():
        if form.name in names:
            yield form.name, () if form.width is None else (form.width,), form.numpy_dtype


def _bits(array: np.ndarray) -> np.ndarray:
    """Return numbers of 16 bits as integers."""
    return array.view(np.uint16) if array.dtype.itemsize == 2 else array
