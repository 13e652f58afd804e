"""Measure the model with the SAE's reconstruction in place of an activation, compared with ablating the activation."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridge.evaluate.site import Site, most_numbers, parts
from bridge.hooks import blocks_before, edit, replay
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
    same = blocks_before(hooks[-1])
    names = tuple(dict.fromkeys((*hooks, *same)))
    in_parts = _in_parts(batches, 2 * most_numbers(site.device) // len(token_bytes))  # fewer calls of the model
    for done in site.passes(names, in_parts, stop=False):
        tokens, acts, mask = done.tokens, done.acts[hooks[-1]], done.mask(*hooks)
        x, old = done.acts[hooks[0]][mask], acts[mask]
        logits = [done.logits]
        for new in (sae(x.float()), torch.zeros_like(old), constant.expand_as(old)):
            replaced = acts.clone()
            replaced[mask] = new.to(acts.dtype)
            edits = {hooks[-1]: lambda _, replaced=replaced: replaced}
            with replay(model, {name: done.acts[name] for name in same}), edit(model, edits):
                logits.append(model(tokens))
        counts = ~among(tokens, site.excluded)
        total += torch.stack([_sums(*losses, tokens, counts, lengths) for losses in _losses(logits, tokens)])
    if not total.any():
        raise ValueError("no held-out text to evaluate on")
    return {name: _effect(*sums.tolist()) for name, sums in zip(VARIANTS, total, strict=True)}


def _in_parts(batches: Iterable[np.ndarray], most: int) -> Iterator[np.ndarray]:
    """Yield the rows of batches with at most so many tokens at once, or one row."""
    yield from (batch[part] for batch in batches for part in parts(len(batch), most // max(batch.shape[1], 1)))


def _losses(
    logits: Sequence[Float[Tensor, "B T V"]], tokens: Int[Tensor, "B T"]
) -> list[tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]]:
    """Return nats of the next token (0 for the last of a row) and divergence from the first, of each of the logits.

    Positions are taken in groups, so that numbers of the size of the vocabulary are small.
    """
    targets = torch.nn.functional.pad(tokens[:, 1:], (0, 1)).flatten()
    vocabulary = logits[0].shape[-1]
    nats, divergence = (torch.zeros(len(logits), targets.numel(), device=tokens.device) for _ in range(2))
    flat = [one.reshape(-1, vocabulary) for one in logits]
    for part in parts(len(targets), most_numbers(tokens.device) // (4 * vocabulary)):
        base = flat[0][part].log_softmax(-1)
        probs = base.exp()
        for i, one in enumerate(flat):
            log_probs = one[part].log_softmax(-1) if i else base
            nats[i, part] = -log_probs.gather(-1, targets[part, None])[:, 0]
            if i:
                divergence[i, part] = (probs * (base - log_probs)).sum(-1)
    nats = nats.reshape(-1, *tokens.shape)
    nats[..., -1] = 0
    return list(zip(nats, divergence.reshape(nats.shape), strict=True))


def _sums(
    nats: Float[Tensor, "B T"],
    divergence: Float[Tensor, "B T"],
    tokens: Int[Tensor, "B T"],
    counts: Bool[Tensor, "B T"],
    lengths: Int[Tensor, " V"],
) -> Float[Tensor, "6"]:
    """Return nats and number of predictions; divergence and number of positions; nats and bytes of text."""
    nats, divergence = nats[:, :-1].double(), divergence.double()
    size = lengths[tokens[:, 1:]]
    predicts = counts[:, :-1]
    sums = (nats[predicts].sum(), predicts.sum(), divergence[counts].sum(), counts.sum())
    return torch.stack([s.double() for s in (*sums, nats[size > 0].sum(), size.sum())]).cpu()


def _effect(nats: float, predictions: float, divergence: float, positions: float, text: float, size: float) -> Effect:
    return Effect(
        nats / predictions if predictions else math.nan,
        divergence / positions if positions else math.nan,
        text / (math.log(2) * size) if size else math.nan,
    )
