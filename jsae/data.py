"""Where activations come from, and the shuffle that stands between them and the training step.

A `Source` fills blocks of activations. `Shuffled` permutes a block on the device, drains it completely in batches and
has the source work on the next one meanwhile. The state of the stream is then (block, batch, position of the block's
first token): resuming is exact and costs one block.
"""

import dataclasses
import functools
from collections.abc import Generator, Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt

from jsae.health import ActivationsError, DegenerateError, Extent, degenerate
from jsae.settings import require

Block = Array | tuple[Any, ...]
"""Activations, (rows, d); or a tree of tuples of such, of the same tokens: for every site what its SAE reads."""

Filling = Generator[float, None, Block]
"""A block being filled: each `next` does a bounded piece of work and yields the share done; it returns the block."""


@runtime_checkable
class Source(Protocol):
    """An endless stream of activations of width `d_in`."""

    d_in: int

    def fill(self, rows: int) -> Filling:
        """Starts the next block, of shape (rows, d_in). A block must be finished before the next one is started."""

    def position(self) -> dict[str, Any]:
        """Where the next block starts, as JSON values."""

    def seek(self, position: dict[str, Any]) -> None:
        """Goes back to a `position`: what is filled from there on is the same, number by number."""


@dataclasses.dataclass(frozen=True)
class Cursor:
    """The next batch of a stream: its block, its number in the block, and where the block starts in the source."""

    block: int
    batch: int
    position: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return dataclasses.asdict(self)


class Shuffled:
    """Batches in an order that mixes all tokens of a block: an iterator of (batch_size, d_in) arrays.

    Args:
      source: what fills the blocks.
      batch_size: tokens in a batch.
      batches_per_block: batches in a block; the block is what is held on the device, twice while the next one fills.
      seed: of the permutations; block b is permuted by the key `fold_in(key(seed), b)`.
      num_batches: batches after which nothing more is asked of the source; None is no end.
      cursor: where to go on, from `cursor()` of an earlier stream with the same arguments; None is the source's place.
    """

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int,
        batches_per_block: int,
        seed: int,
        num_batches: int | None = None,
        cursor: Cursor | None = None,
    ):
        require(batches_per_block >= 1, f"batches_per_block is {batches_per_block}: it must be at least 1")
        self._source, self._per_block, self._batch_size = source, batches_per_block, batch_size
        self._rows = batch_size * batches_per_block
        self._key = jax.random.key(seed)
        self._num_batches = num_batches
        if cursor is not None:
            require(
                0 <= cursor.batch < batches_per_block,
                f"the stream's cursor is at batch {cursor.batch} of a block of {batches_per_block}: "
                "batch size or block size differ from the run that is resumed",
            )
            source.seek(cursor.position)
        self._cursor = cursor or Cursor(0, 0, source.position())
        self._block: Block | None = None
        self._order: Array | None = None
        self._drained = False
        self._begin()

    def cursor(self) -> Cursor:
        """The batch that `next` will give."""
        return self._cursor

    def peek(self) -> Block:
        """The whole current block, in the source's order, without moving on."""
        if self._block is None:
            self._advance()
        return self._block

    def __iter__(self) -> Iterator[Block]:
        return self

    def __next__(self) -> Block:
        """The next batch. Before it is cut, the source does its share of work on the block after this one.

        That work runs while the device is still busy with what was dispatched since the last call.
        """
        at = self._cursor
        if self._num_batches is not None and at.block * self._per_block + at.batch >= self._num_batches:
            raise StopIteration
        if self._block is None or self._drained:
            self._advance()
        else:
            self._work(at.batch / self._per_block)
        batch = _cut(self._block, self._order, jax.device_put(np.int32(at.batch)), self._batch_size)
        self._drained = at.batch + 1 == self._per_block
        self._cursor = (
            Cursor(at.block + 1, 0, self._next_position)
            if self._drained
            else dataclasses.replace(at, batch=at.batch + 1)
        )
        return batch

    def _begin(self) -> None:
        """Starts filling a block; it starts where the source stands."""
        self._next_position = self._source.position()
        self._filling = self._source.fill(self._rows)
        self._share, self._filled = 0.0, None
        self._filling_block = self._cursor.block if self._block is None else self._cursor.block + 1

    def _work(self, share: float) -> None:
        """Works on the block that is being filled until this share of it is done."""
        try:
            while self._filling is not None and self._share < share:
                self._share = next(self._filling)
        except StopIteration as done:
            self._filling, self._filled = None, done.value
        except ActivationsError as error:
            step = self._filling_block * self._per_block + 1
            raise ActivationsError(f"the activations are not finite at step {step}; {error}") from error

    def _advance(self) -> None:
        """Makes the block at the cursor the current one, and starts on the one after it if there will be one."""
        self._block = self._order = None  # lets go of the drained block first
        self._work(float("inf"))
        number = self._cursor.block
        self._block, self._filled = self._filled, None
        self._order = _permutation(self._key, jax.device_put(np.uint32(number)), self._rows)
        self._drained = False
        if self._num_batches is None or (number + 1) * self._per_block < self._num_batches:
            self._begin()
        else:
            self._next_position = self._source.position()


@functools.partial(jax.jit, static_argnums=2)
def _permutation(key: Key[Array, ""], block: UInt[Array, ""], rows: int) -> Int[Array, " rows"]:
    return jax.random.permutation(jax.random.fold_in(key, block), rows)


@functools.partial(jax.jit, static_argnums=3)
def _cut(block: Block, order: Int[Array, " rows"], batch: Int[Array, ""], batch_size: int) -> Block:
    rows = jax.lax.dynamic_slice_in_dim(order, batch * batch_size, batch_size)
    return jax.tree.map(lambda acts: acts[rows], block)


def scale_of(acts: Float[Array, "n d"], layers: int = 1) -> Float[Array, "*d"]:
    """Return the factor that gives activations a mean squared norm of d; of several layers side by side one each, (d,).

    Squares are of activations divided by a power of two near the largest, so that none leaves float32.
    """
    n, d = acts.shape
    width = d // layers
    parts = acts.astype(jnp.float32).reshape(n, layers, width)
    unit = _power_of_two(jnp.abs(parts).max(axis=(0, 2)))
    squares = jnp.square(parts / unit[:, None]).sum(-1).mean(0)
    scales = jnp.sqrt(width / squares) / unit
    return scales[0] if layers == 1 else jnp.repeat(scales, width)


def check(acts: Float[Array, "n d"], where: str = "activations") -> None:
    """Check that something can be learned from activations. Waits for the device.

    Raises:
      ActivationsError: NaN or infinite numbers among them.
      DegenerateError: they are all zero, all alike, or of a scale that float32 sums do not hold.
    """
    with jax.ensure_compile_time_eval():  # also where a caller is being traced
        extent = Extent(*(float(value) for value in jax.device_get(_extent(acts))))  # type: ignore[arg-type]
    problem = degenerate(extent._replace(nonfinite=int(extent.nonfinite)), where)
    if problem is not None:
        raise (ActivationsError if extent.nonfinite else DegenerateError)(problem)


@jax.jit
def _extent(acts: Float[Array, "n d"]) -> tuple[Array, ...]:
    x = acts.astype(jnp.float32)
    nonfinite = (~jnp.isfinite(x)).sum()
    largest = jnp.abs(x).max()
    unit = _power_of_two(largest)
    x = x / unit
    square, spread = jnp.square(x).mean(), jnp.square(x - x.mean(0)).mean()
    return largest, jnp.sqrt(square) * unit, spread / square, nonfinite


def _power_of_two(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Return the largest power of two that is not above x, by which dividing is exact; 1 where float32 has none."""
    power = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, jnp.int32) & 0x7F800000, jnp.float32)
    return jnp.where((power > 0) & jnp.isfinite(power), power, 1)


def geometric_median(x: Float[Array, "n d"], iterations: int = 100) -> Float[Array, " d"]:
    """The point with the smallest sum of distances to all rows, by Weiszfeld's iteration from the mean."""

    def closer(_: Int[Array, ""], point: Float[Array, " d"]) -> Float[Array, " d"]:
        weights = 1 / (jnp.linalg.norm(x - point, axis=1) + 1e-6)
        return (weights @ x) / weights.sum()

    return jax.lax.fori_loop(0, iterations, closer, x.mean(0))
