"""Model diffing where the differences are known: new, removed, turned and weakened directions of two toy stages.

A BatchTopK crosscoder reads both stages, with and without latents that are dedicated to one of them. Counted are the
features that a latent of the right kind stands for (cosine above 0.9), and exclusive latents that stand for none.
Removed and new features are as frequent as all others, and ten times rarer.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from bridge.locations import FilePath
from bridge.settings import flag
from experiments.benches import quality_tables, timing
from jsae.settings import COUNT, TOKENS, Range, at_least, check_fields

_KINDS = ("shared", "rotated", "weakened", "removed", "new")


@dataclass(frozen=True)
class Config:
    """World and crosscoders of the measurement."""

    rarities: tuple[float, ...] = flag(
        (1.0, 0.1),
        "Frequencies of removed and new features, relative to that of all others.",
        Range(1e-6, 1, "lie between 0 and 1"),
    )
    exclusive: tuple[int, ...] = flag((12, 0), "Latents that are dedicated to each stage.", at_least(0, 2**20))
    d_sae: int = flag(96, "Latents.", COUNT)
    k: int = flag(4, "Active latents per token.", COUNT)
    num_activations: int = flag(1_500_000, "Tokens that every crosscoder is trained on.", TOKENS)
    batch_size: int = flag(1000, "Tokens per step.", COUNT)
    rate: float = flag(3e-3, "Learning rate.", Range(1e-9, 1, "lie between 1e-9 and 1"))
    samples: int = flag(200_000, "Different tokens in the training data.", TOKENS)
    tokens: int = flag(60_000, "Tokens on which latents are measured.", TOKENS)
    seeds: int = flag(3, "Number of worlds and crosscoders.", at_least(1, 1000))
    out: FilePath = flag("experiments/results/stages_cpu.json", "File for the results.")

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.rarities or not self.exclusive:
            raise ValueError("rarities and exclusive need at least one value each")
        most = max(self.exclusive)
        if self.d_sae <= 2 * most:
            raise ValueError(f"exclusive={most} for each of two stages leaves none of d_sae={self.d_sae} to share")
        if self.k > self.d_sae:
            raise ValueError(f"k={self.k} is more than d_sae={self.d_sae}")
        if self.num_activations < self.batch_size:
            raise ValueError(f"num_activations={self.num_activations} is less than batch_size={self.batch_size}")


def main(config: Config) -> int:
    """Train and score all crosscoders, print a table, write the results."""
    from jsae.progress import Progress

    started, results = time.perf_counter(), []
    runs = [(rarity, exclusive) for exclusive in config.exclusive for rarity in config.rarities]
    with Progress("training and scoring", len(runs) * config.seeds, "crosscoders") as progress:
        for rarity, exclusive in runs:
            findings = []
            for seed in range(config.seeds):
                findings.append(_finding(config, rarity, exclusive, seed))
                progress.advance()
            results.append({"rarity": rarity, "exclusive": exclusive, "seeds": findings} | _totals(findings))
            described = {"machine": timing.machine("cpu"), "settings": timing.settings(config)}
            timing.write(
                config.out, described | {"seconds": time.perf_counter() - started, "results": results}
            )  # as far as they are
    console = quality_tables.console()
    console.print(_table(config, results))
    console.print(f"figures: {config.out}", soft_wrap=True)
    return 0


def _finding(config: Config, rarity: float, exclusive: int, seed: int) -> dict[str, Any]:
    """Return the score of one crosscoder as JSON values."""
    import jsae
    from bridge.stages import validation
    from jsae.synthetic import StagesConfig, StageWorld

    world = StageWorld(StagesConfig(rarity=rarity, seed=seed))
    sizes = jsae.BatchTopK.Config(2 * world.config.width, config.d_sae, k=config.k, layers=2, exclusive=exclusive)
    settings = jsae.TrainConfig(
        config.num_activations, batch_size=config.batch_size, learning_rate=config.rate, seed=seed
    )
    block = min(20 * config.batch_size, config.samples)
    trained = jsae.train(list(world.sample(config.samples)), sizes, settings, block_size=block)
    return validation.score(world, trained.plain, config.tokens).to_json()


def _totals(findings: list[dict[str, Any]]) -> dict[str, Any]:
    """Return counts over all seeds, and the recall of removed and new features."""
    found = {kind: sum(finding["found"][kind] for finding in findings) for kind in _KINDS}
    features = {kind: sum(finding["features"][kind] for finding in findings) for kind in _KINDS}
    differing = [sum(counts[kind] for kind in ("removed", "new")) for counts in (found, features)]
    return {
        "found": found,
        "features": features,
        "recall": differing[0] / differing[1],
        "exclusive_latents": sum(finding["exclusive"] for finding in findings),
        "false_alarms": [alarm for finding in findings for alarm in finding["false_alarms"]],
    }


def _table(config: Config, results: list[dict[str, Any]]) -> Table:
    """Return a row for every frequency and number of dedicated latents."""
    table = Table(title=f"features found, of {config.seeds} worlds and crosscoders together")
    for column in ("rarity", "dedicated", *_KINDS, "recall", "false alarms"):
        table.add_column(column, justify="right")
    for row in results:
        table.add_row(
            f"{row['rarity']:g}",
            str(row["exclusive"]),
            *(f"{row['found'][kind]}/{row['features'][kind]}" for kind in _KINDS),
            f"{row['recall']:.2f}",
            f"{len(row['false_alarms'])}/{row['exclusive_latents']}",
        )
    return table
