"""Memory of a training step beyond weights, moments and the batch, in jsae and in the other trainers.

`planned` is what XLA reserves for temporary arrays of the compiled step. `needed` is measured: the peak of resident
memory of a separate process during some steps, less what was resident before them with all permanent arrays in place
(on a GPU: memory from the allocator; jax's peak counts from the start of the process and includes its compiler's
trials). Torch allocates its moments in the first step, so the others first take one on a few activations. Both are
also given in arrays of (batch, d_sae) float32, the size of the pre-activations. Linux only.

The trainers have their own environment, --peer_env, which is created if it does not exist (pip, about 2 GB).
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bridge.accelerators import require_torch
from bridge.locations import FilePath
from bridge.settings import flag
from experiments.benches import contest, peers, shapes, tables, timing
from experiments.benches.contest import OURS, TRAINERS
from experiments.benches.shapes import Dtype, Size
from jsae.progress import Progress

SCRIPT = Path(__file__).with_name("memory_side.py")
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Config:
    """Sizes and trainers of the measurement."""

    sizes: tuple[str, ...] = flag((shapes.SIZE,), shapes.SIZES_HELP)
    architectures: tuple[str, ...] = flag((), "Architectures; none is all.")
    trainers: tuple[str, ...] = flag(tuple(TRAINERS), "Trainers beside jsae, each for the architectures that it has.")
    steps: int = flag(3, "Steps during which the peak of memory is measured.")
    matmul_dtype: Dtype = flag("float32", shapes.DTYPE_HELP)
    device: Literal["cpu", "cuda"] = flag("cpu", "Device of all trainers.")
    autocast: bool = flag(False, "On a GPU: let the other trainers multiply in bfloat16.")
    markdown: bool = flag(False, "Print the table as Markdown.")
    peer_env: FilePath = flag(peers.TRAINERS_HOME, "The virtual environment of the other trainers.")
    out: FilePath = flag("experiments/results/memory_{device}.json", "File for the results.")

    def __post_init__(self) -> None:
        known = shapes.known_architectures()
        object.__setattr__(self, "architectures", self.architectures or known)
        shapes.check(self.sizes, self.architectures, known)
        contest.check(self.trainers, self.autocast, self.device)
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if sys.platform != "linux":
            raise ValueError(f"memory is measured on linux only, this is {sys.platform}")


def main(config: Config) -> int:
    """Measure all trainers, print a table, write the results."""
    require_torch(config.device)
    python = peers.trainers(config.peer_env) if config.trainers else None
    cases = [
        (size, architecture, name)
        for size in map(Size.parse, config.sizes)
        for architecture in config.architectures
        for name in (OURS, *(trainer for trainer in config.trainers if architecture in TRAINERS[trainer]))
    ]
    machine, settings = timing.machine(config.device), timing.settings(config, "peer_env", "device")
    out, results = config.out.format(device=config.device), []
    with Progress("measuring memory", len(cases), "steps") as progress:
        for size, architecture, name in cases:
            ours = name == OURS
            needed = _ours(config, size, architecture) if ours else _theirs(config, python, size, architecture, name)
            results.append(_row(size, architecture, name, needed))
            timing.write(out, {"machine": machine, "settings": settings, "results": results})
            progress.advance()
    tables.show("memory of one training step", _COLUMNS, _cells(results), machine, config.markdown)
    print(f"figures: {out}")
    return 0


def _ours(config: Config, size: Size, architecture: str) -> dict[str, int]:
    names = ("steps", "device", "matmul_dtype")
    job = {"size": size, "architecture": architecture} | {name: getattr(config, name) for name in names}
    variables = {"PYTHONPATH": str(_ROOT), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "job.json").write_text(json.dumps(job), encoding="utf-8")
        with peers.process(sys.executable, SCRIPT, Path(folder), variables) as (_, ask):
            return ask({})


def _theirs(config: Config, python: Path | str, size: Size, architecture: str, name: str) -> dict[str, int]:
    settings = {"threads": None, "autocast": config.autocast, "warmup_steps": 0}
    with contest.sides(python, [name], size, architecture, config.device, settings, matmul=False) as (_, asks):
        return asks[name]({"do": "peak", "steps": config.steps})


def _row(size: Size, architecture: str, trainer: str, memory: dict[str, int]) -> dict[str, Any]:
    """Return one result: the memory in bytes, and in arrays of (batch, d_sae) float32."""
    array = 4 * size.batch * size.d_sae
    counts = {"needed": memory["peak"] - memory["before"]}
    if "planned" in memory:
        counts["planned"] = memory["planned"]
    return {
        "size": size._asdict(),
        "architecture": architecture,
        "trainer": trainer,
        "bytes": counts | {"before": memory["before"]},
        "arrays": {name: count / array for name, count in counts.items()},
    }


_COLUMNS = ("size", "architecture", "trainer", "needed, arrays", "needed, MB", "planned, arrays", "planned, MB")


def _cells(results: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    rows = []
    for row in results:
        figures = []
        for name in ("needed", "planned"):
            known = name in row["arrays"]
            figures.append(f"{row['arrays'][name]:.2f}" if known else "")
            figures.append(f"{row['bytes'][name] / 1e6:.0f}" if known else "")
        rows.append((str(Size(**row["size"])), row["architecture"], row["trainer"], *figures))
    return rows
