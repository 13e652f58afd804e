"""Sampling from a nanochat: a plain loop over model(tokens, cache=cache), so that hooks on the model take effect."""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bridge import ranges
from bridge.nanochat.decoding import Decoder
from bridge.nanochat.model import GPT


class NotFiniteError(ValueError):
    """Logits that no token can be sampled from."""


def generate(
    model: nn.Module,
    prompt_ids: Sequence[int],
    *,
    max_tokens: int,
    temperature: float | int = 1.0,
    top_k: int | None = None,
    seed: int = 42,
    stop_tokens: Collection[int] = (),
    num_samples: int = 1,
    forward: Callable[..., Tensor] | None = None,
    read_last: bool = False,
    is_static: bool | None = None,
    graphs: bool | None = None,
) -> Iterator[list[int | None]]:
    """Continue a prompt; yield one token of each of num_samples rows at a time.

    The prompt is read once, then all rows are sampled independently. A row ends at a stop token: from this token on,
    its entries are None. Sampling stops when all rows have ended, or after max_tokens.

    Args:
        model: the model; its hooks take effect. A model without `new_cache`, such as upstream's, reads the whole text
            again for every token.
        prompt_ids: token ids, at least one.
        max_tokens: the largest number of new tokens per row.
        temperature: divides the logits; 0 selects the most likely token.
        top_k: sample among the k most likely tokens only.
        seed: random seed; equal seeds give equal tokens on the same kind of device.
        stop_tokens: ids that end a row.
        num_samples: number of rows.
        forward: called instead of model, with the same arguments.
        read_last: whether the model also reads the last tokens, so that hooks see them.
        is_static: whether `forward` does the same for every token after the prompt, so that on a GPU it may be recorded
            as a CUDA graph; None: if there is no `forward`.
        graphs: whether tokens are decoded in static memory, as a GPU needs it for a CUDA graph; None: on a GPU.

    Yields:
        num_samples token ids, None for rows that have ended.

    Raises:
        ValueError: before any computation: the prompt is empty, prompt and new tokens exceed the model's positions, or
            a setting is out of range (`bridge.ranges`).
        NotFiniteError: the model's logits are not finite.
    """
    _check(model, prompt_ids, max_tokens, temperature, top_k, seed, num_samples)
    is_static = forward is None if is_static is None else is_static
    reader = _Reader(model, forward or model, len(prompt_ids), max_tokens, graphs if is_static else False)
    generator = torch.Generator(reader.device).manual_seed(seed)

    def sample(logits: Tensor) -> Tensor:
        return _sample(logits, temperature, top_k, generator)

    return _columns(reader, list(prompt_ids), max_tokens, sample, frozenset(stop_tokens), num_samples, read_last)


def chat(model: nn.Module, tokenizer: Any, messages: list[dict[str, Any]], **sampling: Any) -> Iterator[str]:
    """Yield the assistant's answer to a chat, in pieces as it is sampled.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        messages: [{"role": "user", "content": ...}, ...], alternating, the last one from the user.
        sampling: max_tokens, temperature, top_k and seed of `generate`.

    Raises ValueError as `chat_prompt` and `generate`.
    """
    ids, stop_tokens = chat_prompt(model, tokenizer, messages)
    return _text(tokenizer, generate(model, ids, stop_tokens=stop_tokens, **sampling))


def chat_prompt(model: nn.Module, tokenizer: Any, messages: list[dict[str, Any]]) -> tuple[list[int], tuple[int, ...]]:
    """Return (prompt, stop_tokens): the token ids that prompt the assistant's answer, and those that end it.

    Raises ValueError unless the last message is the user's.
    """
    if not messages or messages[-1].get("role") != "user":
        raise ValueError("the last message must be the user's, because the assistant answers it")
    special = tokenizer.special_tokens
    # Keep one token more than fits, so that generate refuses a long chat instead of cutting it silently.
    ids, _ = tokenizer.render_conversation({"messages": messages}, max_tokens=max_positions(model) + 1)
    return [*ids, special["<|assistant_start|>"]], (special["<|assistant_end|>"], special["<|bos|>"])


def max_positions(model: nn.Module) -> int:
    """Return the number of positions in the model's rope tables: ten times sequence_len, also in upstream's models."""
    return getattr(model.config, "max_positions", 10 * model.config.sequence_len)


class _Reader:
    """The model with the text read so far: a cache, or, for a model without one, the tokens themselves.

    With `graphs` (None: on a GPU) the tokens after the prompt are decoded in static memory.
    """

    def __init__(
        self, model: nn.Module, forward: Callable[..., Tensor], prompt: int, steps: int, graphs: bool | None = False
    ):
        self.device = model.lm_head.weight.device
        self._forward, self._model, self._steps = forward, model, steps
        self._graphs = isinstance(model, GPT) and (self.device.type == "cuda" if graphs is None else graphs)
        self._decoder: Decoder | None = None
        most = prompt if self._graphs else prompt + steps
        self._cache = model.new_cache(1, most) if hasattr(model, "new_cache") else None
        self._tokens = torch.empty(1, 0, dtype=torch.int64, device=self.device)

    @torch.no_grad()  # around the model alone: a suspended generator must not disable its caller's gradients
    def read(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B V"]:
        """Return the logits after the next tokens."""
        if self._graphs and self._cache.position:
            if self._decoder is None:
                self._decoder = Decoder(self._model, self._forward, self._cache, self._steps)
            return self._decoder.step(tokens)[:, -1]
        if self._cache is not None:
            return self._forward(tokens, cache=self._cache)[:, -1]
        self._tokens = torch.cat([self._tokens, tokens], dim=1)
        return self._forward(self._tokens)[:, -1]

    def repeat(self, n: int) -> None:
        """Copy the single row n times."""
        self._tokens = self._tokens.repeat(n, 1)
        self._cache = self._cache and self._cache.repeat(n)


def _columns(
    reader: _Reader,
    prompt_ids: list[int],
    max_tokens: int,
    sample: Callable[[Tensor], Tensor],
    stop_tokens: frozenset[int],
    num_samples: int,
    read_last: bool,
) -> Iterator[list[int | None]]:
    logits = reader.read(torch.tensor([prompt_ids], device=reader.device)).repeat(num_samples, 1)
    reader.repeat(num_samples)
    running = [True] * num_samples
    for i in range(max_tokens):
        tokens = sample(logits)
        column = tokens.tolist()
        running = [on and token not in stop_tokens for on, token in zip(running, column, strict=True)]
        if not any(running):
            return
        yield [token if on else None for on, token in zip(running, column, strict=True)]
        if i + 1 < max_tokens or read_last:
            logits = reader.read(tokens[:, None])


def _sample(
    logits: Float[Tensor, "B V"], temperature: float | int, top_k: int | None, generator: torch.Generator
) -> Int[Tensor, " B"]:
    if not torch.isfinite(logits.amax(dim=-1)).all():  # amax propagates NaN
        raise NotFiniteError(
            "the model's logits are not finite: steer with smaller strengths, or check the checkpoint's weights"
        )
    if temperature == 0:
        return logits.argmax(dim=-1)
    k = logits.size(-1) if top_k is None else min(top_k, logits.size(-1))
    values, ids = logits.topk(k, dim=-1)  # sorted, so that the first is the largest
    # Subtract the maximum first, so that no temperature overflows; a GPU flushes a subnormal temperature to 0.
    probs = ((values - values[:, :1]) / max(temperature, ranges.SMALLEST)).softmax(dim=-1)
    return ids.gather(1, torch.multinomial(probs, 1, generator=generator))[:, 0]


def _text(tokenizer: Any, columns: Iterator[list[int | None]]) -> Iterator[str]:
    """Yield the text of the first row; a character of several tokens is yielded when it is complete."""
    pending: list[int] = []
    for column in columns:
        pending.append(column[0])
        text = tokenizer.decode(pending)
        # A UTF-8 character has at most three bytes before its last; longer invalid sequences are not UTF-8.
        if not text.endswith("\ufffd") or len(pending) > 3:
            yield text
            pending = []
    if pending:
        yield tokenizer.decode(pending)


def _check(
    model: nn.Module,
    prompt_ids: Sequence[int],
    max_tokens: int,
    temperature: float | int,
    top_k: int | None,
    seed: int,
    num_samples: int,
) -> None:
    if not prompt_ids:
        raise ValueError("the prompt is empty: give at least the tokenizer's bos_token_id")
    if max_tokens < 1 or num_samples < 1:
        raise ValueError(f"max_tokens and num_samples must be at least 1, got {max_tokens} and {num_samples}")
    limit = max_positions(model)
    if len(prompt_ids) + max_tokens > limit:
        raise ValueError(
            f"a prompt of {len(prompt_ids)} tokens and max_tokens={max_tokens} exceed the model's {limit} positions: "
            "give a shorter prompt or a smaller max_tokens"
        )
    ranges.check_temperature(temperature)
    ranges.check_seed(seed)
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}; None samples from the whole vocabulary")
