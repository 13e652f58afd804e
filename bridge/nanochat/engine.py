"""Sampling from a nanochat: a plain loop over model(tokens, cache=cache), so that whatever is hooked in takes part."""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bridge import ranges


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
) -> Iterator[list[int | None]]:
    """Continues a prompt, one column of num_samples tokens at a time.

    The prompt is read once, then every row goes its own way. A row that comes to a stop token has ended: from then
    on, the stop token included, its place holds None. The columns end with the last row, or after max_tokens.

    Args:
        model: the model, hooks and all. One that makes no cache, as upstream's, reads the whole text for every token.
        prompt_ids: at least one token.
        max_tokens: columns at most.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample among the k likeliest tokens only.
        seed: of the sampling; equal seeds give equal tokens on the same kind of device.
        stop_tokens: ids that end a row.
        num_samples: rows.
        forward: called in the place of model, with the same arguments.
        read_last: whether the model reads the last column too, for the sake of what looks on.

    Raises:
        ValueError: before anything is computed, for an empty prompt, for more tokens than the model has positions, and
            for settings out of range (`bridge.ranges`).
        NotFiniteError: a ValueError, as soon as the model's logits are not finite.
    """
    _check(model, prompt_ids, max_tokens, temperature, top_k, seed, num_samples)
    reader = _Reader(model, forward or model, len(prompt_ids) + max_tokens)
    generator = torch.Generator(reader.device).manual_seed(seed)

    def sample(logits: Tensor) -> Tensor:
        return _sample(logits, temperature, top_k, generator)

    return _columns(reader, list(prompt_ids), max_tokens, sample, frozenset(stop_tokens), num_samples, read_last)


def chat(model: nn.Module, tokenizer: Any, messages: list[dict[str, Any]], **sampling: Any) -> Iterator[str]:
    """The assistant's answer to messages that end with the user's, in pieces as it is written.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        messages: [{"role": "user", "content": ...}, ...] by turns.
        sampling: max_tokens, temperature, top_k and seed of `generate`.
    """
    ids, stop_tokens = chat_prompt(model, tokenizer, messages)
    return _text(tokenizer, generate(model, ids, stop_tokens=stop_tokens, **sampling))


def chat_prompt(model: nn.Module, tokenizer: Any, messages: list[dict[str, Any]]) -> tuple[list[int], tuple[int, ...]]:
    """Messages that end with the user's as the tokens that let the assistant speak, and those that end its answer."""
    if not messages or messages[-1].get("role") != "user":
        raise ValueError("the last message must be the user's: it is the assistant who answers")
    special = tokenizer.special_tokens
    # One token more than fits is enough for generate to refuse; nothing is cut in silence.
    ids, _ = tokenizer.render_conversation({"messages": messages}, max_tokens=max_positions(model) + 1)
    return [*ids, special["<|assistant_start|>"]], (special["<|assistant_end|>"], special["<|bos|>"])


def max_positions(model: nn.Module) -> int:
    """The tokens that the model's rope tables reach: in upstream's models too, ten times sequence_len."""
    return getattr(model.config, "max_positions", 10 * model.config.sequence_len)


class _Reader:
    """What the model has read so far: its cache, or, if it makes none, the tokens themselves."""

    def __init__(self, model: nn.Module, forward: Callable[..., Tensor], max_len: int):
        self.device = model.lm_head.weight.device
        self._forward = forward
        self._cache = model.new_cache(1, max_len) if hasattr(model, "new_cache") else None
        self._tokens = torch.empty(1, 0, dtype=torch.int64, device=self.device)

    @torch.no_grad()  # around the model alone: a generator that is suspended must not switch off its caller's gradients
    def read(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B V"]:
        """The logits after tokens that follow those read."""
        if self._cache is not None:
            return self._forward(tokens, cache=self._cache)[:, -1]
        self._tokens = torch.cat([self._tokens, tokens], dim=1)
        return self._forward(self._tokens)[:, -1]

    def repeat(self, n: int) -> None:
        """Makes n rows of the one."""
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
    if not torch.isfinite(logits.amax(dim=-1)).all():  # a NaN is the largest of any row
        raise NotFiniteError(
            "the model's logits are not finite: steer with smaller strengths, or check the checkpoint's weights"
        )
    if temperature == 0:
        return logits.argmax(dim=-1)
    k = logits.size(-1) if top_k is None else min(top_k, logits.size(-1))
    values, ids = logits.topk(k, dim=-1)  # sorted, so that the first is the largest
    # Of differences, so that no temperature overflows; a GPU would take a subnormal temperature for 0.
    probs = ((values - values[:, :1]) / max(temperature, ranges.SMALLEST)).softmax(dim=-1)
    return ids.gather(1, torch.multinomial(probs, 1, generator=generator))[:, 0]


def _text(tokenizer: Any, columns: Iterator[list[int | None]]) -> Iterator[str]:
    """The text of the first row; a character that several tokens share comes when it is whole."""
    pending: list[int] = []
    for column in columns:
        pending.append(column[0])
        text = tokenizer.decode(pending)
        # At most three bytes can wait for the rest of their character; what lasts longer is not UTF-8.
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
        raise ValueError("the prompt is empty: start from the tokenizer's bos_token_id at least")
    if max_tokens < 1 or num_samples < 1:
        raise ValueError(f"max_tokens and num_samples must be at least 1, got {max_tokens} and {num_samples}")
    limit = max_positions(model)
    if len(prompt_ids) + max_tokens > limit:
        raise ValueError(
            f"a prompt of {len(prompt_ids)} tokens and max_tokens={max_tokens} are beyond the model's {limit} "
            "positions: give a shorter prompt or fewer tokens"
        )
    ranges.check_temperature(temperature)
    ranges.check_seed(seed)
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}; None samples from the whole vocabulary")
