"""Selection by Triton kernels."""

import math
from typing import Any

import jax.numpy as jnp
import triton
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jsae.ops.kernels import selection_kernels as kernels
from jsae.ops.kernels.launch import Shape, call
from jsae.ops.types import Codes

_LARGEST = 2**14  # numbers that one program holds
_BLOCK = 4096  # numbers of a batch that one program compacts
_COUNTED, _TURNS = 1024, 8  # numbers that one warp counts at once, and how often


def fits(f: int, k: int) -> bool:
    """Return whether `top_k` can select k of f latents: what one program holds is limited."""
    group = group_size(f, k)
    return max(triton.next_power_of_2(-(-f // group)), triton.next_power_of_2(k) * group) <= _LARGEST


def group_size(f: int, k: int) -> int:
    """Return the power of two below sqrt(f / k), at most 32: neighbours among which the largest is searched first."""
    return 2 ** min(int(math.log2(math.sqrt(f / k))), 5)


def top_k(
    pre: Float[Array, "n f"],
    k: int,
    bias: Float[Array, " f"] | None,
    *,
    magnitudes: bool = False,
    group: int | None = None,
    block: int = 256,
    warps: int | None = None,
) -> Codes:
    """Return the k largest of every row of pre (+ bias), or those of the largest magnitude, in no order.

    Args:
      pre: float32 or bfloat16.
      k: codes per row.
      bias: added to every row; None adds nothing.
      magnitudes: whether |pre| is compared.
      group: latents in a group, a power of two.
      block: groups that are read at once, a power of two.
      warps: warps of a program.
    """
    n, f = pre.shape
    group = group or group_size(f, k)
    groups, slots = -(-f // group), triton.next_power_of_2(k)
    padded = triton.next_power_of_2(groups)
    values, indices, _, _ = call(
        kernels.top_k_kernel,
        pre,
        jnp.zeros(1) if bias is None else bias,
        outputs=[
            Shape((n, k), jnp.float32),
            Shape((n, k), jnp.int32),
            Shape((n, groups), jnp.float32),
            Shape((n, slots), jnp.int32),
        ],
        grid=(n,),
        warps=warps or (2 if max(padded, slots * group) <= 2048 else 4 if max(padded, slots * group) <= 4096 else 8),
        F=f,
        K=k,
        SLOTS=slots,
        GROUP=group,
        GROUPS=groups,
        PADDED=padded,
        BLOCK=min(block, padded),
        BITS=_bits(pre),
        BIASED=bias is not None,
        MAGNITUDES=magnitudes,
    )
    return Codes(values, indices)


def batch_top_k(
    pre: Float[Array, "n f"], k: int, limit: Int[Array, ""] | None, bias: Float[Array, " f"] | None
) -> Codes:
    """Return the n k largest positive entries of pre (+ bias), in the order of their tokens.

    They lie in the n k groups with the largest maxima, as in `jsae.ops.selection.batch_top_k`: a threshold is searched
    among the maxima, then among the members of those groups.
    """
    n, f = pre.shape
    count, size = n * (k if limit is None else limit), n * k
    group = group_size(f, k)
    groups = -(-f // group)
    constants: dict[str, Any] = {"F": f, "GROUP": group, "GROUPS": groups, "BIASED": bias is not None}
    dtype = pre.dtype if bias is None else jnp.float32
    bias = jnp.zeros(1) if bias is None else bias
    block = min(256, triton.next_power_of_2(groups))
    (maxima,) = call(
        kernels.maxima_kernel,
        pre,
        bias,
        outputs=[Shape((n, groups), dtype)],
        grid=(n, -(-groups // block)),
        warps=4,
        BLOCK=block,
        **constants,
    )
    places, real = chosen(maxima, count, size)
    (members,) = call(
        kernels.members_kernel,
        pre,
        bias,
        places,
        real.astype(jnp.int32),
        outputs=[Shape((size, group), dtype)],
        grid=(-(-size // 64),),
        warps=4,
        COUNT=size,
        BLOCK=64,
        **constants,
    )
    where, real = chosen(members, count, size)
    place = places[where // group]
    values = jnp.where(real, members.ravel()[where], 0).astype(jnp.float32)
    # Codes that fill up the batch are shared out among the latents: one program sums those of a latent.
    latents = jnp.where(real, place % groups * group + where % group, jnp.arange(size) % f)
    return Codes(*(a.reshape(n, k) for a in (values, latents, place // groups)))


def chosen(
    values: Float[Array, "m w"], count: int | Int[Array, ""], size: int
) -> tuple[Int[Array, " size"], Bool[Array, " size"]]:
    """Return the places of the `count` largest positive values, in order, padded to `size`; and what is no padding.

    Of values equal to the smallest of them the first are taken.
    """
    least = kth_largest(values, count)
    blocks = -(-values.size // _BLOCK)
    (counts,) = call(
        kernels.relation_kernel,
        values,
        least,
        outputs=[Shape((blocks, 2), jnp.int32)],
        grid=(blocks,),
        warps=4,
        N=values.size,
        BLOCK=_BLOCK,
    )
    above, equal = counts[:, 0], counts[:, 1]
    quotas = jnp.clip(count - above.sum() - (jnp.cumsum(equal) - equal), 0, equal)
    taken = above + quotas
    ends = jnp.cumsum(taken)
    (places,) = call(
        kernels.compact_kernel,
        values,
        least,
        ends - taken,
        quotas,
        outputs=[Shape((size,), jnp.int32)],
        grid=(blocks,),
        warps=4,
        N=values.size,
        SIZE=size,
        BLOCK=_BLOCK,
    )
    real = jnp.arange(size) < ends[-1]
    return jnp.where(real, places, values.size - 1), real


def kth_largest(values: Float[Array, "m w"], k: int | Int[Array, ""]) -> Int[Array, ""]:
    """Return the bits of the k-th largest of all positive numbers; 0 where fewer than k are positive.

    Four bits are found in one pass, by counting how many numbers reach each of 15 thresholds.
    """
    programs = -(-values.size // (_COUNTED * _TURNS))
    bits = jnp.int32(0)
    for shift in range(28, 28 - _bits(values), -4):
        (counts,) = call(
            kernels.digit_kernel,
            values,
            jnp.stack([bits, jnp.int32(shift)]),
            outputs=[Shape((programs, 16), jnp.int32)],
            grid=(programs,),
            warps=1,
            N=values.size,
            BLOCK=_COUNTED,
            TURNS=_TURNS,
        )
        digit = (counts.sum(0)[1:] >= k).sum(dtype=jnp.int32)
        bits = bits | lax.shift_left(digit, jnp.int32(shift))
    return bits


def _bits(values: Array) -> int:
    """Return how many bits, from the top, tell two numbers apart: those of bfloat16 fill half a float32."""
    return 16 if values.dtype == jnp.bfloat16 else 32
