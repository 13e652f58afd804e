"""Fields of the settings of commands and runs: their help, ranges and paths."""

import dataclasses
import difflib
import functools
import os
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

from bridge import locations
from jsae.settings import ConfigError, Range, check_fields, require

STEP = Range(0, 2**31 - 1, "be a step from 0")
CONTEXT = Range(2, 2**24, f"be 2 to {2**24} tokens, or less where the model takes less")
WATCH_SHARE = Range(1e-6, 1e6, "lie between 1e-6 and 1e6, which is no limit")
LONG_SEED = Range(0, 2**63 - 1, "lie in [0, 2**63)")
InMemory = Literal["all", "one"]
"""Models of several checkpoints that are in memory at the same time."""
ExcludeTokens = Literal["bos", "special", "nothing"]
"""The same as in `bridge.selection`, whose import needs torch."""

Config = TypeVar("Config")


def flag(default: Any, text: str | Callable[[], str], range: Range | None = None) -> Any:
    """Return a dataclass field with a default, the help of its flag, and the range that `settle` checks.

    The help is text, or a function that returns it where that needs an import.
    """
    return dataclasses.field(default=default, metadata={"help": text, "range": range})


def help_text(field: dataclasses.Field) -> str:
    """Return the help of a field; empty if it has none."""
    text = field.metadata.get("help", "")
    return text() if callable(text) else text


def settle(config: Any) -> None:
    """Check the fields of a frozen config and expand its paths in place; every `__post_init__` begins with it.

    Raises:
      ConfigError: a path has an unknown user or variable, a number is out of its range, or a value has another type;
        names the field.
    """
    _check_types(config)
    locations.expand_fields(config)
    check_fields(config)


def from_keywords(config_class: type[Config], values: Mapping[str, Any]) -> Config:
    """Return a config from fields by name, with the value types that are usual in Python code.

    A field of several values accepts one value, a list, a range or an array, and None for no value. Paths become text,
    as do numbers of a field that holds text; numbers of numpy become Python's. A field of comma-separated paths also
    accepts a list of paths. An SAE class stands for its name.

    Raises:
      ConfigError: a name is not a field, or a value is invalid; names the field.
    """
    hints = typing.get_type_hints(config_class)
    for name in values:
        if name not in hints:
            near = difflib.get_close_matches(name, hints, 1)
            hint = f"did you mean {near[0]}?" if near else f"the settings are {', '.join(hints)}"
            raise ConfigError(f"{name} is not a setting of {config_class.__name__}: {hint}")
    lists = locations.listed_fields(config_class)
    return config_class(**{name: _field_value(hints[name], value, name in lists) for name, value in values.items()})


def _field_value(hint: Any, value: Any, joined: bool) -> Any:
    """Return a value converted to the type of its field."""
    value = _plain(value)
    if typing.get_origin(hint) is tuple:
        items = [] if value is None else value if isinstance(value, list | tuple | range) else [value]
        text = typing.get_args(hint)[0] is str
        return tuple(str(_plain(item)) if text else _plain(item) for item in items)
    if joined and isinstance(value, list | tuple):
        return ",".join(str(_plain(item)) for item in value)
    return value


def _plain(value: Any) -> Any:
    """Return a path, a number or array of numpy, or an architecture as a JSON value."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, type):
        return getattr(value, "name", value)
    return value.tolist() if hasattr(value, "tolist") else value


_TYPES = {str: "text", bool: "True or False"}


class _Checked(typing.NamedTuple):
    """A field whose values are text or booleans."""

    name: str
    kind: type
    several: bool
    optional: bool


@functools.cache
def _checked_fields(config_class: type) -> list[_Checked]:
    hints = typing.get_type_hints(config_class)
    checked = []
    for field in dataclasses.fields(config_class):
        hint = hints[field.name]
        kinds = typing.get_args(hint) or (hint,)
        optional = field.default is None or type(None) in kinds
        several = typing.get_origin(hint) is tuple
        checked += [_Checked(field.name, kind, several, optional) for kind in _TYPES if kind in kinds]
    return checked


def _check_types(config: Any) -> None:
    """Check the fields whose values are text or booleans; `check_fields` checks numbers and choices."""
    for field in _checked_fields(type(config)):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if value is None and field.optional:
            continue
        require(not field.several or isinstance(value, tuple | list), f"{field.name} is {value!r}: it must be a tuple")
        for item in value if field.several else (value,):
            require(isinstance(item, field.kind), f"{field.name} is {item!r:.80}: it must be {_TYPES[field.kind]}")
