"""Check the page headers of a parquet file without unpacking pages, so that no decompression bomb is opened.

pyarrow allocates as much memory as a page header asks for, so the headers are read and checked here first. Each page
is preceded by one, a struct of Thrift's compact protocol (parquet-format, `PageHeader`).
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any, NamedTuple

MAX_FOOTER = 16 * 2**20
MAX_PAGE = 64 * 2**20
"""Bytes of a page, packed or unpacked."""
MAX_DICTIONARY = 16 * 2**20
MAX_NESTED_VALUES = 2**23
"""Values of a list column in a row group, of which a few bytes can encode millions."""
MAX_DEPTH, MAX_COLUMNS = 32, 10_000
_FREE, _MAX_RATIO = 64 * 2**20, 200  # unpacked bytes below which the ratio is not checked; unpacked to packed bytes
_MAX_PAGES = 2**14
_WINDOW = 2**14  # bytes that are read first to parse a page header
_DICTIONARY_PAGE = 2


class Page(NamedTuple):
    """A page header: type, unpacked and packed bytes of the page, number of values, bytes of the header."""

    kind: int
    unpacked: int
    packed: int
    values: int
    header_length: int


def footer_length(stream: io.BufferedIOBase) -> int:
    """Return the length in bytes of a parquet file's footer, after checking its size and its schema.

    Raises:
        ValueError: not a parquet file, or the footer is too large, too wide or nested too deeply.
    """
    size = stream.seek(0, 2)
    stream.seek(max(size - 8, 0))
    end = stream.read(8)
    if size < 12 or end[4:] != b"PAR1":
        raise ValueError("its footer is encrypted" if end[4:] == b"PARE" else "it does not end with PAR1")
    length = int.from_bytes(end[:4], "little")
    if not 0 < length <= min(MAX_FOOTER, size - 12):
        raise ValueError(f"its footer claims {length} bytes; at most {min(MAX_FOOTER, size - 12)} are allowed")
    stream.seek(size - 8 - length)
    _check_schema(stream.read(length))
    return length


def check_column(stream: io.BufferedIOBase, start: int, length: int, nested: bool) -> None:
    """Check the headers of all pages of a column chunk.

    Args:
        stream: the file.
        start: offset of the chunk in bytes.
        length: bytes of the chunk.
        nested: whether the column contains lists.

    Raises:
        ValueError: a header cannot be read, or pages are too large, too many or unpack to too much.
    """
    if start < 4 or length < 0:
        raise ValueError(f"its column chunk claims the offset {start} and {length} bytes")
    end, packed, unpacked, values = start + length, 0, 0, 0
    for count, page in enumerate(_pages(stream, start, end), 1):
        limit = MAX_DICTIONARY if page.kind == _DICTIONARY_PAGE else MAX_PAGE
        size = max(page.unpacked, page.packed)
        if size > limit:
            raise ValueError(
                f"it has a page of {size / 2**20:,.0f} MiB; at most {limit // 2**20} are allowed: write the file again "
                "with fewer rows per group, such as row_group_size=1000"
            )
        packed, unpacked, values = packed + page.packed, unpacked + page.unpacked, values + page.values
        if unpacked > _FREE and unpacked > _MAX_RATIO * packed:
            raise ValueError(f"it unpacks to more than {_MAX_RATIO} times its size, which text does not")
        if nested and values > MAX_NESTED_VALUES:
            raise ValueError(f"it has more than {MAX_NESTED_VALUES:,} values in lists: write fewer rows per group")
        if count > _MAX_PAGES:
            raise ValueError(f"it has more than {_MAX_PAGES:,} pages")


def _pages(stream: io.BufferedIOBase, start: int, end: int) -> Iterator[Page]:
    while start < end:
        page = _page(stream, start, end)
        yield page
        start += page.header_length + page.packed


def _page(stream: io.BufferedIOBase, start: int, end: int) -> Page:
    window = _WINDOW
    while True:
        stream.seek(start)
        data = stream.read(min(window, end - start))
        try:
            reader = _Compact(data)
            fields = reader.struct({5: {1}, 7: {1}, 8: {1}})
            break
        except (IndexError, ValueError) as error:
            if len(data) < window or window > MAX_DICTIONARY:
                raise ValueError(f"its page header at byte {start} cannot be read") from error
            window *= 16
    values = sum(fields.get(field, {}).get(1, 0) for field in (5, 8))
    sizes = fields.get(2), fields.get(3)
    if not all(isinstance(size, int) and size >= 0 for size in sizes):
        raise ValueError(f"its page at byte {start} has no size")
    return Page(fields.get(1, -1), *sizes, max(values, 0), reader.position)


def _check_schema(footer: bytes) -> None:
    """Raise ValueError for a schema nested so deeply that the stack of older pyarrow versions would overflow."""
    reader = _Compact(footer)
    try:
        last = 0
        while (head := reader.byte()) != 0:
            last = last + (head >> 4) if head >> 4 else reader.signed()
            if last == 2:
                break
            reader.value(head & 15, None, 0)
        size, _ = reader.list_head()
        if not 1 <= size <= MAX_COLUMNS:
            raise ValueError(f"its schema has {size:,} columns; at most {MAX_COLUMNS:,} are allowed")
        pending = [1]  # children still to be read, by depth
        for _ in range(size):
            children = reader.struct({}).get(5, 0)
            while pending and pending[-1] == 0:
                pending.pop()
            if not pending:
                raise ValueError("its schema is broken")
            pending[-1] -= 1
            if children:
                pending.append(children)
            if len(pending) > MAX_DEPTH:
                raise ValueError(f"its columns are nested more than {MAX_DEPTH} deep")
    except IndexError as error:
        raise ValueError("its footer is broken") from error


class _Compact:
    """A reader of Thrift's compact protocol. Raises IndexError if the data are cut off."""

    def __init__(self, data: bytes):
        self._data, self.position = data, 0

    def byte(self) -> int:
        self.position += 1
        return self._data[self.position - 1]

    def varint(self) -> int:
        result = shift = 0
        while True:
            byte = self.byte()
            result |= (byte & 0x7F) << shift
            if byte < 0x80:
                return result
            shift += 7
            if shift > 63:
                raise ValueError("a number of more than 64 bits")

    def signed(self) -> int:
        number = self.varint()
        return (number >> 1) ^ -(number & 1)

    def list_head(self) -> tuple[int, int]:
        head = self.byte()
        return (self.varint() if head >> 4 == 15 else head >> 4), head & 15

    def struct(self, wanted: dict[int, Any] | set[int], depth: int = 0) -> dict[int, Any]:
        """Return the integers of a struct by field number, and those of the nested structs in `wanted`."""
        fields: dict[int, Any] = {}
        field = 0
        while (head := self.byte()) != 0:
            field = field + (head >> 4) if head >> 4 else self.signed()
            inner = wanted.get(field) if isinstance(wanted, dict) else None
            fields[field] = self.value(head & 15, inner, depth)
        return fields

    def value(self, kind: int, wanted: Any, depth: int) -> Any:
        """Read a value of a type; return it if it is a number or a wanted struct, otherwise skip it."""
        if depth > 16:
            raise ValueError("it is nested too deeply")
        if kind in (1, 2):
            return kind == 1
        if kind == 3:
            return self.byte()
        if kind in (4, 5, 6):
            return self.signed()
        if kind == 7:
            return self._skip(8)
        if kind == 8:
            return self._skip(self.varint())
        if kind in (9, 10):
            size, inner = self.list_head()
            for _ in range(size):
                self.byte() if inner in (1, 2) else self.value(inner, None, depth + 1)
            return None
        if kind == 12:
            return self.struct(wanted or {}, depth + 1)
        raise ValueError(f"it has a value of the unknown type {kind}")

    def _skip(self, length: int) -> None:
        self.position += length
        if self.position > len(self._data):
            raise IndexError(self.position)
