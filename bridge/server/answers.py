"""Send answers: JSON of bounded size, encoded outside of the event loop, and streams with a deadline."""

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
"""Bytes that are sent together; the unread rest of an answer waits in this process, not in the connection."""
_SECONDS_TO_READ = 30.0
"""How long a client may take to read an answer, in addition to the time of the request itself."""

Value = TypeVar("Value")


async def while_connected(request: Request, make: Callable[[], Awaitable[Value]], seconds: float | int) -> Value:
    """Return the result of `make` for a request whose body was read; cancel it if the client disconnects.

    Raises:
      ClientDisconnect: the client disconnected.
      Refusal: 503 if `make` took longer than `seconds`.
    """
    results: list[Value] = []
    errors: list[Exception] = []
    with anyio.move_on_after(seconds) as deadline:
        async with anyio.create_task_group() as tasks:

            async def watch() -> None:
                while (await request.receive())["type"] != "http.disconnect":
                    pass
                tasks.cancel_scope.cancel()

            tasks.start_soon(watch)
            try:
                results.append(await make())
            except Exception as error:  # raised below, outside the task group, which would wrap it
                errors.append(error)
            tasks.cancel_scope.cancel()
    for failure in errors:
        raise failure
    if results:
        return results[0]
    if deadline.cancelled_caught:
        message = f"the answer took longer than {seconds:g} seconds: ask for less, or try again later"
        raise Refusal(503, message, {"Retry-After": "5"})
    raise ClientDisconnect


class Slots:
    """A limit on the number of simultaneous requests of a kind."""

    def __init__(self, limit: int, kind: str):
        self._limit, self._kind, self._taken = limit, kind, 0

    @property
    def taken(self) -> int:
        """The number of slots that are taken."""
        return self._taken

    @contextlib.contextmanager
    def take(self) -> Iterator[None]:
        """Take one slot within the context.

        Raises:
          Refusal: 429 if all slots are taken.
        """
        if self._taken >= self._limit:
            message = f"{self._taken} {self._kind} are running, the most that this server allows: try again in a moment"
            raise Refusal(429, message, {"Retry-After": "2"})
        self._taken += 1
        try:
            yield
        finally:
            self._taken -= 1


# ---- JSON ----------------------------------------------------------------------------------------------------------


def encode(value: Any, most: int) -> list[bytes]:
    """Return a value as JSON in pieces. Call it in a thread.

    Nested lists and objects are encoded one by one, so that other threads can run in between.

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
            raise Refusal(422, f"the answer has more than {most:,} bytes, the limit of this server: ask for less")
        if len(piece) >= _PIECE:
            pieces.append(bytes(piece))
            piece.clear()
    return [*pieces, bytes(piece)]


def _parts(value: Any) -> Iterator[str]:
    """Yield the JSON of a value in parts; an innermost list or object is one part."""
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
    """The answers that clients are reading, bounded in total size: if they exceed it, the oldest is aborted.

    Args:
      most: the maximal number of bytes of all answers together.
    """

    def __init__(self, most: int):
        self._most = most
        self._sending: dict[anyio.CancelScope, int] = {}

    @contextlib.contextmanager
    def sending(self, size: int, seconds: float | int) -> Iterator[None]:
        """Register an answer of `size` bytes while it is sent within the context, for at most `seconds`."""
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
      pieces: the result of `encode`.
      outbox: bounds the total size of all answers.
      seconds: how long sending may take.
    """

    media_type = "application/json"  # type: ignore[assignment]

    def __init__(self, pieces: Iterable[bytes], outbox: Outbox, seconds: float | int = _SECONDS_TO_READ):
        self._pieces, self._outbox, self._seconds = list(pieces), outbox, seconds
        self._size = sum(map(len, self._pieces))
        self.status_code, self.background = 200, None
        self.init_headers({"content-length": f"{self._size}"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer."""
        with self._outbox.sending(self._size, self._seconds):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            for piece in self._pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})


class Stream(StreamingResponse):
    """A response that is generated while it is sent. Its resources are released when it ends or the client disconnects.

    Args:
      content: generates the pieces.
      media_type: the media type of the content.
      held: the resources, closed at the end.
      seconds: how long generating may take; a client that does not read is disconnected some time later.
    """

    def __init__(
        self, content: AsyncGenerator[str, None], media_type: str, held: contextlib.ExitStack, seconds: float | int
    ):
        super().__init__(content, media_type=media_type, headers={"x-accel-buffering": "no"})
        self._held, self._seconds = held, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the content until its end or until the client disconnects."""
        with self._held, anyio.move_on_after(self._seconds + _SECONDS_TO_READ):
            try:
                await super().__call__(scope, receive, send)
            finally:
                with anyio.CancelScope(shield=True):
                    await self.body_iterator.aclose()  # type: ignore[attr-defined]  # a generator
