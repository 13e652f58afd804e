"""Columns of the page on what became of latents over checkpoints: `timeline-H.js` of hook number H."""

import base64
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from bridge.run import Run, timelines
from bridge.run.timelines import Timeline
from jsae import jsons
from jsae.records.store import Store

_LARGEST = 2**30  # bytes of a file of losses


def of_hook(run: Run, store: Store) -> dict[str, Any] | None:
    """Return the columns of a hook, (f, m) each; None if its records are of no crosscoder over checkpoints.

    Raises:
      ValueError: `stages.json` or the file of losses is broken.
    """
    stage, hook = store.header.settings.get("stage"), store.header.hook
    timeline = timelines.read(run.path, hook) if stage is not None else None
    if timeline is None or len(timeline.kinds) != store.header.d_sae:
        return None
    everywhere, losses = _losses(run, hook, timeline)
    return {
        "stage": stage,
        "names": timeline.names,
        "steps": timeline.steps,
        "kinds": timeline.kinds,
        "events": timeline.events,
        "everywhere": [_number(value) for value in everywhere],
        "norm": _b64(timeline.measures["corrected_norm"]),
        "density": _b64(timeline.measures["own_density"]),
        "final": _b64(timeline.measures["final"]),
        "contribution": _b64(timeline.contribution),
        "change": _b64(timeline.change),
        "gained": _b64(timeline.gained),
        "lost": _b64(timeline.lost),
        "loss": _b64(losses),
    }


def _losses(run: Run, hook: str, timeline: Timeline) -> tuple[Sequence[float], Float[np.ndarray, "f m"]]:
    """Return the loss of every checkpoint everywhere and where each latent fires; NaN where it was not measured."""
    file, shape = run.losses_file(hook), (len(timeline.kinds), len(timeline.names))
    if not file.is_file():
        return [math.nan] * shape[1], np.full(shape, math.nan)
    try:
        table = jsons.read(file, _LARGEST)
        (everywhere,) = timelines.matrix([table["everywhere"]], 1, shape[1])
        return everywhere.tolist(), timelines.matrix(table["latents"], *shape)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} is broken, `python -m experiments.explore --run_dir={run.path} --force` writes it anew: {error}"
        ) from error


def _b64(values: Float[np.ndarray, "f m"]) -> str:
    return base64.b64encode(np.ascontiguousarray(values).astype("<f4").tobytes()).decode("ascii")


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
