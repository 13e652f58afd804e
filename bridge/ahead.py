"""Token rows that a thread reads ahead, while the caller's thread keeps a GPU busy."""

import collections
import concurrent.futures
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int


@runtime_checkable
class Rows(Protocol):
    """A source of token rows, for example `bridge.nanochat.corpus.Corpus`."""

    row_len: int
    """Tokens in a row."""

    def next_rows(self, n: int) -> np.ndarray:
        """Return the next n rows, (n, row_len) int32."""

    def position(self) -> dict[str, Any]:
        """Return the position of the next row, as JSON values."""

    def seek(self, position: dict[str, Any]) -> None:
        """Continue from a position."""


class ReadAhead:
    """Rows of another source, as many of which are read ahead as were taken last. The order and positions are its own.

    Args:
      rows: the source, which must not be used elsewhere.
    """

    def __init__(self, rows: Rows):
        self.row_len = rows.row_len
        self._rows = rows
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="text")
        self._read: collections.deque[tuple[dict[str, Any], np.ndarray]] = collections.deque()
        self._reading: concurrent.futures.Future[None] | None = None

    def next_rows(self, n: int) -> Int[np.ndarray, "n row_len"]:
        """Return the next n rows, and start to read n more."""
        self._wait()
        self._extend(n - len(self._read))
        rows = np.stack([self._read.popleft()[1] for _ in range(n)])
        self._reading = self._thread.submit(self._extend, n - len(self._read))
        return rows

    def position(self) -> dict[str, Any]:
        """Return the position of the next row that `next_rows` returns."""
        self._wait()
        return self._read[0][0] if self._read else self._rows.position()

    def seek(self, position: dict[str, Any]) -> None:
        """Continue from a position."""
        self._wait()
        self._read.clear()
        self._rows.seek(position)

    def _extend(self, n: int) -> None:
        """Read n more rows."""
        for _ in range(n):
            self._read.append((self._rows.position(), self._rows.next_rows(1)[0]))

    def _wait(self) -> None:
        """Wait for the rows that are being read; raise what reading them raised."""
        reading, self._reading = self._reading, None
        if reading is not None:
            reading.result()
