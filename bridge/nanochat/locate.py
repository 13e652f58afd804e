"""Where nanochat's files are: which checkpoint a path means, its meta file, its tokenizer."""

import dataclasses
import importlib.resources
import re
from pathlib import Path

_MODEL = re.compile(r"model_(\d+)\.pt")
_DEPTH = re.compile(r"d(\d+)")


@dataclasses.dataclass(frozen=True)
class Files:
    """The files of one checkpoint; meta and tokenizer (a directory) are None where there are none."""

    weights: Path
    meta: Path | None
    tokenizer: Path | None


def find(path: str | Path, step: int | None = None) -> Files:
    """The checkpoint that a path means.

    Args:
        path: a model_*.pt file; a directory of such files; a `*_checkpoints` directory, where the largest d<N>
            counts, or else the directory changed last; a base directory, where base_checkpoints counts; or "demo".
        step: the step to take from a directory, the last one unless given.

    Raises:
        FileNotFoundError: nothing is there, or not that step; says what is there instead.
        ValueError: a step was given together with a file.
    """
    if str(path) == "demo":
        path = Path(str(importlib.resources.files("bridge.nanochat") / "demo"))
        if not path.is_dir():
            raise FileNotFoundError(f"the demo model is not part of this installation: {path} does not exist")
    path = Path(path).expanduser()
    if path.is_file():
        if step is not None:
            raise ValueError(f"step={step} chooses a file in a directory, but {path} is a file: leave the step out")
        weights = path
    else:
        weights = _of_step(_checkpoint_directory(path), step)
    match = _MODEL.fullmatch(weights.name)
    meta = weights.with_name(f"meta_{match[1]}.json") if match else None
    return Files(weights, meta if meta and meta.is_file() else None, _tokenizer_of(weights.absolute().parent))


def _checkpoint_directory(path: Path) -> Path:
    if not path.is_dir():
        nearest = next(p for p in path.absolute().parents if p.is_dir())
        raise FileNotFoundError(f"no checkpoint at {path}; {nearest} holds {_listing(nearest)}")
    if _steps(path):
        return path
    base = path / "base_checkpoints"
    return _default_tag(base if base.is_dir() else path)


def _default_tag(directory: Path) -> Path:
    """Upstream's choice among the models of a directory, but one without a checkpoint is not chosen."""
    tags = [p for p in directory.iterdir() if p.is_dir() and _steps(p)]
    if not tags:
        raise FileNotFoundError(
            f"no model_*.pt in {directory} nor one directory below it, which holds {_listing(directory)}: "
            "give a checkpoint directory such as base_checkpoints/d20"
        )
    depths = {p: int(match[1]) for p in tags if (match := _DEPTH.match(p.name))}
    if depths:
        return max(depths, key=lambda p: (depths[p], -len(p.name), p.name))  # d12 before d12_again
    return max(tags, key=lambda p: p.stat().st_mtime)


def _of_step(directory: Path, step: int | None) -> Path:
    steps = _steps(directory)
    if step is None:
        return steps[max(steps)]
    if step not in steps:
        raise FileNotFoundError(f"no step {step} in {directory}; there are {', '.join(map(str, sorted(steps)))}")
    return steps[step]


def _steps(directory: Path) -> dict[int, Path]:
    return {int(match[1]): p for p in directory.iterdir() if (match := _MODEL.fullmatch(p.name))}


def _tokenizer_of(directory: Path) -> Path | None:
    """In or beside the checkpoint, as in uploaded models, or in the base directory two levels up."""
    places = [directory / "tokenizer", directory, *(p / "tokenizer" for p in directory.parents[:2])]
    return next((p for p in places if (p / "tokenizer.pkl").is_file()), None)


def _listing(directory: Path, limit: int = 12) -> str:
    names = sorted(p.name for p in directory.iterdir())
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "") or "nothing"
