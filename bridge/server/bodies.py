"""Bodies of requests: bounded, JSON, and every field what it should be before anything is done with it."""

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
    """What one request, and all of them together, may ask of the machine."""

    body_bytes: int = 2**20
    prompt_tokens: int = 1024
    max_tokens: int = 256
    """Tokens of a continuation."""
    features: int = 16
    """Features steered by one request."""
    seconds: float = 60.0
    """Of a request that uses the model, its wait for its turn included. What a generation has not written by then is
    left out, any other request is refused."""
    generations: int = 4
    """Under way at once, of all clients."""
    readings: int = 16
    """Other requests that wait for the model, of all clients."""
    numbers: int = 2**19
    """Activations, and indices of features, in one answer."""
    answer_bytes: int = 2**24
    """Of one answer."""
    notes_bytes: int = 2**22
    """Of the notes of a run that the server reads and adds to."""
    head_seconds: float = 10.0
    """Within which the head of a request has come, from the beginning of the connection or its first byte."""
    body_seconds: float = 20.0
    """Within which the body has come after its head."""
    idle_seconds: float = 5.0
    """Between two requests of a connection."""
    read_seconds: float = 20.0
    """Within which a client reads 64 KiB of an answer; and within which it ends a connection that is over."""
    unread_bytes: int = 2**28
    """What a client may still send when it was refused, so that it comes to read why."""
    client_connections: int = 96
    """Of one address. Whoever is connected and does nothing makes room for the next."""
    connections: int = 160
    """Of all clients. Some systems give a process 256 files."""


class Refusal(Exception):  # noqa: N818 - an answer, not an error of this program
    """A request that is not done: its HTTP status, and what came, what was expected, what to do."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.headers = status, message, dict(headers or {})


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """Within the context, a ValueError is the client's mistake."""
    try:
        yield
    except ValueError as error:
        raise Refusal(400, str(error)) from error


async def receive(request: Request, limits: Limits) -> bytes:
    """Return the body of a request, which says that it is JSON.

    Raises:
      Refusal: 415 for another content type (a form of a foreign page can send some, but not JSON), 413 for a body that
        is too long, 408 for one that does not come.
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
        told = f"the body did not come within {limits.body_seconds:g} seconds: send it at once"
        raise Refusal(408, told, _LAST) from error
    return bytes(data)


_MOST_BRACKETS = 100_000  # those in texts too; Python's garbage collector looks at every list again and again
_SHORT = 60  # characters of a value that an error message shows
_LONGEST_PLACE = 100  # characters of an error message that say where in a body something stands
_LAST = {"connection": "close"}
"""The header of an answer after which a connection ends, because the body was not read to its end."""


def _check_length(length: int, limits: Limits) -> None:
    if length > limits.body_bytes:
        raise Refusal(413, f"the body is longer than {limits.body_bytes:,} bytes: send a shorter text", _LAST)


def parse(data: bytes) -> dict[str, Any]:
    """Return the JSON object that a text is.

    Raises:
      Refusal: 400 for what is no JSON object, and for what Python would let through: NaN, infinities (1e999 too), lone
        surrogates, a name that an object has twice, and depth.
    """
    if data.count(b"[") + data.count(b"{") > _MOST_BRACKETS:
        raise Refusal(400, f"the body has more than {_MOST_BRACKETS:,} brackets: send fewer lists and objects")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_object)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise Refusal(400, f"{_odd(value)} holds half of a surrogate pair: send whole characters") from error
    except (ValueError, RecursionError) as error:
        told = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        if str(error).startswith("Out of range float"):
            told = f"{_odd(value)} is not finite"
        raise Refusal(400, f"the body is not JSON of finite numbers: {told}") from error
    if not isinstance(value, dict):
        raise Refusal(400, f"the body is {_kind(value)}: expected an object")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON, in which every name stands once: which of two would count is anybody's guess."""
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {_short(twice)} stands twice in an object")
    return value


def _odd(value: Any) -> str:
    """Return the place of the first number that is not finite, or of the first text that is not Unicode."""
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
    """The fields of a JSON object, read one by one; what does not fit is refused with its name.

    null is the same as nothing. Fields of other names than the known ones are refused, where those are given.
    """

    def __init__(self, value: Any, where: str = "", known: Collection[str] | None = None):
        if not isinstance(value, dict):
            raise Refusal(400, f"{where.rstrip('.') or 'the body'} is {_kind(value)}: expected an object")
        unknown = sorted(set(value) - set(known)) if known is not None else []
        if unknown:
            raise Refusal(400, f"no field is called {_short(where + unknown[0])}: there are {', '.join(known or ())}")
        self._value, self._where = value, where

    def has(self, name: str) -> bool:
        """Whether the field is there."""
        return self._value.get(name) is not None

    def text(self, name: str, default: Any = _REQUIRED) -> Any:
        """A text."""
        value = self._get(name, default)
        if value is not default and not isinstance(value, str):
            raise self._wrong(name, "a text")
        return value

    def flag(self, name: str, default: Any = _REQUIRED) -> Any:
        """True or false."""
        value = self._get(name, default)
        if value is not default and not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return value

    def choice(self, name: str, options: Collection[str], default: Any = _REQUIRED) -> Any:
        """One of some texts."""
        value = self.text(name, default)
        if value is not default and value not in options:
            raise self._wrong(name, "one of " + ", ".join(options))
        return value

    def whole(self, name: str, low: int, high: int, default: Any = _REQUIRED) -> Any:
        """Return a whole number from low to high."""
        return self.checked(name, lambda where, value: ranges.check_integer(where, value, low, high), default)

    def number(self, name: str, low: float | int, high: float | int, default: Any = _REQUIRED) -> Any:
        """Return a number from low to high, as a float; one that float32 cannot tell from 0 is refused."""
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
        """A number below another one, which may come as a text of digits."""
        value = self._get(name, _REQUIRED)
        if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 9:
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < below:
            raise self._wrong(name, f"a whole number from 0 to {below - 1}")
        return value

    def items(self, name: str, at_most: int, default: Any = _REQUIRED) -> Any:
        """A list of anything, not too long."""
        value = self._get(name, default)
        if value is not default and not (isinstance(value, list) and len(value) <= at_most):
            raise self._wrong(name, f"a list of at most {at_most}")
        return value

    def indices(self, name: str, below: int) -> list[int]:
        """A list of whole numbers below another one; none where the field is not there."""
        values = self.items(name, below, [])
        if not all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < below for v in values):
            raise self._wrong(name, f"whole numbers from 0 to {below - 1}")
        return values

    def texts(self, name: str, at_most: int, default: Any = _REQUIRED) -> list[str]:
        """A list of texts."""
        values = self.items(name, at_most, default)
        if not all(isinstance(value, str) for value in values):
            raise self._wrong(name, "a list of texts")
        return values

    def numbers(self, name: str, length: int, largest: float | int) -> list[float]:
        """A list of so many numbers."""
        values = self.items(name, length)
        fit = [isinstance(v, int | float) and not isinstance(v, bool) and -largest <= v <= largest for v in values]
        if len(values) != length or not all(fit):
            raise self._wrong(name, f"{length} numbers from {-largest:g} to {largest:g}")
        return [float(v) for v in values]

    def objects(self, name: str, at_most: int, known: Collection[str] | None = None) -> list["Fields"]:
        """A list of objects; none where the field is not there."""
        values = self.items(name, at_most, [])
        return [Fields(value, f"{self._where}{name}[{i}].", known) for i, value in enumerate(values)]

    def _get(self, name: str, default: Any) -> Any:
        value = self._value.get(name)
        if value is None and default is _REQUIRED:
            raise Refusal(400, f"{self._where}{name} is missing")
        return default if value is None else value

    def refusal(self, name: str, told: str) -> Refusal:
        """Return the refusal of a field, of which `told` says what is wrong."""
        return Refusal(400, f"{self._where}{name} {told}")

    def _wrong(self, name: str, expected: str) -> Refusal:
        return self.refusal(name, f"is {_short(self._value[name])}: expected {expected}")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _short(value: Any) -> str:
    """Return a value as an error message shows it, without writing all of a large one."""
    if isinstance(value, list | dict) and len(value) > _SHORT:
        return f"{_kind(value)} of {len(value):,}"
    shown = json.dumps(value[:_SHORT] if isinstance(value, str) else value, ensure_ascii=False)
    return shown if len(shown) <= _SHORT else shown[: _SHORT - 3] + "…"
