"""Toy superposition: activations that are sparse sums of known directions, the ground truth of the contract suite."""

import numpy as np

D_IN, D_TRUE = 32, 48


def directions(seed: int = 0) -> np.ndarray:
    """Unit rows, (D_TRUE, D_IN): more directions than dimensions."""
    rows = np.random.default_rng(seed).normal(size=(D_TRUE, D_IN))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def activations(n: int, seed: int = 1, active: float = 2.0) -> np.ndarray:
    """n sums of about `active` of the directions, off the origin and of another scale than an SAE likes; float32."""
    rng = np.random.default_rng(seed)
    present = rng.random((n, D_TRUE)) < active / D_TRUE
    strengths = present * rng.uniform(0.5, 1.5, (n, D_TRUE))
    return (7 * (strengths @ directions() + 0.2)).astype(np.float32)


def recovery(W_dec: np.ndarray) -> float:
    """Mean over the true directions of the best cosine that a decoder row, (f, d), has with it."""
    rows = W_dec / np.linalg.norm(W_dec, axis=1, keepdims=True)
    return float((directions() @ rows.T).max(1).mean())
