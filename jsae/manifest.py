"""A list of the files of a folder with their sizes and digests, kept in the folder: damage is named by its file."""

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
"""Bytes of a JSON file that is read at all."""


class DamagedError(OSError):
    """A file that is missing, unreadable or not as it was written; the message names it."""


def write(folder: Path, late: frozenset[str] = frozenset()) -> None:
    """Write the list of all files that are in the folder now. An earlier list is replaced.

    Args:
      folder: the folder.
      late: names of files that are left out, because they will change once more.

    Raises:
      OSError: a file cannot be read, or the list cannot be written.
    """
    _save(folder, {name: _entry(folder / name) for name in _names(folder) - late})


def complete(folder: Path) -> None:
    """Add files that have come into the folder since `write`; the others are not read again.

    Raises:
      DamagedError: the list is not one that `write` made.
      OSError: a file cannot be read, or the list cannot be written.
    """
    entries = _load(folder)
    new = {name: _entry(folder / name) for name in _names(folder) - set(entries)}
    if new:
        _save(folder, entries | new)


def check(folder: Path, late: frozenset[str] = frozenset()) -> bool:
    """Compare the files of a folder with its list; return whether there is one.

    Every file is opened even where no list exists, so that one that must not be read is found at once.

    Args:
      folder: the folder.
      late: names of files that may be there without being listed.

    Raises:
      DamagedError: a file is missing, additional, of another size or of other content, or the list itself is damaged.
      OSError: a file must not be read (permissions), or too many are open.
    """
    names = _names(folder)
    listed = (folder / NAME).is_file()
    entries = _load(folder) if listed else dict.fromkeys(names)
    for name in sorted(set(entries) - names):
        raise DamagedError(f"{folder / name} is missing")
    for name in sorted(names - set(entries) - late):
        raise DamagedError(f"{folder / name} is a file that was not written with the others")
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
                raise DamagedError(f"{path} has {size:,} bytes, and {entry['size']:,} were written")
            if entry is not None and _digest(file) != entry["sha256"]:
                raise DamagedError(f"{path} is not what was written: its digest is another")
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOENT, errno.ESTALE):
            raise DamagedError(f"{path} cannot be read: {error.strerror}") from error
        raise


def read_json(path: Path) -> Any:
    """Return what a JSON file holds.

    Raises:
      DamagedError: it is missing, too large, not JSON or nested too deeply.
      OSError: it must not be read.
    """
    try:
        size = path.stat().st_size
        if size > _LARGEST:
            raise DamagedError(f"{path} has {size:,} bytes: such a file has at most {_LARGEST:,}")
        return jsons.loads(path.read_bytes())
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise DamagedError(f"{path} is missing") from error
    except ValueError as error:
        raise DamagedError(f"{path} is not JSON: {str(error)[:200]}") from error


def canonical(value: Any) -> str:
    """Return the digest of JSON values, the same for equal values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _names(folder: Path) -> set[str]:
    """Return the paths of all files below a folder, relative to it, but for hidden ones (`.DS_Store`, `.nfs1`).

    A link counts as a file. Raises OSError.
    """

    def stop(error: OSError) -> None:
        raise error

    found = set()
    for inner, folders, names in os.walk(folder, onerror=stop):
        links = [name for name in folders if Path(inner, name).is_symlink()]
        found |= {Path(inner, name).relative_to(folder).as_posix() for name in (*names, *links)}
    found -= {NAME, NAME + files.PARTIAL}
    return {name for name in found if not name.rpartition("/")[2].startswith(".")}


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": os.fstat(file.fileno()).st_size, "sha256": _digest(file)}


def _digest(file: Any) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _save(folder: Path, entries: dict[str, Any]) -> None:
    files.write(folder / NAME, _text(entries))


def _text(entries: dict[str, Any]) -> str:
    return json.dumps({"files": entries, "sha256": canonical(entries)}, indent=1, sort_keys=True) + "\n"


def _load(folder: Path) -> dict[str, Any]:
    path = folder / NAME
    listed = read_json(path)
    if not isinstance(listed, dict) or not isinstance(entries := listed.get("files"), dict):
        raise DamagedError(f"{path} is not a list of files")
    if path.read_bytes() != _text(entries).encode():
        raise DamagedError(f"{path} is not what was written: its digest is another")
    return entries
