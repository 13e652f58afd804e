"""Expand paths in flags as all commands do: `~`, `~user`, `$VAR` and `${VAR}`. Check origins of pages."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable
from typing import Annotated, Any, NamedTuple

from jsae.settings import ConfigError, require


class Location(NamedTuple):
    """Mark of a flag that holds paths of files or folders."""

    words: tuple[str, ...] = ()
    """Values that are not paths and stay unchanged."""
    listed: bool = False
    """Whether it is a comma-separated list of paths and globs."""
    staged: bool = False
    """Whether it is `[NAME=]PATH[@STEP]`, or the number of a step alone."""


FilePath = Annotated[str, Location()]
"""A file or a folder."""
Checkpoint = Annotated[str, Location(words=("demo",))]
"""A nanochat checkpoint, or `demo`."""
Stage = Annotated[str, Location(words=("demo",), staged=True)]
"""A checkpoint of several as `[NAME=]PATH[@STEP]`, or the number of another step of the path before."""
Data = Annotated[str, Location(words=("stdlib", "stdlib_chats"), listed=True)]
"""Text: paths and globs, comma-separated, or `stdlib` or `stdlib_chats`."""

_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})", re.ASCII)
STAGE = re.compile(r"(?:(?P<name>[^/=@]*)=)?(?P<path>.*?)(?:@(?P<step>\d{1,18}))?", re.ASCII | re.DOTALL)
"""The parts of a `Stage` that is no number."""
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://")


def expand(path: str) -> str:
    """Return a path with `~`, `~user`, `$VAR` and `${VAR}` replaced; a relative path stays relative.

    If a user or a variable is unknown, a path that exists as written stays unchanged.

    Raises:
      ConfigError: a user is unknown, a variable is not set, or the path is invalid on all file systems.
    """
    require("\0" not in path, f"the path {path!r} holds a zero byte")
    try:
        path.encode()
    except UnicodeEncodeError:
        require(False, f"the path {path!r} is not UTF-8: rename it")
    try:
        return _home(_VARIABLE.sub(functools.partial(_value, path), path))
    except ConfigError:
        if os.path.lexists(path):
            return path
        raise


def _value(path: str, match: re.Match[str]) -> str:
    name = match[1] or match[2]
    require(name in os.environ, f"the path {path!r} names the environment variable {name}, which is not set")
    return os.environ[name]


def _home(path: str) -> str:
    expanded = os.path.expanduser(path)  # noqa: PTH111 - pathlib raises RuntimeError, and would turn ./x into x
    user = path.split("/")[0]
    require(
        expanded != path or not path.startswith("~"), f"the path {path!r} names the home of {user}, an unknown user"
    )
    return expanded


def expand_fields(config: Any) -> None:
    """Expand in place the fields of a frozen dataclass that are marked with `Location`.

    Raises:
      ConfigError: see `expand`; names the field.
    """
    for name, location in _locations(type(config)).items():  # type: ignore[arg-type]
        value = getattr(config, name)
        try:
            object.__setattr__(config, name, _each(value, location, expand))
        except ConfigError as error:
            raise ConfigError(f"--{name}: {error}") from None


def absolute_fields(config_class: type, values: dict[str, Any], resolve: bool = False) -> dict[str, Any]:
    """Return the fields of a config, as JSON values, with absolute paths.

    Args:
      config_class: the dataclass.
      values: its fields by name; other entries stay unchanged.
      resolve: whether to follow symbolic links, so that two spellings of one path are equal.
    """
    absolute = os.path.realpath if resolve else _absolute
    locations = _locations(config_class)

    def changed(name: str, value: Any) -> Any:
        return _each(value, locations[name], absolute) if name in locations else value

    return {name: changed(name, value) for name, value in values.items()}


def _absolute(path: str) -> str:
    # The meaning of `..` depends on symbolic links.
    return os.path.realpath(path) if ".." in path.split("/") else os.path.abspath(path)  # noqa: PTH100


def _each(value: Any, location: Location, change: Callable[[str], str]) -> Any:
    """Apply `change` to every path of a field's value."""
    if isinstance(value, (tuple, list)):
        return type(value)(_each(item, location, change) for item in value)
    if not isinstance(value, str) or not value:
        return value
    if location.listed:
        return ",".join(_changed(part.strip(), location, change) for part in value.split(","))
    if location.staged and not value.isdecimal() and (parts := STAGE.fullmatch(value)):
        start, end = parts.span("path")
        return value[:start] + _changed(parts["path"], location, change) + value[end:]
    return _changed(value, location, change) if not location.staged else value


def _changed(path: str, location: Location, change: Callable[[str], str]) -> str:
    return path if not path or path in location.words or _ADDRESS.match(path) else change(path)


def listed_fields(config_class: type) -> set[str]:
    """Return the names of the fields that hold comma-separated lists of paths."""
    return {name for name, location in _locations(config_class).items() if location.listed}


@functools.cache
def _locations(config_class: type) -> dict[str, Location]:
    """Return the marks of a dataclass's fields, by name."""
    hints = typing.get_type_hints(config_class, include_extras=True)
    marks = {field.name: next(iter(_marks(hints[field.name])), None) for field in dataclasses.fields(config_class)}
    return {name: location for name, location in marks.items() if location is not None}


def _marks(hint: Any) -> Iterable[Location]:
    """Yield the marks anywhere in a type, such as `FilePath`, `FilePath | None` and `tuple[FilePath, ...]`."""
    if typing.get_origin(hint) is Annotated:
        yield from (mark for mark in hint.__metadata__ if isinstance(mark, Location))
    elif typing.get_origin(hint) in (typing.Union, types.UnionType, tuple):
        for part in typing.get_args(hint):
            yield from _marks(part)


_ORIGIN = re.compile(r"https?://[a-z0-9.-]+(:\d{1,5})?", re.IGNORECASE)


def check_origins(origins: Collection[str]) -> None:
    """Raise ConfigError for what is not an origin of pages: http or https, a host, perhaps a port."""
    for origin in origins:
        valid = _ORIGIN.fullmatch(origin) is not None
        require(valid, f"{origin[:100]!r} is not an origin: give one such as https://blog.example")
