"""What files hold, as digests: taken when a corpus is made, and compared whenever a file is read again."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from pathlib import Path

WHOLE = 32 * 2**20
"""Bytes up to which a file is hashed whole."""
EDGE = 512 * 2**10
"""Bytes that are hashed at both ends of a larger file; the end of a parquet file is its footer, with the sizes and the
statistics of every column chunk."""
SAMPLES, SAMPLE = 24, 64 * 2**10
"""How many ranges between the ends, at places that only the size decides, and their bytes: 2.5 MiB of a file."""

Signature = tuple[int, int, int]


class DataChangedError(ValueError):
    """A file of a corpus is not what it was when the corpus was made."""

    def __init__(self, file: object, what: str):
        super().__init__(
            f"{file} {what} since this run began to read it: the text would be another. Put the file back as it was "
            "and go on from the last checkpoint, or start a new run"
        )


class Content:
    """The content of one file that is too large to be kept: its digest, and whether it is still the same.

    Attributes:
        digest: twelve hex digits of its content, sampled above `WHOLE` bytes.

    Args:
        path: the file.
        tail: bytes at its end that are hashed in any case.
    """

    def __init__(self, path: Path, tail: int = EDGE):
        self.path, self._tail = path, max(tail, EDGE)
        self._signature, self.digest = self._read()

    def verify(self) -> None:
        """Raise `DataChangedError` if the file has changed; warn if it was written to and seems the same.

        Looks at size, time and inode first, and at the content only where these differ.
        """
        try:
            signature = signature_of(self.path.stat())
            if signature == self._signature:
                return
            signature, found = self._read()
        except FileNotFoundError as error:
            raise DataChangedError(self.path, "has disappeared") from error
        if found != self.digest:
            shrunk = signature[0] < self._signature[0]
            raise DataChangedError(self.path, "has become shorter" if shrunk else "has changed")
        if signature[0] > WHOLE:
            warnings.warn(
                f"{self.path} was written to while it was in use; {SAMPLES} samples of it are as before", stacklevel=2
            )
        self._signature = signature

    def _read(self) -> tuple[Signature, str]:
        with self.path.open("rb") as stream:
            before = signature_of(os.fstat(stream.fileno()))
            found = _digest(stream, before[0], self._tail)
            if signature_of(os.fstat(stream.fileno())) != before:
                raise DataChangedError(self.path, "was being written to")
        return before, found


def read_again(path: Path, start: int, length: int, digest: bytes) -> bytes:
    """Return a part of a file, which must hold what it held.

    Args:
      path: the file.
      start: offset of the part in bytes.
      length: its length in bytes.
      digest: sha256 of the part when the corpus was made.

    Raises:
      DataChangedError: the file has disappeared, is shorter, or holds something else there.
      OSError: it cannot be read.
    """
    try:
        with path.open("rb") as stream:
            stream.seek(start)
            data = stream.read(length)
    except FileNotFoundError as error:
        raise DataChangedError(path, "has disappeared") from error
    if len(data) < length:
        raise DataChangedError(path, "has become shorter")
    if hashlib.sha256(data).digest() != digest:
        raise DataChangedError(path, "has changed")
    return data


def signature_of(status: os.stat_result) -> Signature:
    """Return what changes when a file is written to or replaced: size, time and inode."""
    return status.st_size, status.st_mtime_ns, status.st_ino


def _digest(stream: io.BufferedIOBase, size: int, tail: int) -> str:
    found = hashlib.sha256(f"{size}:".encode())
    if size <= WHOLE:
        while data := stream.read(2**20):
            found.update(data)
        return found.hexdigest()[:12]
    for start, length in ((0, EDGE), *_samples(size), (max(size - tail, 0), tail)):
        stream.seek(start)
        found.update(stream.read(length))
    return found.hexdigest()[:12]


def _samples(size: int) -> list[tuple[int, int]]:
    room = size - 2 * EDGE - SAMPLE
    drawn = (hashlib.sha256(f"{size}:{i}".encode()).digest()[:8] for i in range(SAMPLES))
    return [(EDGE + int.from_bytes(number, "big") % room, SAMPLE) for number in drawn]
