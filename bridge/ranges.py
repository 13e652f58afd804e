"""Ranges of the numbers in sampling and steering. No torch, so that commands can check them before loading it."""

import math
import sys
from collections.abc import Iterable
from typing import Any

LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 1e-45, 1e6
"""The lowest is the smallest float32; smaller ones would act as 0."""
LOWEST_SEED, HIGHEST_SEED = -(2**63), 2**63 - 1
LONGEST = 1e9
"""Largest magnitude of c in a mode whose c is a length along the decoder row."""
LARGEST_FACTOR = 1e3
"""Largest magnitude of c in a mode whose c is a factor."""
LARGEST_PRODUCT = 1e6
"""Largest product of the factors of all requests, which are applied one after the other."""
SMALLEST = 1.2e-38
"""Smallest magnitude above 0 that float32 represents with full precision; smaller ones act as 0."""
FACTORS = ("orthogonal", "scale")
"""Steering modes whose c is a factor."""
MULTIPLIED = ("additive", "orthogonal", "projection_cap")
"""Steering modes whose c is strength_multiplier * strength, as Neuronpedia defines it."""

Number = float | int


def is_finite(value: Any) -> bool:
    """Return whether a value is a number (not a bool) within the range of a float."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max


def check_number(name: str, value: Any, low: Number, high: Number) -> None:
    """Raise ValueError unless a value is a number from low to high that float32 can represent."""
    if not is_finite(value) or not low <= value <= high:
        raise ValueError(f"{name} is {shown(value)}: expected a number from {low:g} to {high:g}")
    if 0 < abs(value) < SMALLEST:
        raise ValueError(f"{name} is {value!r}, which float32 rounds to 0: give 0, or at least {SMALLEST:g}")


def check_integer(name: str, value: object, low: int, high: int) -> None:
    """Raise ValueError unless a value is an integer from low to high."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} is {shown(value)}: expected a whole number from {low} to {high}")


def check_temperature(value: Any, name: str = "temperature", highest: Number = HIGHEST_TEMPERATURE) -> None:
    """Raise ValueError unless a value is 0 or a temperature by which float32 logits can be divided."""
    if not is_finite(value) or not (value == 0 or LOWEST_TEMPERATURE <= value <= highest):
        raise ValueError(
            f"{name} must be 0, which selects the most likely token, or a number from {LOWEST_TEMPERATURE:g} to "
            f"{highest:g}, got {shown(value)}"
        )


def check_seed(value: object, name: str = "seed") -> None:
    """Raise ValueError unless a value is a signed 64-bit integer."""
    check_integer(name, value, LOWEST_SEED, HIGHEST_SEED)


def check_strength(mode: str, c: object, name: str = "strength") -> None:
    """Raise ValueError unless c is in the range of a steering mode; `ablate` ignores it."""
    if mode in FACTORS:
        check_number(f"{name}, which is a factor in the mode {mode},", c, -LARGEST_FACTOR, LARGEST_FACTOR)
    else:
        check_number(name, c, -LONGEST, LONGEST)


def check_product(requests: Iterable[tuple[str, Number]], name: str = "strength") -> None:
    """Raise ValueError if the product of the factors of requests, given as pairs (mode, c), is too large."""
    product = math.prod(max(1.0, abs(c)) for mode, c in requests if mode in FACTORS)
    if product > LARGEST_PRODUCT:
        raise ValueError(
            f"the product of the factors of {' and '.join(FACTORS)} is {product:g}, at most {LARGEST_PRODUCT:g} is "
            f"allowed: give a smaller {name}"
        )


def shown(value: object) -> str:
    """Return a value as text for an error message, with at most 60 characters."""
    if not isinstance(value, int | float | str | None):
        return f"a {type(value).__name__}"
    try:
        text = repr(value[:60] if isinstance(value, str) else value)
    except ValueError:  # an integer of more digits than Python prints
        return "an integer with too many digits"
    return text if len(text) <= 60 else text[:57] + "…"
