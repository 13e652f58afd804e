"""The latents of a crosscoder over checkpoints in `stages.json` of a run, for the explorer.

No torch.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from bridge.run import exports, tables
from bridge.run.layout import Layout

MEASURES = ("norm", "corrected_norm", "strength", "present", "turn", "final", "own_density", "own_mean")
"""Measures of `bridge.stages.latents.Latents` that a timeline has, (f, m) each."""
_COMMAND = "python -m experiments.diff --run_dir="


@dataclasses.dataclass(frozen=True)
class Timeline:
    """Measures of all latents of one crosscoder in every checkpoint."""

    names: list[str]
    """Of the checkpoints, in their order."""
    steps: list[int | None]
    """Steps that were named; None is the last of a checkpoint's folder."""
    kinds: list[str]
    """Of the latents."""
    events: list[tuple[int, str, int]]
    """Latent, kind of event, number of the later checkpoint."""
    measures: dict[str, Float[np.ndarray, "f m"]]
    """By the names of `MEASURES`."""

    @property
    def level(self) -> Float[np.ndarray, "f m"]:
        """The `levels` of all latents in every checkpoint."""
        return levels(self.measures["strength"], self.measures["present"])

    @property
    def change(self) -> Float[np.ndarray, "f m"]:
        """The distance that every latent moves from the checkpoint before; 0 in the first.

        The distance of two vectors as long as the latent's levels there, with the angle between its corrected rows:
        sqrt(a^2 + b^2 - 2 a b turn). It is large where a latent appears, dies or rotates.
        """
        before, now = self.level[:, :-1], self.level[:, 1:]
        square = before**2 + now**2 - 2 * before * now * self.measures["turn"][:, 1:]
        return np.pad(np.sqrt(np.maximum(square, 0)), ((0, 0), (1, 0)))


def levels(strength: Float[np.ndarray, "*f m"], present: Float[np.ndarray, "*f m"]) -> Float[np.ndarray, "*f m"]:
    """Return how much of latents is in every checkpoint: the larger magnitude of `strength` and `present`.

    Args:
      strength: as in `bridge.stages.latents.Latents`.
      present: likewise.
    """
    return np.maximum(np.abs(strength), np.abs(present))


def read(run: str | Path, name: str) -> Timeline | None:
    """Return what `stages.json` says of a crosscoder; None if it says nothing, or is of a former one or version.

    Raises:
      ValueError: the file is broken.
    """
    file = Layout(run).table_file("stages")
    table = tables.read(file).get(name) if file.is_file() else None
    if table is None:
        return None
    try:
        if "crosscoder" not in table or "final" not in table["latents"]:
            return None  # an earlier version wrote it
        found = _parsed(table)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        advice = f"`{_COMMAND}{run}` writes it anew: {type(error).__name__}: {error}"
        raise ValueError(f"{file} is broken at {name}, {advice}") from error
    if exports.known_digest(Layout(run).sae_folder(name)) not in (None, table["crosscoder"]):
        print(f"note: {file} is of an earlier crosscoder of {name}, and is not shown", file=sys.stderr)
        return None
    return found


def _parsed(table: Mapping[str, Any]) -> Timeline:
    """Return the timeline in a table, whose shapes agree."""
    names = [str(checkpoint["name"]) for checkpoint in table["checkpoints"]]
    steps = [checkpoint["step"] for checkpoint in table["checkpoints"]]
    kinds = [str(kind) for kind in table["kinds"]]
    measures = {measure: matrix(table["latents"][measure], len(kinds), len(names)) for measure in MEASURES}
    stages = {name: number for number, name in enumerate(names)}
    events = [(int(event["latent"]), str(event["kind"]), stages[event["stage"]]) for event in table["events"]]
    if any(not 0 <= latent < len(kinds) for latent, _, _ in events):
        raise ValueError("events of latents that do not exist")
    if any(step is not None and not isinstance(step, int) for step in steps):
        raise ValueError("steps are whole numbers")
    return Timeline(names, steps, kinds, events, measures)


def matrix(rows: Sequence[Sequence[float | None]], latents: int, checkpoints: int) -> Float[np.ndarray, "f m"]:
    """Return numbers of latents by checkpoint from JSON; null is NaN.

    Raises:
      ValueError: another shape, or no numbers.
    """
    values = np.array(rows, np.float64)
    if values.shape != (latents, checkpoints):
        raise ValueError(f"numbers of shape {values.shape}, expected {(latents, checkpoints)}")
    return values
