"""Print a comparison of checkpoints: a table of checkpoints, counts of changes, and the clearest latents."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bridge.run.timelines import counted, gained_and_lost, levels
from experiments.excerpts import excerpt

_CLEAR = 0.1  # a gain or loss from which a latent is listed
_LEAST_FIRED = 20  # tokens
_MOST_TEXT = 20  # characters on either side of a token
_LISTED = ("exclusive", "weakened", "rotated")


def show(name: str, table: Mapping[str, Any], most: int) -> None:
    """Print the comparison of one crosscoder.

    Args:
      name: of the crosscoder.
      table: of `bridge.stages.measuring.Comparison.table`.
      most: latents of every kind to list.
    """
    console = Console()
    console.print(_checkpoints(name, table))
    summary = table["summary"]
    kinds = ", ".join(f"{count} {kind}" for kind, count in summary.items() if isinstance(count, int))
    console.print(f"latents: {kinds}", soft_wrap=True)
    where = ", ".join(f"{count} in {stage}" for stage, count in summary["strongest of exclusive"].items() if count)
    for line in _changes(table):
        console.print(line, soft_wrap=True)
    if where:
        console.print(f"exclusive latents are strongest: {where}", soft_wrap=True)
    for kind in _LISTED:
        if rows := _clearest(table, kind, most):
            console.print(_latents(kind, table, rows))
    gains = _gains(table)
    for stage in range(1, len(table["checkpoints"])):
        for verb, sign in {"gained": 1, "lost": -1}.items():
            values = sign * gains[:, stage]
            order = [int(latent) for latent in np.argsort(-values, kind="stable")[:most]]
            if rows := [latent for latent in order if values[latent] > _CLEAR]:
                console.print(_differences(table, verb, values, stage, rows))


def show_survival(report: Mapping[str, Any]) -> None:
    """Print how many latents survive from each SAE to the next."""
    table = Table(title=f"latents that keep their direction (cosine {report['same_from_cosine']:g} or more)")
    for column in ("to", "alive", "survived", "died", "born", "same index", "mean cosine"):
        table.add_column(column, justify="left" if column == "to" else "right", no_wrap=column != "to")
    for step in report["steps"]:
        table.add_row(
            step["to"],
            f"{step['alive']:,}",
            f"{step['survived']:,} ({step['survived'] / max(step['alive'], 1):.1%})",
            *(f"{step[name]:,}" for name in ("died", "born", "kept_index")),
            f"{step['mean_cosine']:.3f}",
        )
    Console().print(table)


def _checkpoints(name: str, table: Mapping[str, Any]) -> Table:
    """Return the table of checkpoints."""
    found = Table(title=f"{name} on {table['tokens']:,} tokens")
    found.add_column("checkpoint", no_wrap=True)
    for column in ("FVU", "FVU of its own SAE", "L0 of that"):
        found.add_column(column, justify="right")
    for stage in table["checkpoints"]:
        found.add_row(
            stage["name"],
            f"{stage['fvu']:.4f}",
            f"{stage['own_sae_fvu']:.4f}",
            f"{stage['own_sae_l0']:.1f}",
        )
    return found


def _changes(table: Mapping[str, Any]) -> list[str]:
    """Return a line for every checkpoint in which latents change."""
    lines = []
    for stage in table["checkpoints"]:
        changes = counted(event["kind"] for event in table["events"] if event["stage"] == stage["name"])
        lines += [f"at {stage['name']}: {changes}"] if changes else []
    return lines


def _clearest(table: Mapping[str, Any], kind: str, most: int) -> list[int]:
    """Return the latents of a kind that explain most, by density times squared norm in their strongest checkpoint."""
    latents = table["latents"]
    of_kind = [latent for latent, found in enumerate(table["kinds"]) if found == kind]

    def weight(latent: int) -> float:
        return latents["density"][latent] * max(latents["corrected_norm"][latent]) ** 2

    return sorted(of_kind, key=weight, reverse=True)[:most]


def _latents(kind: str, table: Mapping[str, Any], rows: list[int]) -> Table:
    """Return a table of latents: strength in every checkpoint, or the cosine of directions for those that turned."""
    measure = "cosine" if kind == "rotated" else "strength"
    found = Table(title=f"{kind}: {measure} in every checkpoint, relative to the strongest")
    found.add_column("latent", justify="right")
    found.add_column("density", justify="right")
    for stage in table["checkpoints"]:
        found.add_column(stage["name"], justify="right")
    latents = table["latents"]
    for latent in rows:
        values = [f"{value:.2f}" for value in latents[measure][latent]]
        found.add_row(str(latent), f"{latents['density'][latent]:.3%}", *values)
    return found


def _gains(table: Mapping[str, Any]) -> np.ndarray:
    """Return what every latent gained in every checkpoint, less what it lost, (f, m); 0 for those that fire rarely."""
    latents = {name: np.array(table["latents"][name], float) for name in ("strength", "present", "corrected_norm")}
    gained, lost = gained_and_lost(levels(latents["strength"], latents["present"]), latents["corrected_norm"])
    often = np.array(table["latents"]["density"]) * table["tokens"] >= _LEAST_FIRED
    return np.where(often[:, None], gained - lost, 0)


def _differences(table: Mapping[str, Any], verb: str, values: np.ndarray, stage: int, rows: list[int]) -> Table:
    """Return a table of latents that a checkpoint gained or lost, with the text on which each is strongest."""
    found = Table(title=f"{verb} most in {table['checkpoints'][stage]['name']}, and where each is strongest")
    for column in ("latent", "density", verb):
        found.add_column(column, justify="right", no_wrap=True)
    found.add_column("text")
    for latent in rows:
        text, density = table["texts"][latent], table["latents"]["density"][latent]
        shown = "" if text is None else excerpt(text, _MOST_TEXT)
        found.add_row(str(latent), f"{density:.3%}", f"{values[latent]:.2f}", shown)
    return found
