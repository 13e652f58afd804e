"""Settings of torch and jax under which two runs on one GPU end with the same bits.

Numbers differ between runs for two reasons: kernels that add in an order that depends on timing (atomics), and kernels
that are chosen by timing them (autotuning), which may choose another one in every process. Both are switched off, so
that nothing of a run has to be kept for the next one. A CPU needs none of this.
"""

import os
import sys

XLA = ("--xla_gpu_deterministic_ops=true", "--xla_gpu_enable_triton_gemm=false")
"""Flags of XLA: no atomics and no choice by timing; products by cuBLAS, whose own choice depends on sizes only."""

VARIABLES = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "TORCHINDUCTOR_DETERMINISTIC": "1"}
"""Variables of torch: cuBLAS with workspaces of fixed size, and a compiler that chooses nothing by timing."""


def enforce(device: str) -> None:
    """Configure torch and jax to compute the same bits every time. Call before either of them starts its GPU.

    Variables and XLA flags that are set already are kept. An operation of torch that has no deterministic form warns.

    Args:
      device: cpu, where nothing is to do, cuda or cuda:N.
    """
    if device == "cpu":
        return
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    before = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = merged(before, XLA)
    if os.environ["XLA_FLAGS"] != before and _computes_on_gpu():
        print(
            "warning: jax already computes on a GPU in this process, so its part of --deterministic has no effect: "
            "train in a new process, or switch it off (deterministic=False)",
            file=sys.stderr,
            flush=True,
        )
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs a pass over every new tensor


def merged(given: str, wanted: tuple[str, ...]) -> str:
    """Return XLA flags: the given ones, and the wanted ones of which no value is given."""
    names = {word.partition("=")[0].removeprefix("--") for word in given.split()}
    missing = [flag for flag in wanted if flag.partition("=")[0].removeprefix("--") not in names]
    return " ".join([*given.split(), *missing])


def _computes_on_gpu() -> bool:
    """Return whether jax has started a GPU in this process, without starting one."""
    bridge = sys.modules.get("jax._src.xla_bridge")
    return any(name in ("cuda", "gpu") for name in getattr(bridge, "_backends", {}))
