"""Rank documents, files and tokens by what a latent does on them: the tables of `bridge.stages.provenance`."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from bridge.evaluate.text import Text
from bridge.nanochat.tokenizer import Tokenizer
from bridge.stages.contexts import context, spelt

LEAST = 3
"""Occurrences of a token from which a mean over them is given."""


class Firings(NamedTuple):
    """Values of latents on text, and losses of the model before and after they grew."""

    rows: Text
    sources: list[tuple[str, str, int]]
    """File, part of it, and number of the document in that, of every document."""
    values: Float[np.ndarray, "L R T"]
    counts: Bool[np.ndarray, "R T"]
    """True for tokens that count."""
    before: Float[np.ndarray, "R T"]
    """Loss of the earlier checkpoint in nats: -log p of the token after each; NaN where a row or document ends."""
    after: Float[np.ndarray, "R T"]


def of_latent(firings: Firings, latent: int, most: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the tables of one latent as JSON values.

    `documents` and `files` are ranked by the sum of the latent's values. `loss` compares the two checkpoints, in nats
    per token: the mean fall of the loss of the token after those on which the latent fires, and of all others.
    `tokens` are the predicted tokens by the sum of falls over their occurrences where the latent fires, at least
    `LEAST`; `occurrences` are single ones with the largest fall.

    Args:
      firings: values and losses.
      latent: its index in them.
      most: entries of a table.
      tokenizer: of the rows.
    """
    values = np.where(firings.counts, firings.values[latent], 0)
    fired = values > 0
    fall = firings.before - firings.after
    known = ~np.isnan(fall) & firings.counts
    return {
        "fired": int(fired.sum()),
        "density": float(fired.sum() / max(firings.counts.sum(), 1)),
        "documents": _documents(firings, values, most, tokenizer),
        "files": _files(firings, values, most),
        "loss": _loss(firings, known & fired, known & ~fired),
        "tokens": _tokens(firings, fall, known & fired, most, tokenizer),
        "occurrences": _occurrences(firings, fall, known & fired, values, most, tokenizer),
    }


def _documents(
    firings: Firings, values: Float[np.ndarray, "R T"], most: int, tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    document = firings.rows.document
    inside = document >= 0
    size = len(firings.sources)
    total = np.bincount(document[inside], values[inside], size)
    count = np.bincount(document[inside], values[inside] > 0, size)
    tokens = np.bincount(document[inside], minlength=size)
    found = []
    for number in np.argsort(-total, kind="stable")[:most]:
        if total[number] <= 0:
            break
        row, position = np.unravel_index(np.argmax(np.where(document == number, values, -1)), values.shape)
        found.append(
            _source(firings, int(number))
            | {
                "total": float(total[number]),
                "fired": int(count[number]),
                "tokens": int(tokens[number]),
                "largest": float(values[row, position]),
                "byte": int(firings.rows.place[row, position]),
                **context(firings.rows, int(row), int(position), tokenizer),
            }
        )
    return found


def _files(firings: Firings, values: Float[np.ndarray, "R T"], most: int) -> list[dict[str, Any]]:
    """Return files, and parts of files such as row groups, by the sum of a latent's values."""
    document = firings.rows.document
    names = [" ".join(filter(None, source[:2])) for source in firings.sources]
    order = {name: number for number, name in enumerate(dict.fromkeys(names))}
    of_document = np.array([order[name] for name in names], np.int64)
    inside = document >= 0
    part = of_document[document[inside]]
    total = np.bincount(part, values[inside], len(order))
    count, tokens = np.bincount(part, values[inside] > 0, len(order)), np.bincount(part, minlength=len(order))
    listed = list(order)
    return [
        {
            "file": listed[number],
            "total": float(total[number]),
            "fired": int(count[number]),
            "tokens": int(tokens[number]),
            "density": float(count[number] / max(tokens[number], 1)),
        }
        for number in np.argsort(-total, kind="stable")[:most]
        if total[number] > 0
    ]


def _loss(firings: Firings, where: Bool[np.ndarray, "R T"], elsewhere: Bool[np.ndarray, "R T"]) -> dict[str, Any]:
    return {
        name: {
            "tokens": int(chosen.sum()),
            "before": _mean(firings.before[chosen]),
            "after": _mean(firings.after[chosen]),
        }
        for name, chosen in {"where_it_fires": where, "elsewhere": elsewhere}.items()
    }


def _tokens(
    firings: Firings, fall: Float[np.ndarray, "R T"], where: Bool[np.ndarray, "R T"], most: int, tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    targets = _targets(firings)[where]
    count = np.bincount(targets, minlength=tokenizer.vocab_size)
    total = np.bincount(targets, fall[where], tokenizer.vocab_size)
    ranked = np.argsort(np.where(count >= LEAST, -total, np.inf), kind="stable")[:most]
    return [
        {
            "token": spelt([token], tokenizer),
            "id": int(token),
            "occurrences": int(count[token]),
            "mean_fall": float(total[token] / count[token]),
            "total_fall": float(total[token]),
        }
        for token in ranked
        if count[token] >= LEAST and total[token] > 0
    ]


def _occurrences(
    firings: Firings,
    fall: Float[np.ndarray, "R T"],
    where: Bool[np.ndarray, "R T"],
    values: Float[np.ndarray, "R T"],
    most: int,
    tokenizer: Tokenizer,
) -> list[dict[str, Any]]:
    targets = _targets(firings)
    flat = np.where(where, fall, -np.inf).ravel()
    found = []
    for cell in np.argsort(-flat, kind="stable")[:most]:
        if flat[cell] <= 0:
            break
        row, position = (int(i) for i in np.unravel_index(cell, fall.shape))
        found.append(
            _source(firings, int(firings.rows.document[row, position]))
            | {
                "predicted": spelt([targets[row, position]], tokenizer),
                "before": float(firings.before[row, position]),
                "after": float(firings.after[row, position]),
                "value": float(values[row, position]),
                **context(firings.rows, row, position, tokenizer),
            }
        )
    return found


def _targets(firings: Firings) -> Int[np.ndarray, "R T"]:
    """Return the token after each; that of the last of a row means nothing."""
    return np.roll(firings.rows.tokens, -1, axis=1)


def _source(firings: Firings, document: int) -> dict[str, Any]:
    file, part, number = firings.sources[document]
    return {"file": file, "part": part, "document": number}


def _mean(values: Float[np.ndarray, " n"]) -> float | None:
    return float(values.mean(dtype=np.float64)) if len(values) else None
