"""Checkpoints: the only importer of Orbax. Everything a run needs to go on to the same numbers, written atomically."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from jsae.config import ConfigError
from jsae.train import States


class Restored(NamedTuple):
    """What a checkpoint held."""

    step: int
    states: States
    notes: dict[str, Any]


class Checkpoints:
    """The checkpoints of a run: the latest few and the one with the lowest `fvu`. A context manager.

    Writing goes on in the background and ends with a rename, so that a run killed at any moment leaves whole
    checkpoints only.

    Args:
      folder: where they lie; made if it does not exist.
      keep: how many of the latest stay.
    """

    def __init__(self, folder: Path, keep: int = 2):
        keeping = [policies.LatestN(keep), policies.BestN(get_metric_fn=lambda m: m["fvu"], reverse=True, n=1)]
        self._folder = folder
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(keeping),
                cleanup_tmp_directories=True,
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def latest(self) -> int | None:
        """The last step there is a checkpoint of."""
        return self._manager.latest_step()

    def save(self, step: int, states: States, notes: dict[str, Any], fvu: float) -> None:
        """Saves the states and JSON notes (the stream's cursor); returns as soon as the states may be donated again.

        Raises:
          OSError: an earlier save failed to write (a full disk); earlier checkpoints are whole.
        """
        # Orbax may still read the buffers after it returns, and the next step reuses them: hand it a copy.
        mine = jax.tree.map(jnp.copy, states)
        args = ocp.args.Composite(states=ocp.args.StandardSave(mine), notes=ocp.args.JsonSave(notes))
        self._manager.save(step, args=args, metrics={"fvu": fvu}, force=True)

    def wait(self) -> None:
        """Returns when everything is written.

        Raises:
          OSError: it could not be (a full disk); earlier checkpoints are whole.
        """
        self._manager.wait_until_finished()

    def restore(self, like: States, step: int | None = None) -> Restored:
        """The checkpoint of a step (None: the latest) in the shapes and shardings of `like`, which may be abstract.

        Raises:
          FileNotFoundError: there is none.
          ConfigError: it holds states of other shapes, so another configuration.
        """
        step = self.latest() if step is None else step
        if step is None or step not in self._manager.all_steps():
            raise FileNotFoundError(
                f"no checkpoint of step {step} in {self._folder}; there are {list(self._manager.all_steps())}"
            )
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        args = ocp.args.Composite(states=ocp.args.StandardRestore(abstract), notes=ocp.args.JsonRestore())
        try:
            found = self._manager.restore(step, args=args)
        except (ValueError, KeyError) as error:
            raise ConfigError(
                f"the checkpoint of step {step} in {self._folder} does not fit this configuration: {error}"
            ) from error
        return Restored(step, found["states"], found["notes"])
