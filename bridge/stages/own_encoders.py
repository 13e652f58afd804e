"""Fit the encoder of each checkpoint's own SAE, which reads what a crosscoder's encoder reads in all of them.

A latent's pre-activation is linear in the activations of all checkpoints, h = sum_m (x_m - b_m) E_m. The linear
function of one checkpoint's activations that is nearest to it, over text, is the encoder with which that checkpoint
alone tells how strong the latent is: least squares, with a small ridge. What one checkpoint does not tell, this
function leaves out, so it varies less than h. So thresholds are lowered by one factor until as many latents fire per
token as in the crosscoder, and the values of every latent are raised to what the crosscoder has where they fire.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float

from bridge.stages.sums import CHUNK
from bridge.torch_sae import RANKED, TorchSAE
from jsae.saelens import Plain, layers

RIDGE = 1e-4
"""Ridge, of the mean square of a checkpoint's centred activations."""
CALIBRATED = 8192
"""Tokens on which thresholds and values are adjusted."""
_LEAST_FIRED = 20  # tokens on which a latent fires whose values are adjusted by themselves
_HALVINGS = 12  # of the interval in which the factor on thresholds lies


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
    sample: list[torch.Tensor] = []
    for x in batches:
        if not len(x):
            continue
        if sum(map(len, sample)) < CALIBRATED:
            sample.append(x)
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
    parts = [part for x in sample for part in x.to(sae.W_enc.dtype).split(CHUNK)]
    return [_calibrated(_solved(crosscoder, layer, one), sae, layer, parts) for layer, one in enumerate(sums)]


def _solved(crosscoder: Plain, layer: int, sums: _Sums) -> Plain:
    """Return the SAE of one checkpoint, by least squares."""
    width = len(sums.square) - 1
    square = sums.square.clone()
    diagonal = square.diagonal()[:width]
    diagonal += RIDGE * float(diagonal.mean()) + torch.finfo(torch.float32).tiny
    solution = torch.linalg.solve(square, sums.product).cpu().numpy().astype(np.float32)
    return layers.with_encoder(layers.single(crosscoder, layer), solution[:width], solution[width])


def _calibrated(own: Plain, sae: TorchSAE, layer: int, sample: Sequence[Float[torch.Tensor, "_ _"]]) -> Plain:
    """Return an SAE with adjusted thresholds, where it has some, and values, unless their ranks select latents."""
    if own.cfg["architecture"] in RANKED:
        return own
    module = _module(own, sae)
    present = module.W_enc.any(dim=0)
    if "threshold" in own.weights:
        factor = _factor(module, sae, layer, sample, present)
        own = _changed(own, threshold=own.weights["threshold"] * np.float32(factor))
        module = _module(own, sae)
    gain = _gain(module, sae, layer, sample, present)
    weights = own.weights
    if "r_mag" in weights:  # of a gated SAE the magnitude alone
        return _changed(own, r_mag=weights["r_mag"] + np.log(gain), b_mag=weights["b_mag"] * gain)
    scaled = {name: weights[name] * gain for name in ("W_enc", "b_enc", "threshold") if name in weights}
    return _changed(own, **scaled)


def _changed(plain: Plain, **arrays: Float[np.ndarray, ...]) -> Plain:
    weights = plain.weights | {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}
    return Plain(plain.cfg, weights, plain.layers)


def _factor(
    own: TorchSAE,
    sae: TorchSAE,
    layer: int,
    sample: Sequence[Float[torch.Tensor, "_ _"]],
    present: Bool[torch.Tensor, " f"],
) -> float:
    """Return the factor on all thresholds with which as many latents fire as in the crosscoder, from 0 to 2."""
    wanted = sum(int((sae.encode(x)[:, present] != 0).sum()) for x in sample)
    parts = [x.chunk(sae.layers, dim=1)[layer] for x in sample]
    low, high = 0.0, 2.0
    for _ in range(_HALVINGS):
        factor = (low + high) / 2
        fired = 0
        for part in parts:
            pre = (part - own.b_dec) @ own.W_enc + own.b_enc
            fired += int(((pre > own.threshold * factor) & (pre > 0))[:, present].sum())
        low, high = (factor, high) if fired > wanted else (low, factor)
    return high


def _gain(
    own: TorchSAE,
    sae: TorchSAE,
    layer: int,
    sample: Sequence[Float[torch.Tensor, "_ _"]],
    present: Bool[torch.Tensor, " f"],
) -> Float[np.ndarray, " f"]:
    """Return the factors with which the values of latents are nearest to the crosscoder's, where they fire.

    Latents that fire on fewer than `_LEAST_FIRED` tokens, or whose factor is not positive, have the median of the
    others.
    """
    square, product, fired = (torch.zeros(own.d_sae, dtype=torch.float64, device=own.W_enc.device) for _ in range(3))
    for x in sample:
        values, expected = own.encode(x.chunk(sae.layers, dim=1)[layer]).double(), sae.encode(x).double()
        square += values.square().sum(0)
        product += (values * expected).sum(0)
        fired += (values != 0).sum(0)
    known = present & (fired >= _LEAST_FIRED) & (product > 0)
    gain = product / square.clamp(min=torch.finfo(torch.float32).tiny)
    usual = gain[known].median() if known.any() else torch.ones((), dtype=gain.dtype, device=gain.device)
    return torch.where(known, gain, torch.where(present, usual, 1.0)).float().cpu().numpy()


def _module(plain: Plain, like: TorchSAE) -> TorchSAE:
    """Return an SAE in plain form as a module, with the dtype and on the device of another."""
    weights = {name: torch.from_numpy(weight) for name, weight in plain.weights.items()}
    return TorchSAE(dict(plain.cfg), weights).eval().to(like.W_enc.device, like.W_enc.dtype)
