"""The letters of axes, the axes of every array, and their sharding over a mesh.

n: tokens of a batch.  d: width of the input, `d_in`.  o: width of the target, also `d_in` except in a transcoder.
f: latents, `d_sae`.  k: active latents of a token.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Both weight matrices keep one row per latent: a latent's encoder and decoder direction are contiguous, and gradients
# of sparse codes are sums of rows. Exported files contain W_enc in the usual layout, (d, f).
AXES: Mapping[str, tuple[str, ...]] = {
    "W_enc": ("f", "d"),
    "W_dec": ("f", "o"),
    "W_skip": ("o", "d"),
    "b_enc": ("f",),
    "b_gate": ("f",),
    "b_mag": ("f",),
    "r_mag": ("f",),
    "threshold": ("f",),
    "log_threshold": ("f",),
    "b_dec": ("o",),
    "since_fired": ("f",),
    "acts": ("n", "d"),
}

DATA, LATENT = "data", "latent"
"""The axes of a mesh: devices along the first divide batches, devices along the second divide the latents."""

RULES: Mapping[str, str | None] = {"n": DATA, "f": LATENT, "d": None, "o": None, "k": None}

BATCH = PartitionSpec((DATA, LATENT))
"""The partition of a batch as it comes: every device brings the rows that it has computed."""


def spec(axes: tuple[str, ...]) -> PartitionSpec:
    """Return the partition of an array with these axes.

    Raises:
      KeyError: an axis that is not in `RULES`.
      ValueError: two axes that would be sharded over the same mesh axis.
    """
    mesh_axes = tuple(RULES[axis] for axis in axes)
    used = [mesh_axis for mesh_axis in mesh_axes if mesh_axis is not None]
    if len(set(used)) != len(used):
        raise ValueError(f"axes {axes} would be sharded as {mesh_axes}: a mesh axis can shard an array only once")
    return PartitionSpec(*mesh_axes)


def make_mesh(latent: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
    """Return a mesh (data, latent) over all devices of all processes, `latent` of them sharing one copy of the SAE.

    Devices that share a copy are neighbours, so that they are on one host where it has enough of them. A batch is
    divided over all devices in this order too: the first rows are on the first device.

    Raises:
      ValueError: the number of devices is not a multiple of `latent`.
    """
    devices = jax.devices() if devices is None else devices
    devices = sorted(devices, key=lambda device: (device.process_index, device.id))
    if latent < 1 or len(devices) % latent:
        raise ValueError(f"{len(devices)} devices cannot be divided into groups of {latent} along 'latent'")
    grid = np.array(devices).reshape(-1, latent)
    # Auto: the compiler chooses the sharding of intermediate arrays.
    return Mesh(grid, (DATA, LATENT), axis_types=(AxisType.Auto,) * 2)


def shardings(tree: Any, mesh: Mesh, latent_arrays: Iterable[str] = ()) -> Any:
    """Return the sharding of every array of `tree`, by the array's name in `AXES`; other arrays are replicated.

    The moments of an optimiser have the names of their weights, so they are sharded alike.

    Args:
      tree: arrays by name, concrete or abstract.
      mesh: a mesh with the axes of `RULES`.
      latent_arrays: names of more arrays with one number per latent.
    """
    table: dict[str, tuple[str, ...]] = {**dict.fromkeys(latent_arrays, ("f",)), **AXES}

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = [str(getattr(p, "name", getattr(p, "key", ""))) for p in path]
        axes = next((table[n] for n in reversed(names) if n in table), None)
        if axes is None or len(leaf.shape) != len(axes):
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(mesh, spec(axes))

    return jax.tree_util.tree_map_with_path(sharding, tree)
