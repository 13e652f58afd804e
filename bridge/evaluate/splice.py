"""Measure the model with the SAE's reconstruction in place of an activation, compared with ablating the activation."""

import dataclasses
import math
from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridge.evaluate.site import Site
from bridge.hooks import edit
from bridge.selection import among
from bridge.torch_sae import TorchSAE

VARIANTS = ("without_sae", "with_sae", "with_ablation", "with_mean_ablation")
"""The unchanged model; with the reconstruction; with zeros; with the mean activation of the text."""


@dataclasses.dataclass
class Effect:
    """Losses of the model on text under one variant, and its divergence from the unchanged model."""

    cross_entropy: float
    """Nats per token, over positions whose own token is not excluded; the next token may be excluded."""
    divergence: float
    """KL(unchanged model || this variant) in nats, over positions whose own token is not excluded."""
    bits_per_byte: float
    """nanochat's measure: nats of targets that are text, over ln 2 times their bytes; special tokens have 0 bytes."""


@torch.no_grad()
def effects(
    site: Site,
    sae: TorchSAE,
    batches: Iterable[np.ndarray],
    mean: Float[np.ndarray, " d"],
    token_bytes: Int[np.ndarray, " V"],
) -> dict[str, Effect]:
    """Return the effect of each of `VARIANTS`.

    All variants change the same positions: the tokens that the SAE was trained on. Excluded tokens and sinks keep their
    activations in the ablations too, so that variants differ in the values they insert and not in the positions.
    (SAEBench's ablation also zeroes BOS.) Sinks that are not excluded count in the averages.

    Args:
      site: the activation to replace, a transcoder's target, and the tokens at which to replace it.
      sae: of the model's width, on the model's device.
      batches: token ids, (rows, row_len) each.
      mean: the activation that mean ablation inserts.
      token_bytes: the length in bytes of every token.

    Raises:
      ValueError: there are no tokens.
    """
    model, hooks = site.model, (site.hook_name, *site.other_hooks)
    lengths = torch.as_tensor(token_bytes, device=site.device).long()
    constant = torch.as_tensor(mean, device=site.device)
    total = torch.zeros(len(VARIANTS), 6, dtype=torch.float64)
    for forward_pass in site.passes(hooks, batches, stop=False):
        tokens, acts, mask = forward_pass.tokens, forward_pass.acts[hooks[-1]], forward_pass.mask(*hooks)
        base = forward_pass.logits.log_softmax(-1)
        probs = base.exp()
        x = forward_pass.acts[hooks[0]][mask]
        counts = ~among(tokens, site.excluded)
        total[0] += _sums(base, torch.zeros_like(counts, dtype=torch.float64), tokens, counts, lengths)
        old = acts[mask]
        for i, new in enumerate((sae(x.float()), torch.zeros_like(old), constant.expand_as(old)), 1):
            replaced = acts.clone()
            replaced[mask] = new.to(acts.dtype)
            with edit(model, {hooks[-1]: lambda _, replaced=replaced: replaced}):  # type: ignore[misc]
                log_probs = model(tokens).log_softmax(-1)
            divergence = (probs * (base - log_probs)).sum(-1).double()
            total[i] += _sums(log_probs, divergence, tokens, counts, lengths)
    if not total.any():
        raise ValueError("no held-out text to evaluate on")
    return {name: _effect(*sums.tolist()) for name, sums in zip(VARIANTS, total, strict=True)}


def _sums(
    log_probs: Float[Tensor, "B T V"],
    divergence: Float[Tensor, "B T"],
    tokens: Int[Tensor, "B T"],
    counts: Bool[Tensor, "B T"],
    lengths: Int[Tensor, " V"],
) -> Float[Tensor, "6"]:
    """Return nats and number of predictions; divergence and number of positions; nats and bytes of text."""
    targets = tokens[:, 1:]
    nats = -log_probs[:, :-1].gather(-1, targets[..., None])[..., 0].double()
    size = lengths[targets]
    predicts = counts[:, :-1]
    sums = (nats[predicts].sum(), predicts.sum(), divergence[counts].sum(), counts.sum())
    return torch.stack([s.double() for s in (*sums, nats[size > 0].sum(), size.sum())]).cpu()


def _effect(nats: float, predictions: float, divergence: float, positions: float, text: float, size: float) -> Effect:
    return Effect(
        nats / predictions if predictions else math.nan,
        divergence / positions if positions else math.nan,
        text / (math.log(2) * size) if size else math.nan,
    )
