"""One training step of jsae in a process of its own: what XLA plans for it, and what the process needed.

Run by path with the project on PYTHONPATH. The job stands in `job.json`; the answer is one line of JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any

from experiments import device
from experiments.benches import resident, shapes
from experiments.benches.shapes import Size


def main(folder: Path) -> None:
    """Answers the job in `folder`."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    device.jax_alone(job["device"])  # before jax is imported
    print(json.dumps({"versions": {}}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(_needed(job)), flush=True)


def _needed(job: dict[str, Any]) -> dict[str, int]:
    """Bytes: of temporary arrays that are planned, before the first step, and the most during some steps."""
    import jax

    from jsae import train

    size = Size(*job["size"])
    x = shapes.activations(size)
    state = shapes.begin(job["architecture"], size, x)
    program = train.make_step(shapes.train_config(size, job["matmul_dtype"]), size.d_sae).lower(state, x).compile()
    state = jax.block_until_ready(state)
    card = None if job["device"] == "cpu" else jax.devices()[0]
    before = resident.forget_peak() if card is None else card.memory_stats()["bytes_in_use"]
    for _ in range(job["steps"]):
        state, _sums = program(state, x)
        jax.block_until_ready(state)
    most = resident.peak() if card is None else card.memory_stats()["peak_bytes_in_use"]
    return {"planned": program.memory_analysis().temp_size_in_bytes, "before": before, "peak": most}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
