"""Check hosts, origins and tokens of every request before anything else."""

import hashlib
import ipaddress
import logging
import secrets
import socket
from collections.abc import Collection, Mapping
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bridge.server.bodies import Refusal

log = logging.getLogger(__name__)

WIRE = "/v1/"
"""The path of Neuronpedia's API; its clients send the secret in a header of its own."""

_HEADERS: Mapping[str, str] = {
    "content-security-policy": (
        "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "x-frame-options": "DENY",
    "cache-control": "no-store",
}


def _headers(embed: Collection[str]) -> dict[str, str]:
    """Return the security headers of every answer; only pages of the origins `embed` may show it in a frame."""
    headers = dict(_HEADERS)
    if embed:
        del headers["x-frame-options"]
        policy = headers["content-security-policy"]
        headers["content-security-policy"] = policy.replace(
            "frame-ancestors 'none'", f"frame-ancestors {' '.join(embed)}"
        )
    return headers


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a server at the host."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """Outermost middleware: refuses foreign requests, adds security headers, and hides internals in errors.

    A page of another site can make a browser send requests here. They carry that site's name: in Origin, in
    Sec-Fetch-Site, or, after DNS rebinding to this machine's address, in Host.

    Args:
      app: the app to guard.
      host: where the server listens. On loopback, requests must name this machine. Elsewhere they may also name any
        address (an attacker's page has a name) or this machine's name, and must carry the token.
      names: other names by which this machine is known, such as host.docker.internal.
      token: the token that every request must carry as `Authorization: Bearer T`, or as the cookie that `/?token=T`
        sets; None requires none.
      secret: the secret that requests below /v1/ may carry instead, as `X-Secret-Key`; without a token they must.
      embed: origins whose pages may show this server's pages in a frame, such as https://blog.example.
    """

    def __init__(
        self,
        app: ASGIApp,
        host: str = "127.0.0.1",
        names: Collection[str] = (),
        token: str | None = None,
        secret: str | None = None,
        embed: Collection[str] = (),
    ):
        self.app = app
        self._headers = _headers(embed)
        self._local = is_loopback(host)
        own = () if self._local else (host, socket.gethostname())
        self._names = {name.lower() for name in ("localhost", *own, *names)}
        self._token, self._secret = token, secret
        # All ports of a host share cookies: a server with another token needs another cookie name.
        self._cookie = "jsae-" + hashlib.sha256((token or "").encode()).hexdigest()[:12]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on to the app, or refuse it."""
        if scope["type"] != "http":  # start and stop of the server; there are no web sockets
            await self.app(scope, receive, send)
            return
        started = False
        cookie = self._new_cookie(scope)

        async def sender(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                for name, value in self._headers.items():
                    headers.setdefault(name, value)
                if cookie and message["status"] < 400:
                    headers.append("set-cookie", cookie)
            await send(message)

        try:
            self._admit(scope)
            await self.app(scope, receive, sender)
        except ClientDisconnect:
            return
        except Refusal as refusal:
            if started:
                raise
            await answer(refusal)(scope, receive, sender)
        except Exception:
            log.exception("%s %r failed", scope["method"], scope["path"])
            if started:  # break the connection, so that no client takes a partial answer for the whole
                raise
            await answer(Refusal(500, "the server failed: see its log"))(scope, receive, sender)

    def _admit(self, scope: Scope) -> None:
        """Raise Refusal for a request that is not allowed."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self._is_mine(host):
            raise Refusal(403, f"the host {host[:100]!r} is not this server: open the address that it printed at start")
        origin = headers.get("origin")
        if origin is not None and not _same(origin, host):
            raise Refusal(
                403, f"the request is from a page of {origin[:100]!r}: only this server's own page may send it"
            )
        site = headers.get("sec-fetch-site", "none")
        if scope["path"] != "/" and site not in ("none", "same-origin"):
            raise Refusal(
                403,
                f"the request is from a page of another site (Sec-Fetch-Site: {site[:20]}): "
                "only this server's own page may send it",
            )
        if not self._is_known(scope, headers):
            raise Refusal(401, "the token is missing or wrong: open the address that the server printed at start")

    def _is_mine(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return name in self._names
        return address.is_loopback or not self._local

    def _is_known(self, scope: Scope, headers: Headers) -> bool:
        on_wire = scope["path"].startswith(WIRE)
        if self._token is None and not (on_wire and self._secret is not None):
            return True
        request = Request(scope)
        given = [request.cookies.get(self._cookie), headers.get("authorization", "").removeprefix("Bearer ")]
        if scope["path"] == "/":
            given.append(request.query_params.get("token"))
        if _is_any(self._token, given):
            return True
        return on_wire and any(_is_any(known, [headers.get("x-secret-key")]) for known in (self._secret, self._token))

    def _new_cookie(self, scope: Scope) -> str | None:
        """Return the cookie for a browser that opened `/?token=T`."""
        if self._token is None or scope["path"] != "/":
            return None
        if not _is_any(self._token, [Request(scope).query_params.get("token")]):
            return None
        return f"{self._cookie}={self._token}; Path=/; HttpOnly; SameSite=Strict"


def answer(refusal: Refusal) -> JSONResponse:
    """Return the response for a refusal."""
    return JSONResponse({"error": refusal.message}, refusal.status, refusal.headers)


def _is_any(secret: str | None, given: list[Any]) -> bool:
    """Return whether one of the texts `given` is `secret`, in a time that does not depend on their contents."""
    if secret is None:
        return False
    return any(secrets.compare_digest(secret.encode(), text.encode()) for text in given if text)


def _same(origin: str, host: str) -> bool:
    """Return whether an Origin is that of the pages that a Host serves."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and parts.netloc.lower() == host.lower()
