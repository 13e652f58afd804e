"""Locks of folders, so that only one process writes to a folder at a time. POSIX only, standard library only."""

import contextlib
import errno
import fcntl
import itertools
import json
import os
import socket
import sys
import threading
import time
import warnings
from pathlib import Path
from types import TracebackType

from jsae import jsons

LOCK = ".lock"
"""Name of the lock file in a folder."""

_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


class LockedError(OSError):
    """Another process is writing to the folder."""


class Lock:
    """An exclusive lock on a folder. A context manager, re-entrant within one process.

    The operating system releases the lock when the process ends, for whatever reason. The lock file is then removed;
    a lock file left by a killed process has no effect.

    Args:
      folder: created if missing, and then removed at the end if it is empty.

    Raises:
      LockedError: another process has the lock; names the process.
      OSError: the folder cannot be created or written to.
    """

    _held: dict[Path, tuple[int, int]] = {}  # noqa: RUF012 - (descriptor, count) by folder, shared by the process
    _guard = threading.Lock()

    def __init__(self, folder: Path):
        self._folder = folder

    def __enter__(self) -> "Lock":
        with self._guard:
            self._created = not self._folder.exists()
            self._key = self._folder.resolve()
            descriptor, count = self._held.get(self._key, (-1, 0))
            self._held[self._key] = (_lock(self._folder) if count == 0 else descriptor, count + 1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._guard:
            descriptor, count = self._held.pop(self._key)
            if count > 1:
                self._held[self._key] = (descriptor, count - 1)
                return
            with contextlib.suppress(OSError):  # the folder may have been moved or removed
                (self._key / LOCK).unlink()
                if self._created:
                    self._key.rmdir()  # fails if it is not empty
            os.close(descriptor)


def _lock(folder: Path) -> int:
    """Lock a folder, write this process's name into the lock file, and return the descriptor that keeps the lock."""
    for attempt in itertools.count():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:  # its holder has removed the empty folder
            if attempt == 10:
                raise
            continue
        try:
            if not flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
                message = f"{folder} is on a file system without locks, so a second writing process is not detected"
                warnings.warn(message, stacklevel=4)
            if os.fstat(descriptor).st_nlink:  # otherwise its holder removed the file after it was opened here
                note = {"pid": os.getpid(), "host": socket.gethostname(), "program": Path(sys.argv[0]).name}
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, (json.dumps(note) + "\n").encode(), 0)
                return descriptor
            os.close(descriptor)
        except BlockingIOError:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise LockedError(f"{folder} is in use by {holder}: wait until it ends, or stop it") from None
        except OSError as error:
            os.close(descriptor)
            raise OSError(error.errno, os.strerror(error.errno), str(folder / LOCK)) from error
    raise AssertionError("unreachable")


def _holder(descriptor: int) -> str:
    """Return a description of the process that holds a lock; wait if the lock file is empty or outdated."""
    for _ in range(20):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            note = jsons.loads(os.pread(descriptor, 4096, 0))
            if note["host"] != socket.gethostname() or _is_alive(int(note["pid"])):
                return f"process {int(note['pid'])} on {note['host']} ({note['program']})"
        time.sleep(0.05)
    return "another process"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it belongs to another user
        return True
    return True


def flock(descriptor: int, operation: int) -> bool:
    """Lock or unlock a file (`fcntl.flock`); return False on a file system without locks.

    Raises:
      BlockingIOError: another process has the lock, and the operation has LOCK_NB.
    """
    try:
        fcntl.flock(descriptor, operation)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return False
    return True
