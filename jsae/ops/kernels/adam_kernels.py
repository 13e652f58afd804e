"""Adam of a matrix with unit rows in one pass: projection of the gradient, moments, update, normalisation."""

import triton
import triton.language as tl


@triton.jit
def updated(p, mu, nu, g, scalars, D: tl.constexpr, BETA1: tl.constexpr, BETA2: tl.constexpr, EPSILON: tl.constexpr,
            RATE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Overwrite one row of weights and moments."""
    row = tl.program_id(0).to(tl.int64) * D
    column = tl.arange(0, BLOCK)
    inside = column < D
    clip = tl.load(scalars)
    rate = tl.load(scalars + 1) * RATE
    spread = tl.load(scalars + 2)
    weight = tl.load(p + row + column, mask=inside, other=0.0)
    gradient = tl.load(g + row + column, mask=inside, other=0.0)
    gradient = clip * (gradient - tl.sum(gradient * weight) * weight)
    first = tl.load(mu + row + column, mask=inside, other=0.0)
    second = tl.load(nu + row + column, mask=inside, other=0.0)
    first = BETA1 * first + (1 - BETA1) * gradient
    second = BETA2 * second + (1 - BETA2) * gradient * gradient
    weight -= rate * first / (tl.sqrt(spread * second) + EPSILON)
    weight = weight / tl.sqrt(tl.sum(weight * weight))
    tl.store(p + row + column, weight, mask=inside)
    tl.store(mu + row + column, first, mask=inside)
    tl.store(nu + row + column, second, mask=inside)


@triton.jit
def adam_kernel(p, mu, nu, g, scalars, D: tl.constexpr, BETA1: tl.constexpr, BETA2: tl.constexpr,
                EPSILON: tl.constexpr, RATE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Update one row a program."""
    updated(p, mu, nu, g, scalars, D, BETA1, BETA2, EPSILON, RATE, BLOCK)


@triton.jit
def adam_kernel_with_outputs(p, mu, nu, g, scalars, p_out, mu_out, nu_out, D: tl.constexpr, BETA1: tl.constexpr,
                             BETA2: tl.constexpr, EPSILON: tl.constexpr, RATE: tl.constexpr,
                             BLOCK: tl.constexpr):  # fmt: skip
    """Do the same; the outputs, which are the same memory as the inputs, are parameters too."""
    updated(p, mu, nu, g, scalars, D, BETA1, BETA2, EPSILON, RATE, BLOCK)
