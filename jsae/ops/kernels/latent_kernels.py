"""Kernels of the elementwise parts of dense architectures, which also sum over tokens, forward and backward.

One program takes some columns and SPAN tokens, ROWS at a time. It keeps sums as tiles, and adds their rows at the end.
The sums of all spans are added afterwards, in their order.
`jsae.formulas` has the functions; FORMULA is the number of one in that module, from 0. NaN becomes NaN, as there.
"""

import triton
import triton.language as tl


@triton.jit
def rectified(x):
    """Return the positive part; tl.maximum would turn NaN into 0."""
    return tl.where(x <= 0.0, 0.0, x)


@triton.jit
def evaluated(p, a, b, c, FORMULA: tl.constexpr):
    """Return two maps and two terms of a tile; those that a formula does not have may be anything."""
    if FORMULA == 0 or FORMULA == 4:
        one = rectified(p)
        two = one
        first = one
        if FORMULA == 4:
            first = tl.log(1.0 + one * a[None, :])
        second = rectified(-p)
    elif FORMULA == 1:
        gate = p + a[None, :]
        magnitude = rectified(p * tl.exp(c)[None, :] + b[None, :])
        one = tl.where(gate > 0.0, magnitude, 0.0)
        two = rectified(gate)
        first = two
        second = rectified(-gate)
    else:
        one = tl.where(p > a[None, :], p, 0.0)
        two = one
        if FORMULA == 2:
            first = 2.0 * tl.sigmoid(8.0 * one * b[None, :]) - 1.0
        else:
            first = (p > a[None, :]).to(tl.float32)
        second = rectified(a[None, :] - p)
    return one, two, first, second


@triton.jit
def differentiated(p, a, b, c, g, h, s, t, FORMULA: tl.constexpr, WIDTH: tl.constexpr):
    """Return the gradients of a tile's p, a, b and c, from those of its maps, g and h, and of its sums, s and t."""
    if FORMULA == 0:
        dp = tl.where(p > 0.0, g + s[None, :], 0.0) - tl.where(p < 0.0, t[None, :], 0.0)
        da = dp
        db = dp
        dc = dp
    elif FORMULA == 1:
        gate = p + a[None, :]
        opened = gate > 0.0
        factor = tl.exp(c)[None, :]
        da = tl.where(opened, h + s[None, :], 0.0) - tl.where(gate < 0.0, t[None, :], 0.0)
        db = tl.where(opened & (p * factor + b[None, :] > 0.0), g, 0.0)
        dc = db * p * factor
        dp = da + db * factor
    elif FORMULA == 4:
        latent = rectified(p)
        slope = s[None, :] / (1.0 + latent * a[None, :])
        dp = tl.where(p > 0.0, g + slope * a[None, :], 0.0) - tl.where(p < 0.0, t[None, :], 0.0)
        da = slope * latent
        db = dp
        dc = dp
    else:
        above = p > a[None, :]
        window = tl.where(tl.abs(p - a[None, :]) < WIDTH / 2, 1.0 / WIDTH, 0.0)
        below = tl.where(p < a[None, :], t[None, :], 0.0)
        if FORMULA == 2:
            latent = tl.where(above, p, 0.0)
            size = 2.0 * tl.sigmoid(8.0 * latent * b[None, :]) - 1.0
            slope = 4.0 * s[None, :] * (1.0 - size * size)
            through = a[None, :] * window * (g + slope * b[None, :])
            dp = tl.where(above, g + slope * b[None, :], 0.0) + through - below
            da = below - through
            db = slope * latent
        else:
            dp = tl.where(above, g, 0.0) - below
            da = below - window * (a[None, :] * g + s[None, :])
            db = dp
        dc = dp
    return dp, da, db, dc


@triton.jit
def forward_kernel(
    pre, bias, a, b, c, one, two, partial, N: tl.constexpr, F: tl.constexpr, FORMULA: tl.constexpr,
    MAPS: tl.constexpr, TERMS: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the maps of some columns and of SPAN tokens, and the sums of their terms."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    real = column < F
    shift = tl.load(bias + column, mask=real, other=0.0)
    a_row = tl.load(a + column, mask=real, other=0.0)
    b_row = tl.load(b + column, mask=real, other=0.0)
    c_row = tl.load(c + column, mask=real, other=0.0)
    first_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    second_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    begin = tl.program_id(1) * SPAN
    for turn in range(begin, begin + SPAN, ROWS):
        token = turn + tl.arange(0, ROWS)
        inside = (token < N)[:, None] & real[None, :]
        place = token.to(tl.int64)[:, None] * F + column[None, :]
        p = tl.load(pre + place, mask=inside, other=0.0).to(tl.float32) + shift[None, :]
        x, y, first, second = evaluated(p, a_row, b_row, c_row, FORMULA)
        tl.store(one + place, x.to(one.dtype.element_ty), mask=inside)
        if MAPS > 1:
            tl.store(two + place, y.to(two.dtype.element_ty), mask=inside)
        first_sum += tl.where(inside, first, 0.0)
        if TERMS > 1:
            second_sum += tl.where(inside, second, 0.0)
    row = tl.program_id(1).to(tl.int64) * TERMS * F + column
    tl.store(partial + row, tl.sum(first_sum, 0), mask=real)
    if TERMS > 1:
        tl.store(partial + row + F, tl.sum(second_sum, 0), mask=real)


@triton.jit
def backward_kernel(
    pre, bias, a, b, c, g, h, s, t, dpre, partial, N: tl.constexpr, F: tl.constexpr, FORMULA: tl.constexpr,
    WIDTH: tl.constexpr, MAPS: tl.constexpr, ARRAYS: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the gradients of the pre-activations, and the sums that are those of the bias and of a, b and c."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    real = column < F
    shift = tl.load(bias + column, mask=real, other=0.0)
    a_row = tl.load(a + column, mask=real, other=0.0)
    b_row = tl.load(b + column, mask=real, other=0.0)
    c_row = tl.load(c + column, mask=real, other=0.0)
    s_row = tl.load(s + column, mask=real, other=0.0)
    t_row = tl.load(t + column, mask=real, other=0.0)
    p_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    a_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    b_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    c_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    begin = tl.program_id(1) * SPAN
    for turn in range(begin, begin + SPAN, ROWS):
        token = turn + tl.arange(0, ROWS)
        inside = (token < N)[:, None] & real[None, :]
        place = token.to(tl.int64)[:, None] * F + column[None, :]
        p = tl.load(pre + place, mask=inside, other=0.0).to(tl.float32) + shift[None, :]
        g_tile = tl.load(g + place, mask=inside, other=0.0).to(tl.float32)
        h_tile = g_tile
        if MAPS > 1:
            h_tile = tl.load(h + place, mask=inside, other=0.0).to(tl.float32)
        dp, da, db, dc = differentiated(p, a_row, b_row, c_row, g_tile, h_tile, s_row, t_row, FORMULA, WIDTH)
        tl.store(dpre + place, dp.to(dpre.dtype.element_ty), mask=inside)
        p_sum += tl.where(inside, dp, 0.0)
        if ARRAYS > 0:
            a_sum += tl.where(inside, da, 0.0)
        if ARRAYS > 1:
            b_sum += tl.where(inside, db, 0.0)
        if ARRAYS > 2:
            c_sum += tl.where(inside, dc, 0.0)
    row = tl.program_id(1).to(tl.int64) * (1 + ARRAYS) * F + column
    tl.store(partial + row, tl.sum(p_sum, 0), mask=real)
    if ARRAYS > 0:
        tl.store(partial + row + F, tl.sum(a_sum, 0), mask=real)
    if ARRAYS > 1:
        tl.store(partial + row + 2 * F, tl.sum(b_sum, 0), mask=real)
    if ARRAYS > 2:
        tl.store(partial + row + 3 * F, tl.sum(c_sum, 0), mask=real)


@triton.jit
def totals_kernel(
    latents, counts, sums, N: tl.constexpr, F: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Count for some columns on how many of SPAN tokens they are not 0, and add their magnitudes."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    real = column < F
    count = tl.zeros((ROWS, COLUMNS), tl.int32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    begin = tl.program_id(1) * SPAN
    for turn in range(begin, begin + SPAN, ROWS):
        token = turn + tl.arange(0, ROWS)
        inside = (token < N)[:, None] & real[None, :]
        place = token.to(tl.int64)[:, None] * F + column[None, :]
        value = tl.load(latents + place, mask=inside, other=0.0).to(tl.float32)
        count += (value != 0.0).to(tl.int32)
        total += tl.abs(value)
    row = tl.program_id(1).to(tl.int64) * F + column
    tl.store(counts + row, tl.sum(count, 0), mask=real)
    tl.store(sums + row, tl.sum(total, 0), mask=real)
