"""Activations in the types of a store: bfloat16 and float32 as they are, int8 with a scale per row."""

import ml_dtypes
import numpy as np

from jsae.health import LARGEST, ActivationsError
from jsae.settings import ConfigError
from jsae.store.layout import Storage

_LEVELS = 127  # int8 without -128, so that it is symmetric
_COARSE = 2.0**-20  # a float16 below has fewer than five bits


def encode(acts: np.ndarray, storage: Storage, where: str, first_row: int = 0) -> dict[str, np.ndarray]:
    """Return activations as they are stored: `acts` (n, d), and with int8 `scale` (n,).

    An int8 row is `q = round(x / s)` with the smallest float16 `s >= max|x| / 127`, so that nothing is clipped and the
    error is at most s / 2; rows of zeros have s = 0.

    Args:
      acts: (n, d), of floating-point numbers.
      storage: the type.
      where: the hook, for errors.
      first_row: number of the first row, for errors.

    Raises:
      ActivationsError: numbers that are not finite, or beyond the range in which float32 holds sums of squares.
      ConfigError: int8 and activations beyond the range of float16 scales.
    """
    if storage != "int8":
        with np.errstate(over="ignore"):  # reported below
            stored = np.ascontiguousarray(acts, np.dtype(storage))
        _check_finite(_largest(stored), where, first_row)
        return {"acts": stored}
    largest = _largest(acts)
    _check_finite(largest, where, first_row)
    largest = largest.astype(np.float64)
    with np.errstate(over="ignore"):
        scale = (largest / _LEVELS).astype(np.float16)
        scale = np.where(scale.astype(np.float64) * _LEVELS < largest, np.nextafter(scale, np.float16(np.inf)), scale)
    if not np.isfinite(scale).all():
        row = int(np.argmax(~np.isfinite(scale)))
        raise ConfigError(
            f"the activations at {where} are as large as {largest[row]:.3g} in row {first_row + row}, and int8 with "
            f"float16 scales holds at most {_LEVELS * 65504:.3g}: store them as bfloat16"
        )
    if 0 < float(scale.max(initial=0)) < _COARSE:
        raise ConfigError(
            f"the activations at {where} are at most {largest.max():.3g}, too small for float16 scales: store them as "
            "bfloat16"
        )
    divisor = np.where(scale == 0, np.float32(1), scale.astype(np.float32))
    quantised = np.rint(acts.astype(np.float32) / divisor[:, None]).astype(np.int8)
    return {"acts": quantised, "scale": scale}


def decode(stored: np.ndarray, scale: np.ndarray | None, dtype: np.dtype | type | None = None) -> np.ndarray:
    """Return stored activations (n, d) as floating-point numbers.

    Args:
      stored: int8, bfloat16 or float32.
      scale: (n,) of int8, otherwise None.
      dtype: None is bfloat16 for int8, and else the type in which they are stored.
    """
    if scale is None:
        return stored if dtype is None else stored.astype(dtype, copy=False)
    numbers = stored.astype(np.float32) * scale.astype(np.float32)[:, None]
    return numbers.astype(ml_dtypes.bfloat16 if dtype is None else dtype, copy=False)


def raw_bytes(array: np.ndarray) -> memoryview:
    """Return the bytes of an array, row after row."""
    return np.ascontiguousarray(array).view(np.uint8).reshape(-1).data


def _largest(acts: np.ndarray) -> np.ndarray:
    """Return the largest magnitude of every row, (n,) float32; NaN where there is one."""
    if acts.dtype == ml_dtypes.bfloat16:  # magnitudes have the order of their bits; NaN is last
        bits = acts.view(np.uint16) & np.uint16(0x7FFF)
        return bits.max(axis=1).view(ml_dtypes.bfloat16).astype(np.float32)
    with np.errstate(over="ignore"):
        return np.maximum(acts.max(axis=1), -acts.min(axis=1)).astype(np.float32)


def _check_finite(largest: np.ndarray, where: str, first_row: int) -> None:
    """Check that rows have numbers that an SAE can be trained on, as `jsae.health` defines them."""
    unsound = ~(largest <= LARGEST)
    if unsound.any():
        row = int(np.argmax(unsound))
        value = float(largest[row])
        described = f"as large as {value:.3g}" if np.isfinite(value) else "NaN" if np.isnan(value) else "infinite"
        raise ActivationsError(
            f"the activations at {where} are {described} in row {first_row + row} ({int(unsound.sum())} rows of "
            f"{len(largest)}): check the model's weights and dtype"
        )
