"""TensorBoard's event files, written as they come: a full disk is an error where it happens, not in a thread."""

import io
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from jsae import files

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event


class Events:
    """A new event file of scalars.

    Args:
      folder: where it lies, beside those of earlier sessions; made if it does not exist.
      first_step: events of earlier sessions from this step on are to be forgotten: they will come again.

    Raises:
      OSError: it cannot be written, for example because the disk is full.
    """

    def __init__(self, folder: Path, first_step: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        self._path = folder / name
        start = SessionLog(status=SessionLog.START)
        self._write(Event(file_version="brain.Event:2"), Event(step=first_step, session_log=start))

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write the values of a step by name, all of them or none.

        Raises:
          OSError: they cannot be written; the file is as it was before.
        """
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._write(Event(step=step, summary=Summary(value=values)))

    def _write(self, *events: "Event") -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        data, now = io.BytesIO(), time.time()
        for event in events:
            event.wall_time = now
            RecordWriter(data).write(event.SerializeToString())
        files.append(self._path, data.getvalue())
