"""What an exported SAE is worth: metrics of the torch module that ships, on held-out text."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from bridge.hooks import capture
from bridge.selection import kept
from bridge.torch_sae import TorchSAE
from jsae import metrics


@torch.no_grad()
def reconstruction(
    model: nn.Module,
    sae: TorchSAE,
    batches: Iterable[np.ndarray],
    hook_name: str,
    *,
    bos_token_id: int | None,
    drop_sinks: bool = True,
) -> metrics.Sums:
    """Sums over all tokens of `batches`, on which `jsae.metrics.summarize` and `.density` answer.

    Args:
      model: a nanochat.
      sae: of the model's width, on the model's device.
      batches: token ids, (rows, row_len) each; BOS and sink tokens are left out as they are in training.
      hook_name: which activation.
      bos_token_id: the id left out.
      drop_sinks: whether tokens of extreme norm are left out.

    Raises:
      ValueError: an SAE of another width, or no tokens at all.
    """
    device = next(model.parameters()).device
    total: metrics.Sums | None = None
    for ids in batches:
        tokens = torch.from_numpy(ids.astype(np.int64)).to(device)
        with capture(model, [hook_name], stop=True) as captured:
            model(tokens)
        acts = captured[hook_name]
        x = acts[kept(acts, tokens, bos_token_id, drop_sinks)].float()
        if x.shape[-1] != sae.d_in:
            raise ValueError(f"an SAE of width {sae.d_in} cannot read {hook_name} of width {x.shape[-1]}")
        sums = _sums(x, sae)
        total = sums if total is None else metrics.add(total, sums)
    if total is None:
        raise ValueError("no held-out text to evaluate on")
    return metrics.Sums(*(np.asarray(value, np.float64) for value in total))


def _sums(x: torch.Tensor, sae: TorchSAE) -> metrics.Sums:
    latents = sae.encode(x)
    x_hat = sae.decode(latents)
    exact: tuple[Any, ...] = (x.double(), x_hat.double(), latents.double())
    sums = metrics.of(
        *exact,
        (latents > 0).sum(0),
        loss=(exact[0] - exact[1]).square().sum(-1).mean(),
        nonfinite=(~x.isfinite()).sum(),
    )
    return metrics.Sums(*(value.cpu().numpy() for value in sums))
