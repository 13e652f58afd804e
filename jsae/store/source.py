"""A store as a source of activations for training: shuffled, endless, resumable, read ahead."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jsae.data import Block, Filling
from jsae.settings import require
from jsae.store.layout import MIXED, MIXED_ROWS
from jsae.store.order import Order, StreamPosition
from jsae.store.reading import Store
from jsae.store.stream import Stream, arrays_of, forms_of

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
      rows: how many of the store's first rows are read, whole chunks; None is all of them.

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
        rows: int | None = None,
    ):
        names = _chosen(store, hooks)
        self.widths = [store.hooks[hook] for hook in names]
        self.d_in = self.widths[0]
        self.tokens_seen = 0
        """Rows that were read since it was set to 0, with those that do not count."""
        self.waited = 0.0
        """Seconds for which filling waited for data."""
        chunks = -(-store.rows // store.layout.chunk_rows)
        if rows is not None:
            whole = 0 < rows <= store.rows and rows % store.layout.chunk_rows == 0
            require(whole, f"rows is {rows}: it must be whole chunks of {store.layout.chunk_rows} rows")
            chunks = rows // store.layout.chunk_rows
        order = Order(chunks, 0 if seed is None else seed, streams, _mixed_chunks(store, self.widths, memory))
        served = tuple(range(streams)) if serve is None else tuple(serve)
        valid = len(set(served)) == len(served) > 0 and all(0 <= number < streams for number in served)
        require(valid, f"serve is {list(served)}: it must be some of the streams 0 to {streams - 1}")
        self._store, self._order, self._hooks = store, order, names
        self._streams = [Stream(store, names, order, number) for number in served]

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
        names = [name for hook in self._hooks for name in arrays_of(self._store, hook)]
        blocks = {name: _aligned((rows, *shape), dtype) for name, shape, dtype in forms_of(self._store, names)}
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
        positions = {str(stream.number): list(stream.position) for stream in self._streams}
        return {**self._identity(), "positions": positions}

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
            point = position["positions"].get(str(stream.number))
            require(point is not None, f"the position has no stream {stream.number}")
            stream.seek(StreamPosition(*map(int, point)))

    @staticmethod
    def whole_position(positions: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the position of all processes together, from those of every process."""
        streams = [position["positions"] for position in positions]
        return {**positions[0], "positions": {number: row for part in streams for number, row in part.items()}}

    def _identity(self) -> dict[str, Any]:
        return {
            "store": self._store.manifest.digest,
            "hooks": list(self._hooks),
            "seed": self._order.seed,
            "streams": self._order.streams,
            "mixed": self._order.mixed,
            "chunks": self._order.chunks,
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

    @staticmethod
    def whole_position(positions: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the position of all processes together, from those of every process."""
        sites = zip(*(position["sites"] for position in positions), strict=True)
        return {"sites": [StoreSource.whole_position(site) for site in sites]}

    def seek(self, position: dict[str, Any]) -> None:
        """Continue from a position.

        Raises:
          ConfigError: it is of another store or other sites.
        """
        positions = position.get("sites")
        count = len(positions) if isinstance(positions, list) else 0
        require(count == len(self._sources), f"the position is of {count} sites, and there are {len(self._sources)}")
        for source, site_position in zip(self._sources, position["sites"], strict=True):
            source.seek(site_position)


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


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return an uninitialised array that begins at a multiple of 64 bytes, which jax uses on a CPU without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _on_device(blocks: dict[str, np.ndarray], hook: str) -> Array:
    """Return a hook's activations on the device."""
    acts, scale = blocks[f"acts/{hook}"], blocks.get(f"scale/{hook}")
    return jax.device_put(acts) if scale is None else _dequantised(jax.device_put(acts), jax.device_put(scale))


@jax.jit
def _dequantised(acts: Int[Array, "n d"], scale: Float[Array, " n"]) -> Float[Array, "n d"]:
    """Return int8 activations with a scale per row as bfloat16, on the device."""
    return (acts.astype(jnp.float32) * scale.astype(jnp.float32)[:, None]).astype(jnp.bfloat16)
