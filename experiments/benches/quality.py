"""Reconstruction at equal L0: jsae, SAELens, dictionary_learning and sparsify, trained on the same batches.

Every trainer reads the same activations of a nanochat in the same order, in batches of the same size, and has the same
width. Each is tried at its default learning rate and at the same list of rates; the rate with the lowest FVU is trained
with every seed and reported. Activations are scaled, or not, as each trainer's recipe has it; all lengths of schedules
are the same fractions of the run. TopK, BatchTopK and Matryoshka have the same k. The peers' penalties of ReLU, Gated
and JumpReLU are searched until L0 is close to that k; jsae aims at the L0 of the best peer, a second time if it misses.

All SAEs are scored as SAELens files by the same code, on held-out activations and in the model. The peers have their
own environment, --peer_env, which is created if it does not exist (pip, about 2 GB).
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.benches import peers, quality_sides, tables, timing
from experiments.benches.quality_config import OURS, Config
from experiments.benches.quality_contest import Contest
from jsae.progress import Progress


def main(config: Config) -> int:
    """Train and score all SAEs, print a table, write the results."""
    import torch
    from rich.console import Console

    if config.quick:
        quick: dict[str, Any] = {
            "num_activations": 120 * config.batch_size,
            "rates": config.rates[:1],
            "seeds": 1,
            "tries": 1,
        }
        config = dataclasses.replace(config, **quick, heldout_activations=4096, loss_tokens=2048)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    python = peers.trainers(config.peer_env)
    script = Path(__file__).with_name("quality_peer.py")
    console = Console()
    report = functools.partial(console.print, soft_wrap=True, highlight=False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subject = quality_sides.lay_out(
            folder,
            checkpoint=config.checkpoint,
            data=config.data,
            layer=config.layer,
            train=config.num_activations,
            heldout=config.heldout_activations,
            loss=config.loss_tokens,
        )
        with peers.process(python, script, folder) as (versions, ask):
            contest = Contest(config, subject, folder, ask, report)
            results = []
            with Progress("training and scoring", len(config.architectures), "architectures") as progress:
                for architecture in config.architectures:
                    results += contest.rows(architecture)
                    progress.advance()
    if config.markdown:
        console.print(markdown(results), soft_wrap=True, markup=False)
    else:
        console.print(_table(results))
    settings = timing.settings(config, "peer_env", "quick")
    work = " ".join(__doc__.split("\n\n")[1].split())
    timing.write(
        config.out,
        {"machine": timing.machine("cpu"), "peers": versions, "settings": settings, "work": work, "results": results},
    )
    console.print(f"figures: {config.out}", soft_wrap=True)
    return 0


# ---- results ------------------------------------------------------------------------------------------------------

_COLUMNS = ("architecture", "trainer", "FVU", "loss recovered", "L0", "dead latents", "seconds", "learning rate")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Return a row of the table: means over seeds, with half of the range."""
    variant = row["recipe"].partition(" ")[2]
    return (
        row["architecture"],
        row["trainer"] + (f" ({variant})" if variant else ""),
        f"{row['fvu']['mean']:.4f} ± {_half_range(row['fvu']):.4f}",
        f"{row['loss_recovered']['mean']:.4f} ± {_half_range(row['loss_recovered']):.4f}",
        f"{row['l0']['mean']:.1f}",
        f"{row['dead_fraction']['mean']:.1%}",
        f"{row['seconds']['mean']:.1f} ± {_half_range(row['seconds']):.1f}",
        f"{row['rate']:g}" if row["rate"] else "own",
    )


def _half_range(values: dict[str, float]) -> float:
    return (values["max"] - values["min"]) / 2


def _table(results: Sequence[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(*_COLUMNS, title="reconstruction at equal L0")
    for row in results:
        table.add_row(*_cells(row), style="bold" if row["trainer"] == OURS else None)
    return table


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """Return the table of results in Markdown."""
    return tables.as_markdown(_COLUMNS, [_cells(row) for row in results])
