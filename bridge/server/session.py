"""The model as many clients share it: one forward pass at a time, by turns, each client with its own steering."""

import codecs
import contextlib
import functools
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import anyio
import torch
from anyio import from_thread, to_thread
from jaxtyping import Float
from starlette.requests import Request

from bridge.hooks import capture
from bridge.nanochat import Nanochat
from bridge.nanochat.engine import NotFiniteError, chat_prompt, max_positions
from bridge.runtime import InterpretableModel, Token
from bridge.server.answers import Answer, Outbox, Slots, encode, while_there
from bridge.server.bodies import Limits, Refusal, parse, receive, refusing
from bridge.tracking import active_features

_POSITIONS_AT_ONCE = 64
"""Encoded together: of an SAE of 131,072 latents that is 32 MiB."""
_BODIES = 2
"""Parsed at once: a body of many small lists needs thirty times its size."""
_ANSWERS = 8
"""As many of the longest answers may be on their way to clients at once."""

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
        self.chat = nano.is_chat if chat is None else chat
        self.longest_prompt = max(min(limits.prompt_tokens, max_positions(im.model) - limits.max_tokens), 1)
        self._longest_token = max(len(im.tokenizer.token_bytes_of(i)) for i in range(im.tokenizer.vocab_size))
        self._turn = anyio.Lock()
        self.generations = Slots(limits.generations, "generations")
        self.readings = Slots(limits.readings, "requests")
        self._parsing = anyio.CapacityLimiter(_BODIES)
        self.outbox = Outbox(_ANSWERS * limits.answer_bytes)

    async def run(self, function: Callable[..., Value], *args: Any) -> Value:
        """Run what needs the model, in a thread, when it is its turn.

        When the client goes away or its time is over, nobody else gets the turn before the thread has ended, which it
        does at the next of the `parts` of a text.
        """
        async with self._turn:
            return await to_thread.run_sync(function, *args)

    async def body(self, request: Request) -> dict[str, Any]:
        """Return the JSON object that a request brings, parsed in a thread; a few are at once.

        Raises:
          Refusal: see `bodies.receive` and `bodies.parse`.
        """
        return await to_thread.run_sync(parse, await receive(request, self.limits), limiter=self._parsing)

    async def answer(self, request: Request, make: Callable[[], Awaitable[Any]]) -> Answer:
        """Return the answer to a request whose body was read: what is made for it, as JSON.

        Raises:
          ClientDisconnect: the client has gone.
          Refusal: 429 if too many requests are under way, 503 if it takes too long, 422 if the answer is too long.
        """

        async def encoded() -> list[bytes]:
            return await to_thread.run_sync(encode, await make(), self.limits.answer_bytes)

        with self.readings.take():
            pieces = await while_there(request, encoded, self.limits.seconds)
        return Answer(pieces, self.outbox)

    def check_size(self, features: int, tokens: int, numbers: int = 1) -> None:
        """Raise Refusal for more features at more tokens, of so many numbers each, than one answer has."""
        total, most = features * tokens * numbers, self.limits.numbers
        if total > most:
            told = f"the answer may have {total:,} numbers ({features:,} features at {tokens:,} tokens)"
            raise Refusal(422, f"{told}: at most {most:,} are given; ask for fewer features, or shorter or fewer texts")

    # ---- texts -----------------------------------------------------------------------------------------------------

    async def ids(self, text: str, bos: bool = True) -> list[int]:
        """The tokens of a text, after a BOS unless told otherwise.

        Raises:
          Refusal: an empty text, or one that is too long.
        """
        if not text:
            raise Refusal(400, "the text is empty: give at least one character")
        self._check_bytes(text)
        return self._short(await to_thread.run_sync(self.im.tokenizer.encode, text, bos))

    async def chat_ids(self, messages: Sequence[Mapping[str, str]]) -> tuple[list[int], tuple[int, ...]]:
        """The tokens of a chat up to where the assistant speaks, and those that end what it says.

        Raises:
          Refusal: no chat checkpoint, a chat that is none, or too long.
        """
        if not self.chat:
            raise Refusal(400, "this checkpoint was not trained to chat: send a prompt, not messages")
        self._check_bytes("".join(message["content"] for message in messages))
        render = functools.partial(chat_prompt, self.im.model, self.im.tokenizer, list(map(dict, messages)))
        with refusing():
            ids, stop_tokens = await to_thread.run_sync(render)
        return self._short(ids), stop_tokens

    def _check_bytes(self, text: str) -> None:
        """Raise Refusal for a text that has too many tokens however it is cut, so that none is cut in vain."""
        size, most = len(text.encode()), self.longest_prompt * self._longest_token
        if size > most:
            told = f"at most {self.longest_prompt:,} tokens are read, which have {most:,} bytes at most"
            raise Refusal(400, f"the text has {size:,} bytes: {told}")

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
        for part in parts(acts):
            values, indices = active_features(sae, part[None], min(top_k, sae.d_sae))
            for row in zip(indices[0].tolist(), values[0].tolist(), strict=True):
                found.append([(i, v) for i, v in zip(*row, strict=True) if v > 0])
        return found

    def activation(self, ids: Sequence[int], hook: str, index: int) -> list[float]:
        """What one feature does at every token."""
        sae, acts = self.im.sae(hook), self.acts(ids, [hook])[hook]
        return [value for part in parts(acts) for value in sae.encode(part)[:, index].tolist()]

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
                token = None if late else await self._next(streams[which])
                if token is not None:
                    made[which] += 1
                    yield which, token
                    continue
                running.remove(which)
                yield which, "time" if late else "length" if made[which] == max_tokens else "stop"

    async def _next(self, stream: Iterator[Token]) -> Token | None:
        """Return the next token of a generation; None at its end.

        Raises:
          Refusal: 422 if the model's numbers are not finite any more.
        """
        try:
            return await self.run(next, stream, None)
        except NotFiniteError as error:
            raise Refusal(422, str(error)) from error


def parts(acts: Acts) -> Iterator[Float[torch.Tensor, "t C"]]:
    """Yield the activations of a text, a few positions at a time; ends a thread that nobody waits for any more."""
    for part in acts[0].split(_POSITIONS_AT_ONCE):
        with contextlib.suppress(RuntimeError):  # not in a thread of the server
            from_thread.check_cancelled()
        yield part
