"""Say how often latents recur in SAEs of other seeds: a share for every latent, beside the run.

    python -m experiments.train --seed=0,1,2 --output_dir=runs/seeds
    python -m experiments.stability --run_dir=runs/seeds
    python -m experiments.stability --runs=runs/a,runs/b,runs/c

Latents of each pair of SAEs are matched one to one by the cosines of their decoder rows. stability.json in every run
has the shares; the explorer's page and exports for Neuronpedia have them from there.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from bridge.locations import FilePath
from bridge.run import Run, commands
from bridge.settings import flag, settle
from experiments import flags
from jsae.settings import Range, require


@dataclass(frozen=True)
class StabilityConfig:
    """Runs that differ in their seed, and when two latents are the same."""

    run_dir: FilePath | None = flag(None, "A run with --seed=0,1,2; its variants are compared.")
    runs: tuple[FilePath, ...] = flag((), "Runs that differ in their seed only, A,B,C.")
    same: float = flag(
        0.7, "Cosine of decoder rows from which two latents are the same.", Range(0, 1, "lie between 0 and 1")
    )

    def __post_init__(self) -> None:
        settle(self)
        require(bool(self.run_dir) != bool(self.runs), "give either --run_dir or --runs")


def main(config: StabilityConfig) -> int:
    """Compare the runs, write their tables, print a summary."""
    from bridge.run import recurrence
    from experiments import evaluate_view

    groups = [list(map(Path, config.runs))] if config.runs else recurrence.seeds_of(Path(config.run_dir or ""))
    with contextlib.ExitStack() as locks:
        for run in dict.fromkeys(run for group in groups for run in group):
            locks.enter_context(Run(run).writing())
        for group in groups:
            evaluate_view.show_recurrence(recurrence.compare(group, config.same), config.same)
            print(f"stability       stability.json in {', '.join(map(str, group))}")
    return 0


def next_commands(config: StabilityConfig) -> list[str]:
    """Return what to do next with the comparison."""
    from bridge.run import recurrence

    first = Path(config.runs[0]) if config.runs else recurrence.seeds_of(Path(config.run_dir or ""))[0][0]
    return commands.after_comparing(first)


if __name__ == "__main__":
    flags.run(StabilityConfig, main, after=next_commands)
