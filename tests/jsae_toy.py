"""Small activations and settings for tests of the library."""

from typing import Any

import numpy as np

import jsae
from jsae.testing import toy

D = toy.D_IN
TOPK = jsae.TopK.Config(D, 64, k=3)


def acts_of(rows: int, width: int = D, seed: int = 0) -> np.ndarray:
    """Return activations of the toy world, (rows, width)."""
    return toy.activations(rows, width, seed)


def config(**changes: Any) -> jsae.TrainConfig:
    """Return the settings of a short run."""
    settings = {"num_activations": 20_000, "batch_size": 100, "learning_rate": 4e-3, "dead_after": 20_000}
    return jsae.TrainConfig(**settings | changes)
