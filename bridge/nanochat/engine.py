"""Sampling from a nanochat: a plain loop over model(tokens, cache=cache), so that whatever is hooked in takes part."""

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bridge.nanochat.model import GPT, Cache


def generate(
    model: GPT,
    prompt_ids: Sequence[int],
    *,
    max_tokens: int,
    temperature: float | int = 1.0,
    top_k: int | None = None,
    seed: int = 42,
    stop_tokens: Collection[int] = (),
    num_samples: int = 1,
) -> Iterator[list[int | None]]:
    """Continues a prompt, one column of num_samples tokens at a time.

    The prompt is read once, then every row goes its own way. A row that comes to a stop token has ended: from then
    on, the stop token included, its place holds None. The columns end with the last row, or after max_tokens.

    Args:
        model: the model, hooks and all.
        prompt_ids: at least one token.
        max_tokens: columns at most.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample among the k likeliest tokens only.
        seed: of the sampling; equal seeds give equal tokens on the same kind of device.
        stop_tokens: ids that end a row.
        num_samples: rows.

    Raises ValueError, before anything is computed, for an empty prompt, for more tokens than the model has positions,
    and for settings out of range.
    """
    _check(model, prompt_ids, max_tokens, temperature, top_k, num_samples)
    return _columns(model, list(prompt_ids), max_tokens, temperature, top_k, seed, frozenset(stop_tokens), num_samples)


def chat(model: GPT, tokenizer: Any, messages: list[dict[str, Any]], **sampling: Any) -> Iterator[str]:
    """The assistant's answer to messages that end with the user's, in pieces as it is written.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        messages: [{"role": "user", "content": ...}, ...] by turns.
        sampling: max_tokens, temperature, top_k and seed of `generate`.
    """
    if not messages or messages[-1].get("role") != "user":
        raise ValueError("the last message must be the user's: it is the assistant who answers")
    special = tokenizer.special_tokens
    # One token more than fits is enough for generate to refuse; nothing is cut in silence.
    ids, _ = tokenizer.render_conversation({"messages": messages}, max_tokens=model.config.max_positions + 1)
    stop_tokens = (special["<|assistant_end|>"], special["<|bos|>"])
    columns = generate(model, [*ids, special["<|assistant_start|>"]], stop_tokens=stop_tokens, **sampling)
    return _text(tokenizer, columns)


def _columns(
    model: GPT,
    prompt_ids: list[int],
    max_tokens: int,
    temperature: float | int,
    top_k: int | None,
    seed: int,
    stop_tokens: frozenset[int],
    num_samples: int,
) -> Iterator[list[int | None]]:
    device = model.lm_head.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    cache = model.new_cache(1, len(prompt_ids) + max_tokens)
    logits = _last_logits(model, torch.tensor([prompt_ids], device=device), cache).repeat(num_samples, 1)
    cache = cache.repeat(num_samples)
    running = [True] * num_samples
    for i in range(max_tokens):
        tokens = _sample(logits, temperature, top_k, generator)
        column = tokens.tolist()
        running = [on and token not in stop_tokens for on, token in zip(running, column, strict=True)]
        if not any(running):
            return
        yield [token if on else None for on, token in zip(running, column, strict=True)]
        if i + 1 < max_tokens:
            logits = _last_logits(model, tokens[:, None], cache)


@torch.no_grad()  # around the model alone: a generator that is suspended must not switch off its caller's gradients
def _last_logits(model: GPT, tokens: Int[Tensor, "B T"], cache: Cache) -> Float[Tensor, "B V"]:
    return model(tokens, cache=cache)[:, -1]


def _sample(
    logits: Float[Tensor, "B V"], temperature: float | int, top_k: int | None, generator: torch.Generator
) -> Int[Tensor, " B"]:
    if temperature == 0:
        return logits.argmax(dim=-1)
    k = logits.size(-1) if top_k is None else min(top_k, logits.size(-1))
    values, ids = logits.topk(k, dim=-1)  # sorted, so that the first is the largest
    probs = ((values - values[:, :1]) / temperature).softmax(dim=-1)  # of differences: no temperature overflows
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
    model: GPT,
    prompt_ids: Sequence[int],
    max_tokens: int,
    temperature: float | int,
    top_k: int | None,
    num_samples: int,
) -> None:
    if not prompt_ids:
        raise ValueError("the prompt is empty: start from the tokenizer's bos_token_id at least")
    if max_tokens < 1 or num_samples < 1:
        raise ValueError(f"max_tokens and num_samples must be at least 1, got {max_tokens} and {num_samples}")
    limit = model.config.max_positions
    if len(prompt_ids) + max_tokens > limit:
        raise ValueError(
            f"a prompt of {len(prompt_ids)} tokens and max_tokens={max_tokens} are beyond the model's {limit} "
            "positions: give a shorter prompt or fewer tokens"
        )
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature must be a finite number of at least 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}; None samples from the whole vocabulary")
