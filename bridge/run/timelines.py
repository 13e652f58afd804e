"""The latents of a crosscoder over checkpoints in `stages.json` of a run, for the explorer.

No torch.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from bridge.run import exports, tables
from bridge.run.layout import Layout

MEASURES = ("norm", "corrected_norm", "strength", "present", "turn", "final", "own_density", "own_mean")
"""Measures of `bridge.stages.latents.Latents` that a timeline has, (f, m) each."""
REVISION = 2
"""Of the measures. 1, which files do not name, compared norms without regard to the unit of each checkpoint."""
_VERBS = {"appears": "appear", "grows": "grow", "rotates": "rotate", "shrinks": "shrink", "dies": "die"}
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

    @property
    def gained(self) -> Float[np.ndarray, "f m"]:
        """The gain of every latent since the checkpoint before (`gained_and_lost`)."""
        return gained_and_lost(self.level, self.measures["corrected_norm"])[0]

    @property
    def lost(self) -> Float[np.ndarray, "f m"]:
        """The loss of every latent since the checkpoint before (`gained_and_lost`)."""
        return gained_and_lost(self.level, self.measures["corrected_norm"])[1]

    @property
    def contribution(self) -> Float[np.ndarray, "f m"]:
        """Norm of what a latent writes where it fires, over the norm of typical activations of the checkpoint.

        The mean value in the checkpoint's own SAE times `corrected_norm`. Unlike a norm alone it does not depend on the
        scale of the latent's values.
        """
        return self.measures["own_mean"] * self.measures["corrected_norm"]


def levels(strength: Float[np.ndarray, "*f m"], present: Float[np.ndarray, "*f m"]) -> Float[np.ndarray, "*f m"]:
    """Return how much of latents is in every checkpoint: the larger magnitude of `strength` and `present`.

    Args:
      strength: as in `bridge.stages.latents.Latents`.
      present: likewise.
    """
    return np.maximum(np.abs(strength), np.abs(present))


def gained_and_lost(
    level: Float[np.ndarray, "f m"], corrected_norm: Float[np.ndarray, "f m"]
) -> tuple[Float[np.ndarray, "f m"], Float[np.ndarray, "f m"]]:
    """Return how much latents gained, and how much they lost, since the checkpoint before: 0 to about 1, 0 at first.

    A gain is the lesser of two rises, and 0 where one of them falls: that of the level, and that of the corrected norm
    over its largest. A loss is the lesser of the two falls. A latent that turns keeps its norm, and only its level
    changes. One whose direction another latent takes over keeps its level, and only its norm falls.

    Args:
      level: of `levels`.
      corrected_norm: as in `bridge.stages.latents.Latents`.
    """
    longest = corrected_norm.max(1, keepdims=True)
    norm = np.divide(corrected_norm, longest, out=np.zeros_like(corrected_norm), where=longest > 0)
    changes = np.stack([np.diff(level), np.diff(norm)])
    gained, lost = (np.pad(np.maximum(part.min(0), 0), ((0, 0), (1, 0))) for part in (changes, -changes))
    return gained, lost


def counted(events: Iterable[str]) -> str:
    """Return how many events there are of every kind, in words: "27 appear, 66 rotate"."""
    counts = Counter(events)
    return ", ".join(f"{counts[kind]:,} {verb}" for kind, verb in _VERBS.items() if counts[kind])


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
        if table.get("revision") != REVISION:
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
