"""Writing a store from arrays of one's own: `Writer`, which takes batches, and `write`, which takes all of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any

import numpy as np

from jsae.progress import Progress
from jsae.settings import ConfigError, require
from jsae.store.layout import COLUMNS, Storage, suited
from jsae.store.manifest import Identity
from jsae.store.reading import Store
from jsae.store.shards import Buffer, ShardWriter, check_columns

HOOK = "acts"
"""Name of the hook of arrays that are given without a name."""

Batch = Any
"""Activations (n, d) of numpy or jax; or a dict of arrays of the same rows: of hooks by name, and of `tokens`, `text`,
`position` and `kept` (all optional)."""


class Writer:
    """Writes a store from batches of activations, in one process and in their order. A context manager.

    Every full shard is written as a whole. After an interruption `resume=True` continues: `rows` says how many rows are
    there, and the next batch must begin with that row.

        with jsae.store.Writer("acts", {"mlp": 768}, resume=True) as writer:
            for start in range(writer.rows, len(texts), 32):
                writer.append({"mlp": activations_of(texts[start : start + 32])})
        store = writer.store

    Without an exception the block ends with `finish`. Otherwise the rows of a shard that is not full are lost, and the
    store can be resumed.

    Args:
      location: a path, `gs://bucket/path`, `s3://bucket/path` or `memory://name`.
      widths: hooks by name, with the width of their activations.
      storage: "bfloat16", "int8" with a scale per row, or "float32".
      row_len: tokens in a row of text, which stay in one chunk; 1 where rows are independent.
      columns: columns that every batch has: any of "tokens", "text" (number of the document), "position" (in it).
      rows: rows of the store, if known; a small store gets smaller chunks.
      shard_rows: rows in a file; None is about 65,536.
      origin: where the activations are from, as JSON values; a store is resumed with the same ones only.
      resume: continue a store that was interrupted; a new one is begun if there is none.

    Raises:
      ConfigError: settings that cannot work, or a location that holds something else.
      OSError: the location cannot be read or written.
    """

    def __init__(
        self,
        location: str | os.PathLike[str],
        widths: Mapping[str, int],
        *,
        storage: Storage = "bfloat16",
        row_len: int = 1,
        columns: tuple[str, ...] = (),
        rows: int | None = None,
        shard_rows: int | None = None,
        origin: Mapping[str, Any] | None = None,
        resume: bool = False,
    ):
        columns = tuple(name for name in COLUMNS if name in columns) + tuple(n for n in columns if n not in COLUMNS)
        layout = suited(widths, storage, row_len=row_len, rows=rows, columns=columns, shard_rows=shard_rows)
        self._location = location
        self._shards = ShardWriter(location, Identity(layout, rows, origin or {}), resume=resume)
        self._layout = layout
        self.store: Store | None = None
        """The store, after `finish`."""
        self.rows = 0
        """Rows that were appended, and at first those that are complete."""
        self._shard = 0
        while self._shards.complete is None and (record := self._shards.record(self._shard)) is not None:
            self.rows, self._shard = self.rows + record.rows, self._shard + 1
        if self._shards.complete is not None:
            self.rows = self._shards.complete.rows
        self._buffer: Buffer | None = None

    @property
    def is_complete(self) -> bool:
        """True if the store was complete before, so that nothing is appended."""
        return self._shards.complete is not None

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()
        else:
            self._shards.wait()

    def append(
        self,
        acts: Mapping[str, Any],
        *,
        tokens: Any = None,
        text: Any = None,
        position: Any = None,
        kept: Any = None,
    ) -> None:
        """Append rows.

        Args:
          acts: activations of every hook, (n, d) of floating-point numbers, of numpy or jax.
          tokens: ids, (n,).
          text: numbers of documents, (n,).
          position: positions in the documents, (n,).
          kept: which rows count, (n,) of booleans; or a dict of these by hook; None if all do. The others are stored,
            and are not in statistics and training.

        Raises:
          ConfigError: arrays of another shape, or other columns than at first.
          ActivationsError: numbers that are not finite.
          OSError: a shard cannot be written, for example because the disk is full.
        """
        require(not self.is_complete, f"{self._shards.place} is complete: nothing can be appended")
        arrays = {hook: _floats(acts[hook], hook) for hook in acts}
        shapes = {hook: array.shape[1] for hook, array in arrays.items()}
        require(
            shapes == dict(self._layout.widths), f"hooks and widths are {shapes}, and at first were {_widths(self)}"
        )
        counts = {len(array) for array in arrays.values()}
        require(len(counts) == 1, f"the hooks have different numbers of rows: {sorted(counts)}")
        n = counts.pop()
        columns = check_columns(self._layout.columns, {"tokens": tokens, "text": text, "position": position}, n)
        masks = _masks(kept, self._layout.widths, n)
        start = 0
        while start < n:
            if self._buffer is None:
                self._buffer = Buffer(self._layout, self.rows, self._layout.shard_rows)
            stop = min(n, start + self._buffer.missing)
            self._buffer.add(
                {hook: array[start:stop] for hook, array in arrays.items()},
                {hook: mask[start:stop] for hook, mask in masks.items()},
                {name: column[start:stop] for name, column in columns.items()},
            )
            self.rows += stop - start
            start = stop
            if not self._buffer.missing:
                self._flush()

    def finish(self) -> Store:
        """Write the rows that are left and the manifest; return the store.

        Raises:
          ConfigError: nothing was appended, or the rows are not whole rows of text or not those announced.
          OSError: something cannot be written.
        """
        if not self.is_complete:
            announced = self._shards.identity.rows
            require(
                announced is None or announced == self.rows,
                f"{self.rows:,} rows were appended, and {announced or 0:,} were announced",
            )
            require(
                self.rows % self._layout.row_len == 0,
                f"{self.rows:,} rows were appended, which are not whole rows of text of {self._layout.row_len} tokens",
            )
            if self._buffer is not None:
                self._buffer.cut()
                self._flush()
            self._shards.finish(self.rows)
        if self.store is None:
            self.store = Store(self._location)
        return self.store

    def _flush(self) -> None:
        buffer, self._buffer = self._buffer, None
        self._shards.begin(self._shard, buffer, {"row": self.rows})
        self._shard += 1


def write(
    location: str | os.PathLike[str],
    batches: Batch | Iterable[Batch] | Callable[[int], Iterable[Batch]],
    *,
    storage: Storage = "bfloat16",
    row_len: int = 1,
    rows: int | None = None,
    shard_rows: int | None = None,
    origin: Mapping[str, Any] | None = None,
    resume: bool = False,
    progress: bool = False,
) -> Store:
    """Write activations to a store; return it.

    Args:
      location: a path, `gs://bucket/path`, `s3://bucket/path` or `memory://name`.
      batches: one batch, such as an array or a memory map (rows, d); an iterable of batches; or a function of the first
        row that is needed, which returns an iterator of batches from there. A resumed store calls the function with the
        number of rows that are complete, skips so many of an array without reading them, and reads and drops them from
        an iterable.
      storage: "bfloat16", "int8" with a scale per row, or "float32".
      row_len: tokens in a row of text; 1 where rows are independent.
      rows: rows of the store, if known.
      shard_rows: rows in a file; None is about 65,536.
      origin: where the activations are from, as JSON values.
      resume: continue a store that was interrupted, or begin one.
      progress: whether to show progress on stderr.

    Raises:
      ConfigError: batches that are not activations, or a location that holds something else.
      ActivationsError: numbers that are not finite.
      OSError: the location cannot be read or written.
    """
    if _is_batch(batches):
        whole = _parts(batches)
        rows = len(next(iter(whole.values())))
        batches = lambda first: _slices(whole, first)  # noqa: E731
    first, stream = _begun(batches)
    columns = tuple(name for name in COLUMNS if name in first)
    widths = {hook: np.shape(array)[-1] for hook, array in _hooks(first).items() if np.ndim(array) == 2}
    require(len(widths) == len(_hooks(first)) > 0, "a batch holds arrays (rows, width) of at least one hook")
    options: dict[str, Any] = {"storage": storage, "row_len": row_len, "rows": rows, "shard_rows": shard_rows}
    writer = Writer(location, widths, columns=columns, origin=origin, resume=resume, **options)
    if writer.is_complete:
        return writer.finish()
    with Progress("writing", rows, "rows", writer.rows) if progress else _Silent() as shown, writer:
        for parts in _from(stream, batches, writer.rows):
            beside = {name: parts[name] for name in (*COLUMNS, "kept") if name in parts}
            writer.append(_hooks(parts), **beside)
            shown.update(writer.rows)
    return writer.store


class _Silent:
    """A progress that shows nothing."""

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def update(self, done: int) -> None:
        """Do nothing."""


_PIECE = 16_384  # rows of one large batch that are read at once


def _begun(batches: Any) -> tuple[dict[str, Any], Iterator[dict[str, Any]]]:
    """Return the first batch, and an iterator of all."""
    require(
        callable(batches) or isinstance(batches, Iterable),
        "activations are an array (rows, width), a dict of arrays, an iterable of these, or a function of the first "
        f"row that returns one, not {type(batches).__name__}",
    )
    stream = map(_parts, batches(0) if callable(batches) else batches)
    first = next(stream, None)
    require(first is not None, "there are no activations to write")

    def whole() -> Iterator[dict[str, Any]]:
        yield first
        yield from stream

    return first, whole()


def _from(stream: Iterator[dict[str, Any]], batches: Any, row: int) -> Iterator[dict[str, Any]]:
    """Yield batches from a row on."""
    if callable(batches):
        yield from stream if row == 0 else map(_parts, batches(row))
        return
    for parts in stream:
        n = len(next(iter(parts.values())))
        if row < n:
            yield _cut(parts, row, n)
        row = max(row - n, 0)


def _slices(whole: Mapping[str, Any], first: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of one large batch, piece by piece."""
    rows = len(next(iter(whole.values())))
    for start in range(first, rows, _PIECE):
        yield _cut(whole, start, min(start + _PIECE, rows))


def _cut(parts: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    return {
        name: _cut(part, start, stop) if isinstance(part, Mapping) else part[start:stop] for name, part in parts.items()
    }


def _is_batch(batches: Any) -> bool:
    return isinstance(batches, Mapping) or (hasattr(batches, "shape") and hasattr(batches, "dtype"))


def _parts(batch: Any) -> dict[str, Any]:
    """Return a batch as a dict of arrays."""
    require(_is_batch(batch), f"a batch is an array (rows, width) or a dict of arrays, not {type(batch).__name__}")
    return dict(batch) if isinstance(batch, Mapping) else {HOOK: batch}


def _hooks(parts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: array for name, array in parts.items() if name not in (*COLUMNS, "kept")}


def _floats(array: Any, hook: str) -> np.ndarray:
    """Return activations as an array of numpy.

    Raises:
      ConfigError: it is a torch tensor, or not a matrix of floating-point numbers.
    """
    if any(kind.__module__.split(".")[0] == "torch" for kind in type(array).__mro__):
        raise ConfigError(
            f"{hook} is a torch tensor: convert it, np.asarray(bridge.to_jax(acts)) or acts.float().numpy()"
        )
    values = np.asarray(array)
    is_float = values.dtype.kind == "f" or values.dtype.name == "bfloat16"
    require(
        values.ndim == 2 and values.shape[1] > 0 and is_float,
        f"{hook} must be floating-point numbers (rows, width), not {values.dtype} of shape {values.shape}",
    )
    return values


def _masks(kept: Any, hooks: Iterable[str], rows: int) -> dict[str, np.ndarray]:
    """Return which rows count, by hook."""
    by_hook = kept if isinstance(kept, Mapping) else dict.fromkeys(hooks, kept)
    require(set(by_hook) == set(hooks), "kept must have a mask for every hook")
    masks = {hook: np.ones(rows, bool) if mask is None else np.asarray(mask) for hook, mask in by_hook.items()}
    for mask in masks.values():
        require(mask.shape == (rows,) and mask.dtype == bool, f"kept must be {rows} booleans, not {mask.dtype}")
    return masks


def _widths(writer: Writer) -> dict[str, int]:
    return dict(writer._layout.widths)
