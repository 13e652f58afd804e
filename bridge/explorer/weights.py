"""Compute records that follow from weights alone: tokens that latents raise and lower, neighbours, channels."""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from bridge.hooks import parse
from bridge.lenses.paths import direct_paths
from bridge.nanochat.model import GPT
from bridge.torch_sae import TorchSAE

LOGITS, CHANNELS = 20, 3
_MOST_NUMBERS = 2**25  # in a block of logits or cosines


def written_hook(hook_name: str, sae: TorchSAE) -> str:
    """Return the hook whose activation an SAE reconstructs or, as a transcoder, predicts."""
    return str((sae.metadata or {}).get("hook_name_out") or hook_name)


def direct_path(model: GPT, hook_name: str) -> float:
    """Return the factor with which an addition to an activation reaches the final norm if no later block reacts to it.

    From G2 on nanochat multiplies the stream by `resid_lambdas[i]` before block i; G7 subtracts `backout_lambda` times
    the output of block n_layer // 2 from that of the last block. A factor below 0 reverses the sign of logits.
    """
    layer, _ = parse(hook_name)
    return direct_paths(model)[layer].own


@torch.no_grad()
def columns(model: GPT, hook_name: str, sae: TorchSAE, *, nearest: int, bins: int) -> dict[str, np.ndarray]:
    """Return the columns of `jsae.records.store.COLUMNS` that follow from the weights; `hook_name` is what is written.

    Logits are `direct_path * W_dec lm_head^T` over the vocabulary without its padding, without the final norm and the
    softcap. Except for the factor `direct_path`, by which they can be divided, this is the usual convention.
    """
    unembed = model.lm_head.weight[: model.config.vocab_size].float() * direct_path(model, hook_name)
    parts = [_logits(logits, bins) for logits in _blocks(sae.W_dec, unembed)]
    logit_columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return logit_columns | _neighbours(sae.W_dec, nearest) | _channels(sae.W_dec)


def _blocks(rows: Float[torch.Tensor, "f d"], others: Float[torch.Tensor, "n d"]) -> Iterator[torch.Tensor]:
    """Yield the products of `rows` with `others`, some rows at a time."""
    for part in rows.split(max(_MOST_NUMBERS // len(others), 1)):
        yield part @ others.T


def _logits(logits: Float[torch.Tensor, "f V"], bins: int) -> dict[str, np.ndarray]:
    """Return the largest and smallest logits of each latent, and the histogram of all."""
    most = min(LOGITS, logits.shape[1])
    top, bottom = logits.topk(most), logits.topk(most, largest=False)
    low, high = logits.aminmax(dim=1, keepdim=True)
    scaled = (logits - low) * (bins / (high - low).clamp_min(torch.finfo(torch.float32).tiny))
    bin_of = scaled.long().clamp_(0, bins - 1) + bins * torch.arange(len(logits), device=logits.device)[:, None]
    heights = torch.bincount(bin_of.flatten(), minlength=bins * len(logits)).view(-1, bins)
    columns = {
        "top_logits": top.indices,
        "top_logit_values": top.values,
        "bottom_logits": bottom.indices,
        "bottom_logit_values": bottom.values,
        "logit_range": torch.cat([low, high], 1),
        "logit_hist": heights,
    }
    return {name: column.cpu().numpy() for name, column in columns.items()}


def _neighbours(W_dec: Float[torch.Tensor, "f d"], nearest: int) -> dict[str, np.ndarray]:
    """Return for each row the others of largest cosine; where there are too few, the row itself and NaN."""
    rows = nn.functional.normalize(W_dec, dim=1)
    most = min(nearest, len(rows) - 1)
    names = np.repeat(np.arange(len(rows))[:, None], nearest, axis=1)
    cosines = np.full(names.shape, np.nan, np.float32)
    first = 0
    for block in _blocks(rows, rows):
        own = torch.arange(len(block), device=block.device)
        block[own, own + first] = -torch.inf
        near = block.topk(most)
        part = slice(first, first + len(block))
        names[part, :most], cosines[part, :most] = near.indices.cpu().numpy(), near.values.cpu().numpy()
        first += len(block)
    return {"neighbours": names, "neighbour_cosines": cosines}


def _channels(W_dec: Float[torch.Tensor, "f d"]) -> dict[str, np.ndarray]:
    """Return the entries of largest value in each row, and their share of the sum of absolute values."""
    largest = W_dec.topk(min(CHANNELS, W_dec.shape[1]))
    shares = largest.values.abs() / W_dec.abs().sum(1, keepdim=True)
    short = ((0, 0), (0, CHANNELS - largest.values.shape[1]))
    padded = (np.pad(x.cpu().numpy(), short, constant_values=np.nan) for x in (largest.values, shares))
    columns = np.pad(largest.indices.cpu().numpy(), short), *padded
    return dict(zip(("channels", "channel_values", "channel_shares"), columns, strict=True))
