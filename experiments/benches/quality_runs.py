"""Measurements that train with jsae alone on the subjects of `bench quality`: their settings, loop and scores."""

from __future__ import annotations

import dataclasses
import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
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


@dataclass(frozen=True)
class Sizes:
    """Data, sizes and output of such a measurement."""

    subjects: tuple[str, ...] = flag(quality_settings.TUNED, "Data to train on, as for `bench quality`.")
    checkpoint: Checkpoint = flag("demo", "nanochat checkpoint whose activations are learned.")
    data: Data = flag("stdlib", "Text for the checkpoint.")
    d_sae: int = flag(1024, "Latents. The synthetic world has SAEs of its own size.")
    k: int = flag(32, "Active latents per token, or the target L0.")
    nested_widths: tuple[int, ...] = flag((64, 256), "Matryoshka's inner widths.")
    num_activations: int = flag(2**18, "Activations that every SAE is trained on.")
    batch_size: int = flag(512, "Activations per step.")
    seeds: int = flag(1, "Number of seeds for the weights.")
    heldout_activations: int = flag(65536, "Held-out activations to score on.")
    markdown: bool = flag(False, "Print the tables as Markdown.")
    peer_env: FilePath = flag(peers.TRAINERS_HOME, "The environment of the other trainers, which has SmolLM2.")
    out: FilePath = flag("experiments/results/NAME_cpu.json", "File for the results.")

    def __post_init__(self) -> None:
        quality_settings.check_sizes(self, "seeds", "heldout_activations")
        self.quality()  # checks the rest

    def quality(self) -> quality_settings.Config:
        """Return the settings of data and sizes."""
        names = {field.name for field in dataclasses.fields(quality_settings.Config)} - {"out"}
        return quality_settings.Config(
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name in names}
        )


def on_every_subject(
    config: Sizes,
    items: Sequence[str],
    unit: str,
    rows_of: Callable[[str, Subject, Plan, Path], list[dict[str, Any]]],
    columns: Sequence[str],
    cells: Callable[[dict[str, Any]], tuple[str, ...]],
) -> int:
    """Train all items on every subject, print a table per subject, write the results as far as they are; return 0.

    Args:
      config: the settings.
      items: what is trained.
      unit: what items are, in the plural.
      rows_of: given an item, subject, plan and a folder, returns its results.
      columns: of the table.
      cells: given a result, returns its line of the table.
    """
    from rich.console import Console

    python = peers.trainers(config.peer_env) if "smollm2" in config.subjects else Path("python")
    found: dict[str, Any] = {}
    for name in config.subjects:
        rows: list[dict[str, Any]] = []
        with tempfile.TemporaryDirectory() as scratch, quality_sides.compiled_once():
            subject, plan = quality.lay_out(name, config.quality(), Path(scratch), python)
            with Progress(name, len(items), unit) as progress:
                for item in items:
                    rows += rows_of(item, subject, plan, Path(scratch))
                    progress.advance()
        found[name] = {"title": subject.title, "results": rows}
        tables.show(subject.title, columns, [cells(row) for row in rows], timing.machine("cpu"), config.markdown)
        settings = timing.settings(config, "peer_env", "markdown")
        timing.write(config.out, {"machine": timing.machine("cpu"), "settings": settings, "subjects": found})
    Console().print(f"figures: {config.out}", soft_wrap=True)
    return 0


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
    """Return rate, strength of the penalty and mean scores over seeds, FVU at the target L0.

    FVU is infinite where a run diverged.
    """
    from jsae.rates import to_target

    answers, scores = [], []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            path = Path(folder) / "sae"
            answers.append(quality_sides.train_here(job | {"seed": seed, "folder": str(path)}, subject.folder))
            if not answers[-1]["finite"]:
                scores = [{"fvu": math.inf, "l0": math.nan, "dead_fraction": math.nan}]
                break
            scores.append(subject.scores(path))
            scores[-1]["fvu"] *= to_target(scores[-1]["l0"], float(job["k"]))
    known = {"rate": answers[-1]["rate"], "strength": statistics.fmean(answer["strength"] for answer in answers)}
    return known | {name: statistics.fmean(score[name] for score in scores) for name in scores[0]}
