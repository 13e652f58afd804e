"""JSON that Neuronpedia can take in: no NaN, no NUL, no lone surrogate; the same bytes for the same rows."""

import contextlib
import gzip
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")
_LEVEL = 5
"""Of gzip, as in Neuronpedia's own exports."""


class NotStorableError(ValueError):
    """A value that Postgres would refuse: a number that is not finite, a NUL, a lone surrogate."""


def line(row: Mapping[str, Any]) -> str:
    """A row as one line of JSON, without the line's end.

    Neuronpedia's importer puts a blank for every escaped NUL in the text of a file, without looking whether the
    backslash is itself escaped; the blank would break that line, so such a backslash is written by its number.

    Raises:
      NotStorableError: names the row and the field.
    """
    try:
        told = _dump(row)
    except NotStorableError as error:
        raise NotStorableError(f"{_place(row)}: {error}") from error
    return told.replace(r"\\u0000", r"\u005cu0000")


def _dump(value: Any, indent: int | None = None) -> str:
    try:
        told = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)
        told.encode()
    except UnicodeEncodeError as error:
        raise NotStorableError(f"lone surrogate U+{ord(error.object[error.start]):04X}") from error
    except ValueError as error:
        raise NotStorableError(f"a number that is not finite ({error})") from error
    if r"\u0000" in told and _NUL.search(told):
        raise NotStorableError("a NUL character")
    return told


def _place(row: Mapping[str, Any]) -> str:
    """Which field of which row it is that cannot be stored."""
    for key, value in row.items():
        try:
            _dump({key: value})
        except NotStorableError:
            of = "".join(
                f" of {name} {row[name]}" for name in ("index", "feature_index") if name in row and name != key
            )
            return f"{key!r}{of} cannot be stored"
    return "cannot be stored"


def write_json(path: Path, value: Any, indent: int | None = None) -> Path:
    """Write one JSON value into a folder that is being replaced. Raises NotStorableError."""
    try:
        told = _dump(value, indent)
    except NotStorableError as error:
        raise NotStorableError(f"{path.name}: {error}") from error
    path.write_bytes((told + "\n").encode())
    return path


def write_line(path: Path, row: Mapping[str, Any]) -> Path:
    """Write a .jsonl of one row into a folder that is being replaced. Raises NotStorableError."""
    path.write_bytes((line(row) + "\n").encode())
    return path


class Lines(contextlib.AbstractContextManager["Lines"]):
    """A .jsonl.gz to add rows to, in a folder that is being replaced.

    Without rows there is no file, as an empty one stops the importer.
    """

    def __init__(self, path: Path):
        self._path = path
        self._keys: list[str] = []
        self._open = contextlib.ExitStack()

    def add(self, row: Mapping[str, Any]) -> None:
        """Adds a row.

        Raises:
          NotStorableError: a value that Postgres would refuse.
          ValueError: other keys than the first row's, which are all that the importer reads.
        """
        told = (line(row) + "\n").encode()
        if not self._keys:
            self._keys = list(row)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            raw = self._open.enter_context(self._path.open("wb"))
            self._file = self._open.enter_context(gzip.GzipFile("", "wb", _LEVEL, raw, mtime=0))
        if list(row) != self._keys:
            raise ValueError(f"{self._path.name}: a row has the keys {list(row)}, the first one {self._keys}")
        self._file.write(told)

    def __exit__(self, *_: object) -> None:
        self._open.close()
