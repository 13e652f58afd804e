"""Where the exported SAEs of a run lie. No torch."""

import sys
from collections.abc import Iterable
from pathlib import Path

from jsae import files, jsons


def within(folder: Path) -> list[Path]:
    """Return the finished exports that are folders of this one, in order of their names."""
    found = sorted(file.parent for file in folder.glob("*/cfg.json"))
    return [export for export in found if not files.is_remains(export)]


def finished(run: Path) -> list[Path]:
    """The finished exports of a run.

    Raises:
      FileNotFoundError: the run trained several variants, which have folders of their own; names them.
    """
    found = within(run / "sae")
    variants = [] if found else [folder.name for folder in sorted(run.glob("*")) if within(folder / "sae")]
    if variants:
        raise FileNotFoundError(
            f"{run} is a sweep, whose variants are runs of their own: give one of them, {run / variants[0]} for "
            f"example; there are {', '.join(variants)}"
        )
    return found


def warn_of_marked(exports: Iterable[Path]) -> list[Path]:
    """Print a warning to stderr for every export that its training marked as of no use, and return those exports."""
    marked = []
    for folder in exports:
        try:
            metadata = jsons.read(folder / "cfg.json").get("metadata")
            problem = metadata.get("problem") if isinstance(metadata, dict) else None
        except (OSError, ValueError, AttributeError):  # whoever loads it says what is wrong
            continue
        if problem:
            told = "".join(c if c.isprintable() else "?" for c in str(problem)[:200])
            print(f"warning: {folder} is marked as of no use: {told}", file=sys.stderr, flush=True)
            marked.append(folder)
    return marked
