"""Sums over tokens that compare the checkpoints, or layers, of a crosscoder."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int

from bridge.torch_sae import TorchSAE

CHUNK = 2048
"""Tokens whose latents are in memory at once."""
_LARGE = ("residual", "together")  # sums of the size of the decoder


@dataclasses.dataclass
class StageSums:
    """Sums over tokens. f are the code of the crosscoder, x_m its inputs, x_hat_m its reconstructions.

    m: checkpoints.
    """

    tokens: int
    fired: Float[np.ndarray, " f"]
    """Tokens on which each latent is not 0."""
    total: Float[np.ndarray, " f"]
    """sum f"""
    square: Float[np.ndarray, " f"]
    """sum f^2"""
    largest: Float[np.ndarray, " f"]
    """max f"""
    largest_at: Int[np.ndarray, " f"]
    """Number of a token on which f is that large."""
    residual: Float[np.ndarray, "f m d"]
    """sum f (x_m - x_hat_m)"""
    together: Float[np.ndarray, "f m d"]
    """sum f x_hat_m"""
    acts: Float[np.ndarray, "m d"]
    """sum x_m"""
    reconstructions: Float[np.ndarray, "m d"]
    """sum x_hat_m"""
    acts_square: Float[np.ndarray, " m"]
    """sum |x_m|^2"""
    error_square: Float[np.ndarray, " m"]
    """sum |x_m - x_hat_m|^2"""
    own_fired: Float[np.ndarray, "m f"]
    """Tokens on which each latent is not 0 in the checkpoint's own SAE."""
    own_total: Float[np.ndarray, "m f"]
    """Sums of its values there."""
    own_error_square: Float[np.ndarray, " m"]
    """sum |x_m - x_hat_m|^2 of these SAEs."""

    @property
    def fvu(self) -> Float[np.ndarray, " m"]:
        """Share of the variance of every checkpoint that is not explained."""
        return self.error_square / self._variance

    @property
    def own_fvu(self) -> Float[np.ndarray, " m"]:
        """The same of the checkpoints' own SAEs."""
        return self.own_error_square / self._variance

    @property
    def size(self) -> Float[np.ndarray, " m"]:
        """Root mean square norm of the centred activations of every checkpoint."""
        return np.sqrt(np.maximum(self._variance, 0) / self.tokens)

    @property
    def _variance(self) -> Float[np.ndarray, " m"]:
        return self.acts_square - np.square(self.acts).sum(1) / self.tokens


@torch.no_grad()
def add_up(sae: TorchSAE, singles: Sequence[TorchSAE], batches: Iterable[Float[torch.Tensor, "_ _"]]) -> StageSums:
    """Return the sums over some activations.

    Args:
      sae: the crosscoder.
      singles: for every checkpoint its own SAE.
      batches: activations of the checkpoints side by side, as the crosscoder reads them.

    Raises:
      ValueError: activations of another width, or none.
    """
    tokens = 0
    totals: dict[str, torch.Tensor] = {}
    for x in batches:
        if x.shape[1] != sae.d_in:
            raise ValueError(f"a crosscoder of width {sae.d_in} cannot read activations of width {x.shape[1]}")
        if len(x):
            _add(totals, _of_batch(sae, singles, x.to(sae.W_dec.dtype)), tokens)
            tokens += len(x)
    if not tokens:
        raise ValueError("there are no tokens to compare the checkpoints on: give more text")
    at = totals.pop("largest_at").cpu().numpy()
    sums = {name: value.double().cpu().numpy() for name, value in totals.items()}
    for name in _LARGE:
        sums[name] = sums[name].reshape(sae.d_sae, sae.layers, -1)
    return StageSums(tokens=tokens, largest_at=at, **sums)


def _add(totals: dict[str, torch.Tensor], batch: dict[str, torch.Tensor], before: int) -> None:
    """Add the sums of a batch, which `before` tokens precede. All are in float64 but those as large as the decoder."""
    largest, at = batch.pop("largest").double(), batch.pop("largest_at") + before
    if "largest" in totals:
        more = largest > totals["largest"]
        largest, at = torch.where(more, largest, totals["largest"]), torch.where(more, at, totals["largest_at"])
    totals |= {"largest": largest, "largest_at": at}
    for name, value in batch.items():
        value = value if name in _LARGE else value.double()
        if name not in totals:
            totals[name] = value
        else:
            totals[name] += value


def _of_batch(sae: TorchSAE, singles: Sequence[TorchSAE], x: Float[torch.Tensor, "n all"]) -> dict[str, torch.Tensor]:
    """Return the sums over some tokens, by the names of `StageSums`."""
    latents = sae.encode(x)
    x_hat = sae.reconstruct(latents, x)
    parts, made = x.chunk(sae.layers, dim=1), x_hat.chunk(sae.layers, dim=1)
    own = [single.encode(part) for single, part in zip(singles, parts, strict=True)]
    errors = [part - other for part, other in zip(parts, made, strict=True)]
    largest, largest_at = latents.max(0)
    own_errors = [part - single.reconstruct(f, part) for single, f, part in zip(singles, own, parts, strict=True)]
    return {
        "fired": (latents != 0).sum(0),
        "total": latents.sum(0),
        "square": latents.square().sum(0),
        "largest": largest,
        "largest_at": largest_at,
        "residual": latents.T @ (x - x_hat),
        "together": latents.T @ x_hat,
        "acts": torch.stack([part.double().sum(0) for part in parts]),
        "reconstructions": torch.stack([part.double().sum(0) for part in made]),
        "acts_square": _squares(parts),
        "error_square": _squares(errors),
        "own_fired": torch.stack([(f != 0).sum(0) for f in own]),
        "own_total": torch.stack([f.sum(0) for f in own]),
        "own_error_square": _squares(own_errors),
    }


def _squares(parts: Sequence[Float[torch.Tensor, "n d"]]) -> Float[torch.Tensor, " m"]:
    return torch.stack([part.double().square().sum() for part in parts])
