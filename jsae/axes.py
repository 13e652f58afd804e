"""The letters of axes, the axes of every array, and how a mesh cuts them.

n: tokens of a batch.  d: width of the input, `d_in`.  o: width of the target, `d_in` too unless it is a transcoder.
f: latents, `d_sae`.  k: active latents of a token.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Both weight matrices keep one row per latent: a latent's encoder and decoder direction are contiguous, and gradients
# of sparse codes are sums of rows. Exported files hold W_enc the field's way round, (d, f).
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

RULES: Mapping[str, str | None] = {"n": "data", "f": "latent", "d": None, "o": None, "k": None}


def spec(axes: tuple[str, ...]) -> PartitionSpec:
    """Return the partition of an array with these axes.

    Raises:
      KeyError: an axis outside the alphabet.
      ValueError: two axes that would lie on the same mesh axis.
    """
    cut = tuple(RULES[a] for a in axes)
    used = [c for c in cut if c is not None]
    if len(set(used)) != len(used):
        raise ValueError(f"axes {axes} would be cut as {cut}: a mesh axis can cut an array only once")
    return PartitionSpec(*cut)


def make_mesh(latent: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
    """Return a mesh (data, latent) over all devices of all processes, `latent` of them sharing one copy of the SAE.

    Raises:
      ValueError: the devices cannot be divided so.
    """
    devices = jax.devices() if devices is None else devices
    if latent < 1 or len(devices) % latent:
        raise ValueError(f"{len(devices)} devices cannot be divided into groups of {latent} along 'latent'")
    shape = (len(devices) // latent, latent)
    # Auto: the compiler places what lies between the arrays of the table.
    return jax.make_mesh(shape, ("data", "latent"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def shardings(tree: Any, mesh: Mesh, latent_arrays: Iterable[str] = ()) -> Any:
    """Return the sharding of every array of `tree`, found by the array's name in `AXES`; unnamed ones are replicated.

    The moments of an optimiser carry the names of the weights that they belong to, so they are cut alike.

    Args:
      tree: arrays by name.
      mesh: a mesh with the axes of `RULES`.
      latent_arrays: names of more arrays with one number per latent.
    """
    table: dict[str, tuple[str, ...]] = {**dict.fromkeys(latent_arrays, ("f",)), **AXES}

    def place(path: tuple[Any, ...], leaf: jax.Array) -> NamedSharding:
        names = [str(getattr(p, "name", getattr(p, "key", ""))) for p in path]
        axes = next((table[n] for n in reversed(names) if n in table), None)
        if axes is None or jax.numpy.ndim(leaf) != len(axes):
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(mesh, spec(axes))

    return jax.tree_util.tree_map_with_path(place, tree)
