"""TensorBoard's event files, written synchronously, so that a full disk raises an error in the call, not a thread."""

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
      folder: its folder, which may contain files of earlier sessions; created if it does not exist.
      first_step: TensorBoard drops events of earlier sessions from this step on, which are written again.

    Raises:
      OSError: the file cannot be written, for example because the disk is full.
    """

    def __init__(self, folder: Path, first_step: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        self._path = folder / name
        start = SessionLog(status=SessionLog.START)
        self._write(Event(file_version="brain.Event:2"), Event(step=first_step, session_log=start))

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Append the values of a step, by name: all of them or none.

        Raises:
          OSError: they cannot be written; the file is unchanged.
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
