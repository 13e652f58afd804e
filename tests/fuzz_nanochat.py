"""Damage checkpoints at random: `python -m tests.fuzz_nanochat 300` prints the outcomes, and fails at a traceback."""

import collections
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bridge import nanochat

Change = Callable[[bytes, np.random.Generator], bytes]


def flip(data: bytes, rng: np.random.Generator) -> bytes:
    """Flip one to four bits, often near the beginning or the end, where the structure is."""
    changed = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        low, high = [(0, len(data)), (0, min(len(data), 4096)), (max(0, len(data) - 4096), len(data))][rng.integers(3)]
        changed[rng.integers(low, high)] ^= 1 << rng.integers(8)
    return bytes(changed)


def cut(data: bytes, rng: np.random.Generator) -> bytes:
    """Truncate the file at a random position."""
    return data[: rng.integers(len(data))]


def repeat(data: bytes, rng: np.random.Generator) -> bytes:
    """Insert a copy of a piece of the file."""
    start, place = rng.integers(len(data)), rng.integers(len(data))
    return data[:place] + data[start : start + rng.integers(1, 200)] + data[place:]


def swap(data: bytes, rng: np.random.Generator) -> bytes:
    """Overwrite a few bytes with numbers that often break readers."""
    changed = bytearray(data)
    place = rng.integers(min(len(data), 8192))
    value = [b"\xff" * 8, b"\x00" * 8, b"\x80\x00\x00\x00", b"}", b"[", b"1e999", b"-1"][rng.integers(7)]
    changed[place : place + len(value)] = value
    return bytes(changed)


CHANGES: tuple[Change, ...] = (flip, cut, repeat, swap)


def damage(source: Path, target: Path, seed: int) -> Path:
    """Copy a checkpoint and damage one of its files; return that file."""
    rng = np.random.default_rng(seed)
    shutil.copytree(source, target)
    files = sorted(p for p in target.rglob("*") if p.is_file() and p.suffix != ".py")
    file = files[rng.integers(len(files))]
    file.write_bytes(CHANGES[rng.integers(len(CHANGES))](file.read_bytes(), rng))
    return file


def outcome(path: Path) -> str:
    """Load a checkpoint; return "loaded" or the line of its error. Unexpected exceptions are not caught."""
    with warnings.catch_warnings(action="ignore"):
        try:
            nanochat.load(path)
        except (ValueError, OSError) as error:
            message = str(error)
            if not message or "\n" in message or len(message) > 3000:
                raise AssertionError(f"not one line: {message[:3000]!r}") from error
            return message
    return "loaded"


def main() -> None:
    """Damage every loadable case of the foreign checkpoints with many seeds."""
    from tests.foreign_table import FOREIGN

    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    for source in sorted(FOREIGN.glob("*/checkpoint")):
        found: collections.Counter[str] = collections.Counter()
        for seed in range(seeds):
            with tempfile.TemporaryDirectory() as folder:
                file = damage(source, Path(folder) / "checkpoint", seed)
                try:
                    found["loaded" if outcome(file.parent) == "loaded" else "refused"] += 1
                except BaseException:
                    print(f"{source.parent.name}, seed {seed}, {file.name}")
                    raise
        print(f"{source.parent.name}: {found['loaded']} loaded, {found['refused']} refused in one line", flush=True)


if __name__ == "__main__":
    main()
