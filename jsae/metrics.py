"""What is counted: sums that add across batches, divided once, at the end.

Written for any array library with numpy's names (jax inside the training step, torch when an exported SAE is
evaluated), so that both count the same thing by the same lines.
"""

import math
from typing import Any, NamedTuple

import numpy as np

BINS_PER_DECADE = 4
"""Of a histogram of densities."""


class Sums(NamedTuple):
    """Sums over tokens. The error is e = x_hat - x; all in the activations' own units."""

    tokens: Any
    loss: Any
    """Loss times tokens."""
    squared_error: Any
    """sum |e|^2"""
    explained_legacy: Any
    """sum 1 - |e|^2 / |x - mean of the batch's x|^2: the variance explained as it was counted of old"""
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
    """number of latents other than zero"""
    l1: Any
    """sum of their magnitudes"""
    fired: Any
    """tokens on which each latent is not zero, (f,)"""
    nonfinite: Any
    """activations (numbers) that are NaN or infinite"""


def of(x: Any, error: Any, values: Any, fired: Any, *, loss: Any, nonfinite: Any, mean: Any = None) -> Sums:
    """The sums of one batch, or of a part of it.

    Args:
      x: activations, (n, d).
      error: what their reconstruction x_hat has too much of, x_hat - x, (n, d).
      values: latents that are not zero everywhere: (n, k) of sparse codes or (n, f).
      fired: tokens per latent with a value other than zero, (f,).
      loss: the batch's mean loss.
      nonfinite: how many numbers of x are not finite.
      mean: of the whole batch's x, (d,); None where this is the whole.
    """
    squares = _dots(error, error)
    total = x.sum(0)
    centred = x - (total / max(x.shape[0], 1) if mean is None else mean)
    spread = _dots(centred, centred)
    square, along = _dots(x, x), _dots(x, error)
    inner, square_hat = square + along, square + 2 * along + squares
    norm, norm_hat = square**0.5, (square_hat * (square_hat > 0)) ** 0.5  # rounding may leave less than nothing
    tiny = 1e-30  # a token of norm zero has cosine 0, not NaN
    return Sums(
        tokens=((norm == norm) | (norm != norm)).sum(),  # all of them, whatever their numbers are
        loss=loss * x.shape[0],
        squared_error=squares.sum(),
        # A batch without variance has none to explain.
        explained_legacy=((spread > 0) * (1 - squares / (spread + (spread == 0)))).sum(),
        squared_norm=square.sum(),
        squared_norm_hat=square_hat.sum(),
        inner=inner.sum(),
        cosine=(inner / (norm * norm_hat + tiny)).sum(),
        norm_ratio=(norm_hat / (norm + tiny)).sum(),
        total=total,
        l0=(values != 0).sum(),
        l1=abs(values).sum(),
        fired=fired,
        nonfinite=nonfinite,
    )


def _dots(a: Any, b: Any) -> Any:
    """Row by row a . b."""
    return (a * b).sum(-1)


def add(a: Sums, b: Sums) -> Sums:
    """The sums of both batches together."""
    return Sums(*(p + q for p, q in zip(a, b, strict=True)))


def summarize(sums: Sums) -> dict[str, float]:
    """The metrics of everything that was summed, in float64.

    `fvu` is E|e|^2 / (E|x|^2 - |E x|^2) over the whole set, `explained_variance` 1 minus it;
    `explained_variance_legacy` the mean over tokens of 1 - |e|^2 / |x - mean of the batch|^2, which depends on how the
    set was cut into batches; `mse` E|e|^2 (summed over d); `l0`, `l1` per token; `cosine`, `l2_ratio` token means;
    `relative_reconstruction_bias` E|x_hat|^2 / E[x . x_hat] (Rajamanoharan et al. 2024, arXiv 2404.16014, gamma);
    `dead_fraction` the share of latents that never fired in `tokens` tokens. What is not defined is NaN.

    Raises:
      ValueError: nothing was summed.
    """
    s = Sums(*(np.asarray(v, np.float64) for v in sums))
    n = float(s.tokens)
    if not n > 0:
        raise ValueError(f"no tokens were summed ({n}): metrics of an empty set do not exist")
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
    """The share of tokens on which each latent fired, (f,)."""
    return np.asarray(sums.fired, np.float64) / float(np.asarray(sums.tokens))


def histogram(density: np.ndarray, tokens: float) -> dict[str, list[float] | list[int] | int]:
    """Latents by log10 of their density, (f,), in quarters of a decade from one firing in `tokens` up to 1.

    Returns:
      `log10_edges`, one more than `counts`; `never`: latents that did not fire and are in no bin.
    """
    low = math.floor(math.log10(1 / max(tokens, 1)))
    edges = np.linspace(low, 0, BINS_PER_DECADE * max(-low, 1) + 1)
    alive = density[density > 0]
    counts, _ = np.histogram(np.log10(alive), edges)
    return {"log10_edges": edges.tolist(), "counts": counts.tolist(), "never": int((density <= 0).sum())}
