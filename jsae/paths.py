"""Which way a step computes what it computes. Every way gives the same numbers; the choice is made here, by the device.

On a processor (CPU) arrays that fit its caches decide, so work goes chunk by chunk; a GPU wants whole arrays.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Literal, NamedTuple

import jax


class Paths(NamedTuple):
    """One way through a step."""

    chunk: int | None
    """Pre-activations, about, that exist at once where codes are picked token by token; None: all."""
    block: int | None
    """Numbers of a weight matrix, about, that the optimiser updates at once; None: all."""
    gradients: Literal["sorted", "by column"]
    """How rows are added into the gradient of a weight matrix: code by code in the order of their latents, or one code
    of every token at a time."""


CPU = Paths(chunk=3 * 2**20, block=2**18, gradients="sorted")
GPU = Paths(chunk=None, block=None, gradients="by column")

_forced: contextvars.ContextVar[Paths | None] = contextvars.ContextVar("paths", default=None)


def chosen() -> Paths:
    """The way of what is traced now: the one that is forced, else the one measured to be the fastest on the device."""
    return forced() or (CPU if jax.default_backend() == "cpu" else GPU)


def forced() -> Paths | None:
    """The way that is forced, if one is."""
    return _forced.get()


@contextlib.contextmanager
def force(paths: Paths) -> Iterator[None]:
    """Everything that is traced inside goes this way: for tests and measurements."""
    token = _forced.set(paths)
    try:
        yield
    finally:
        _forced.reset(token)


def part_of(whole: int, most: int) -> int:
    """The largest divisor of `whole` that is at most `most`; the whole where that is not an eighth of `most`.

    Chunks of one size are one program; a last one of another size would be another.
    """
    if whole <= most:
        return whole
    best = next(part for part in range(most, 0, -1) if whole % part == 0)
    return best if 8 * best >= most else whole
