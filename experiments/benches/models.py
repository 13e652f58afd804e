"""nanochats with random weights, in the shapes of deep ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bridge.nanochat.model import GPT

_HEAD_DIM = 128


def random_nanochat(depth: int, vocab_size: int, device: str) -> GPT:
    """Return a nanochat of the newest generation with random weights, in the precision of `bridge.nanochat.load`."""
    import torch

    from bridge.nanochat.model import GPT, GPTConfig

    width = 64 * depth
    heads = max(width // _HEAD_DIM, 1)
    sizes = {"n_layer": depth, "n_head": heads, "n_kv_head": heads, "n_embd": width, "vocab_size": vocab_size}
    with torch.device(device):
        model = GPT(GPTConfig.of_generation("G7", sequence_len=2048, **sizes)).eval().requires_grad_(False)
    for weight in model.parameters() if device != "cpu" else ():
        weight.data = weight.data.bfloat16() if weight.ndim > 1 else weight.data
    return model
