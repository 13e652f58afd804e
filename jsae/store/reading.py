"""Reading of a complete store: rows by number, statistics, and the check of all of it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jsae.manifest import DamagedError
from jsae.settings import require
from jsae.store import encoding
from jsae.store.backend import Array, Form, Place
from jsae.store.layout import Layout
from jsae.store.manifest import (
    COMPLETE,
    LARGEST,
    SHARDS,
    WRITING,
    Identity,
    IncompleteError,
    Manifest,
    Record,
    damaged,
    digest_of_records,
    from_bytes,
)
from jsae.store.statistics import Statistics


class Store:
    """A complete store of activations.

    Nothing is loaded on opening but the manifest. Every chunk that is read is checked against its checksum.

    Args:
      location: a path, `gs://bucket/path`, `s3://bucket/path` or `memory://name`.

    Raises:
      ConfigError: a location that cannot be one.
      FileNotFoundError: there is no store.
      IncompleteError: it is still being written, or was interrupted.
      DamagedError: its manifest is damaged, or of another version.
      OSError: it cannot be read.
    """

    def __init__(self, location: str | os.PathLike[str]):
        self._place = Place(location)
        self.location = str(self._place)
        """As it was given."""
        self.manifest = _manifest(self._place)
        """Hooks and sizes, origin of the activations, statistics, versions."""
        self._arrays: dict[str, Array] = {}

    def __repr__(self) -> str:
        hooks = ", ".join(f"{hook} ({width})" for hook, width in self.hooks.items())
        return f"Store({self.location!r}: {self.rows:,} rows of {hooks} as {self.layout.storage})"

    @property
    def layout(self) -> Layout:
        """Sizes of chunks, shards and rows of text, and the type of the activations."""
        return self.manifest.layout

    @property
    def hooks(self) -> Mapping[str, int]:
        """Hooks, with the width of their activations."""
        return self.layout.widths

    @property
    def rows(self) -> int:
        """Number of rows, with those that do not count."""
        return self.manifest.rows

    @property
    def row_len(self) -> int:
        """Tokens in a row of text; 1 where rows are independent."""
        return self.layout.row_len

    @property
    def dtype(self) -> np.dtype:
        """The type in which activations are read: float32 where that is stored, else bfloat16."""
        return np.dtype(np.float32 if self.layout.storage == "float32" else ml_dtypes.bfloat16)

    def read(self, hook: str, start: int, stop: int, dtype: Any = None) -> np.ndarray:
        """Return activations, (stop - start, d).

        Args:
          hook: name of the hook.
          start: number of the first row.
          stop: number of the row behind the last.
          dtype: the type to convert to; None is `dtype` of the store.

        Raises:
          ConfigError: there is no such hook, or there are no such rows.
          DamagedError: a shard is missing, too short or has changed; names it.
          OSError: it cannot be read.
        """
        self._check_hook(hook)
        stored = self._read(f"acts/{hook}", start, stop)
        scale = self._read(f"scale/{hook}", start, stop) if self.layout.storage == "int8" else None
        return encoding.decode(stored, scale, dtype)

    def kept(self, hook: str, start: int, stop: int) -> np.ndarray:
        """Return which rows count at a hook, (stop - start,) of booleans; arguments and errors are those of `read`."""
        self._check_hook(hook)
        return self._read(f"kept/{hook}", start, stop).astype(bool)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Return the ids of the rows' tokens, (stop - start,) int32.

        Raises:
          ConfigError: the store has none, or there are no such rows.
          OSError: they are damaged or cannot be read.
        """
        return self._column("tokens", start, stop)

    def text(self, start: int, stop: int) -> np.ndarray:
        """Return the numbers of the rows' documents, (stop - start,) int64; errors are those of `tokens`."""
        return self._column("text", start, stop)

    def position(self, start: int, stop: int) -> np.ndarray:
        """Return the rows' positions in their documents, (stop - start,) int32; errors are those of `tokens`."""
        return self._column("position", start, stop)

    def statistics(self, hook: str) -> Statistics:
        """Return mean, norms and quantiles of the rows that count at a hook."""
        self._check_hook(hook)
        return self.manifest.statistics[hook]

    def array(self, name: str) -> Array:
        """Return an array as it is stored, by its name in `layout.forms()`, such as `acts/HOOK`."""
        if name not in self._arrays:
            form = next(form for form in self.layout.forms() if form.name == name)
            self._arrays[name] = self._place.array(form, self.rows)
        return self._arrays[name]

    def verify(self, progress: Callable[[float], None] = lambda share: None) -> None:
        """Read all of the store and compare it with what was written.

        Args:
          progress: called with the share that was read, from 0 to 1.

        Raises:
          DamagedError: something is missing or has changed; names the first fault.
          OSError: something cannot be read.
        """
        count, records = self.layout.shards(self.rows), []
        for shard in range(count):
            record = self._record(shard)
            for number, form in enumerate(self.layout.forms()):
                self._check_digest(shard, record, form)
                progress((shard + (number + 1) / len(self.layout.forms())) / count)
            records.append(record)
        if digest_of_records(records) != self.manifest.records:
            raise DamagedError(f"{self.location}: the shards' records are not those of {COMPLETE}")
        for form in self.layout.forms():
            self._place.check_described(form, self.rows)

    def _record(self, shard: int) -> Record:
        key = Record.key(shard)
        data = self._place.read(key, LARGEST)
        if data is None:
            raise DamagedError(f"{self.location}: {key} is missing")
        try:
            return Record.from_bytes(data, shard, self.manifest.identity)
        except ValueError as error:
            raise damaged(self._place, key, error) from error

    def _check_digest(self, shard: int, record: Record, form: Form) -> None:
        digest = hashlib.sha256()
        start, stop = self.layout.bounds(shard, self.rows)
        for first in range(start, stop, form.chunk_rows):
            rows = self.array(form.name).read(first, min(first + form.chunk_rows, stop))
            digest.update(encoding.raw_bytes(rows))
        if digest.hexdigest() != record.digests[form.name]:
            raise DamagedError(f"{self.location}: shard {shard} of {form.name} is not what was written")

    def _column(self, name: str, start: int, stop: int) -> np.ndarray:
        columns = self.layout.columns
        require(name in columns, f"{self.location} was written without {name}: it has {', '.join(columns) or 'none'}")
        return self._read(name, start, stop)

    def _read(self, name: str, start: int, stop: int) -> np.ndarray:
        valid = 0 <= start <= stop <= self.rows
        require(valid, f"rows {start} to {stop} are not in {self.location}, which has {self.rows:,} rows")
        return self.array(name).read(start, stop)

    def _check_hook(self, hook: str) -> None:
        require(hook in self.hooks, f"{self.location} has no hook {hook!r:.80}: it has {', '.join(self.hooks)}")


def open(location: str | os.PathLike[str]) -> Store:
    """Open a store; arguments and errors are those of `Store`."""
    return Store(location)


def _manifest(place: Place) -> Manifest:
    """Return the manifest of a complete store; errors are those of `Store`."""
    folder = place.location.folder
    if folder is not None and folder.exists() and not folder.is_dir():
        raise FileNotFoundError(f"{place} is a file, not a store of activations")
    data = place.read(COMPLETE, LARGEST)
    if data is None:
        raise _absence(place)
    try:
        return Manifest.from_bytes(data)
    except ValueError as error:
        raise damaged(place, COMPLETE, error) from error


def _absence(place: Place) -> OSError:
    """Return the error of a location without a manifest."""
    data = place.read(WRITING, LARGEST)
    if data is None:
        return FileNotFoundError(f"there is no store of activations in {place}: it would hold {COMPLETE}")
    try:
        identity = Identity.from_json(from_bytes(data))
    except ValueError as error:
        return damaged(place, WRITING, error)
    count = len(place.keys(SHARDS))
    total = "" if identity.rows is None else f" of {identity.layout.shards(identity.rows):,}"
    return IncompleteError(
        f"{place} is still being written, or was interrupted: {count:,}{total} shards are complete. Wait, or continue "
        "it with --resume (resume=True)"
    )
