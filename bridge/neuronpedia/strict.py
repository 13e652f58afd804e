"""JSON that Neuronpedia can store: no NaN, no NUL, no lone surrogate; equal rows give equal bytes."""

import contextlib
import gzip
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")
_LEVEL = 5
"""Compression level of gzip, as in Neuronpedia's own exports."""


class NotStorableError(ValueError):
    """Postgres would refuse a value: a number that is not finite, a NUL, or a lone surrogate."""


def line(row: Mapping[str, Any]) -> str:
    """Return a row as one line of JSON, without the line break.

    Neuronpedia's importer replaces every escaped NUL in a file by a space, even if the backslash is itself escaped,
    which would break the line. Such a backslash is therefore written as an escape sequence.

    Raises:
      NotStorableError: a value cannot be stored; names the row and the field.
    """
    try:
        text = _dump(row)
    except NotStorableError as error:
        raise NotStorableError(f"{_faulty_field(row)}: {error}") from error
    return text.replace(r"\\u0000", r"\u005cu0000")


def _dump(value: Any, indent: int | None = None) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)
        text.encode()
    except UnicodeEncodeError as error:
        raise NotStorableError(f"lone surrogate U+{ord(error.object[error.start]):04X}") from error
    except ValueError as error:
        raise NotStorableError(f"a number that is not finite ({error})") from error
    if r"\u0000" in text and _NUL.search(text):
        raise NotStorableError("a NUL character")
    return text


def _faulty_field(row: Mapping[str, Any]) -> str:
    """Return a description of the field that cannot be stored."""
    for key, value in row.items():
        try:
            _dump({key: value})
        except NotStorableError:
            owner = "".join(
                f" of {name} {row[name]}" for name in ("index", "feature_index") if name in row and name != key
            )
            return f"{key!r}{owner} cannot be stored"
    return "cannot be stored"


def write_json(path: Path, value: Any, indent: int | None = None) -> Path:
    """Write one JSON value into a folder that is being replaced. Raises NotStorableError."""
    try:
        text = _dump(value, indent)
    except NotStorableError as error:
        raise NotStorableError(f"{path.name}: {error}") from error
    path.write_bytes((text + "\n").encode())
    return path


def write_line(path: Path, row: Mapping[str, Any]) -> Path:
    """Write a .jsonl file of one row into a folder that is being replaced. Raises NotStorableError."""
    path.write_bytes((line(row) + "\n").encode())
    return path


class Lines(contextlib.AbstractContextManager["Lines"]):
    """A writer of a .jsonl.gz file in a folder that is being replaced. A context manager.

    Without rows no file is written, because the importer fails on empty files.
    """

    def __init__(self, path: Path):
        self._path = path
        self._keys: list[str] = []
        self._open = contextlib.ExitStack()

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row.

        Raises:
          NotStorableError: Postgres would refuse a value.
          ValueError: the keys differ from those of the first row, which are the only ones that the importer reads.
        """
        data = (line(row) + "\n").encode()
        if not self._keys:
            self._keys = list(row)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            raw = self._open.enter_context(self._path.open("wb"))
            self._file = self._open.enter_context(gzip.GzipFile("", "wb", _LEVEL, raw, mtime=0))
        if list(row) != self._keys:
            raise ValueError(f"{self._path.name}: a row has the keys {list(row)}, the first one {self._keys}")
        self._file.write(data)

    def __exit__(self, *_: object) -> None:
        self._open.close()
