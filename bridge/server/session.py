"""Share the model among clients: one forward pass at a time, alternating, each client with its own steering."""

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
from bridge.lenses.lens import DirectLens, FittedLens, Lens, LogitLens
from bridge.nanochat import Nanochat
from bridge.nanochat.engine import NotFiniteError, chat_prompt, max_positions
from bridge.runtime import InterpretableModel, Token
from bridge.server.answers import Answer, Outbox, Slots, encode, while_connected
from bridge.server.bodies import Limits, Refusal, parse, receive, refusing
from bridge.tracking import active_features

_POSITIONS_AT_ONCE = 64
"""Positions encoded together: 32 MiB for an SAE of 131,072 latents."""
_BODIES = 2
"""Bodies parsed at the same time: one of many small lists needs thirty times its size."""
_ANSWERS = 8
"""The number of answers of maximal length that may be in transit at the same time."""

Value = TypeVar("Value")
Acts = Float[torch.Tensor, "1 T C"]


class Session:
    """The server's access to the model. Every pass of the model goes through `run`, so that hooks never overlap.

    Args:
      im: the model and its SAEs, with a tokenizer.
      nano: the checkpoint.
      limits: the limits of requests.
      chat: whether it is a chat checkpoint; None decides by its path, as nanochat names directories of these.
      lenses: fitted lenses on the model, on its device.

    Raises:
      ValueError: the model has no tokenizer.
    """

    def __init__(
        self,
        im: InterpretableModel,
        nano: Nanochat,
        limits: Limits,
        chat: bool | None = None,
        lenses: Sequence[FittedLens] = (),
    ):
        if im.tokenizer is None:
            raise ValueError("the model has no tokenizer: give the directory of the one it was trained with")
        self.im, self.nano, self.limits = im, nano, limits
        self.lenses: dict[str, Lens] = {
            lens.name: lens for lens in (LogitLens(im.model), DirectLens(im.model), *lenses)
        }
        self.words: torch.Tensor | None = None
        """True for tokens that are words, (V,); computed when first needed."""
        self.chat = nano.is_chat if chat is None else chat
        self.longest_prompt = max(min(limits.prompt_tokens, max_positions(im.model) - limits.max_tokens), 1)
        self._longest_token = max(len(im.tokenizer.token_bytes_of(i)) for i in range(im.tokenizer.vocab_size))
        self._turn = anyio.Lock()
        self.generations = Slots(limits.generations, "generations")
        self.readings = Slots(limits.readings, "requests")
        self._parsing = anyio.CapacityLimiter(_BODIES)
        self.outbox = Outbox(_ANSWERS * limits.answer_bytes)

    async def run(self, function: Callable[..., Value], *args: Any) -> Value:
        """Call a function that runs the model, in a thread, when its turn comes.

        If the client disconnects or its time is over, the turn passes on only after the thread has ended, which it does
        at the next of the `parts` of a text.
        """
        async with self._turn:
            return await to_thread.run_sync(function, *args)

    async def body(self, request: Request) -> dict[str, Any]:
        """Return the JSON object in a request's body, parsed in one of a few threads.

        Raises:
          Refusal: see `bodies.receive` and `bodies.parse`.
        """
        return await to_thread.run_sync(parse, await receive(request, self.limits), limiter=self._parsing)

    async def answer(self, request: Request, make: Callable[[], Awaitable[Any]]) -> Answer:
        """Return the result of `make` as JSON, for a request whose body was read.

        Raises:
          ClientDisconnect: the client disconnected.
          Refusal: 429 if too many requests are running, 503 if it takes too long, 422 if the answer is too long.
        """

        async def encoded() -> list[bytes]:
            return await to_thread.run_sync(encode, await make(), self.limits.answer_bytes)

        with self.readings.take():
            pieces = await while_connected(request, encoded, self.limits.seconds)
        return Answer(pieces, self.outbox)

    def check_size(self, features: int, tokens: int, numbers: int = 1) -> None:
        """Raise Refusal if features at tokens, with `numbers` numbers each, are too many for one answer."""
        total, most = features * tokens * numbers, self.limits.numbers
        if total > most:
            size = f"the answer may have {total:,} numbers ({features:,} features at {tokens:,} tokens)"
            raise Refusal(
                422, f"{size}: at most {most:,} are allowed; ask for fewer features, or shorter or fewer texts"
            )

    # ---- texts -----------------------------------------------------------------------------------------------------

    async def ids(self, text: str, bos: bool = True) -> list[int]:
        """Return the tokens of a text, by default after a BOS.

        Raises:
          Refusal: the text is empty or too long.
        """
        if not text:
            raise Refusal(400, "the text is empty: give at least one character")
        self.check_bytes(text)
        return self.short(await to_thread.run_sync(self.im.tokenizer.encode, text, bos))

    async def chat_ids(self, messages: Sequence[Mapping[str, str]]) -> tuple[list[int], tuple[int, ...]]:
        """Return the tokens of a chat up to the assistant's next message, and those that end that message.

        Raises:
          Refusal: the checkpoint was not trained to chat, or the chat is invalid or too long.
        """
        if not self.chat:
            raise Refusal(400, "this checkpoint was not trained to chat: send a prompt, not messages")
        self.check_bytes("".join(message["content"] for message in messages))
        render = functools.partial(chat_prompt, self.im.model, self.im.tokenizer, list(map(dict, messages)))
        with refusing():
            ids, stop_tokens = await to_thread.run_sync(render)
        return self.short(ids), stop_tokens

    def check_bytes(self, text: str) -> None:
        """Raise Refusal for a text with too many tokens in any tokenization, before it is tokenized."""
        size, most = len(text.encode()), self.longest_prompt * self._longest_token
        if size > most:
            limit = f"at most {self.longest_prompt:,} tokens are read, which have at most {most:,} bytes"
            raise Refusal(400, f"the text has {size:,} bytes: {limit}")

    def short(self, ids: list[int]) -> list[int]:
        """Return the ids; raise Refusal if there are too many."""
        if len(ids) > self.longest_prompt:
            raise Refusal(400, f"the text has {len(ids):,} tokens: at most {self.longest_prompt:,} are read")
        return ids

    def spell(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each token; a character that is split over tokens belongs to the last of them."""
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        return [decode(self.im.tokenizer.token_bytes_of(i)) for i in ids]

    # ---- reading ----------------------------------------------------------------------------------------------------

    def acts(self, ids: Sequence[int], hooks: Sequence[str]) -> dict[str, Acts]:
        """Return the activations of a text at hooks, (1, T, C) each. Call it through `run`, like the next two."""
        tokens = torch.tensor([ids], device=self.im.model.lm_head.weight.device)
        with torch.no_grad(), capture(self.im.model, list(hooks), stop=True) as acts:
            self.im.model(tokens)
        return {hook: acts[hook] for hook in hooks}

    def strongest(self, ids: Sequence[int], hook: str, top_k: int) -> list[list[tuple[int, float]]]:
        """Return (index, activation) of the features that fire most at every token, largest first; only above 0."""
        sae, acts = self.im.sae(hook), self.acts(ids, [hook])[hook]
        features = []
        for part in parts(acts):
            values, indices = active_features(sae, part[None], min(top_k, sae.d_sae))
            for row in zip(indices[0].tolist(), values[0].tolist(), strict=True):
                features.append([(i, v) for i, v in zip(*row, strict=True) if v > 0])
        return features

    def activation(self, ids: Sequence[int], hook: str, index: int) -> list[float]:
        """Return the activations of one feature at every token."""
        sae, acts = self.im.sae(hook), self.acts(ids, [hook])[hook]
        return [value for part in parts(acts) for value in sae.encode(part)[:, index].tolist()]

    # ---- writing ---------------------------------------------------------------------------------------------------

    async def interleave(
        self, streams: Mapping[str, Iterator[Token]], max_tokens: int
    ) -> AsyncGenerator[tuple[str, Token | str], None]:
        """Yield generations token by token, alternating: (name, token), or (name, "length", "stop" or "time").

        Args:
          streams: generations of `InterpretableModel.generate` by name; they hook the model only during a token.
          max_tokens: the length at which they end by themselves.
        """
        deadline = anyio.current_time() + self.limits.seconds
        lengths = dict.fromkeys(streams, 0)
        running = list(streams)
        while running:
            for which in list(running):
                late = anyio.current_time() > deadline
                token = None if late else await self._next(streams[which])
                if token is not None:
                    lengths[which] += 1
                    yield which, token
                    continue
                running.remove(which)
                yield which, "time" if late else "length" if lengths[which] == max_tokens else "stop"

    async def _next(self, stream: Iterator[Token]) -> Token | None:
        """Return the next token of a generation; None at its end.

        Raises:
          Refusal: 422 if the model's logits are not finite.
        """
        try:
            return await self.run(next, stream, None)
        except NotFiniteError as error:
            raise Refusal(422, str(error)) from error


def parts(acts: Acts) -> Iterator[Float[torch.Tensor, "t C"]]:
    """Yield the activations of a text, a few positions at a time; end a thread whose request was cancelled."""
    for part in acts[0].split(_POSITIONS_AT_ONCE):
        with contextlib.suppress(RuntimeError):  # not in a thread of the server
            from_thread.check_cancelled()
        yield part
