"""Find the files of a checkpoint from a path: weights, meta file, configuration and tokenizer."""

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
_EXPORT = re.compile(r"hf_(\d{1,18})")  # in forks: a directory in transformers' format for each step
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
_REMEDY = "give the model_*.pt or safetensors file that it was converted from"


@dataclasses.dataclass(frozen=True)
class Files:
    """The files of one checkpoint. Missing files are None; the tokenizer is a directory."""

    weights: Path
    """The weights file, or the index of a sharded one."""
    meta: Path | None
    config: Path | None
    tokenizer: Path | None
    base_meta: Path | None
    """For a tuned model, the meta file of the base model of the same name."""


@runtime_checkable
class Tree(Protocol):
    """A tree of files, on disk or on the hub."""

    def files(self, folder: PurePosixPath) -> list[str]:
        """Return the names of the files in a folder."""
        ...

    def folders(self, folder: PurePosixPath) -> list[str]:
        """Return the names of the folders in a folder."""
        ...

    def latest(self, folder: PurePosixPath, names: Sequence[str]) -> str:
        """Return the most recently modified of some folders. Raises ValueError if the tree has no dates."""
        ...


class Disk:
    """The files below a directory."""

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
        """Return the most recently modified of some folders."""
        return max(names, key=lambda name: (self.root / folder / name).stat().st_mtime)


def find(path: str | Path, step: int | None = None) -> Files:
    """Return the files of the checkpoint at a path.

    Args:
        path: a weights file; a directory of them; a `*_checkpoints` directory, in which the largest d<N> is chosen, or
            else the most recently modified; a base directory, in which base_checkpoints is chosen; or "demo".
        step: the training step to choose from a directory; default: the last one.

    Raises:
        FileNotFoundError: there is no such checkpoint or step; the message lists what exists.
        ValueError: a step is given with a file, or the files have formats that are not supported.
    """
    if str(path) == "demo":
        path = Path(str(importlib.resources.files("bridge.nanochat") / "demo"))
        if not path.is_dir():
            raise FileNotFoundError(f"the demo model is not part of this installation: {path} does not exist")
    path = expand(path)
    if path.is_file():
        if step is not None:
            raise ValueError(f"step={step} selects a file in a directory, but {path} is a file: omit the step")
        if path.suffix.lower() in _UNREAD:
            raise ValueError(f"{path}: {_UNREAD[path.suffix.lower()]}; {_REMEDY}")
        return checkpoint_files(path)
    if not path.is_dir():
        nearest = next(p for p in path.absolute().parents if p.is_dir())
        raise FileNotFoundError(f"no checkpoint at {path}; {nearest} contains {_listing(nearest)}")
    return checkpoint_files(path / choose(Disk(path), PurePosixPath(), step, str(path)))


def expand(path: str | Path) -> Path:
    """Return a path with `~` and `~user` expanded. Raises ValueError for an unknown user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"no home directory is known for {path}: give the full path") from error


def choose(tree: Tree, folder: PurePosixPath, step: int | None, shown: str) -> PurePosixPath:
    """Return the weights file of the checkpoint in a folder.

    Args:
        tree: the file tree.
        folder: a folder of it.
        step: see `find`.
        shown: the name of the folder in error messages.

    Raises FileNotFoundError and ValueError as `find`.
    """
    checkpoint = _checkpoint_folder(tree, folder, shown)
    label = f"{shown}/{checkpoint.relative_to(folder)}" if checkpoint != folder else shown
    names = tree.files(checkpoint)
    plain = _unnumbered(names)
    steps = {int(match[1]): name for name in sorted(names, reverse=True) if (match := _NUMBERED.fullmatch(name))}
    if not steps and not plain:
        exports = _exports(tree, checkpoint)
        steps = {n: f"{name}/{_unnumbered(tree.files(checkpoint / name))[0]}" for n, name in exports.items()}
    if step is not None and step not in steps:
        available = ", ".join(map(str, sorted(steps))) or f"none, but {', '.join(plain)}"
        raise FileNotFoundError(f"no step {step} in {label}; there are {available}")
    if steps:
        return checkpoint / steps[max(steps) if step is None else step]
    if len(plain) > 1:
        warnings.warn(
            f"{label} contains several models, {_listed(plain)}: loading {plain[0]}; give the file to load another",
            stacklevel=4,
        )
    return checkpoint / plain[0]


def checkpoint_files(weights: Path) -> Files:
    """Return a weights file together with the meta file, configuration and tokenizer beside or above it."""
    folder = weights.absolute().parent
    meta, config = (
        next((weights.with_name(name) for name in names if weights.with_name(name).is_file()), None)
        for names in _companions(weights.name)
    )
    return Files(weights, meta, config, _tokenizer_of(folder), _base_meta(folder))


def needed_files(tree: Tree, weights: PurePosixPath) -> list[PurePosixPath]:
    """Return the files of a tree that loading these weights needs, including shards, meta files and the tokenizer."""
    parent = weights.parent
    names = tree.files(parent)
    stem = weights.name.partition("-00001-of-")[0].removesuffix(".safetensors.index.json")
    parts = re.compile(rf"{re.escape(stem)}-\d{{5}}-of-\d{{5}}\.safetensors")
    metas, configs = _companions(weights.name)
    paths = [weights, *(parent / name for name in names if name in (*metas, *configs) or parts.fullmatch(name))]
    for folder in _tokenizer_folders(parent):
        paths += [folder / name for name in tree.files(folder) if name in (*_TOKENIZERS, "token_bytes.pt")]
    if parent.parent.name in _TUNED:
        base = parent.parent.parent / "base_checkpoints" / parent.name
        paths += [base / name for name in _metas(tree.files(base))[-1:]]
    return list(dict.fromkeys(paths))


def _companions(name: str) -> tuple[list[str], list[str]]:
    """Return the possible names of the meta file and of the configuration of a weights file."""
    if match := _NAMED.fullmatch(name):
        return [f"meta_{match[1]}.json"], [f"config_{match[1]}.json", "config.json"]
    return ["meta.json"], ["config.json"]


def _checkpoint_folder(tree: Tree, folder: PurePosixPath, shown: str) -> PurePosixPath:
    if _has_weights(tree, folder):
        return folder
    base = folder / "base_checkpoints"
    parent = base if "base_checkpoints" in tree.folders(folder) else folder
    return parent / _default_tag(tree, parent, shown if parent == folder else f"{shown}/base_checkpoints")


def _default_tag(tree: Tree, folder: PurePosixPath, shown: str) -> str:
    """Return upstream's default choice among the models of a folder that have a checkpoint."""
    tags = [name for name in tree.folders(folder) if _has_weights(tree, folder / name)]
    if not tags:
        names = tree.files(folder)
        if unread := sorted(name for name in names if PurePosixPath(name).suffix.lower() in _UNREAD):
            raise ValueError(f"{shown}/{unread[0]}: {_UNREAD[PurePosixPath(unread[0]).suffix.lower()]}; {_REMEDY}")
        raise FileNotFoundError(
            f"no model_*.pt in {shown} or its subdirectories; it contains "
            f"{_listed([*names, *tree.folders(folder)])}: give a checkpoint directory such as base_checkpoints/d20"
        )
    depths = {name: int(match[1]) for name in tags if (match := _DEPTH.match(name))}
    if depths:
        return max(depths, key=lambda name: (depths[name], -len(name), name))  # d12 before d12_again
    return tags[0] if len(tags) == 1 else tree.latest(folder, tags)


def _has_weights(tree: Tree, folder: PurePosixPath) -> bool:
    return bool(_weights_in(tree.files(folder)) or _exports(tree, folder))


def _exports(tree: Tree, folder: PurePosixPath) -> dict[int, str]:
    """Return the subfolders with weights in transformers' format, by step."""
    names = {int(match[1]): name for name in tree.folders(folder) if (match := _EXPORT.fullmatch(name))}
    return {step: name for step, name in names.items() if _unnumbered(tree.files(folder / name))}


def _weights_in(names: Sequence[str]) -> list[str]:
    return [name for name in names if _NUMBERED.fullmatch(name)] or _unnumbered(names)


def _unnumbered(names: Sequence[str]) -> list[str]:
    """Return the weights files without a step number, in order of preference."""
    files = [name for name in _PLAIN if name in names]
    if "model.safetensors" in files and "model.safetensors.index.json" in files:
        files.remove("model.safetensors.index.json")  # as transformers does; mlx also writes an index for one file
    if "model.safetensors.index.json" not in files:
        files += sorted(name for name in names if _SHARD.fullmatch(name))
    if len(files) > 1 and "pytorch_model.bin" in files:
        files.remove("pytorch_model.bin")
    files += sorted(name for name in names if _NAMED.fullmatch(name) and not _NUMBERED.fullmatch(name))
    return files


def _tokenizer_folders(folder: PurePosixPath) -> list[PurePosixPath]:
    """Return the folders to search for a tokenizer: in or beside the checkpoint, as in uploaded models, or above it."""
    above = [candidate for parent in folder.parents[:2] for candidate in (parent / "tokenizer", parent)]
    return list(dict.fromkeys([folder / "tokenizer", folder, *above]))


def _tokenizer_of(directory: Path) -> Path | None:
    candidates = [Path(folder) for folder in _tokenizer_folders(PurePosixPath(directory))]
    return next((p for p in candidates if any((p / name).is_file() for name in _TOKENIZERS)), None)


def _base_meta(folder: Path) -> Path | None:
    """Return the last meta file of the base model with the same name as a tuned model."""
    base = folder.parent.parent / "base_checkpoints" / folder.name
    if folder.parent.name not in _TUNED or not base.is_dir():
        return None
    return next((base / name for name in reversed(_metas([p.name for p in base.iterdir()]))), None)


def _metas(names: Sequence[str]) -> list[str]:
    """Return the names of meta files with a step number, in the order of steps."""
    metas = {int(match[1]): name for name in names if (match := re.fullmatch(r"meta_(\d{1,18})\.json", name))}
    return [metas[step] for step in sorted(metas)]


def _listing(directory: Path) -> str:
    return _listed([p.name for p in directory.iterdir()])


def _listed(names: Sequence[str]) -> str:
    return few(sorted(names), 12) or "nothing"
