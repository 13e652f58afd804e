"""A run: the directory that a training writes, with its SAEs and their results."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge.run import directory, exports, tables
from bridge.run import labels as names
from bridge.run.labels import Names
from bridge.run.layout import Layout
from bridge.run.model import ModelPath

if TYPE_CHECKING:
    import torch

    from bridge.nanochat import Nanochat
    from bridge.torch_sae import TorchSAE
    from jsae.records.store import Store


class Run(Layout):
    """A run directory: its settings, its model, its SAEs and their records, labels, notes and evaluation.

        run = Run("runs/demo")
        nano, sae, store = run.model(), run.sae(), run.records("blocks.2.hook_resid_post")

    Files are read on every access, and nothing is cached. Paths are those of `Layout`. A variant of a sweep is a run of
    its own; `variants` of the sweep lists them.
    """

    # ---- what the training wrote -----------------------------------------------------------------------------------

    @property
    def config(self) -> dict[str, Any]:
        """The contents of config.json: "flags", "facts" and "versions".

        Raises:
          ConfigError: the directory is not a run, or the file is broken.
        """
        return directory.read(self.path)

    @property
    def flags(self) -> dict[str, Any]:
        """The flags that the run was started with; paths are absolute."""
        return self.config["flags"]

    @property
    def facts(self) -> dict[str, Any]:
        """Hashes of model and data, and the hooks that are read."""
        return self.config["facts"]

    @property
    def versions(self) -> dict[str, str | None]:
        """Versions of python and the libraries that the run was started with."""
        return self.config.get("versions", {})

    def model_path(
        self, *, checkpoint: str | None = None, step: int | None = None, tokenizer: str | None = None
    ) -> ModelPath:
        """Return the location of the run's model, or of the one that is given; see `ModelPath.resolve`.

        Raises:
          ConfigError: no checkpoint is given, and the directory is not a run.
        """
        given = {"checkpoint": checkpoint, "step": step, "tokenizer": tokenizer}
        return ModelPath.resolve(given, self.flags if checkpoint is None else {})

    def model(
        self,
        device: str | torch.device = "cpu",
        *,
        checkpoint: str | None = None,
        step: int | None = None,
        tokenizer: str | None = None,
    ) -> Nanochat:
        """Load the nanochat that the run was trained on, with its tokenizer.

        Args:
          device: of the model.
          checkpoint: another nanochat; the run's step and tokenizer are then ignored.
          step: another step of the checkpoint.
          tokenizer: another directory of the tokenizer.

        Raises:
          ConfigError: no checkpoint is given and the directory is not a run; or the checkpoint has no tokenizer.
          FileNotFoundError: no such checkpoint.
          ValueError: it is broken, or not a nanochat.
        """
        return self.model_path(checkpoint=checkpoint, step=step, tokenizer=tokenizer).load(device)

    # ---- SAEs ------------------------------------------------------------------------------------------------------

    @property
    def exports(self) -> dict[str, Path]:
        """The folders of the finished exports by name, which is the hook; {} if there are none.

        Raises:
          FileNotFoundError: the run is a sweep; names its variants.
        """
        return {folder.name: folder for folder in exports.finished(self.path)}

    @property
    def variants(self) -> list[Run]:
        """The runs of a sweep that have exports; [] for a run that is not a sweep."""
        return [Run(folder) for folder in exports.variants(self.path)]

    def saes(self, device: str | torch.device = "cpu") -> dict[str, TorchSAE]:
        """Load the SAEs by hook, as `bridge.runtime.InterpretableModel` takes them; see `load_saes`."""
        from bridge.run.saes import load_saes

        return load_saes(self.path, device)

    def transcoders(self, device: str | torch.device = "cpu") -> dict[str, TorchSAE]:
        """Load the transcoders by hook of their input, for `bridge.circuits.trace`; see `load_transcoders`."""
        from bridge.run.saes import load_transcoders

        return load_transcoders(self.path, device)

    def sae(self, name: str | None = None, device: str | torch.device = "cpu") -> TorchSAE:
        """Load one SAE, transcoder or crosscoder.

        Args:
          name: the export's; None is the only one.
          device: of the SAE.

        Raises:
          FileNotFoundError: there is none, none of that name, or several and no name; lists what exists.
          ValueError: it is broken.
        """
        from bridge import torch_sae

        return torch_sae.load(self.export(name), device)

    def export(self, name: str | None = None) -> Path:
        """Return the folder of one exported SAE; None is the only one.

        Raises:
          FileNotFoundError: as `sae`.
        """
        return self.exports[exports.choose(self.path, self.exports, name)]

    def warn_of_marked(self, hooks: Iterable[str]) -> list[Path]:
        """Print a warning for every SAE of these hooks that its training marked as of no use; return their folders."""
        return exports.warn_of_marked(map(self.sae_folder, hooks))

    # ---- results ---------------------------------------------------------------------------------------------------

    @property
    def recorded_hooks(self) -> list[str]:
        """The hooks that have records, in order of their names."""
        return exports.recorded(self.records_folder)

    def records(self, hook: str | None = None) -> Store:
        """Open the records of an SAE, checked against its export if there is one.

        Of a crosscoder over checkpoints, they are those of one checkpoint's own SAE.

        Args:
          hook: of the SAE; None is the only one with records.

        Raises:
          FileNotFoundError: there are none.
          StoreError: they are broken, of another version, or of another SAE than the export.
        """
        from jsae.records.store import Store

        hook = exports.choose(self.path, self.recorded_hooks, hook, "records") if hook is None else hook
        return Store(self.store_folder(hook), exports.known_digest(self._recorded_folder(hook)), hook)

    def recorded_export(self, hook: str) -> Path | None:
        """Return the folder of the exported SAE whose records a hook has; None if it is not there.

        Raises:
          StoreError: the records are broken, or of another version.
        """
        from jsae.saelens.settings import is_complete

        folder = self._recorded_folder(hook)
        return folder if is_complete(folder) else None

    def _recorded_folder(self, hook: str) -> Path:
        from jsae.records.store import Store

        stage = Store(self.store_folder(hook), hook=hook).header.settings.get("stage")
        known = stage in exports.stages(self.path, hook)  # the name comes from a file
        return self.stage_folder(str(stage), hook) if known else self.sae_folder(hook)

    @property
    def labels(self) -> Mapping[str, Names]:
        """The names of latents by hook: labels of the evaluation, overridden by those that people gave.

        A hook without SAE, records, labels and notes raises KeyError, which names the others.

        Raises:
          ValueError: labels or notes are broken.
        """
        return _Labels(self)

    @property
    def notes(self) -> list[dict[str, Any]]:
        """All lines that people wrote, in their order; see `bridge.run.labels.notes`."""
        return names.notes(self.path)

    @property
    def evaluation(self) -> dict[str, Any]:
        """The metrics of the exported SAEs by hook, from eval.json.

        Raises:
          FileNotFoundError: the run was not evaluated.
          ValueError: the file is broken.
        """
        return tables.read(self.table_file("eval"))

    def write_evaluation(self, results: tables.Results) -> None:
        """Write the results of an evaluation; see `bridge.run.tables.write`."""
        tables.write(self.path, results)

    # ---- writing ---------------------------------------------------------------------------------------------------

    @property
    def is_writable(self) -> bool:
        """True if this process may write to the directory."""
        return directory.is_writable(self.path)

    def writing(self) -> AbstractContextManager[None]:
        """Lock the run, so that no other process writes to it meanwhile; see `bridge.run.directory.writing`."""
        return directory.writing(self.path)

    def held(self) -> AbstractContextManager[None]:
        """Lock the run if it is writable; a run that can only be read needs no lock."""
        return self.writing() if self.is_writable else contextlib.nullcontext()


class _Labels(Mapping[str, Names]):
    """Names of latents by hook, read on access."""

    def __init__(self, run: Run):
        self._run = run
        file = run.table_file("labels")
        labels = tables.read(file) if file.is_file() else {}
        noted = {line["hook"] for line in run.notes}
        self._hooks = sorted({*run.exports, *run.recorded_hooks, *labels, *noted})

    def __getitem__(self, hook: str) -> Names:
        if hook not in self._hooks:
            raise KeyError(f"{self._run.path} has no SAE of {hook}: there are {', '.join(self._hooks) or 'none'}")
        return Names.read(self._run.path, hook)

    def __iter__(self) -> Iterator[str]:
        return iter(self._hooks)

    def __len__(self) -> int:
        return len(self._hooks)
