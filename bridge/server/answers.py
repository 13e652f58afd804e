"""Answers: JSON of a bounded size, encoded off the event loop and sent in pieces, and streams that end in time."""

import contextlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator
from typing import Any, TypeVar

import anyio
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from bridge.server.bodies import Refusal

_PIECE = 2**16
"""Bytes that are sent together: what a client does not read of an answer waits here, not in the connection."""
_SECONDS_TO_READ = 30.0
"""How long, beyond its own time, a client may take to read what it asked for."""

Value = TypeVar("Value")


async def while_there(request: Request, make: Callable[[], Awaitable[Value]], seconds: float | int) -> Value:
    """Return what is made for a client whose body was read; the making ends when the client has gone.

    Raises:
      ClientDisconnect: it has.
      Refusal: 503 if it took longer than `seconds`.
    """
    made: list[Value] = []
    failed: list[Exception] = []
    with anyio.move_on_after(seconds) as deadline:
        async with anyio.create_task_group() as tasks:

            async def watch() -> None:
                while (await request.receive())["type"] != "http.disconnect":
                    pass
                tasks.cancel_scope.cancel()

            tasks.start_soon(watch)
            try:
                made.append(await make())
            except Exception as error:  # raised below, where no group wraps it
                failed.append(error)
            tasks.cancel_scope.cancel()
    for failure in failed:
        raise failure
    if made:
        return made[0]
    if deadline.cancelled_caught:
        told = f"the answer was not made within {seconds:g} seconds: ask for less, or try again when fewer others ask"
        raise Refusal(503, told, {"Retry-After": "5"})
    raise ClientDisconnect


class Slots:
    """So many of a kind may be under way at once."""

    def __init__(self, limit: int, what: str):
        self._limit, self._what, self._taken = limit, what, 0

    @contextlib.contextmanager
    def take(self) -> Iterator[None]:
        """Count one for the time of the context.

        Raises:
          Refusal: 429 if there are too many.
        """
        if self._taken >= self._limit:
            told = f"{self._taken} {self._what} are under way, as many as this server takes: try again in a moment"
            raise Refusal(429, told, {"Retry-After": "2"})
        self._taken += 1
        try:
            yield
        finally:
            self._taken -= 1


# ---- JSON ----------------------------------------------------------------------------------------------------------


def encode(value: Any, most: int) -> list[bytes]:
    """Return a value as JSON in pieces. To be called in a thread.

    Nested lists and objects are encoded one by one, so that other threads get the interpreter in between.

    Raises:
      Refusal: 422 if it has more than `most` bytes.
    """
    pieces: list[bytes] = []
    piece, size = bytearray(), 0
    for part in _parts(value):
        data = part.encode()
        piece += data
        size += len(data)
        if size > most:
            raise Refusal(422, f"the answer has more than {most:,} bytes, which is the most that is sent: ask for less")
        if len(piece) >= _PIECE:
            pieces.append(bytes(piece))
            piece.clear()
    return [*pieces, bytes(piece)]


def _parts(value: Any) -> Iterator[str]:
    """Yield the JSON of a value, that of an innermost list or object in one."""
    if isinstance(value, dict) and any(isinstance(inner, dict | list) for inner in value.values()):
        yield "{"
        for i, (name, inner) in enumerate(value.items()):
            yield ("," if i else "") + json.dumps(name, ensure_ascii=False) + ":"
            yield from _parts(inner)
        yield "}"
    elif isinstance(value, list) and any(isinstance(inner, dict | list) for inner in value):
        yield "["
        for i, inner in enumerate(value):
            yield "," if i else ""
            yield from _parts(inner)
        yield "]"
    else:
        yield json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


class Outbox:
    """The answers that clients are reading: so many bytes in all. Where they are more, the oldest is cut off.

    Args:
      most: bytes of all answers.
    """

    def __init__(self, most: int):
        self._most = most
        self._sending: dict[anyio.CancelScope, int] = {}

    @contextlib.contextmanager
    def sending(self, size: int, seconds: float | int) -> Iterator[None]:
        """Within the context, for so many seconds at most, an answer of `size` bytes is sent."""
        with anyio.move_on_after(seconds) as scope:
            while self._sending and sum(self._sending.values()) + size > self._most:
                oldest = next(iter(self._sending))
                del self._sending[oldest]
                oldest.cancel()
            self._sending[scope] = size
            try:
                yield
            finally:
                self._sending.pop(scope, None)


class Answer(Response):
    """JSON that is sent piece by piece.

    Args:
      pieces: of `encode`.
      outbox: has the room for it.
      seconds: that the sending may take.
    """

    media_type = "application/json"  # type: ignore[assignment]

    def __init__(self, pieces: Iterable[bytes], outbox: Outbox, seconds: float | int = _SECONDS_TO_READ):
        self._pieces, self._outbox, self._seconds = list(pieces), outbox, seconds
        self._size = sum(map(len, self._pieces))
        self.status_code, self.background = 200, None
        self.init_headers({"content-length": f"{self._size}"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        with self._outbox.sending(self._size, self._seconds):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            for piece in self._pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})


class Stream(StreamingResponse):
    """What is made as it is sent. When the client has it all, or has gone, the making ends and lets go what it held.

    Args:
      content: makes the pieces.
      media_type: of them.
      held: closed at the end.
      seconds: the making may take; a client that does not read is cut off some time after.
    """

    def __init__(
        self, content: AsyncGenerator[str, None], media_type: str, held: contextlib.ExitStack, seconds: float | int
    ):
        super().__init__(content, media_type=media_type, headers={"x-accel-buffering": "no"})
        self._held, self._seconds = held, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, until the end or until the client has gone."""
        with self._held, anyio.move_on_after(self._seconds + _SECONDS_TO_READ):
            try:
                await super().__call__(scope, receive, send)
            finally:
                with anyio.CancelScope(shield=True):
                    await self.body_iterator.aclose()  # type: ignore[attr-defined]  # a generator
