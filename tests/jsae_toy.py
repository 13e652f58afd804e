"""Small activations and settings for tests of the library."""

from typing import Any

import numpy as np

import jsae
from jsae.testing import toy

D = toy.D_IN
TOPK = jsae.TopK.Config(D, 64, k=3)


def acts_of(rows: int, width: int = D, seed: int = 0) -> np.ndarray:
    """Activations of the toy world."""
    return toy.activations(rows, width, seed)


def config(**changes: Any) -> jsae.TrainConfig:
    """A short run."""
    settings = {"num_activations": 20_000, "batch_size": 100, "learning_rate": 4e-3, "dead_after": 20_000}
    return jsae.TrainConfig(**settings | changes)
