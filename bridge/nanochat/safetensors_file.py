"""Read safetensors files: the header is checked before the library parses it, and tensors are memory-mapped."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor

_MAX_HEADER_BYTES = 2**22
_MAX_DIMENSIONS = 8
# Bits per number. Files may contain all of these types, weights only the first four.
_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16} | {
    "I64": 64,
    "U64": 64,
    "I32": 32,
    "U32": 32,
    "I16": 16,
    "U16": 16,
    "I8": 8,
    "U8": 8,
    "BOOL": 8,
    "C64": 64,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}


@dataclasses.dataclass(frozen=True)
class Header:
    """The header of a file: (dtype, shape) of every tensor, and the metadata."""

    tensors: dict[str, tuple[str, tuple[int, ...]]]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Return the header of a safetensors file, without reading the tensors.

    Raises:
        ValueError: the header is damaged or too long, or its tensors do not fill the file exactly.
        OSError: the file cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > size - 8:
            raise ValueError("it is too short for its header")
        if length > _MAX_HEADER_BYTES:
            raise ValueError(f"its header has {length} bytes; at most {_MAX_HEADER_BYTES} are read")
        text = file.read(length)
    try:
        table = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header is not JSON: {error}") from error
    if not isinstance(table, dict):
        raise ValueError("its header is not a JSON object")
    metadata = table.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata is not a JSON object of strings")
    spans = []
    tensors = {}
    for name, entry in table.items():
        dtype, shape, span = _entry(name, entry)
        tensors[name] = dtype, shape
        spans.append(span)
    offsets = [0, *(end for _, end in sorted(spans))]
    if (
        any(begin != end for (begin, _), end in zip(sorted(spans), offsets, strict=False))
        or offsets[-1] != size - 8 - length
    ):
        raise ValueError("its tensors overlap, leave gaps or do not end with the file")
    return Header(tensors, metadata)


def read(path: Path) -> dict[str, Tensor]:
    """Return the memory-mapped tensors of a file whose header `read_header` has accepted.

    Raises ValueError if the library cannot read the file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(str(error)) from error


def _entry(name: str, entry: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """Return dtype, shape and (begin, end) of a tensor in the header."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"its header has an invalid entry for {name[:100]!r}")
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"its tensor {name[:100]!r} has an unknown type")
    if not (_whole_numbers(shape) and len(shape) <= _MAX_DIMENSIONS and _whole_numbers(span) and len(span) == 2):
        raise ValueError(f"its header has an invalid entry for {name[:100]!r}")
    if (span[1] - span[0]) * 8 != math.prod(shape) * _BITS[dtype]:
        raise ValueError(f"its tensor {name[:100]!r} has a number of bytes that does not fit its shape")
    return dtype, tuple(shape), (span[0], span[1])


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**62 for value in values)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a name occurs twice")
    return table
