"""Frozen dataclasses of settings: checked when made, JSON both ways. Standard library only."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, TypeVar


class ConfigError(ValueError):
    """A setting that cannot work. The message says what was given, what is allowed and what to do."""


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def setting(
    default: Any,
    help: str,
    *,
    at_least: int | float | None = None,
    above: int | float | None = None,
    at_most: int | float | None = None,
    below: int | float | None = None,
    choices: tuple[Any, ...] = (),
) -> Any:
    """Return a dataclass field with its help and the range that `check_settings` holds its values to.

    Values of a field with a range must be finite numbers. None is allowed where it is the default.
    """
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    ranges = {name: bound for name, bound in bounds.items() if bound is not None}
    return dataclasses.field(default=default, metadata={"help": help, "range": ranges, "choices": choices})


def check_settings(config: Any) -> None:
    """Raise ConfigError unless every field of a dataclass lies in the range that `setting` gave it."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        ranges: Mapping[str, int | float] = field.metadata.get("range", {})
        choices: tuple[Any, ...] = field.metadata.get("choices", ())
        optional = field.default is None and value is None
        require(
            not choices or value in choices or optional,
            f"{field.name} is {value!r}: it must be one of {', '.join(map(str, choices))}",
        )
        if ranges and not optional:
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            require(is_number and _lies_in(value, ranges), f"{field.name} is {value!r}: it must be {_shown(ranges)}")


def _lies_in(value: int | float, ranges: Mapping[str, int | float]) -> bool:
    return (
        value >= ranges.get("at_least", -math.inf)
        and value > ranges.get("above", -math.inf)
        and value <= ranges.get("at_most", math.inf)
        and value < ranges.get("below", math.inf)
    )


def _shown(ranges: Mapping[str, int | float]) -> str:
    words = {"at_least": "at least", "above": "above", "at_most": "at most", "below": "below"}
    return " and ".join(f"{words[name]} {bound:g}" for name, bound in ranges.items())


_Config = TypeVar("_Config", bound="Json")


class Json:
    """Mixin of frozen dataclasses of plain fields: `to_json()` and `from_json()`, strict about unknown names."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_json(cls: type[_Config], values: dict[str, Any] | str) -> _Config:
        """Return the inverse of `to_json`.

        Raises:
          ConfigError: a name that is no field, or a field with no default that is missing.
        """
        if isinstance(values, str):
            values = json.loads(values)
        fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(values) - set(fields))
        require(not unknown, f"{cls.__qualname__} has no field {', '.join(unknown)}; it has {', '.join(fields)}")
        no_default = dataclasses.MISSING
        missing = [n for n, f in fields.items() if n not in values and f.default is no_default is f.default_factory]
        require(not missing, f"{cls.__qualname__} needs {', '.join(missing)}")
        return cls(**values)
