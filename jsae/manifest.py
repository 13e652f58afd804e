"""A list of a folder's files with their sizes and digests, kept in the folder, to find the file that is damaged."""

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from jsae import files, jsons

NAME = "manifest.json"
"""Name of the list in its folder."""

_LARGEST = 64 * 2**20
"""Largest JSON file that is read, in bytes."""


class DamagedError(OSError):
    """A file is missing, unreadable or has changed since it was written; the message names it."""


def write(folder: Path, late: frozenset[str] = frozenset()) -> None:
    """Write the list of all files in a folder. An earlier list is replaced.

    Args:
      folder: the folder.
      late: names of files to leave out, because they will change again.

    Raises:
      OSError: a file cannot be read, or the list cannot be written.
    """
    _save(folder, {name: _entry(folder / name) for name in _names(folder) - late})


def complete(folder: Path) -> None:
    """Add files that were created after `write`; the others are not read again.

    Raises:
      DamagedError: the list is damaged.
      OSError: a file cannot be read, or the list cannot be written.
    """
    entries = _load(folder)
    new = {name: _entry(folder / name) for name in _names(folder) - set(entries)}
    if new:
        _save(folder, entries | new)


def check(folder: Path, late: frozenset[str] = frozenset()) -> bool:
    """Compare the files of a folder with its list; return whether there is a list.

    Every file is opened even without a list, so that missing permissions are found at once.

    Args:
      folder: the folder.
      late: names of files that may exist without being listed.

    Raises:
      DamagedError: a file is missing, unlisted, or has another size or content, or the list itself is damaged.
      OSError: a file cannot be opened (permissions, too many open files).
    """
    names = _names(folder)
    listed = (folder / NAME).is_file()
    entries = _load(folder) if listed else dict.fromkeys(names)
    for name in sorted(set(entries) - names):
        raise DamagedError(f"{folder / name} is missing")
    for name in sorted(names - set(entries) - late):
        raise DamagedError(f"{folder / name} is not in the list of files")
    for name, entry in sorted(entries.items()):
        _check(folder / name, entry)
    return listed


def _check(path: Path, entry: dict[str, Any] | None) -> None:
    """Compare a file with its entry; without one, only open it."""
    if not path.is_file():
        raise DamagedError(f"{path} is not a file")
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if entry is not None and size != entry["size"]:
                raise DamagedError(f"{path} has {size:,} bytes, but {entry['size']:,} were written")
            if entry is not None and _digest(file) != entry["sha256"]:
                raise DamagedError(f"{path} is damaged: its digest does not match")
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOENT, errno.ESTALE):
            raise DamagedError(f"{path} cannot be read: {error.strerror}") from error
        raise


def read_json(path: Path) -> Any:
    """Return the value in a JSON file.

    Raises:
      DamagedError: the file is missing, too large, not JSON or nested too deeply.
      OSError: the file cannot be opened.
    """
    try:
        size = path.stat().st_size
        if size > _LARGEST:
            raise DamagedError(f"{path} has {size:,} bytes; at most {_LARGEST:,} are expected")
        return jsons.loads(path.read_bytes())
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise DamagedError(f"{path} is missing") from error
    except ValueError as error:
        raise DamagedError(f"{path} is not JSON: {str(error)[:200]}") from error


def json_digest(value: Any) -> str:
    """Return the SHA-256 digest of a JSON value, equal for equal values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _names(folder: Path) -> set[str]:
    """Return the paths of all files below a folder, relative to it, except hidden ones (`.DS_Store`, `.nfs1`).

    Symbolic links count as files. Raises OSError.
    """

    def stop(error: OSError) -> None:
        raise error

    paths = set()
    for inner, folders, names in os.walk(folder, onerror=stop):
        links = [name for name in folders if Path(inner, name).is_symlink()]
        paths |= {Path(inner, name).relative_to(folder).as_posix() for name in (*names, *links)}
    paths -= {NAME, NAME + files.PARTIAL}
    return {name for name in paths if not name.rpartition("/")[2].startswith(".")}


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": os.fstat(file.fileno()).st_size, "sha256": _digest(file)}


def _digest(file: Any) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _save(folder: Path, entries: dict[str, Any]) -> None:
    files.write(folder / NAME, _text(entries))


def _text(entries: dict[str, Any]) -> str:
    return json.dumps({"files": entries, "sha256": json_digest(entries)}, indent=1, sort_keys=True) + "\n"


def _load(folder: Path) -> dict[str, Any]:
    path = folder / NAME
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(entries := content.get("files"), dict):
        raise DamagedError(f"{path} is not a list of files")
    if path.read_bytes() != _text(entries).encode():
        raise DamagedError(f"{path} is damaged: its digest does not match")
    return entries
