"""One device for torch and jax, configured before either of them starts it."""

import os
import sys

from bridge import accelerators
from jsae.settings import require

_USABLE = 0.95
"""The fraction of a GPU's memory that torch and jax divide; the rest is for what drivers and libraries allocate."""
_MARGIN, _LEAST_MARGIN = 1.5, 2 * 2**30
"""Jax has its predicted need times the first, and at least the second more, for autotuning and fragments."""


def share(device: str, jax_memory_fraction: float) -> str:
    """Configure torch and jax to use one device together; return torch's name for it, cpu or cuda.

    Args:
      device: cpu, cuda or cuda:N.
      jax_memory_fraction: jax's fraction of a GPU's memory; torch has the rest.

    Raises:
      ConfigError: torch or jax has no such device, or jax already computes on another one.
    """
    kind = open_torch(device)
    open_jax(kind, jax_memory_fraction)
    return kind


def open_torch(device: str) -> str:
    """Configure torch and jax to use one device together, before jax starts; return torch's name for it, cpu or cuda.

    On a CPU each may use all cores, but torch's idle threads sleep: by default they spin on cores that jax needs. Torch
    reads this setting when it is imported. On a GPU `open_jax` must follow before jax is used.

    Raises:
      ConfigError: torch has no such device, or jax already computes on another one.
    """
    accelerators.check_name(device)
    kind, _, number = device.partition(":")
    if kind == "cpu":
        _restrict_jax(kind)
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        return kind
    if number:  # the only GPU that torch and jax will see
        os.environ["CUDA_VISIBLE_DEVICES"] = _visible(device, int(number))
    accelerators.require_torch(kind, called=device)
    return kind


def open_jax(kind: str, jax_memory_fraction: float) -> None:
    """Start jax with its fraction of a GPU's memory, and limit torch to the rest; on a CPU there is nothing to do.

    Processes of one run have joined before (`bridge.launch`).

    Args:
      kind: cpu or cuda, as `open_torch` returned it.
      jax_memory_fraction: jax's fraction of a GPU's memory, which it reads when it first uses the GPU.

    Raises:
      ConfigError: jax has no such device.
    """
    if kind == "cpu":
        return
    import torch

    os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{jax_memory_fraction:.4f}"
    torch.cuda.set_per_process_memory_fraction(max(_USABLE - jax_memory_fraction, 0.05))
    jax_alone(kind)


def jax_fraction(card: int, free: int, jax_need: int, torch_need: int) -> float:
    """Return the fraction of a GPU's memory for jax: its need with a margin, but no more than torch can spare.

    Args:
      card: bytes of the GPU.
      free: bytes of it that are free, with the model on it.
      jax_need: bytes that the SAEs and their steps are predicted to need.
      torch_need: bytes that torch is predicted to need beside the model.
    """
    wanted = max(_MARGIN * jax_need, jax_need + _LEAST_MARGIN)
    most = free - (1 - _USABLE) * card - torch_need
    return min(max(min(wanted, most) / card, 0.02), _USABLE - 0.05)


def _visible(device: str, number: int) -> str:
    """Return the value of CUDA_VISIBLE_DEVICES for one of the GPUs that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return str(number)
    names = [name.strip() for name in visible.split(",") if name.strip()]
    require(
        number < len(names), f"--device={device}: CUDA_VISIBLE_DEVICES={visible} leaves {len(names)} to this process"
    )
    return names[number]


def jax_alone(device: str) -> None:
    """Restrict jax to a device, cpu or cuda (and the CPU beside it).

    Raises:
      ConfigError: jax has no such device or a plugin for another CUDA than torch's, or already computes on another one.
    """
    torch = sys.modules.get("torch")
    torch_cuda = None if torch is None else torch.version.cuda
    if device != "cpu":
        accelerators.check_plugins(f"--device={device}", accelerators.jax_plugins(), torch_cuda)
    _restrict_jax("cpu" if device == "cpu" else f"{device},cpu")
    import jax

    try:
        jax.devices(device)
    except (RuntimeError, AssertionError) as error:  # the latter where there is no backend at all
        why = accelerators.why_jax_has_no_gpu(accelerators.jax_plugins(), jax.__version__, torch_cuda, str(error))
        require(False, f"--device={device}: jax has no GPU here ({why}): docs/guides/gpu.md says what to install")


def _restrict_jax(platforms: str) -> None:
    """Restrict jax to some platforms, even if it is imported already, as long as it has started no other device.

    Raises:
      ConfigError: jax has started another device.
    """
    os.environ["JAX_PLATFORMS"] = platforms
    if "jax" in sys.modules:
        jax = sys.modules["jax"]
        jax.config.update("jax_platforms", platforms)
        require(
            platforms != "cpu" or jax.default_backend() == "cpu",
            f"--device=cpu: jax already computes on a {jax.default_backend()} in this process: train in a new one, or "
            "set JAX_PLATFORMS=cpu before jax is used",
        )


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
