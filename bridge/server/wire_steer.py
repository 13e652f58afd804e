"""Steering in Neuronpedia's inference API: by features or directions, answered at once or streamed."""

import contextlib
import dataclasses
import json
import math
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bridge import ranges
from bridge.runtime import InterpretableModel, Steer, Token
from bridge.server.answers import Stream, while_connected
from bridge.server.bodies import Fields, Refusal, refusing
from bridge.server.chats import MESSAGES, ROLES
from bridge.server.session import Session
from bridge.server.source_ids import Sources
from bridge.steering import feature
from bridge.torch_sae import TorchSAE

BOS = "<|bos|>"
"""Some clients prepend it to a prompt, which gets one anyway."""
LARGEST = 1e6
"""Largest magnitude of strengths and vector entries: far above useful values, and far below overflow."""
_METHODS: Mapping[str, str] = {
    "SIMPLE_ADDITIVE": "additive",
    "ORTHOGONAL_DECOMP": "orthogonal",
    "PROJECTION_CAP": "projection_cap",
}
_TYPES = ("STEERED", "DEFAULT")
_SECONDS_TO_END = 30.0
"""How long the last token of a generation may take after its time is over."""

Push = tuple[str, torch.Tensor, float]
"""Hook, direction (C,), strength."""
Outputs = Mapping[str, str]
"""The text of each type so far."""


class Steering:
    """The endpoints that generate. As in Neuronpedia, frequency penalties and log-probabilities are ignored."""

    def __init__(self, session: Session, sources: Sources):
        self._session, self._sources = session, sources

    async def completion(self, request: Request) -> Response:
        """Continue a text; the outputs do not repeat it."""
        fields = await self._sources.fields(request)
        if fields.has("features") == fields.has("vectors"):
            raise Refusal(400, "exactly one of features or vectors must be provided")
        ids = await self._session.ids(fields.text("prompt").removeprefix(BOS))
        stop_tokens = (self._session.im.tokenizer.bos_token_id,)

        def answer(outputs: Outputs) -> dict[str, Any]:
            return {"outputs": [{"type": kind, "output": text} for kind, text in outputs.items()]}

        return await self._generate(request, fields, ids, stop_tokens, "all", answer)

    async def completion_chat(self, request: Request) -> Response:
        """Generate the assistant's answer; the outputs are whole chats, as messages and as text."""
        fields = await self._sources.fields(request)
        if fields.has("features") and fields.has("vectors"):
            raise Refusal(400, "provide at most one of features or vectors")
        messages = [
            {"role": m.choice("role", tuple(ROLES)), "content": m.text("content")}
            for m in fields.objects("prompt", MESSAGES)
        ]
        ids, stop_tokens = await self._session.chat_ids([m | {"role": ROLES[m["role"]]} for m in messages])
        raw = self._session.im.tokenizer.decode(ids)

        def answer(outputs: Outputs) -> dict[str, Any]:
            answers = [
                {
                    "chatTemplate": [*messages, {"role": "assistant", "content": text}],
                    "raw": raw + text,
                    "type": kind,
                }
                for kind, text in outputs.items()
            ]
            return {"outputs": answers, "input": {"chatTemplate": messages, "raw": raw}}

        positions = "all" if fields.flag("steerSpecialTokens", True) else "not_special"
        return await self._generate(request, fields, ids, stop_tokens, positions, answer)

    async def _generate(
        self,
        request: Request,
        fields: Fields,
        ids: list[int],
        stop_tokens: Sequence[int],
        positions: str,
        answer: Callable[[Outputs], dict[str, Any]],
    ) -> Response:
        """Generate the requested types, alternating; every frame of a stream holds the whole text so far."""
        limits = self._session.limits
        types = dict.fromkeys(fields.texts("types", len(_TYPES)))
        if not types or not set(types) <= set(_TYPES):
            raise Refusal(400, f"types must be some of {', '.join(_TYPES)}")
        fields.number("freqPenalty", -LARGEST, LARGEST, None)
        fields.whole("nLogprobs", 0, 2**31, None)
        mode = _METHODS[fields.choice("steerMethod", tuple(_METHODS))]
        sampling = {
            "max_tokens": fields.whole("nCompletionTokens", 1, limits.max_tokens),
            "temperature": fields.temperature("temperature", 100),
            "seed": _seed(fields),
            "strength_multiplier": fields.number("strengthMultiplier", -1000, 1000),
            "stop_tokens": stop_tokens,
            "features": 1,  # not in the answer
        }
        steers = _Steers(mode, sampling["strength_multiplier"], positions)
        pushes, streamed = self._pushes(fields, steers), fields.flag("stream", False)
        with contextlib.ExitStack() as held:
            held.enter_context(self._session.generations.take())
            with refusing():
                im, requests = _with_directions(self._session.im, pushes, steers)
                streams = {kind: im.generate(ids, requests if kind == "STEERED" else [], **sampling) for kind in types}
            outputs = self._outputs(streams, sampling["max_tokens"])
            if streamed:
                events = _events(outputs, answer, limits.answer_bytes)
                return Stream(events, "text/event-stream", held.pop_all(), limits.seconds)
            seconds = limits.seconds + _SECONDS_TO_END  # the generations end by themselves
            return JSONResponse(answer(await while_connected(request, lambda: _last(outputs), seconds)))

    async def _outputs(self, streams: Mapping[str, Iterator[Token]], max_tokens: int) -> AsyncGenerator[Outputs, None]:
        """Yield the texts so far, after every token and at the end."""
        outputs = dict.fromkeys(streams, "")
        async with contextlib.aclosing(self._session.interleave(streams, max_tokens)) as events:
            async for kind, event in events:
                if isinstance(event, Token):
                    outputs[kind] += event.text
                yield outputs

    def _pushes(self, fields: Fields, steers: "_Steers") -> list[Push]:
        """Return the directions to steer with: decoder rows of features, or vectors, scaled to unit length on request.

        Raises:
          Refusal: a feature, a direction or a strength is invalid; names the field.
        """
        most, width = self._session.limits.features, self._session.nano.config.n_embd
        pushes: list[Push] = []
        for item in fields.objects("features", most):
            self._sources.check_model(item)
            hook = self._sources.hook(item.text("source"))
            sae = self._session.im.sae(hook)
            with refusing():
                direction = feature(sae, item.index("index", sae.d_sae)).direction
            pushes.append((hook, direction, steers.strength(item)))
        for item in fields.objects("vectors", most):
            vector = torch.tensor(item.numbers("steeringVector", width, LARGEST))
            if not 0 < vector.norm() < math.inf:
                raise item.refusal("steeringVector", f"has norm {vector.norm():g}: it gives no direction to steer in")
            pushes.append((item.text("hook"), vector, steers.strength(item)))
        if fields.flag("normalizeSteering", False):
            pushes = [(hook, vector / vector.norm(), strength) for hook, vector, strength in pushes]
        return pushes


@dataclasses.dataclass(frozen=True)
class _Steers:
    """The settings that all pushes of a request share."""

    mode: str
    multiplier: float
    positions: str

    def strength(self, item: Fields) -> float:
        """Return the strength of one push; it must be in the mode's range before and after multiplication."""
        strength = item.number("strength", -LARGEST, LARGEST)
        item.checked("strength", lambda where, value: ranges.check_strength(self.mode, value, where))

        def check(where: str, value: float | int) -> None:
            ranges.check_strength(self.mode, value * self.multiplier, f"{where} * strengthMultiplier")

        item.checked("strength", check)
        return strength


def _seed(fields: Fields) -> int:
    """Return the seed of the sampling, a whole number; JavaScript clients may write it as a float."""
    seed = fields.number("seed", -(2**53), 2**53)
    if seed != int(seed):
        raise fields.refusal("seed", f"is {seed:g}: expected a whole number")
    return int(seed)


def _with_directions(
    im: InterpretableModel, pushes: Sequence[Push], settings: _Steers
) -> tuple[InterpretableModel, list[Steer]]:
    """Return the model with SAEs whose decoder rows are the directions, and the requests that steer with them.

    Rows of a TopK SAE are used without normalisation, as Neuronpedia uses vectors.

    Raises:
      ValueError: the model does not have a hook.
    """
    rows: dict[str, list[torch.Tensor]] = {}
    steers = []
    for hook, direction, strength in pushes:
        steers.append(Steer(hook, len(rows.setdefault(hook, [])), settings.mode, strength, settings.positions))
        rows[hook].append(direction.to(im.model.lm_head.weight.device))
    saes = {hook: _dictionary(torch.stack(directions)) for hook, directions in rows.items()}
    return InterpretableModel(im.model, saes, im.tokenizer) if saes else im, steers


def _dictionary(W_dec: torch.Tensor) -> TorchSAE:
    """Return an SAE with these decoder rows and an encoder of zeros."""
    n, width = W_dec.shape
    weights = {
        "W_dec": W_dec,
        "W_enc": torch.zeros_like(W_dec.T),
        "b_enc": W_dec.new_zeros(n),
        "b_dec": W_dec.new_zeros(width),
    }
    return TorchSAE({"architecture": "topk", "d_in": width, "d_sae": n, "k": 1}, weights)


async def _last(outputs: AsyncGenerator[Outputs, None]) -> Outputs:
    """Return the final texts."""
    written: Outputs = {}
    async with contextlib.aclosing(outputs):
        async for so_far in outputs:
            written = so_far
    return written


async def _events(
    outputs: AsyncGenerator[Outputs, None], answer: Callable[[Outputs], dict[str, Any]], most: int
) -> AsyncGenerator[str, None]:
    """Yield server-sent events, of at most `most` bytes together, not counting the last.

    Every frame holds the whole text so far. If the frames have too many bytes, some are left out, but not the last one,
    which is complete. An error becomes an event.
    """
    sent, frame, is_sent = 0, "", True
    async with contextlib.aclosing(outputs):
        try:
            async for so_far in outputs:
                frame = _event(answer(so_far))
                is_sent = sent + len(frame.encode()) <= most
                if is_sent:
                    sent += len(frame.encode())
                    yield frame
        except Refusal as refusal:  # the status was sent: this is the only way to report it
            frame, is_sent = _event({"error": refusal.message}), False
    if not is_sent:
        yield frame


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, allow_nan=False)}\n\n"
