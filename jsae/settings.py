"""Frozen dataclasses of settings, validated on construction and convertible to JSON. Standard library only."""

import dataclasses
import functools
import numbers
import types
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from jsae import jsons


class ConfigError(ValueError):
    """An invalid setting. The message says what was given, what is allowed and what to do."""


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


class Range(NamedTuple):
    """The allowed numbers of a field: from `low` to `high`, both included, and those in `also`."""

    low: float | int
    high: float | int
    requirement: str
    """Completes the sentence "it must …" in error messages."""
    also: tuple[float | int, ...] = ()

    def contains(self, value: float | int) -> bool:
        """Return whether a number is allowed; NaN never is."""
        return self.low <= value <= self.high or value in self.also


def at_least(low: int, high: int = 2**31 - 1) -> Range:
    """Return the range of integers from `low` to `high`."""
    return Range(low, high, f"be at least {low}, and at most {high}")


COUNT = at_least(1)
TOKENS = at_least(1, 2**50)
SEED = Range(0, 2**31 - 1, "lie in [0, 2**31)")
FACTOR = Range(1e-6, 1e6, "be finite and positive, from 1e-6 to 1e6")
FRACTION = Range(0, 1, "lie between 0 and 1")
RATE = Range(1e-12, 1e6, "be positive, from 1e-12 to 1e6")
WEIGHT = Range(1e-30, 1e30, "be finite and not negative: 0, or from 1e-30 to 1e30", also=(0,))
AVERAGED = Range(1e-9, 1, "lie above 0 and at most at 1; leave it out to export the last weights")
BETA = Range(0, 0.999999, "lie in [0, 0.999999]")
DEAD_AFTER = Range(1, 2**30, "lie between 1 and 2**30 activations")
_ANY = {
    int: Range(-(2**63), 2**63 - 1, "be a whole number of at most 63 bits"),
    float: Range(-3.4e38, 3.4e38, "be finite and within float32"),
}


def number(default: Any, range: Range) -> Any:
    """Return a dataclass field with a default and a range, which `check_fields` checks."""
    return dataclasses.field(default=default, metadata={"range": range})


def check_fields(config: Any) -> None:
    """Check the numbers and choices in a dataclass against the types and ranges of its fields.

    The range of a field is `metadata["range"]`; by default integers must fit 64 bits and floats must be finite. In a
    tuple every item is checked.

    Raises:
      ConfigError: a field has a wrong type or a value that is not allowed; names the field.
    """
    for field in _fields(type(config)):  # type: ignore[arg-type]
        name, value = field.name, getattr(config, field.name)
        if value is None and field.optional:
            continue
        require(not field.is_list or isinstance(value, (tuple, list)), f"{name} is {value!r}: it must be a tuple")
        for item in value if field.is_list else (value,):
            if field.choices:
                require(item in field.choices, f"{name} is {item!r}: choose one of {', '.join(field.choices)}")
            else:
                _check_number(field, item)


class _Field(NamedTuple):
    """A field that `check_fields` checks."""

    name: str
    kind: type | None
    """int or float; None for a field with `choices`."""
    choices: tuple[str, ...]
    range: Range
    optional: bool
    is_list: bool


def _check_number(field: _Field, value: Any) -> None:
    kind, noun = (numbers.Integral, "whole number") if field.kind is int else (numbers.Real, "number")
    require(isinstance(value, kind) and not isinstance(value, bool), f"{field.name} is {value!r}: it must be a {noun}")
    require(field.range.contains(value), f"{field.name} is {_shown(value)}: it must {field.range.requirement}")


def _shown(value: Any) -> str:
    """Return a number as text, without printing thousands of digits."""
    too_long = isinstance(value, int) and abs(value) >= 10**30
    return "a number of more than 30 digits" if too_long else str(value)


@functools.cache
def _fields(config_class: type) -> list[_Field]:
    """Return the fields of a dataclass that have a number or one of several choices."""
    fields = []
    hints = get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        hint, optional, is_list = hints[field.name], False, False
        if get_origin(hint) in (Union, types.UnionType):
            optional = type(None) in get_args(hint)
            (hint, *others) = [arg for arg in get_args(hint) if arg is not type(None)]
            if others:
                continue
        if get_origin(hint) is tuple and len(get_args(hint)) == 2 and get_args(hint)[1] is Ellipsis:
            hint, is_list = get_args(hint)[0], True
        if get_origin(hint) is Literal:
            fields.append(_Field(field.name, None, get_args(hint), _ANY[float], optional, is_list))
        elif hint in _ANY:
            allowed = field.metadata.get("range") or _ANY[hint]
            fields.append(_Field(field.name, hint, (), allowed, optional, is_list))
    return fields


_Config = TypeVar("_Config")


def read_fields(cls: type[_Config], values: dict[str, Any] | str) -> _Config:
    """Return a dataclass from the JSON of its fields.

    Raises:
      ConfigError: a name that is no field, or a field with no default that is missing.
    """
    if isinstance(values, str):
        values = jsons.loads(values)
    if not isinstance(values, dict):
        raise ConfigError(f"a {cls.__name__} is read from a JSON object, not from {values!r:.80}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(fields))
    require(not unknown, f"{cls.__name__} has no field {', '.join(unknown)}; it has {', '.join(fields)}")
    no_default = dataclasses.MISSING
    missing = [n for n, f in fields.items() if n not in values and f.default is no_default is f.default_factory]
    require(not missing, f"{cls.__name__} needs {', '.join(missing)}")
    return cls(**values)


class Json:
    """Mixin of frozen dataclasses of plain fields: `to_json()` and `from_json()`, strict about unknown names."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_json(cls: type[_Config], values: dict[str, Any] | str) -> _Config:
        """Return an instance from the values of `to_json`, or from their JSON text.

        Raises:
          ConfigError: a name is not a field, or a field without a default is missing.
        """
        return read_fields(cls, values)
