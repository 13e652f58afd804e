"""Kernels that select the largest numbers: of every row, and of a whole batch.

Floats are compared through integers that have the same order. The k-th largest is built bit by bit from the top, with
one count each; a bfloat16 needs 16 of them. Everything is exact, and nothing depends on the order in which programs
run.
"""

import triton
import triton.language as tl


@triton.jit
def ordered(x, BITS: tl.constexpr):
    """Return unsigned integers of BITS bits in the order of the float32 x, NaN above all."""
    bits = x.to(tl.int32, bitcast=True)
    signed = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = signed.to(tl.uint32, bitcast=True) ^ tl.full((), 0x80000000, tl.uint32)
    key = tl.where(x != x, tl.full((), 0xFFFFFFFF, tl.uint32), key)
    return key >> (32 - BITS)


@triton.jit
def kth_largest(keys, k, BITS: tl.constexpr):
    """Return the k-th largest of the keys: the largest number that at least k of them reach."""
    kth = tl.zeros((), tl.uint32)
    bit = tl.full((), 1, tl.uint32) << (BITS - 1)
    for _ in range(BITS):
        raised = kth | bit
        bit = bit >> 1
        count = tl.sum((keys >= raised).to(tl.int32))
        kth = tl.where(count >= k, raised, kth)
    return kth


@triton.jit
def chosen(keys, k, BITS: tl.constexpr):
    """Return a mask of exactly k of the keys, the largest, of equal ones the first; keys of 0 are never chosen."""
    kth = kth_largest(keys, k, BITS)
    above = keys > kth
    equal = (keys == kth) & (keys > 0)
    left = k - tl.sum(above.to(tl.int32))
    return above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= left))


@triton.jit
def compared(x, MAGNITUDES: tl.constexpr):
    """Return what selection compares: x, or |x| with minus infinity as the smallest."""
    if MAGNITUDES:
        x = tl.where(x == float("-inf"), x, tl.abs(x))
    return x


@triton.jit
def top_k_kernel(
    pre, bias, values, indices, maxima, groups,
    F: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    PADDED: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr, BIASED: tl.constexpr, MAGNITUDES: tl.constexpr,
):  # fmt: skip
    """Select the K largest of a row of `pre` (+ bias), one program a row.

    Latents lie in groups of GROUP neighbours. The K largest lie in the K groups with the largest maxima, so a second
    search sees only the members of those. `maxima` and `groups` are scratch.
    """
    row = tl.program_id(0).to(tl.int64)
    for first in range(0, GROUPS, BLOCK):
        group = first + tl.arange(0, BLOCK)
        latent = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        x = tl.load(pre + row * F + latent, mask=latent < F, other=float("-inf")).to(tl.float32)
        if BIASED:
            x += tl.load(bias + latent, mask=latent < F, other=0.0)
        tl.store(maxima + row * GROUPS + group, tl.max(compared(x, MAGNITUDES), 1), mask=group < GROUPS)
    tl.debug_barrier()

    group = tl.arange(0, PADDED)
    largest = tl.load(maxima + row * GROUPS + group, mask=group < GROUPS, other=float("-inf"))
    take = chosen(tl.where(group < GROUPS, ordered(largest, BITS), 0), K, BITS)
    tl.store(groups + row * SLOTS + tl.cumsum(take.to(tl.int32), 0) - 1, group, mask=take)
    tl.debug_barrier()

    member = tl.arange(0, SLOTS * GROUP)
    slot = member // GROUP
    latent = tl.load(groups + row * SLOTS + slot, mask=slot < K, other=0) * GROUP + member % GROUP
    real = (slot < K) & (latent < F)
    x = tl.load(pre + row * F + latent, mask=real, other=float("-inf")).to(tl.float32)
    if BIASED:
        x += tl.load(bias + latent, mask=real, other=0.0)
    take = chosen(tl.where(real, ordered(compared(x, MAGNITUDES), BITS), 0), K, BITS)
    place = row * K + tl.cumsum(take.to(tl.int32), 0) - 1
    tl.store(values + place, x, mask=take)
    tl.store(indices + place, latent, mask=take)


@triton.jit
def maxima_kernel(
    pre, bias, maxima, F: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
    BIASED: tl.constexpr,
):  # fmt: skip
    """Write the largest of every group of GROUP neighbours in a row of `pre` (+ bias)."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    latent = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(pre + row * F + latent, mask=latent < F, other=float("-inf")).to(tl.float32)
    if BIASED:
        x += tl.load(bias + latent, mask=latent < F, other=0.0)
    tl.store(maxima + row * GROUPS + group, tl.max(x, 1).to(maxima.dtype.element_ty), mask=group < GROUPS)


@triton.jit
def members_kernel(
    pre, bias, places, real, members, COUNT: tl.constexpr, F: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Write the members of the groups at some places, (n, GROUPS) counted through; 0 where a place is not real."""
    which = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(places + which, mask=which < COUNT, other=0)
    used = tl.load(real + which, mask=which < COUNT, other=0) != 0
    row = (place // GROUPS).to(tl.int64)
    latent = (place % GROUPS)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = used[:, None] & (latent < F)
    x = tl.load(pre + row[:, None] * F + latent, mask=inside, other=0.0).to(tl.float32)
    if BIASED:
        x += tl.load(bias + latent, mask=inside, other=0.0)
    at = which.to(tl.int64)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    tl.store(members + at, tl.where(inside, x, 0.0).to(members.dtype.element_ty), mask=(which < COUNT)[:, None])


@triton.jit
def positive_bits(values, place, N):
    """Return the bits of numbers above 0, which have their order; 0 for all others."""
    x = tl.load(values + place, mask=place < N, other=0.0).to(tl.float32)
    return tl.where(x > 0, x.to(tl.int32, bitcast=True), 0)


@triton.jit
def digit_kernel(values, prefix, counts, N: tl.constexpr, BLOCK: tl.constexpr, TURNS: tl.constexpr):
    """Count how many positive numbers reach each of 15 thresholds: a prefix with the digits 1 to 15 at some bit.

    `prefix` holds the prefix and the number of that bit, so that one compiled kernel serves all digits. `counts` is
    (programs, 16); column 0 is 0. Thresholds above 2^31 are reached by none.
    """
    program = tl.program_id(0)
    low = tl.load(prefix).to(tl.uint32, bitcast=True)
    unit = tl.full((), 1, tl.uint32) << tl.load(prefix + 1).to(tl.uint32, bitcast=True)
    column = tl.arange(0, 16)
    total = tl.zeros((16,), tl.int32)
    for turn in range(TURNS):
        place = (program * TURNS + turn) * BLOCK + tl.arange(0, BLOCK)
        bits = positive_bits(values, place, N).to(tl.uint32, bitcast=True)
        threshold = low
        for digit in tl.static_range(1, 16):
            threshold += unit
            reached = tl.sum((bits >= threshold).to(tl.int32))
            total += tl.where(column == digit, reached, 0)
    tl.store(counts + program * 16 + column, total)


@triton.jit
def relation_kernel(values, threshold, counts, N: tl.constexpr, BLOCK: tl.constexpr):
    """Count the numbers above and at a positive threshold in every block; `counts` is (blocks, 2)."""
    block = tl.program_id(0)
    bits = positive_bits(values, block * BLOCK + tl.arange(0, BLOCK), N)
    least = tl.load(threshold)
    tl.store(counts + 2 * block, tl.sum((bits > least).to(tl.int32)))
    tl.store(counts + 2 * block + 1, tl.sum(((bits == least) & (bits > 0)).to(tl.int32)))


@triton.jit
def compact_kernel(values, threshold, starts, quotas, places, N: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Write the places of the numbers above a threshold, and of the first `quota` at it, from `start` on."""
    block = tl.program_id(0)
    place = block * BLOCK + tl.arange(0, BLOCK)
    bits = positive_bits(values, place, N)
    least = tl.load(threshold)
    equal = (bits == least) & (bits > 0)
    take = (bits > least) | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= tl.load(quotas + block)))
    at = tl.load(starts + block) + tl.cumsum(take.to(tl.int32), 0) - 1
    tl.store(places + at, place, mask=take & (at < SIZE))
