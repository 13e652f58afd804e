"""Documents from JSON: one per line (`.jsonl`, `.ndjson`) or an array of them (`.json`), optionally gzipped."""

from __future__ import annotations

import codecs
import functools
import gzip
import hashlib
import io
import itertools
import json
import re
import tempfile
import threading
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bridge.nanochat.contents import read_again
from bridge.nanochat.documents import MAX_DOCUMENT, Document, Unit, document_from_record
from jsae.files import is_system_error

LINES_PER_UNIT = 256
BYTES_PER_UNIT = 4 * 2**20
"""A unit ends with the line that reaches either limit."""

_FREE = 4 * 2**20  # unpacked bytes below which the ratio is not checked
_MAX_RATIO = 200  # of unpacked to packed bytes; text reaches 3 to 20
_SIMPLE = 2**20  # characters of JSON too short to contain too many values
_MAX_VALUES = 500_000
_NESTED = "the JSON is nested too deeply"
_IN_MEMORY = 32 * 2**20
_BLANKS = re.compile(r"[ \t\r\n]*")
_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\Z|\\\Z)', re.DOTALL)


class Spool:
    """Compressed storage for data that cannot be read again by offset: in memory, above 32 MiB on disk."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115 - closed below
        weakref.finalize(self, self._file.close)  # when no unit refers to it any more
        self._lock = threading.Lock()

    def keep(self, data: bytes) -> Callable[[], bytes]:
        """Store data and return a function that reads it back. Raises ValueError if the disk is full."""
        packed = zlib.compress(data, 1)
        try:
            with self._lock:
                start = self._file.seek(0, 2)
                self._file.write(packed)
        except OSError as error:
            raise ValueError(
                f"cannot store unpacked text in {tempfile.gettempdir()}: {error}. Set TMPDIR to a directory with free "
                "space, or unpack the files"
            ) from error
        return functools.partial(self._read, start, len(packed))

    def _read(self, start: int, length: int) -> bytes:
        with self._lock:
            self._file.seek(start)
            return zlib.decompress(self._file.read(length))


class _Chunk(NamedTuple):
    """Consecutive records: the number of records before them, their digest, and a function that reads them."""

    first: int
    digest: str
    fetch: Callable[[], bytes]


def units(file: Path, form: str, gzipped: bool, spool: Spool) -> list[Unit]:
    """Return the units of a JSON file.

    The whole file is parsed once, so that a broken line is reported before the run starts. Plain files of lines are
    read again by offset; the records of gzipped files and of arrays are stored in `spool`.

    Args:
        file: the file.
        form: "jsonl" or "json".
        gzipped: whether the file is gzip-compressed.
        spool: storage for unpacked records.

    Raises:
        ValueError: a line, an element or the file cannot be read, or is larger than a document may be.
    """
    hasher, chunks = hashlib.sha256(), []
    word = "line"
    try:
        with gzip.open(file) if gzipped else file.open("rb") as raw:
            stream = _Unpacked(raw, file) if isinstance(raw, gzip.GzipFile) else raw
            if form == "json" and not _is_lines(stream):
                word, records = "element", _array(stream, file)
            else:
                records = _lines(stream, file)
            by_offset = not gzipped and word == "line"
            for chunk in _chunks(records, file, word, spool=None if by_offset else spool):
                hasher.update(chunk.digest.encode())
                chunks.append(chunk)
    except (OSError, EOFError, zlib.error) as error:
        if is_system_error(error):
            raise
        raise ValueError(f"{file} cannot be read: {error}") from error
    source = (file.name, hasher.hexdigest()[:12])
    return [
        Unit(
            f"jsonl {file.name} {chunk.first} {chunk.digest[:12]}",
            functools.partial(_documents, file, word, chunk),
            source,
            where=f"{word}s from {chunk.first + 1}" if len(chunks) > 1 else "",
        )
        for chunk in chunks
    ]


def _chunks(records: Iterable[bytes], file: Path, word: str, spool: Spool | None) -> Iterator[_Chunk]:
    """Parse the records, each with its line break, and yield them in chunks of a unit's size."""
    start = first = 0
    pending: list[bytes] = []
    size = 0
    for number, record in enumerate(records, 1):
        parse(record, file, word, number)
        pending.append(record)
        size += len(record)
        if len(pending) == LINES_PER_UNIT or size >= BYTES_PER_UNIT:
            yield _chunk(file, b"".join(pending), start, first, spool)
            start, first, pending, size = start + size, number, [], 0
    if pending:
        yield _chunk(file, b"".join(pending), start, first, spool)


def _chunk(file: Path, data: bytes, start: int, first: int, spool: Spool | None) -> _Chunk:
    digest = hashlib.sha256(data)
    fetch = spool.keep(data) if spool else functools.partial(read_again, file, start, len(data), digest.digest())
    return _Chunk(first, digest.hexdigest(), fetch)


def _documents(file: Path, word: str, chunk: _Chunk) -> Iterator[Document]:
    lines = chunk.fetch().split(b"\n")
    for number, line in enumerate(lines, chunk.first + 1):
        if document := parse(line, file, word, number):
            yield document


# ---- records of a file --------------------------------------------------------------------------------------------


def _lines(stream: io.BufferedIOBase, file: Path) -> Iterator[bytes]:
    for number in itertools.count(1):
        line = stream.readline(MAX_DOCUMENT + 1)
        if not line:
            return
        if len(line) > MAX_DOCUMENT:
            raise _too_long(file, f"line {number}")
        yield line


class _Unpacked(io.BufferedIOBase):
    """The unpacked bytes of a gzip file. Raises ValueError for a compression ratio that text does not reach."""

    def __init__(self, stream: gzip.GzipFile, file: Path):
        self._stream, self._file, self._count = stream, file, 0

    def read(self, size: int | None = -1, /) -> bytes:
        return self._counted(self._stream.read(size))

    def readline(self, size: int | None = -1, /) -> bytes:
        return self._counted(self._stream.readline(size))

    def seek(self, offset: int, whence: int = 0, /) -> int:
        self._count = 0
        return self._stream.seek(offset, whence)

    def _counted(self, data: bytes) -> bytes:
        self._count += len(data)
        if self._count > _FREE and self._count > _MAX_RATIO * self._stream.fileobj.tell():  # type: ignore[union-attr]
            raise ValueError(
                f"{self._file} unpacks to more than {_MAX_RATIO} times its size, which text does not: unpack it first "
                "if it is the right file"
            )
        return data


def _is_lines(stream: io.BufferedIOBase) -> bool:
    """Return whether a `.json` file has one value per line, as in some data sets: a complete line, and another one."""
    line = stream.readline(MAX_DOCUMENT + 1)
    try:
        _loads(line.decode("utf-8-sig"))
        more = bool(stream.readline(2**16).strip())
    except (ValueError, RecursionError):
        more = False
    stream.seek(0)
    return more


def _array(stream: io.BufferedIOBase, file: Path) -> Iterator[bytes]:
    """Yield the elements of an array, one line each; a single object or a single chat is one element."""
    text = _Text(stream, file)
    if text.peek() != "[":
        yield _line(text.value(1))
        text.end()
        return
    text.take()
    if text.peek() == "]":
        text.take()
        text.end()
        return
    one_chat, messages = False, []  # an array of messages is one chat, not many documents
    for number in itertools.count(1):
        value = text.value(number)
        if number == 1:
            one_chat = isinstance(value, dict) and "text" not in value and bool({"role", "from"} & value.keys())
        if one_chat:
            messages.append(value)
        else:
            yield _line(value)
        if len(messages) > _MAX_VALUES:
            raise ValueError(f"{file} is a chat of more than {_MAX_VALUES:,} messages")
        separator = text.take()
        if separator == "]":
            break
        if separator != ",":
            raise ValueError(f"{file}, element {number}: expected ',' or ']' after it, got {separator!r}")
    if one_chat:
        yield _line(messages)
    text.end()


def _line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


class _Text:
    """A reader of JSON values that keeps no more text in memory than the longest value needs."""

    def __init__(self, stream: io.BufferedIOBase, file: Path):
        self._stream, self._file = stream, file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._scan = json.JSONDecoder().raw_decode
        self._buffer, self._position, self._at_end = "", 0, False

    def peek(self) -> str:
        """Return the next character that is not white space, without consuming it; '' at the end."""
        while True:
            self._position = _BLANKS.match(self._buffer, self._position).end()
            if self._position < len(self._buffer):
                return self._buffer[self._position]
            if self._at_end:
                return ""
            self._more(2**20)

    def take(self) -> str:
        """Return and consume the next character that is not white space."""
        character = self.peek()
        self._position += 1
        return character

    def value(self, number: int) -> Any:
        """Return the next value; `number` is its number in errors."""
        self.peek()
        size = 2**16
        while True:
            try:
                if len(self._buffer) - self._position > _SIMPLE:
                    _check_values(self._buffer[self._position :])
                value, end = self._scan(self._buffer, self._position)
                if self._at_end or end < len(self._buffer):  # otherwise a number may continue
                    self._position = end
                    return value
            except json.JSONDecodeError as error:
                if self._at_end:
                    raise ValueError(f"{self._file}, element {number}: {error.msg}") from error
            except RecursionError as error:
                raise ValueError(f"{self._file}, element {number}: {_NESTED}") from error
            except ValueError as error:
                raise ValueError(f"{self._file}, element {number}: {error}") from error
            if len(self._buffer) - self._position > MAX_DOCUMENT:
                raise _too_long(self._file, f"element {number}")
            self._more(size)
            size *= 2

    def end(self) -> None:
        """Raise ValueError if anything but white space follows."""
        if extra := self.peek():
            raise ValueError(f"{self._file}: expected nothing after the JSON value, got {extra!r}")

    def _more(self, size: int) -> None:
        data = self._stream.read(size)
        self._at_end = not data
        try:
            text = self._decoder.decode(data, final=self._at_end)
        except UnicodeDecodeError as error:
            raise ValueError(f"{self._file} is not UTF-8: {error.reason}") from error
        self._buffer, self._position = self._buffer[self._position :] + text, 0


# ---- one record ---------------------------------------------------------------------------------------------------


def parse(line: bytes, file: Path, word: str, number: int) -> Document | None:
    """Return the document in a line; None for a blank line or an empty text.

    Args:
        line: the line.
        file: the file, for the error message.
        word: "line" or "element", for the error message.
        number: number of the line, from 1.

    Raises:
        ValueError: the line is not JSON, not the JSON of a document, or nested too deeply.
    """
    if not line.strip():
        return None
    try:
        return document_from_record(_loads(line.decode("utf-8-sig" if number == 1 else "utf-8")))
    except RecursionError as error:
        raise ValueError(f"{file}, {word} {number}: {_NESTED}") from error
    except ValueError as error:
        raise ValueError(f"{file}, {word} {number}: {error}") from error


def _loads(text: str) -> Any:
    _check_values(text)
    return json.loads(text)


def _check_values(text: str) -> None:
    """Raise ValueError for long JSON with so many values that their Python objects would fill the memory."""
    if len(text) <= _SIMPLE:
        return
    bare = _STRING.sub("", text)
    count = sum(map(bare.count, "[{,"))
    if count > _MAX_VALUES:
        raise ValueError(f"the document has {count:,} values; at most {_MAX_VALUES:,} are read")


def _too_long(file: Path, where: str) -> ValueError:
    return ValueError(
        f"{file}, {where} is longer than {MAX_DOCUMENT // 2**20} MiB, the limit of one document: split it into several"
    )
