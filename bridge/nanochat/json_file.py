"""Reads JSON files that others wrote, within a budget."""

import json
from pathlib import Path
from typing import Any

_MAX_BYTES = 2**22
_MAX_CONTAINERS = 2**18  # a list or a table takes up to thirty times the bytes of its brackets


def read_table(
    path: Path, what: str, advice: str, *, max_bytes: int = _MAX_BYTES, max_containers: int = _MAX_CONTAINERS
) -> dict[str, Any]:
    """Return the table that a JSON file holds.

    Args:
        path: the file.
        what: the kind of file, for the error: "meta file".
        advice: what to do about a broken one, for the error.
        max_bytes: the longest file that is read.
        max_containers: how many tables and lists it may hold.

    Raises:
        ValueError: it is too long, too deep, not JSON or not a table.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    if size > max_bytes:
        raise ValueError(f"{path} has {size} bytes, more than any {what} of nanochat ({max_bytes})")
    data = path.read_bytes()
    containers = data.count(b"[") + data.count(b"{")
    if containers > max_containers:
        raise ValueError(f"{path} holds {containers} tables and lists, more than any {what} ({max_containers})")
    try:
        table = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}; {advice}") from error
    if not isinstance(table, dict):
        raise ValueError(f"{path} must hold a JSON table, got {type(table).__name__}")
    return table
