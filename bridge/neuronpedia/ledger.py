"""A record on disk of what an upload has sent, so that an interrupted upload resumes without sending anything twice."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from jsae import files, jsons

State = Literal["sending", "accepted"]


class LedgerError(ValueError):
    """A ledger is damaged, or another upload is writing it."""


class Ledger:
    """A JSONL file of what was sent to one source of one server. Several sources may share the file.

    A line is written and synced before a batch is sent ("sending") and after the server accepted it ("accepted"). A
    feature whose last line is "sending" may or may not have arrived, so the server must be asked.

    A context manager, which locks the file against a second upload.

    Args:
      path: the file; created on entry.
      key: server, model and source.

    Raises:
      LedgerError: a line is damaged, or another upload has locked the file. A partial last line is ignored, because
        nothing was sent after it.
    """

    def __init__(self, path: Path, key: tuple[str, str, str]):
        self.path = path
        self._key = dict(zip(("server", "model", "source"), key, strict=True))
        self._source_set = key[2].partition("-")[2]
        self._features: dict[int, tuple[State, str]] = {}
        self._lines: files.Lines | None = None
        self.complete = False
        """Whether the source set was created by an upload of this ledger, which then records everything sent to it."""
        self.last_sent = 0.0
        """Time of the last upload to this source, in seconds of `time.time`; 0 for never."""

    def __enter__(self) -> "Ledger":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lines = files.Lines(self.path, exclusive=True)
        except BlockingIOError:
            raise LedgerError(f"another upload is writing {self.path}: wait until it ends") from None
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
        """Return the state of a feature: None if it was not sent, "changed" if it was accepted with other content.

        Args:
          feature: index of the feature.
          content: hash of its content.
        """
        state, sent = self._features.get(feature, (None, ""))
        return "changed" if state == "accepted" and sent != content else state

    def write(self, state: State, features: Mapping[int, str]) -> None:
        """Record the state of features, as hashes of their content by index; synced to disk on return."""
        self._append({**self._key, "state": state, "features": features})

    def created(self) -> None:
        """Record that the source set, with all of its sources, was just created."""
        self._append({**self._key, "source": self._source_set, "state": "created"})

    def _append(self, fields: dict[str, Any]) -> None:
        assert self._lines is not None, "a ledger is written inside its with block"
        line = fields | {"time": round(time.time(), 3)}
        self._lines.append(json.dumps(line, separators=(",", ":")))
        self._apply(line)

    def _read(self) -> None:
        for number, line in enumerate(self.path.read_bytes().splitlines(), 1):
            try:
                self._apply(jsons.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
                raise LedgerError(
                    f"{self.path}, line {number} is damaged ({error}); without the ledger features may be uploaded "
                    "twice, so remove the file only if nothing was uploaded"
                ) from error

    def _apply(self, line: dict[str, Any]) -> None:
        key, state, when = tuple(line[name] for name in self._key), line["state"], float(line["time"])
        if state not in ("created", "sending", "accepted"):
            raise ValueError(f"state {state!r}")
        if state == "created":
            self.complete |= key == (*tuple(self._key.values())[:2], self._source_set)
        elif key == tuple(self._key.values()):
            self.last_sent = when
            self._features |= {int(index): (state, str(content)) for index, content in line["features"].items()}

    def _close(self) -> None:
        if self._lines is not None:
            self._lines.close()
            self._lines = None
