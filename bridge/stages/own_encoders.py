"""Fit the encoder of each checkpoint's own SAE, which reads what a crosscoder's encoder reads in all of them.

A latent's pre-activation is linear in the activations of all checkpoints, h = sum_m (x_m - b_m) E_m. The linear
function of one checkpoint's activations that is nearest to it, over text, is the encoder with which that checkpoint
alone tells how strong the latent is: least squares, with a small ridge.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Float

from bridge.torch_sae import TorchSAE
from jsae.saelens import Plain, layers

RIDGE = 1e-4
"""Ridge, of the mean square of a checkpoint's centred activations."""


@dataclasses.dataclass
class _Sums:
    """Sums over tokens for one checkpoint; u are its activations minus `b_dec`, followed by 1."""

    square: Float[torch.Tensor, "d1 d1"]
    """sum u u'"""
    product: Float[torch.Tensor, "d1 f"]
    """sum u h'"""


@torch.no_grad()
def fit(crosscoder: Plain, sae: TorchSAE, batches: Iterable[Float[torch.Tensor, "_ _"]]) -> list[Plain]:
    """Return the SAE of every checkpoint, with the encoder that is nearest to the crosscoder's.

    Args:
      crosscoder: in plain form.
      sae: the same as a module, on the device of the activations.
      batches: activations of all checkpoints side by side, (n, layers * d), at least some times d tokens in all.

    Raises:
      ValueError: there are no activations.
    """
    sums: list[_Sums] = []
    for x in batches:
        if not len(x):
            continue
        centred = x.to(sae.W_enc.dtype) - sae.b_dec
        h = (centred @ sae.W_enc).double()
        for number, part in enumerate(centred.double().chunk(sae.layers, dim=1)):
            u = torch.cat([part, torch.ones_like(part[:, :1])], dim=1)
            square, product = u.T @ u, u.T @ h
            if number == len(sums):
                sums.append(_Sums(square, product))
            else:
                sums[number].square += square
                sums[number].product += product
    if not sums:
        raise ValueError("there are no tokens to fit the encoders of single checkpoints on: give more text")
    return [_solved(crosscoder, layer, one) for layer, one in enumerate(sums)]


def _solved(crosscoder: Plain, layer: int, sums: _Sums) -> Plain:
    """Return the SAE of one checkpoint."""
    width = len(sums.square) - 1
    square = sums.square.clone()
    diagonal = square.diagonal()[:width]
    diagonal += RIDGE * float(diagonal.mean()) + torch.finfo(torch.float32).tiny
    solution = torch.linalg.solve(square, sums.product).cpu().numpy().astype(np.float32)
    return layers.with_encoder(layers.single(crosscoder, layer), solution[:width], solution[width])
