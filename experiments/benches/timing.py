"""Fair timing: all cases in turn in one process, compared round by round; the description of the machine."""

import dataclasses
import datetime
import importlib.metadata
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from jsae import files
from jsae.progress import Progress


def by_turns(cases: Mapping[str, Callable[[], None]], rounds: int, seed: int = 0) -> dict[str, list[float]]:
    """Return the seconds of every case in every round, after one untimed round.

    Within a round every case runs once, in a new random order, so that other load, clock speed and caches affect all
    cases alike. A case must wait for its device itself.
    """
    order, draw = list(cases), random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    plain = Console(stderr=True, force_terminal=False)  # a bar would redraw while a case is timed
    with Progress("timing", len(cases) * (rounds + 1), "cases", console=plain) as progress:
        for timed in [False] + [True] * rounds:
            draw.shuffle(order)
            for name in order:
                start = time.perf_counter()
                cases[name]()
                if timed:
                    seconds[name].append(time.perf_counter() - start)
                progress.advance()
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median and quartiles, as "median", "q1" and "q3"."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": low, "q3": high}


def ratios(seconds: Mapping[str, Sequence[float]], base: str) -> dict[str, dict[str, float]]:
    """Return spreads of every case's time over the base's in the same round."""
    return {name: spread([a / b for a, b in zip(times, seconds[base], strict=True)]) for name, times in seconds.items()}


def machine(device: str) -> dict[str, Any]:
    """Return the date, the device and the versions that a measurement belongs to.

    Args:
      device: of torch, such as "cpu" or "cuda".
    """
    import torch

    description = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "device": _cpu() if device == "cpu" else torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "jax": importlib.metadata.version("jax"),
        "python": platform.python_version(),
    }
    return description | ({"threads": torch.get_num_threads()} if device == "cpu" else {})


def settings(config: Any, *excluded: str) -> dict[str, Any]:
    """Return the fields of a measurement's config, without `out`, `markdown` and the `excluded` ones."""
    left_out = {"out", "markdown", *excluded}
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in left_out}


def write(path: str, results: Mapping[str, Any]) -> None:
    """Write results as JSON, whole or not at all; create the folder."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    files.write(Path(path), json.dumps(results, indent=2) + "\n")


def _cpu() -> str:
    """Return the name of the processor, or of its architecture if the system does not say it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
