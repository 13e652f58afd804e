"""Read a client's text in two checkpoints that a crosscoder reads, side by side: below /api/compare."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from bridge.hooks import capture
from bridge.nanochat.loss import losses_of
from bridge.runtime import InterpretableModel
from bridge.server.bodies import Fields, Refusal
from bridge.server.session import Acts, Session, parts
from bridge.torch_sae import TorchSAE

_MOST = 32
"""Features per token and checkpoint."""
_DIFFERENT = 24
"""Features that differ, in an answer."""


@runtime_checkable
class Checkpoints(Protocol):
    """The checkpoints of a run: `bridge.stages.exploring.Checkpoints`. Call both functions through `Session.run`."""

    names: tuple[str, ...]
    chosen: str
    """The one that the server's model is."""

    def opened(self, name: str) -> InterpretableModel:
        """Return a checkpoint with its own SAEs; ValueError or OSError if it has changed or cannot be read."""

    def saes(self, name: str) -> Mapping[str, TorchSAE]:
        """Return a checkpoint's own SAEs by hook; as `opened`."""


class _Reading(NamedTuple):
    """A text in one checkpoint."""

    sae: TorchSAE
    acts: Acts
    losses: list[float | None]
    """Of every token in nats; None of the first, which nothing predicts."""


def routes(session: Session, checkpoints: Checkpoints | None) -> list[Route]:
    """Return the routes."""
    return [Route("/api/compare", functools.partial(text, session, checkpoints), methods=["POST"])]


async def text(session: Session, checkpoints: Checkpoints | None, request: Request) -> Response:
    """Return the strongest features at each token in two checkpoints, their losses, and the features that differ."""
    fields = Fields(await session.body(request), known=("text", "hook", "first", "second", "top_k"))
    if checkpoints is None:
        raise Refusal(404, "this run is on one checkpoint: `python -m experiments.train --checkpoints=…` reads several")
    hooks = session.im.hooks
    hook = fields.choice("hook", hooks, *hooks[:1] if len(hooks) == 1 else ())
    names = [fields.choice(name, checkpoints.names) for name in ("first", "second")]
    top_k, content = fields.whole("top_k", 1, _MOST, 8), fields.text("text")

    async def make() -> dict[str, Any]:
        ids = await session.ids(content)
        session.check_size(2 * top_k, len(ids))
        readings = [await session.run(_read, session, checkpoints, name, ids, hook) for name in names]
        sides, differing = await session.run(_compare, readings, top_k)
        tokens = [{"id": i, "text": t} for i, t in zip(ids[1:], session.spell(ids)[1:], strict=True)]
        return {
            "tokens": tokens,
            "sides": [
                {"checkpoint": name, "features": side[1:], "losses": reading.losses[1:]}
                for name, side, reading in zip(names, sides, readings, strict=True)
            ],
            "differ": differing,
        }

    return await session.answer(request, make)


def open_or_refuse(session: Session, checkpoints: Checkpoints, name: str) -> InterpretableModel:
    """Return a checkpoint with its own SAEs.

    Raises:
      Refusal: 409 if it has changed since the server started, or cannot be read.
    """
    if name == checkpoints.chosen:
        return session.im
    try:
        return checkpoints.opened(name)
    except (OSError, ValueError) as error:
        raise Refusal(409, f"checkpoint {name} cannot be read: {error}") from error


def steering_with(session: Session, checkpoints: Checkpoints, name: str) -> InterpretableModel:
    """Return the server's model with the SAEs of another checkpoint, whose directions are then pushed.

    Raises:
      Refusal: as `open_or_refuse`.
    """
    if name == checkpoints.chosen:
        return session.im
    try:
        return InterpretableModel(session.im.model, checkpoints.saes(name), session.im.tokenizer)
    except (OSError, ValueError) as error:
        raise Refusal(409, f"the SAEs of checkpoint {name} cannot be read: {error}") from error


@torch.no_grad()
def _read(session: Session, checkpoints: Checkpoints, name: str, ids: Sequence[int], hook: str) -> _Reading:
    """Run one checkpoint over a text."""
    im = open_or_refuse(session, checkpoints, name)
    tokens = torch.tensor([ids], device=im.model.lm_head.weight.device)
    with capture(im.model, [hook]) as acts:
        logits = im.model(tokens)
    losses = losses_of(logits[:, :-1], tokens[:, 1:])[0].double()
    known = torch.nan_to_num(losses, 0.0, 0.0, 0.0).mul(1e4).round().div(1e4).tolist()
    return _Reading(im.sae(hook), acts[hook], [None, *known])


@torch.no_grad()
def _compare(readings: Sequence[_Reading], top_k: int) -> tuple[list[list[list[dict[str, Any]]]], list[dict[str, Any]]]:
    """Return the strongest features of every token in both readings, and those whose activations differ most.

    Activations of checkpoints' own SAEs have the units of the crosscoder, so that they can be compared.
    """
    sides: list[list[list[dict[str, Any]]]] = [[] for _ in readings]
    width = readings[0].sae.d_sae
    most, at = (torch.zeros(width, dtype=dtype) for dtype in (torch.float32, torch.int64))
    values = torch.zeros(len(readings), width)
    position = 0
    for codes in _codes(readings):
        for side, f in zip(sides, codes, strict=True):
            top = f.topk(min(top_k, width), dim=1)
            for row in zip(top.indices.tolist(), top.values.tolist(), strict=True):
                side.append([{"index": i, "value": v} for i, v in zip(*row, strict=True) if v > 0])
        difference = (codes[1] - codes[0]).abs()
        if position == 0:
            difference[0] = 0  # BOS
        largest, where = difference.max(0)
        rises = largest > most
        most, at = torch.where(rises, largest, most), torch.where(rises, where + position, at)
        chosen = torch.stack([f[where, torch.arange(width)] for f in codes])
        values = torch.where(rises, chosen, values)
        position += len(codes[0])
    found = most.topk(min(_DIFFERENT, width)).indices.tolist()
    return sides, [
        {"index": i, "position": int(at[i]) - 1, "first": float(values[0, i]), "second": float(values[1, i])}
        for i in found
        if most[i] > 0
    ]


def _codes(readings: Sequence[_Reading]) -> Iterator[list[torch.Tensor]]:
    """Yield the activations of all features in every reading, (t, f) each, a few positions at a time."""
    for some in zip(*(parts(reading.acts) for reading in readings), strict=True):
        yield [reading.sae.encode(part).float().cpu() for reading, part in zip(readings, some, strict=True)]
