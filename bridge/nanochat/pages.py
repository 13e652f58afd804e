"""What a parquet file says of its pages, read without unpacking any: so that no page, row or row group is a bomb.

pyarrow takes as much memory as a page's header asks for. These are read here first; they are structs of Thrift's
compact protocol, one before each page (parquet-format, `PageHeader`).
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any, NamedTuple

MAX_FOOTER = 16 * 2**20
MAX_PAGE = 64 * 2**20
"""Bytes of a page, packed or not."""
MAX_DICTIONARY = 16 * 2**20
MAX_NESTED_VALUES = 2**23
"""Values of a column of lists in a row group: of these a few bytes can say millions."""
MAX_DEPTH, MAX_COLUMNS = 32, 10_000
_FREE, _MOST_RATIO = 64 * 2**20, 200
_MOST_PAGES = 2**14
_WINDOW = 2**14  # bytes in which a page's header is looked for first
_DICTIONARY_PAGE = 2


class Page(NamedTuple):
    """The header of a page."""

    kind: int
    unpacked: int
    packed: int
    values: int
    length: int
    """Of the header itself, in bytes."""


def footer_length(stream: io.BufferedIOBase) -> int:
    """Return the length of a parquet file's footer, after a look at whether it is one that may be read.

    Raises:
        ValueError: no parquet file, or a footer that is too large, too wide or nested too deeply.
    """
    size = stream.seek(0, 2)
    stream.seek(max(size - 8, 0))
    end = stream.read(8)
    if size < 12 or end[4:] != b"PAR1":
        what = "its footer is encrypted" if end[4:] == b"PARE" else "it does not end with PAR1"
        raise ValueError(what)
    length = int.from_bytes(end[:4], "little")
    if not 0 < length <= min(MAX_FOOTER, size - 12):
        raise ValueError(f"its footer would have {length} bytes, of at most {min(MAX_FOOTER, size - 12)}")
    stream.seek(size - 8 - length)
    _check_schema(stream.read(length))
    return length


def check_column(stream: io.BufferedIOBase, start: int, length: int, nested: bool) -> None:
    """Check the headers of all pages of a column chunk.

    Args:
        stream: the file.
        start: byte at which the chunk begins.
        length: bytes of the chunk.
        nested: whether the column lies within lists.

    Raises:
        ValueError: a header that cannot be read, or pages that are too large, too many, or unpack to too much.
    """
    if start < 4 or length < 0:
        raise ValueError(f"it would begin at byte {start} and have {length}")
    end, packed, unpacked, values = start + length, 0, 0, 0
    for count, page in enumerate(_pages(stream, start, end), 1):
        most = MAX_DICTIONARY if page.kind == _DICTIONARY_PAGE else MAX_PAGE
        largest = max(page.unpacked, page.packed)
        if largest > most:
            raise ValueError(
                f"a page of {largest / 2**20:,.0f} MiB, of at most {most // 2**20}: write the file again with fewer "
                "rows in a group, such as row_group_size=1000"
            )
        packed, unpacked, values = packed + page.packed, unpacked + page.unpacked, values + page.values
        if unpacked > _FREE and unpacked > _MOST_RATIO * packed:
            raise ValueError(f"it unpacks to more than {_MOST_RATIO} times its size, which text does not")
        if nested and values > MAX_NESTED_VALUES:
            raise ValueError(f"more than {MAX_NESTED_VALUES:,} values in lists: write fewer rows in a group")
        if count > _MOST_PAGES:
            raise ValueError(f"more than {_MOST_PAGES:,} pages")


def _pages(stream: io.BufferedIOBase, start: int, end: int) -> Iterator[Page]:
    while start < end:
        page = _page(stream, start, end)
        yield page
        start += page.length + page.packed


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
                raise ValueError(f"the header of its page at byte {start} cannot be read") from error
            window *= 16
    values = sum(fields.get(field, {}).get(1, 0) for field in (5, 8))
    sizes = fields.get(2), fields.get(3)
    if not all(isinstance(size, int) and size >= 0 for size in sizes):
        raise ValueError(f"the page at byte {start} has no size")
    return Page(fields.get(1, -1), *sizes, max(values, 0), reader.at)


def _check_schema(footer: bytes) -> None:
    """Refuse a schema that pyarrow would walk too deep into: older versions overflow their stack."""
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
            raise ValueError(f"its schema has {size:,} columns, of at most {MAX_COLUMNS:,}")
        waiting = [1]  # children still to come, by depth
        for _ in range(size):
            children = reader.struct({}).get(5, 0)
            while waiting and waiting[-1] == 0:
                waiting.pop()
            if not waiting:
                raise ValueError("its schema is broken")
            waiting[-1] -= 1
            if children:
                waiting.append(children)
            if len(waiting) > MAX_DEPTH:
                raise ValueError(f"its columns are nested more than {MAX_DEPTH} deep")
    except IndexError as error:
        raise ValueError("its footer is broken") from error


class _Compact:
    """Reads Thrift's compact protocol from bytes; an IndexError says that they end too early."""

    def __init__(self, data: bytes):
        self._data, self.at = data, 0

    def byte(self) -> int:
        self.at += 1
        return self._data[self.at - 1]

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
        """The integers of a struct by field, and the structs that `wanted` names."""
        found: dict[int, Any] = {}
        field = 0
        while (head := self.byte()) != 0:
            field = field + (head >> 4) if head >> 4 else self.signed()
            inner = wanted.get(field) if isinstance(wanted, dict) else None
            found[field] = self.value(head & 15, inner, depth)
        return found

    def value(self, kind: int, wanted: Any, depth: int) -> Any:
        """A value of a type; what is neither a number nor a struct that is wanted is passed over."""
        if depth > 16:
            raise ValueError("nested too deeply")
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
        raise ValueError(f"a value of type {kind}")

    def _skip(self, length: int) -> None:
        self.at += length
        if self.at > len(self._data):
            raise IndexError(self.at)
