"""nanochat's loss: nats per token, and bits per byte of text, which does not depend on the vocabulary."""

import math
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional


def cross_entropy(model: nn.Module, tokens: Int[Tensor, "B T"], targets: Int[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Return -log p(target) of every position in nats, from the softcapped float32 logits; 0 for negative targets."""
    return losses_of(model(tokens), targets)


def losses_of(logits: Float[Tensor, "B T V"], targets: Int[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Return -log p(target) of every position in nats, from a model's logits; 0 for negative targets."""
    targets = targets.long().clamp(min=-1)
    losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")
    return losses.view(targets.shape)


def bits_per_byte(
    model: nn.Module,
    batches: Iterable[tuple[Int[Tensor, "_ T"], Int[Tensor, "_ T"]]],
    token_bytes: Int[np.ndarray, " V"] | Int[Tensor, " V"],
) -> float:
    """Return the loss in bits per byte of text, as upstream's evaluate_bpb: nats / (ln 2 * bytes) over the targets.

    Targets that are negative or special tokens (0 bytes) are left out; the result is infinite if there are no others.
    Values are comparable only for equal token_bytes: until 2026-07-03 upstream's table counted 3 bytes for each raw
    byte from 0x80 on.

    Args:
        model: maps tokens (B, T) to logits (B, T, V); hooks on it take effect.
        batches: pairs (tokens, targets), the targets shifted by one token.
        token_bytes: the length in bytes of every token.
    """
    device = next(model.parameters()).device
    lengths = torch.as_tensor(token_bytes, device=device).long()
    nats, total_bytes = 0.0, 0
    with torch.no_grad():
        for tokens, targets in batches:
            targets = targets.to(device)
            losses = cross_entropy(model, tokens.to(device), targets)
            sizes = torch.where(targets >= 0, lengths[targets.clamp(min=0)], 0)
            nats += (losses * (sizes > 0)).sum().item()
            total_bytes += sizes.sum().item()
    return nats / (math.log(2) * total_bytes) if total_bytes else math.inf


def assistant_tokens(rows: Int[np.ndarray, "B T"], special_tokens: Mapping[str, int]) -> Bool[np.ndarray, "B T"]:
    """Return which tokens the assistant says, as the mask of upstream's chat training.

    Those are the tokens of its turns and the token that ends a turn, without the token that begins it, and without the
    output of tools. A row begins with BOS; what follows may be in the middle of a turn.

    Args:
        rows: token ids of whole rows of a corpus.
        special_tokens: ids by name.
    """

    def inside(start: str, *ends: str) -> Bool[np.ndarray, "B T"]:
        """Return where the last of the markers before a token is `start`."""
        is_end = np.isin(rows, [special_tokens[name] for name in ends])
        is_end[:, 0] = False  # the BOS of every row
        after = np.where(rows == special_tokens[start], 1, np.where(is_end, 0, -1))
        first = (after >= 0).argmax(1)
        begun = rows[np.arange(len(rows)), first] == special_tokens[ends[0]]
        before = np.column_stack([begun, after[:, :-1]])
        places = np.maximum.accumulate(np.where(before >= 0, np.arange(rows.shape[1]), 0), axis=1)
        return np.take_along_axis(before, places, axis=1) == 1

    turns = inside("<|assistant_start|>", "<|assistant_end|>", "<|user_start|>", "<|bos|>")
    output = inside("<|output_start|>", "<|output_end|>", "<|assistant_end|>", "<|bos|>")
    return turns & ~output & ~np.isin(rows, [special_tokens[name] for name in ("<|bos|>", "<|output_start|>")])
