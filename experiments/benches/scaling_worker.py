"""One of several processes that take training steps together, for `experiments.benches.scaling`.

    python -m experiments.benches.scaling_worker D_IN:D_SAE:K:BATCH ARCHITECTURE LATENT_SHARDS STEPS

Prints the seconds of every step of the first process, as JSON. The first ones compile.
"""

import json
import sys
import time

from bridge.training import device, joining
from experiments.benches import shapes


def main(size: shapes.Size, architecture: str, latent: int, steps: int) -> None:
    """Take the steps."""
    joining.begin("cpu")
    device.open_torch("cpu")
    import jax

    from jsae import axes, loop, processes

    count, own = processes.count(), jax.process_index()
    member, mesh = shapes.member(architecture, size), axes.make_mesh(latent) if processes.count() > 1 else None
    each = size.batch // count
    rows = [batch[own * each : (own + 1) * each] for batch in shapes.batches(size)]
    if mesh is not None:
        rows = [processes.batch_of(jax.numpy.asarray(part), mesh) for part in rows]
    sample = processes.sample_of(shapes.activations(size)[own * each : (own + 1) * each], 1, mesh)
    states = loop.init([member], (sample,), mesh=mesh)
    program = loop.Programs([member], mesh=mesh).at(member.train.num_steps)
    seconds = []
    for step in range(steps):
        start = time.perf_counter()
        states, _ = program(states, (rows[step % len(rows)],))
        jax.block_until_ready(states)
        seconds.append(time.perf_counter() - start)
    if processes.is_first():
        print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main(shapes.Size.parse(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
