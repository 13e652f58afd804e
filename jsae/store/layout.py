"""Names, types, chunks and shards of the arrays of a store."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from jsae.settings import require
from jsae.store.backend import Form

Storage = Literal["bfloat16", "int8", "float32"]
"""Types in which activations are stored: `int8` has a scale per row."""

COLUMNS: Mapping[str, str] = {"tokens": "int32", "text": "int64", "position": "int32"}
"""Columns beside the activations, by row, with their types."""

MIXED, MIXED_ROWS = 16, 65_536
"""Least numbers of chunks and of rows that are shuffled together."""
CHUNK_ROWS = 1024
"""Rows in a chunk, the unit that is read, of a store that has enough of them. Neighbouring rows are of one text: small
chunks mix more texts in the same memory, and at usual widths 1,024 rows are enough for the speed of a disk."""
_SHARD_CHUNKS = 64  # 65,536 rows in a file
_LEAST_CHUNKS = 4 * MIXED  # of a small store, where its rows of text allow it
MOST_ROWS = 2**48
_MOST_HOOKS = 1024
_LARGEST_CHUNK = 2**31  # bytes
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", re.ASCII)


@dataclass(frozen=True)
class Layout:
    """The arrays of a store. A row of each is one token; rows of text, `row_len` tokens each, are in order.

    Raises:
      ConfigError: names or sizes that no store can have.
    """

    widths: Mapping[str, int]
    """Hooks, with the width of their activations."""
    storage: Storage
    row_len: int
    """Tokens in a row of text; 1 where rows are independent."""
    chunk_rows: int
    """Rows that are read at once."""
    shard_rows: int
    """Rows in a file."""
    columns: tuple[str, ...]
    """Those of `COLUMNS` that the store has."""

    def __post_init__(self) -> None:
        _check(**{name: getattr(self, name) for name in self.__dataclass_fields__})
        largest = max(form.row_bytes for form in self.forms()) * self.chunk_rows
        require(largest <= _LARGEST_CHUNK, f"a chunk of {self.chunk_rows} rows has {largest:,} bytes: at most 2 GiB")

    @classmethod
    def from_json(cls, values: Any) -> Layout:
        """Return a layout from JSON values of anyone.

        Raises:
          ConfigError: they are not one.
        """
        require(isinstance(values, dict), "it has no layout")
        require(set(values) == set(cls.__dataclass_fields__), f"a layout has {', '.join(cls.__dataclass_fields__)}")
        _check(**values)
        return cls(**values | {"columns": tuple(values["columns"])})

    def forms(self) -> list[Form]:
        """Return all arrays, in order: of every hook its activations, its scales and the rows that count; columns."""
        sizes = (self.chunk_rows, self.shard_rows)
        forms = []
        for hook, width in self.widths.items():
            forms.append(Form(f"acts/{hook}", self.storage, width, *sizes))
            if self.storage == "int8":
                forms.append(Form(f"scale/{hook}", "float16", None, *sizes))
            forms.append(Form(f"kept/{hook}", "uint8", None, *sizes))
        return [*forms, *(Form(name, COLUMNS[name], None, *sizes) for name in self.columns)]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in all arrays."""
        return sum(form.row_bytes for form in self.forms())

    def shards(self, rows: int) -> int:
        """Return the number of shards of a store of so many rows."""
        return -(-rows // self.shard_rows)

    def bounds(self, shard: int, rows: int) -> tuple[int, int]:
        """Return the first row of a shard and the one after its last."""
        return shard * self.shard_rows, min((shard + 1) * self.shard_rows, rows)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self) | {"widths": dict(self.widths), "columns": list(self.columns)}


def suited(
    widths: Mapping[str, int],
    storage: Storage = "bfloat16",
    *,
    row_len: int = 1,
    rows: int | None = None,
    columns: tuple[str, ...] = (),
    shard_rows: int | None = None,
) -> Layout:
    """Return a layout with chunks of about 1,024 rows and 64 chunks in a shard, and smaller ones for a small store.

    Args:
      widths: hooks, with the width of their activations.
      storage: the type in which activations are stored.
      row_len: tokens in a row of text.
      rows: rows of the store; None if unknown.
      columns: columns beside the activations.
      shard_rows: rows of a shard, rounded up to whole chunks; None is 64 chunks.

    Raises:
      ConfigError: sizes that no store can have.
    """
    _check_size("row_len", row_len, 2**24)
    target = CHUNK_ROWS if rows is None else min(CHUNK_ROWS, rows // _LEAST_CHUNKS)
    if shard_rows is not None:
        _check_size("shard_rows", shard_rows, 2**31)
        target = min(CHUNK_ROWS, shard_rows // MIXED)
    chunk_rows = row_len * max(target // row_len, 1)
    few = rows is not None and rows < 4 * _SHARD_CHUNKS * chunk_rows  # several processes write several shards
    shard_chunks = (MIXED if few else _SHARD_CHUNKS) if shard_rows is None else -(-shard_rows // chunk_rows)
    return Layout(widths, storage, row_len, chunk_rows, chunk_rows * shard_chunks, columns)


def _check(widths: Any, storage: Any, row_len: Any, chunk_rows: Any, shard_rows: Any, columns: Any) -> None:
    """Check the fields of a layout, which may have any types; raise ConfigError."""
    require(isinstance(storage, str) and storage in get_args(Storage), _choice("storage", storage, get_args(Storage)))
    count = len(widths) if isinstance(widths, Mapping) else 0
    require(0 < count <= _MOST_HOOKS, f"a store has 1 to {_MOST_HOOKS} hooks, not {count}")
    for hook, width in widths.items():
        check_name(hook)
        _check_size(f"the width of {hook}", width, 2**24)
    require(isinstance(columns, list | tuple), "columns must be a list")
    for name in columns:
        require(isinstance(name, str) and name in COLUMNS, _choice("a column", name, tuple(COLUMNS)))
    require(len(set(columns)) == len(columns), "a column is named twice")
    for name, size in (("row_len", row_len), ("chunk_rows", chunk_rows), ("shard_rows", shard_rows)):
        _check_size(name, size, 2**31)
    require(
        chunk_rows % row_len == 0 and shard_rows % chunk_rows == 0,
        f"a chunk of {chunk_rows} rows must hold whole rows of text of {row_len} tokens, and a shard of {shard_rows} "
        "whole chunks",
    )


def check_name(hook: Any) -> None:
    """Check that a hook's name can be part of a path and of an address.

    Raises:
      ConfigError: it cannot.
    """
    valid = isinstance(hook, str) and _NAME.fullmatch(hook) is not None and hook not in COLUMNS and hook != "kept"
    require(
        valid,
        f"{hook!r:.80} cannot be the name of a hook: letters, digits, '.', '_' and '-', at most 200, and none of "
        f"{', '.join(COLUMNS)}, kept",
    )


def _check_size(name: str, size: Any, most: int) -> None:
    valid = isinstance(size, int) and not isinstance(size, bool) and 1 <= size <= most
    require(valid, f"{name} is {size!r:.40}: it must be a whole number from 1 to {most:,}")


def _choice(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    return f"{name} is {value!r:.40}: choose one of {', '.join(allowed)}"
