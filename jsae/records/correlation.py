"""How latents go with the channels of the stream they are read from: Pearson correlation and cosine, from sums."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Moments(NamedTuple):
    """Sums over the tokens that count, of the stream x (tokens, d) and the latents a (tokens, f).

    `shift` is near the mean of x: a channel whose mean is far from 0 would else take all digits of its sums.
    """

    tokens: int
    shift: Float[np.ndarray, " d"]
    sum: Float[np.ndarray, " d"]
    """sum x - shift"""
    square: Float[np.ndarray, " d"]
    """sum (x - shift)^2"""
    product: Float[np.ndarray, "f d"]
    """sum a (x - shift)"""


def correlated(
    moments: Moments, sums: Float[np.ndarray, " f"], squares: Float[np.ndarray, " f"]
) -> dict[str, np.ndarray]:
    """The three channels that each latent goes with most: `correlated_channels`, `channel_pearson`, `channel_cosine`.

    Args:
      moments: over all tokens that count.
      sums: of each latent's activations.
      squares: sums of their squares.
    """
    n, shift, total, square, product = (np.asarray(part, np.float64) for part in moments)
    mean = total / n
    spread = (square - n * mean**2).clip(0) ** 0.5
    norm = (square + 2 * shift * total + n * shift**2).clip(0) ** 0.5
    parts = []
    for start in range(0, len(sums), 1024):  # bounds the memory
        part = slice(start, start + 1024)
        a, a2 = sums[part, None], squares[part, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            pearson = (product[part] - a * mean) / ((a2 - a**2 / n).clip(0) ** 0.5 * spread)
            cosine = (product[part] + a * shift) / (a2**0.5 * norm)
        parts.append(_strongest(pearson, cosine))
    names = ("correlated_channels", "channel_pearson", "channel_cosine")
    return {name: np.concatenate(columns) for name, columns in zip(names, zip(*parts, strict=True), strict=True)}


def _strongest(pearson: np.ndarray, cosine: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The three channels of largest correlation, with both numbers; what is constant has none."""
    defined = np.isfinite(pearson) & np.isfinite(cosine)
    ranked = np.argsort(np.where(defined, -pearson, np.inf), axis=1, kind="stable")[:, :3]
    there = np.take_along_axis(defined, ranked, 1)
    short = ((0, 0), (0, 3 - ranked.shape[1]))
    numbers = (np.where(there, np.take_along_axis(x, ranked, 1), np.nan) for x in (pearson, cosine))
    first, second = (np.pad(x, short, constant_values=np.nan) for x in numbers)
    return np.pad(np.where(there, ranked, 0), short), first, second
