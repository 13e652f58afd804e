"""Digests of file contents: computed when a corpus is opened, compared whenever a file is read again."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from pathlib import Path

WHOLE = 32 * 2**20
"""Largest file, in bytes, that is hashed completely."""
EDGE = 512 * 2**10
"""Bytes that are hashed at both ends of a larger file; the end of a parquet file is its footer, with the sizes and the
statistics of every column chunk."""
SAMPLES, SAMPLE = 24, 64 * 2**10
"""Number and size of the ranges hashed between the ends (2.5 MiB in total); their offsets depend on the file's size."""

Signature = tuple[int, int, int]


class DataChangedError(ValueError):
    """A file of a corpus has changed since the corpus was opened.

    Args:
        file: the file.
        change: what happened to it, such as "has changed".
    """

    def __init__(self, file: object, change: str):
        super().__init__(
            f"{file} {change} since this run began to read it, so the text would differ. Restore the file and resume "
            "from the last checkpoint, or start a new run"
        )


class Content:
    """Digest of a file that is read again later, and a check that the file is unchanged.

    Attributes:
        digest: twelve hex digits; of the whole content, or of samples of it above `WHOLE` bytes.

    Args:
        path: the file.
        tail: bytes at the end of the file that are always hashed.
    """

    def __init__(self, path: Path, tail: int = EDGE):
        self.path, self._tail = path, max(tail, EDGE)
        self._signature, self.digest = self._read()

    def verify(self) -> None:
        """Raise `DataChangedError` if the file has changed; warn if it was rewritten and its samples are equal.

        The content is read only if size, modification time or inode differ.
        """
        try:
            signature = signature_of(self.path.stat())
            if signature == self._signature:
                return
            signature, digest = self._read()
        except FileNotFoundError as error:
            raise DataChangedError(self.path, "has disappeared") from error
        if digest != self.digest:
            shrunk = signature[0] < self._signature[0]
            raise DataChangedError(self.path, "has become shorter" if shrunk else "has changed")
        if signature[0] > WHOLE:
            warnings.warn(
                f"{self.path} was written to while in use; {SAMPLES} samples of it are unchanged", stacklevel=2
            )
        self._signature = signature

    def _read(self) -> tuple[Signature, str]:
        with self.path.open("rb") as stream:
            before = signature_of(os.fstat(stream.fileno()))
            digest = _digest(stream, before[0], self._tail)
            if signature_of(os.fstat(stream.fileno())) != before:
                raise DataChangedError(self.path, "was being written to")
        return before, digest


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
    """Return (size, modification time, inode), which change when a file is written to or replaced."""
    return status.st_size, status.st_mtime_ns, status.st_ino


def _digest(stream: io.BufferedIOBase, size: int, tail: int) -> str:
    hasher = hashlib.sha256(f"{size}:".encode())
    if size <= WHOLE:
        while data := stream.read(2**20):
            hasher.update(data)
        return hasher.hexdigest()[:12]
    for start, length in ((0, EDGE), *_samples(size), (max(size - tail, 0), tail)):
        stream.seek(start)
        hasher.update(stream.read(length))
    return hasher.hexdigest()[:12]


def _samples(size: int) -> list[tuple[int, int]]:
    """Return (start, length) of the ranges to hash in the middle of a file."""
    span = size - 2 * EDGE - SAMPLE
    numbers = (hashlib.sha256(f"{size}:{i}".encode()).digest()[:8] for i in range(SAMPLES))
    return [(EDGE + int.from_bytes(number, "big") % span, SAMPLE) for number in numbers]
