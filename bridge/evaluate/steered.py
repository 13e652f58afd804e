"""Measure a steered model: effect on chosen tokens, and side effects on everything it predicts."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridge import steering
from bridge.evaluate.site import Site
from bridge.hooks import edit
from bridge.selection import among
from bridge.steering import Feature


@dataclasses.dataclass(frozen=True)
class Trial:
    """A direction with a strength, and what to measure."""

    feature: Feature
    strength: float
    """c of the mode `additive` of `bridge.steering.Steer`: every position gets h + c d."""
    targets: Bool[Tensor, "m V"]
    """Sets of tokens whose probability is measured."""
    positions: Bool[Tensor, "R T"]
    """Positions that are measured; all are steered."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Means over the measured positions of a trial; NaN if there are none."""

    divergence: float
    """KL(unsteered || steered), nats per token."""
    gain: list[float]
    """For every target, the mean of ln(steered probability of the set) - ln(unsteered probability), nats."""
    share: list[float]
    """For every target its mean probability: the expected share of sampled next tokens that are in the set."""
    share_before: list[float]
    """The same without steering."""
    bits_per_byte: float
    bits_per_byte_before: float


@torch.no_grad()
def measure(
    site: Site, rows: Int[np.ndarray, "R T"], trials: Sequence[Trial], token_bytes: Int[np.ndarray, " V"]
) -> list[Outcome]:
    """Return the outcome of every trial on the same text; several trials share a forward pass.

    Args:
      site: the activation that is steered; tokens that it excludes are not measured.
      rows: token ids.
      trials: directions and strengths.
      token_bytes: length in bytes of every token.
    """
    lengths = torch.as_tensor(token_bytes, device=site.device).long()
    totals = [torch.zeros(5 + 3 * len(trial.targets), dtype=torch.float64) for trial in trials]
    start = 0
    for batch in site.batches(rows, len(token_bytes)):
        tokens = torch.from_numpy(batch.astype(np.int64)).to(site.device)
        base = _Unsteered(site.model(tokens).log_softmax(-1), tokens, lengths[tokens])
        counts = ~among(tokens, site.excluded)
        size = max(site.rows_per_pass(rows.shape[1], len(token_bytes)) // len(batch), 1)
        for first in range(0, len(trials), size):
            group = trials[first : first + size]
            for i, logits in enumerate(_steered(site, tokens, group)):
                where = counts & group[i].positions[start : start + len(batch)]
                totals[first + i] += base.sums(logits, where, group[i].targets)
        start += len(batch)
    return [_outcome(total.tolist()) for total in totals]


@torch.no_grad()
def promoted(
    site: Site, rows: Int[np.ndarray, "R T"], directions: Sequence[tuple[Feature, float]], count: int
) -> list[Int[Tensor, " count"]]:
    """Return for each direction the tokens whose logits a strength raises most, on average over a text.

    Unlike the product of direction and unembedding, this counts what later layers make of the direction.
    """
    tokens = torch.from_numpy(rows.astype(np.int64)).to(site.device)
    base = site.model(tokens).mean((0, 1))
    tops = []
    for feature, strength in directions:
        with edit(site.model, {site.hook_name: steering.additive(feature, strength)}):
            tops.append((site.model(tokens).mean((0, 1)) - base).topk(min(count, len(base))).indices)
    return tops


def at_divergence(
    divergences: Sequence[float], values: Sequence[float], limit: float, power: float = 0.5
) -> tuple[float, bool]:
    """Return a quantity at a given side effect, interpolated along a curve of growing strength.

    Both start at 0 with strength 0. Between strengths, the quantity is linear in divergence**power: effects grow with
    the strength and KL with its square, hence 0.5; bits per byte grow with KL, hence 1. Where the curve does not reach
    the limit, its last value is returned: the effect that was had for less than the side effect allowed.

    Returns:
      The value, and whether the limit was reached.
    """
    target = limit**power
    before, value = 0.0, 0.0
    for divergence, following in zip(divergences, values, strict=True):
        here = max(divergence, 0.0) ** power
        if here >= target:
            return value + (following - value) * (target - before) / (here - before), True
        before, value = here, following
    return value, False


def _steered(site: Site, tokens: Int[Tensor, "B T"], group: Sequence[Trial]) -> list[Float[Tensor, "B T V"]]:
    """Return the logits of the model steered by each trial, from one forward pass."""

    def steer(h: Tensor) -> Tensor:
        edits = (steering.additive(trial.feature, trial.strength, h.dtype) for trial in group)
        return torch.cat([change(part) for change, part in zip(edits, h.chunk(len(group)), strict=True)])

    with edit(site.model, {site.hook_name: steer}):
        return list(site.model(tokens.repeat(len(group), 1)).chunk(len(group)))


class _Unsteered:
    """The unsteered model's predictions on a batch, with which those of steered models are compared.

    Args:
      log_probs: (B, T, V).
      tokens: (B, T).
      lengths: length in bytes of every token of the batch, (B, T).
    """

    def __init__(self, log_probs: Float[Tensor, "B T V"], tokens: Int[Tensor, "B T"], lengths: Int[Tensor, "B T"]):
        self._log_probs, self._probs = log_probs, log_probs.exp()
        self._following, self._size = tokens[:, 1:, None], lengths[:, 1:]
        self._minus_entropy = torch.linalg.vecdot(self._probs, log_probs)

    def sums(
        self, logits: Float[Tensor, "B T V"], where: Bool[Tensor, "B T"], targets: Bool[Tensor, "m V"]
    ) -> Float[Tensor, " s"]:
        """Return positions, divergence, nats of text (before, steered), bytes, and per target gain and shares."""
        total = logits.logsumexp(-1)
        divergence = self._minus_entropy - torch.linalg.vecdot(self._probs, logits) + total
        text = where[:, :-1] & (self._size > 0)
        before = -self._log_probs[:, :-1].gather(-1, self._following)[..., 0][text].sum()
        steered = (total[:, :-1] - logits[:, :-1].gather(-1, self._following)[..., 0])[text].sum()
        sums = [where.sum(), divergence[where].sum(), before, steered, self._size[text].sum()]
        for target in targets:
            ids = target.nonzero()[:, 0]
            mass_before = self._log_probs[..., ids].logsumexp(-1)[where]
            mass = (logits[..., ids].logsumexp(-1) - total)[where]
            sums += [(mass - mass_before).sum(), mass.exp().sum(), mass_before.exp().sum()]
        return torch.stack([value.double().cpu() for value in sums])


def _outcome(sums: list[float]) -> Outcome:
    positions, divergence, nats_before, nats, size = sums[:5]
    means = [value / positions if positions else math.nan for value in sums[5:]]
    bits = [value / (math.log(2) * size) if size else math.nan for value in (nats, nats_before)]
    return Outcome(
        divergence / positions if positions else math.nan, means[0::3], means[1::3], means[2::3], bits[0], bits[1]
    )
