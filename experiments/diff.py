"""Say what became of latents over the checkpoints of a nanochat: which are new, gone, weaker, turned, or survive.

    python -m experiments.diff --run_dir=runs/stages
    python -m experiments.diff --run_dir=runs/stages --film=film.svg
    python -m experiments.diff --saes=runs/sae1000,runs/sae2000,runs/sae4000 --output_file=survival.json

--run_dir is a run that was trained with --checkpoints: its crosscoder is compared on held-out text, checkpoint by
checkpoint, and stages.json is written into the run. --saes are SAEs of successive checkpoints, each trained from the
one before (`train --init_from`): their latents are matched one to one.

Printed are also the latents that each checkpoint gained and lost most, with the text on which each is strongest.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bridge.accelerators import check_name, require_torch
from bridge.locations import Data, FilePath
from bridge.run import Run
from bridge.settings import InMemory, flag, settle
from experiments import flags
from jsae.settings import TOKENS, Range, require

_SHARE = Range(0, 1, "lie between 0 and 1")


@dataclass(frozen=True)
class DiffConfig:
    """Crosscoders or SAEs, text and bounds of a comparison."""

    run_dir: FilePath | None = flag(None, "The run with crosscoders over checkpoints.")
    saes: tuple[FilePath, ...] = flag((), "Runs or exported SAEs of successive checkpoints, A,B,C, to match.")
    hook: str | None = flag(None, "The SAE of this hook, where --saes are runs with several.")
    data: Data | None = flag(None, "Text, as for training; none is the run's.")
    split: Literal["heldout", "train", "all"] = flag("heldout", "Part of the text; 'all' for separate text.")
    heldout_tokens: int = flag(200_000, "Tokens on which checkpoints are compared.", TOKENS)
    absent: float = flag(0.05, "Strength, of that in the strongest checkpoint, up to which a latent is absent.", _SHARE)
    weak: float = flag(0.5, "Strength up to which it is weak.", _SHARE)
    turned: float = flag(0.95, "Cosine of directions below which it has turned.", _SHARE)
    same: float = flag(0.7, "Cosine of decoder rows from which latents of two of --saes are the same.", _SHARE)
    show: int = flag(
        10,
        "Latents of every kind, and of every checkpoint's gains and losses, to print.",
        Range(0, 10_000, "lie between 0 and 10,000"),
    )
    output_file: FilePath | None = flag(None, "File for the survival of --saes, JSON; none prints it only.")
    film: FilePath | None = flag(
        None, "File for an animated picture of the latents of --run_dir, SVG; none draws none."
    )
    models_in_memory: InMemory = flag(
        "all", "Of a run: 'all', or 'one' that has the weights of every checkpoint in turn, read from its file."
    )
    device: str = flag("cpu", "Device of the models.")

    def __post_init__(self) -> None:
        settle(self)
        check_name(self.device)
        require(bool(self.run_dir) != bool(self.saes), "give either --run_dir or --saes")
        require(not self.saes or len(self.saes) > 1, "--saes needs at least two SAEs, A,B")
        require(bool(self.saes) or self.output_file is None, "--output_file is for --saes; a run gets stages.json")
        require(bool(self.saes) or self.hook is None, "--hook chooses among the SAEs of --saes: leave it out")
        require(not self.saes or self.film is None, "--film is for --run_dir: leave it out")
        require(self.film is None or str(self.film).endswith(".svg"), f"--film={self.film} does not end in .svg")
        require(not self.saes or self.models_in_memory == "all", "--models_in_memory is for --run_dir: leave it out")
        require(self.absent <= self.weak, f"--absent={self.absent} is above --weak={self.weak}: swap them")


def main(config: DiffConfig) -> int:
    """Compare, print a summary, and write the results."""
    if config.saes:
        return _survival(config)
    require_torch(config.device)
    assert config.run_dir is not None
    run = Run(config.run_dir)
    with run.writing():
        return _stages(config, run)


def _stages(config: DiffConfig, run: Run) -> int:
    from bridge.stages import measuring
    from bridge.stages.latents import Thresholds
    from experiments import diff_view

    extent = measuring.Extent(**flags.shared(measuring.Extent, config))
    bounds = Thresholds(**flags.shared(Thresholds, config))
    tables = measuring.write(run, extent, bounds, config.device, config.models_in_memory, show_progress=True)
    for name, table in tables.items():
        diff_view.show(name, table, config.show)
    print(f"stages          {run.table_file('stages')}")
    if config.film is not None:
        _draw(run, config.film, list(tables))
    return 0


def _draw(run: Run, film_file: str, names: list[str]) -> None:
    """Write the film of every crosscoder, with its name in that of the file if there are several."""
    from bridge.run import timelines
    from bridge.stages import film
    from jsae import files

    for name in names:
        file = Path(film_file)
        file = file if len(names) == 1 else file.with_name(f"{file.stem}-{name}.svg")
        timeline = timelines.read(run.path, name)
        assert timeline is not None  # it was just written
        files.write(file, film.svg(timeline, f"The latents of {name} over {len(timeline.names)} checkpoints"))
        print(f"film            {file}")


def _survival(config: DiffConfig) -> int:
    from bridge.stages import survival
    from experiments import diff_view
    from jsae import files

    snapshots = [survival.read(path, config.hook) for path in config.saes]
    report = survival.report(snapshots, config.same)
    diff_view.show_survival(report)
    if config.output_file is not None:
        files.write(Path(config.output_file), json.dumps(report, allow_nan=False) + "\n")
        print(f"survival        {config.output_file}")
    return 0


if __name__ == "__main__":
    flags.run(DiffConfig, main)
