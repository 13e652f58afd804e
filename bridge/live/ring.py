"""Memory that two processes share: slots for rows of activations. It has no name, so nothing of it outlives them."""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jsae.settings import Json

_SHARED = Path("/dev/shm")


@dataclass(frozen=True)
class Shape(Json):
    """The shape of a ring."""

    slots: int
    rows: int
    """Most rows of a slot."""
    hooks: int
    width: int

    @property
    def size(self) -> int:
        """Bytes."""
        return 4 * self.slots * self.hooks * self.rows * self.width


class Ring:
    """Slots of float32 rows, each for several hooks.

    Args:
      shape: its shape.
      descriptor: of the memory, in the process that was given it; None makes it.

    Raises:
      OSError: there is no room for it.
    """

    def __init__(self, shape: Shape, descriptor: int | None = None):
        self.descriptor = _new(shape.size) if descriptor is None else descriptor
        self._map = mmap.mmap(self.descriptor, shape.size)
        flat = np.frombuffer(self._map, np.float32)
        self._slots = flat.reshape(shape.slots, shape.hooks, shape.rows, shape.width)

    def write(self, slot: int, parts: Sequence[Float[np.ndarray, "_ _"]]) -> None:
        """Copy rows into a slot."""
        for place, part in zip(self._slots[slot], parts, strict=True):
            place[: len(part)] = part

    def read(self, slot: int, rows: int) -> list[Float[np.ndarray, "_ _"]]:
        """Return the rows of a slot, views that the other process may write to once it is told that they were read."""
        return [place[:rows] for place in self._slots[slot]]


def _new(size: int) -> int:
    """Return a descriptor of an unlinked file of some bytes, which are taken at once; in memory if there is room.

    Raises:
      OSError: there is no room on the disk either.
    """
    if os.access(_SHARED, os.W_OK):
        with contextlib.suppress(OSError):
            return _file(str(_SHARED), size)
    return _file(None, size)


def _file(folder: str | None, size: int) -> int:
    with tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)  # writing to a hole on a full disk would end the process
        else:
            os.ftruncate(file.fileno(), size)
        return os.dup(file.fileno())
