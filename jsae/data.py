"""Sources of activations, and the shuffled stream of batches that training reads.

A `Source` fills blocks of activations. `Shuffled` permutes a block on the device and yields all of it in batches while
the source fills the next one. The state of the stream is (block, batch, position of the block's first token), so
resuming is exact and costs one block.
"""

import dataclasses
import functools
from collections.abc import Generator, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt

from jsae.health import ActivationsError, DegenerateError, Extent, degenerate
from jsae.settings import require

_ITERATIONS = 4  # of the subspace iteration in `remainder`
Block = Array | tuple[Any, ...]
"""Activations, (rows, d), or nested tuples of them for the same tokens: the inputs of each SAE."""

Filling = Generator[float, None, Block]
"""A block being filled: each `next` does a bounded amount of work and yields the share done; it returns the block."""


@runtime_checkable
class Source(Protocol):
    """An endless stream of activations of width `d_in`."""

    d_in: int

    def fill(self, rows: int) -> Filling:
        """Start the next block, (rows, d_in). A block must be finished before the next one is started."""

    def position(self) -> dict[str, Any]:
        """Return the position at which the next block starts, as JSON values."""

    def seek(self, position: dict[str, Any]) -> None:
        """Return to a `position`: the blocks from there on are exactly the same."""


@dataclasses.dataclass(frozen=True)
class Cursor:
    """The next batch of a stream: its block, its number in the block, and the position of the block in the source."""

    block: int
    batch: int
    position: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return dataclasses.asdict(self)


class Shuffled:
    """An iterator of batches, (batch_size, d_in), in which the tokens of a block are shuffled.

    A block may consist of several shards, one after the other. Each is shuffled by itself, and every batch has equally
    many tokens of each, again one shard after the other. So what a shard gives does not depend on those beside it, and
    processes may divide the shards among themselves.

    Args:
      source: fills the blocks.
      batch_size: tokens per batch, of all its shards.
      batches_per_block: batches per block. One block is on the device, and a second one while it is filled.
      seed: random seed of the permutations; block b is permuted with the key `fold_in(key(seed), b)`.
      num_batches: number of batches, after which the source is not used any more; None: no limit.
      cursor: position to resume from, returned by `cursor()` of a stream with the same arguments; None: start at the
        current position of the source.
      shards: numbers of the shards that the source gives.
      shard_count: number of shards of all processes. Of several, shard s of block b is permuted with the key
        `fold_in(fold_in(key(seed), b), s)`.

    Raises:
      ConfigError: batches_per_block is below 1, or does not fit the cursor; shards that cannot be of one size.
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
        shards: Sequence[int] = (0,),
        shard_count: int = 1,
    ):
        require(batches_per_block >= 1, f"batches_per_block is {batches_per_block}: it must be at least 1")
        require(
            batch_size % len(shards) == 0,
            f"a batch of {batch_size} tokens cannot have equally many of {len(shards)} shards",
        )
        self._source, self._per_block, self._batch_size = source, batches_per_block, batch_size
        self._shards = None if shard_count == 1 else np.asarray(shards, np.uint32)
        self._shard_count = shard_count
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
        """Return the position of the next batch."""
        return self._cursor

    def peek(self) -> Block:
        """Return the whole current block, in the source's order, without advancing."""
        if self._block is None:
            self._advance()
        return self._block

    def sample(self, most: int) -> Block:
        """Return the first rows of every shard of the current block, one shard after the other, without advancing.

        Args:
          most: number of rows of all shards of all processes together, about.
        """
        shards, of_all = (1, 1) if self._shards is None else (len(self._shards), self._shard_count)
        rows = min(self._rows // shards, max(most // of_all, 1))
        return jax.tree.map(
            lambda acts: acts.reshape(shards, -1, acts.shape[-1])[:, :rows].reshape(shards * rows, -1), self.peek()
        )

    def __iter__(self) -> Iterator[Block]:
        return self

    def __next__(self) -> Block:
        """Return the next batch, after the source has done a share of the work on the next block.

        This work runs while the device is busy with the operations dispatched since the last call.
        """
        cursor = self._cursor
        if self._num_batches is not None and cursor.block * self._per_block + cursor.batch >= self._num_batches:
            raise StopIteration
        if self._block is None or self._drained:
            self._advance()
        else:
            self._work(cursor.batch / self._per_block)
        batch = _cut(self._block, self._order, jax.device_put(np.int32(cursor.batch)), self._batch_size)
        self._drained = cursor.batch + 1 == self._per_block
        self._cursor = (
            Cursor(cursor.block + 1, 0, self._next_position)
            if self._drained
            else dataclasses.replace(cursor, batch=cursor.batch + 1)
        )
        return batch

    def _begin(self) -> None:
        """Start to fill a block from the current position of the source."""
        self._next_position = self._source.position()
        self._filling = self._source.fill(self._rows)
        self._share, self._filled = 0.0, None
        self._filling_block = self._cursor.block if self._block is None else self._cursor.block + 1

    def _work(self, share: float) -> None:
        """Continue to fill the next block until this share of it is done."""
        try:
            while self._filling is not None and self._share < share:
                self._share = next(self._filling)
        except StopIteration as done:
            self._filling, self._filled = None, done.value
        except ActivationsError as error:
            step = self._filling_block * self._per_block + 1
            raise ActivationsError(f"the activations are not finite at step {step}; {error}") from error

    def _advance(self) -> None:
        """Finish the block at the cursor, make it the current one, and start the next one if it is needed."""
        self._block = self._order = None  # frees the previous block first
        self._work(float("inf"))
        number = self._cursor.block
        self._block, self._filled = self._filled, None
        shards = None if self._shards is None else jax.device_put(self._shards)
        self._order = _permutation(self._key, jax.device_put(np.uint32(number)), shards, self._rows)
        self._drained = False
        if self._num_batches is None or (number + 1) * self._per_block < self._num_batches:
            self._begin()
        else:
            self._next_position = self._source.position()


@functools.partial(jax.jit, static_argnums=3)
def _permutation(
    key: Key[Array, ""], block: UInt[Array, ""], shards: UInt[Array, " shards"] | None, rows: int
) -> Int[Array, "shards r"]:
    """Return the order of the rows of every shard of a block."""
    key = jax.random.fold_in(key, block)
    if shards is None:
        return jax.random.permutation(key, rows)[None]
    each = rows // len(shards)
    orders = jax.vmap(lambda shard: jax.random.permutation(jax.random.fold_in(key, shard), each))(shards)
    return orders + each * jnp.arange(len(shards))[:, None]


@functools.partial(jax.jit, static_argnums=3)
def _cut(block: Block, order: Int[Array, "shards r"], batch: Int[Array, ""], batch_size: int) -> Block:
    """Return a batch: the next rows in the order of every shard."""
    each = batch_size // len(order)
    rows = jax.lax.dynamic_slice_in_dim(order, batch * each, each, axis=1).ravel()
    return jax.tree.map(lambda acts: acts[rows], block)


def scale_of(acts: Float[Array, "n d"], layers: int = 1) -> Float[Array, "*d"]:
    """Return the factor that scales activations to a mean squared norm of d.

    Activations are divided by a power of two near the largest before squaring, so that no square leaves float32.

    Args:
      acts: activations, (n, d).
      layers: number of layers that are concatenated; each gets its own factor.

    Returns:
      A scalar for one layer, otherwise (d,).
    """
    n, d = acts.shape
    width = d // layers
    parts = acts.astype(jnp.float32).reshape(n, layers, width)
    unit = _power_of_two(jnp.abs(parts).max(axis=(0, 2)))
    squares = jnp.square(parts / unit[:, None]).sum(-1).mean(0)
    scales = jnp.sqrt(width / squares) / unit
    return scales[0] if layers == 1 else jnp.repeat(scales, width)


def heaviness(x: Float[Array, "n d"]) -> Float[Array, ""]:
    """Return E|c|^4 / (E|c|^2)^2 with c = x - E x: 1 where all deviations are of one size, large with heavy tails.

    Args:
      x: activations, scaled to a mean squared norm of about d, (n, d).
    """
    squares = jnp.square(x - x.mean(0)).mean(1)
    return jnp.square(squares).mean() / jnp.maximum(jnp.square(squares.mean()), 1e-30)


def remainder(x: Float[Array, "n d"], k: int) -> Float[Array, ""]:
    """Return the share of the variance of x that lies outside its k leading principal components, from 0 to 1.

    The components are found by subspace iteration (Halko et al. 2011, arXiv 0909.4061, algorithm 4.4).

    Args:
      x: activations, scaled to a mean squared norm of about d, (n, d).
      k: number of components.
    """
    if k >= x.shape[1]:
        return jnp.float32(0)
    centred = x - x.mean(0)
    basis = jax.random.normal(jax.random.key(0), (x.shape[1], k))
    for _ in range(_ITERATIONS):
        basis = jnp.linalg.qr(centred.T @ (centred @ basis))[0]
    variance = jnp.maximum(jnp.square(centred).sum(), 1e-30)
    return jnp.clip(1 - jnp.square(centred @ basis).sum() / variance, 0, 1)


def check(acts: Float[Array, "n d"], where: str = "activations") -> None:
    """Check that an SAE can be trained on activations. Waits for the device.

    Args:
      acts: activations, (n, d).
      where: their name in error messages.

    Raises:
      ActivationsError: some numbers are NaN or infinite.
      DegenerateError: all are zero, all rows are equal, or float32 cannot represent sums of their squares.
    """
    with jax.ensure_compile_time_eval():  # works inside traced functions too
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
    """Return the largest power of two that is at most x, by which division is exact; 1 if float32 has none."""
    power = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, jnp.int32) & 0x7F800000, jnp.float32)
    return jnp.where((power > 0) & jnp.isfinite(power), power, 1)


def geometric_median(x: Float[Array, "n d"], iterations: int = 100) -> Float[Array, " d"]:
    """Return the point with the smallest sum of distances to all rows, by Weiszfeld's iteration from the mean."""

    def closer(_: Int[Array, ""], point: Float[Array, " d"]) -> Float[Array, " d"]:
        weights = 1 / (jnp.linalg.norm(x - point, axis=1) + 1e-6)
        return (weights @ x) / weights.sum()

    return jax.lax.fori_loop(0, iterations, closer, x.mean(0))
