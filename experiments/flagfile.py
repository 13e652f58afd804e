"""Flags from files: `--flagfile=FILE`, which may name further files."""

from __future__ import annotations

import codecs
import os
from collections.abc import Sequence
from pathlib import Path

from bridge.locations import expand
from jsae.settings import ConfigError, require

_MAX_BYTES = 2**20  # of a file
_MAX_FILES = 1000  # on one command line
_MAX_DEPTH = 100
_BOMS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def inline(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with every `--flagfile=FILE` replaced by the flags in the file.

    A line is one flag. Empty lines and lines that begin with `#` or `//` are skipped. Files are UTF-8, or begin with a
    byte order mark; relative paths are relative to the working directory.

    Raises:
      ConfigError: a file that cannot be read, is not text or includes itself, or too many files.
    """
    flags: list[str] = []
    waiting: list[tuple[str, tuple[Path, ...]]] = [(argument, ()) for argument in reversed(arguments)]
    files = 0
    while waiting:
        argument, above = waiting.pop()
        name, given, value = argument.partition("=")
        if name not in ("--flagfile", "-flagfile"):
            flags.append(argument)
            continue
        if not given:
            require(bool(waiting) and not above, "--flagfile needs the name of a file: --flagfile=FILE")
            value = waiting.pop()[0]
        path, files = Path(_expanded(value)), files + 1
        require(files <= _MAX_FILES, f"--flagfile={value} is file {files} of flags: at most {_MAX_FILES} are read")
        _check_nesting(path, above)
        waiting += [(line, (*above, _real(path))) for line in reversed(_lines(path))]
    return flags


def _expanded(value: str) -> str:
    require(bool(value), "--flagfile needs the name of a file: --flagfile=FILE")
    try:
        return expand(value)
    except ConfigError as error:
        raise ConfigError(f"--flagfile: {error}") from None


def _check_nesting(path: Path, above: tuple[Path, ...]) -> None:
    require(
        _real(path) not in above,
        f"--flagfile={path} includes itself" + (f" by way of {above[-1]}" if len(above) > 1 else ""),
    )
    require(
        len(above) < _MAX_DEPTH, f"--flagfile={path} is included by {len(above)} files in a chain: at most {_MAX_DEPTH}"
    )


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # resolve() raises for names that no file can have


def _lines(path: Path) -> list[str]:
    """Return the flags in a file."""
    try:
        require(not path.is_dir(), f"--flagfile={path} is a directory: give a file with one flag per line")
        require(
            path.is_file() or not path.exists(),
            f"--flagfile={path} is not a plain file: give a file with one flag per line",
        )
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"--flagfile={path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    require(len(data) <= _MAX_BYTES, f"--flagfile={path} is larger than {_MAX_BYTES} bytes: it is not a file of flags")
    encoding = next((name for mark, name in _BOMS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ConfigError(f"--flagfile={path} is not text in {encoding.upper()}: {error.reason}") from None
    require("\0" not in text, f"--flagfile={path} contains zero bytes: it is not a file of flags")
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith(("#", "//"))]
