"""The exported SAEs and records of a run. No torch."""

import sys
from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from bridge.run.layout import Layout
from jsae import files, jsons
from jsae.saelens.settings import CFG, SPARSITY, is_complete
from jsae.settings import require

_FIRES = 1e-9  # share of tokens; files hold log10(share + 1e-10)


def within(folder: Path) -> list[Path]:
    """Return the finished exports in a folder, in order of their names."""
    exports = sorted(file.parent for file in folder.glob("*/cfg.json"))
    return [export for export in exports if not files.is_remains(export)]


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
            f"{run} is a sweep, whose variants are runs of their own: give one of them, such as {run / names[0]}; "
            f"there are {', '.join(names)}"
        )
    return within(Layout(run).saes_folder)


_WRITES = {"exported SAE": "train --output_dir={}", "records": "explore --run_dir={}"}


def choose(run: Path, names: Collection[str], name: str | None, kind: str = "exported SAE") -> str:
    """Return one of the names: the one that is given, or the only one.

    Args:
      run: for the message.
      names: that exist.
      name: the chosen one; None for the only one.
      kind: "exported SAE" or "records".

    Raises:
      FileNotFoundError: the name does not exist, or none is given and there is not exactly one; lists the names.
    """
    if name is None and len(names) == 1:
        return next(iter(names))
    if name in names:
        return name
    if not names:
        raise FileNotFoundError(f"{run} has no {kind}: `python -m experiments.{_WRITES[kind].format(run)}` writes it")
    problem = "holds several, and none is chosen" if name is None else f"has no {kind} of {name}"
    raise FileNotFoundError(f"{run} {problem}: there are {', '.join(names)}")


def recorded(records: Path) -> list[str]:
    """Return the hooks that have records in a folder, in order of their names."""
    return sorted(path.parent.name for path in records.glob("*/records.json"))


def stages(run: Path, name: str) -> list[str]:
    """Return the checkpoints of which a run has SAEs of this name of their own, in alphabetical order."""
    return sorted(file.parents[1].name for file in run.glob(f"stages/*/{name}/{CFG}"))


def known_digest(export: Path) -> str | None:
    """Return the digest of an exported SAE, which its records state; None if there is no complete export."""
    from jsae.records.store import digest

    return digest(export) if is_complete(export) else None


def alive(export: Path, latents: int) -> Bool[np.ndarray, " f"]:
    """Return which latents of an exported SAE fire, by `sparsity.safetensors`; all where there is no such file.

    Raises:
      ConfigError: the file is of another number of latents.
      ValueError: it is broken.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = export / SPARSITY
    if not path.is_file():
        return np.ones(latents, bool)
    try:
        sparsity = load_file(path)["sparsity"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is broken: {error}") from error
    require(sparsity.shape == (latents,), f"{path} is of {sparsity.shape} latents, the SAE has {latents}")
    return np.power(10.0, sparsity.astype(np.float64)) > _FIRES


def warn_of_marked(exports: Iterable[Path]) -> list[Path]:
    """Print a warning to stderr for every export that its training marked as of no use, and return those exports."""
    marked = []
    for folder in exports:
        try:
            metadata = jsons.read(folder / CFG).get("metadata")
            problem = metadata.get("problem") if isinstance(metadata, dict) else None
        except (OSError, ValueError, AttributeError):  # loading the SAE reports what is wrong
            continue
        if problem:
            text = "".join(c if c.isprintable() else "?" for c in str(problem)[:200])
            print(f"warning: {folder} is marked as of no use: {text}", file=sys.stderr, flush=True)
            marked.append(folder)
    return marked
