"""Finds nanochat's files: which checkpoint a path means, its meta file, its configuration, its tokenizer."""

import dataclasses
import importlib.resources
import re
import warnings
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Protocol, runtime_checkable

from bridge.nanochat.names import few

_NUMBERED = re.compile(r"model_(\d{1,18})\.(pt|safetensors)")
_NAMED = re.compile(r"model_(.+)\.(pt|safetensors)")
_EXPORT = re.compile(r"hf_(\d{1,18})")  # of forks: a directory of transformers for each step
_PLAIN = ("model.pt", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
_SHARD = re.compile(r"model-00001-of-\d{5}\.safetensors")
_DEPTH = re.compile(r"d(\d{1,9})")
_TOKENIZERS = ("tokenizer.pkl", "tokenizer.json")
_TUNED = ("mid_checkpoints", "chatsft_checkpoints", "chatrl_checkpoints", "sft_checkpoints", "rl_checkpoints")
_UNREAD = {
    ".gguf": "GGUF is not read",
    ".npz": "npz archives are not read",
    ".onnx": "ONNX is not read",
    ".msgpack": "Flax' msgpack is not read",
    ".h5": "HDF5 is not read",
    ".ckpt": "Lightning's checkpoints are not read",
}
_BRING = "bring the model_*.pt or the safetensors file it was made of"


@dataclasses.dataclass(frozen=True)
class Files:
    """The files of one checkpoint; meta, config and tokenizer (a directory) are None where there are none."""

    weights: Path
    """A model file, or the index of a model in several files."""
    meta: Path | None
    config: Path | None
    tokenizer: Path | None
    base_meta: Path | None
    """Of a tuned model, the meta file of the base model of the same name."""


@runtime_checkable
class Tree(Protocol):
    """Folders of files: on the disk, or as a hub lists them."""

    def files(self, folder: PurePosixPath) -> list[str]:
        """Return the names of the files in a folder."""
        ...

    def folders(self, folder: PurePosixPath) -> list[str]:
        """Return the names of the folders in a folder."""
        ...

    def latest(self, folder: PurePosixPath, names: Sequence[str]) -> str:
        """Return the folder that changed last; raises ValueError where nobody knows."""
        ...


class Disk:
    """The tree below a directory."""

    def __init__(self, root: Path):
        self.root = root

    def files(self, folder: PurePosixPath) -> list[str]:
        """Return the names of the files in a folder."""
        path = self.root / folder
        return [p.name for p in path.iterdir() if p.is_file()] if path.is_dir() else []

    def folders(self, folder: PurePosixPath) -> list[str]:
        """Return the names of the folders in a folder."""
        path = self.root / folder
        return [p.name for p in path.iterdir() if p.is_dir()] if path.is_dir() else []

    def latest(self, folder: PurePosixPath, names: Sequence[str]) -> str:
        """Return the folder that changed last."""
        return max(names, key=lambda name: (self.root / folder / name).stat().st_mtime)


def find(path: str | Path, step: int | None = None) -> Files:
    """Return the files of the checkpoint that a path means.

    Args:
        path: a file of weights; a directory of such files; a `*_checkpoints` directory, where the largest d<N>
            counts, or else the directory changed last; a base directory, where base_checkpoints counts; or "demo".
        step: the step to take from a directory, the last one unless given.

    Raises:
        FileNotFoundError: nothing is there, or not that step; says what is there instead.
        ValueError: a step was given together with a file, or there are only files of formats that are not read.
    """
    if str(path) == "demo":
        path = Path(str(importlib.resources.files("bridge.nanochat") / "demo"))
        if not path.is_dir():
            raise FileNotFoundError(f"the demo model is not part of this installation: {path} does not exist")
    path = expand(path)
    if path.is_file():
        if step is not None:
            raise ValueError(f"step={step} chooses a file in a directory, but {path} is a file: leave the step out")
        if path.suffix.lower() in _UNREAD:
            raise ValueError(f"{path}: {_UNREAD[path.suffix.lower()]}; {_BRING}")
        return beside(path)
    if not path.is_dir():
        nearest = next(p for p in path.absolute().parents if p.is_dir())
        raise FileNotFoundError(f"no checkpoint at {path}; {nearest} holds {_listing(nearest)}")
    return beside(path / choose(Disk(path), PurePosixPath(), step, str(path)))


def expand(path: str | Path) -> Path:
    """Return a path with `~` and `~user` replaced. Raises ValueError for a user that does not exist."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"no home directory is known for {path}: give the whole path") from error


def choose(tree: Tree, folder: PurePosixPath, step: int | None, shown: str) -> PurePosixPath:
    """Return the weights of the checkpoint that a folder of a tree means; `shown` names the folder in errors.

    Raises FileNotFoundError and ValueError as `find`.
    """
    where = _checkpoint_folder(tree, folder, shown)
    place = f"{shown}/{where.relative_to(folder)}" if where != folder else shown
    names = tree.files(where)
    plain = _unnumbered(names)
    steps = {int(match[1]): name for name in sorted(names, reverse=True) if (match := _NUMBERED.fullmatch(name))}
    if not steps and not plain:
        steps = {n: f"{name}/{_unnumbered(tree.files(where / name))[0]}" for n, name in _exports(tree, where).items()}
    if step is not None and step not in steps:
        there = ", ".join(map(str, sorted(steps))) or f"none, but {', '.join(plain)}"
        raise FileNotFoundError(f"no step {step} in {place}; there are {there}")
    if steps:
        return where / steps[max(steps) if step is None else step]
    if len(plain) > 1:
        warnings.warn(
            f"{place} holds several models, {_listed(plain)}: took {plain[0]}; give the file to take another",
            stacklevel=4,
        )
    return where / plain[0]


def beside(weights: Path) -> Files:
    """Return a file of weights with what lies beside and above it."""
    folder = weights.absolute().parent
    meta, config = (
        next((weights.with_name(name) for name in names if weights.with_name(name).is_file()), None)
        for names in _companions(weights.name)
    )
    return Files(weights, meta, config, _tokenizer_of(folder), _base_meta(folder))


def needed_files(tree: Tree, weights: PurePosixPath) -> list[PurePosixPath]:
    """Return the files of a tree that a load of these weights reads: they, their parts, and what `beside` looks at."""
    here = weights.parent
    names = tree.files(here)
    stem = weights.name.partition("-00001-of-")[0].removesuffix(".safetensors.index.json")
    parts = re.compile(rf"{re.escape(stem)}-\d{{5}}-of-\d{{5}}\.safetensors")
    metas, configs = _companions(weights.name)
    wanted = [weights, *(here / name for name in names if name in (*metas, *configs) or parts.fullmatch(name))]
    for folder in _tokenizer_folders(here):
        wanted += [folder / name for name in tree.files(folder) if name in (*_TOKENIZERS, "token_bytes.pt")]
    if here.parent.name in _TUNED:
        base = here.parent.parent / "base_checkpoints" / here.name
        wanted += [base / name for name in _metas(tree.files(base))[-1:]]
    return list(dict.fromkeys(wanted))


def _companions(name: str) -> tuple[list[str], list[str]]:
    """Return the names that the meta file and the configuration of a file of weights may have."""
    if match := _NAMED.fullmatch(name):
        return [f"meta_{match[1]}.json"], [f"config_{match[1]}.json", "config.json"]
    return ["meta.json"], ["config.json"]


def _checkpoint_folder(tree: Tree, folder: PurePosixPath, shown: str) -> PurePosixPath:
    if _has_weights(tree, folder):
        return folder
    base = folder / "base_checkpoints"
    where = base if "base_checkpoints" in tree.folders(folder) else folder
    return where / _default_tag(tree, where, shown if where == folder else f"{shown}/base_checkpoints")


def _default_tag(tree: Tree, folder: PurePosixPath, shown: str) -> str:
    """Return upstream's choice among the models of a folder, but one without a checkpoint is not chosen."""
    tags = [name for name in tree.folders(folder) if _has_weights(tree, folder / name)]
    if not tags:
        names = tree.files(folder)
        if unread := sorted(name for name in names if PurePosixPath(name).suffix.lower() in _UNREAD):
            raise ValueError(f"{shown}/{unread[0]}: {_UNREAD[PurePosixPath(unread[0]).suffix.lower()]}; {_BRING}")
        raise FileNotFoundError(
            f"no model_*.pt in {shown} nor one directory below it, which holds "
            f"{_listed([*names, *tree.folders(folder)])}: give a checkpoint directory such as base_checkpoints/d20"
        )
    depths = {name: int(match[1]) for name in tags if (match := _DEPTH.match(name))}
    if depths:
        return max(depths, key=lambda name: (depths[name], -len(name), name))  # d12 before d12_again
    return tags[0] if len(tags) == 1 else tree.latest(folder, tags)


def _has_weights(tree: Tree, folder: PurePosixPath) -> bool:
    return bool(_weights_in(tree.files(folder)) or _exports(tree, folder))


def _exports(tree: Tree, folder: PurePosixPath) -> dict[int, str]:
    """Return the folders of transformers' weights in a folder, by step."""
    found = {int(match[1]): name for name in tree.folders(folder) if (match := _EXPORT.fullmatch(name))}
    return {step: name for step, name in found.items() if _unnumbered(tree.files(folder / name))}


def _weights_in(names: Sequence[str]) -> list[str]:
    return [name for name in names if _NUMBERED.fullmatch(name)] or _unnumbered(names)


def _unnumbered(names: Sequence[str]) -> list[str]:
    """Return the files of weights without a step, the likeliest first."""
    found = [name for name in _PLAIN if name in names]
    if "model.safetensors" in found and "model.safetensors.index.json" in found:
        found.remove("model.safetensors.index.json")  # as transformers does; mlx writes an index for one file too
    if "model.safetensors.index.json" not in found:
        found += sorted(name for name in names if _SHARD.fullmatch(name))
    if len(found) > 1 and "pytorch_model.bin" in found:
        found.remove("pytorch_model.bin")
    found += sorted(name for name in names if _NAMED.fullmatch(name) and not _NUMBERED.fullmatch(name))
    return found


def _tokenizer_folders(folder: PurePosixPath) -> list[PurePosixPath]:
    """Return where a tokenizer may be: in or beside the checkpoint, as in uploaded models, or above it."""
    above = [place for parent in folder.parents[:2] for place in (parent / "tokenizer", parent)]
    return list(dict.fromkeys([folder / "tokenizer", folder, *above]))


def _tokenizer_of(directory: Path) -> Path | None:
    places = [Path(place) for place in _tokenizer_folders(PurePosixPath(directory))]
    return next((p for p in places if any((p / name).is_file() for name in _TOKENIZERS)), None)


def _base_meta(folder: Path) -> Path | None:
    """Return the last meta file of the base model that has the name of a tuned one."""
    base = folder.parent.parent / "base_checkpoints" / folder.name
    if folder.parent.name not in _TUNED or not base.is_dir():
        return None
    return next((base / name for name in reversed(_metas([p.name for p in base.iterdir()]))), None)


def _metas(names: Sequence[str]) -> list[str]:
    """Return the names of meta files with a step, the last step last."""
    found = {int(match[1]): name for name in names if (match := re.fullmatch(r"meta_(\d{1,18})\.json", name))}
    return [found[step] for step in sorted(found)]


def _listing(directory: Path) -> str:
    return _listed([p.name for p in directory.iterdir()])


def _listed(names: Sequence[str]) -> str:
    return few(sorted(names), 12) or "nothing"
