"""Tables of the quality measurements: a row per trainer, means over seeds with half of their range."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from experiments.benches import tables
from experiments.benches.quality_config import OURS
from experiments.benches.quality_contest import NOTHING, OWN

if TYPE_CHECKING:
    from rich.console import Console

_WIDTH = 280
"""Characters that a line of the tables needs."""

COLUMNS: Mapping[str, tuple[str, str, bool]] = {
    "fvu": ("FVU", ".4f", True),
    "f1": ("F1", ".3f", True),
    "mcc": ("MCC", ".3f", True),
    "precision": ("precision", ".3f", False),
    "recall": ("recall", ".3f", False),
    "uniqueness": ("unique", ".3f", False),
    "loss_recovered": ("loss recovered", ".4f", True),
    "l0": ("L0", ".1f", False),
    "dead_fraction": ("dead held-out", ".1%", False),
    "dead_in_training": ("dead in training", ".1%", False),
    "recurring": ("recurring", ".0%", False),
    "detection": ("detection F1", ".3f", True),
    "probing": ("probing, 1 latent", ".3f", True),
    "absorption": ("absorption", ".3f", True),
    "seconds": ("seconds", ".1f", True),
}
"""By score: its heading, its format, and whether the range is shown."""


def console() -> Console:
    """Return a console for the tables: as wide as the terminal, or wide enough where there is none."""
    from rich.console import Console

    plain = Console()
    return plain if plain.is_terminal else Console(width=max(plain.width, _WIDTH))


def show(console: Console, title: str, rows: Sequence[dict[str, Any]], as_markdown: bool) -> None:
    """Print a table, for a terminal or in Markdown."""
    from rich.table import Table

    if as_markdown:
        console.print(f"{title}\n\n{markdown(rows)}", soft_wrap=True, markup=False, highlight=False)
        return
    names = _names(rows)
    table = Table(*_headings(names), title=title)
    for row in rows:
        table.add_row(*_cells(row, names), style="bold" if row["trainer"] == OURS else None)
    console.print(table)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return a table in Markdown."""
    names = _names(rows)
    return tables.as_markdown(_headings(names), [_cells(row, names) for row in rows])


def _names(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the scores that some row has, in the order of `COLUMNS`."""
    return [name for name in COLUMNS if any(name in row.get("scores", {}) for row in rows)]


def _headings(names: Sequence[str]) -> list[str]:
    return ["architecture", "trainer", *(COLUMNS[name][0] for name in names), "learning rate"]


def _cells(row: dict[str, Any], names: Sequence[str]) -> list[str]:
    variant = row["recipe"].partition(" ")[2]
    trainer = row["trainer"] + (f" ({variant})" if variant and row.get("chosen") != NOTHING else "")
    trainer += ", nothing given" if row.get("chosen") == NOTHING else ""
    if "failed" in row:
        return [row["architecture"], trainer, *[""] * len(names), row["failed"]]
    rate = {NOTHING: "default", OWN: "own"}.get(row["chosen"]) or f"{row['rate']:g}"
    cells = {name: _cell(name, row["scores"].get(name)) for name in names}
    if row.get("missed"):
        cells["l0"] += " (missed)"
    return [row["architecture"], trainer, *cells.values(), rate]


def _cell(name: str, spread: Mapping[str, float] | None) -> str:
    if spread is None:
        return ""
    _, form, ranged = COLUMNS[name]
    half = (spread["max"] - spread["min"]) / 2
    return f"{spread['mean']:{form}}" + (f" ± {half:{form}}" if ranged else "")
