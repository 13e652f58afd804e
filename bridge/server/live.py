"""Answer the page's requests below /api: features of a text, steered continuations, notes; graphs are in tracing.py."""

import contextlib
import functools
import json
import logging
import threading
from collections.abc import AsyncGenerator, Iterator, Mapping
from pathlib import Path
from typing import Any

from anyio import to_thread
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bridge import ranges
from bridge.run import labels
from bridge.runtime import InterpretableModel, Steer, Token
from bridge.server import compare, lens_api
from bridge.server.answers import Stream
from bridge.server.bodies import Fields, Refusal, refusing
from bridge.server.compare import Checkpoints
from bridge.server.session import Session
from bridge.server.tracing import Graphs, Tracer
from bridge.steering import MODES, POSITIONS

log = logging.getLogger(__name__)

MOST_FEATURES = 32
"""Features per token of a text that is read."""
STRONGEST = 1e6
"""Largest magnitude of a strength: far above useful values, and far below overflow."""
_FEATURES_PER_TOKEN = 10  # of a continuation
_MESSAGES = 64
_NEUTRAL: Mapping[str, float | None] = {"additive": 0.0, "orthogonal": 1.0, "scale": 1.0}
_STEER_FIELDS = ("hook", "index", "mode", "strength", "positions")


class Api:
    """The endpoints below /api; requests and answers are JSON."""

    def __init__(
        self, session: Session, run: Path, tracer: Tracer | None = None, checkpoints: Checkpoints | None = None
    ):
        self._session, self._run, self._checkpoints = session, run, checkpoints
        self._graphs = Graphs(session, tracer)
        self._writing = threading.Lock()

    def routes(self) -> list[Route]:
        """Return the routes of all endpoints."""
        return [
            Route("/api/info", self.info),
            Route("/api/activations", self.activations, methods=["POST"]),
            Route("/api/latent", self.latent, methods=["POST"]),
            Route("/api/graph", self._graphs.graph, methods=["POST"]),
            Route("/api/steer", self.steer, methods=["POST"]),
            Route("/api/notes", self.notes),
            Route("/api/notes", self.note, methods=["POST"]),
            *lens_api.routes(self._session),
            *compare.routes(self._session, self._checkpoints),
        ]

    async def info(self, request: Request) -> Response:
        """Describe the model, its SAEs, the ways to steer, and the limits."""
        session, config, checkpoints = self._session, self._session.nano.config, self._checkpoints
        return JSONResponse(
            {
                "live": True,
                "graphs": self._graphs.exist,
                "model": {
                    "name": session.nano.name,
                    "n_layer": config.n_layer,
                    "n_embd": config.n_embd,
                    "vocab_size": config.vocab_size,
                    "chat": session.chat,
                    "trained_to_chat": session.nano.is_chat,
                },
                "saes": [
                    {"hook": hook, "architecture": sae.architecture, "d_sae": sae.d_sae}
                    for hook, sae in session.im.saes.items()
                ],
                "modes": [
                    {"name": mode, "needs_strength": mode != "ablate", "neutral": _NEUTRAL.get(mode)} for mode in MODES
                ],
                "positions": list(POSITIONS),
                "lenses": list(self._session.lenses),
                "checkpoints": list(checkpoints.names) if checkpoints else [],
                "checkpoint": checkpoints.chosen if checkpoints else None,
                "limits": {
                    "prompt_tokens": session.longest_prompt,
                    "max_tokens": session.limits.max_tokens,
                    "seconds": session.limits.seconds,
                    "features": session.limits.features,
                },
            }
        )

    async def activations(self, request: Request) -> Response:
        """Return the features that fire most at each token of a text."""
        fields = await self._fields(request, "text", "hook", "top_k")
        hook, top_k = self._hook(fields), fields.whole("top_k", 1, MOST_FEATURES, 8)
        text, session = fields.text("text"), self._session

        async def make() -> dict[str, Any]:
            ids = await session.ids(text)
            strongest = await session.run(session.strongest, ids, hook, top_k)
            # BOS, which precedes the text, is not shown: SAEs are not trained on it.
            features = [[{"index": i, "value": value} for i, value in pairs] for pairs in strongest[1:]]
            return {"tokens": self._tokens(ids[1:]), "features": features}

        return await session.answer(request, make)

    async def latent(self, request: Request) -> Response:
        """Return the activations of one latent at each token of a text."""
        fields = await self._fields(request, "text", "hook", "index")
        hook = self._hook(fields)
        index, text = self._index(fields, hook), fields.text("text")
        session = self._session

        async def make() -> dict[str, Any]:
            ids = await session.ids(text)
            values = await session.run(session.activation, ids, hook, index)
            return {"tokens": self._tokens(ids[1:]), "values": values[1:]}

        return await session.answer(request, make)

    async def steer(self, request: Request) -> Response:
        """Stream a continuation without and with steering, one line of JSON per token, alternating."""
        names = [
            "prompt",
            "messages",
            "steer",
            "directions_of",
            "strength_multiplier",
            "temperature",
            "max_tokens",
            "seed",
        ]
        fields, limits = await self._fields(request, *names), self._session.limits
        steers = [self._steer(entry) for entry in fields.objects("steer", limits.features, _STEER_FIELDS)]
        sampling = {
            "max_tokens": fields.whole("max_tokens", 1, limits.max_tokens, min(64, limits.max_tokens)),
            "temperature": fields.temperature("temperature", 2, 0.5),
            "seed": fields.whole("seed", 0, 2**63 - 1, 16),
            "strength_multiplier": fields.number("strength_multiplier", 0, 10, 1.0),
            "features": _FEATURES_PER_TOKEN,
        }
        with contextlib.ExitStack() as held:
            held.enter_context(self._session.generations.take())
            ids, stop_tokens = await self._prompt(fields)
            im = await self._steered(fields)
            with refusing():
                streams = {
                    which: im.generate(ids, steers if pushed else [], stop_tokens=stop_tokens, **sampling)
                    for which, pushed in {"default": False, "steered": True}.items()
                    if steers or not pushed
                }
            lines = self._lines(streams, sampling["max_tokens"])
            return Stream(lines, "application/x-ndjson", held.pop_all(), limits.seconds)

    async def _steered(self, fields: Fields) -> InterpretableModel:
        """Return the model with the SAEs whose directions are pushed: its own, or those of another checkpoint."""
        if self._checkpoints is None:
            if fields.has("directions_of"):
                raise Refusal(400, "directions_of is for a run on several checkpoints: leave it out")
            return self._session.im
        name = fields.choice("directions_of", self._checkpoints.names, self._checkpoints.chosen)
        return await self._session.run(compare.steering_with, self._session, self._checkpoints, name)

    async def notes(self, request: Request) -> Response:
        """Return the notes of people."""

        async def make() -> dict[str, Any]:
            self._check_notes()
            try:
                return {"notes": await to_thread.run_sync(labels.notes, self._run)}
            except (OSError, ValueError) as error:
                raise Refusal(500, f"the notes cannot be read: {error}") from error

        return await self._session.answer(request, make)

    async def note(self, request: Request) -> Response:
        """Save a person's label and note for a latent."""
        fields = await self._fields(request, "hook", "latent", "label", "note")
        hook = self._hook(fields)
        latent = self._index(fields, hook, "latent")
        line = functools.partial(
            labels.append, self._run, hook, latent, fields.text("label", ""), fields.text("note", "")
        )

        def write() -> dict[str, Any]:
            with self._writing:
                self._check_notes()
                return line()

        try:
            with refusing():
                return JSONResponse(await to_thread.run_sync(write))
        except OSError as error:
            raise Refusal(507, f"the note was not saved: {error.strerror or error}") from error

    def _check_notes(self) -> None:
        """Raise Refusal if the notes are too large to be read for every request."""
        file, most = labels.notes_file(self._run), self._session.limits.notes_bytes
        size = file.stat().st_size if file.is_file() else 0
        if size > most:
            raise Refusal(
                507, f"{file.name} has {size:,} bytes: this server reads at most {most:,}; move the file elsewhere"
            )

    async def _fields(self, request: Request, *known: str) -> Fields:
        return Fields(await self._session.body(request), known=known)

    def _hook(self, fields: Fields) -> str:
        hooks = self._session.im.hooks
        return fields.choice("hook", hooks, *hooks[:1] if len(hooks) == 1 else ())

    def _index(self, fields: Fields, hook: str, name: str = "index") -> int:
        return fields.whole(name, 0, self._session.im.sae(hook).d_sae - 1)

    def _steer(self, fields: Fields) -> Steer:
        hook = self._hook(fields)
        mode = fields.choice("mode", MODES, "additive")
        strength = fields.number("strength", -STRONGEST, STRONGEST, *[0.0] if mode == "ablate" else ())
        fields.checked("strength", lambda where, value: ranges.check_strength(mode, value, where), 0.0)
        return Steer(hook, self._index(fields, hook), mode, strength, fields.choice("positions", POSITIONS, "all"))

    async def _prompt(self, fields: Fields) -> tuple[list[int], tuple[int, ...]]:
        """Return the tokens to continue, and those that end the continuation."""
        if fields.has("prompt") == fields.has("messages"):
            raise Refusal(400, "give either a prompt or messages")
        if fields.has("prompt"):
            return await self._session.ids(fields.text("prompt")), (self._session.im.tokenizer.bos_token_id,)
        messages = fields.objects("messages", _MESSAGES, ("role", "content"))
        chat = [{"role": m.choice("role", ("user", "assistant")), "content": m.text("content")} for m in messages]
        return await self._session.chat_ids(chat)

    def _tokens(self, ids: list[int]) -> list[dict[str, Any]]:
        return [{"id": i, "text": text} for i, text in zip(ids, self._session.spell(ids), strict=True)]

    async def _lines(self, streams: Mapping[str, Iterator[Token]], max_tokens: int) -> AsyncGenerator[str, None]:
        """Yield lines of JSON for the tokens of generations; the last one says that all are done, or what failed."""
        try:
            async with contextlib.aclosing(self._session.interleave(streams, max_tokens)) as events:
                async for which, event in events:
                    yield _line(
                        {"which": which, "end": event} if isinstance(event, str) else _token_event(which, event)
                    )
            yield _line({"done": True})
        except Refusal as refusal:
            yield _line({"error": refusal.message})
        except Exception:  # the status was sent: this is the only way to report it
            log.exception("a generation failed")
            yield _line({"error": "the generation failed: see the server's log"})


def _token_event(which: str, token: Token) -> dict[str, Any]:
    features = {hook: [{"index": i, "value": v} for i, v in pairs] for hook, pairs in token.features.items()}
    return {"which": which, "id": token.id, "text": token.text, "features": features}


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"
