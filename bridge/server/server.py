"""The web app: the static page of a run, and the endpoints for its requests. Starlette and uvicorn, extra [web]."""

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

from jsae import extras

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.requests import Request
    from starlette.responses import FileResponse, Response
    from starlette.routing import Route
except ImportError as error:
    raise ImportError(f"the live explorer needs starlette and uvicorn: {extras.advice('web')}") from error

from bridge.lenses import fitting
from bridge.lenses.lens import FittedLens
from bridge.locations import check_origins
from bridge.nanochat import Nanochat
from bridge.run import Run
from bridge.runtime import InterpretableModel
from bridge.server import wire
from bridge.server.bodies import Limits, Refusal
from bridge.server.compare import Checkpoints
from bridge.server.connections import Connection, OpenConnections
from bridge.server.guard import Guard, answer, is_loopback
from bridge.server.live import Api
from bridge.server.session import Session
from bridge.server.tracing import Tracer

log = logging.getLogger(__name__)

_PAGE = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}
"""Types of files that a page consists of. Other files in its folder are not served."""
_BACKLOG = 48
"""Connections accepted at a time: fewer than one address may hold, so that none of them drops another."""


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
    tracer: Tracer | None = None,
    checkpoints: Checkpoints | None = None,
    embed: Collection[str] = (),
) -> Starlette:
    """Return the app of a run: its page, the live endpoints below /api, Neuronpedia's inference API below /v1.

    Args:
      run: the run's directory; its explorer/ holds the page and people's notes.
      im: the model with the run's SAEs; from now on only the app may run it.
      nano: the checkpoint.
      host: where the server will listen, see `Guard`.
      names: other names of this machine, see `Guard`.
      token: the token that clients must send; required unless the host is loopback.
      secret: the secret that Neuronpedia must send, see `Guard`.
      limits: the limits of requests.
      chat: whether the model can chat; None decides by its path.
      model_id: Neuronpedia's name for the model; None accepts any name.
      tracer: computes attribution graphs with the same model; None offers none.
      checkpoints: those that the run's crosscoders read, the model among them; None for a run on one.
      embed: origins whose pages may show this server's pages in a frame, see `Guard`.

    Raises:
      ValueError: there is no token although others can reach the host, the model has no tokenizer, or a lens of the
        run is broken or of another model; ConfigError: what is in `embed` is not an origin.
    """
    if token is None and not is_loopback(host):
        raise ValueError(f"others can reach a server at {host}: give it a token")
    check_origins(embed)
    session = Session(im, nano, limits or Limits(), chat, _fitted_lenses(Run(run), nano))
    everything_else = Route("/{name:path}", functools.partial(page, Run(run).explorer_folder))
    routes = [*Api(session, run, tracer, checkpoints).routes(), *wire.routes(session, model_id), everything_else]
    return Starlette(
        routes=routes,
        middleware=[Middleware(Guard, host=host, names=names, token=token, secret=secret, embed=tuple(embed))],
        exception_handlers={HTTPException: _refused_route},  # type: ignore[dict-item]  # for this exception only
    )


def _fitted_lenses(run: Run, nano: Nanochat) -> list[FittedLens]:
    """Return the fitted lenses of a run.

    Raises:
      ValueError: one is broken, or of another model; names its file.
    """
    return [fitting.load(nano, file) for file in run.lens_files]


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
    tracer: Tracer | None = None,
    checkpoints: Checkpoints | None = None,
    embed: Collection[str] = (),
    say: Callable[[str], Any] = log.info,
) -> None:
    """Serve a run until interrupted (SIGINT, SIGTERM).

    Args:
      run: the run's directory.
      load: returns the model with its SAEs; called once the port is bound.
      host: where to listen. Unless it is loopback, a token is made, which the printed address contains.
      port: the port; 0 takes any free one.
      names: other names of this machine that requests may use.
      secret: the secret that Neuronpedia must send in `X-Secret-Key`.
      limits: the limits of requests.
      chat: whether the model can chat; None decides by its path.
      model_id: Neuronpedia's name for the model; None accepts any name.
      tracer: computes attribution graphs with the same model; None offers none.
      checkpoints: those that the run's crosscoders read, the model among them; None for a run on one.
      embed: origins whose pages may show this server's pages in a frame, see `Guard`.
      say: called with the address to open.

    Raises:
      FileNotFoundError: the run does not exist.
      OSError: the port is in use, or the host is not an address of this machine.
    """
    if not Path(run).is_dir():
        raise FileNotFoundError(f"no run at {run}: give the directory of a run")
    token = None if is_loopback(host) else secrets.token_urlsafe(32)
    with contextlib.closing(listen(host, port)) as listener:
        im, nano = load()
        web_app = app(
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
            tracer=tracer,
            checkpoints=checkpoints,
            embed=embed,
        )
        gc.freeze()  # loaded objects stay: the garbage collector need not traverse them while clients wait
        say(f"explorer at {address(host, listener.getsockname()[1], token)}")
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config(web_app, limits)).run(sockets=[listener])


def config(web_app: Starlette, limits: Limits | None = None) -> uvicorn.Config:
    """Return uvicorn's configuration for the app: plain HTTP/1.1 with deadlines (`Connection`), no log of requests.

    A client that is late does not delay the end of the server.
    """
    limits = limits or Limits()
    return uvicorn.Config(
        web_app,
        loop="asyncio",
        http=functools.partial(Connection, open_connections=OpenConnections(limits)),  # type: ignore[arg-type]
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",  # it would write a warning for every invalid request
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=_BACKLOG,
        timeout_graceful_shutdown=2,
    )


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises:
      OSError: the port is in use, or the host is not an address of this machine; says what to do.
    """
    if not 0 <= port < 2**16:
        raise OSError(f"port {port} does not exist: give 1 to 65535, or 0 for any free port")
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise OSError(f"{host!r} is not an address of this machine ({error}): give one, such as 127.0.0.1") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen at {host}, port {port} ({error}): give another, or 0 for any free one") from error
    return listener


def address(host: str, port: int, token: str | None) -> str:
    """Return the address to open in a browser."""
    name = socket.gethostname() if host in ("0.0.0.0", "::", "") else host
    name = f"[{name}]" if ":" in name else name
    return f"http://{name}:{port}/" + (f"?token={token}" if token else "")


# ---- the page ------------------------------------------------------------------------------------------------------


async def page(folder: Path, request: Request) -> Response:
    """Serve `index.html` or a file of the page's folder; records, notes and files outside are answered with 404."""
    name = request.path_params["name"] or "index.html"
    file = folder / name
    try:
        served = re.fullmatch(r"(page-[0-9a-f]{16}/|graphs/)?[^./][^/]*", name) is not None and file.suffix in _PAGE
        served = served and file.resolve() == folder.resolve() / name and file.is_file()
    except (OSError, ValueError):  # a name that is invalid for files
        served = False
    if served:
        return FileResponse(file, headers={"cache-control": "no-cache"}, media_type=_PAGE[file.suffix])
    if name == "index.html":
        raise Refusal(404, f"{folder} has no index.html: `python -m experiments.explore --run_dir=…` writes the page")
    raise Refusal(404, f"there is nothing at {request.url.path[:200]!r}")


async def _refused_route(request: Request, error: HTTPException) -> Response:
    """Answer what Starlette's routes refuse: a method that a path does not support."""
    message = f"{request.method} {request.url.path[:200]} is not served: {error.detail}"
    return answer(Refusal(error.status_code, message, error.headers))
