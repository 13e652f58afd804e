"""Run the library's Triton kernels on the processor, in Triton's interpreter.

`conftest.py` switches the interpreter on, which must happen before triton is imported. What a kernel does not write is
NaN, or a huge integer, so that a test sees it.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import ml_dtypes
import numpy as np
import torch

from jsae.ops.kernels import launch

_ONE_AT_A_TIME = threading.Lock()  # the interpreter changes triton's modules; devices of a mesh run side by side


@contextmanager
def interpreted() -> Iterator[None]:
    """Run all kernels in the interpreter."""
    launch.replace_runner(_run)
    try:
        yield
    finally:
        launch.replace_runner(None)


def _run(
    kernel: Any,
    inputs: Sequence[jax.Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    warps: int,
    aliases: dict[int, int],
    constants: dict[str, Any],
) -> list[jax.Array]:
    def on_host(*arrays: Any) -> list[np.ndarray]:
        given = [_tensor(np.array(array)) for array in arrays]
        results = [_unwritten(shape) for shape in outputs]
        for place, output in aliases.items():
            results[output] = given[place]
        with _ONE_AT_A_TIME:
            kernel[grid](*given, *results, num_warps=warps, **constants)
        return [_array(tensor, shape.dtype) for tensor, shape in zip(results, outputs, strict=True)]

    return jax.pure_callback(on_host, list(outputs), *inputs, vmap_method="sequential")


def _tensor(array: np.ndarray) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _unwritten(shape: jax.ShapeDtypeStruct) -> torch.Tensor:
    integer = np.issubdtype(shape.dtype, np.integer)
    value = np.full(shape.shape, 2**30 if integer else np.nan, np.int32 if integer else np.float32)
    return _tensor(value.astype(shape.dtype))


def _array(tensor: torch.Tensor, dtype: Any) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy().astype(dtype, copy=False)
