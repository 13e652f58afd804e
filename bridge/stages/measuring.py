"""Compare the checkpoints of a run's crosscoders on text, and say what became of every latent."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

from bridge.evaluate import text
from bridge.evaluate.site import Site
from bridge.nanochat import Nanochat
from bridge.nanochat.units import Split
from bridge.run import Run
from bridge.selection import recorded_ids
from bridge.stages import latents, loading, sums
from bridge.stages.latents import Thresholds
from bridge.stages.names import Stage
from bridge.torch_sae import TorchSAE
from bridge.torch_sae import load as load_sae
from jsae import saelens
from jsae.progress import Progress
from jsae.saelens import layers
from jsae.settings import require

_CHUNK = 2048  # tokens whose latents are in memory at once


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
    stages: tuple[Stage, ...]
    sae: TorchSAE
    sums: sums.StageSums

    def latents(self) -> latents.Latents:
        """Return the measures of all latents."""
        return latents.measure(decoder(self.sae), self.sums)

    def table(self, thresholds: Thresholds | None = None) -> dict[str, Any]:
        """Return all results as JSON values."""
        bounds, found = thresholds or Thresholds(), self.latents()
        names = [stage.name for stage in self.stages]
        return {
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
        }


def decoder(sae: TorchSAE) -> Any:
    """Return decoder rows by checkpoint, (f, m, d), in numpy."""
    return sae.W_dec.reshape(sae.d_sae, sae.layers, -1).cpu().numpy()


def compare(
    run: Run, extent: Extent | None = None, device: str = "cpu", *, show_progress: bool = False
) -> list[Comparison]:
    """Compare the checkpoints that every crosscoder of a run reads, on the same text.

    Args:
      run: trained with `--checkpoints`.
      extent: the text.
      device: of models and crosscoders.
      show_progress: show progress on stderr.

    Raises:
      ConfigError: the run's SAEs do not read checkpoints, or a checkpoint has changed.
      FileNotFoundError: no such run, export, checkpoint or text.
      ValueError: text that does not fill a row, or a broken file.
    """
    extent, flags = extent or Extent(), run.flags
    exports = run.exports
    require(bool(exports), f"{run.path} has no crosscoder: `python -m experiments.train --checkpoints=…` writes it")
    saes = {name: load_sae(folder, device) for name, folder in exports.items()}
    metadata = next(iter(saes.values())).metadata
    record = metadata.get("checkpoints") if isinstance(metadata, dict) else None
    stages = tuple(loading.of_record(record))
    nanos = loading.load(stages, device, flags.get("tokenizer"))
    loading.check_recorded(record, nanos)
    rows = _text(extent, flags, nanos)
    console = Console(stderr=True, quiet=not show_progress)
    comparisons = []
    for name, sae in saes.items():
        with Progress(f"comparing {name}", rows.size, "tokens", console=console) as progress:
            site = _site(sae, nanos, bool(flags.get("drop_sinks", True)), int(flags["tokens_per_forward"]))
            with progress.tokens_of(nanos[0].model):
                comparisons.append(Comparison(name, stages, sae, add_up(run, name, sae, site, rows)))
    return comparisons


def add_up(run: Run, name: str, sae: TorchSAE, site: Site, rows: Any) -> sums.StageSums:
    """Return the sums of a crosscoder over rows of text."""
    plain = saelens.read(run.sae_folder(name))
    own = [_single(layers.single(plain, layer), site.device) for layer in range(plain.layers)]

    def chunks() -> Any:
        for batch in site.read(site.batches(rows)):
            yield from batch.acts[batch.mask].split(_CHUNK)

    return sums.add_up(sae, own, chunks())


def _single(plain: saelens.Plain, device: torch.device) -> TorchSAE:
    """Return an SAE in plain form as a module."""
    weights = {name: torch.from_numpy(weight) for name, weight in plain.weights.items()}
    return TorchSAE(plain.cfg, weights).eval().to(device)


def _text(extent: Extent, flags: Any, nanos: Sequence[Nanochat]) -> Any:
    """Return rows of tokens, (R, T), as long as all checkpoints take them."""
    row_len = min(nano.row_length(flags.get("context_size")) for nano in nanos)
    tokenizer = nanos[0].tokenizer
    documents = text.documents(extent.data or flags["data"], extent.split, tokenizer)
    return text.read(documents, tokenizer, row_len, extent.heldout_tokens).tokens


def _site(sae: TorchSAE, nanos: Sequence[Nanochat], drop_sinks: bool, tokens_per_forward: int) -> Site:
    """Return where a crosscoder reads."""
    excluded = recorded_ids(sae.metadata, nanos[0].tokenizer)
    first, *others = [nano.model for nano in nanos]
    return Site(first, sae.metadata["hook_name"], excluded, drop_sinks, tokens_per_forward, other_models=tuple(others))
