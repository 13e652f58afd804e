"""A toy world in superposition: activations that are sparse sums of known directions."""

from typing import NamedTuple

import numpy as np

D_IN, D_OUT, D_TRUE = 32, 24, 48


def directions(d: int = D_IN, seed: int = 0) -> np.ndarray:
    """Return unit rows, (D_TRUE, d): more directions than dimensions."""
    rows = np.random.default_rng(seed).normal(size=(D_TRUE, d))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def strengths(n: int, seed: int = 1, active: float = 2.0) -> np.ndarray:
    """Return the strengths of directions in n tokens, (n, D_TRUE): about `active` per token in 0.5 to 1.5, others 0."""
    rng = np.random.default_rng(seed)
    present = rng.random((n, D_TRUE)) < active / D_TRUE
    return present * rng.uniform(0.5, 1.5, (n, D_TRUE))


def amplitude(seed: int) -> float:
    """Return the scale of a layer's activations: far from 1, and different for every layer."""
    return 7.0 * (1 + seed)


def activations(n: int, d: int = D_IN, seed: int = 0) -> np.ndarray:
    """Return n sums of directions with an offset, (n, d) float32.

    Each seed is a layer: the same strengths along other directions.
    """
    return (amplitude(seed) * (strengths(n) @ directions(d, seed) + 0.2)).astype(np.float32)


class World(NamedTuple):
    """Activations, and the directions that an SAE should find in them."""

    acts: tuple[np.ndarray, ...]
    truth: np.ndarray
    """What a direction at strength 1 adds to the target, (D_TRUE, o): the decoder should find it."""
    read: np.ndarray
    """What it adds to the input, (D_TRUE, d)."""

    def beside(self, W_skip: np.ndarray) -> np.ndarray:
        """Return the part of `truth` that the skip path `W_skip`, (o, d), leaves to the latents."""
        return self.truth - self.read @ W_skip.T


def world(n: int, d_out: int | None, layers: int) -> World:
    """Return activations of one layer; of several for a crosscoder; or a transcoder's input and target.

    Args:
      n: number of tokens.
      d_out: width of a transcoder's target; None for everything else.
      layers: number of layers.
    """
    read = np.concatenate([amplitude(s) * directions(seed=s) for s in range(layers)], axis=1)
    acts = tuple(activations(n, seed=s) for s in range(layers))
    if d_out is None:
        return World(acts, read, read)
    return World((*acts, activations(n, d_out, seed=1)), amplitude(1) * directions(d_out, seed=1), read)


def recovery(W_dec: np.ndarray, truth: np.ndarray, signed: bool = True) -> float:
    """Return the mean, over the true directions, of the largest cosine with a decoder row.

    Args:
      W_dec: decoder, (f, o).
      truth: true directions, (D_TRUE, o).
      signed: False ignores the sign, for latents that may be negative.
    """
    rows = W_dec / np.linalg.norm(W_dec, axis=1, keepdims=True)
    truth = truth / np.linalg.norm(truth, axis=1, keepdims=True)
    cosines = truth @ rows.T
    return float((cosines if signed else np.abs(cosines)).max(1).mean())
