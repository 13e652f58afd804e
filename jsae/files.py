"""Atomic writing of files and folders, checked appends, and locks of folders.

A process may be killed, or the disk may fill, between any two of these operations. Files and folders with a final name
are always complete. Partial ones have names that end in `.partial`; readers skip them (`is_remains`) and the next
writer removes them. Only one process may write to a folder at a time: commands hold its `Lock`. POSIX only, standard
library only.
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
"""Suffix of a folder that is being replaced, on file systems that cannot swap two folders."""

_SUFFIXES = (PARTIAL, OUTDATED, ".unfinished")  # the last one was used by earlier versions
_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
_SYSTEM = (*_WRITING, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM, errno.ESTALE)
_MANY = 64  # files above which one sync of the file system is cheaper than one per file


# ---- files and folders --------------------------------------------------------------------------------------------


def write(path: Path, data: bytes | str) -> None:
    """Write a file atomically: after a crash at any moment it contains its previous content or all of `data`.

    Args:
      path: the file; its folder must exist.
      data: bytes, or text, which is encoded in UTF-8.

    Raises:
      OSError: the file cannot be written, for example because the disk is full. Its previous content remains.
    """
    with replacing(path) as partial:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a new file or folder, which replaces `path` at the end.

    The caller creates the file, or the folder with its contents. After an exception it is removed, and `path` is
    unchanged.

    Raises:
      OSError: the file cannot be written or renamed, for example because the disk is full; names the path. Errors of
        libraries that hide such an OSError (safetensors, torch, numpy) are raised as one.
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
    """Yield a new, empty folder, which replaces `path` at the end. Parent folders are created.

    Args:
      path: the folder.
      keep: a function of a file's path relative to the old folder; files for which it returns True are kept, unless the
        new folder has one of the same name.

    Raises:
      OSError: see `replacing`.
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
    """Clean up after a process that was killed while it wrote `path`: remove partial files, restore a moved folder."""
    outdated = path.with_name(path.name + OUTDATED)
    if outdated.is_dir() and not path.exists():
        outdated.replace(path)
    for suffix in _SUFFIXES:
        _remove(path.with_name(path.name + suffix))


def clear(folder: Path, *patterns: str) -> None:
    """Clean up after killed processes that wrote files or folders with matching names directly in a folder.

    Files with other names are not touched. No other process may be writing there.
    """
    for pattern, suffix in itertools.product(patterns, _SUFFIXES):
        for path in sorted(folder.glob(pattern + suffix)):
            recover(path.with_name(path.name.removesuffix(suffix)))


def is_remains(path: Path) -> bool:
    """Return whether a path has the name of a partial file or folder, which the next writer removes."""
    return path.name.endswith(_SUFFIXES)


def is_system_error(error: BaseException) -> bool:
    """Return whether the system caused an error (too many open files, no permission, a failing or full disk).

    Readers of files must not report such an error as a damaged file.
    """
    return isinstance(error, OSError) and error.errno in _SYSTEM


def _write_error(error: Exception, path: Path) -> OSError | None:
    """Return the OSError that caused a failed write, with the path; None if there is none or it already has a path."""
    link: BaseException | None = error
    while link is not None:  # torch.save raises a RuntimeError while it handles the OSError
        if isinstance(link, OSError) and link.errno in _WRITING:
            return None if link is error and link.filename else OSError(link.errno, os.strerror(link.errno), str(path))
        link = link.__cause__ or link.__context__
    match = re.search(r"\(os error (\d+)\)", str(error))  # libraries written in Rust
    if match and int(match[1]) in _SYSTEM:
        return OSError(int(match[1]), os.strerror(int(match[1])), str(path))
    if type(error) is OSError and re.fullmatch(r"\d+ requested and \d+ written", str(error)):  # numpy's tofile
        return OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({error})", str(path))
    return None


def _swap(new: Path, old: Path) -> None:
    """Replace a folder by another: atomically on Linux; elsewhere `recover` repairs the result of a crash."""
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
    """Exchange two paths atomically; return False if the system or the file system does not support it."""
    at_fdcwd, rename_exchange = -100, 2
    return _libc("renameat2", b, at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), rename_exchange)


def _libc(name: str, path: Path, *arguments: int | bytes) -> bool:
    """Call a function of Linux's C library; return False if it does not exist. Raises OSError if it fails."""
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
    """Create a hard link to a file, or copy it if the file system has no hard links."""
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
    """Flush a file, or a folder and all files in it, to disk."""
    contents = [file for file in path.rglob("*") if not file.is_symlink()] if path.is_dir() else []
    if len(contents) > _MANY and _sync_file_system(path):
        return
    for file in (*contents, path):
        _sync(file)


def _sync_file_system(path: Path) -> bool:
    """Flush the file system that contains a path to disk; return False if that is not supported."""
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
        # Some file systems cannot flush folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
    finally:
        os.close(descriptor)


# ---- appended data ------------------------------------------------------------------------------------------------


def append(path: Path, data: bytes) -> None:
    """Append bytes to a file, all of them or none; the file is created if missing.

    Raises:
      OSError: the bytes cannot be written, for example because the disk is full. The file is unchanged.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        with _locked(descriptor):
            _append(descriptor, path, os.fstat(descriptor).st_size, data, sync=False)
    finally:
        os.close(descriptor)


class Lines:
    """A file to which lines are appended. A context manager.

    Every line of the file is complete: a partial line at its end, left by a process that was killed, is handled before
    a line is appended. Several processes may append to the same file.

    Args:
      path: the file, created if missing. Its folder must exist.
      exclusive: lock the file until `close`, so that a second writer is refused.
      sync: flush every line to disk.
      torn: what to do with a partial last line: "cut" removes it, "keep" ends it, for files that people edit too.

    Raises:
      BlockingIOError: `exclusive` is set, and another process has locked the file.
      OSError: the file cannot be opened.
    """

    def __init__(self, path: Path, *, exclusive: bool = False, sync: bool = True, torn: Literal["cut", "keep"] = "cut"):
        self._path, self._exclusive, self._flush, self._torn = path, exclusive, sync, torn
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            if exclusive:
                flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if torn == "cut":
                with self._lock():
                    _cut_partial_line(self._descriptor)
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
        """Append a line completely or not at all.

        Raises:
          ValueError: the text contains a line break.
          OSError: the line cannot be written, for example because the disk is full. The file is unchanged.
        """
        if "\n" in line:
            raise ValueError(f"a line must not contain a line break, got {line[:60]!r}")
        data = (line + "\n").encode()
        with self._lock():
            if self._torn == "cut":
                end = _cut_partial_line(self._descriptor)
            else:
                end = os.fstat(self._descriptor).st_size
                data = data if _ends_with_line_break(self._descriptor, end) else b"\n" + data
            _append(self._descriptor, self._path, end, data, sync=self._flush)

    def close(self) -> None:
        """Close and unlock the file. May be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _lock(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._exclusive else _locked(self._descriptor)


def _append(descriptor: int, path: Path, end: int, data: bytes, sync: bool) -> None:
    """Write at the end of a file of `end` bytes; if that fails, restore its length."""
    remaining = memoryview(data)
    try:
        while remaining:  # after a short write, the next one raises the error
            remaining = remaining[os.write(descriptor, remaining) :]
        if sync:
            os.fsync(descriptor)
    except OSError as error:
        os.ftruncate(descriptor, end)
        raise OSError(error.errno, f"{os.strerror(error.errno)}: nothing was appended", str(path)) from error


def _cut_partial_line(descriptor: int) -> int:
    """Remove a partial line at the end of a file; return the length of the file."""
    end = os.fstat(descriptor).st_size
    start = end
    while start:
        size = min(start, 2**16)
        block = os.pread(descriptor, size, start - size)
        if (index := block.rfind(b"\n")) >= 0:
            start += index + 1 - size
            break
        start -= size
    if start < end:
        os.ftruncate(descriptor, start)
    return start


def _ends_with_line_break(descriptor: int, size: int) -> bool:
    return size == 0 or os.pread(descriptor, 1, size - 1) == b"\n"


@contextlib.contextmanager
def _locked(descriptor: int) -> Iterator[None]:
    """Lock a file against other processes that append to it."""
    flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        flock(descriptor, fcntl.LOCK_UN)
