"""Statistics of activations, as sums over shards that are added in their order: they do not depend on interruptions."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from jsae import jsons
from jsae.health import Extent, degenerate

QUANTILES = (0.001, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999)
SAMPLED_ROWS, SAMPLED_VALUES = 128, 512
"""Rows, and single numbers, of a shard that quantiles are computed from."""
_PIECE = 4096  # rows that are converted at once


@dataclass(frozen=True)
class Sums:
    """Sums over the rows of a shard, or of several, that count."""

    kept: int
    total: np.ndarray
    """(d,) float64."""
    square: float
    """Sum of squared norms."""
    largest: float
    """Largest magnitude."""
    norms: np.ndarray
    """Norms of a sample of rows, float32."""
    values: np.ndarray
    """A sample of single numbers, float32."""

    @classmethod
    def of_shard(cls, acts: Any, kept: np.ndarray, width: int, shard: int) -> Sums:
        """Return the sums of a shard.

        Args:
          acts: a function of (start, stop) that returns rows of the shard as float32.
          kept: (n,), which rows count.
          width: numbers in a row.
          shard: its number, the seed of the samples of rows that count (without replacement) and of their numbers.
        """
        indices = np.flatnonzero(kept)
        rng = np.random.default_rng((0x5A3, shard))
        rows = rng.permutation(len(indices))[:SAMPLED_ROWS]
        cells = rng.integers(0, max(len(indices), 1) * width, SAMPLED_VALUES if len(indices) else 0)
        norms, values = np.empty(len(rows), np.float32), np.empty(len(cells), np.float32)
        total, square, largest, seen = np.zeros(width), 0.0, 0.0, 0
        for start in range(0, len(kept), _PIECE):
            x, mask = acts(start, min(start + _PIECE, len(kept))), kept[start : start + _PIECE].astype(bool)
            x = x if mask.all() else x[mask]
            squares = np.einsum("nd,nd->n", x, x, dtype=np.float64)
            total += x.sum(0, dtype=np.float64)
            square += float(squares.sum())
            largest = max(largest, float(np.abs(x).max(initial=0)))
            inside = (rows >= seen) & (rows < seen + len(x))
            norms[inside] = np.sqrt(squares[rows[inside] - seen])
            inside = (cells >= seen * width) & (cells < (seen + len(x)) * width)
            values[inside] = x.reshape(-1)[cells[inside] - seen * width]
            seen += len(x)
        return cls(len(indices), total, square, largest, norms, values)

    @classmethod
    def added(cls, parts: Iterable[Sums], width: int) -> Sums:
        """Return the sums over several shards, added in the given order."""
        kept, total, square, largest = 0, np.zeros(width), 0.0, 0.0
        norms, values = [np.empty(0, np.float32)], [np.empty(0, np.float32)]
        for part in parts:
            kept, total, square = kept + part.kept, total + part.total, square + part.square
            largest = max(largest, part.largest)
            norms.append(part.norms)
            values.append(part.values)
        return cls(kept, total, square, largest, np.concatenate(norms), np.concatenate(values))

    def to_json(self) -> dict[str, Any]:
        """Return the sums as JSON values; arrays as base64 of little-endian numbers."""
        return {
            "kept": self.kept,
            "total": _packed(self.total, "<f8"),
            "square": self.square,
            "largest": self.largest,
            "norms": _packed(self.norms, "<f4"),
            "values": _packed(self.values, "<f4"),
        }

    @classmethod
    def from_json(cls, values: Any, width: int) -> Sums:
        """Return sums from JSON values.

        Raises:
          ValueError: they are not sums of activations of this width.
        """
        if not isinstance(values, dict) or set(values) != set(cls.__dataclass_fields__):
            raise ValueError("it has no sums of activations")
        kept, square, largest = values["kept"], values["square"], values["largest"]
        if not isinstance(kept, int) or isinstance(kept, bool) or not 0 <= kept < 2**48:
            raise ValueError("its number of rows is not one")
        if not jsons.is_finite(square) or not jsons.is_finite(largest):
            raise ValueError("its sums are not finite numbers")
        arrays = {name: _unpacked(values[name], dtype) for name, dtype in _TYPES.items()}
        if len(arrays["total"]) != width or len(arrays["norms"]) > SAMPLED_ROWS:
            raise ValueError(f"its sums are not of activations of width {width}")
        return cls(kept, arrays["total"], float(square), float(largest), arrays["norms"], arrays["values"])


@dataclass(frozen=True)
class Statistics:
    """Statistics of the rows of a hook that count."""

    kept: int
    """Number of these rows."""
    mean: np.ndarray
    """(d,) float64."""
    mean_squared_norm: float
    largest: float
    """Largest magnitude of a number."""
    norm_quantiles: dict[str, float]
    """Quantiles of the norms of a sample of rows, 128 of every shard."""
    value_quantiles: dict[str, float]
    """Quantiles of a sample of single numbers, 512 of every shard."""

    @property
    def mean_norm(self) -> float:
        """Norm of the mean."""
        return float(np.linalg.norm(self.mean))

    def problem(self, where: str) -> str | None:
        """Return why no SAE can learn from the activations; None if one can.

        Args:
          where: their name in the text.
        """
        square = self.mean_squared_norm
        variance = 1 - self.mean_norm**2 / square if square else 0.0
        return degenerate(Extent(self.largest, (square / len(self.mean)) ** 0.5, variance, 0), where)

    @classmethod
    def from_sums(cls, sums: Sums) -> Statistics:
        """Return the statistics of some sums."""
        count = max(sums.kept, 1)
        quantiles = [_quantiles(sample) for sample in (sums.norms, sums.values)]
        return cls(sums.kept, sums.total / count, sums.square / count, sums.largest, *quantiles)

    def to_json(self) -> dict[str, Any]:
        """Return the statistics as JSON values; the mean as base64 of little-endian float64."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__} | {
            "mean": _packed(self.mean, "<f8"),
            "mean_norm": self.mean_norm,
        }

    @classmethod
    def from_json(cls, values: Any, width: int) -> Statistics:
        """Return statistics from JSON values.

        Raises:
          ValueError: they are not statistics of activations of this width.
        """
        names = set(cls.__dataclass_fields__)
        if not isinstance(values, dict) or set(values) != names | {"mean_norm"}:
            raise ValueError("it has no statistics of activations")
        mean = _unpacked(values["mean"], "<f8")
        numbers = [values[name] for name in ("kept", "mean_squared_norm", "largest")]
        tables = [values[name] for name in ("norm_quantiles", "value_quantiles")]
        if len(mean) != width or not all(map(jsons.is_finite, numbers)) or not all(map(_is_table, tables)):
            raise ValueError(f"its statistics are not of activations of width {width}")
        return cls(int(numbers[0]), mean, float(numbers[1]), float(numbers[2]), *tables)


_TYPES = {"total": "<f8", "norms": "<f4", "values": "<f4"}


def _quantiles(sample: np.ndarray) -> dict[str, float]:
    if not len(sample):
        return {}
    return {f"{q:g}": float(value) for q, value in zip(QUANTILES, np.quantile(sample, QUANTILES), strict=True)}


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) and len(value) <= len(QUANTILES) and all(map(jsons.is_finite, value.values()))


def _packed(array: np.ndarray, dtype: str) -> str:
    return base64.b64encode(np.ascontiguousarray(array, dtype).tobytes()).decode()


def _unpacked(text: Any, dtype: str) -> np.ndarray:
    """Return an array from base64; raise ValueError where it is none or holds numbers that are not finite."""
    if not isinstance(text, str):
        raise ValueError("an array is not written in base64")
    data = base64.b64decode(text, validate=True)
    if len(data) % np.dtype(dtype).itemsize:
        raise ValueError("an array ends within a number")
    array = np.frombuffer(data, dtype).astype(dtype[1:])
    if not math.isfinite(float(np.abs(array).max(initial=0))):
        raise ValueError("an array holds numbers that are not finite")
    return array
