"""The default learning rate beside the best one of a sweep, for every architecture on several kinds of data.

Every SAE is trained with nothing given, and at rates of the same run that lie factors of sqrt(2) around that default.
Scores are those of the exported SAE on held-out activations. Penalised architectures aim at an L0 of k; where a rate
misses it, FVU is moved to that L0 by the slope of -0.5 of log FVU in log L0.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge.locations import Checkpoint, Data, FilePath
from bridge.settings import flag
from experiments.benches import peers, quality, quality_sides, tables, timing
from experiments.benches import quality_config as quality_settings
from jsae.progress import Progress

if TYPE_CHECKING:
    from experiments.benches.quality_config import Plan
    from experiments.benches.quality_subjects import Subject

_SLOPE = -0.5
_COLUMNS = ("architecture", "default rate", "FVU", "dead", "best rate", "FVU", "dead", "default over best")


@dataclass(frozen=True)
class Config:
    """Data, SAEs and rates of the measurement."""

    subjects: tuple[str, ...] = flag(tuple(quality_settings.SUBJECTS), "Data to train on, as for `bench quality`.")
    checkpoint: Checkpoint = flag("demo", "nanochat checkpoint whose activations are learned.")
    data: Data = flag("stdlib", "Text for the checkpoint.")
    architectures: tuple[str, ...] = flag(quality_settings.ARCHITECTURES, "Architectures to train.")
    d_sae: int = flag(1024, "Latents. The synthetic world has SAEs of its own size.")
    k: int = flag(32, "Active latents per token, or the target L0.")
    nested_widths: tuple[int, ...] = flag((64, 256), "Matryoshka's inner widths.")
    num_activations: int = flag(2**18, "Activations that every SAE is trained on.")
    batch_size: int = flag(512, "Activations per step.")
    places: int = flag(4, "Rates on either side of the default, factors of sqrt(2) apart.")
    seeds: int = flag(1, "Number of seeds for the weights.")
    heldout_activations: int = flag(65536, "Held-out activations to score on.")
    markdown: bool = flag(False, "Print the tables as Markdown.")
    peer_env: FilePath = flag(peers.TRAINERS_HOME, "The environment of the other trainers, which has SmolLM2.")
    out: FilePath = flag("experiments/results/rates_cpu.json", "File for the results.")

    def __post_init__(self) -> None:
        quality_settings.check_sizes(self, "places", "seeds", "heldout_activations")
        quality_settings.of_measurement(self)  # checks the rest


def main(config: Config) -> int:
    """Train at all rates, print a table per kind of data, write the results."""
    from rich.console import Console

    python = peers.trainers(config.peer_env) if "smollm2" in config.subjects else Path("python")
    console, found = Console(), {}
    for name in config.subjects:
        with tempfile.TemporaryDirectory() as scratch, quality_sides.compiled_once():
            subject, plan = quality.lay_out(name, quality_settings.of_measurement(config), Path(scratch), python)
            rows = []
            with Progress(name, len(config.architectures), "architectures") as progress:
                for architecture in config.architectures:
                    rows.append(_row(architecture, config, subject, plan, Path(scratch)))
                    progress.advance()
        found[name] = {"title": subject.title, "results": rows}
        cells = [_cells(row) for row in rows]
        tables.show(subject.title, _COLUMNS, cells, timing.machine("cpu"), config.markdown)
        settings = timing.settings(config, "peer_env", "markdown")
        timing.write(config.out, {"machine": timing.machine("cpu"), "settings": settings, "subjects": found})
    console.print(f"figures: {config.out}", soft_wrap=True)
    return 0


def _row(architecture: str, config: Config, subject: Subject, plan: Plan, scratch: Path) -> dict[str, Any]:
    """Return an architecture's scores at its default rate and at the rates around it."""

    def at(rate: float | None) -> dict[str, float]:
        return trained(job_of(architecture, plan, subject.d_in) | {"rate": rate}, config.seeds, subject, scratch)

    default = at(None)
    around = [at(default["rate"] * 2 ** (place / 2)) for place in range(-config.places, config.places + 1) if place]
    best = min((default, *around), key=lambda trial: trial["fvu"])
    return {
        "architecture": architecture,
        "default": default,
        "best": best,
        "default_over_best": default["fvu"] / best["fvu"],
        "tried": sorted((default, *around), key=lambda trial: trial["rate"]),
    }


def job_of(recipe: str, plan: Plan, d_in: int) -> dict[str, Any]:
    """Return the job of training a recipe with nothing given but sizes and L0, for `quality_sides.train_here`."""
    from jsae.architectures import find

    has_k = find(recipe.split()[0]).Config.k is not None
    return {
        "recipe": recipe,
        "rate": None,
        "coefficient": None if has_k else float(plan.k),
        "nothing_given": False,
        "steps": plan.num_activations // plan.batch_size,
        "batch_size": plan.batch_size,
        "k": plan.k,
        "d_in": d_in,
        "d_sae": plan.d_sae,
        "widths": [*plan.nested_widths, plan.d_sae],
    }


def trained(job: dict[str, Any], seeds: int, subject: Subject, scratch: Path) -> dict[str, float]:
    """Return the rate and the mean scores over seeds, FVU at the target L0; it is infinite where a run diverged."""
    scores, rate = [], math.nan
    for seed in range(seeds):
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            path = Path(folder) / "sae"
            answer = quality_sides.train_here(job | {"seed": seed, "folder": str(path)}, subject.folder)
            rate = answer["rate"]
            if not answer["finite"]:
                return {"rate": rate, "fvu": math.inf, "l0": math.nan, "dead_fraction": math.nan}
            scores.append(subject.scores(path))
    for score in scores:
        score["fvu"] *= 1.0 if job["coefficient"] is None else (score["l0"] / job["k"]) ** -_SLOPE
    return {"rate": rate} | {name: statistics.fmean(score[name] for score in scores) for name in scores[0]}


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    default, best = row["default"], row["best"]
    return (
        row["architecture"],
        *(
            text
            for trial in (default, best)
            for text in (f"{trial['rate']:.2g}", f"{trial['fvu']:.4f}", f"{trial['dead_fraction']:.1%}")
        ),
        f"{row['default_over_best']:.3f}",
    )
