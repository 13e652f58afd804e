"""Several processes that train together (`jax.distributed`): what they agree on and exchange beside the steps.

Every process calls the same functions in the same order. With a single process nothing is exchanged.
"""

import contextlib
import hashlib
import itertools
import json
import re
import socket
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jsae import axes, jsons

Tree = TypeVar("Tree")
_YEAR = 365 * 24 * 3600
_ROWS = 2**26  # numbers of an array that are gathered at once
_LOST = re.compile(r"gloo|nccl|coordination.?service|heartbeat|UNAVAILABLE|DEADLINE_EXCEEDED", re.IGNORECASE)
_LOST_SERVICE = re.compile(r"CoordinationService|coordination service", re.IGNORECASE)
_barriers = itertools.count()


class OtherProcessError(OSError):
    """Another process failed; names it and says why."""


class SharedError(Exception):
    """An error that every process has, raised by all but the first, which raises the error itself."""


def count() -> int:
    """Return the number of processes. Starts jax's device."""
    return jax.process_count()


def is_first() -> bool:
    """Return whether this process writes and prints for all."""
    return jax.process_index() == 0


def gather(value: Any) -> list[Any]:
    """Return the value of every process, JSON values, in the order of the processes."""
    if count() == 1:
        return [value]
    own = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(own))))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(own)] = own
    texts = np.asarray(multihost_utils.process_allgather(padded))
    return [jsons.loads(text[:size].tobytes().decode()) for text, size in zip(texts, sizes, strict=True)]


def any_of(flag: bool) -> bool:
    """Return whether the flag is set in some process."""
    return any(gather(flag))


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Raise an error of one process in all, at the end of the context, so that none waits for a process that ended.

    Raises:
      OtherProcessError: in processes without an error; names the first process that has one.
      SharedError: in later processes with the same error as an earlier one.
    """
    failure: BaseException | None = None
    try:
        yield
    except Exception as error:
        failure = error
    text = None if failure is None else f"{type(failure).__name__}: {failure}"
    texts = gather(text)
    if failure is not None:
        if text in texts[: jax.process_index()]:
            raise SharedError from failure
        raise failure
    for number, other in enumerate(texts):
        if other is not None:
            if not is_first():
                raise SharedError
            raise OtherProcessError(f"process {number} of {count()} ended: {other}")


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """Describe an error of jax that is due to another process.

    Raises:
      ConnectionError: a process has ended, or cannot be reached.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, OSError) as error:
        line = " ".join(str(error).split())
        signs = _LOST if isinstance(error, jax.errors.JaxRuntimeError) else _LOST_SERVICE  # paths are in the latter
        if jax.process_count() == 1 or not signs.search(line):
            raise
        raise ConnectionError(
            "another process of the run has ended or cannot be reached; its own message says why, unless it was "
            f"killed. --resume continues from the last checkpoint ({line[-200:]})"
        ) from error


@contextlib.contextmanager
def same_everywhere(*kinds: type[Exception]) -> Iterator[None]:
    """Leave an error that every process has to the first one.

    Args:
      kinds: the errors that follow from values all processes have. Any other passes: it may be the loss of another
        process, which the first one cannot report if it is the one that was lost.

    Raises:
      SharedError: an error of these kinds in any process but the first.
    """
    try:
        yield
    except kinds as error:
        if is_first():
            raise
        raise SharedError from error


def on_first(function: Callable[[], Tree], interrupted: bool = False) -> Tree:
    """Return what a function returns in the first process, JSON values, in all, which wait for it.

    Args:
      function: called in the first process only.
      interrupted: this process was interrupted before the call and has not raised it.

    Raises:
      KeyboardInterrupt: some process was interrupted; in all.
      Exception: what it raises there; `SharedError` in the others.
    """
    if count() == 1 and not interrupted:
        return function()
    result: Any = None
    failure: BaseException | None = None
    try:
        if interrupted:
            raise KeyboardInterrupt
        result = function() if is_first() else None
    except (Exception, KeyboardInterrupt) as error:
        failure = error
    try:
        wait_for_all()  # it may have taken longer than devices wait for each other
    except KeyboardInterrupt as interrupt:  # raised when the wait is over
        failure = failure or interrupt
    if any_of(isinstance(failure, KeyboardInterrupt)):
        raise failure if isinstance(failure, KeyboardInterrupt) else KeyboardInterrupt
    with together():
        if failure is not None:
            raise failure
    return gather(result)[0]


def check_same(name: str, value: Any) -> None:
    """Check that a value, JSON values, is the same in all processes.

    Raises:
      OtherProcessError: it is not; names the processes.
    """
    if count() == 1:
        return
    digests = gather([hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest(), socket.gethostname()])
    others = [f"{number} on {host}" for number, (digest, host) in enumerate(digests) if digest != digests[0][0]]
    if others:
        with same_everywhere(OtherProcessError):
            raise OtherProcessError(
                f"{name} of process {', '.join(others)} differ from those of process 0: start all of them alike"
            )


def wait_for_all() -> None:
    """Wait until every process calls this, however long it takes; without work for a device."""
    if count() == 1:
        return
    from orbax.checkpoint import multihost

    multihost.get_barrier_sync_fn(processes=set(range(count())))(key=f"jsae-{next(_barriers)}", timeout_ms=1000 * _YEAR)


# ---- arrays --------------------------------------------------------------------------------------------------------


def batch_of(rows: Float[Array, "n d"], mesh: Mesh) -> Float[Array, "N d"]:
    """Return the batch that the rows of all processes make, divided over all devices; nothing is copied.

    Args:
      rows: those of this process, on its device.
      mesh: the devices of all processes.
    """
    rows, sharding = jnp.asarray(rows), NamedSharding(mesh, axes.BATCH)
    shape = (len(rows) * count(), *rows.shape[1:])
    if len(sharding.addressable_devices) == 1:
        return jax.make_array_from_single_device_arrays(shape, sharding, [rows])
    return jax.make_array_from_process_local_data(sharding, np.asarray(rows), shape)


def sample_of(rows: Float[Array, "n d"], parts: int, mesh: Mesh | None) -> Float[Array, "N d"]:
    """Return the rows of all processes, the same on every device: the first row of every part, the second, and so on.

    Args:
      rows: those of this process, one part of the data after the other.
      parts: number of parts in it.
      mesh: the devices of all processes; None: one device.
    """
    if mesh is not None and count() > 1:
        everyone = np.asarray(multihost_utils.process_allgather(rows, tiled=True))
        rows, parts = jnp.asarray(everyone), parts * count()
    rows = rows.reshape(parts, -1, rows.shape[1]).swapaxes(0, 1).reshape(rows.shape) if parts > 1 else rows
    return rows if mesh is None else jax.device_put(rows, NamedSharding(mesh, PartitionSpec()))


def fetch(tree: Tree) -> Tree:
    """Return the arrays of a tree as numpy arrays in every process, whatever devices they are divided over."""
    if all(map(_is_here, jax.tree.leaves(tree))):
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def _is_here(leaf: Any) -> bool:
    """Return whether this process has all of an array."""
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated


def fetch_to_first(tree: Tree) -> Tree:
    """Return the arrays of a tree as numpy arrays in the first process; those of others have no meaning.

    Large arrays are gathered a few rows at a time, so that a device never holds a whole one.
    """

    def one(leaf: Array) -> np.ndarray:
        if _is_here(leaf):
            return np.asarray(leaf)
        rows = max(_ROWS // max(leaf.size // len(leaf), 1), 1)
        whole = np.empty(leaf.shape, leaf.dtype) if is_first() else None
        for start in range(0, len(leaf), rows):
            part = multihost_utils.process_allgather(leaf[start : start + rows], tiled=True)
            if whole is not None:
                whole[start : start + rows] = part
        return np.empty((0, *leaf.shape[1:]), leaf.dtype) if whole is None else whole

    return jax.tree.map(one, tree)
