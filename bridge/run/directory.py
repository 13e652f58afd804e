"""Claiming, locking and recording: which run a directory holds, and which process writes to it."""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bridge.locations import absolute_fields
from bridge.run import commands
from bridge.run.layout import WRITTEN, Layout
from jsae import files, jsons
from jsae.settings import ConfigError, Json, require

# Flags that may differ between a run and its continuation without changing a number.
_FREE = {
    "resume",
    "output_dir",
    "log_every",
    "wandb_project",
    "jax_memory_fraction",
    "heldout_tokens",
    "models_in_memory",
} | {
    "latent_shards",
    "prepare_neuronpedia",
    "model_id",
    "source_set",
    "resume_from",
    "share",
    "place",
    "keep_checkpoints",
}
_VERSIONS = ("jsae", "jax", "flax", "optax", "orbax-checkpoint", "torch", "numpy", "jaxlib", "triton", "jax-triton")


@contextlib.contextmanager
def claimed(run: Path, config: Json, variants: Iterable[str] = ()) -> Iterator[contextlib.ExitStack]:
    """Lock the directory of a run for training: create it, or check that the run in it is the one to resume.

    Remains of a process that was killed before it wrote config.json are removed: no run had begun.

    Args:
      run: the directory.
      config: the run's flags.
      variants: names of the variants of a sweep, folders in the directory; those that exist are locked too.

    Yields:
      An exit stack that holds the locks; the locks of variants that are created later are added to it.

    Raises:
      ConfigError: the directory holds another run, or anything else, or with `resume` no run at all.
      LockedError: another process writes to it; names the process.
      OSError: it cannot be created or written to.
    """
    resume: bool = config.resume  # type: ignore[attr-defined]
    config_file = Layout(run).config_file
    require(not run.exists() or run.is_dir(), f"{run} is a file: choose another --output_dir")
    if resume:
        require(config_file.is_file(), f"{run} holds no run to resume: leave out {_resuming(config)} to start one")
    with contextlib.ExitStack() as stack:
        stack.enter_context(files.Lock(run))
        _check_resumed(run, config) if resume else _check_new(run, config)
        files.clear(run, *WRITTEN)
        for name in variants:
            if (run / name).is_dir():
                stack.enter_context(files.Lock(run / name))
                files.clear(run / name, *WRITTEN)
        yield stack


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Lock the run that a folder belongs to, so that no other process writes to it meanwhile.

    The run is the folder itself, or one of the two above it that has a config.json, as for an exported SAE. A folder
    outside a run is locked itself; one that does not exist is not locked.

    Raises:
      LockedError: another process writes to it; names the process.
      OSError: it cannot be written to.
    """
    run = enclosing(folder) or folder
    with files.Lock(run) if run.is_dir() else contextlib.nullcontext():
        yield


def enclosing(folder: Path) -> Path | None:
    """Return the run that a folder is, or that contains it, as for an exported SAE; None if there is none.

    Candidates are the folder and the two above it, first as its path is written, then with symbolic links resolved.
    """
    candidates = (folder, *folder.absolute().parents[:2], *folder.resolve().parents[:2])
    return next((candidate for candidate in candidates if Layout(candidate).config_file.is_file()), None)


def is_writable(run: Path) -> bool:
    """Return whether this process may write to the directory of a run."""
    return os.access(run, os.W_OK)


def _resuming(config: Json) -> str:
    """Return how a run is resumed, for messages: by a flag, unless the class of its settings says otherwise."""
    return getattr(type(config), "RESUME", "--resume")


def _check_new(run: Path, config: Json) -> None:
    """Refuse a directory that holds anything but the lock and remains of killed processes."""
    ignored = {files.LOCK, *(name + files.PARTIAL for name in WRITTEN)}
    if all(path.name in ignored for path in run.iterdir()):
        return
    other = "choose another --output_dir"
    if not Layout(run).config_file.is_file():
        require(False, f"{run} already holds something else: {other}")
    if _differing(run, config):
        require(
            False,
            f"{run} already holds another run: {other}, or continue that run with its own flags and "
            f"{_resuming(config)}",
        )
    folders = (run, *sorted(path for path in run.iterdir() if path.is_dir()))
    finished = next((folder for folder in folders if Layout(folder).table_file("eval").is_file()), None)
    if finished is None:
        require(False, f"{run} already holds this run, unfinished: continue it with {_resuming(config)}, or {other}")
    lines = "; ".join(line.partition("  #")[0] for line in commands.after_training(finished))
    require(False, f"{run} already holds this run, finished. Next: {lines}. To train it again, {other}")


def _differing(run: Path, config: Json) -> str:
    """Return the flags that differ between the run and `config` and change its numbers, as a text; "" if none do."""
    before, now = read(run)["flags"], json.loads(json.dumps(config.to_json()))
    defaults = {f.name: f.default for f in dataclasses.fields(config) if f.default is not dataclasses.MISSING}  # type: ignore[arg-type]
    before = json.loads(json.dumps(defaults)) | before  # defaults of flags that the run's version did not have
    resolved = [absolute_fields(type(config), values, resolve=True) for values in (before, now)]
    differing = [name for name in sorted(set(now) | set(before)) if resolved[0].get(name) != resolved[1].get(name)]
    return ", ".join(
        f"--{n}={_flag_text(before.get(n))} (now {_flag_text(now.get(n))})" for n in differing if n not in _FREE
    )


def _check_resumed(run: Path, config: Json) -> None:
    """Refuse to continue a run with other flags."""
    flags = _differing(run, config)
    require(not flags, f"the run in {run} was started with {flags}: resume it with its own flags")


def record(run: Path, config: Json, facts: dict[str, Any], reasons: dict[str, str] | None = None) -> None:
    """Write `config.json` (flags, facts such as hashes of model and data, versions), or check that of a resumed run.

    Args:
      run: its directory.
      config: its settings.
      facts: what its numbers depend on beside them. A fact that an older version did not record is not checked.
      reasons: why some of the facts are as they are; not checked.

    Raises:
      ConfigError: the facts have changed, so the run's numbers would change.
    """
    path = Layout(run).config_file
    if path.is_file():
        before = read(run)["facts"]
        changed = [
            f"{name} was {before.get(name)}, is {value}"
            for name, value in facts.items()
            if before.get(name) != value and (name in before or name not in _ADDED)
        ]
        require(not changed, f"{run} cannot continue with the same numbers: {'; '.join(changed)}")
        return
    flags = absolute_fields(type(config), config.to_json())  # a reader may have another working directory
    text = json.dumps({"flags": flags, "facts": facts, "reasons": reasons or {}, "versions": versions()}, indent=2)
    files.write(path, text + "\n")


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of the packages that numbers depend on; None of those not installed."""
    return {"python": platform.python_version()} | {name: _version(name) for name in _VERSIONS}


def read(run: Path) -> dict[str, Any]:
    """Return the contents of `config.json`, as `record` writes it.

    Raises:
      ConfigError: the file is missing or broken.
    """
    path = Layout(run).config_file
    require(path.is_file(), f"{run} is not a run: it has no config.json. Give the output_dir of a training")
    try:
        record = jsons.read(path)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    tables = isinstance(record, dict) and all(isinstance(record.get(name), dict) for name in ("flags", "facts"))
    require(tables, f"{path} is not what a run writes")
    for name, kinds in _KINDS.items():
        value = record["flags"].get(name)
        valid = name not in record["flags"] or type(value) in kinds
        expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
        require(valid, f"{path} is not what a run writes: {name} is {value!r:.80}, expected {expected}")
    return record


_ADDED = ("operations", "data_shards")
"""Facts that runs of older versions do not have."""
_KINDS: Mapping[str, tuple[type, ...]] = {
    "checkpoint": (str,),
    "step": (int, type(None)),
    "tokenizer": (str, type(None)),
    "data": (str,),
    "context_size": (int, type(None)),
    "drop_sinks": (bool,),
}
"""The flags of a run that other commands use, and their types."""


def _flag_text(value: Any) -> str:
    """Return a flag's value as a user writes it."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
