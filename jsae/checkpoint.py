"""Checkpoints: everything that a run needs to resume exactly, written atomically. The only module that imports Orbax.

A checkpoint contains checksums of its arrays and notes, and a list of its files with their digests. Both are verified
before the checkpoint is used.
"""

import contextlib
import functools
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from jsae import checksum, manifest, processes
from jsae.manifest import DamagedError
from jsae.settings import ConfigError

States = Any
"""A pytree of arrays, such as the training states of all SAEs (`jsae.loop.States`)."""

DAMAGED = ".damaged"
"""Suffix of a damaged checkpoint that was renamed."""

_KEEP_DAMAGED = 2
_LATE = frozenset({"_CHECKPOINT_METADATA", "commit_success.txt"})  # files that Orbax writes after all others
_PARTS = frozenset({"states", "notes", manifest.NAME, *_LATE})
_RECORD = frozenset({"version", "fvu", "arrays", "notes", "sha256"})
_VERSION = 1


class Damage(NamedTuple):
    """A damaged checkpoint."""

    step: int
    reason: str
    """What is wrong, with the file or the array."""
    moved_to: Path


class Restored(NamedTuple):
    """The content of a checkpoint."""

    step: int
    states: States
    notes: dict[str, Any]
    damaged: tuple[Damage, ...] = ()
    """Later checkpoints that are damaged and were renamed."""


class Checkpoints:
    """The checkpoints of a run: the latest ones and the one with the lowest `fvu`. A context manager.

    Checkpoints are written in the background and renamed at the end, so a run that is killed at any moment leaves
    complete checkpoints only. Only one run at a time may write to the folder. Its processes call the same methods in
    the same order: each writes and reads the arrays of its devices, the first one everything else. A checkpoint does
    not depend on their number.

    Args:
      folder: their folder; created if missing.
      keep: number of latest checkpoints to keep; None keeps all.

    Raises:
      OSError: the folder cannot be created or read.
    """

    def __init__(self, folder: Path, keep: int | None = 2):
        self._folder, self._keep = folder.absolute(), keep
        self._manager: ocp.CheckpointManager | None = None
        self._fvu: dict[int, float] = {}
        self._saving: int | None = None
        processes.on_first(lambda: self._folder.mkdir(parents=True, exist_ok=True))

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and processes.count() > 1:
            return  # others may not have failed: nothing can be done together with them
        # An error in closing must not replace the exception that is being raised.
        with contextlib.suppress(Exception) if error is not None else contextlib.nullcontext():
            self.wait()
        if self._manager is not None:
            with contextlib.suppress(Exception):  # `wait` has raised it already
                self._manager.close()

    def latest(self) -> int | None:
        """Return the step of the last checkpoint, damaged or not; None without checkpoints. Raises OSError."""
        return max(self.steps(), default=None)

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints, damaged or not, in ascending order.

        Raises:
          OSError: the folder cannot be read, or contains something else whose name is a number.
        """
        return processes.on_first(self._steps)

    def _steps(self) -> list[int]:
        # Numbers in the form in which Orbax writes them.
        paths = [path for path in self._folder.iterdir() if re.fullmatch(r"0|[1-9][0-9]*", path.name, re.ASCII)]
        for path in paths:
            if not _is_checkpoint(path):
                raise OSError(f"{path} is not a checkpoint but has the name of one: move it away")
        return sorted(int(path.name) for path in paths)

    def save(self, step: int, states: States, notes: dict[str, Any], fvu: float) -> None:
        """Start to save a checkpoint; return as soon as the states may be donated again.

        A checkpoint of the same step, of a run that was resumed from an earlier one, is replaced.

        Args:
          step: the number of training steps.
          states: the training states.
          notes: JSON values to save with them, such as the cursor of the stream.
          fvu: fraction of variance unexplained, by which the best checkpoint is selected.

        Raises:
          OSError: this or the previous checkpoint cannot be written (full disk); earlier checkpoints are complete.
        """
        self.wait()
        # Orbax may read the buffers after it returns, and the next step reuses them, so give it a copy.
        copies = jax.tree.map(jnp.copy, states)
        record = _record(copies, notes, fvu)
        args = ocp.args.Composite(states=ocp.args.StandardSave(copies), notes=ocp.args.JsonSave(record))
        manager = self._open_manager()
        self._fvu[step], self._saving = fvu, step
        with self._writing(step):
            if step in self.steps():
                manager.delete(step)
            manager.save(step, args=args, force=True)

    def wait(self) -> None:
        """Wait until everything is written.

        Raises:
          OSError: the checkpoint cannot be written (full disk); earlier checkpoints are complete.
        """
        if self._saving is None:
            return
        with self._writing(self._saving):
            self._open_manager().wait_until_finished()
            processes.on_first(self._complete)
        self._saving = None

    def _complete(self) -> None:
        """List the files that Orbax has written last."""
        folder = self._folder / str(self._saving)
        if (folder / manifest.NAME).is_file():
            manifest.complete(folder)
        else:
            manifest.write(folder)

    def restore(self, like: States, step: int | None = None) -> Restored:
        """Verify a checkpoint and return it with the shapes and shardings of `like`.

        Args:
          like: states, or abstract arrays of their shapes.
          step: its step; None: the latest intact checkpoint. Later ones are damaged; they are renamed to end in
            `.damaged`, and the latest two of these are kept.

        Raises:
          FileNotFoundError: there is no such checkpoint.
          ConfigError: the states have other shapes, so the configuration differs.
          DamagedError: the checkpoint is damaged, or all of them are. Nothing is renamed then.
          OSError: a file cannot be read, for lack of permission for example.
        """
        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            raise FileNotFoundError(f"no checkpoint of step {step} in {self._folder}; there are {steps}")
        broken: dict[int, str] = {}
        for number in reversed(steps) if step is None else [step]:
            try:
                restored = self._read(number, like)
            except DamagedError as error:
                broken[number] = str(error)
                continue
            moved = {n: processes.on_first(functools.partial(self._move_aside, n)) for n in broken}
            damaged = tuple(Damage(n, reason, Path(moved[n])) for n, reason in broken.items())
            self._open_manager()
            return restored._replace(damaged=damaged)
        reasons = "; ".join(f"step {number}: {reason}" for number, reason in broken.items())
        raise DamagedError(
            f"no checkpoint in {self._folder} is intact, so the run cannot be resumed ({reasons}): "
            "restore the folder from a copy, or remove it to start from the first step"
        )

    def _read(self, step: int, like: States) -> Restored:
        """Verify and restore one checkpoint."""
        folder = self._folder / str(step)
        listed, record, damage = processes.on_first(functools.partial(_verify, folder))
        if damage is not None:
            raise DamagedError(damage)
        _check_fits(folder, record["arrays"], like)
        # Without a place Orbax puts arrays where they were, which may be devices of processes that are gone.
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or here),
            like,
        )
        # If the files match their digests, a failure of Orbax has another cause than damage.
        kind = OSError if listed else DamagedError
        failure = None
        try:
            with (
                _described(f"the checkpoint {folder} cannot be restored", kind),
                ocp.StandardCheckpointer() as checkpointer,
            ):
                states = checkpointer.restore(folder / "states", abstract)
        except OSError as error:
            failure = error
        if any(processes.gather(None if failure is None else str(failure))):  # all go on in the same way
            raise failure or kind(f"another process cannot restore the checkpoint {folder}")
        for name, value in checksum.checksums(states).items():
            if value != record["arrays"][name]["checksum"]:
                raise DamagedError(f"{folder}: the array {name} is damaged: its checksum does not match")
        return Restored(step, states, record["notes"])

    def _open_manager(self) -> ocp.CheckpointManager:
        """Return Orbax's manager. The first call removes partial and superseded checkpoints from the folder."""
        if self._manager is None:
            self._fvu = dict(processes.on_first(self._clear))
            self._manager = ocp.CheckpointManager(
                self._folder,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=_Preserved(self._kept),
                    async_options=ocp.AsyncOptions(
                        post_finalization_callback=self._list_files,
                        # If a folder cannot be created in the background, Orbax waits for its files until a timeout.
                        create_directories_asynchronously=False,
                    ),
                    lightweight_initialize=True,  # reads nothing in the checkpoints
                ),
            )
        return self._manager

    def _clear(self) -> list[tuple[int, float]]:
        """Remove partial and superseded checkpoints; return the steps of the others, each with its FVU."""
        steps = self._steps()
        self._fvu = {step: _fvu(self._folder / str(step)) for step in steps}
        for path in self._folder.iterdir():
            if ".orbax-checkpoint-tmp" in path.name:
                shutil.rmtree(path)
        for step in set(steps) - self._kept(steps):
            shutil.rmtree(self._folder / str(step))
        return list(self._fvu.items())

    def _kept(self, steps: Sequence[int]) -> set[int]:
        """Return the steps to keep: the latest, and the best one since the first session of the run."""
        if self._keep is None:
            return set(steps)
        known = [step for step in steps if not math.isnan(self._fvu.get(step, math.nan))]
        best = sorted(known, key=lambda step: (self._fvu[step], -step))[:1]
        return {*sorted(steps)[-self._keep :], *best}

    def _list_files(self) -> None:
        """Write the file list of the checkpoint that Orbax has written and is about to rename."""
        if not processes.is_first():
            return
        folders = list(self._folder.glob(f"{self._saving}.orbax-checkpoint-tmp*"))
        if len(folders) == 1:  # otherwise `wait` writes the list
            manifest.write(folders[0], _LATE)

    def _move_aside(self, step: int) -> str:
        """Rename a damaged checkpoint so that it is not read again; remove the oldest renamed ones."""
        path = self._folder / f"{step}{DAMAGED}"
        shutil.rmtree(path, ignore_errors=True)
        (self._folder / str(step)).replace(path)
        steps = [int(p.name.removesuffix(DAMAGED)) for p in self._folder.glob(f"[0-9]*{DAMAGED}")]
        for old in sorted(steps)[:-_KEEP_DAMAGED]:
            shutil.rmtree(self._folder / f"{old}{DAMAGED}")
        return str(path)

    @contextlib.contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        """Raise errors of Orbax as an OSError that names the checkpoint, and remove its partial files."""
        try:
            with _described(f"the checkpoint of step {step} could not be written to {self._folder}", OSError):
                yield
        except Exception:
            self._saving = None
            for path in self._folder.glob(f"{step}.orbax-checkpoint-tmp*") if processes.is_first() else ():
                shutil.rmtree(path, ignore_errors=True)
            raise


class _Preserved(policies.PreservationPolicy):
    """A policy that keeps the steps returned by a function of all steps."""

    def __init__(self, kept: Callable[[Sequence[int]], set[int]]):
        self._kept = kept

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        kept = self._kept([checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step in kept for checkpoint in checkpoints]


def _is_checkpoint(path: Path) -> bool:
    """Return whether a folder is a checkpoint, or the rest of one that was being deleted."""
    if not path.is_dir() or path.is_symlink():
        return False
    names = {inner.name for inner in path.iterdir()}
    return not names or bool(names & _PARTS)


def _record(states: States, notes: dict[str, Any], fvu: float) -> dict[str, Any]:
    """Return the JSON record saved with the arrays: their checksums, and the notes with a digest."""
    checksums = checksum.checksums(states)
    leaves = checksum.leaves_by_path(states)
    arrays = {name: {**_form(leaf), "checksum": checksums[name]} for name, leaf in leaves.items()}
    record = {"version": _VERSION, "fvu": fvu, "arrays": arrays, "notes": json.loads(json.dumps(notes))}
    return record | {"sha256": manifest.json_digest(record)}


def _verify(folder: Path) -> tuple[bool, dict[str, Any] | None, str | None]:
    """Return whether all files of a checkpoint are listed with their digests, its record, and what is damaged."""
    try:
        return manifest.check(folder, _LATE), _read_record(folder), None
    except DamagedError as error:
        return False, None, str(error)


def _read_record(folder: Path) -> dict[str, Any]:
    """Return the record of a checkpoint, see `_record`.

    Raises:
      DamagedError: the record is missing or damaged, or another version of jsae wrote it.
    """
    path = folder / "notes" / "metadata"
    record = manifest.read_json(path)
    if isinstance(record, dict) and not record.keys() & (_RECORD - {"notes"}):
        raise DamagedError(f"{path} has no checksums: it is damaged, or an earlier version of jsae wrote it")
    if not isinstance(record, dict) or record.keys() != _RECORD:
        raise DamagedError(f"{path} is not the record of a checkpoint")
    rest = {name: value for name, value in record.items() if name != "sha256"}
    if manifest.json_digest(rest) != record["sha256"]:
        raise DamagedError(f"{path} is damaged: its digest does not match")
    if record["version"] != _VERSION:
        raise DamagedError(f"{path} has version {record['version']}; this version of jsae reads {_VERSION}")
    return record


def _fvu(folder: Path) -> float:
    """Return the FVU that a checkpoint was saved with; NaN if its record cannot be read."""
    try:
        return float(_read_record(folder)["fvu"])
    except (OSError, TypeError, ValueError):
        return math.nan


def _form(leaf: Any) -> dict[str, Any]:
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def _check_fits(folder: Path, arrays: dict[str, Any], like: States) -> None:
    """Raise ConfigError, naming the first difference, unless the saved arrays have the expected shapes and dtypes."""
    saved = {name: {key: array[key] for key in ("shape", "dtype")} for name, array in arrays.items()}
    expected = {name: _form(leaf) for name, leaf in checksum.leaves_by_path(like).items()}
    for name in sorted(saved.keys() | expected.keys()):
        if saved.get(name) != expected.get(name):
            raise ConfigError(
                f"the checkpoint {folder} does not fit this configuration: the array {name} is "
                f"{_shown(saved.get(name))} there and must be {_shown(expected.get(name))}"
            )


def _shown(form: dict[str, Any] | None) -> str:
    return "absent" if form is None else f"{form['dtype']}{form['shape']}"


@contextlib.contextmanager
def _described(problem: str, kind: type[OSError]) -> Iterator[None]:
    """Raise any exception of Orbax and TensorStore as one of `kind`, with one line that begins with `problem`."""
    try:
        yield
    except (DamagedError, ConfigError, MemoryError):
        raise
    except Exception as error:
        line = " ".join(str(error).split()) or type(error).__name__
        if len(line) > 500:  # TensorStore's messages are long and end with the system's message
            line = f"{line[:200]} … {line[-300:]}"
        raise kind(f"{problem}: {line}") from error
