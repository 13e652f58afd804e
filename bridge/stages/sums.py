"""Sums over tokens that compare the checkpoints, or layers, of a crosscoder."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Float

from bridge.torch_sae import TorchSAE

Array = Float[np.ndarray, "..."]


@dataclasses.dataclass
class StageSums:
    """Sums over tokens, in float64. f are the code of the crosscoder, x_m its inputs, x_hat_m its reconstructions.

    m: checkpoints. r_j: the decoder row of latent j in the checkpoint where it is longest.
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
    residual: Float[np.ndarray, "f m d"]
    """sum f (x_m - x_hat_m)"""
    explained: Float[np.ndarray, "f m"]
    """sum f <x_hat_m, r>"""
    acts: Float[np.ndarray, "m d"]
    """sum x_m"""
    reconstructions: Float[np.ndarray, "m d"]
    """sum x_hat_m"""
    acts_square: Float[np.ndarray, " m"]
    """sum |x_m|^2"""
    error_square: Float[np.ndarray, " m"]
    """sum |x_m - x_hat_m|^2"""
    own_fired: Float[np.ndarray, "m f"]
    """Tokens on which each latent is not 0 in the checkpoint's own SAE (`jsae.layers.single`)."""
    own_total: Float[np.ndarray, "m f"]
    """Sums of its values there."""
    own_error_square: Float[np.ndarray, " m"]
    """sum |x_m - x_hat_m|^2 of these SAEs."""

    def __add__(self, other: "StageSums") -> "StageSums":
        return StageSums(
            **{
                field.name: (np.maximum if field.name == "largest" else np.add)(
                    getattr(self, field.name), getattr(other, field.name)
                )
                for field in dataclasses.fields(self)
            }
        )

    @property
    def fvu(self) -> Float[np.ndarray, " m"]:
        """Share of the variance of every checkpoint that is not explained."""
        return self.error_square / self._variance

    @property
    def own_fvu(self) -> Float[np.ndarray, " m"]:
        """The same of the checkpoints' own SAEs."""
        return self.own_error_square / self._variance

    @property
    def _variance(self) -> Float[np.ndarray, " m"]:
        return self.acts_square - np.square(self.acts).sum(1) / self.tokens


def strongest(sae: TorchSAE) -> Float[torch.Tensor, "f d"]:
    """Return the decoder row of every latent in the checkpoint where it is longest."""
    rows = sae.W_dec.reshape(sae.d_sae, sae.layers, -1)
    return rows[torch.arange(sae.d_sae), rows.norm(dim=2).argmax(1)]


@torch.no_grad()
def add_up(sae: TorchSAE, singles: Sequence[TorchSAE], batches: Iterable[Float[torch.Tensor, "n d"]]) -> StageSums:
    """Return the sums over some activations.

    Args:
      sae: the crosscoder.
      singles: for every checkpoint its own SAE.
      batches: activations of the checkpoints side by side, as the crosscoder reads them.

    Raises:
      ValueError: activations of another width, or none.
    """
    rows, total = strongest(sae), None
    for x in batches:
        if x.shape[1] != sae.d_in:
            raise ValueError(f"a crosscoder of width {sae.d_in} cannot read activations of width {x.shape[1]}")
        if len(x):
            batch = _batch(sae, singles, rows, x.float())
            total = batch if total is None else total + batch
    if total is None:
        raise ValueError("there are no tokens to compare the checkpoints on: give more text")
    return total


def _batch(
    sae: TorchSAE, singles: Sequence[TorchSAE], rows: Float[torch.Tensor, "f d"], x: Float[torch.Tensor, "n d"]
) -> StageSums:
    latents = sae.encode(x)
    x_hat = sae.reconstruct(latents, x)
    parts, made = x.chunk(sae.layers, dim=1), x_hat.chunk(sae.layers, dim=1)
    own = [single.encode(part) for single, part in zip(singles, parts, strict=True)]
    own_errors = [single.reconstruct(f, part) - part for single, f, part in zip(singles, own, parts, strict=True)]

    def numbers(values: Sequence[torch.Tensor] | torch.Tensor) -> Array:
        stacked = values if isinstance(values, torch.Tensor) else torch.stack(list(values))
        return stacked.double().cpu().numpy()

    def squares(errors: Iterable[torch.Tensor]) -> Array:
        return numbers([error.double().square().sum() for error in errors])

    return StageSums(
        tokens=len(x),
        fired=numbers((latents != 0).sum(0)),
        total=numbers(latents.sum(0)),
        square=numbers(latents.square().sum(0)),
        largest=numbers(latents.amax(0)),
        residual=numbers((latents.T @ (x - x_hat)).reshape(sae.d_sae, sae.layers, -1)),
        explained=numbers([(latents * (part @ rows.T)).sum(0) for part in made]).T,
        acts=numbers([part.double().sum(0) for part in parts]),
        reconstructions=numbers([part.double().sum(0) for part in made]),
        acts_square=squares(parts),
        error_square=squares([part - other for part, other in zip(parts, made, strict=True)]),
        own_fired=numbers([(f != 0).sum(0) for f in own]),
        own_total=numbers([f.sum(0) for f in own]),
        own_error_square=squares(own_errors),
    )
