"""Measure the loss of every checkpoint on the texts of latents, which the explorer's records hold."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int, Integer
from torch import nn

from bridge.nanochat.loss import losses_of
from bridge.run import Run
from jsae import files
from jsae.progress import Progress
from jsae.records.store import Store

MOST_TOKENS = 200_000
"""Tokens of the records' text that checkpoints read at most, in rows that are spread evenly over it."""
_PER_PASS = 2**26  # numbers of logits: a quarter of a GiB


def write(run: Run, hooks: Sequence[str], models: Collection[nn.Module], progress: Progress) -> None:
    """Write for every hook the mean loss of each checkpoint where each latent fires, in nats, beside its records.

    The loss is that of predicting the token after the one on which the latent fires in the records, so that every
    checkpoint is measured on the same tokens. A token that a special token follows, or nothing, is left out.

    Args:
      run: with records.
      hooks: whose records are read.
      models: the checkpoints' models; each is of use until the next one is asked for.
      progress: advances by the tokens that each model has read.
    """
    stores = {hook: run.records(hook) for hook in hooks}
    texts = stores[hooks[0]].texts
    every = -(-texts.header.rows * texts.header.row_length // MOST_TOKENS)
    rows = np.arange(0, texts.header.rows, every)
    tokens = np.asarray(texts.tokens[rows]).astype(np.int64)
    counts = ~np.isin(tokens[:, 1:], texts.header.special)
    places = {hook: _places(store, rows) for hook, store in stores.items()}
    means: dict[str, list[np.ndarray]] = {hook: [] for hook in hooks}
    everywhere = []
    for model in models:
        losses = np.full(tokens.shape, np.nan)
        losses[:, :-1][counts] = _losses(model, tokens, progress)[counts]
        everywhere.append(float(np.nanmean(losses)) if counts.any() else math.nan)
        for hook, (latent, cell) in places.items():
            means[hook].append(_means(latent, losses.reshape(-1)[cell], stores[hook].header.d_sae))
    for hook, columns in means.items():
        of_latents = [[_json(value) for value in row] for row in np.stack(columns, axis=1).tolist()]
        table = {"everywhere": [_json(value) for value in everywhere], "latents": of_latents}
        files.write(run.losses_file(hook), json.dumps(table, allow_nan=False) + "\n")


def _json(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


def _places(store: Store, rows: Int[np.ndarray, " r"]) -> tuple[np.ndarray, np.ndarray]:
    """Return latents and the cells of some rows on which they fire; cells number the tokens of these rows.

    All firings count, or those in the examples if only these were kept.
    """
    length = store.texts.header.row_length
    try:
        offsets, cells = np.asarray(store.all["offsets"]), np.asarray(store.all["cell"]).astype(np.int64)
        latents = np.repeat(np.arange(store.header.d_sae), np.diff(offsets))
    except FileNotFoundError:
        examples, activations = (np.asarray(store[f"{name}_offsets"]) for name in ("example", "activation"))
        example = np.repeat(np.arange(len(activations) - 1), np.diff(activations))
        row = np.asarray(store["example_row"]).astype(np.int64)[example]
        cells = row * length + store["activation_position"]
        latents = np.repeat(np.arange(store.header.d_sae), np.diff(examples))[example]
    among = np.full(store.texts.header.rows, -1)
    among[rows] = np.arange(len(rows))
    read = among[cells // length]
    return latents[read >= 0], (read * length + cells % length)[read >= 0]


@torch.no_grad()
def _losses(
    model: nn.Module, tokens: Integer[np.ndarray, "r T"], progress: Progress
) -> Float[np.ndarray, "r T_minus_1"]:
    """Return -log p of every token but the first, in nats."""
    weight = next(model.parameters())
    vocabulary = model.lm_head.weight.shape[0]
    step = max(_PER_PASS // (vocabulary * tokens.shape[1]), 1)
    parts = []
    for part in torch.from_numpy(tokens).split(step):
        ids = part.to(weight.device)
        parts.append(losses_of(model(ids)[:, :-1], ids[:, 1:]).float().cpu().numpy())
        progress.advance(part.numel())
    return np.concatenate(parts)


def _means(latent: np.ndarray, losses: np.ndarray, latents: int) -> Float[np.ndarray, " f"]:
    """Return the mean of the losses that are no NaN, of every latent; NaN without any."""
    known = ~np.isnan(losses)
    counts = np.bincount(latent[known], minlength=latents)
    sums = np.bincount(latent[known], losses[known], minlength=latents)
    return np.where(counts > 0, sums / np.maximum(counts, 1), math.nan)
