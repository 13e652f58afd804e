"""A store as a source of activations for training: shuffled, endless, resumable, read ahead."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jsae.data import Block, Filling
from jsae.settings import require
from jsae.store.backend import Pending
from jsae.store.layout import MIXED, MIXED_ROWS
from jsae.store.order import Order, Place
from jsae.store.reading import Store

MEMORY = 2**30
"""Default of the bytes for the two groups of a source."""
_ALIGNMENT = 64  # bytes
_PIECE = 4096  # rows that are copied in one step of filling a block


class StoreSource:
    """A `jsae.data.Source` of the rows of a store that count at all of its hooks.

    Each epoch reads every row once, in a new order (`jsae.store.order.Order`): chunks are shuffled, and the rows of a
    group of chunks are permuted together, whatever the size of a block. A group is in memory, with the next one, which
    threads of TensorStore read ahead. The more rows are mixed, the less alike neighbouring batches are.

    Several processes share a store by streams: the order has `streams` of them, and a process serves some. A block has
    the same number of rows of every stream it serves, one stream after the other, so the blocks of all processes are
    the same together however the streams are divided among them.

    Args:
      store: the store.
      hooks: the hooks that an SAE reads on the same rows: one; a transcoder's two; or the layers of a crosscoder. None
        is the only hook of the store.
      seed: of the order.
      memory: bytes for the two groups of activations of two bytes; int8 takes half, float32 twice of it. A group has at
        least 65,536 rows and 16 chunks, or all of a smaller store. The order depends on it.
      streams: number of streams, which share the memory; the same in all processes.
      serve: the numbers of the streams that this process serves; None is all.

    Raises:
      ConfigError: the store has no such hook, or has several and none was chosen; streams that cannot be.
    """

    def __init__(
        self,
        store: Store,
        hooks: str | Sequence[str] | None = None,
        *,
        seed: int | None = 0,
        memory: int = MEMORY,
        streams: int = 1,
        serve: Sequence[int] | None = None,
    ):
        names = _chosen(store, hooks)
        self.widths = [store.hooks[hook] for hook in names]
        self.d_in = self.widths[0]
        self.tokens_seen = 0
        """Rows that were read since it was set to 0, with those that do not count."""
        self.waited = 0.0
        """Seconds for which filling waited for data."""
        chunks = -(-store.rows // store.layout.chunk_rows)
        order = Order(chunks, 0 if seed is None else seed, streams, _mixed_chunks(store, self.widths, memory))
        served = tuple(range(streams)) if serve is None else tuple(serve)
        valid = len(set(served)) == len(served) > 0 and all(0 <= number < streams for number in served)
        require(valid, f"serve is {list(served)}: it must be some of the streams 0 to {streams - 1}")
        self._store, self._order, self._hooks = store, order, names
        self._streams = [_Stream(store, names, order, number) for number in served]

    def fill(self, rows: int) -> Filling:
        """Return the next `rows` activations: (rows, d), or for several hooks a tuple of these.

        Raises:
          ConfigError: `rows` cannot be divided among the streams that are served.
          ValueError: no row counts.
          DamagedError: the store is damaged.
          OSError: it cannot be read.
        """
        self._check_rows(rows)
        share, first = rows // len(self._streams), 0
        names = [name for hook in self._hooks for name in _arrays_of(self._store, hook)]
        blocks = {name: _aligned((rows, *shape), dtype) for name, shape, dtype in _forms(self._store, names)}
        for stream in self._streams:
            filled = 0
            while filled < share:
                taken = stream.take(min(share - filled, _PIECE), blocks, first + filled)
                filled += taken
                yield (first + filled) / rows
            first += share
        self._count()
        arrays = tuple(_on_device(blocks, hook) for hook in self._hooks)
        return arrays if len(arrays) > 1 else arrays[0]

    def row_numbers(self, rows: int) -> Int[np.ndarray, " rows"]:
        """Return the numbers of the store's rows that the next `fill` would read, and go on behind them.

        For measurements: only the columns that say which rows count are read.
        """
        self._check_rows(rows)
        share = rows // len(self._streams)
        return np.concatenate([stream.numbers(share) for stream in self._streams])

    def position(self) -> dict[str, Any]:
        """Return the position of the next block, of the streams that are served."""
        places = {str(stream.number): list(stream.place) for stream in self._streams}
        return {**self._identity(), "places": places}

    def seek(self, position: dict[str, Any]) -> None:
        """Continue from a position, which may be of more streams than are served.

        Raises:
          ConfigError: it is of another store, other hooks, another seed or number of streams.
        """
        for name, value in self._identity().items():
            require(
                position.get(name) == value,
                f"the position is of another stream of activations: {name} was {position.get(name)!r:.80}, and is "
                f"{value!r:.80}",
            )
        for stream in self._streams:
            place = position["places"].get(str(stream.number))
            require(place is not None, f"the position has no stream {stream.number}")
            stream.seek(Place(*map(int, place)))

    def _identity(self) -> dict[str, Any]:
        return {
            "store": self._store.manifest.digest,
            "hooks": list(self._hooks),
            "seed": self._order.seed,
            "streams": self._order.streams,
            "mixed": self._order.mixed,
        }

    def _check_rows(self, rows: int) -> None:
        count = len(self._streams)
        require(rows % count == 0, f"a block of {rows} rows cannot be divided among {count} streams")

    def _count(self) -> None:
        for stream in self._streams:
            self.tokens_seen += stream.rows_read
            self.waited += stream.waited
            stream.rows_read, stream.waited = 0, 0.0


class SiteSource:
    """A `jsae.data.Source` of several SAEs with hooks of their own: blocks are a tuple of arrays for every site.

    Every site has a stream of its own, which does not depend on the others: rows that do not count at one site are
    trained on at another.

    Args:
      store: the store.
      sites: of every SAE the hooks that it reads.
      options: further arguments of `StoreSource`; `memory` is that of every site.

    Raises:
      ConfigError: see `StoreSource`.
    """

    def __init__(self, store: Store, sites: Sequence[Sequence[str]], **options: Any):
        require(bool(sites) and all(sites), "every SAE needs at least one hook")
        self._sources = [StoreSource(store, site, **options) for site in sites]
        self.d_in = self._sources[0].d_in

    @property
    def tokens_seen(self) -> int:
        """Rows that the first site read since it was set to 0, with those that do not count."""
        return self._sources[0].tokens_seen

    @tokens_seen.setter
    def tokens_seen(self, value: int) -> None:
        self._sources[0].tokens_seen = value

    def fill(self, rows: int) -> Filling:
        """Return the next block: for every site a tuple of (rows, d); errors are those of `StoreSource.fill`."""
        blocks: list[Block] = []
        for number, source in enumerate(self._sources):
            filling = source.fill(rows)
            while True:
                try:
                    share = next(filling)
                except StopIteration as done:
                    blocks.append(done.value if isinstance(done.value, tuple) else (done.value,))
                    break
                yield (number + share) / len(self._sources)
        return tuple(blocks)

    def position(self) -> dict[str, Any]:
        """Return the positions of all sites."""
        return {"sites": [source.position() for source in self._sources]}

    def seek(self, position: dict[str, Any]) -> None:
        """Continue from a position.

        Raises:
          ConfigError: it is of another store or other sites.
        """
        positions = position.get("sites")
        count = len(positions) if isinstance(positions, list) else 0
        require(count == len(self._sources), f"the position is of {count} sites, and there are {len(self._sources)}")
        for source, place in zip(self._sources, position["sites"], strict=True):
            source.seek(place)


class _Stream:
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
        self.seek(Place(0, 0, 0))

    def seek(self, place: Place) -> None:
        """Continue from a place."""
        self.place = place
        self._group: _Group | None = None
        self._ahead: tuple[Place, _Group] | None = None
        self._unused: list[dict[str, np.ndarray]] = []  # memory of groups that were read; new pages take time
        self._epoch: tuple[int, list[np.ndarray]] | None = None
        self._empty = 0

    def take(self, most: int, blocks: dict[str, np.ndarray], first: int) -> int:
        """Copy the next rows, at most `most`, into blocks from row `first` on; return their number."""
        group = self._current(data=True)
        indices = group.order[self.place.offset : self.place.offset + most]
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
            indices = group.order[self.place.offset : self.place.offset + missing]
            parts.append(group.row_numbers[indices])
            missing -= len(indices)
            self._advance(len(indices))
        return np.concatenate(parts)

    def _advance(self, rows: int) -> None:
        self.place = self.place._replace(offset=self.place.offset + rows)

    def _current(self, data: bool) -> _Group:
        """Return the group of the next row; go on to the next group at the end of one."""
        while True:
            if self._group is None:
                self._group = self._open(data)
            if self.place.offset < len(self._group.order):
                self._empty = 0
                return self._group
            self._empty += not len(self._group.order)
            if self._empty > 2 * len(self._groups(self.place.epoch)):
                raise ValueError(
                    f"no row of {self._store.location} counts at {', '.join(self._hooks)}: all are excluded tokens or "
                    "of extreme norm"
                )
            if self._group.arrays:
                self._unused.append(self._group.memory)
            self.place, self._group = self._next(self.place), None

    def _open(self, data: bool) -> _Group:
        """Wait for the group of the current place, and begin to read the one behind it."""
        place = self.place._replace(offset=0)
        ahead, self._ahead = self._ahead, None
        group = ahead[1] if ahead is not None and ahead[0] == place else self._begin(place, data)
        behind = self._next(place)
        if data:
            self._ahead = (behind, self._begin(behind, data))
        started = time.perf_counter()
        group.wait()
        self.waited += time.perf_counter() - started
        group.order = self._order.rows(self.number, place, group.kept)
        self.rows_read += len(group.kept)
        return group

    def _begin(self, place: Place, data: bool) -> _Group:
        names = [name for hook in self._hooks for name in _arrays_of(self._store, hook)] if data else []
        memory = self._unused.pop() if data and self._unused else self._memory(names)
        return _Group(self._store, self._hooks, memory, self._groups(place.epoch)[place.group])

    def _memory(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Return arrays for the largest group."""
        rows = self._order.largest_group * self._store.layout.chunk_rows
        return {name: np.empty((rows, *shape), dtype) for name, shape, dtype in _forms(self._store, names)}

    def _groups(self, epoch: int) -> list[np.ndarray]:
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._order.groups(self.number, epoch))
        return self._epoch[1]

    def _next(self, place: Place) -> Place:
        last = place.group + 1 == len(self._groups(place.epoch))
        return Place(place.epoch + 1, 0, 0) if last else Place(place.epoch, place.group + 1, 0)


class _Group:
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


def _mixed_chunks(store: Store, widths: Sequence[int], memory: int) -> int:
    """Return the number of chunks whose rows are permuted together."""
    require(memory > 0, f"memory is {memory}: it must be positive")
    rows = max(memory // 2 // (2 * sum(widths)), MIXED_ROWS)
    return min(max(MIXED, rows // store.layout.chunk_rows), -(-store.rows // store.layout.chunk_rows))


def _chosen(store: Store, hooks: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the hooks of a source."""
    if hooks is None:
        require(
            len(store.hooks) == 1,
            f"{store.location} has the hooks {', '.join(store.hooks)}: choose, as in "
            f"jsae.store.StoreSource(store, {next(iter(store.hooks))!r})",
        )
        return tuple(store.hooks)
    names = (hooks,) if isinstance(hooks, str) else tuple(hooks)
    require(bool(names), "a source needs at least one hook")
    for hook in names:
        require(hook in store.hooks, f"{store.location} has no hook {hook!r:.80}: it has {', '.join(store.hooks)}")
    return names


def _arrays_of(store: Store, hook: str) -> list[str]:
    """Return the names of the arrays that hold a hook's activations."""
    return [f"acts/{hook}"] + ([f"scale/{hook}"] if store.layout.storage == "int8" else [])


def _forms(store: Store, names: Sequence[str]) -> Iterator[tuple[str, tuple[int, ...], np.dtype]]:
    """Yield name, shape of a row, and type of some arrays."""
    for form in store.layout.forms():
        if form.name in names:
            yield form.name, () if form.width is None else (form.width,), form.numpy_dtype


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return an uninitialised array that begins at a multiple of 64 bytes, which jax uses on a CPU without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _bits(array: np.ndarray) -> np.ndarray:
    """Return numbers of 16 bits as integers."""
    return array.view(np.uint16) if array.dtype.itemsize == 2 else array


def _on_device(blocks: dict[str, np.ndarray], hook: str) -> Array:
    """Return a hook's activations on the device."""
    acts, scale = blocks[f"acts/{hook}"], blocks.get(f"scale/{hook}")
    return jax.device_put(acts) if scale is None else _dequantised(jax.device_put(acts), jax.device_put(scale))


@jax.jit
def _dequantised(acts: Int[Array, "n d"], scale: Float[Array, " n"]) -> Float[Array, "n d"]:
    """Return int8 activations with a scale per row as bfloat16, on the device."""
    return (acts.astype(jnp.float32) * scale.astype(jnp.float32)[:, None]).astype(jnp.bfloat16)
