"""Which way a step computes what it computes. Every way gives the same numbers; the choice is made here, by the device.

On a processor (CPU) caches decide, so work goes piece by piece: `python -m experiments.bench step --way=plain` shows
what that saves. A GPU has no use for pieces, and its matrix units make a dense gradient cheaper than scattered rows:
that is reckoned, not measured yet (`python -m experiments.bench gpu` measures every way).
"""

import contextlib
import contextvars
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

import jax


class Paths(NamedTuple):
    """One way through a step."""

    chunk: int | None
    """Pre-activations, about, that exist at once where codes are picked token by token; None: all."""
    least: int
    """Tokens that such a chunk has at least where d_sae is eight times d_in, and up to twice as many in a wider SAE: a
    product with fewer rows is slower, and beside the weights' gradients a chunk then weighs little."""
    tokens: int | None
    """Tokens, about, whose latents exist at once where all are computed, and their gradients are summed; None: all."""
    block: int | None
    """Numbers of a weight matrix, about, that the optimiser updates at once; None: all."""
    sorts: int
    """Into how many a top-k is cut by tokens, for the cores to share: XLA runs one on one core, and what could run side
    by side one after the other, unless more than eight operations are ready at once."""
    decode: Literal["by part", "at once", "dense"]
    """How codes are decoded: by the rows that they name, one code of every token at a time; by all of these rows in one
    sum, which a compiler for GPUs never writes down; or as an array of all latents."""
    gradients: Literal["sorted", "by part", "dense"]
    """How rows are added into the gradient of a weight matrix: in the order of their latents, a part of the codes at a
    time as they come, or as the product with an array of all latents."""

    def chunk_of(self, n: int, d_in: int, d_sae: int) -> int:
        """How many of n tokens are in one chunk."""
        if self.chunk is None:
            return n
        return part_of(n, max(self.chunk // d_sae, min(self.least * d_sae // (8 * d_in), 2 * self.least), 1))


CPU = Paths(chunk=2**20, least=128, tokens=512, block=2**18, sorts=16, decode="by part", gradients="sorted")
GPU = Paths(chunk=None, least=1, tokens=None, block=None, sorts=1, decode="at once", gradients="dense")
WAYS: Mapping[str, Paths] = {
    "cpu": CPU,
    "gpu": GPU,
    "plain": GPU._replace(decode="by part", gradients="by part"),
    "dense": GPU._replace(decode="dense"),
}

_forced: contextvars.ContextVar[Paths | None] = contextvars.ContextVar("paths", default=None)


def chosen() -> Paths:
    """The way of what is traced now: the one that is forced, else that of the device."""
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
