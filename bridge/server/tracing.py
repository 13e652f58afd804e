"""Compute attribution graphs of prompts for the page."""

from collections.abc import Callable
from typing import Any, Protocol, get_args, runtime_checkable

from anyio import from_thread
from starlette.requests import Request
from starlette.responses import Response

from bridge.circuits.tracing import Limits, Measure
from bridge.server.bodies import Fields, Refusal, refusing
from bridge.server.session import Session


@runtime_checkable
class Tracer(Protocol):
    """The part of `bridge.graphs.Tracer` that a server uses."""

    def document(self, prompt: str, measure: Measure, limits: Limits, between: Callable[[], object]) -> dict[str, Any]:
        """Return the graph of a prompt as the page reads it; ValueError if there can be none."""


class Graphs:
    """The endpoint of attribution graphs, of runs that have transcoders of all layers."""

    def __init__(self, session: Session, tracer: Tracer | None):
        self._session, self._tracer = session, tracer

    @property
    def exist(self) -> bool:
        """True if prompts can be traced."""
        return self._tracer is not None

    async def graph(self, request: Request) -> Response:
        """Return the attribution graph of a prompt."""
        session = self._session
        fields = Fields(await session.body(request), known=("prompt", "measure"))
        prompt, measure = fields.text("prompt"), fields.choice("measure", get_args(Measure), "logit")
        tracer, limits = self._tracer, session.limits
        if tracer is None:
            raise Refusal(
                404,
                "this run has no transcoders of all layers: `python -m experiments.train --layer=all "
                "--hook_type=mlp_in --target_hook=mlp --skip` trains them",
            )

        async def make() -> dict[str, Any]:
            ids = await session.ids(prompt)
            if len(ids) > limits.graph_tokens:
                raise Refusal(
                    422,
                    f"the prompt has {len(ids):,} tokens, and this server traces at most {limits.graph_tokens}: "
                    "give a shorter one, or use python -m experiments.trace",
                )
            sizes = Limits(max_features=limits.graph_features)
            with refusing():
                return await session.run(tracer.document, prompt, measure, sizes, from_thread.check_cancelled)

        return await session.answer(request, make)
