"""One of several processes that train an SAE together: `python -m mesh_worker ARCHITECTURE LATENT_SHARDS OUT`.

Every process has the same global batches of the toy world and gives its own rows of them; the first writes the state.
"""

import dataclasses
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bridge.training import joining
from jsae import axes, loop, processes
from jsae.architectures import sae_config
from jsae.config import TrainConfig

BATCH, STEPS, LATENTS = 512, 50, 64
SETTINGS = {
    "topk": {"k": 3},
    "batchtopk": {"k": 3},
    "matryoshka": {"k": 3, "nested_widths": (32,)},
    "relu": {"l1_coefficient": 0.5},
    "gated": {"l1_coefficient": 2.0, "target_l0": 2.5},
    "jumprelu": {"l0_coefficient": 0.5, "target_l0": 2.0},
}
# With a short memory of second moments, gradients that are hardly more than rounding move weights by whole steps: relu
# then differs by up to 1.6e-4 between meshes.
LONG_MEMORY = {"relu": 0.999}
RUN = TrainConfig(num_activations=BATCH * STEPS, batch_size=BATCH, learning_rate=4e-3, dead_after=2000)


def main(architecture: str, latent: int, out: Path) -> None:
    """Train from the start to the end."""
    joining.begin("cpu")
    from jsae.testing import toy  # its package computes when it is imported

    (acts,) = toy.world(BATCH * STEPS, None, 1).acts
    config = sae_config(architecture, acts.shape[1], LATENTS, **SETTINGS[architecture])
    run = dataclasses.replace(RUN, beta2=LONG_MEMORY.get(architecture, RUN.beta2))
    members = [loop.Member(config, run)]
    mesh = axes.make_mesh(latent) if processes.count() > 1 else None
    count, own = processes.count(), jax.process_index()

    def rows(start: int, size: int) -> jax.Array:
        """Return this process's part of some rows."""
        each = size // count
        return jnp.asarray(acts[start + own * each : start + (own + 1) * each])

    def batches() -> Iterator[tuple[jax.Array]]:
        for step in range(STEPS):
            local = rows(BATCH * step, BATCH)
            yield (local if mesh is None else processes.batch_of(local, mesh),)

    sample = processes.sample_of(rows(0, 4096), 4 // count, mesh)
    first = loop.init(members, (sample,), mesh=mesh)
    *_, (_, states, (sums,)) = loop.fit(members, first, batches(), loop.Programs(members, mesh=mesh))
    leaves = jax.tree_util.tree_leaves_with_path(processes.fetch((states[0], sums)))
    if processes.is_first():
        np.savez(out, **{jax.tree_util.keystr(path): leaf for path, leaf in leaves})


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
