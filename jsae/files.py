"""Atomic files and folders, checked appends, and locks of folders.

A process may be killed, or the disk may fill, between any two of these operations. What stands under a final name is
complete; what is being written stands under a name that ends in `.partial`, which readers skip (`is_remains`) and the
next writer removes. One process writes to a folder at a time: commands hold its `Lock`. POSIX only; standard library
only.
"""

import contextlib
import ctypes
import errno
import fcntl
import itertools
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Literal

from jsae.locks import LOCK, Lock, LockedError, flock

__all__ = [
    "LOCK",
    "OUTDATED",
    "PARTIAL",
    "Lines",
    "Lock",
    "LockedError",
    "append",
    "clear",
    "is_remains",
    "is_system_error",
    "recover",
    "replacing",
    "replacing_folder",
    "write",
]

PARTIAL = ".partial"
"""Suffix of a file or folder that is being written."""
OUTDATED = ".outdated"
"""Suffix of a folder that is being replaced, where the file system cannot swap two folders."""

_SUFFIXES = (PARTIAL, OUTDATED, ".unfinished")  # the last of earlier versions
_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
_SYSTEM = (*_WRITING, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM, errno.ESTALE)
_MANY = 64  # files above which one sync of the file system is cheaper than one per file


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
      OSError: it cannot be written or put in its place, for example because the disk is full; names the path. Errors
        of libraries that hide such an OSError (safetensors, torch, numpy) are raised as one.
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
    except Exception as error:
        if (cause := _write_error(error, path)) is not None:
            raise cause from error
        raise
    finally:
        _remove(partial)


@contextlib.contextmanager
def replacing_folder(path: Path, keep: Callable[[Path], bool] = lambda inner: False) -> Iterator[Path]:
    """Yield a new, empty folder to write into; at the end it takes the place of `path`. Parents are made.

    Args:
      path: the folder.
      keep: takes the path of a file relative to the former folder; files for which it is true stay, unless the new
        folder has one of that name.

    Raises:
      OSError: as `replacing`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.mkdir()
        yield partial
        for file in sorted(path.rglob("*")) if path.is_dir() else ():
            inner = file.relative_to(path)
            if file.is_file() and keep(inner) and not (partial / inner).exists():
                (partial / inner).parent.mkdir(parents=True, exist_ok=True)
                _link(file, partial / inner)


def recover(path: Path) -> None:
    """Clear up after a process that was killed while it wrote `path`: remove remains, restore a folder moved away."""
    outdated = path.with_name(path.name + OUTDATED)
    if outdated.is_dir() and not path.exists():
        outdated.replace(path)
    for suffix in _SUFFIXES:
        _remove(path.with_name(path.name + suffix))


def clear(folder: Path, *patterns: str) -> None:
    """Clear up after killed processes that wrote files or folders with names like these directly in a folder.

    Others' files stay, whatever their suffix is. Nobody else may be writing there.
    """
    for pattern, suffix in itertools.product(patterns, _SUFFIXES):
        for path in sorted(folder.glob(pattern + suffix)):
            recover(path.with_name(path.name.removesuffix(suffix)))


def is_remains(path: Path) -> bool:
    """Return whether the name is that of something unfinished: a file or folder that the next writer removes."""
    return path.name.endswith(_SUFFIXES)


def is_system_error(error: BaseException) -> bool:
    """Return whether an error is the system's (too many open files, no permission, a failing or full disk).

    Whoever reads a file must not take such an error for one of the file's content.
    """
    return isinstance(error, OSError) and error.errno in _SYSTEM


def _write_error(error: Exception, path: Path) -> OSError | None:
    """Return the OSError behind a failed write, with its path; None where the error is another or names a path."""
    link: BaseException | None = error
    while link is not None:  # torch.save raises a RuntimeError while it handles the OSError
        if isinstance(link, OSError) and link.errno in _WRITING:
            return None if link is error and link.filename else OSError(link.errno, os.strerror(link.errno), str(path))
        link = link.__cause__ or link.__context__
    found = re.search(r"\(os error (\d+)\)", str(error))  # libraries in Rust
    if found and int(found[1]) in _SYSTEM:
        return OSError(int(found[1]), os.strerror(int(found[1])), str(path))
    if type(error) is OSError and re.fullmatch(r"\d+ requested and \d+ written", str(error)):  # numpy's tofile
        return OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({error})", str(path))
    return None


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
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return _libc("renameat2", b, here, os.fsencode(a), here, os.fsencode(b), swap)


def _libc(name: str, path: Path, *arguments: int | bytes) -> bool:
    """Call a function of Linux's C library; False where there is none. Raises OSError where it fails."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        function = getattr(ctypes.CDLL(None, use_errno=True), name)
    except (OSError, AttributeError):
        return False
    if function(*arguments) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(path))


def _link(file: Path, new: Path) -> None:
    """Give a file a second name, or copy it where the file system has no hard links."""
    try:
        os.link(file, new, follow_symlinks=False)
    except OSError:
        shutil.copy2(file, new, follow_symlinks=False)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_tree(path: Path) -> None:
    """Have the disk hold a file, or a folder and all files in it."""
    inner = [file for file in path.rglob("*") if not file.is_symlink()] if path.is_dir() else []
    if len(inner) > _MANY and _sync_file_system(path):
        return
    for file in (*inner, path):
        _sync(file)


def _sync_file_system(path: Path) -> bool:
    """Have the disk hold everything of the file system that a path lies in; False where that is not possible."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return _libc("syncfs", path, descriptor)
    finally:
        os.close(descriptor)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():  # some cannot sync folders
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
    finally:
        os.close(descriptor)


# ---- appended data ------------------------------------------------------------------------------------------------


def append(path: Path, data: bytes) -> None:
    """Append bytes to a file, all of them or none; the file is made if it does not exist.

    Raises:
      OSError: they cannot be written, for example because the disk is full. The file is as it was before.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        with _turn(descriptor):
            _append(descriptor, path, os.fstat(descriptor).st_size, data, sync=False)
    finally:
        os.close(descriptor)


class Lines:
    """A file of lines to append to. A context manager.

    Every line of the file is whole: an unfinished line at its end, left by a process that was killed, is dealt with
    before anything is added. Several processes may append to one file by turns.

    Args:
      path: the file; made if it does not exist. Its folder must exist.
      exclusive: hold the file until `close`; a second writer is refused.
      sync: wait until the disk holds every line.
      torn: cut off an unfinished line, or keep it as a line of its own, for a file that people edit too.

    Raises:
      BlockingIOError: `exclusive`, and another process holds the file.
      OSError: the file cannot be opened.
    """

    def __init__(self, path: Path, *, exclusive: bool = False, sync: bool = True, torn: Literal["cut", "keep"] = "cut"):
        self._path, self._exclusive, self._wait, self._torn = path, exclusive, sync, torn
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            if exclusive:
                flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if torn == "cut":
                with self._hold():
                    _end_at_whole_line(self._descriptor)
        except BaseException:
            self.close()
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
        data = (line + "\n").encode()
        with self._hold():
            if self._torn == "cut":
                end = _end_at_whole_line(self._descriptor)
            else:
                end = os.fstat(self._descriptor).st_size
                data = data if _ends_with_line_break(self._descriptor, end) else b"\n" + data
            _append(self._descriptor, self._path, end, data, sync=self._wait)

    def close(self) -> None:
        """Close the file and let go of it. May be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _hold(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._exclusive else _turn(self._descriptor)


def _append(descriptor: int, path: Path, end: int, data: bytes, sync: bool) -> None:
    """Write at the end of a file that is `end` bytes long; cut off what was written when that fails."""
    rest = memoryview(data)
    try:
        while rest:  # a short write is followed by another, which says what is wrong
            rest = rest[os.write(descriptor, rest) :]
        if sync:
            os.fsync(descriptor)
    except OSError as error:
        os.ftruncate(descriptor, end)
        raise OSError(error.errno, f"{os.strerror(error.errno)}: nothing was added", str(path)) from error


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


def _ends_with_line_break(descriptor: int, size: int) -> bool:
    return size == 0 or os.pread(descriptor, 1, size - 1) == b"\n"


@contextlib.contextmanager
def _turn(descriptor: int) -> Iterator[None]:
    """Hold a file among several writers that append to it."""
    flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        flock(descriptor, fcntl.LOCK_UN)
