"""Bodies of requests: bounded, JSON, and every field what it should be before anything is done with it."""

import contextlib
import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import anyio
from starlette.requests import Request

_SECONDS_TO_SEND = 20.0


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
    """Of a generation; what is unfinished then ends there."""
    generations: int = 4
    """Under way at once, of all clients."""
    readings: int = 16
    """Other requests that wait for the model, of all clients."""


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


async def read(request: Request, limits: Limits) -> dict[str, Any]:
    """The JSON object that a request brings.

    Raises:
      Refusal: 415 for another content type (a form of a foreign page can send some, but not JSON), 413 for a body that
        is too long, 408 for one that does not come, 400 for one that is no object or holds what JSON cannot say.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(415, f"the content type is {kind or 'not given'!r}: send application/json")
    data = bytearray()
    try:
        with anyio.fail_after(_SECONDS_TO_SEND):
            async for chunk in request.stream():
                data += chunk
                if len(data) > limits.body_bytes:
                    raise Refusal(413, f"the body is longer than {limits.body_bytes:,} bytes: send a shorter text")
    except TimeoutError as error:
        raise Refusal(408, f"the body did not come within {_SECONDS_TO_SEND:g} seconds: send it at once") from error
    return parse(bytes(data))


def parse(data: bytes) -> dict[str, Any]:
    """A JSON object. Refuses NaN, infinities (1e999 too), lone surrogates and depth, which Python would let through."""
    try:
        value = json.loads(data.decode("utf-8"))
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise Refusal(400, "a text holds half of a surrogate pair: send whole characters") from error
    except (ValueError, RecursionError) as error:
        told = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise Refusal(400, f"the body is not JSON of finite numbers: {told}") from error
    if not isinstance(value, dict):
        raise Refusal(400, f"the body is {_kind(value)}: expected an object")
    return value


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
        """A whole number from low to high."""
        value = self._get(name, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self._wrong(name, f"a whole number from {low} to {high}")
        return value

    def number(self, name: str, low: float | int, high: float | int, default: Any = _REQUIRED) -> Any:
        """A number from low to high, as a float."""
        value = self._get(name, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self._wrong(name, f"a number from {low:g} to {high:g}")
        return float(value)

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

    def _wrong(self, name: str, expected: str) -> Refusal:
        value = self._value[name]
        told = _short(value)
        return Refusal(400, f"{self._where}{name} is {told}: expected {expected}")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _short(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 60 else shown[:57] + "…"
