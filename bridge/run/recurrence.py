"""Recurrence of latents in SAEs of other seeds: `stability.json` beside runs that were compared. No torch."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from bridge.run import exports, tables
from bridge.run.layout import Layout
from jsae import jsons, saelens, stability
from jsae.records.store import digest
from jsae.saelens.settings import CFG
from jsae.settings import require

AT_ONCE = 4096
"""Latents of an SAE that are matched without being asked: seconds for every pair of SAEs."""


@dataclasses.dataclass(frozen=True)
class Recurrence:
    """The share of SAEs that differ in their seed only in which each latent of an SAE recurs."""

    share: Float[np.ndarray, " f"]
    """Share of the others in which each latent recurs; NaN for one that is dead."""
    others: int
    """Number of the others."""
    cosine: float
    """Cosine of decoder rows from which a latent recurs."""

    def text(self, latent: int) -> str:
        """Return a sentence about a latent; "" for one of which nothing is known."""
        if not 0 <= latent < len(self.share) or math.isnan(self.share[latent]):
            return ""
        return (
            f"recurs in {round(self.share[latent] * self.others)} of {self.others} other seed{'s'[: self.others > 1]}"
        )


def read(run: str | Path, hook: str) -> Recurrence | None:
    """Return how often the latents of a run's SAE recur; None if it was not compared, or has changed since.

    Raises:
      ValueError: the file is broken.
    """
    file = Layout(run).table_file("stability")
    if not file.is_file():
        return None
    entry = tables.read(file).get(hook)
    if entry is None:
        return None
    try:
        share = np.array([math.nan if value is None else value for value in entry["recurs"]], np.float64)
        found = Recurrence(share, int(entry["others"]), float(entry["same_from_cosine"]))
        if share.ndim != 1 or found.others < 1 or np.any((share < 0) | (share > 1)):
            raise ValueError("shares lie between 0 and 1, of at least one other SAE")
    except (KeyError, TypeError, ValueError) as error:
        advice = f"`python -m experiments.stability` writes it anew: {type(error).__name__}: {error}"
        raise ValueError(f"{file} is broken at {hook}, {advice}") from error
    known = exports.known_digest(Layout(run).sae_folder(hook))
    if known not in (None, entry.get("sae")):
        print(f"note: {file} is of an earlier SAE of {hook}, and is not shown", file=sys.stderr)
        return None
    return found


def seeds_of(sweep: Path) -> list[list[Path]]:
    """Return the variants of a sweep in groups that differ in their seed only, of at least two each.

    Raises:
      ConfigError: there are none.
    """
    groups: dict[str, list[Path]] = {}
    for variant in exports.variants(sweep):
        flags = dict(jsons.read(Layout(variant).config_file)["flags"])
        flags.pop("seed", None)
        groups.setdefault(repr(sorted(flags.items())), []).append(variant)
    found = [group for group in groups.values() if len(group) > 1]
    require(bool(found), f"{sweep} has no variants that differ in their seed only: train with --seed=0,1,2")
    return found


def compare(runs: Sequence[Path], bar: float = stability.SAME) -> dict[str, dict[str, Any]]:
    """Write `stability.json` into every run: for all SAEs how often their latents recur in those of the other runs.

    Args:
      runs: with SAEs of the same hooks and sizes, on one model.
      bar: cosine of decoder rows from which a latent recurs.

    Returns:
      A summary by hook: `others`, and for every run `alive`, `mean` share, and the latents that recur `in_all` and
      `in_none` of the others.

    Raises:
      ConfigError: runs on other models, of other hooks, or the same run twice.
      FileNotFoundError: a run has no SAE.
      ValueError: SAEs of other sizes, or more latents than can be matched (`jsae.stability.match`).
    """
    folders = _folders(runs)
    results: list[dict[str, dict[str, Any]]] = [{} for _ in runs]
    summaries: dict[str, dict[str, Any]] = {}
    for hook in folders[0]:
        decoders = [saelens.read(one[hook]).weights["W_dec"] for one in folders]
        alive = [exports.alive(one[hook], len(rows)) for one, rows in zip(folders, decoders, strict=True)]
        shares = stability.recurrence(decoders, alive, bar)
        for result, one, share in zip(results, folders, shares, strict=True):
            recurs = [None if math.isnan(value) else round(float(value), 4) for value in share]
            head = {"sae": digest(one[hook]), "others": len(runs) - 1, "same_from_cosine": bar}
            result[hook] = head | {"runs": [str(run) for run in runs], "recurs": recurs}
        summaries[hook] = {
            "others": len(runs) - 1,
            "runs": {str(run): _summary(share) for run, share in zip(runs, shares, strict=True)},
        }
    for run, result in zip(runs, results, strict=True):
        tables.write(run, {hook: {"stability": entry} for hook, entry in result.items()})
    return summaries


def _folders(runs: Sequence[Path]) -> list[dict[str, Path]]:
    """Return the exports of every run by hook, checked against each other.

    Raises:
      ConfigError, FileNotFoundError: as `compare`.
    """
    require(len(runs) > 1, f"{len(runs)} run(s): how often latents recur needs at least two")
    require(len({run.resolve() for run in runs}) == len(runs), f"a run is given twice: {', '.join(map(str, runs))}")
    folders = [{folder.name: folder for folder in exports.finished(run)} for run in runs]
    for run, one in zip(runs, folders, strict=True):
        if not one:
            raise FileNotFoundError(
                f"{run} has no exported SAE: `python -m experiments.train --seed=0,1,2` writes some"
            )
        require(
            set(one) == set(folders[0]),
            f"{run} has SAEs of {', '.join(one)}, {runs[0]} of {', '.join(folders[0])}: give runs of the same hooks",
        )
        for hook, folder in one.items():
            require(
                _model(folder) == _model(folders[0][hook]),
                f"{run} was trained on another model than {runs[0]}: only seeds may differ",
            )
    return folders


def _model(export: Path) -> Any:
    metadata = jsons.read(export / CFG).get("metadata")
    return metadata.get("model_fingerprint") if isinstance(metadata, dict) else None


def _summary(share: Float[np.ndarray, " f"]) -> dict[str, Any]:
    known = share[~np.isnan(share)]
    return {
        "alive": len(known),
        "mean": float(known.mean()) if len(known) else 0.0,
        "in_all": int((known == 1).sum()),
        "in_none": int((known == 0).sum()),
    }
