"""Operations of a training step: one interface, a reference, and an implementation for every kind of device."""

from collections.abc import Mapping

import jax

from jsae.ops.cpu import Cpu
from jsae.ops.interface import AdamScalars, AdamSettings, Moments, Ops
from jsae.ops.products import MatmulDtype
from jsae.ops.reference import Reference
from jsae.ops.types import Codes, Input, Latents, Select
from jsae.ops.xla import PLAIN, Xla

__all__ = [
    "IMPLEMENTATIONS",
    "PLAIN",
    "AdamScalars",
    "AdamSettings",
    "Codes",
    "Cpu",
    "Input",
    "Latents",
    "MatmulDtype",
    "Moments",
    "Ops",
    "Reference",
    "Select",
    "Xla",
    "choose",
]

IMPLEMENTATIONS: Mapping[str, Ops] = {
    "cpu": Cpu(),
    "xla": Xla(),
    "xla-dense": Xla(decoding="dense"),
    "plain": PLAIN,
    "reference": Reference(),
}
"""Implementations by the name that benchmarks give them."""


def choose(matmul_dtype: MatmulDtype = "float32", platform: str | None = None) -> Ops:
    """Return the implementation for a platform, "cpu" or "gpu"; None is the platform of jax's default device."""
    platform = jax.default_backend() if platform is None else platform
    return Cpu(matmul_dtype) if platform == "cpu" else Xla(matmul_dtype)
