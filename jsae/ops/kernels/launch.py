"""Start a Triton kernel from a jax program."""

import functools
import importlib
import inspect
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jaxtyping import Array

Shape = jax.ShapeDtypeStruct


def call(
    kernel: Any,
    *inputs: Array,
    outputs: Sequence[Shape],
    grid: tuple[int, ...],
    warps: int,
    aliases: Mapping[int, int] | None = None,
    **constants: Any,
) -> Sequence[Array]:
    """Run a kernel whose parameters are the inputs, the outputs and the constants, in this order.

    Args:
      kernel: a function compiled by `triton.jit`.
      inputs: arrays.
      outputs: shapes and dtypes of the results. What the kernel does not write is undefined.
      grid: number of programs along up to three axes.
      warps: warps of a program.
      aliases: for inputs that the kernel overwrites, by their place: the place of the output that they become. Such an
        output has a pointer of its own, with the same address, unless `outputs_follow_aliases()` is false.
      constants: values of the kernel's `tl.constexpr` parameters.
    """
    return _runner()(kernel, inputs, tuple(outputs), grid, warps, dict(aliases or {}), constants)


def outputs_follow_aliases() -> bool:
    """Return whether an output that overwrites an input is also passed as a parameter: jax-triton before 0.4."""
    return "out_type" not in _parameters()


def replace_runner(runner: Callable[..., Sequence[Array]] | None) -> None:
    """Run kernels with another function, such as one that calls Triton's interpreter; None is jax-triton again.

    The function gets kernel, inputs, outputs, grid, warps, aliases and constants, and returns the outputs.
    """
    global _replacement
    _replacement = runner


_replacement: Callable[..., Sequence[Array]] | None = None


def _runner() -> Callable[..., Sequence[Array]]:
    return _with_jax_triton if _replacement is None else _replacement


def jax_triton() -> Any:
    """Return the module jax_triton, and undo its change of TRITON_CACHE_DIR, which torch's compiler reads.

    Raises:
      ImportError: it is not installed, or does not fit the installed jax or triton.
    """
    before = os.environ.get("TRITON_CACHE_DIR")
    try:
        return importlib.import_module("jax_triton")
    finally:
        if before is None:
            os.environ.pop("TRITON_CACHE_DIR", None)
        else:
            os.environ["TRITON_CACHE_DIR"] = before


@functools.cache
def _parameters() -> frozenset[str]:
    return frozenset(inspect.signature(jax_triton().triton_call).parameters)


def _with_jax_triton(
    kernel: Any,
    inputs: Sequence[Array],
    outputs: Sequence[Shape],
    grid: tuple[int, ...],
    warps: int,
    aliases: dict[int, int],
    constants: dict[str, Any],
) -> Sequence[Array]:
    shapes = "out_shape" if outputs_follow_aliases() else "out_type"
    with warnings.catch_warnings():
        # jax-triton 0.4 prefers references to aliases; 0.3 has no references.
        warnings.filterwarnings("ignore", "input_output_aliases is deprecated", DeprecationWarning)
        return jax_triton().triton_call(
            *inputs,
            kernel=kernel,
            grid=grid,
            num_warps=warps,
            input_output_aliases=aliases,
            **{shapes: list(outputs)},
            **constants,
        )
