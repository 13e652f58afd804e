"""Fair timing: all cases by turns in one process, compared round by round; what is told of the machine."""

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
    """Seconds of every case in every round, after one round that is not counted.

    Within a round every case runs once, in an order drawn anew, so that what else the machine does, its clock and its
    caches fall on all of them alike. A case must wait for its device itself.
    """
    order, draw = list(cases), random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    plain = Console(stderr=True, force_terminal=False)  # a bar would be drawn while a case is timed
    with Progress("timing", len(cases) * (rounds + 1), "cases", console=plain) as progress:
        for counted in [False] + [True] * rounds:
            draw.shuffle(order)
            for name in order:
                start = time.perf_counter()
                cases[name]()
                if counted:
                    seconds[name].append(time.perf_counter() - start)
                progress.advance()
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": low, "q3": high}


def ratios(seconds: Mapping[str, Sequence[float]], base: str) -> dict[str, dict[str, float]]:
    """Every case's time over the base's in the same round."""
    return {name: spread([a / b for a, b in zip(own, seconds[base], strict=True)]) for name, own in seconds.items()}


def machine(device: str) -> dict[str, Any]:
    """What a figure means nothing without."""
    import torch

    told = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "device": _cpu() if device == "cpu" else torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "jax": importlib.metadata.version("jax"),
        "python": platform.python_version(),
    }
    return told | ({"threads": torch.get_num_threads()} if device == "cpu" else {})


def settings(config: Any, *unsaid: str) -> dict[str, Any]:
    """The fields of a measurement's config but where its figures go, how they are shown, and those named."""
    left_out = {"out", "markdown", *unsaid}
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in left_out}


def write(path: str, results: Mapping[str, Any]) -> None:
    """Write results as JSON, whole or not at all; the folder is made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    files.write(Path(path), json.dumps(results, indent=2) + "\n")


def _cpu() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
