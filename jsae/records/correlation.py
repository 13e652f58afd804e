"""Correlation of latents with the channels of the residual stream: Pearson correlation and cosine, from sums."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Moments(NamedTuple):
    """Sums over the counted tokens, of the residual stream x (tokens, d) and the latents a (tokens, f).

    `shift` is close to the mean of x: otherwise a channel whose mean is far from 0 would lose precision in its sums.
    """

    tokens: int
    shift: Float[np.ndarray, " d"]
    sum: Float[np.ndarray, " d"]
    """sum x - shift"""
    square: Float[np.ndarray, " d"]
    """sum (x - shift)^2"""
    product: Float[np.ndarray, "f d"]
    """sum a (x - shift)"""


def correlations(
    moments: Moments, sums: Float[np.ndarray, " f"], squares: Float[np.ndarray, " f"]
) -> dict[str, np.ndarray]:
    """Return the three channels with the largest correlation to each latent.

    Args:
      moments: sums over all counted tokens.
      sums: sums of each latent's activations, (f,).
      squares: sums of their squares, (f,).

    Returns:
      `correlated_channels`, `channel_pearson` and `channel_cosine`, (f, 3) each.
    """
    n, shift, total, square, product = (np.asarray(part, np.float64) for part in moments)
    mean = total / n
    spread = (square - n * mean**2).clip(0) ** 0.5
    norm = (square + 2 * shift * total + n * shift**2).clip(0) ** 0.5
    parts = []
    for start in range(0, len(sums), 1024):  # in parts, to limit memory
        part = slice(start, start + 1024)
        a, a2 = sums[part, None], squares[part, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            pearson = (product[part] - a * mean) / ((a2 - a**2 / n).clip(0) ** 0.5 * spread)
            cosine = (product[part] + a * shift) / (a2**0.5 * norm)
        parts.append(_strongest(pearson, cosine))
    names = ("correlated_channels", "channel_pearson", "channel_cosine")
    return {name: np.concatenate(columns) for name, columns in zip(names, zip(*parts, strict=True), strict=True)}


def _strongest(pearson: np.ndarray, cosine: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the three channels of largest correlation, with both coefficients; 0 and NaN where they are undefined."""
    defined = np.isfinite(pearson) & np.isfinite(cosine)
    ranked = np.argsort(np.where(defined, -pearson, np.inf), axis=1, kind="stable")[:, :3]
    valid = np.take_along_axis(defined, ranked, 1)
    padding = ((0, 0), (0, 3 - ranked.shape[1]))
    values = (np.where(valid, np.take_along_axis(x, ranked, 1), np.nan) for x in (pearson, cosine))
    first, second = (np.pad(x, padding, constant_values=np.nan) for x in values)
    return np.pad(np.where(valid, ranked, 0), padding), first, second
