"""Lenses in Neuronpedia's inference API: what every layer expects at every token, while the model writes on.

Requests are in camel case; the frames of the answer, which Neuronpedia passes on to its users, in snake case.
"""

import contextlib
import dataclasses
import json
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, NamedTuple

import anyio
from anyio import to_thread
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bridge.lenses.tables import rows_of
from bridge.nanochat.engine import NotFiniteError
from bridge.server.answers import Stream, while_connected
from bridge.server.bodies import Fields, Refusal
from bridge.server.chats import MESSAGES, Span, spans
from bridge.server.lens_passes import Continuation, Passes, ReadOuts
from bridge.server.lens_steering import Intervention, intervention
from bridge.server.session import Session
from bridge.server.source_ids import Sources
from bridge.server.wire_steer import BOS
from bridge.server.words import LONGEST_CHARACTER, UNKNOWN, Shown, display

log = logging.getLogger(__name__)

TYPES: Mapping[str, str] = {"LOGIT_LENS": "logit", "JACOBIAN_LENS": "jacobian"}
"""Neuronpedia's names of lenses."""
_MOST = 100  # tokens per cell
_AT_ONCE = 16  # positions that are read out in one turn at the model
_SECONDS_TO_END = 30.0

Frame = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """A checked request."""

    model: str
    types: list[str]
    ids: list[int]
    spans: list[Span]
    layers: dict[str, list[int]]
    top: int
    continuation: Continuation
    prepend_bos: bool
    reused: int
    """Positions at the start without read-outs, because the client has them."""
    words_only: bool
    change: Intervention | None

    def span(self, position: int) -> dict[str, Any]:
        """Return the fields that say which message a token belongs to; null without a chat."""
        if not self.spans:
            return dict.fromkeys(("message_index", "role", "channel", "section"))
        if position < len(self.spans):
            span = self.spans[position]
            return {"message_index": span.message, "role": span.role, "channel": None, "section": span.section}
        return {"message_index": self.spans[-1].message, "role": "assistant", "channel": None, "section": "content"}


class Lenses:
    """The endpoint that reads lenses."""

    def __init__(self, session: Session, sources: Sources):
        self._session, self._sources = session, sources

    @property
    def token_limit(self) -> int:
        """Most tokens of a text: as many as an answer with both lenses and ten tokens per cell has room for."""
        numbers = 2 * len(TYPES) * 10 * self._session.nano.config.n_layer
        return max(1, min(self._session.longest_prompt, self._session.limits.numbers // numbers))

    async def prompt(self, request: Request) -> Response:
        """Read lenses on a text or chat, and on what the model writes after it."""
        session, fields = self._session, await self._sources.fields(request)
        if fields.flag("failIfBusy", False) and session.generations.taken + session.readings.taken:
            return JSONResponse({"error": "the server is busy with another request", "busy": True}, 429)
        with contextlib.ExitStack() as held:
            held.enter_context(session.generations.take())
            wanted = await self._wanted(fields)
            frames = self._frames(wanted)
            if fields.flag("stream", True):
                return Stream(_lines(frames), "application/x-ndjson", held.pop_all(), session.limits.seconds)
            seconds = session.limits.seconds + _SECONDS_TO_END
            answer = await while_connected(request, lambda: _gathered(frames), seconds)
            return JSONResponse(answer, 500 if answer.get("kind") == "error" else 200)

    # ---- the request ------------------------------------------------------------------------------------------------

    async def _wanted(self, fields: Fields) -> _Wanted:
        """Return a request's fields, checked.

        Raises:
          Refusal: one is invalid, there is no such lens, or the text is too long.
        """
        session, depth = self._session, self._session.nano.config.n_layer
        types = list(dict.fromkeys(fields.texts("type", _MOST)))
        if not types or not set(types) <= set(TYPES):
            raise fields.refusal("type", f"must be some of {', '.join(TYPES)}")
        if "JACOBIAN_LENS" in types and "jacobian" not in session.lenses:
            raise Refusal(400, "the run has no Jacobian lens: fit one with `python -m experiments.lens --fit=jacobian`")
        ids, chat = await self._text(fields)
        top = min(fields.whole("topN", 1, _MOST, 10), session.nano.config.vocab_size)
        chosen = fields.indices("layers", depth)
        layers = {kind: rows_of(session.lenses[TYPES[kind]], depth, chosen) for kind in types}
        new = 0 if fields.items("inputTokenIds", 2**20, []) else fields.whole("numCompletionTokens", 0, 2**31, 0)
        new = min(new, session.limits.max_tokens, max(self.token_limit - len(ids), 0))
        session.check_size(top * sum(map(len, layers.values())), len(ids) + new, numbers=2)
        change = await to_thread.run_sync(intervention, session, fields)
        cached = fields.indices("cachedTokenIds", session.nano.config.vocab_size)
        ends = ["<|bos|>", *(["<|assistant_end|>"] if chat else [])]
        stop_tokens = tuple(session.im.tokenizer.special_tokens[name] for name in ends)
        return _Wanted(
            fields.text("model"),
            types,
            ids,
            chat,
            layers,
            top,
            Continuation(new, fields.temperature("temperature", 100, 1.0), stop_tokens),
            fields.flag("prependBos", True),
            0 if change is not None else _common(ids, cached),
            fields.flag("filterNonWordTokens", True),
            change,
        )

    async def _text(self, fields: Fields) -> tuple[list[int], list[Span]]:
        """Return the ids to read, and where they belong if they are a chat."""
        session = self._session
        ids, chat = fields.indices("inputTokenIds", session.nano.config.vocab_size), []
        if not ids:
            if fields.has("prompt") == fields.has("chat"):
                raise Refusal(400, "give exactly one of prompt and chat")
            if fields.has("chat"):
                fields.flag("enableThinking", False)
                fields.flag("preserveThinking", True)
                chat = await spans(session, fields.objects("chat", MESSAGES), answers=True, continues=True)
                ids = [span.token for span in chat]
            else:
                ids = await session.ids(fields.text("prompt").removeprefix(BOS), fields.flag("prependBos", True))
        if len(ids) > self.token_limit:
            raise Refusal(400, f"the text has {len(ids):,} tokens: lenses read at most {self.token_limit:,} here")
        longest = fields.whole("maxSeqLen", 1, 2**31, None)
        return ids[:longest], chat if longest is None or len(ids) <= longest else []

    # ---- the answer -------------------------------------------------------------------------------------------------

    async def _frames(self, wanted: _Wanted) -> AsyncGenerator[Frame, None]:
        """Yield the frames of an answer: meta, prompt, a token per position, done; or an error in the place of done."""
        yield _meta(wanted)
        shown = self._display(wanted.ids)
        yield {
            "kind": "prompt",
            "tokens": [self._token(wanted, *one) for one in zip(range(len(shown)), wanted.ids, shown, strict=True)],
        }
        try:
            completion: list[int] = []
            waiting: list[_Read] = []
            async for read in self._positions(wanted):
                if read.position < len(shown):
                    yield self._frame(wanted, read, shown[read.position])
                    continue
                completion.append(read.token)
                waiting.append(read)
                for frame in self._complete(wanted, waiting):
                    yield frame
            for frame in self._complete(wanted, waiting, at_the_end=True):
                yield frame
            yield {
                "kind": "done",
                "seq_len": len(wanted.ids) + len(completion),
                "prompt_len": len(wanted.ids),
                "vocab_size": self._session.nano.config.vocab_size,
                "completion": self._session.im.tokenizer.decode(completion),
            }
        except NotFiniteError as error:
            yield {"kind": "error", "error": str(error)}
        except Exception:  # the status was sent: this is the only way to report it
            log.exception("a lens failed")
            yield {"kind": "error", "error": "the lens failed: see the server's log"}

    def _display(self, ids: Sequence[int]) -> list[Shown]:
        return display([self._session.im.tokenizer.token_bytes_of(token) for token in ids])

    def _token(self, wanted: _Wanted, position: int, token: int, shown: Shown) -> Frame:
        return {
            "position": position,
            "token": shown.text,
            "id": token,
            "is_generated": position >= len(wanted.ids),
            "is_char_continuation": shown.repeats,
            **wanted.span(position),
        }

    def _frame(self, wanted: _Wanted, read: "_Read", shown: Shown) -> Frame:
        token = self._token(wanted, read.position, read.token, shown)
        return {"kind": "token", **token, "results": read.results}

    def _complete(self, wanted: _Wanted, waiting: list["_Read"], at_the_end: bool = False) -> list[Frame]:
        """Return the frames of new tokens that form whole characters, and remove these tokens from `waiting`."""
        shown = self._display([read.token for read in waiting])
        if not at_the_end and len(waiting) < LONGEST_CHARACTER and UNKNOWN in shown[0].text:
            return []
        frames = [self._frame(wanted, *one) for one in zip(waiting, shown, strict=True)]
        waiting.clear()
        return frames

    async def _positions(self, wanted: _Wanted) -> AsyncGenerator["_Read", None]:
        """Yield what lenses read: at the prompt after the reused positions, then at every new token."""
        session = self._session
        passes = iter(Passes(session, wanted.ids, wanted.continuation, wanted.change))
        chosen = {kind: (session.lenses[TYPES[kind]], layers) for kind, layers in wanted.layers.items()}
        read_outs = await session.run(ReadOuts, session, chosen, wanted.top, wanted.words_only)
        position, deadline = 0, anyio.current_time() + session.limits.seconds
        while anyio.current_time() < deadline and (one := await session.run(next, passes, None)) is not None:
            tokens, streams = one
            first = max(wanted.reused - position, 0)
            for start in range(first, len(tokens), _AT_ONCE):
                results = await session.run(read_outs, streams.at(slice(start, start + _AT_ONCE)))
                for place, result in enumerate(results, start):
                    yield _Read(position + place, tokens[place], result)
            position += len(tokens)


class _Read(NamedTuple):
    """The readings of lenses at a position."""

    position: int
    token: int
    results: list[Frame]


def _meta(wanted: _Wanted) -> Frame:
    return {
        "kind": "meta",
        "model": wanted.model,
        "types": wanted.types,
        "layers_by_type": wanted.layers,
        "top_n": wanted.top,
        "prompt_len": len(wanted.ids),
        "num_completion_tokens": wanted.continuation.tokens,
        "temperature": wanted.continuation.temperature,
        "prepend_bos": wanted.prepend_bos,
        "reuse_len": wanted.reused,
    }


def _common(ids: Sequence[int], cached: Sequence[int]) -> int:
    """Return the length of the common start of two texts."""
    length = min(len(ids), len(cached))
    return next((i for i in range(length) if ids[i] != cached[i]), length)


async def _lines(frames: AsyncGenerator[Frame, None]) -> AsyncGenerator[str, None]:
    async with contextlib.aclosing(frames):
        async for frame in frames:
            yield json.dumps(frame, ensure_ascii=False, allow_nan=False) + "\n"


async def _gathered(frames: AsyncGenerator[Frame, None]) -> Frame:
    """Return meta, tokens and done as one object; an error alone."""
    answer: Frame = {"meta": None, "tokens": [], "done": None}
    async with contextlib.aclosing(frames):
        async for frame in frames:
            if frame["kind"] == "error":
                return frame
            if frame["kind"] == "token":
                answer["tokens"].append(frame)
            elif frame["kind"] != "prompt":
                answer[frame["kind"]] = frame
    return answer
