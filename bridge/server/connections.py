"""Connections: what a client has to do in time, and how many it may hold. A layer over uvicorn's HTTP/1.1 protocol.

uvicorn has a deadline between requests alone. Here one also runs while a client sends a head or a body and while it
reads an answer, and it runs from the beginning: a byte now and then does not extend it. Where a client, or all of them,
hold too many connections, the one that has waited longest for its client makes room; what the server works on stays.
"""

import asyncio
import ipaddress
import json
from collections.abc import Set
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from bridge.server.bodies import Limits

_MARGIN = 5.0
"""Seconds by which the deadline of a body is later here: where somebody reads the body, `bodies.receive` answers."""
_TRUST = 1.0
"""Seconds by which a connection that was answered has waited less than it has: a crowd of new ones comes before it."""
_BUSY = b'{"error":"all connections that this server takes are in use: try again in a moment"}'


class Crowd:
    """The open connections of a server.

    Args:
      limits: `connections` and `client_connections` of them, and the seconds of the deadlines.
    """

    def __init__(self, limits: Limits):
        self.limits = limits
        self._open: set[Connection] = set()

    def __len__(self) -> int:
        return len(self._open)

    def enter(self, connection: "Connection") -> bool:
        """Add a connection; another one that waits for its client is dropped if there are too many.

        Returns:
          Whether there is room. If all others are being answered there is none.
        """
        own = {other for other in self._open if other.address == connection.address}
        room = self._make_room(own, self.limits.client_connections)
        room = room and self._make_room(self._open, self.limits.connections)
        self._open.add(connection)
        return room

    def leave(self, connection: "Connection") -> None:
        """Remove a connection."""
        self._open.discard(connection)

    def _make_room(self, others: Set["Connection"], most: int) -> bool:
        """Return whether there are, or now are, fewer than `most` of some connections."""
        if len(others) < most:
            return True
        waiting = [other for other in others if other.waits_for is not None]
        if waiting:
            min(waiting, key=lambda other: other.waits_since).drop()
        return bool(waiting)


class Connection(H11Protocol):
    """One connection: uvicorn's, with deadlines, a place in a `Crowd`, and an end that lets the client read.

    `waits_for` says what the client has to do next: "head", "body", "next request", "reading", "end"; None while the
    server has to.
    """

    def __init__(self, *args: Any, crowd: Crowd, **kwargs: Any):
        super().__init__(*args, **kwargs)
        limits = crowd.limits
        self._seconds = {
            "head": limits.head_seconds,
            "body": limits.body_seconds + _MARGIN,
            "next request": limits.idle_seconds,
            "reading": limits.read_seconds,
            "end": limits.read_seconds,
        }
        self._crowd = crowd
        self._socket: asyncio.Transport = None  # set when the connection is made
        self._timer: asyncio.TimerHandle | None = None
        self._began: tuple[str | None, Any] = (None, None)
        self._ending = False
        self._unread = 0  # bytes that came after the end
        self.address = ""
        self.waits_for: str | None = None
        self.waits_since = 0.0

    # ---- what asyncio calls ----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a place, or give the first request of the connection a 503."""
        self._socket = transport
        super().connection_made(_Transport(transport, self))  # type: ignore[arg-type]
        self.address = _address(self.client)
        if not self._crowd.enter(self):
            self.app = _busy
        self._update()

    def connection_lost(self, exc: Exception | None) -> None:
        """Give up the place and the deadline."""
        self._ending = True
        self._crowd.leave(self)
        self._cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read what comes. At the end it is thrown away: a client that still sends must not be cut off by a reset."""
        if self._ending:
            self._unread += len(data)
            if self._unread > self._crowd.limits.unread_bytes:
                self._socket.abort()
            return
        super().data_received(data)
        self._update()

    def pause_writing(self) -> None:
        """Begin to wait for a client that does not read."""
        super().pause_writing()
        self._update()

    def resume_writing(self) -> None:
        """Go on: the client has read."""
        super().resume_writing()
        self._update()

    # ---- what uvicorn calls ----------------------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        self._update()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, or has more than 16 KiB of headers."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # its body is lost
            self.cycle.message_event.set()
        self._refuse(
            400, "this is no HTTP/1.1 request, or its headers have more than 16 KiB: send a valid, shorter one"
        )

    def shutdown(self) -> None:
        """End the connection when the server ends: at once if it was over anyway."""
        if self._ending:
            self._socket.abort()
        else:
            super().shutdown()

    # ---- deadlines -------------------------------------------------------------------------------------------------

    def _update(self) -> None:
        """Start the deadline of what the client has to do now, unless it is running."""
        waits_for = self._whose_turn()
        began = (waits_for, self.cycle)  # of every request anew
        if began == self._began:
            return
        self._cancel()
        self._began, self.waits_for = began, waits_for
        if waits_for is not None:
            self.waits_since = self.loop.time() + (_TRUST if waits_for == "next request" else 0.0)
            self._timer = self.loop.call_later(self._seconds[waits_for], self._late)

    def _whose_turn(self) -> str | None:
        if self._ending:
            return "end"
        if self.flow.write_paused:
            return "reading"
        if self.conn.their_state is h11.SEND_BODY:
            return "body"
        if self.conn.their_state is h11.IDLE:
            return "head" if self.cycle is None or self.conn.trailing_data[0] else "next request"
        return None

    def _late(self) -> None:
        """End a connection whose client is late."""
        if self.waits_for == "head" and self.conn.trailing_data[0]:
            seconds = self._seconds["head"]
            self._refuse(408, f"the head of the request did not come within {seconds:g} seconds: send it at once")
        elif self.waits_for in ("head", "next request"):
            self.close()
        else:
            self._socket.abort()

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def drop(self) -> None:
        """End the connection at once, for the sake of another."""
        self._crowd.leave(self)
        self._socket.abort()

    # ---- the end ---------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End the connection: what was written is sent, and what the client still sends is read for a while.

        A connection that is closed with unread data is reset, and a reset takes the answer with it.
        """
        if self._ending or self._socket.is_closing():
            return
        self._ending = True
        if self.conn.their_state in (h11.SEND_BODY, h11.ERROR):
            self.flow.resume_reading()
            self._socket.write_eof()
        else:
            self._socket.close()
        self._update()

    def is_ending(self) -> bool:
        """Return whether nothing more is to be read or written."""
        return self._ending or self._socket.is_closing()

    def _refuse(self, status: int, message: str) -> None:
        """Answer a request that never came to the app, and end the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps({"error": message}).encode()
            headers = {"content-type": "application/json", "content-length": f"{len(body)}", "connection": "close"}
            for event in (
                h11.Response(status_code=status, headers=list(headers.items()), reason=STATUS_PHRASES[status]),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self._socket.write(self.conn.send(event))
        self.close()


class _Transport:
    """The transport that uvicorn sees: its `close` is that of the connection."""

    def __init__(self, transport: asyncio.Transport, connection: Connection):
        self._transport, self._connection = transport, connection

    def close(self) -> None:
        self._connection.close()

    def is_closing(self) -> bool:
        return self._connection.is_ending()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def _address(client: tuple[str, int] | None) -> str:
    """Return the address of a client; of IPv6 the network of 2**64 addresses that a household has."""
    if client is None:
        return ""
    try:
        address = ipaddress.ip_address(client[0].partition("%")[0])
    except ValueError:
        return client[0]
    if address.version == 4 or address.ipv4_mapped:
        return str(address)
    return str(ipaddress.ip_network((address, 64), strict=False))


async def _busy(scope: Any, receive: Any, send: Any) -> None:
    """Answer a request on a connection that there was no room for."""
    headers = {"content-type": "application/json", "retry-after": "2", "connection": "close"}
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    pairs.append((b"content-length", f"{len(_BUSY)}".encode()))
    await send({"type": "http.response.start", "status": 503, "headers": pairs})
    await send({"type": "http.response.body", "body": _BUSY})
