"""Compare the checkpoints of a run's crosscoders on text, and say what became of every latent."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from rich.console import Console

from bridge.evaluate import text
from bridge.evaluate.site import Site
from bridge.nanochat import Nanochat
from bridge.nanochat.units import Split
from bridge.run import Run, tables
from bridge.run.timelines import REVISION
from bridge.selection import recorded_ids
from bridge.settings import InMemory
from bridge.stages import latents, loading, sums
from bridge.stages.contexts import context
from bridge.stages.latents import Thresholds
from bridge.stages.names import Stage
from bridge.torch_sae import TorchSAE
from bridge.torch_sae import load as load_sae
from jsae.progress import Progress
from jsae.records.store import digest
from jsae.settings import require


@dataclass(frozen=True)
class Extent:
    """The text on which checkpoints are compared."""

    data: str | None = None
    """None is the run's."""
    split: Split = "heldout"
    heldout_tokens: int = 200_000


@dataclass(frozen=True)
class Comparison:
    """A crosscoder with the sums over text."""

    name: str
    """Of its export."""
    digest: str
    """Of its export (`jsae.records.store.digest`)."""
    stages: tuple[Stage, ...]
    sae: TorchSAE
    sums: sums.StageSums
    contexts: list[dict[str, str] | None]
    """The text on which each latent is strongest (`bridge.stages.contexts`); None if it never fires."""

    def latents(self) -> latents.Latents:
        """Return the measures of all latents."""
        return latents.measure(decoder(self.sae), self.sums)

    def table(self, thresholds: Thresholds | None = None) -> dict[str, Any]:
        """Return all results as JSON values."""
        bounds, found = thresholds or Thresholds(), self.latents()
        names = [stage.name for stage in self.stages]
        return {
            "revision": REVISION,
            "crosscoder": self.digest,
            "checkpoints": [
                {
                    "name": stage.name,
                    "path": stage.path,
                    "step": stage.step,
                    "fvu": float(fvu),
                    "own_sae_fvu": float(own_fvu),
                    "own_sae_l0": float(fired.sum() / self.sums.tokens),
                }
                for stage, fvu, own_fvu, fired in zip(
                    self.stages, self.sums.fvu, self.sums.own_fvu, self.sums.own_fired, strict=True
                )
            ],
            "tokens": int(self.sums.tokens),
            "thresholds": dataclasses.asdict(bounds),
            "summary": latents.summary(names, found, bounds),
            "kinds": latents.kinds(found, bounds),
            "events": [event._asdict() | {"stage": names[event.stage]} for event in latents.events(found, bounds)],
            "latents": found.table(),
            "texts": self.contexts,
        }


def decoder(sae: TorchSAE) -> Any:
    """Return decoder rows by checkpoint, (f, m, d), in numpy."""
    return sae.W_dec.reshape(sae.d_sae, sae.layers, -1).cpu().numpy()


@dataclass(frozen=True)
class Subject:
    """A crosscoder with the checkpoints that it reads."""

    name: str
    """Of its export."""
    stages: tuple[Stage, ...]
    nanos: tuple[Nanochat, ...]
    sae: TorchSAE
    site: Site
    row_len: int
    """Tokens of a row of text, which all checkpoints take."""


def open_subject(run: Run, name: str, device: str = "cpu", in_memory: InMemory = "all") -> Subject:
    """Load a crosscoder and its checkpoints.

    Raises:
      ConfigError: it does not read checkpoints, or one has changed.
      FileNotFoundError: a checkpoint that does not exist.
      ValueError: a broken file.
    """
    return next(_subjects(run, {name: run.sae_folder(name)}, device, in_memory))


def table_of(run: Run, name: str) -> Mapping[str, Any]:
    """Return what `stages.json` says of a crosscoder.

    Raises:
      FileNotFoundError: the crosscoder was not compared; names the command that does it.
      ValueError: the file is broken.
    """
    file = run.table_file("stages")
    command = f"`python -m experiments.diff --run_dir={run.path}`"
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: {command} writes it")
    table = tables.read(file).get(name)
    if table is None:
        raise FileNotFoundError(f"{file} says nothing of {name}: {command} writes it anew")
    lists = isinstance(table, dict) and all(isinstance(table.get(key), list) for key in ("kinds", "checkpoints"))
    if lists and table.get("revision") != REVISION:
        raise FileNotFoundError(f"{file} is of an earlier version: {command} writes it anew")
    if not lists or not {"strength", "present"} <= set(table.get("latents", ())):
        raise ValueError(f"{file} is broken at {name}: {command} writes it anew")
    return table


def compare(
    run: Run,
    extent: Extent | None = None,
    device: str = "cpu",
    in_memory: InMemory = "all",
    *,
    show_progress: bool = False,
) -> list[Comparison]:
    """Compare the checkpoints that every crosscoder of a run reads, on the same text.

    Args:
      run: trained with `--checkpoints`.
      extent: the text.
      device: of models and crosscoders.
      in_memory: see `bridge.stages.loading.load`.
      show_progress: show progress on stderr.

    Raises:
      ConfigError: the run's SAEs do not read checkpoints, or a checkpoint has changed.
      FileNotFoundError: no such run, export, checkpoint or text.
      ValueError: text that does not fill a row, or a broken file.
    """
    extent, flags = extent or Extent(), run.flags
    exports = run.exports
    require(bool(exports), f"{run.path} has no crosscoder: `python -m experiments.train --checkpoints=…` writes it")
    rows, comparisons = None, []
    console = Console(stderr=True, quiet=not show_progress)
    for subject in _subjects(run, exports, device, in_memory):
        if rows is None:
            tokenizer = subject.nanos[0].tokenizer
            documents = text.documents(extent.data or flags["data"], extent.split, tokenizer)
            rows = text.read(documents, tokenizer, subject.row_len, extent.heldout_tokens)
        progress = Progress(f"comparing {subject.name}", rows.tokens.size, "tokens", console=console)
        with progress, progress.tokens_of(subject.site.model):
            total, cells = _add_up(run, subject, rows.tokens)
        where = np.unravel_index(cells[total.largest_at], rows.tokens.shape)
        contexts = [
            context(rows, int(row), int(position), subject.nanos[0].tokenizer) if largest > 0 else None
            for row, position, largest in zip(*where, total.largest, strict=True)
        ]
        sha256 = digest(exports[subject.name])
        comparisons.append(Comparison(subject.name, sha256, subject.stages, subject.sae, total, contexts))
    return comparisons


def write(
    run: Run,
    extent: Extent | None = None,
    thresholds: Thresholds | None = None,
    device: str = "cpu",
    in_memory: InMemory = "all",
    *,
    show_progress: bool = False,
) -> dict[str, dict[str, Any]]:
    """Compare as `compare`, write the run's `stages.json`, and return its tables by crosscoder."""
    found = compare(run, extent, device, in_memory, show_progress=show_progress)
    comparisons = {comparison.name: comparison.table(thresholds) for comparison in found}
    run.write_evaluation({name: {"stages": table} for name, table in comparisons.items()})
    return comparisons


def _subjects(run: Run, exports: Mapping[str, Path], device: str, in_memory: InMemory) -> Iterator[Subject]:
    """Yield the crosscoders of a run with the checkpoints that they read, which are loaded once."""
    flags = run.flags
    saes = {name: load_sae(folder, device) for name, folder in exports.items()}
    metadata = next(iter(saes.values())).metadata
    record = metadata.get("checkpoints") if isinstance(metadata, dict) else None
    stages = tuple(loading.of_record(record))
    nanos = tuple(loading.load(stages, device, flags.get("tokenizer"), in_memory))
    loading.check_recorded(record, nanos)
    row_len = min(nano.row_length(flags.get("context_size")) for nano in nanos)
    for name, sae in saes.items():
        site = _site(sae, nanos, bool(flags.get("drop_sinks", True)), int(flags["tokens_per_forward"]))
        yield Subject(name, stages, nanos, sae, site, row_len)


def _add_up(
    run: Run, subject: Subject, rows: Int[np.ndarray, "R T"]
) -> tuple[sums.StageSums, Int[np.ndarray, " tokens"]]:
    """Return the sums of a crosscoder, and of its checkpoints' own SAEs, over text; and the cells that count in it."""
    folders = [run.stage_folder(stage.name, subject.name) for stage in subject.stages]
    own = [load_sae(folder, subject.site.device) for folder in folders]
    site, cells = subject.site, []

    def chunks() -> Iterator[torch.Tensor]:
        for batch in site.read(site.batches(rows)):
            cells.append(batch.start * rows.shape[1] + np.flatnonzero(batch.mask.cpu().numpy()))
            yield from batch.acts[batch.mask].split(sums.CHUNK)

    return sums.add_up(subject.sae, own, chunks()), np.concatenate(cells)


def _site(sae: TorchSAE, nanos: Sequence[Nanochat], drop_sinks: bool, tokens_per_forward: int) -> Site:
    """Return where a crosscoder reads."""
    excluded = recorded_ids(sae.metadata, nanos[0].tokenizer)
    hook, models = sae.metadata["hook_name"], loading.models(nanos)
    return Site(nanos[0].model, hook, excluded, drop_sinks, tokens_per_forward, models=models)
