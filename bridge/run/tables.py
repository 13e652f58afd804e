"""The tables that an evaluation writes into a run: metrics, columns and labels of latents, each by hook. No torch."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bridge.run.layout import Layout
from jsae import files, jsons

LARGEST_TABLE = 2**30
"""Bytes of a table."""

Results = Mapping[str, Mapping[str, Any]]
"""Tables of every hook: "eval", "latents" and, if measured, "labels" and "steering"."""


def write(run: Path, results: Results) -> None:
    """Write the results into the tables of a run, whole or not at all; rows of other hooks are kept.

    Raises:
      OSError: a table cannot be read or written.
    """
    for name in next(iter(results.values())):
        path = Layout(run).table_file(name)  # type: ignore[arg-type]
        table = kept(path) | {hook: tables[name] for hook, tables in results.items()}
        indent = 2 if name == "eval" else None  # the others are long columns
        files.write(path, json.dumps(table, indent=indent, allow_nan=False) + "\n")


def kept(path: Path) -> dict[str, Any]:
    """Return the existing table, or {}; print to stderr if it is broken and will be replaced."""
    if not path.is_file():
        return {}
    try:
        table = jsons.read(path, LARGEST_TABLE)
    except ValueError:
        table = None
    if not isinstance(table, dict):
        print(f"{path} was broken and is replaced: what it said of other hooks is lost", file=sys.stderr)
        return {}
    return table


def read(path: Path) -> dict[str, Any]:
    """Return a JSON object from a file.

    Raises:
      FileNotFoundError: it does not exist; names the command that writes it.
      ValueError: it is broken, or not an object.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: `python -m experiments.evaluate --run_dir={path.parent}` writes it"
        )
    table = jsons.read(path, LARGEST_TABLE)
    if not isinstance(table, dict):
        raise ValueError(f"{path} holds {type(table).__name__}, expected an object")
    return table
