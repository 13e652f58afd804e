"""Sum reconstruction errors and firings of an SAE over text, in one pass that ends at the hook."""

import dataclasses
from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import nn

from bridge.evaluate.site import Site, most_numbers, parts
from bridge.torch_sae import TorchSAE
from jsae import metrics


@dataclasses.dataclass
class Survey:
    """Sums over the tokens that count: neither excluded ones nor sinks."""

    sums: metrics.Sums
    """The input of `jsae.metrics.summarize` and `jsae.metrics.density`."""
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
    """Return sums over all tokens of `batches`, the input of `jsae.metrics.summarize` and `jsae.metrics.density`.

    Args:
      model: a nanochat.
      sae: of the model's width, on the model's device.
      batches: token ids, (rows, row_len) each; tokens are left out as in training.
      hook_name: which activation.
      excluded: ids of tokens to leave out.
      drop_sinks: whether to leave out tokens of extreme norm.

    Raises:
      ValueError: the SAE has another width, or there are no tokens.
    """
    return survey(Site(model, hook_name, excluded, drop_sinks), sae, batches).sums


@torch.no_grad()
def survey(site: Site, sae: TorchSAE, batches: Iterable[np.ndarray]) -> Survey:
    """Return sums over all tokens of `batches`, (rows, row_len) each.

    Raises:
      ValueError: the SAE has another width, or there are no tokens.
    """
    total: Survey | None = None
    for _, tokens, acts, target, mask in site.read(batches):
        if acts.shape[-1] != sae.d_in:
            raise ValueError(f"an SAE of width {sae.d_in} cannot read {site.hook_name} of width {acts.shape[-1]}")
        batch = _survey(acts[mask].float(), target[mask].float(), mask.nonzero()[:, 0], len(tokens), sae)
        total = batch if total is None else total + batch
    if total is None:
        raise ValueError("no held-out text to evaluate on")
    return total


@torch.no_grad()
def survey_of_rows(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "n o"], sae: TorchSAE) -> metrics.Sums:
    """Return sums over activations that are given, all of which count.

    Args:
      x: inputs of the SAE.
      y: what it is to reconstruct.
      sae: on its device.

    Raises:
      ValueError: the SAE has another width.
    """
    if x.shape[1] != sae.d_in:
        raise ValueError(f"an SAE of width {sae.d_in} cannot read activations of width {x.shape[1]}")
    device = sae.W_dec.device
    inputs, targets = (torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in (x, y))
    return _survey(inputs, targets, torch.zeros(len(x), dtype=torch.int64, device=device), 1, sae).sums


def _survey(
    x: Float[torch.Tensor, "n d"],
    y: Float[torch.Tensor, "n o"],
    row: Int[torch.Tensor, " n"],
    rows: int,
    sae: TorchSAE,
) -> Survey:
    """Return the sums of one batch over the tokens that count; `row` holds the row of each.

    Tokens are taken in parts that stay in the caches of a processor (`site.most_numbers`).
    """
    mean = y.double().sum(0) / max(len(y), 1)
    in_row = torch.zeros(rows, sae.d_sae, dtype=torch.float64, device=x.device)
    total: metrics.Sums | None = None
    norm, norm_hat = 0.0, 0.0
    for part in parts(len(x), most_numbers(x.device) // sae.d_sae):
        latents = sae.encode(x[part])
        target, y_hat = y[part].double(), sae.reconstruct(latents, x[part]).double()
        error = y_hat - target
        counts = torch.zeros(rows, sae.d_sae, device=x.device).index_add_(0, row[part], (latents != 0).float())
        in_row += counts
        sums = metrics.batch_sums(
            target,
            error,
            l0=counts.sum(dtype=torch.float64),
            l1=latents.abs().sum(),
            fired=counts.sum(0, dtype=torch.float64),
            loss=error.square().sum() / max(len(target), 1),
            nonfinite=(~x[part].isfinite()).sum(),
            mean=mean,
        )
        sums = metrics.Sums(*(value.double() for value in sums))
        total = sums if total is None else metrics.add(total, sums)
        norm += target.norm(dim=-1).sum().item()
        norm_hat += y_hat.norm(dim=-1).sum().item()
    assert total is not None
    return Survey(
        metrics.Sums(*(value.cpu().numpy() for value in total)),
        norm=norm,
        norm_hat=norm_hat,
        rows_fired=(in_row > 0).sum(0).double().cpu().numpy(),
    )
