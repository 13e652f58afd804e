"""The web app: the static page of a run, and live what it asks for. Starlette and uvicorn, extra [web]."""

import contextlib
import functools
import gc
import logging
import re
import secrets
import socket
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.requests import Request
    from starlette.responses import FileResponse, Response
    from starlette.routing import Route
except ImportError as error:
    raise ImportError("the live explorer needs starlette and uvicorn: pip install 'jsae[web]'") from error

from bridge.nanochat import Nanochat
from bridge.run import Run
from bridge.runtime import InterpretableModel
from bridge.server import wire
from bridge.server.bodies import Limits, Refusal
from bridge.server.connections import Connection, Crowd
from bridge.server.guard import Guard, answer, is_loopback
from bridge.server.live import Api
from bridge.server.session import Session

log = logging.getLogger(__name__)

_PAGE = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}
"""What a page is made of. Everything else in its folder stays unseen."""
_BACKLOG = 48
"""Connections that are accepted together: fewer than one address may hold, so that none of them drops another."""


def app(
    run: Path,
    im: InterpretableModel,
    nano: Nanochat,
    *,
    host: str = "127.0.0.1",
    names: Collection[str] = (),
    token: str | None = None,
    secret: str | None = None,
    limits: Limits | None = None,
    chat: bool | None = None,
    model_id: str | None = None,
) -> Starlette:
    """The app of a run: its page, the live part below /api, Neuronpedia's inference wire below /v1.

    Args:
      run: the run's directory; its explorer/ holds the page, and people's notes.
      im: the model with the run's SAEs; the app is the only one to run it from now on.
      nano: the checkpoint.
      host: where it will listen, see `Guard`.
      names: other names of this machine, see `Guard`.
      token: what clients must bring; needed unless the host is loopback.
      secret: what Neuronpedia must bring, see `Guard`.
      limits: what requests may ask.
      chat: whether the model can chat; unless given, what its path says.
      model_id: what Neuronpedia calls the model; None takes any name.

    Raises:
      ValueError: no token where others reach the host, or a model without a tokenizer.
    """
    if token is None and not is_loopback(host):
        raise ValueError(f"others can reach a server at {host}: give it a token")
    session = Session(im, nano, limits or Limits(), chat)
    everything_else = Route("/{name:path}", functools.partial(page, Run(run).explorer_folder))
    routes = [*Api(session, run).routes(), *wire.routes(session, model_id), everything_else]
    return Starlette(
        routes=routes,
        middleware=[Middleware(Guard, host=host, names=names, token=token, secret=secret)],
        exception_handlers={HTTPException: _not_taken},  # type: ignore[dict-item]  # of this exception alone
    )


def serve(
    run: str | Path,
    load: Callable[[], tuple[InterpretableModel, Nanochat]],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    names: Collection[str] = (),
    secret: str | None = None,
    limits: Limits | None = None,
    chat: bool | None = None,
    model_id: str | None = None,
    say: Callable[[str], Any] = log.info,
) -> None:
    """Serves a run until it is interrupted (SIGINT, SIGTERM).

    Args:
      run: the run's directory.
      load: makes the model with its SAEs; called when the port is ours.
      host: where to listen. Anything but loopback makes a token, which the address said at the start holds.
      port: where; 0 takes any that is free.
      names: other names of this machine that requests may use.
      secret: what Neuronpedia must bring in `X-Secret-Key`.
      limits: what requests may ask.
      chat: whether the model can chat; unless given, what its path says.
      model_id: what Neuronpedia calls the model; None takes any name.
      say: tells the person who started it the address to open.

    Raises:
      FileNotFoundError: no such run.
      OSError: the port is in use, or the host is none of this machine.
    """
    if not Path(run).is_dir():
        raise FileNotFoundError(f"no run at {run}: give the directory of one")
    token = None if is_loopback(host) else secrets.token_urlsafe(32)
    with contextlib.closing(listen(host, port)) as listener:
        im, nano = load()
        served = app(
            Path(run),
            im,
            nano,
            host=host,
            names=names,
            token=token,
            secret=secret,
            limits=limits,
            chat=chat,
            model_id=model_id,
        )
        gc.freeze()  # what is loaded stays: the garbage collector need not look through it while the clients wait
        say(f"explorer at {address(host, listener.getsockname()[1], token)}")
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config(served, limits)).run(sockets=[listener])


def config(served: Starlette, limits: Limits | None = None) -> uvicorn.Config:
    """Return how uvicorn runs the app: plain HTTP/1.1 with deadlines (`Connection`), no log of requests.

    A client that is late does not keep it from ending.
    """
    limits = limits or Limits()
    return uvicorn.Config(
        served,
        loop="asyncio",
        http=functools.partial(Connection, crowd=Crowd(limits)),  # type: ignore[arg-type]
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",  # its warnings are of what strangers send, a line for each
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=_BACKLOG,
        timeout_graceful_shutdown=2,
    )


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
      OSError: the port is in use, or the host is none of this machine; says what to do.
    """
    if not 0 <= port < 2**16:
        raise OSError(f"there is no port {port}: ports are 0 (any that is free) to 65535")
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise OSError(f"{host!r} is no address of this machine ({error}): give 127.0.0.1, or one it has") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen at {host}, port {port} ({error}): give another, or 0 for any free one") from error
    return listener


def address(host: str, port: int, token: str | None) -> str:
    """What a person opens."""
    name = socket.gethostname() if host in ("0.0.0.0", "::", "") else host
    name = f"[{name}]" if ":" in name else name
    return f"http://{name}:{port}/" + (f"?token={token}" if token else "")


# ---- the page ------------------------------------------------------------------------------------------------------


async def page(folder: Path, request: Request) -> Response:
    """Serve `index.html` or a file of the page's own folder; records, notes and what is outside are as if not there."""
    name = request.path_params["name"] or "index.html"
    file = folder / name
    try:
        there = re.fullmatch(r"(page-[0-9a-f]{16}/)?[^./][^/]*", name) is not None and file.suffix in _PAGE
        there = there and file.resolve() == folder.resolve() / name and file.is_file()
    except (OSError, ValueError):  # a name that no file can have
        there = False
    if there:
        return FileResponse(file, headers={"cache-control": "no-cache"}, media_type=_PAGE[file.suffix])
    if name == "index.html":
        raise Refusal(404, f"{folder} has no index.html: `python -m experiments.explore --run_dir=…` makes the page")
    raise Refusal(404, f"there is nothing at {request.url.path[:200]!r}")


async def _not_taken(request: Request, error: HTTPException) -> Response:
    """What the routes themselves refuse: a method that an address does not take."""
    told = f"{request.method} {request.url.path[:200]} is not served: {error.detail}"
    return answer(Refusal(error.status_code, told, error.headers))
