"""Decoder directions of one SAE beside those of another: which latents of a second run write alike."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Int64

from bridge.explorer.parts import Part

NEAREST = 5
"""Latents of the other SAE to name for each."""
ALIKE = 0.7
"""Cosine from which two latents count as alike, as in `bridge.stages.survival`."""
_MOST_NUMBERS = 2**25  # in a block of cosines


def pairs(parts: Sequence[Part]) -> list[tuple[int, int]]:
    """Return the numbers of the parts to compare, (one, other): of two runs, both writing at the same hook."""
    known = [part.run.recorded_export(part.hook) is not None for part in parts]
    return [
        (i, j)
        for i, one in enumerate(parts)
        for j, other in enumerate(parts)
        if (one.beside is None) != (other.beside is None) and known[i] and known[j] and one.written == other.written
    ]


def nearest(
    rows: Float32[np.ndarray, "f d"], others: Float32[np.ndarray, "g d"]
) -> tuple[Int64[np.ndarray, "f n"], Float32[np.ndarray, "f n"]]:
    """Return for every row of unit length the others of largest cosine, and the cosines, n = min(NEAREST, g)."""
    most, step = min(NEAREST, len(others)), max(_MOST_NUMBERS // len(others), 1)
    ids, cosines = [], []
    for first in range(0, len(rows), step):
        block = rows[first : first + step] @ others.T
        best = np.argsort(-block, axis=1, kind="stable")[:, :most]
        ids.append(best)
        cosines.append(np.take_along_axis(block, best, 1))
    return np.concatenate(ids), np.concatenate(cosines)
