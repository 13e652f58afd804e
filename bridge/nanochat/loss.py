"""nanochat's loss: nats per token, and bits per byte of text, which tokenizers of any vocabulary can be compared by."""

import math
from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional


def cross_entropy(model: nn.Module, tokens: Int[Tensor, "B T"], targets: Int[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """-log p(target) per position in nats, from the softcapped float32 logits; 0 where the target is negative."""
    logits = model(tokens)
    targets = targets.long().clamp(min=-1)
    losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")
    return losses.view(targets.shape)


def bits_per_byte(
    model: nn.Module,
    batches: Iterable[tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]],
    token_bytes: Int[np.ndarray, " V"] | Int[Tensor, " V"],
) -> float:
    """Nats of the targets that are text, over ln 2 times their bytes, as upstream's evaluate_bpb.

    Targets that are negative or special tokens (0 bytes) count neither in nats nor in bytes; without any other the
    result is infinite. Comparable only under one table of token_bytes: upstream's counted 3 bytes for each raw byte
    from 0x80 on until 2026-07-03.

    Args:
        model: what gives logits for tokens; with hooks in it, theirs is the loss that is measured.
        batches: (tokens, targets), the targets one token ahead.
        token_bytes: the length in bytes of every token.
    """
    device = next(model.parameters()).device
    lengths = torch.as_tensor(token_bytes, device=device).long()
    nats, count = 0.0, 0
    with torch.no_grad():
        for tokens, targets in batches:
            targets = targets.to(device)
            losses = cross_entropy(model, tokens.to(device), targets)
            size = torch.where(targets >= 0, lengths[targets.clamp(min=0)], 0)
            nats += (losses * (size > 0)).sum().item()
            count += size.sum().item()
    return nats / (math.log(2) * count) if count else math.inf
