"""Files that are whole or not there: atomic files and folders, checked appends, and the lock of a folder.

A process may be killed, or the disk may fill, between any two of these operations. What stands under a final name is
complete; what was being written stands under a name that ends in `.partial` and is removed by the next writer.
POSIX only. Standard library only.
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import shutil
import socket
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

PARTIAL = ".partial"
"""Suffix of a file or folder that is being written."""
OUTDATED = ".outdated"
"""Suffix of a folder that is being replaced, where the file system cannot swap two folders."""
LOCK = ".lock"
"""Name of the lock file in a folder."""


# ---- files and folders --------------------------------------------------------------------------------------------


def write(path: Path, data: bytes | str) -> None:
    """Write a file: after a crash at any moment it holds either its former content or all of `data`.

    Args:
      path: the file; its folder must exist.
      data: bytes, or text that is encoded in UTF-8.

    Raises:
      OSError: the file cannot be written, for example because the disk is full. Its former content stays.
    """
    with replacing(path) as partial:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write a file or a folder at; at the end it takes the place of `path`.

    Whoever uses it makes the file, or the folder with everything in it. After an exception, what was written is removed
    and `path` is as it was.

    Raises:
      OSError: it cannot be written or put in its place, for example because the disk is full.
    """
    partial = path.with_name(path.name + PARTIAL)
    recover(path)
    try:
        yield partial
        _sync_tree(partial)
        if partial.is_dir() and path.is_dir():
            _swap(partial, path)
        else:
            partial.replace(path)
        _sync(path.parent)
    finally:
        _remove(partial)


def recover(path: Path) -> None:
    """Clear up after a process that was killed while it wrote `path`: remove remains, restore a folder moved away."""
    _remove(path.with_name(path.name + PARTIAL))
    outdated = path.with_name(path.name + OUTDATED)
    if outdated.is_dir() and not path.exists():
        outdated.replace(path)
    _remove(outdated)


def is_remains(path: Path) -> bool:
    """Return whether the name is that of something unfinished: a file or folder that the next writer removes."""
    return path.name.endswith((PARTIAL, OUTDATED))


def _swap(new: Path, old: Path) -> None:
    """Put one folder in the place of another. On Linux in one operation; elsewhere `recover` mends a crash between."""
    if not _exchange(new, old):
        outdated = old.with_name(old.name + OUTDATED)
        old.replace(outdated)
        try:
            new.replace(old)
        except OSError:
            outdated.replace(old)
            raise
        _remove(outdated)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two paths in one operation; False where the system or the file system has no such operation."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if renameat2(here, os.fsencode(a), here, os.fsencode(b), swap) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(b))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_tree(path: Path) -> None:
    """Have the disk hold a file, or a folder and all files in it."""
    if path.is_dir():
        for inner in path.iterdir():
            _sync_tree(inner)
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():  # some cannot sync folders
            raise
    finally:
        os.close(descriptor)


# ---- appended lines -----------------------------------------------------------------------------------------------


class Lines:
    """A file of lines to append to. A context manager.

    A line that is cut off at the end of the file, left by a process that was killed, is removed when the file is
    opened, so that every line of the file is whole. Several processes may append to one file by turns.

    Args:
      path: the file; made if it does not exist. Its folder must exist.
      exclusive: hold the file until `close`; a second writer is refused.
      sync: wait until the disk holds every line.

    Raises:
      BlockingIOError: `exclusive`, and another process holds the file.
      OSError: the file cannot be opened.
    """

    def __init__(self, path: Path, *, exclusive: bool = False, sync: bool = True):
        self._path, self._exclusive, self._wait = path, exclusive, sync
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            if exclusive:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with self._turn():
                _end_at_whole_line(self._descriptor)
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> "Lines":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def append(self, line: str) -> None:
        """Append a line, whole or not at all.

        Raises:
          ValueError: the text has a line break.
          OSError: it could not be written, for example because the disk is full. The file is as it was before.
        """
        if "\n" in line:
            raise ValueError(f"a line must not have a line break: {line[:60]!r}")
        data = memoryview((line + "\n").encode())
        with self._turn():
            before = _end_at_whole_line(self._descriptor)
            try:
                while data:  # a short write is followed by another, which says what is wrong
                    data = data[os.write(self._descriptor, data) :]
                if self._wait:
                    os.fsync(self._descriptor)
            except OSError as error:
                os.ftruncate(self._descriptor, before)
                raise OSError(
                    error.errno, f"{os.strerror(error.errno)}: a line could not be added", str(self._path)
                ) from error

    def close(self) -> None:
        """Close the file and let go of it. May be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Hold the file among several writers."""
        if self._exclusive:
            yield
            return
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)


def _end_at_whole_line(descriptor: int) -> int:
    """Cut off an unfinished line at the end of a file; return its length."""
    end = os.fstat(descriptor).st_size
    start = end
    while start:
        step = min(start, 2**16)
        block = os.pread(descriptor, step, start - step)
        if (found := block.rfind(b"\n")) >= 0:
            start += found + 1 - step
            break
        start -= step
    if start < end:
        os.ftruncate(descriptor, start)
    return start


# ---- locks --------------------------------------------------------------------------------------------------------


class LockedError(OSError):
    """A folder that another process writes to."""


class Lock:
    """The right to write to a folder. A context manager; within one process it may be taken again.

    The operating system holds the lock for the process, so that it ends with the process, however that ends.

    Args:
      folder: made if it does not exist.

    Raises:
      LockedError: another process holds it; names the process.
    """

    _held: dict[Path, tuple[int, int]] = {}  # noqa: RUF012 - one for the process
    _guard = threading.Lock()

    def __init__(self, folder: Path):
        self._folder = folder

    def __enter__(self) -> "Lock":
        self._folder.mkdir(parents=True, exist_ok=True)
        self._key = self._folder.resolve()
        with self._guard:
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
            else:
                os.close(descriptor)


def _lock(folder: Path) -> int:
    """Lock a folder and note who holds it; return the descriptor that keeps the lock."""
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _holder(os.pread(descriptor, 4096, 0))
        os.close(descriptor)
        raise LockedError(f"{folder} is in use by {holder}: wait until it has ended, or stop it") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
            os.close(descriptor)
            raise
        warnings.warn(f"{folder} is on a file system without locks: no second run there is noticed", stacklevel=4)
    told = {"pid": os.getpid(), "host": socket.gethostname(), "command": " ".join(sys.argv)[:1000]}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, (json.dumps(told) + "\n").encode(), 0)
    return descriptor


def _holder(note: bytes) -> str:
    try:
        told = json.loads(note)
        return f"process {int(told['pid'])} on {told['host']} ({told['command']})"
    except (ValueError, KeyError, TypeError):
        return "another process"
