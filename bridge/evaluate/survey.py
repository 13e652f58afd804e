"""What an SAE makes of a model's activations, summed over text in one pass that ends at the hook."""

import dataclasses
from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import nn

from bridge.evaluate.site import Site
from bridge.torch_sae import TorchSAE
from jsae import metrics


@dataclasses.dataclass
class Survey:
    """Sums over the tokens that count: not excluded, no sinks."""

    sums: metrics.Sums
    """What `jsae.metrics.summarize` and `.density` answer on."""
    norm: float
    """sum |x|"""
    norm_hat: float
    """sum |x_hat|"""
    rows_fired: Float[np.ndarray, " f"]
    """Rows of text in which each latent fired at least once."""

    def __add__(self, other: "Survey") -> "Survey":
        return Survey(
            metrics.add(self.sums, other.sums),
            *(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)[1:]),
        )


def reconstruction(
    model: nn.Module,
    sae: TorchSAE,
    batches: Iterable[np.ndarray],
    hook_name: str,
    *,
    excluded: tuple[int, ...],
    drop_sinks: bool = True,
) -> metrics.Sums:
    """Sums over all tokens of `batches`, on which `jsae.metrics.summarize` and `.density` answer.

    Args:
      model: a nanochat.
      sae: of the model's width, on the model's device.
      batches: token ids, (rows, row_len) each; tokens are left out as they are in training.
      hook_name: which activation.
      excluded: the ids left out.
      drop_sinks: whether tokens of extreme norm are left out.

    Raises:
      ValueError: an SAE of another width, or no tokens at all.
    """
    return survey(Site(model, hook_name, excluded, drop_sinks), sae, batches).sums


@torch.no_grad()
def survey(site: Site, sae: TorchSAE, batches: Iterable[np.ndarray]) -> Survey:
    """Sums over all tokens of `batches`, (rows, row_len) each.

    Raises:
      ValueError: an SAE of another width, or no tokens at all.
    """
    total: Survey | None = None
    for _, tokens, acts, wanted, mask in site.read(batches):
        if acts.shape[-1] != sae.d_in:
            raise ValueError(f"an SAE of width {sae.d_in} cannot read {site.hook_name} of width {acts.shape[-1]}")
        found = _survey(acts[mask].float(), wanted[mask].float(), mask.nonzero()[:, 0], len(tokens), sae)
        total = found if total is None else total + found
    if total is None:
        raise ValueError("no held-out text to evaluate on")
    return total


def _survey(
    x: Float[torch.Tensor, "n d"],
    y: Float[torch.Tensor, "n o"],
    row: Int[torch.Tensor, " n"],
    rows: int,
    sae: TorchSAE,
) -> Survey:
    """The sums of the tokens that count of one batch; `row` says where each is from."""
    latents = sae.encode(x)
    wanted, made = y.double(), sae.made(latents, x).double()
    error, fired = made - wanted, latents != 0
    loss = error.square().sum() / max(len(x), 1)
    sums = metrics.batch_sums(wanted, error, latents, fired.sum(0), loss=loss, nonfinite=(~x.isfinite()).sum())
    in_row = torch.zeros(rows, sae.d_sae, device=x.device).index_add_(0, row, fired.float())
    return Survey(
        metrics.Sums(*(value.double().cpu().numpy() for value in sums)),
        norm=wanted.norm(dim=-1).sum().item(),
        norm_hat=made.norm(dim=-1).sum().item(),
        rows_fired=(in_row > 0).sum(0).double().cpu().numpy(),
    )
