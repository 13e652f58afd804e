"""What an upload has sent so far, kept on disk so that a killed one goes on without sending anything twice."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from jsae import files, jsons

State = Literal["sending", "accepted"]


class LedgerError(ValueError):
    """A ledger that cannot be relied on."""


class Ledger:
    """A JSONL file of what was sent to one source of one server; other sources may share the file.

    A line is written and synced before a batch is sent ("sending") and after the server took it ("accepted"). A
    feature whose last line is "sending" may or may not have arrived: the server must be asked.

    Used as a context manager, it is held against a second upload.

    Args:
      path: the file; made when first written to.
      key: server, model and source.

    Raises:
      LedgerError: a line is broken (a torn last one is forgotten: it was never acted upon), or another upload holds it.
    """

    def __init__(self, path: Path, key: tuple[str, str, str]):
        self.path = path
        self._key = dict(zip(("server", "model", "source"), key, strict=True))
        self._source_set = key[2].partition("-")[2]
        self._features: dict[int, tuple[State, str]] = {}
        self._lines: files.Lines | None = None
        self.complete = False
        """Whether the source set was made under this ledger, which then knows of all that was ever sent to it."""
        self.last_sent = 0.0
        """When something was last sent to this source from here, seconds of `time.time`; 0 for never."""

    def __enter__(self) -> "Ledger":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lines = files.Lines(self.path, exclusive=True)
        except BlockingIOError:
            raise LedgerError(f"another upload is writing {self.path}: wait until it has ended") from None
        try:
            self._read()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def state(self, feature: int, content: str) -> State | Literal["changed"] | None:
        """What became of a feature: None for never sent, "changed" when it arrived with other content than this."""
        state, sent = self._features.get(feature, (None, ""))
        return "changed" if state == "accepted" and sent != content else state

    def write(self, state: State, features: Mapping[int, str]) -> None:
        """Keeps what becomes of features (index to hash of content); on the disk when it returns."""
        self._append({**self._key, "state": state, "features": features})

    def created(self) -> None:
        """Keeps that the source set was made just now, for all of its sources."""
        self._append({**self._key, "source": self._source_set, "state": "created"})

    def _append(self, told: dict[str, Any]) -> None:
        assert self._lines is not None, "a ledger is written inside its with block"
        line = told | {"time": round(time.time(), 3)}
        self._lines.append(json.dumps(line, separators=(",", ":")))
        self._take(line)

    def _read(self) -> None:
        for number, line in enumerate(self.path.read_bytes().splitlines(), 1):
            try:
                self._take(jsons.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
                raise LedgerError(
                    f"{self.path}, line {number} is no line of a ledger ({error}); without it features may be "
                    "uploaded twice, so move the file away only if nothing was uploaded"
                ) from error

    def _take(self, line: dict[str, Any]) -> None:
        place, state, when = tuple(line[name] for name in self._key), line["state"], float(line["time"])
        if state not in ("created", "sending", "accepted"):
            raise ValueError(f"state {state!r}")
        if state == "created":
            self.complete |= place == (*tuple(self._key.values())[:2], self._source_set)
        elif place == tuple(self._key.values()):
            self.last_sent = when
            self._features |= {int(index): (state, str(content)) for index, content in line["features"].items()}

    def _close(self) -> None:
        if self._lines is not None:
            self._lines.close()
            self._lines = None
