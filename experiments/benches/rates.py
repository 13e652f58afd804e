"""The default learning rate beside the best one of a sweep, for every architecture on several kinds of data.

Every SAE is trained with nothing given, and at rates of the same run that lie factors of sqrt(2) around that default.
Scores are those of the exported SAE on held-out activations. Where its L0 there is not k, FVU is moved to an L0 of k by
the slope of -0.5 of log FVU in log L0.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge.locations import FilePath
from bridge.settings import flag
from experiments.benches import quality_config as quality_settings
from experiments.benches import quality_runs
from jsae.settings import require

if TYPE_CHECKING:
    from experiments.benches.quality_config import Plan
    from experiments.benches.quality_subjects import Subject

_COLUMNS = (
    *("architecture", "default rate", "FVU", "dead held-out", "dead in training"),
    *("best rate", "FVU", "dead held-out", "default over best"),
)


@dataclass(frozen=True)
class Config(quality_runs.Sizes):
    """Data, SAEs and rates of the measurement."""

    architectures: tuple[str, ...] = flag(quality_settings.ARCHITECTURES, "Architectures to train.")
    places: int = flag(4, "Rates on either side of the default, factors of sqrt(2) apart; 0: the default alone.")
    out: FilePath = flag("experiments/results/rates_cpu.json", "File for the results.")

    def __post_init__(self) -> None:
        require(self.places >= 0, f"places must be at least 0, got {self.places}")
        super().__post_init__()


def main(config: Config) -> int:
    """Train at all rates, print a table per kind of data, write the results."""
    rows = functools.partial(_row, config)
    return quality_runs.on_every_subject(config, config.architectures, "architectures", rows, _COLUMNS, _cells)


def _row(config: Config, architecture: str, subject: Subject, plan: Plan, scratch: Path) -> list[dict[str, Any]]:
    """Return one result: an architecture's scores at its default rate and at the rates around it."""

    def at(rate: float | None) -> dict[str, float]:
        return quality_runs.trained(
            quality_runs.job_of(architecture, plan, subject.d_in) | {"rate": rate}, config.seeds, subject, scratch
        )

    default = at(None)
    around = [at(default["rate"] * 2 ** (place / 2)) for place in range(-config.places, config.places + 1) if place]
    best = min((default, *around), key=lambda trial: trial["fvu"])
    return [
        {
            "architecture": architecture,
            "default": default,
            "best": best,
            "default_over_best": default["fvu"] / best["fvu"],
            "tried": sorted((default, *around), key=lambda trial: trial["rate"]),
        }
    ]


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    default, best = row["default"], row["best"]
    in_training = f"{default['dead_in_training']:.1%}" if "dead_in_training" in default else ""
    return (row["architecture"], *_scores(default), in_training, *_scores(best), f"{row['default_over_best']:.3f}")


def _scores(trial: dict[str, float]) -> tuple[str, str, str]:
    return f"{trial['rate']:.2g}", f"{trial['fvu']:.4f}", f"{trial['dead_fraction']:.1%}"
