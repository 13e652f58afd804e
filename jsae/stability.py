"""Compare what SAEs of several seeds learned: one-to-one matches of their decoder rows, and which latents recur."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

MOST_LATENTS = 16_384
"""Latents of an SAE that are matched: the assignment takes minutes and gigabytes beyond."""
THRESHOLDS = (0.7, 0.9)
"""Cosines above which two latents count as the same."""


SAME = 0.7
"""Cosine of decoder rows from which two latents are the same, unless another is given."""


class Match(NamedTuple):
    """Pairs of latents of two SAEs, with the cosine of their decoder rows."""

    first: Int[np.ndarray, " m"]
    second: Int[np.ndarray, " m"]
    cosine: Float[np.ndarray, " m"]


def match(
    first: Float[np.ndarray, "f d"],
    second: Float[np.ndarray, "g e"],
    alive: tuple[Bool[np.ndarray, " f"], Bool[np.ndarray, " g"]] | None = None,
) -> Match:
    """Return the one-to-one assignment of decoder rows with the largest sum of cosines (Hungarian algorithm).

    Args:
      first: decoder rows of an SAE.
      second: those of another SAE of the same activations.
      alive: which latents of each take part; None is all.

    Returns:
      min(f, g) pairs, counting those that take part, by the index of the first.

    Raises:
      ValueError: rows of different widths, or more than `MOST_LATENTS` latents take part.
    """
    from scipy.optimize import linear_sum_assignment

    if first.shape[1] != second.shape[1]:
        raise ValueError(
            f"decoder rows of {first.shape[1]} and {second.shape[1]} channels: give SAEs of one activation"
        )
    chosen = [np.arange(len(rows)) for rows in (first, second)] if alive is None else [np.flatnonzero(a) for a in alive]
    largest = max(map(len, chosen))
    if largest > MOST_LATENTS:
        raise ValueError(f"{largest:,} latents are alive, at most {MOST_LATENTS:,} are matched: give narrower SAEs")
    rows = [_unit(weights[index]) for weights, index in zip((first, second), chosen, strict=True)]
    cosines = rows[0] @ rows[1].T
    i, j = linear_sum_assignment(cosines, maximize=True)
    return Match(chosen[0][i], chosen[1][j], cosines[i, j])


def stability(
    decoders: Sequence[Float[np.ndarray, "f d"]], alive: Sequence[Bool[np.ndarray, " f"]] | None = None
) -> dict[str, Any]:
    """Return how many latents SAEs of several seeds share, averaged over all pairs of SAEs.

    `mean_cosine` is the mean over matched pairs of latents (`match`); `share_over_0.7` and `share_over_0.9` are the
    numbers of pairs above these cosines, divided by the larger number of living latents of the two SAEs. The measure is
    that of arXiv 2501.16615.

    Args:
      decoders: decoder rows of at least two SAEs of the same size, on the same activations.
      alive: which latents of each fire; None is all.

    Raises:
      ValueError: fewer than two SAEs, other sizes, or too many latents (`match`).
    """
    masks, matches = _matches(decoders, alive)
    pairs = []
    for (i, j), found in matches.items():
        most = max(masks[i].sum(), masks[j].sum())
        shares = {f"share_over_{bar}": float((found.cosine > bar).sum() / most) if most else 0.0 for bar in THRESHOLDS}
        pairs.append({"mean_cosine": float(found.cosine.mean()) if len(found.cosine) else 0.0, **shares})
    means = {name: float(np.mean([pair[name] for pair in pairs])) for name in pairs[0]}
    return means | {"pairs": pairs, "alive": [int(mask.sum()) for mask in masks]}


def recurrence(
    decoders: Sequence[Float[np.ndarray, "f d"]],
    alive: Sequence[Bool[np.ndarray, " f"]] | None = None,
    bar: float = SAME,
) -> list[Float[np.ndarray, " f"]]:
    """Return for every SAE the share of the other SAEs in which each of its latents recurs, from 0 to 1.

    A latent recurs in another SAE if the cosine of its decoder row to the row that it is matched with (`match`) is at
    least `bar`. Dead latents have NaN.

    Args:
      decoders: decoder rows of at least two SAEs of the same size, on the same activations.
      alive: which latents of each fire; None is all.
      bar: the least cosine.

    Raises:
      ValueError: as `stability`.
    """
    masks, matches = _matches(decoders, alive)
    counts = [np.where(mask, 0.0, np.nan) for mask in masks]
    for (i, j), found in matches.items():
        same = found.cosine >= bar
        counts[i][found.first[same]] += 1
        counts[j][found.second[same]] += 1
    return [count / (len(decoders) - 1) for count in counts]


def _matches(
    decoders: Sequence[Float[np.ndarray, "f d"]], alive: Sequence[Bool[np.ndarray, " f"]] | None
) -> tuple[list[Bool[np.ndarray, " f"]], dict[tuple[int, int], Match]]:
    """Return which latents of every SAE take part, and the matches of all pairs of SAEs by their indices.

    Raises:
      ValueError: as `stability`.
    """
    if len(decoders) < 2:
        raise ValueError(f"{len(decoders)} SAEs were given: stability compares at least two")
    if len({weights.shape for weights in decoders}) > 1:
        raise ValueError(f"decoders of the shapes {', '.join(str(w.shape) for w in decoders)}: give SAEs of one size")
    masks = [np.ones(len(weights), bool) for weights in decoders] if alive is None else list(alive)
    pairs = itertools.combinations(range(len(decoders)), 2)
    return masks, {(i, j): match(decoders[i], decoders[j], (masks[i], masks[j])) for i, j in pairs}


def _unit(rows: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Return rows with norm 1; rows of zeros stay zero."""
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norm > 0, norm, 1)
