"""Reads JSON that others may have written: every fault is a ValueError, and what is read has a bounded size."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LARGEST = 16 * 2**20
"""Bytes of a file, unless more are allowed."""
LONGEST_LINE = 2**20
"""Bytes of a line."""


def loads(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
      ValueError: it is not JSON, not UTF-8, or nested too deeply, for which `json` raises RecursionError.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read(path: Path, largest: int = LARGEST) -> Any:
    """Return the value of a JSON file.

    Raises:
      ValueError: it is broken or has more than `largest` bytes; names the file.
      OSError: it is missing or must not be read.
    """
    check_size(path, largest)
    try:
        return loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is broken: {str(error)[:200]}") from error


def objects(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Yield the lines of a file of JSON lines, each with its object, or None where it is none; nothing without a file.

    A killed process leaves half a line, which is none; of a line beyond `LONGEST_LINE` bytes every such part is none.

    Raises:
      OSError: it must not be read.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        while line := file.readline(LONGEST_LINE):
            try:
                value = loads(line)
            except ValueError:
                value = None
            yield line.rstrip(b"\n"), value if isinstance(value, dict) else None


def is_finite(value: Any) -> bool:
    """Return whether a JSON value is a number that a float can hold: integers may be larger, and bool is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def check_size(path: Path, largest: int = LARGEST) -> None:
    """Raise ValueError where a file has more bytes than are read."""
    size = path.stat().st_size
    if size > largest:
        raise ValueError(f"{path} has {size:,} bytes, and at most {largest:,} are read: move it away")
