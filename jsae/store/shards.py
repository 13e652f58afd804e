"""Writing of shards: each completely or not at all, in any order, by several processes, and after any interruption."""

from __future__ import annotations

import collections
import concurrent.futures
import hashlib
import os
import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jsae.manifest import DamagedError
from jsae.settings import ConfigError, require
from jsae.store import encoding
from jsae.store.backend import Pending, Place
from jsae.store.layout import COLUMNS, Layout
from jsae.store.manifest import (
    COMPLETE,
    LARGEST,
    SHARDS,
    WRITING,
    Identity,
    Manifest,
    Record,
    damaged,
    from_bytes,
    to_bytes,
)
from jsae.store.statistics import Sums

_THREADS = min(4, os.cpu_count() or 1)
_JOIN_SECONDS = 120.0
"""Time for which a process waits for the first one to begin a store."""


class Buffer:
    """The rows of a shard, as they are stored, while they are collected.

    Args:
      layout: the arrays.
      first_row: number of the shard's first row, for errors.
      rows: rows of the shard.
    """

    def __init__(self, layout: Layout, first_row: int, rows: int):
        self.layout, self.first_row, self.rows, self.filled = layout, first_row, rows, 0
        self.arrays = {form.name: form.empty(rows) for form in layout.forms()}

    @property
    def missing(self) -> int:
        """Rows that are still to be added."""
        return self.rows - self.filled

    def add(
        self,
        acts: Mapping[str, np.ndarray],
        kept: Mapping[str, np.ndarray] | None = None,
        columns: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Add the next rows.

        Args:
          acts: activations of every hook, (n, d) each, at most as many rows as are missing.
          kept: of every hook which rows count, (n,); None if all do.
          columns: the columns of the layout, (n,) each.

        Raises:
          ActivationsError: activations that are not finite.
          ConfigError: int8 and activations beyond its range.
        """
        start, n = self.filled, len(next(iter(acts.values())))
        stop = start + n
        for hook in self.layout.widths:
            encoded = encoding.encode(acts[hook], self.layout.storage, hook, self.first_row + start)
            for part, rows in encoded.items():
                self.arrays[f"{part}/{hook}"][start:stop] = rows
            self.arrays[f"kept/{hook}"][start:stop] = 1 if kept is None else kept[hook]
        for name in self.layout.columns:
            self.arrays[name][start:stop] = (columns or {})[name]
        self.filled = stop

    def acts(self, hook: str, start: int, stop: int) -> np.ndarray:
        """Return rows of a hook as float32."""
        scale = self.arrays.get(f"scale/{hook}")
        part = self.arrays[f"acts/{hook}"][start:stop]
        return encoding.decode(part, None if scale is None else scale[start:stop], np.float32)

    def cut(self) -> None:
        """Remove the rows that were not added."""
        self.arrays = {name: np.ascontiguousarray(array[: self.filled]) for name, array in self.arrays.items()}
        self.rows = self.filled


class ShardWriter:
    """Writes the shards of a store and, when all are there, its manifest.

    A shard is complete when its record is: the record is written after the shard's arrays are durable. Threads, at most
    four, write shards while the next one is filled, so that up to five are in memory. Any number of processes may write
    different shards.

    Args:
      location: a path or an address, see `jsae.store.backend.locate`.
      identity: what is written.
      resume: continue a store that was interrupted; a complete one is left as it is.
      join: write beside a process that begins the store: wait for it, for at most two minutes.

    Raises:
      ConfigError: the location holds something else, another store, or the same one without `resume`.
      OSError: it cannot be read or written.
    """

    def __init__(
        self, location: str | os.PathLike[str], identity: Identity, *, resume: bool = False, join: bool = False
    ):
        self.place, self.identity, self.layout = Place(location), identity, identity.layout
        self.complete: Manifest | None = None
        """The manifest of a store that is complete already."""
        self._threads = concurrent.futures.ThreadPoolExecutor(_THREADS, thread_name_prefix="store")
        self._pending: collections.deque[tuple[int, concurrent.futures.Future[None]]] = collections.deque()
        if join:
            self._wait_for_first()
        self._begin(resume or join)
        names = set(self.place.keys(SHARDS))
        self.written = {shard for shard in map(_shard_number, names) if shard is not None}
        """Numbers of the shards that were complete when the writer was opened."""

    def record(self, shard: int) -> Record | None:
        """Return the record of a shard; None if the shard is not complete or its record is damaged."""
        data = self.place.read(Record.key(shard), LARGEST) if shard in self.written else None
        try:
            return None if data is None else Record.from_bytes(data, shard, self.identity)
        except ValueError:
            return None

    def begin(self, shard: int, buffer: Buffer, position: Any = None) -> None:
        """Begin to write a shard; wait for an earlier one where all threads are busy.

        Args:
          shard: its number.
          buffer: all of its rows; must not be changed afterwards.
          position: where the input continues behind it, as JSON values.

        Raises:
          OSError: an earlier shard cannot be written, for example because the disk is full.
        """
        while len(self._pending) >= _THREADS:
            self._wait_for_oldest()
        self._pending.append((shard, self._threads.submit(self._write, shard, buffer, position)))

    def wait(self) -> None:
        """Wait until all shards are complete.

        Raises:
          OSError: one cannot be written; the others are, and the store can be resumed.
        """
        errors = []
        while self._pending:
            try:
                self._wait_for_oldest()
            except OSError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _wait_for_oldest(self) -> None:
        shard, writing = self._pending.popleft()
        try:
            writing.result()
        except OSError as error:
            raise _resumable(error, self.place, shard) from error
        self.written.add(shard)

    def _write(self, shard: int, buffer: Buffer, position: Any) -> None:
        """Write a shard's arrays and, when all are durable, its record."""
        start = shard * self.layout.shard_rows
        writes: list[Pending] = []
        for form in self.layout.forms():
            array = self.place.array(form, start + buffer.rows)
            if buffer.rows < self.layout.shard_rows:
                self.place.remove(form.key(shard))  # TensorStore would read it, for what is behind the last row
            writes.append(array.begin_write(start, start + buffer.rows, buffer.arrays[form.name]))
        record = self._record(shard, buffer, position)
        errors = []
        for write in writes:  # all of them, so that none goes on behind an error
            try:
                write.result()
            except OSError as error:
                errors.append(error)
        if errors:
            raise errors[0]
        self.place.write(Record.key(shard), record.to_bytes())

    def finish(self, rows: int | None = None) -> Manifest | None:
        """Write the manifest if all shards are complete; return it, or None if other processes are still writing.

        Args:
          rows: rows of the store, if the identity does not say.

        Raises:
          DamagedError: a record is damaged.
          OSError: something cannot be written.
        """
        self.wait()
        total = self.identity.rows if self.identity.rows is not None else rows
        require(total is not None and total > 0, f"nothing was written to {self.place}: a store has at least one row")
        keys = [Record.key(shard) for shard in range(self.layout.shards(total))]
        if set(keys) - set(self.place.keys(SHARDS)):
            return None
        manifest = Manifest.from_records(self.identity, self._records(keys))
        if manifest.rows != total:
            raise DamagedError(f"{self.place}: the records are of {manifest.rows:,} rows, and {total:,} were written")
        for form in self.layout.forms():
            self.place.describe(form, total)
        self.place.write(COMPLETE, manifest.to_bytes())
        self.place.remove(WRITING)
        self.complete = manifest
        return manifest

    def _records(self, keys: list[str]) -> Iterable[Record]:
        for shard, (key, data) in enumerate(zip(keys, self.place.read_all(keys, LARGEST), strict=True)):
            try:
                yield Record.from_bytes(data or b"", shard, self.identity)
            except ValueError as error:
                raise damaged(self.place, key, error) from error

    def _record(self, shard: int, buffer: Buffer, position: Any) -> Record:
        digests = {name: hashlib.sha256(encoding.raw_bytes(array)).hexdigest() for name, array in buffer.arrays.items()}
        sums = {}
        for hook, width in self.layout.widths.items():
            kept = buffer.arrays[f"kept/{hook}"]
            sums[hook] = Sums.of_shard(lambda a, b, hook=hook: buffer.acts(hook, a, b), kept, width, shard)
        return Record(shard, buffer.rows, self.identity.digest, digests, sums, position)

    def _begin(self, resume: bool) -> None:
        """Mark the location as a store that is being written, or check that it is this one."""
        complete, writing = (self.place.read(key, LARGEST) for key in (COMPLETE, WRITING))
        if complete is not None:
            self._check_same(complete, COMPLETE)
            require(resume, f"{self.place} already holds this store, complete: read it, or choose another location")
            self.complete = Manifest.from_bytes(complete)
            self.place.remove(WRITING)
        elif writing is not None:
            self._check_same(writing, WRITING)
            require(
                resume,
                f"{self.place} already holds this store, unfinished: continue it with --resume (resume=True), or "
                "choose another location",
            )
        else:
            require(self.place.is_empty(), f"{self.place} already holds something else: choose another location")
            self.place.write(WRITING, to_bytes(self.identity.to_json()))

    def _check_same(self, data: bytes, key: str) -> None:
        try:
            before = Identity.from_json(from_bytes(data))
        except ValueError as error:
            raise damaged(self.place, key, error) from error
        differences = before.differences(self.identity)
        if differences:
            raise ConfigError(
                f"{self.place} holds another store, with {differences}: continue it with its own settings, or choose "
                "another location"
            )

    def _wait_for_first(self) -> None:
        until = time.monotonic() + _JOIN_SECONDS
        while all(self.place.read(key, LARGEST) is None for key in (WRITING, COMPLETE)):
            require(time.monotonic() < until, f"no other process has begun the store {self.place}: start process 0")
            time.sleep(0.1)


def check_columns(layout_columns: Iterable[str], columns: Mapping[str, Any], rows: int) -> dict[str, np.ndarray]:
    """Return columns in their types.

    Raises:
      ConfigError: a column is missing or not asked for, has another length, or holds no integers of its type.
    """
    expected = tuple(layout_columns)
    given = tuple(name for name in COLUMNS if columns.get(name) is not None)
    require(given == expected, f"every batch has the same columns: {_list(expected)} at first, now {_list(given)}")
    checked = {}
    for name in expected:
        array = np.asarray(columns[name])
        dtype = np.dtype(COLUMNS[name])
        require(
            array.shape == (rows,) and array.dtype.kind in "iu",
            f"{name} must be {rows} whole numbers, not {array.dtype} of shape {array.shape}",
        )
        info = np.iinfo(dtype)
        fits = rows == 0 or (int(array.min()) >= info.min and int(array.max()) <= info.max)
        require(fits, f"{name} holds numbers that {dtype} cannot hold")
        checked[name] = array.astype(dtype)
    return checked


def _list(names: tuple[str, ...]) -> str:
    return ", ".join(names) or "none"


def _shard_number(key: str) -> int | None:
    digits = key.removeprefix(f"{SHARDS}/").removesuffix(".json")
    return int(digits) if digits.isascii() and digits.isdecimal() and len(digits) < 15 else None


def _resumable(error: OSError, place: Place, shard: int) -> OSError:
    """Return an error of writing that says which shard is not complete and what to do."""
    text = (
        f"{place}: shard {shard} cannot be written: {error.strerror or error}. Complete shards are kept: make room, "
        "then continue with --resume (resume=True)"
    )
    return OSError(text) if error.errno is None else OSError(error.errno, text)
