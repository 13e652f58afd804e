"""Read untrusted JSON files within limits of size and nesting."""

import json
from pathlib import Path
from typing import Any

_MAX_BYTES = 2**22
_MAX_CONTAINERS = 2**18  # an empty list or dict takes up to thirty times the memory of its brackets


def read_table(
    path: Path, kind: str, advice: str, *, max_bytes: int = _MAX_BYTES, max_containers: int = _MAX_CONTAINERS
) -> dict[str, Any]:
    """Return the JSON object in a file.

    Args:
        path: the file.
        kind: the kind of file, for the error message, such as "meta file".
        advice: what to do about a broken file, for the error message.
        max_bytes: the largest size of the file.
        max_containers: the largest number of objects and arrays in it.

    Raises:
        ValueError: the file is too large, nested too deeply, not JSON, or not a JSON object.
        OSError: the file cannot be read.
    """
    size = path.stat().st_size
    if size > max_bytes:
        raise ValueError(f"{path} has {size} bytes, more than any {kind} of nanochat ({max_bytes})")
    data = path.read_bytes()
    containers = data.count(b"[") + data.count(b"{")
    if containers > max_containers:
        raise ValueError(f"{path} contains {containers} objects and arrays, more than any {kind} ({max_containers})")
    try:
        table = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}; {advice}") from error
    if not isinstance(table, dict):
        raise ValueError(f"{path} must contain a JSON object, got {type(table).__name__}")
    return table
