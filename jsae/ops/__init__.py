"""Operations of a training step: one interface, a reference, and an implementation for every kind of device."""

import functools
import importlib
import re
from collections.abc import Mapping

import jax

from jsae.ops.cpu import Cpu
from jsae.ops.gpu import Gpu
from jsae.ops.interface import AdamScalars, AdamSettings, Moments, Ops
from jsae.ops.kernels.launch import jax_triton
from jsae.ops.products import MatmulDtype
from jsae.ops.reference import Reference
from jsae.ops.sharded import Sharded
from jsae.ops.types import Codes, Input, Latents, Select
from jsae.ops.xla import PLAIN, Xla

__all__ = [
    "IMPLEMENTATIONS",
    "PLAIN",
    "AdamScalars",
    "AdamSettings",
    "Codes",
    "Cpu",
    "Gpu",
    "Input",
    "Latents",
    "MatmulDtype",
    "Moments",
    "Ops",
    "Reference",
    "Select",
    "Sharded",
    "Xla",
    "choose",
    "choose_with_reason",
]

IMPLEMENTATIONS: Mapping[str, Ops] = {
    "cpu": Cpu(),
    "gpu": Gpu(),
    "xla": Xla(),
    "xla-dense": Xla(decoding="dense"),
    "plain": PLAIN,
    "reference": Reference(),
}
"""Implementations by the name that benchmarks give them."""


def choose(matmul_dtype: MatmulDtype = "float32", platform: str | None = None) -> Ops:
    """Return the implementation for a platform, "cpu" or "gpu"; None is the platform of jax's default device."""
    return choose_with_reason(matmul_dtype, platform)[0]


def choose_with_reason(matmul_dtype: MatmulDtype = "float32", platform: str | None = None) -> tuple[Ops, str]:
    """Return the implementation for a platform, and why it was chosen, in a few words."""
    platform = jax.default_backend() if platform is None else platform
    if platform == "cpu":
        return Cpu(matmul_dtype), "the device is a processor"
    obstacle = why_no_kernels()
    if obstacle is None:
        return Gpu(matmul_dtype), "jax-triton and triton run on this GPU"
    return Xla(matmul_dtype), f"no Triton kernels: {obstacle}"


@functools.cache
def why_no_kernels() -> str | None:
    """Return why Triton kernels cannot run on jax's GPU; None if they can."""
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", ""))
    if not re.fullmatch(r"\d+\.\d+", capability):  # other GPUs have none, or a name
        return f"the kernels are for NVIDIA GPUs, and the device is {device.device_kind}"
    if float(capability) < 8:
        return f"compute capability {capability} is below 8.0"
    for module, imported in {"triton": lambda: importlib.import_module("triton"), "jax_triton": jax_triton}.items():
        try:
            imported()
        except Exception as error:  # a broken installation must not stop a run that can do without
            return f"{module} cannot be imported ({type(error).__name__}: {error}); install the extra cuda"
    return None
