"""Metrics of SAEs: sums that add across batches and are divided once, at the end.

Written for any array library with numpy's function names (jax inside the training step, torch in the evaluation of an
exported SAE), so that training and evaluation compute metrics with the same code.
"""

import math
from typing import Any, NamedTuple

import numpy as np

BINS_PER_DECADE = 4
"""Bins per decade of a density histogram."""


class Sums(NamedTuple):
    """Sums over tokens, in the units of the activations. The error is e = x_hat - x."""

    tokens: Any
    loss: Any
    """Loss times tokens."""
    squared_error: Any
    """sum |e|^2"""
    explained_legacy: Any
    """sum 1 - |e|^2 / |x - mean of the batch's x|^2: explained variance as older SAE libraries define it"""
    squared_norm: Any
    """sum |x|^2"""
    squared_norm_hat: Any
    """sum |x_hat|^2"""
    inner: Any
    """sum x . x_hat"""
    cosine: Any
    """sum cos(x, x_hat)"""
    norm_ratio: Any
    """sum |x_hat| / |x|"""
    total: Any
    """sum x, (d,)"""
    l0: Any
    """number of latents that are not zero"""
    l1: Any
    """sum of their magnitudes"""
    fired: Any
    """tokens on which each latent is not zero, (f,)"""
    nonfinite: Any
    """number of activation entries that are NaN or infinite"""


def batch_sums(
    x: Any, error: Any, *, l0: Any, l1: Any, fired: Any, loss: Any, nonfinite: Any, mean: Any = None
) -> Sums:
    """Return the sums of a batch, or of a part of one.

    Args:
      x: activations, (n, d).
      error: error of their reconstruction, x_hat - x, (n, d).
      l0: number of latents that are not zero.
      l1: sum of their magnitudes.
      fired: number of tokens on which each latent is not zero, (f,).
      loss: mean loss of the batch.
      nonfinite: number of entries of x that are not finite.
      mean: mean of x over the whole batch, (d,); None if x is the whole batch.
    """
    squares = _dots(error, error)
    total = x.sum(0)
    centred = x - (total / max(x.shape[0], 1) if mean is None else mean)
    spread = _dots(centred, centred)
    square, along = _dots(x, x), _dots(x, error)
    inner, square_hat = square + along, square + 2 * along + squares
    norm, norm_hat = square**0.5, (square_hat * (square_hat > 0)) ** 0.5  # rounding may make the square negative
    tiny = 1e-30  # a token of norm zero has cosine 0, not NaN
    return Sums(
        tokens=((norm == norm) | (norm != norm)).sum(),  # counts all tokens, including NaN
        loss=loss * x.shape[0],
        squared_error=squares.sum(),
        # Tokens without variance are left out.
        explained_legacy=((spread > 0) * (1 - squares / (spread + (spread == 0)))).sum(),
        squared_norm=square.sum(),
        squared_norm_hat=square_hat.sum(),
        inner=inner.sum(),
        cosine=(inner / (norm * norm_hat + tiny)).sum(),
        norm_ratio=(norm_hat / (norm + tiny)).sum(),
        total=total,
        l0=l0,
        l1=l1,
        fired=fired,
        nonfinite=nonfinite,
    )


def _dots(a: Any, b: Any) -> Any:
    """Return the dot product a . b of each row."""
    return (a * b).sum(-1)


def add(a: Sums, b: Sums) -> Sums:
    """Return the sums of both batches together."""
    return Sums(*(p + q for p, q in zip(a, b, strict=True)))


def summarize(sums: Sums) -> dict[str, float]:
    """Return the metrics of all summed tokens, computed in float64. Undefined metrics are NaN.

    `fvu`: fraction of variance unexplained, E|e|^2 / (E|x|^2 - |E x|^2) over all tokens.
    `explained_variance`: 1 - fvu.
    `explained_variance_legacy`: mean over tokens of 1 - |e|^2 / |x - mean of the batch|^2; depends on the batch size.
    `mse`: E|e|^2, summed over d.
    `l0`, `l1`: per token.
    `cosine`, `l2_ratio`: means over tokens.
    `relative_reconstruction_bias`: E|x_hat|^2 / E[x . x_hat], gamma of Rajamanoharan et al. 2024 (arXiv 2404.16014).
    `dead_fraction`: share of latents that did not fire on any of the `tokens` tokens.

    Raises:
      ValueError: the sums are of no token.
    """
    s = Sums(*(np.asarray(v, np.float64) for v in sums))
    n = float(s.tokens)
    if not n > 0:
        raise ValueError(f"no tokens were summed ({n:g}): metrics need at least one")
    variance = float(s.squared_norm) / n - float(np.square(s.total / n).sum())
    fvu = float(s.squared_error) / n / variance if variance > 0 else float("nan")
    inner = float(s.inner)
    return {
        "tokens": n,
        "loss": float(s.loss) / n,
        "fvu": fvu,
        "explained_variance": 1 - fvu,
        "explained_variance_legacy": float(s.explained_legacy) / n,
        "mse": float(s.squared_error) / n,
        "l0": float(s.l0) / n,
        "l1": float(s.l1) / n,
        "cosine": float(s.cosine) / n,
        "l2_ratio": float(s.norm_ratio) / n,
        "relative_reconstruction_bias": float(s.squared_norm_hat) / inner if inner else float("nan"),
        "dead_fraction": float((s.fired == 0).mean()),
    }


def density(sums: Sums) -> np.ndarray:
    """Return the share of tokens on which each latent fired, (f,)."""
    return np.asarray(sums.fired, np.float64) / float(np.asarray(sums.tokens))


def density_histogram(sums: Sums) -> dict[str, list[float] | list[int] | int]:
    """Return the `histogram` of the densities of all latents over the tokens of some sums."""
    return histogram(density(sums), float(np.asarray(sums.tokens)))


def histogram(density: np.ndarray, tokens: float) -> dict[str, list[float] | list[int] | int]:
    """Return a histogram of log10 of the density of latents.

    Args:
      density: share of tokens on which each latent fired, (f,).
      tokens: number of tokens; the bins are quarters of a decade from a density of 1 / tokens to 1.

    Returns:
      `log10_edges`, one more than `counts`; `counts`; `never`, the number of latents that did not fire.
    """
    low = math.floor(math.log10(1 / max(tokens, 1)))
    edges = np.linspace(low, 0, BINS_PER_DECADE * max(-low, 1) + 1)
    alive = density[density > 0]
    counts, _ = np.histogram(np.log10(alive), edges)
    return {"log10_edges": edges.tolist(), "counts": counts.tolist(), "never": int((density <= 0).sum())}
