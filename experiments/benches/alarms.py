"""False alarms of model diffing on a real model: checkpoints that differ by nothing but a little noise.

A nanochat is compared with copies of itself whose matrices have noise of a given size, relative to their root mean
square. No latent is new, removed or turned, so every latent that is judged exclusive, weakened or rotated is an alarm.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.locations import Checkpoint, Data, FilePath
from bridge.settings import flag, settle
from experiments.benches import tables, timing
from jsae.settings import COUNT, TOKENS, Range, at_least, require

_ALARMS = ("exclusive", "weakened", "rotated")
_COLUMNS = (
    *("noise", "dedicated", "FVU", "own SAEs' FVU", "living", *_ALARMS, "alarms"),
    *("of dedicated latents", "of other rare latents"),
)
_RARE = 100
"""Tokens: a latent that fires on fewer is rare."""


@dataclass(frozen=True)
class Config:
    """Model, noise and crosscoders of the measurement."""

    checkpoint: Checkpoint = flag("demo", "nanochat checkpoint.")
    data: Data = flag("stdlib", "Text.")
    layer: int = flag(2, "Layer that crosscoders read.", at_least(0, 9999))
    noises: tuple[float, ...] = flag(
        (0.001, 0.03), "Noise in every matrix, relative to its root mean square.", Range(0, 10, "lie between 0 and 10")
    )
    exclusive: tuple[int, ...] = flag((0, 32), "Latents that are dedicated to each checkpoint.", at_least(0, 2**20))
    expansion_factor: int = flag(4, "Latents per dimension of the model.", COUNT)
    k: int = flag(16, "Active latents per token.", COUNT)
    num_activations: int = flag(120_000, "Tokens that every crosscoder is trained on.", TOKENS)
    batch_size: int = flag(2048, "Tokens per step.", COUNT)
    context_size: int = flag(128, "Tokens of a row of text.", at_least(2, 2**17))
    tokens: int = flag(30_000, "Held-out tokens on which latents are judged.", TOKENS)
    runs: FilePath | None = flag(None, "Directory in which checkpoints and runs are kept.")
    markdown: bool = flag(False, "Print the table as Markdown.")
    out: FilePath = flag("experiments/results/alarms_cpu.json", "File for the results.")

    def __post_init__(self) -> None:
        settle(self)
        require(
            self.num_activations >= self.batch_size,
            f"--num_activations={self.num_activations} is less than one batch of {self.batch_size}",
        )
        require(bool(self.noises) and bool(self.exclusive), "--noises and --exclusive need at least one value each")


def main(config: Config) -> int:
    """Train and compare all crosscoders, print a table, write the results."""
    started, results = time.perf_counter(), []
    machine = timing.machine("cpu")
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(config.runs or scratch)
        for noise in config.noises:
            checkpoints = _checkpoints(config, noise, root / f"noise-{noise:g}")
            for exclusive in config.exclusive:
                table = _compared(config, checkpoints, exclusive, root / f"run-{noise:g}-{exclusive}")
                results.append({"noise": noise, "dedicated": exclusive} | _counts(table, exclusive))
                described = {"machine": machine, "settings": timing.settings(config, "runs", "markdown")}
                timing.write(
                    config.out, described | {"seconds": time.perf_counter() - started, "results": results}
                )  # as far as they are
    tables.show("false alarms of model diffing", _COLUMNS, list(map(_row, results)), machine, config.markdown)
    return 0


def _checkpoints(config: Config, noise: float, folder: Path) -> tuple[str, str]:
    """Write the model, and a copy with noise in its matrices, as upstream does; return `--checkpoints`."""
    import torch

    import bridge.nanochat
    from bridge.nanochat import locate

    files = locate.find(config.checkpoint)
    generator = torch.Generator().manual_seed(0)
    weights = bridge.nanochat.load(config.checkpoint).model.state_dict()
    noisy = {
        name: weight + noise * weight.float().square().mean().sqrt() * torch.randn(weight.shape, generator=generator)
        for name, weight in weights.items()
    }
    noisy = {name: new.to(weights[name].dtype) if new.ndim > 1 else weights[name] for name, new in noisy.items()}
    for step, state in ((1, weights), (2, noisy)):
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(dict(state), folder / f"model_{step:06d}.pt")
        meta = json.loads(files.meta.read_text()) if files.meta else {}
        (folder / f"meta_{step:06d}.json").write_text(json.dumps(meta | {"step": step}))
    assert files.tokenizer is not None
    shutil.copytree(files.tokenizer, folder / "tokenizer", dirs_exist_ok=True)
    return f"before={folder}@1", f"after={folder}@2"


def _compared(config: Config, checkpoints: tuple[str, str], exclusive: int, folder: Path) -> Mapping[str, Any]:
    """Train a crosscoder over both; return what became of its latents, as `stages.json` has it."""
    from bridge.stages import measuring
    from bridge.training import train

    run = train(
        checkpoints=checkpoints,
        data=config.data,
        layer=config.layer,
        activation="batchtopk",
        k=config.k,
        expansion_factor=config.expansion_factor,
        exclusive_latents=exclusive,
        num_activations=config.num_activations,
        batch_size=config.batch_size,
        context_size=config.context_size,
        heldout_tokens=config.tokens,
        output_dir=str(folder),
    )
    (comparison,) = measuring.compare(run, measuring.Extent(heldout_tokens=config.tokens))
    return comparison.table()


def _counts(table: Mapping[str, Any], exclusive: int) -> dict[str, Any]:
    """Return the numbers of alarms and what they are of; the first `exclusive` latents per checkpoint are dedicated."""
    summary = table["summary"]
    living = len(table["kinds"]) - summary["dead"]
    counts = {kind: summary[kind] for kind in _ALARMS}
    stages = table["checkpoints"]
    fvu = {name: [stage[name] for stage in stages] for name in ("fvu", "own_sae_fvu", "own_sae_l0")}
    own = len(stages) * exclusive
    alarms = [latent for latent, kind in enumerate(table["kinds"]) if kind in _ALARMS]
    fires = [table["latents"]["density"][latent] * table["tokens"] for latent in alarms if latent >= own]
    parts = {
        "alarms": len(alarms),
        "dedicated_alarms": len(alarms) - len(fires),
        "rare_alarms": sum(tokens < _RARE for tokens in fires),
    }
    return {"living": living, **counts, **parts, **fvu}


def _row(result: Mapping[str, Any]) -> tuple[str, ...]:
    fvus = (" ".join(f"{value:.3f}" for value in result[name]) for name in ("fvu", "own_sae_fvu"))
    counts = (str(result[name]) for name in ("living", *_ALARMS))
    share = result["alarms"] / max(result["living"], 1)
    parts = (str(result[name]) for name in ("dedicated_alarms", "rare_alarms"))
    return (f"{result['noise']:g}", str(result["dedicated"]), *fvus, *counts, f"{share:.1%}", *parts)
