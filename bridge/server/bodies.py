"""Read and validate bodies of requests: bounded size, JSON, and every field checked before it is used."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import anyio
from starlette.requests import Request

from bridge import ranges


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of one request, and of all requests together."""

    body_bytes: int = 2**20
    prompt_tokens: int = 1024
    max_tokens: int = 256
    """Tokens of a continuation."""
    graph_tokens: int = 128
    """Tokens of a prompt whose attribution graph is computed."""
    graph_features: int = 4000
    """Features of such a graph."""
    features: int = 16
    """Features steered by one request."""
    seconds: float = 60.0
    """Time of a request that uses the model, including its wait for its turn. A generation ends when it is over, any
    other request is refused."""
    generations: int = 4
    """Simultaneous generations of all clients."""
    readings: int = 16
    """Simultaneous other requests of all clients that wait for the model."""
    numbers: int = 2**19
    """Activations and indices of features in one answer."""
    answer_bytes: int = 2**24
    """Size of one answer."""
    notes_bytes: int = 2**22
    """Size of the notes of a run, which the server reads and appends to."""
    head_seconds: float = 10.0
    """Time for the head of a request, from the start of the connection or from the request's first byte."""
    body_seconds: float = 20.0
    """Time for the body after the head."""
    idle_seconds: float = 5.0
    """Time between two requests of a connection."""
    read_seconds: float = 20.0
    """Time for a client to read 64 KiB of an answer, and to close its side of a finished connection."""
    unread_bytes: int = 2**28
    """What a refused client may still send before it reads the refusal."""
    client_connections: int = 96
    """Connections of one address. Idle connections are closed to make room for new ones."""
    connections: int = 160
    """Connections of all clients. Some systems allow a process 256 open files."""


class Refusal(Exception):  # noqa: N818 - an answer, not an error of this program
    """Refuses a request: HTTP status and a message with what was received, what was expected and what to do."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.headers = status, message, dict(headers or {})


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """Turn a ValueError within the context into a Refusal with status 400."""
    try:
        yield
    except ValueError as error:
        raise Refusal(400, str(error)) from error


async def receive(request: Request, limits: Limits) -> bytes:
    """Return the body of a request whose content type is JSON.

    Raises:
      Refusal: 415 for another content type (a form on a foreign page can send some types, but not JSON), 413 for a body
        that is too long, 408 for one that does not arrive in time.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(415, f"the content type is {kind[:100] or 'not given'!r}: send application/json")
    data = bytearray()
    try:
        with anyio.fail_after(limits.body_seconds):
            _check_length(int(request.headers.get("content-length", "0")), limits)
            async for chunk in request.stream():
                data += chunk
                _check_length(len(data), limits)
    except TimeoutError as error:
        message = f"the body did not arrive within {limits.body_seconds:g} seconds: send it at once"
        raise Refusal(408, message, _LAST) from error
    return bytes(data)


_MOST_BRACKETS = 100_000  # including those in strings; Python's garbage collector visits every list repeatedly
_SHORT = 60  # characters of a value in an error message
_LONGEST_PLACE = 100  # characters of a location in the body in an error message
_LAST = {"connection": "close"}
"""The header of an answer that ends its connection, because the body was not read to its end."""


def _check_length(length: int, limits: Limits) -> None:
    if length > limits.body_bytes:
        raise Refusal(413, f"the body is longer than {limits.body_bytes:,} bytes: send a shorter text", _LAST)


def parse(data: bytes) -> dict[str, Any]:
    """Return the JSON object that `data` holds.

    Raises:
      Refusal: 400 for anything else than a JSON object, and for what Python would accept: NaN, infinities (also 1e999),
        lone surrogates, a name that appears twice in an object, and deep nesting.
    """
    if data.count(b"[") + data.count(b"{") > _MOST_BRACKETS:
        raise Refusal(400, f"the body has more than {_MOST_BRACKETS:,} brackets: send fewer lists and objects")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_object)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise Refusal(400, f"{_odd(value)} holds half of a surrogate pair: send whole characters") from error
    except (ValueError, RecursionError) as error:
        problem = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        if str(error).startswith("Out of range float"):
            problem = f"{_odd(value)} is not finite"
        raise Refusal(400, f"the body is not JSON of finite numbers: {problem}") from error
    if not isinstance(value, dict):
        raise Refusal(400, f"the body is {_kind(value)}: expected an object")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; raise ValueError if a name appears twice, as either value could be the intended one."""
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {_short(twice)} appears twice in an object")
    return value


def _odd(value: Any) -> str:
    """Return the location of the first number that is not finite, or of the first string that is not Unicode."""
    places = [(value, "")]
    while places:
        inner, where = places.pop()
        if isinstance(inner, dict):
            names = [(name, f"a name in {where or 'the body'}") for name in inner]
            places += [(v, f"{where}.{name}".lstrip(".")) for name, v in reversed(inner.items())] + names
        elif isinstance(inner, list):
            places += [(v, f"{where}[{i}]") for i, v in reversed(list(enumerate(inner)))]
        elif _is_odd(inner):
            return where[:_LONGEST_PLACE] or "the body"
    return "a value"


def _is_odd(value: Any) -> bool:
    if isinstance(value, str):
        return any("\ud800" <= c <= "\udfff" for c in value)
    return isinstance(value, float) and not math.isfinite(value)


_REQUIRED: Any = object()


class Fields:
    """The fields of a JSON object, checked when they are read; a refusal names the field.

    null is the same as a missing field. All methods that return a field take its name, and where they have a `default`,
    return that for a missing field.

    Args:
      value: the JSON value, which must be an object.
      where: its location in the body, for messages.
      known: the names of allowed fields; None allows all.

    Raises:
      Refusal: 400 for a value, field or name that is not allowed.
    """

    def __init__(self, value: Any, where: str = "", known: Collection[str] | None = None):
        if not isinstance(value, dict):
            raise Refusal(400, f"{where.rstrip('.') or 'the body'} is {_kind(value)}: expected an object")
        unknown = sorted(set(value) - set(known)) if known is not None else []
        if unknown:
            raise Refusal(400, f"{_short(where + unknown[0])} is not a field: the fields are {', '.join(known or ())}")
        self._value, self._where = value, where

    def has(self, name: str) -> bool:
        """Return whether the field is present."""
        return self._value.get(name) is not None

    def text(self, name: str, default: Any = _REQUIRED) -> Any:
        """Return a string."""
        value = self._get(name, default)
        if value is not default and not isinstance(value, str):
            raise self._wrong(name, "a text")
        return value

    def flag(self, name: str, default: Any = _REQUIRED) -> Any:
        """Return true or false."""
        value = self._get(name, default)
        if value is not default and not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return value

    def choice(self, name: str, options: Collection[str], default: Any = _REQUIRED) -> Any:
        """Return one of the strings `options`."""
        value = self.text(name, default)
        if value is not default and value not in options:
            raise self._wrong(name, "one of " + ", ".join(options))
        return value

    def whole(self, name: str, low: int, high: int, default: Any = _REQUIRED) -> Any:
        """Return a whole number from low to high."""
        return self.checked(name, lambda where, value: ranges.check_integer(where, value, low, high), default)

    def number(self, name: str, low: float | int, high: float | int, default: Any = _REQUIRED) -> Any:
        """Return a number from low to high, as a float; a number that float32 rounds to 0 is refused."""
        value = self.checked(name, lambda where, value: ranges.check_number(where, value, low, high), default)
        return value if value is default else float(value)

    def temperature(self, name: str, high: float | int, default: Any = _REQUIRED) -> Any:
        """Return a temperature, 0 or one that the engine takes, as a float."""
        value = self.checked(name, lambda where, value: ranges.check_temperature(value, where, high), default)
        return value if value is default else float(value)

    def checked(self, name: str, check: Callable[[str, Any], None], default: Any = _REQUIRED) -> Any:
        """Return a value that `check`, given the field's name and the value, raises no ValueError for."""
        value = self._get(name, default)
        if value is not default:
            with refusing():
                check(self._where + name, value)
        return value

    def index(self, name: str, below: int) -> int:
        """Return a whole number from 0 to `below` - 1; a string of digits is accepted too."""
        value = self._get(name, _REQUIRED)
        if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 9:
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < below:
            raise self._wrong(name, f"a whole number from 0 to {below - 1}")
        return value

    def items(self, name: str, at_most: int, default: Any = _REQUIRED) -> Any:
        """Return a list of at most `at_most` values of any kind."""
        value = self._get(name, default)
        if value is not default and not (isinstance(value, list) and len(value) <= at_most):
            raise self._wrong(name, f"a list of at most {at_most}")
        return value

    def indices(self, name: str, below: int) -> list[int]:
        """Return a list of whole numbers from 0 to `below` - 1; [] if the field is missing."""
        values = self.items(name, below, [])
        if not all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < below for v in values):
            raise self._wrong(name, f"whole numbers from 0 to {below - 1}")
        return values

    def texts(self, name: str, at_most: int, default: Any = _REQUIRED) -> list[str]:
        """Return a list of at most `at_most` strings."""
        values = self.items(name, at_most, default)
        if not all(isinstance(value, str) for value in values):
            raise self._wrong(name, "a list of texts")
        return values

    def numbers(self, name: str, length: int, largest: float | int) -> list[float]:
        """Return a list of `length` numbers whose magnitude is at most `largest`."""
        values = self.items(name, length)
        fit = [isinstance(v, int | float) and not isinstance(v, bool) and -largest <= v <= largest for v in values]
        if len(values) != length or not all(fit):
            raise self._wrong(name, f"{length} numbers from {-largest:g} to {largest:g}")
        return [float(v) for v in values]

    def objects(self, name: str, at_most: int, known: Collection[str] | None = None) -> list["Fields"]:
        """Return a list of at most `at_most` objects; [] if the field is missing."""
        values = self.items(name, at_most, [])
        return [Fields(value, f"{self._where}{name}[{i}].", known) for i, value in enumerate(values)]

    def object(self, name: str, known: Collection[str] | None = None) -> "Fields":
        """Return the fields of an object."""
        return Fields(self._get(name, _REQUIRED), f"{self._where}{name}.", known)

    def _get(self, name: str, default: Any) -> Any:
        value = self._value.get(name)
        if value is None and default is _REQUIRED:
            raise Refusal(400, f"{self._where}{name} is missing")
        return default if value is None else value

    def refusal(self, name: str, problem: str) -> Refusal:
        """Return the refusal of a field; `problem` completes a sentence that begins with its name."""
        return Refusal(400, f"{self._where}{name} {problem}")

    def _wrong(self, name: str, expected: str) -> Refusal:
        return self.refusal(name, f"is {_short(self._value[name])}: expected {expected}")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _short(value: Any) -> str:
    """Return a value as an error message shows it; a large one is shortened."""
    if isinstance(value, list | dict) and len(value) > _SHORT:
        return f"{_kind(value)} of {len(value):,}"
    shown = json.dumps(value[:_SHORT] if isinstance(value, str) else value, ensure_ascii=False)
    return shown if len(shown) <= _SHORT else shown[: _SHORT - 3] + "…"
