"""Checkpoints: the only importer of Orbax. Everything a run needs to go on to the same numbers, written atomically.

Every checkpoint carries checksums of its arrays and of its notes, and a list of its files with their digests. Both are
verified before anything of it is used.
"""

import contextlib
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

from jsae import checksum, manifest
from jsae.loop import States
from jsae.manifest import DamagedError
from jsae.settings import ConfigError

DAMAGED = ".damaged"
"""Suffix of a damaged checkpoint that was moved aside."""

_KEEP_DAMAGED = 2
_LATE = frozenset({"_CHECKPOINT_METADATA", "commit_success.txt"})  # what Orbax writes when everything else is written
_PARTS = frozenset({"states", "notes", manifest.NAME, *_LATE})
_RECORD = frozenset({"version", "fvu", "arrays", "notes", "sha256"})
_VERSION = 1


class Damage(NamedTuple):
    """A checkpoint that cannot be used."""

    step: int
    reason: str
    """Names the file or the array."""
    moved_to: Path


class Restored(NamedTuple):
    """What a checkpoint held."""

    step: int
    states: States
    notes: dict[str, Any]
    damaged: tuple[Damage, ...] = ()
    """Later checkpoints that are damaged, which were moved aside."""


class Checkpoints:
    """The checkpoints of a run: the latest few and the one with the lowest `fvu`. A context manager.

    Writing goes on in the background and ends with a rename, so that a run killed at any moment leaves whole
    checkpoints only. One process at a time may write to the folder.

    Args:
      folder: where they lie; made if it does not exist.
      keep: how many of the latest stay.

    Raises:
      OSError: the folder cannot be made or read.
    """

    def __init__(self, folder: Path, keep: int = 2):
        self._folder, self._keep = folder.absolute(), keep
        self._manager: ocp.CheckpointManager | None = None
        self._fvu: dict[int, float] = {}
        self._saving: int | None = None
        self._folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # An error that is on its way is not replaced by one of closing.
        with contextlib.suppress(Exception) if error is not None else contextlib.nullcontext():
            self.wait()
        if self._manager is not None:
            with contextlib.suppress(Exception):  # what failed was raised by `wait`
                self._manager.close()

    def latest(self) -> int | None:
        """Return the last step there is a checkpoint of, damaged or not. Raises OSError, see `steps`."""
        return max(self.steps(), default=None)

    def steps(self) -> list[int]:
        """Return the steps there are checkpoints of, damaged or not, rising.

        Raises:
          OSError: the folder cannot be read, or something else than a checkpoint has a number as its name there.
        """
        # Numbers as Orbax writes them.
        found = [path for path in self._folder.iterdir() if re.fullmatch(r"0|[1-9][0-9]*", path.name, re.ASCII)]
        for path in found:
            if not _is_checkpoint(path):
                raise OSError(f"{path} is not a checkpoint, and nothing else may have such a name there: move it away")
        return sorted(int(path.name) for path in found)

    def save(self, step: int, states: States, notes: dict[str, Any], fvu: float) -> None:
        """Save the states and JSON notes (the stream's cursor); return as soon as the states may be donated again.

        Raises:
          OSError: this or an earlier save failed to write (a full disk); earlier checkpoints are whole.
        """
        self.wait()
        # Orbax may still read the buffers after it returns, and the next step reuses them: hand it a copy.
        mine = jax.tree.map(jnp.copy, states)
        record = _record(mine, notes, fvu)
        args = ocp.args.Composite(states=ocp.args.StandardSave(mine), notes=ocp.args.JsonSave(record))
        manager = self._opened()
        self._fvu[step], self._saving = fvu, step
        with self._writing(step):
            manager.save(step, args=args, force=True)

    def wait(self) -> None:
        """Return when everything is written.

        Raises:
          OSError: it could not be (a full disk); earlier checkpoints are whole.
        """
        if self._saving is None:
            return
        with self._writing(self._saving):
            self._opened().wait_until_finished()
            folder = self._folder / str(self._saving)
            if (folder / manifest.NAME).is_file():
                manifest.complete(folder)
            else:
                manifest.write(folder)
        self._saving = None

    def restore(self, like: States, step: int | None = None) -> Restored:
        """Return a checkpoint in the shapes and shardings of `like`, which may be abstract, after verifying it.

        Args:
          like: the states, or their shapes.
          step: which one; None is the latest intact one. Later ones, which are damaged, are moved aside, under a name
            that ends in `.damaged`; of these the latest two are kept.

        Raises:
          FileNotFoundError: there is none.
          ConfigError: it holds states of other shapes, so another configuration.
          DamagedError: it is damaged, or all are. Nothing is moved then.
          OSError: a file must not be read.
        """
        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            raise FileNotFoundError(f"no checkpoint of step {step} in {self._folder}; there are {steps}")
        broken: dict[int, str] = {}
        for number in reversed(steps) if step is None else [step]:
            try:
                found = self._read(number, like)
            except DamagedError as error:
                broken[number] = str(error)
                continue
            damaged = tuple(Damage(n, reason, self._move_aside(n)) for n, reason in broken.items())
            self._opened()
            return found._replace(damaged=damaged)
        told = "; ".join(f"step {number}: {reason}" for number, reason in broken.items())
        raise DamagedError(
            f"no checkpoint in {self._folder} is intact, so nothing can be resumed ({told}): "
            "bring the folder back from a copy, or remove it to begin with the first step"
        )

    def _read(self, step: int, like: States) -> Restored:
        """Verify and restore one checkpoint."""
        folder = self._folder / str(step)
        listed = manifest.check(folder, _LATE)
        record = _record_in(folder)
        _check_fits(folder, record["arrays"], like)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        # Where the files are what was written, it is not they that keep Orbax from reading.
        kind = OSError if listed else DamagedError
        with _told(f"the checkpoint {folder} cannot be restored", kind), ocp.StandardCheckpointer() as checkpointer:
            states = checkpointer.restore(folder / "states", abstract)
        for name, found in checksum.of(states).items():
            if found != record["arrays"][name]["checksum"]:
                raise DamagedError(f"{folder}: the array {name} is not what was written: its checksum is another")
        return Restored(step, states, record["notes"])

    def _opened(self) -> ocp.CheckpointManager:
        """Return Orbax's manager. First, whatever else lies in the folder than the checkpoints to keep is removed."""
        if self._manager is None:
            steps = self.steps()
            self._fvu = {step: _fvu(self._folder / str(step)) for step in steps}
            for path in self._folder.iterdir():
                if ".orbax-checkpoint-tmp" in path.name:
                    shutil.rmtree(path)
            for step in set(steps) - self._kept(steps):
                shutil.rmtree(self._folder / str(step))
            self._manager = ocp.CheckpointManager(
                self._folder,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=_Preserved(self._kept),
                    async_options=ocp.AsyncOptions(
                        post_finalization_callback=self._list_files,
                        # Where a folder cannot be made in the background, its files are waited for until the timeout.
                        create_directories_asynchronously=False,
                    ),
                    lightweight_initialize=True,  # reads nothing in the checkpoints
                ),
            )
        return self._manager

    def _kept(self, steps: Sequence[int]) -> set[int]:
        """Return which of these steps stay: the latest and the best of all sessions of the run."""
        known = [step for step in steps if not math.isnan(self._fvu.get(step, math.nan))]
        best = sorted(known, key=lambda step: (self._fvu[step], -step))[:1]
        return {*sorted(steps)[-self._keep :], *best}

    def _list_files(self) -> None:
        """List the files of the checkpoint that Orbax has written and is about to rename."""
        written = list(self._folder.glob(f"{self._saving}.orbax-checkpoint-tmp*"))
        if len(written) == 1:  # else `wait` lists them
            manifest.write(written[0], _LATE)

    def _move_aside(self, step: int) -> Path:
        """Rename a checkpoint so that nothing reads it, and remove the oldest of those that were renamed."""
        path = self._folder / f"{step}{DAMAGED}"
        shutil.rmtree(path, ignore_errors=True)
        (self._folder / str(step)).replace(path)
        aside = [int(p.name.removesuffix(DAMAGED)) for p in self._folder.glob(f"[0-9]*{DAMAGED}")]
        for old in sorted(aside)[:-_KEEP_DAMAGED]:
            shutil.rmtree(self._folder / f"{old}{DAMAGED}")
        return path

    @contextlib.contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        """Raise whatever goes wrong in Orbax as an OSError that names the checkpoint; make room on the disk."""
        try:
            with _told(f"the checkpoint of step {step} could not be written to {self._folder}", OSError):
                yield
        except Exception:
            self._saving = None
            for path in self._folder.glob(f"{step}.orbax-checkpoint-tmp*"):
                shutil.rmtree(path, ignore_errors=True)
            raise


class _Preserved(policies.PreservationPolicy):
    """Has Orbax keep the steps that a function of all steps returns."""

    def __init__(self, kept: Callable[[Sequence[int]], set[int]]):
        self._kept = kept

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        kept = self._kept([checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step in kept for checkpoint in checkpoints]


def _is_checkpoint(path: Path) -> bool:
    """Return whether a folder is a checkpoint, or what is left of one that was being deleted."""
    if not path.is_dir() or path.is_symlink():
        return False
    names = {inner.name for inner in path.iterdir()}
    return not names or bool(names & _PARTS)


def _record(states: States, notes: dict[str, Any], fvu: float) -> dict[str, Any]:
    """Return what is saved beside the arrays: their checksums, and the notes with a digest."""
    checksums = checksum.of(states)
    arrays = {name: {**_form(leaf), "checksum": checksums[name]} for name, leaf in checksum.named(states).items()}
    record = {"version": _VERSION, "fvu": fvu, "arrays": arrays, "notes": json.loads(json.dumps(notes))}
    return record | {"sha256": manifest.canonical(record)}


def _record_in(folder: Path) -> dict[str, Any]:
    """Return what `_record` made, from a checkpoint.

    Raises:
      DamagedError: it is missing or not what was written; or an earlier version of this program wrote it.
    """
    path = folder / "notes" / "metadata"
    record = manifest.read_json(path)
    if isinstance(record, dict) and not record.keys() & (_RECORD - {"notes"}):
        raise DamagedError(f"{path} has no checksums: it is damaged, or an earlier version of jsae wrote it")
    if not isinstance(record, dict) or record.keys() != _RECORD:
        raise DamagedError(f"{path} is not what a checkpoint holds")
    rest = {name: value for name, value in record.items() if name != "sha256"}
    if manifest.canonical(rest) != record["sha256"]:
        raise DamagedError(f"{path} is not what was written: its digest is another")
    if record["version"] != _VERSION:
        raise DamagedError(f"{path} has version {record['version']}, and this version of jsae reads {_VERSION}")
    return record


def _fvu(folder: Path) -> float:
    """Return the FVU that a checkpoint was saved with; NaN where that cannot be known."""
    try:
        return float(_record_in(folder)["fvu"])
    except (OSError, TypeError, ValueError):
        return math.nan


def _form(leaf: Any) -> dict[str, Any]:
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def _check_fits(folder: Path, arrays: dict[str, Any], like: States) -> None:
    """Compare the arrays of a checkpoint with the wanted ones. Raises ConfigError, which names the first other one."""
    saved = {name: {key: array[key] for key in ("shape", "dtype")} for name, array in arrays.items()}
    wanted = {name: _form(leaf) for name, leaf in checksum.named(like).items()}
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            raise ConfigError(
                f"the checkpoint {folder} does not fit this configuration: the array {name} is "
                f"{_shown(saved.get(name))} there and must be {_shown(wanted.get(name))}"
            )


def _shown(form: dict[str, Any] | None) -> str:
    return "absent" if form is None else f"{form['dtype']}{form['shape']}"


@contextlib.contextmanager
def _told(what: str, kind: type[OSError]) -> Iterator[None]:
    """Raise any exception of Orbax and TensorStore as one of `kind`, in a line that begins with `what`."""
    try:
        yield
    except (DamagedError, ConfigError, MemoryError):
        raise
    except Exception as error:
        line = " ".join(str(error).split()) or type(error).__name__
        if len(line) > 500:  # TensorStore's messages are long, and say at their end what the system said
            line = f"{line[:200]} … {line[-300:]}"
        raise kind(f"{what}: {line}") from error
