"""Which exported SAEs and records a run has. No torch."""

import sys
from collections.abc import Collection, Iterable
from pathlib import Path

from bridge.run.layout import Layout
from jsae import files, jsons


def within(folder: Path) -> list[Path]:
    """Return the finished exports that are folders of this one, in order of their names."""
    found = sorted(file.parent for file in folder.glob("*/cfg.json"))
    return [export for export in found if not files.is_remains(export)]


def variants(run: Path) -> list[Path]:
    """Return the variants of a sweep that have exports: folders of a run that has no exports of its own."""
    if within(Layout(run).saes_folder):
        return []
    return [folder for folder in sorted(run.glob("*")) if within(Layout(folder).saes_folder)]


def finished(run: Path) -> list[Path]:
    """Return the finished exports of a run, in order of their names.

    Raises:
      FileNotFoundError: the run trained several variants, which have folders of their own; names them.
    """
    if names := [folder.name for folder in variants(run)]:
        raise FileNotFoundError(
            f"{run} is a sweep, whose variants are runs of their own: give one of them, {run / names[0]} for "
            f"example; there are {', '.join(names)}"
        )
    return within(Layout(run).saes_folder)


_WRITES = {"exported SAE": "train --output_dir={}", "records": "explore --run_dir={}"}


def choose(run: Path, there: Collection[str], name: str | None, what: str = "exported SAE") -> str:
    """Return a name that is there: the one that is given, or the only one.

    Raises:
      FileNotFoundError: it is not there, or none is given and there is not exactly one; says what there is.
    """
    if name is None and len(there) == 1:
        return next(iter(there))
    if name in there:
        return name
    if not there:
        raise FileNotFoundError(f"{run} has no {what}: `python -m experiments.{_WRITES[what].format(run)}` writes it")
    missing = "holds several, and none is chosen" if name is None else f"has no {what} of {name}"
    raise FileNotFoundError(f"{run} {missing}: there are {', '.join(there)}")


def recorded(records: Path) -> list[str]:
    """Return the hooks that have records in a folder, in order of their names."""
    return sorted(path.parent.name for path in records.glob("*/records.json"))


def known_digest(export: Path) -> str | None:
    """Return the digest of an exported SAE, by which its records are known; None where it has no weights."""
    from jsae.records.store import digest

    is_there = all((export / name).is_file() for name in ("sae_weights.safetensors", "cfg.json"))
    return digest(export) if is_there else None


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
            text = "".join(c if c.isprintable() else "?" for c in str(problem)[:200])
            print(f"warning: {folder} is marked as of no use: {text}", file=sys.stderr, flush=True)
            marked.append(folder)
    return marked
