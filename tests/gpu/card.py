"""The device of the GPU tier, commands run on it, and comparisons.

JSAE_REHEARSAL=cpu runs the tier on the processor, to try the tests themselves where no GPU is. What only a GPU can
show fails then.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

DEVICE = os.environ.get("JSAE_REHEARSAL", "cuda")
REHEARSED = DEVICE == "cpu"
ROOT = Path(__file__).resolve().parents[2]
_WARNED = re.compile(r"^.*(?:\w*Warning\b|\[W\d).*$", re.MULTILINE)


def environment(**variables: str) -> dict[str, str]:
    """Return the environment of a command: without the compiled programs that the session's other tests left."""
    dropped = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "JAX_PLATFORMS", "XLA_FLAGS")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return kept | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])} | variables


def start(module: str, *positional: str, **flags: object) -> subprocess.Popen[str]:
    """Start a command on the device, with every warning shown."""
    flags = {"device": DEVICE} | flags
    words = [f"--{name}" if value is True else f"--{name}={value}" for name, value in flags.items()]
    return subprocess.Popen(
        [sys.executable, "-W", "always", "-m", module, *positional, *words],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], seconds: float = 150) -> tuple[str, str]:
    """Wait for a command to succeed; return what it printed to stdout and stderr."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"not done after {seconds} s:\n{out[-2000:]}\n{err[-4000:]}") from None
    assert process.returncode == 0, f"exit code {process.returncode}:\n{out[-2000:]}\n{err[-4000:]}"
    return out, err


def warnings_in(text: str) -> list[str]:
    """Return the lines of a command's stderr that are warnings of Python, torch or XLA."""
    return _WARNED.findall(text)


def distance(ours: Any, theirs: Any) -> float:
    """Return |ours - theirs| / |theirs|, as floats of numpy; NaN is infinitely far."""
    a, b = (np.asarray(jax.device_get(array)).astype(np.float64) for array in (ours, theirs))
    assert a.shape == b.shape
    gap = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)
    return float(gap) if np.isfinite(gap) else float("inf")


def show(what: str, **figures: float) -> None:
    """Print figures; `pytest -rP` or `-s` shows them."""
    print(what, *(f"{name} {value:.3g}" for name, value in figures.items()), flush=True)
