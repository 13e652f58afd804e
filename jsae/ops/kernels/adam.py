"""Adam of a matrix with unit rows by a Triton kernel."""

import jax.numpy as jnp
import triton
from jaxtyping import Array, Float

from jsae.ops.interface import AdamScalars, AdamSettings, Moments
from jsae.ops.kernels import adam_kernels as kernels
from jsae.ops.kernels import launch
from jsae.ops.kernels.launch import Shape, call

WIDEST = 2**14
"""Columns of a row that one program holds."""


def adam_of_unit_rows(
    scalars: AdamScalars, settings: AdamSettings, g: Float[Array, "f d"], moments: Moments, warps: int | None = None
) -> Moments:
    """Return weights and moments after an update, as `Ops.adam` says, overwriting them where they stand."""
    d = g.shape[1]
    block = triton.next_power_of_2(d)
    return Moments(
        *call(
            kernels.adam_kernel_with_outputs if launch.outputs_follow_aliases() else kernels.adam_kernel,
            *moments,
            g,
            jnp.stack(scalars).astype(jnp.float32),
            outputs=[Shape(g.shape, jnp.float32)] * 3,
            grid=(len(g),),
            warps=warps or min(max(block // 512, 1), 16),
            aliases={0: 0, 1: 1, 2: 2},
            D=d,
            BETA1=settings.beta1,
            BETA2=settings.beta2,
            EPSILON=settings.epsilon,
            RATE=settings.rate_factor,
            BLOCK=block,
        )
    )
