"""Kernels that sum rows over codes: by token, and by latent in sorted order.

A pair is a code: a token, a latent and a value. Sums run in a fixed order without atomics, so that results are the same
in every run.
"""

import triton
import triton.language as tl


@triton.jit
def decode_kernel(
    values, indices, starts, weights, start, out,
    D: tl.constexpr, K: tl.constexpr, RAGGED: tl.constexpr, BLOCK: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """Add the rows that the codes of a token name, times their values, to its row of `start`.

    One program per token and BLOCK columns. Where RAGGED, the codes of a token lie from `starts[token]` on.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < D
    total = tl.load(start + token * D + column, mask=inside, other=0.0).to(tl.float32)
    if RAGGED:
        first = tl.load(starts + token)
        last = tl.load(starts + token + 1)
    else:
        first = tl.program_id(0) * K
        last = first + K
    for turn in range(first, last, CODES):
        code = turn + tl.arange(0, CODES)
        value = tl.load(values + code, mask=code < last, other=0.0)
        latent = tl.load(indices + code, mask=code < last, other=0).to(tl.int64)
        wanted = (value != 0.0)[:, None] & inside[None, :]
        row = tl.load(weights + latent[:, None] * D + column[None, :], mask=wanted, other=0.0).to(tl.float32)
        total += tl.sum(value[:, None] * row, 0)
    tl.store(out + token * D + column, total, mask=inside)


@triton.jit
def dots_kernel(
    rows, indices, starts, weights, dots,
    D: tl.constexpr, K: tl.constexpr, RAGGED: tl.constexpr, BLOCK: tl.constexpr, CODES: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Multiply the row of a token with the rows that its codes name, CODES at a time.

    One of PARTS programs of a token takes every PARTS-th block of its codes.
    """
    token = tl.program_id(0).to(tl.int64)
    if RAGGED:
        first = tl.load(starts + token)
        last = tl.load(starts + token + 1)
    else:
        first = tl.program_id(0) * K
        last = first + K
    for turn in range(first + tl.program_id(1) * CODES, last, CODES * PARTS):
        code = turn + tl.arange(0, CODES)
        real = code < last
        latent = tl.load(indices + code, mask=real, other=0).to(tl.int64)
        total = tl.zeros((CODES, BLOCK), tl.float32)
        for begin in range(0, D, BLOCK):
            column = begin + tl.arange(0, BLOCK)
            inside = real[:, None] & (column < D)[None, :]
            row = tl.load(rows + token * D + column, mask=column < D, other=0.0).to(tl.float32)
            weight = tl.load(weights + latent[:, None] * D + column[None, :], mask=inside, other=0.0).to(tl.float32)
            total += row[None, :] * weight
        tl.store(dots + code, tl.sum(total, 1), mask=real)


@triton.jit
def starts_kernel(keys, starts, COUNT: tl.constexpr, LATENTS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """Write for every number from 0 to LATENTS how many of COUNT sorted keys are below it, by bisection."""
    latent = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low = tl.zeros((BLOCK,), tl.int32)
    high = tl.full((BLOCK,), COUNT, tl.int32)
    for _ in range(STEPS):
        open_ = low < high
        middle = (low + high) // 2
        below = tl.load(keys + middle, mask=open_, other=0) < latent
        low = tl.where(open_ & below, middle + 1, low)
        high = tl.where(open_ & (below == 0), middle, high)
    tl.store(starts + latent, low, mask=latent <= LATENTS)


@triton.jit
def row_sum(
    order, values, tokens, rows, first, last, column, D: tl.constexpr, K: tl.constexpr, RAGGED: tl.constexpr,
    BLOCK: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Return the sum of value * row of the token over the sorted pairs from first to last, for some columns."""
    inside = column < D
    total = tl.zeros((BLOCK,), tl.float32)
    for turn in range(first, last, PAIRS):
        place = turn + tl.arange(0, PAIRS)
        real = place < last
        pair = tl.load(order + place, mask=real, other=0)
        value = tl.load(values + pair, mask=real, other=0.0)
        if RAGGED:
            token = tl.load(tokens + pair, mask=real, other=0).to(tl.int64)
        else:
            token = (pair // K).to(tl.int64)
        wanted = (value != 0.0)[:, None] & inside[None, :]
        row = tl.load(rows + token[:, None] * D + column[None, :], mask=wanted, other=0.0).to(tl.float32)
        total += tl.sum(value[:, None] * row, 0)
    return total


@triton.jit
def partial_sums_kernel(
    keys, order, starts, values, tokens, rows, partial, D: tl.constexpr, K: tl.constexpr, RAGGED: tl.constexpr,
    SPAN: tl.constexpr, BLOCK: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Sum the pairs of a latent from a multiple of SPAN to the next, if the latent began before.

    So no program sums more than SPAN pairs, however often a latent fires.
    """
    cut = tl.program_id(0) * SPAN
    latent = tl.load(keys + cut)
    if tl.load(starts + latent) < cut:
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        last = tl.minimum(tl.load(starts + latent + 1), cut + SPAN)
        total = row_sum(order, values, tokens, rows, cut, last, column, D, K, RAGGED, BLOCK, PAIRS)
        tl.store(partial + tl.program_id(0).to(tl.int64) * D + column, total, mask=column < D)


@triton.jit
def latent_sums_kernel(
    order, starts, values, tokens, rows, partial, out, D: tl.constexpr, K: tl.constexpr, RAGGED: tl.constexpr,
    SPAN: tl.constexpr, BLOCK: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Sum the pairs of a latent up to the first multiple of SPAN inside them, then add its partial sums in order."""
    latent = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(starts + latent)
    end = tl.load(starts + latent + 1)
    cut = (first // SPAN + 1) * SPAN
    total = row_sum(
        order, values, tokens, rows, first, tl.minimum(end, cut), column, D, K, RAGGED, BLOCK, PAIRS
    )  # fmt: skip
    row = (cut // SPAN).to(tl.int64)
    for _ in range(cut, end, SPAN):
        total += tl.load(partial + row * D + column, mask=column < D, other=0.0)
        row += 1
    tl.store(out + latent.to(tl.int64) * D + column, total, mask=column < D)


@triton.jit
def value_sums_kernel(order, starts, values, sums, counts, LATENTS: tl.constexpr, BLOCK: tl.constexpr):
    """Sum the values of every latent, and count those that are not 0."""
    latent = tl.program_id(0)
    last = tl.load(starts + latent + 1)
    total = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.int32)
    for turn in range(tl.load(starts + latent), last, BLOCK):
        place = turn + tl.arange(0, BLOCK)
        pair = tl.load(order + place, mask=place < last, other=0)
        value = tl.load(values + pair, mask=place < last, other=0.0)
        total += value
        count += (value != 0.0).to(tl.int32)
    tl.store(sums + latent, tl.sum(total))
    tl.store(counts + latent, tl.sum(count))
