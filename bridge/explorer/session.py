"""The model as many clients share it: one forward pass at a time, by turns, each client with its own steering."""

import codecs
import contextlib
import functools
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import anyio
import torch
from anyio import to_thread
from jaxtyping import Float
from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from bridge.explorer.bodies import Limits, Refusal, refusing
from bridge.hooks import capture
from bridge.nanochat import Nanochat
from bridge.nanochat.engine import chat_prompt, max_positions
from bridge.runtime import InterpretableModel, Token
from bridge.torch_sae import TorchSAE
from bridge.tracking import active

_POSITIONS_AT_ONCE = 64
"""Encoded together: of an SAE of 131,072 latents that is 32 MiB."""
_SECONDS_TO_READ = 30.0
"""How long, beyond its own time, a client may take to read what it asked for."""

Value = TypeVar("Value")
Acts = Float[torch.Tensor, "1 T C"]


class Session:
    """What the server knows of the model. Everything that runs it goes through `run`, so hooks never meet.

    Args:
      im: the model and its SAEs, with a tokenizer.
      nano: the checkpoint.
      limits: what requests may ask.
      chat: whether it is a chat checkpoint; unless given, whether upstream's directory of such is in its path.
    """

    def __init__(self, im: InterpretableModel, nano: Nanochat, limits: Limits, chat: bool | None = None):
        if im.tokenizer is None:
            raise ValueError("the model has no tokenizer: give the directory of the one it was trained with")
        self.im, self.nano, self.limits = im, nano, limits
        self.chat = _is_chat(nano.path) if chat is None else chat
        self.longest_prompt = max(min(limits.prompt_tokens, max_positions(im.model) - limits.max_tokens), 1)
        self._turn = anyio.Lock()
        self.generations = Slots(limits.generations, "generations")
        self.readings = Slots(limits.readings, "requests")

    async def run(self, function: Callable[..., Value], *args: Any) -> Value:
        """Runs what needs the model, in a thread, when it is its turn.

        A client that goes away meanwhile lets the thread come to its end first: nobody else gets the turn before.
        """
        async with self._turn:
            return await to_thread.run_sync(function, *args)

    # ---- texts -----------------------------------------------------------------------------------------------------

    async def ids(self, text: str, bos: bool = True) -> list[int]:
        """The tokens of a text, after a BOS unless told otherwise.

        Raises:
          Refusal: an empty text, or one that is too long.
        """
        if not text:
            raise Refusal(400, "the text is empty: give at least one character")
        return self._short(await to_thread.run_sync(self.im.tokenizer.encode, text, bos))

    async def chat_ids(self, messages: Sequence[Mapping[str, str]]) -> tuple[list[int], tuple[int, ...]]:
        """The tokens of a chat up to where the assistant speaks, and those that end what it says.

        Raises:
          Refusal: no chat checkpoint, a chat that is none, or too long.
        """
        if not self.chat:
            raise Refusal(400, "this checkpoint was not trained to chat: send a prompt, not messages")
        render = functools.partial(chat_prompt, self.im.model, self.im.tokenizer, list(map(dict, messages)))
        with refusing():
            ids, stop_tokens = await to_thread.run_sync(render)
        return self._short(ids), stop_tokens

    def _short(self, ids: list[int]) -> list[int]:
        if len(ids) > self.longest_prompt:
            raise Refusal(400, f"the text has {len(ids):,} tokens: at most {self.longest_prompt:,} are read")
        return ids

    def spell(self, ids: Sequence[int]) -> list[str]:
        """Tokens as texts that together are the text: a split character stands with the token that completes it."""
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        return [decode(self.im.tokenizer.token_bytes_of(i)) for i in ids]

    # ---- seeing ----------------------------------------------------------------------------------------------------

    def acts(self, ids: Sequence[int], hooks: Sequence[str]) -> dict[str, Acts]:
        """The activations of a text at hooks. To be called through `run`, as the next two."""
        tokens = torch.tensor([ids], device=self.im.model.lm_head.weight.device)
        with torch.no_grad(), capture(self.im.model, list(hooks), stop=True) as acts:
            self.im.model(tokens)
        return {hook: acts[hook] for hook in hooks}

    def strongest(self, ids: Sequence[int], hook: str, top_k: int) -> list[list[tuple[int, float]]]:
        """The (index, activation) pairs of the features that fire most at every token, largest first; above 0 only."""
        sae, acts = self.im.sae(hook), self.acts(ids, [hook])[hook]
        found = []
        for part in acts[0].split(_POSITIONS_AT_ONCE):
            values, indices = active(sae, part[None], min(top_k, sae.d_sae))
            for row in zip(indices[0].tolist(), values[0].tolist(), strict=True):
                found.append([(i, v) for i, v in zip(*row, strict=True) if v > 0])
        return found

    def activation(self, ids: Sequence[int], hook: str, index: int) -> list[float]:
        """What one feature does at every token."""
        sae, acts = self.im.sae(hook), self.acts(ids, [hook])[hook]
        return [value for part in acts[0].split(_POSITIONS_AT_ONCE) for value in sae.encode(part)[:, index].tolist()]

    # ---- writing ---------------------------------------------------------------------------------------------------

    async def interleave(
        self, streams: Mapping[str, Iterator[Token]], max_tokens: int
    ) -> AsyncGenerator[tuple[str, Token | str], None]:
        """Generations token by token, by turns: (whose, token), and where one ends (whose, "length", "stop" or "time").

        Args:
          streams: of `InterpretableModel.generate`, which has hooks on the model only while it makes a token.
          max_tokens: at which they end of themselves.
        """
        deadline = anyio.current_time() + self.limits.seconds
        made = dict.fromkeys(streams, 0)
        running = list(streams)
        while running:
            for which in list(running):
                late = anyio.current_time() > deadline
                token = None if late else await self.run(next, streams[which], None)
                if token is not None:
                    made[which] += 1
                    yield which, token
                    continue
                running.remove(which)
                yield which, "time" if late else "length" if made[which] == max_tokens else "stop"


async def while_there(request: Request, make: Callable[[], Awaitable[Value]]) -> Value:
    """What is made for a client whose body was read; the making ends when the client has gone.

    Raises:
      ClientDisconnect: it has.
    """
    made: list[Value] = []
    failed: list[Exception] = []
    async with anyio.create_task_group() as tasks:

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            tasks.cancel_scope.cancel()

        tasks.start_soon(watch)
        try:
            made.append(await make())
        except Exception as error:  # raised below, where no group wraps it
            failed.append(error)
        tasks.cancel_scope.cancel()
    for error in failed:
        raise error
    if not made:
        raise ClientDisconnect
    return made[0]


class Slots:
    """So many of a kind may be under way at once."""

    def __init__(self, limit: int, what: str):
        self._limit, self._what, self._taken = limit, what, 0

    @contextlib.contextmanager
    def take(self) -> Iterator[None]:
        """Counts one for the time of the context.

        Raises:
          Refusal: 429 if there are too many.
        """
        if self._taken >= self._limit:
            told = f"{self._taken} {self._what} are under way, as many as this server takes: try again in a moment"
            raise Refusal(429, told, {"Retry-After": "2"})
        self._taken += 1
        try:
            yield
        finally:
            self._taken -= 1


class Stream(StreamingResponse):
    """What is made as it is sent. When the client has it all, or has gone, the making ends and lets go what it held.

    Args:
      content: makes the pieces.
      media_type: of them.
      held: closed at the end.
      seconds: the making may take; a client that does not read is cut off some time after.
    """

    def __init__(
        self, content: AsyncGenerator[str, None], media_type: str, held: contextlib.ExitStack, seconds: float | int
    ):
        super().__init__(content, media_type=media_type, headers={"x-accel-buffering": "no"})
        self._held, self._seconds = held, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it, until the end or until the client has gone."""
        with self._held, anyio.move_on_after(self._seconds + _SECONDS_TO_READ):
            try:
                await super().__call__(scope, receive, send)
            finally:
                with anyio.CancelScope(shield=True):
                    await self.body_iterator.aclose()


@torch.no_grad()
def dense(sae: TorchSAE, acts: Acts) -> Float[torch.Tensor, "T f"]:
    """All features at all positions."""
    return torch.cat([sae.encode(part) for part in acts[0].split(_POSITIONS_AT_ONCE)])


def _is_chat(path: Path) -> bool:
    """Whether a script for chats wrote a checkpoint: upstream's have directories of their own."""
    return any(part in ("mid_checkpoints", "chatsft_checkpoints", "chatrl_checkpoints") for part in path.parts)
