"""A toy world in superposition: activations that are sparse sums of known directions."""

from typing import NamedTuple

import numpy as np

D_IN, D_OUT, D_TRUE = 32, 24, 48


def directions(d: int = D_IN, seed: int = 0) -> np.ndarray:
    """Unit rows, (D_TRUE, d): more directions than dimensions."""
    rows = np.random.default_rng(seed).normal(size=(D_TRUE, d))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def strengths(n: int, seed: int = 1, active: float = 2.0) -> np.ndarray:
    """How strongly each direction is present in n tokens: about `active` of them are, between 0.5 and 1.5."""
    rng = np.random.default_rng(seed)
    present = rng.random((n, D_TRUE)) < active / D_TRUE
    return present * rng.uniform(0.5, 1.5, (n, D_TRUE))


def amplitude(seed: int) -> float:
    """Of another scale than an SAE likes, and another one for every layer."""
    return 7.0 * (1 + seed)


def activations(n: int, d: int = D_IN, seed: int = 0) -> np.ndarray:
    """N sums of directions, off the origin, float32.

    Another seed is another layer: the same strengths along other directions.
    """
    return (amplitude(seed) * (strengths(n) @ directions(d, seed) + 0.2)).astype(np.float32)


class World(NamedTuple):
    """What an SAE learns from, and what it should find."""

    acts: tuple[np.ndarray, ...]
    truth: np.ndarray
    """What a direction at strength 1 adds to what is to be made, (D_TRUE, o): the decoder should find it."""
    read: np.ndarray
    """What it adds to what is read, (D_TRUE, d)."""

    def beside(self, W_skip: np.ndarray) -> np.ndarray:
        """What is left of `truth` to be found where `W_skip`, (o, d), makes the rest of it."""
        return self.truth - self.read @ W_skip.T


def world(n: int, d_out: int | None, layers: int) -> World:
    """Activations of one layer; or of several, one after the other for a crosscoder; or of a transcoder's two ends."""
    read = np.concatenate([amplitude(s) * directions(seed=s) for s in range(layers)], axis=1)
    acts = tuple(activations(n, seed=s) for s in range(layers))
    if d_out is None:
        return World(acts, read, read)
    return World((*acts, activations(n, d_out, seed=1)), amplitude(1) * directions(d_out, seed=1), read)


def recovery(W_dec: np.ndarray, truth: np.ndarray, signed: bool = True) -> float:
    """Mean over the true directions of the best cosine that a decoder row, (f, o), has with it.

    Latents that may be negative are as good with a row that points the other way: then the sign does not count.
    """
    rows = W_dec / np.linalg.norm(W_dec, axis=1, keepdims=True)
    truth = truth / np.linalg.norm(truth, axis=1, keepdims=True)
    cosines = truth @ rows.T
    return float((cosines if signed else np.abs(cosines)).max(1).mean())
