"""The GPU tier: torch and jax must both see the GPU, and jax leaves memory to torch and to commands."""

import os

# Before jax starts: by default it takes three quarters of the card at once.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import pytest
from card import DEVICE, REHEARSED


@pytest.fixture(autouse=True, scope="session")
def both_see_the_gpu() -> None:
    """Fail every test where jax computes on the processor."""
    if REHEARSED:
        return
    platform = jax.default_backend()
    if platform != "gpu":
        pytest.fail(f"torch sees a GPU, but jax {jax.__version__} computes on the {platform}: install its CUDA plugin")


@pytest.fixture(scope="session")
def device() -> str:
    """Torch's name of the device."""
    return DEVICE
