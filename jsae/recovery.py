"""Scores of how well an SAE recovers the true features of a synthetic world.

The definitions are those of SynthSAEBench (arXiv 2602.14687) and of SAELens's `eval_sae_on_synthetic_data`,
so that figures can be compared with published ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jsae.settings import Json, require
from jsae.synthetic import Samples, SyntheticWorld
from jsae.trained import TrainedSAE, load

BATCH = 4096
"""Rows that are encoded together."""
_LEAST_NORM = 1e-6  # rows with a smaller norm have no shrinkage


@dataclasses.dataclass(frozen=True)
class Scores(Json):
    """Scores of an SAE in a synthetic world.

    The match of a latent is the feature whose vector has the largest |cosine| with its decoder row.
    """

    mcc: float
    """Mean |cosine| of decoder rows with feature vectors, in the one-to-one assignment with the largest sum."""
    f1: float
    """Mean over all latents of the F1 of "the latent is not 0" as a classifier of "its match fires": the harmonic
    mean of a latent's precision and recall, 0 where both are 0."""
    precision: float
    """Mean over latents of TP / (TP + FP); 0 for a latent that never fires."""
    recall: float
    """Mean over latents of TP / (TP + FN); 0 where the match never fires."""
    accuracy: float
    """Mean over latents of (TP + TN) / samples."""
    uniqueness: float
    """Number of features that are the match of some latent, divided by the number of latents."""
    fvu: float
    """Fraction of variance unexplained, E|e|^2 / (E|x|^2 - |E x|^2)."""
    explained_variance: float
    """1 - fvu."""
    shrinkage: float
    """Mean of |x_hat| / |x|."""
    l0: float
    """Latents per sample that are not 0."""
    true_l0: float
    """Features per sample that fire."""
    dead_latents: int
    """Latents that are 0 on all samples."""
    dead_fraction: float
    """The same, divided by the number of latents."""


class Counts(NamedTuple):
    """Sums over samples: arrays of jax for a batch, of numpy in float64 or int64 for all."""

    both: Any
    """Samples on which a latent is not 0 and its match fires, (f,)."""
    fired: Any
    """Samples on which a latent is not 0, (f,)."""
    matched: Any
    """Samples on which its match fires, (f,)."""
    true_fired: Any
    """Features that fire, over all samples."""
    total: Any
    """sum x, (d,)"""
    squared_norm: Any
    squared_error: Any
    ratio: Any
    """sum |x_hat| / |x| over the samples with a norm."""
    with_norm: Any


def scores(
    sae: TrainedSAE | str | Path,
    world: SyntheticWorld,
    num_samples: int = 100_000,
    seed: int = 1,
    samples: Iterable[Samples] | None = None,
) -> Scores:
    """Return the scores of an SAE on samples of a world.

    Args:
      sae: the SAE, or a SAELens directory that `jsae.load` reads.
      world: the world, with the true features.
      num_samples: number of samples.
      seed: of the samples. It must differ from the world's `sample_seed`, on which the SAE may have been trained.
      samples: `heldout(world, num_samples, seed)`, to score several SAEs on the same; None samples them.

    Raises:
      ConfigError: an SAE of another width, a transcoder, a seed of training, or no samples.
      FileNotFoundError, ValueError: the directory cannot be read; see `jsae.load`.
    """
    sae = sae if isinstance(sae, TrainedSAE) else load(sae)
    require(
        not sae.is_transcoder and sae.d_in == world.d_in,
        f"this SAE reads activations of width {sae.d_in} and returns {sae.d_out}: the world has {world.d_in}",
    )
    batches = heldout(world, num_samples, seed) if samples is None else samples
    cosines = cosine_similarities(np.asarray(sae.W_dec), np.asarray(world.features))
    matches, total, n = cosines.argmax(1), None, 0
    for acts, values in batches:
        n += len(acts)
        latents = sae.encode(acts)
        counts = jax.device_get(_counts(acts, values, latents, sae.decode(latents), jnp.asarray(matches)))
        exact = [np.asarray(x, np.float64 if np.issubdtype(x.dtype, np.floating) else np.int64) for x in counts]
        total = Counts(*exact) if total is None else Counts(*(a + b for a, b in zip(total, exact, strict=True)))
    require(n > 0, "samples is empty: give at least one batch")
    return _summary(total, n, mcc(cosines), len(np.unique(matches)) / len(matches))


def heldout(world: SyntheticWorld, num_samples: int = 100_000, seed: int = 1) -> Iterator[Samples]:
    """Yield batches of samples of a world that an SAE was not trained on.

    Args:
      world: the world.
      num_samples: number of samples.
      seed: of the samples. It must differ from the world's `sample_seed`.

    Raises:
      ConfigError: a seed of training, or no samples.
    """
    require(num_samples >= 1, f"num_samples is {num_samples}: it must be at least 1")
    require(
        seed != world.sample_seed,
        f"seed={seed} is that of the world's own samples, which the SAE may have been trained on: give another one",
    )
    return _batches(world.with_samples(seed), num_samples)


def _batches(world: SyntheticWorld, num_samples: int) -> Iterator[Samples]:
    for start in range(0, num_samples, BATCH):
        yield world.sample(start, min(BATCH, num_samples - start))


def cosine_similarities(a: Float[np.ndarray, "f d"], b: Float[np.ndarray, "F d"]) -> Float[np.ndarray, "f F"]:
    """Return |cosine| of each row of `a` with each row of `b`; 0 for a row of zeros."""
    unit_a, unit_b = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-8) for x in (a, b))
    return np.abs(unit_a @ unit_b.T)


def mcc(cosines: Float[np.ndarray, "f F"]) -> float:
    """Return the mean |cosine| of the one-to-one assignment of latents to features with the largest sum.

    The assignment has min(f, F) pairs; it is found by `scipy.optimize.linear_sum_assignment`. Mean correlation
    coefficient of decoder and features: arXiv 2505.20254.
    """
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(cosines, maximize=True)
    return float(cosines[rows, columns].mean())


@jax.jit
def _counts(
    acts: Float[Array, "n d"],
    values: Float[Array, "n F"],
    latents: Float[Array, "n f"],
    decoded: Float[Array, "n d"],
    matches: Int[Array, " f"],
) -> Counts:
    """Return the counts and sums of a batch."""
    active, true = latents != 0, values > 0
    matched = true[:, matches]
    norm = jnp.linalg.norm(acts, axis=1)
    has_norm = norm > _LEAST_NORM
    return Counts(
        both=(active & matched).sum(0),
        fired=active.sum(0),
        matched=matched.sum(0),
        true_fired=true.sum(),
        total=acts.sum(0),
        squared_norm=jnp.square(acts).sum(),
        squared_error=jnp.square(decoded - acts).sum(),
        ratio=jnp.where(has_norm, jnp.linalg.norm(decoded, axis=1) / norm, 0).sum(),
        with_norm=has_norm.sum(),
    )


def _summary(counts: Counts, n: int, mcc: float, uniqueness: float) -> Scores:
    """Return the scores from the sums over n samples."""
    both, fired, matched = counts.both, counts.fired, counts.matched
    precision, recall = _ratio(both, fired), _ratio(both, matched)
    variance = float(counts.squared_norm) / n - float(np.square(counts.total / n).sum())
    fvu = float(counts.squared_error) / n / variance if variance > 0 else float("nan")
    return Scores(
        mcc=mcc,
        f1=float(_ratio(2 * precision * recall, precision + recall).mean()),
        precision=float(precision.mean()),
        recall=float(recall.mean()),
        accuracy=float(1 - (fired + matched - 2 * both).mean() / n),
        uniqueness=uniqueness,
        fvu=fvu,
        explained_variance=1 - fvu,
        shrinkage=float(counts.ratio) / max(int(counts.with_norm), 1),
        l0=float(fired.sum() / n),
        true_l0=float(counts.true_fired / n),
        dead_latents=int((fired == 0).sum()),
        dead_fraction=float((fired == 0).mean()),
    )


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return a / b, and 0 where b is 0."""
    return np.divide(a, b, out=np.zeros(np.shape(a)), where=np.asarray(b) > 0)
