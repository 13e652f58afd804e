"""Limit the time and number of connections. A layer over uvicorn's HTTP/1.1 protocol.

uvicorn has a deadline only between requests. Here clients also have a deadline for sending a head or a body and for
reading an answer. It runs from the start of the phase: single bytes do not extend it. If one client, or all together,
hold too many connections, the one that has waited longest for its client is dropped; requests in progress are kept.
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
"""Seconds by which the deadline of a body is later here, so that `bodies.receive` can answer first if it reads it."""
_TRUST = 1.0
"""Seconds subtracted from the wait of a connection that was answered before, so that new ones are dropped first."""
_BUSY = b'{"error":"all connections of this server are in use: try again in a moment"}'


class OpenConnections:
    """The open connections of a server.

    Args:
      limits: the maxima `connections` and `client_connections`, and the deadlines.
    """

    def __init__(self, limits: Limits):
        self.limits = limits
        self._open: set[Connection] = set()

    def __len__(self) -> int:
        return len(self._open)

    def enter(self, connection: "Connection") -> bool:
        """Add a connection; if there are too many, drop another one that waits for its client.

        Returns:
          Whether there is room. There is none if all others are being answered.
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
        """Drop one of `others` if there are `most` or more; return whether there is room."""
        if len(others) < most:
            return True
        waiting = [other for other in others if other.waits_for is not None]
        if waiting:
            min(waiting, key=lambda other: other.waits_since).drop()
        return bool(waiting)


class Connection(H11Protocol):
    """uvicorn's connection with deadlines, registered in `OpenConnections`, and an end that lets the client read.

    `waits_for` is the client's next action: "head", "body", "next request", "reading" or "end"; None if it is the
    server's turn.
    """

    def __init__(self, *args: Any, open_connections: OpenConnections, **kwargs: Any):
        super().__init__(*args, **kwargs)
        limits = open_connections.limits
        self._seconds = {
            "head": limits.head_seconds,
            "body": limits.body_seconds + _MARGIN,
            "next request": limits.idle_seconds,
            "reading": limits.read_seconds,
            "end": limits.read_seconds,
        }
        self._open_connections = open_connections
        self._socket: asyncio.Transport = None  # set when the connection is made
        self._timer: asyncio.TimerHandle | None = None
        self._began: tuple[str | None, Any] = (None, None)
        self._ending = False
        self._unread = 0  # bytes received after the end
        self.address = ""
        self.waits_for: str | None = None
        self.waits_since = 0.0

    # ---- what asyncio calls ----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Register the connection, or answer its first request with 503."""
        self._socket = transport
        super().connection_made(_Transport(transport, self))  # type: ignore[arg-type]
        self.address = _address(self.client)
        if not self._open_connections.enter(self):
            self.app = _busy
        self._update()

    def connection_lost(self, exc: Exception | None) -> None:
        """Unregister the connection and cancel its deadline."""
        self._ending = True
        self._open_connections.leave(self)
        self._cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read data. After the end discard it: a client that still sends must not be disconnected by a reset."""
        if self._ending:
            self._unread += len(data)
            if self._unread > self._open_connections.limits.unread_bytes:
                self._socket.abort()
            return
        super().data_received(data)
        self._update()

    def pause_writing(self) -> None:
        """Start the deadline of a client that does not read."""
        super().pause_writing()
        self._update()

    def resume_writing(self) -> None:
        """Continue: the client has read."""
        super().resume_writing()
        self._update()

    # ---- what uvicorn calls ----------------------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        self._update()

    def send_400_response(self, msg: str) -> None:
        """Refuse a request that is not HTTP, or has more than 16 KiB of headers."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # its body is lost
            self.cycle.message_event.set()
        self._refuse(
            400, "this is not an HTTP/1.1 request, or its headers have more than 16 KiB: send a valid, shorter one"
        )

    def shutdown(self) -> None:
        """End the connection when the server stops, immediately if it was ending already."""
        if self._ending:
            self._socket.abort()
        else:
            super().shutdown()

    # ---- deadlines -------------------------------------------------------------------------------------------------

    def _update(self) -> None:
        """Start the deadline of the client's next action, unless it is running."""
        waits_for = self._next_action()
        began = (waits_for, self.cycle)  # a new deadline for every request
        if began == self._began:
            return
        self._cancel()
        self._began, self.waits_for = began, waits_for
        if waits_for is not None:
            self.waits_since = self.loop.time() + (_TRUST if waits_for == "next request" else 0.0)
            self._timer = self.loop.call_later(self._seconds[waits_for], self._late)

    def _next_action(self) -> str | None:
        """Return the client's next action, as `waits_for` has it."""
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
            self._refuse(408, f"the head of the request did not arrive within {seconds:g} seconds: send it at once")
        elif self.waits_for in ("head", "next request"):
            self.close()
        else:
            self._socket.abort()

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def drop(self) -> None:
        """End the connection immediately, to make room for another."""
        self._open_connections.leave(self)
        self._socket.abort()

    # ---- the end ---------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End the connection: send what was written, and read for a while what the client still sends.

        A connection that is closed with unread data is reset, and a reset discards the answer.
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
        """Return whether the connection is ending."""
        return self._ending or self._socket.is_closing()

    def _refuse(self, status: int, message: str) -> None:
        """Answer a request that did not reach the app, and end the connection."""
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
    """The transport for uvicorn; its `close` is that of the connection."""

    def __init__(self, transport: asyncio.Transport, connection: Connection):
        self._transport, self._connection = transport, connection

    def close(self) -> None:
        self._connection.close()

    def is_closing(self) -> bool:
        return self._connection.is_ending()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def _address(client: tuple[str, int] | None) -> str:
    """Return the address of a client; for IPv6 its /64 network, the usual share of one household."""
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
    """Answer a request on a connection for which there was no room."""
    headers = {"content-type": "application/json", "retry-after": "2", "connection": "close"}
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    pairs.append((b"content-length", f"{len(_BUSY)}".encode()))
    await send({"type": "http.response.start", "status": 503, "headers": pairs})
    await send({"type": "http.response.body", "body": _BUSY})
