"""Answer the page's requests for lenses, below /api/lens: on a text, and on the direction of a latent."""

import functools
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from bridge.server import lens_tables
from bridge.server.bodies import Fields
from bridge.server.session import Session

_MOST = 10
"""Most tokens per cell."""


def routes(session: Session) -> list[Route]:
    """Return the routes."""
    endpoints = {"/api/lens": text, "/api/lens/latent": latent}
    return [Route(path, functools.partial(make, session), methods=["POST"]) for path, make in endpoints.items()]


async def text(session: Session, request: Request) -> Response:
    """Return a lens on a text: a row per layer, a column per token with BOS, and the tokens of the text."""
    fields = Fields(await session.body(request), known=("text", "lens", "top"))
    name, top = fields.choice("lens", tuple(session.lenses), "direct"), fields.whole("top", 1, _MOST, 5)
    content = fields.text("text")

    async def make() -> dict[str, Any]:
        ids = await session.ids(content)
        session.check_size(top * session.nano.config.n_layer, len(ids), numbers=2)
        found = await lens_tables.table(session, ids, name, top)
        return {"tokens": [{"id": i, "text": t} for i, t in zip(ids, session.spell(ids), strict=True)]} | found

    return await session.answer(request, make)


async def latent(session: Session, request: Request) -> Response:
    """Return the tokens that a latent's direction raises and lowers by each lens."""
    fields = Fields(await session.body(request), known=("hook", "index"))
    hooks = session.im.hooks
    hook = fields.choice("hook", hooks, *hooks[:1] if len(hooks) == 1 else ())
    index = fields.whole("index", 0, session.im.sae(hook).d_sae - 1)

    async def make() -> dict[str, Any]:
        return await session.run(lens_tables.written, session, hook, index)

    return await session.answer(request, make)
