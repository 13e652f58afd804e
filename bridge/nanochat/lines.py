"""Documents from JSON: a document per line (`.jsonl`, `.ndjson`), or an array of them (`.json`); plain or gzipped."""

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
from bridge.nanochat.documents import MAX_DOCUMENT, Document, Unit, of_record
from jsae.files import is_system_error

LINES_PER_UNIT = 256
BYTES_PER_UNIT = 4 * 2**20
"""A unit ends with the line that reaches one of the two."""

_FREE = 4 * 2**20  # unpacked bytes before the ratio counts
_MOST_RATIO = 200  # of unpacked to packed bytes; text reaches 3 to 20
_SIMPLE = 2**20  # characters of JSON whose values cannot be too many
_MOST_VALUES = 500_000
_NESTED = "JSON that is nested too deeply"
_IN_MEMORY = 32 * 2**20
_BLANKS = re.compile(r"[ \t\r\n]*")
_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\Z|\\\Z)', re.DOTALL)


class Spool:
    """Keeps what cannot be read again by its place in a file: compressed, in memory and above 32 MiB on the disk."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115 - closed below
        weakref.finalize(self, self._file.close)  # when no unit has it any more
        self._lock = threading.Lock()

    def keep(self, data: bytes) -> Callable[[], bytes]:
        """Keep data, and return what gives it back."""
        packed = zlib.compress(data, 1)
        try:
            with self._lock:
                start = self._file.seek(0, 2)
                self._file.write(packed)
        except OSError as error:
            raise ValueError(
                f"unpacked text is kept in {tempfile.gettempdir()}, where it cannot be written: {error}. Set TMPDIR to "
                "a place with room, or unpack the files"
            ) from error
        return functools.partial(self._read, start, len(packed))

    def _read(self, start: int, length: int) -> bytes:
        with self._lock:
            self._file.seek(start)
            return zlib.decompress(self._file.read(length))


class _Chunk(NamedTuple):
    """Some records that follow each other."""

    first: int
    digest: str
    fetch: Callable[[], bytes]


def units(file: Path, form: str, gzipped: bool, spool: Spool) -> list[Unit]:
    """Return the units of a file of form "jsonl" or "json".

    Everything in it is parsed once, so that a broken line is found before the work starts. A plain file of lines is
    read again by place; what was gzipped or an array is kept in `spool`.

    Raises:
        ValueError: a line, an element or the file cannot be read, or is larger than a document may be.
    """
    content, chunks = hashlib.sha256(), []
    word = "line"
    try:
        with gzip.open(file) if gzipped else file.open("rb") as opened:
            stream = _Unpacked(opened, file) if gzipped else opened
            if form == "json" and not _is_lines(stream):
                word, records = "element", _array(stream, file)
            else:
                records = _lines(stream, file)
            by_place = not gzipped and word == "line"
            for chunk in _chunks(records, file, word, spool=None if by_place else spool):
                content.update(chunk.digest.encode())
                chunks.append(chunk)
    except (OSError, EOFError, zlib.error) as error:
        if is_system_error(error):
            raise
        raise ValueError(f"{file} cannot be read: {error}") from error
    source = (file.name, content.hexdigest()[:12])
    return [
        Unit(
            f"jsonl {file.name} {chunk.first} {chunk.digest[:12]}",
            functools.partial(_documents, file, word, chunk),
            source,
        )
        for chunk in chunks
    ]


def _chunks(records: Iterable[bytes], file: Path, word: str, spool: Spool | None) -> Iterator[_Chunk]:
    """The records, parsed and put together; each with its end of line."""
    start = first = 0
    held: list[bytes] = []
    size = 0
    for number, record in enumerate(records, 1):
        parse(record, file, word, number)
        held.append(record)
        size += len(record)
        if len(held) == LINES_PER_UNIT or size >= BYTES_PER_UNIT:
            yield _chunk(file, b"".join(held), start, first, spool)
            start, first, held, size = start + size, number, [], 0
    if held:
        yield _chunk(file, b"".join(held), start, first, spool)


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
    """What a gzip file holds, which must not be hundreds of times as much."""

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
        if self._count > _FREE and self._count > _MOST_RATIO * self._stream.fileobj.tell():
            raise ValueError(
                f"{self._file} unpacks to more than {_MOST_RATIO} times its size, which text does not: if it is what "
                "you want to read, unpack it first"
            )
        return data


def _is_lines(stream: io.BufferedIOBase) -> bool:
    """Whether a `.json` holds a value per line, as some data sets have it: its first line is whole, another follows."""
    line = stream.readline(MAX_DOCUMENT + 1)
    try:
        _loads(line.decode("utf-8-sig"))
        more = bool(stream.readline(2**16).strip())
    except (ValueError, RecursionError):
        more = False
    stream.seek(0)
    return more


def _array(stream: io.BufferedIOBase, file: Path) -> Iterator[bytes]:
    """The elements of an array, a line each; of a lone object, or a lone chat, that alone."""
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
        if len(messages) > _MOST_VALUES:
            raise ValueError(f"{file} is a chat of more than {_MOST_VALUES:,} messages")
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
    """The text of a JSON file, of which no more is held than its longest value needs."""

    def __init__(self, stream: io.BufferedIOBase, file: Path):
        self._stream, self._file = stream, file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._scan = json.JSONDecoder().raw_decode
        self._held, self._at, self._ended = "", 0, False

    def peek(self) -> str:
        """The next character that is no blank; '' at the end."""
        while True:
            self._at = _BLANKS.match(self._held, self._at).end()
            if self._at < len(self._held):
                return self._held[self._at]
            if self._ended:
                return ""
            self._more(2**20)

    def take(self) -> str:
        """`peek`, and go on after it."""
        character = self.peek()
        self._at += 1
        return character

    def value(self, number: int) -> Any:
        """The next value."""
        self.peek()
        size = 2**16
        while True:
            try:
                if len(self._held) - self._at > _SIMPLE:
                    _check_values(self._held[self._at :])
                value, end = self._scan(self._held, self._at)
                if self._ended or end < len(self._held):  # or a number could go on
                    self._at = end
                    return value
            except json.JSONDecodeError as error:
                if self._ended:
                    raise ValueError(f"{self._file}, element {number}: {error.msg}") from error
            except RecursionError as error:
                raise ValueError(f"{self._file}, element {number}: {_NESTED}") from error
            except ValueError as error:
                raise ValueError(f"{self._file}, element {number}: {error}") from error
            if len(self._held) - self._at > MAX_DOCUMENT:
                raise _too_long(self._file, f"element {number}")
            self._more(size)
            size *= 2

    def end(self) -> None:
        """Raise ValueError unless nothing follows."""
        if extra := self.peek():
            raise ValueError(f"{self._file}: expected nothing after the JSON value, got {extra!r}")

    def _more(self, size: int) -> None:
        data = self._stream.read(size)
        self._ended = not data
        try:
            text = self._decoder.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            raise ValueError(f"{self._file} is not UTF-8: {error.reason}") from error
        self._held, self._at = self._held[self._at :] + text, 0


# ---- one record ---------------------------------------------------------------------------------------------------


def parse(line: bytes, file: Path, word: str, number: int) -> Document | None:
    """Return the document of one line; None for a blank line or an empty text.

    Raises:
        ValueError: it is no JSON, not the JSON of a document, or nested too deeply; says which line.
    """
    if not line.strip():
        return None
    try:
        return of_record(_loads(line.decode("utf-8-sig" if number == 1 else "utf-8")))
    except RecursionError as error:
        raise ValueError(f"{file}, {word} {number}: {_NESTED}") from error
    except ValueError as error:
        raise ValueError(f"{file}, {word} {number}: {error}") from error


def _loads(text: str) -> Any:
    _check_values(text)
    return json.loads(text)


def _check_values(text: str) -> None:
    """Refuse long JSON of so many values that Python's objects for them would fill the memory."""
    if len(text) <= _SIMPLE:
        return
    bare = _STRING.sub("", text)
    count = sum(map(bare.count, "[{,"))
    if count > _MOST_VALUES:
        raise ValueError(f"{count:,} values in one document; at most {_MOST_VALUES:,} are read")


def _too_long(file: Path, where: str) -> ValueError:
    return ValueError(
        f"{file}, {where} is longer than {MAX_DOCUMENT // 2**20} MiB, the most of one document: cut it into several"
    )
