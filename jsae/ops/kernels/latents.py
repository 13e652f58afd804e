"""Elementwise parts of dense architectures by Triton kernels: every array of all latents is read and written once."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jsae.ops.formulas import Formula, Maps, PerLatent
from jsae.ops.kernels import latent_kernels as kernels
from jsae.ops.kernels.launch import Shape, call

_ROWS, _COLUMNS, _WARPS = 8, 256, 8  # a tile of a program
_SPAN = 512  # tokens of a program


class _Form(NamedTuple):
    """Properties of a formula that its kernel needs."""

    number: int
    maps: int
    terms: int
    arrays: int


FORMULAS = {
    "rectified": _Form(0, 1, 2, 0),
    "gated": _Form(1, 2, 2, 3),
    "tanh jump": _Form(2, 1, 2, 2),
    "counted jump": _Form(3, 1, 2, 1),
    "log rectified": _Form(4, 1, 2, 1),
}
"""The formulas that have kernels, by name."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def evaluate(
    formula: Formula, pre: Float[Array, "n f"], bias: Float[Array, " f"], arrays: PerLatent
) -> tuple[Maps, PerLatent]:
    """Return the maps of pre + bias in the dtype of pre, and the sums of the terms, as `formulas.evaluate` says."""
    form, (n, f) = FORMULAS[formula.name], pre.shape
    spans = -(-n // _SPAN)
    one, two, partial = call(
        kernels.forward_kernel,
        pre,
        bias,
        *_padded(arrays, bias),
        outputs=[
            Shape((n, f), pre.dtype),
            Shape((n, f) if form.maps > 1 else (1, 1), pre.dtype),
            Shape((spans, form.terms, f), jnp.float32),
        ],
        grid=(-(-f // _COLUMNS), spans),
        warps=_WARPS,
        N=n,
        F=f,
        FORMULA=form.number,
        MAPS=form.maps,
        TERMS=form.terms,
        SPAN=_SPAN,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
    )
    return (one, two)[: form.maps], tuple(partial.sum(0))


def _forward(formula, pre, bias, arrays):
    return evaluate(formula, pre, bias, arrays), (pre, bias, arrays)


def _backward(formula, saved, gradients):
    (pre, bias, arrays), (maps, sums) = saved, gradients
    form, (n, f) = FORMULAS[formula.name], pre.shape
    spans = -(-n // _SPAN)
    dpre, partial = call(
        kernels.backward_kernel,
        pre,
        bias,
        *_padded(arrays, bias),
        maps[0],
        maps[-1],
        sums[0],
        sums[-1],
        outputs=[Shape((n, f), pre.dtype), Shape((spans, 1 + form.arrays, f), jnp.float32)],
        grid=(-(-f // _COLUMNS), spans),
        warps=_WARPS,
        N=n,
        F=f,
        FORMULA=form.number,
        WIDTH=dataclasses.asdict(formula).get("width", 1.0),
        MAPS=form.maps,
        ARRAYS=form.arrays,
        SPAN=_SPAN,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
    )
    dbias, *darrays = partial.sum(0)
    return dpre, dbias, tuple(darrays)


evaluate.defvjp(_forward, _backward)


def totals(latents: Float[Array, "n f"]) -> tuple[Int[Array, " f"], Float[Array, " f"]]:
    """Return the number of tokens on which each latent is not zero, and the sum of its magnitudes."""
    n, f = latents.shape
    spans = -(-n // _SPAN)
    counts, sums = call(
        kernels.totals_kernel,
        latents,
        outputs=[Shape((spans, f), jnp.int32), Shape((spans, f), jnp.float32)],
        grid=(-(-f // _COLUMNS), spans),
        warps=_WARPS,
        N=n,
        F=f,
        SPAN=_SPAN,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
    )
    return counts.sum(0), sums.sum(0)


def _padded(arrays: PerLatent, bias: Float[Array, " f"]) -> list[Float[Array, " f"]]:
    """Return three arrays: missing ones are filled with the bias, which the kernel ignores."""
    return [*arrays, *[bias] * (3 - len(arrays))]
