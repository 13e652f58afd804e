"""nanochat's loss: nats per token, and bits per byte of text, which does not depend on the vocabulary."""

import math
from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Float, Int
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
