"""Locks: one process writes to a folder at a time. POSIX only; standard library only."""

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
    """A folder that another process writes to."""


class Lock:
    """The right to write to a folder. A context manager; within one process it may be taken again.

    The operating system holds the lock for the process, so that it ends with the process, however that ends. The lock
    file is removed with the lock; one that a killed process left means nothing.

    Args:
      folder: made if it does not exist, and removed again if it is empty at the end.

    Raises:
      LockedError: another process holds it; names the process.
      OSError: the folder cannot be made or written to.
    """

    _held: dict[Path, tuple[int, int]] = {}  # noqa: RUF012 - one for the process
    _guard = threading.Lock()

    def __init__(self, folder: Path):
        self._folder = folder

    def __enter__(self) -> "Lock":
        with self._guard:
            self._made = not self._folder.exists()
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
            with contextlib.suppress(OSError):  # a folder that was moved or removed meanwhile
                (self._key / LOCK).unlink()
                if self._made:
                    self._key.rmdir()  # fails where it is not empty
            os.close(descriptor)


def _lock(folder: Path) -> int:
    """Lock a folder and note who holds it; return the descriptor that keeps the lock."""
    for attempt in itertools.count():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:  # its holder removed the folder, empty as it was
            if attempt == 10:
                raise
            continue
        try:
            if not flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
                told = f"{folder} is on a file system without locks: a second process that writes there is not noticed"
                warnings.warn(told, stacklevel=4)
            if os.fstat(descriptor).st_nlink:  # else its holder removed it after it was opened here
                note = {"pid": os.getpid(), "host": socket.gethostname(), "program": Path(sys.argv[0]).name}
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, (json.dumps(note) + "\n").encode(), 0)
                return descriptor
            os.close(descriptor)
        except BlockingIOError:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise LockedError(f"{folder} is in use by {holder}: wait until it has ended, or stop it") from None
        except OSError as error:
            os.close(descriptor)
            raise OSError(error.errno, os.strerror(error.errno), str(folder / LOCK)) from error
    raise AssertionError("unreachable")


def _holder(descriptor: int) -> str:
    """Return who holds a lock. A note that is not there yet, or of a process that has ended, is read again."""
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
    except OSError:  # another user's
        return True
    return True


def flock(descriptor: int, operation: int) -> bool:
    """Lock or unlock a file (`fcntl.flock`); return False on a file system without locks.

    Raises:
      BlockingIOError: another process holds it, and the operation has LOCK_NB.
    """
    try:
        fcntl.flock(descriptor, operation)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return False
    return True
