"""Prepare a run with crosscoders over checkpoints for the explorer: one checkpoint's own SAEs, and timelines."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Sequence

from rich.console import Console

from bridge.nanochat import Nanochat
from bridge.run import Run, exports, timelines
from bridge.run.saes import load_saes
from bridge.run.subjects import Choice
from bridge.runtime import InterpretableModel
from bridge.settings import InMemory
from bridge.stages import loading, losses, measuring
from bridge.stages.names import Stage
from bridge.torch_sae import TorchSAE
from jsae import jsons
from jsae.progress import Progress
from jsae.saelens.settings import CFG
from jsae.settings import require


def stages_of(run: Run) -> tuple[Stage, ...]:
    """Return the checkpoints that a run's crosscoders read; () if it has none over checkpoints.

    Raises:
      ConfigError: their record is broken.
      FileNotFoundError: the run is a sweep; names its variants.
    """
    for folder in run.exports.values():
        metadata = jsons.read(folder / CFG).get("metadata")
        record = metadata.get("checkpoints") if isinstance(metadata, dict) else None
        return () if record is None else tuple(loading.of_record(record))
    return ()


def choose(run: Run, choice: Choice, name: str | None) -> tuple[Choice, Stage | None]:
    """Return the choice of one checkpoint's own SAEs, and the checkpoint; the choice itself for a run on one.

    Args:
      run: whose SAEs are explored.
      choice: of all of the run.
      name: of the checkpoint; None is the last.

    Raises:
      ConfigError: a checkpoint that the crosscoders do not read, without an SAE of its own, or chosen twice; or a name
        for a run on one checkpoint.
    """
    stages = stages_of(run)
    if not stages:
        require(name is None, f"--stage={name} is for runs of `train --checkpoints`; {run.path} is on one checkpoint")
        return choice, None
    require(
        choice.checkpoint is None and choice.step is None,
        f"{run.path} is on several checkpoints: choose one with --stage, not with --checkpoint",
    )
    names = [stage.name for stage in stages]
    require(name is None or name in names, f"--stage={name}: {run.path} is on {', '.join(names)}")
    stage = stages[-1] if name is None else stages[names.index(name)]
    for hook in run.exports:
        require(
            stage.name in exports.stages(run.path, hook),
            f"{run.stage_folder(stage.name, hook)} does not exist: {stage.name} has no SAE of its own, which the "
            "training writes at its end",
        )
    paths = (run.stage_folder(stage.name, hook).parent for hook in run.exports)
    found = dataclasses.replace(choice, paths=(next(paths),), checkpoint=stage.path, step=stage.step)
    return found, stage


class Checkpoints:
    """The checkpoints of a run for a live explorer, loaded when they are asked for; two of them stay in memory.

    Args:
      run: with crosscoders over checkpoints.
      chosen: name of the checkpoint that is served, and in memory already.
      nano: that checkpoint, on the device of all others.
    """

    def __init__(self, run: Run, chosen: str, nano: Nanochat):
        self._run, self._nano, self._stages = run, nano, {stage.name: stage for stage in stages_of(run)}
        self.names, self.chosen = tuple(self._stages), chosen
        self.opened = functools.lru_cache(maxsize=2)(self._open)
        self.saes = functools.lru_cache(maxsize=2)(self._load)

    def _open(self, name: str) -> InterpretableModel:
        """Return a checkpoint with its own SAEs.

        Raises:
          ConfigError, OSError, ValueError: it cannot be read, or is another one than the SAEs were trained on.
        """
        import bridge.nanochat

        stage, device = self._stages[name], self._nano.model.lm_head.weight.device
        nano = bridge.nanochat.load(stage.path, stage.step, device, tokenizer=self._nano.tokenizer)
        return InterpretableModel.from_nanochat(nano, self.saes(name))

    def _load(self, name: str) -> dict[str, TorchSAE]:
        """Return a checkpoint's own SAEs by hook.

        Raises:
          OSError, ValueError: they cannot be read.
        """
        hooks = list(self._run.exports)
        folder = self._run.stage_folder(name, hooks[0]).parent
        return load_saes(folder, self._nano.model.lm_head.weight.device)


def compare_unless_done(run: Run, device: str, in_memory: InMemory, console: Console) -> None:
    """Write `stages.json` as `experiments.diff` does by default, unless it fits the run's crosscoders.

    Raises:
      ConfigError, FileNotFoundError, ValueError: see `measuring.compare`.
    """
    if all(timelines.read(run.path, name) is not None for name in run.exports):
        return
    print(f"comparing checkpoints for {run.table_file('stages')}", file=sys.stderr, flush=True)
    measuring.write(run, device=device, in_memory=in_memory, show_progress=not console.quiet)


def write_losses(run: Run, hooks: Sequence[str], device: str, in_memory: InMemory, console: Console) -> None:
    """Write the losses of all checkpoints on the texts of the latents, unless they are there.

    Raises:
      ConfigError: a checkpoint that does not exist, or has changed.
      ValueError: it is broken.
    """
    if all(run.losses_file(hook).is_file() for hook in hooks):
        return
    stages = stages_of(run)
    nanos = loading.load(stages, device, run.flags.get("tokenizer"), in_memory)
    rows = run.records(hooks[0]).texts.header
    total = len(stages) * min(rows.rows * rows.row_length, losses.MOST_TOKENS)
    with Progress("losses of all checkpoints", total, "tokens", console=console) as progress:
        losses.write(run, hooks, loading.models(nanos), progress)
