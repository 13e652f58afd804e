"""One training step of jsae in its own process: the memory that XLA plans for it, and what the process needed.

Run by path with the project on PYTHONPATH. Reads the job from `job.json` and answers every line with a line of JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any

from bridge.training import device
from experiments.benches import resident, shapes
from experiments.benches.shapes import Size


def main(folder: Path) -> None:
    """Do the job in `folder`, once for every line on stdin."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    device.jax_alone(job["device"])  # before jax is imported
    print(json.dumps({"versions": {}}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(_needed(job)), flush=True)


def _needed(job: dict[str, Any]) -> dict[str, int]:
    """Return bytes: planned for temporary arrays, in use before the first step, and the peak during some steps."""
    import jax

    size = Size(*job["size"])
    x, member = shapes.activations(size), shapes.member(job["architecture"], size, job["matmul_dtype"])
    states = shapes.begin(member, x)
    program = shapes.program(member).lower(states, (x,)).compile()
    states = jax.block_until_ready(states)
    gpu = None if job["device"] == "cpu" else jax.devices()[0]
    before = resident.forget_peak() if gpu is None else gpu.memory_stats()["bytes_in_use"]
    for _ in range(job["steps"]):
        states, _sums = program(states, (x,))
        jax.block_until_ready(states)
    peak = resident.peak() if gpu is None else gpu.memory_stats()["peak_bytes_in_use"]
    return {"planned": program.memory_analysis().temp_size_in_bytes, "before": before, "peak": peak}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
