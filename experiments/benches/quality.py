"""How well SAEs reconstruct at equal L0: against SAELens, dictionary_learning and sparsify, on the same batches.

Every trainer reads the same activations of a nanochat in the same order, in batches of the same size, and has the same
width. Each is tried at the learning rate that it takes by itself and at the same list of rates; the rate with the
lowest FVU is trained with every seed and told of. Activations are scaled, or not, as each trainer's recipe has it; all
lengths of schedules are the same parts of the run. TopK, BatchTopK and Matryoshka have the same k. The peers' penalties
of ReLU, Gated and JumpReLU are searched until L0 is close to that k; jsae is asked for the L0 of the best peer,
and once more where it misses that.

All are scored as SAELens files by the same lines, on held-out activations and in the model. The peers live in an
environment of their own, --peer_env, which is made when it is not there (pip, about 2 GB).
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
    """Trains and scores all, prints a table, writes the figures."""
    import torch
    from rich.console import Console

    if config.quick:
        few: dict[str, Any] = {
            "num_activations": 120 * config.batch_size,
            "rates": config.rates[:1],
            "seeds": 1,
            "tries": 1,
        }
        config = dataclasses.replace(config, **few, heldout_activations=4096, loss_tokens=2048)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    python = peers.trainers(config.peer_env)
    script = Path(__file__).with_name("quality_peer.py")
    console = Console()
    tell = functools.partial(console.print, soft_wrap=True, highlight=False)
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
            contest = Contest(config, subject, folder, ask, tell)
            found = []
            with Progress("training and scoring", len(config.architectures), "architectures") as progress:
                for architecture in config.architectures:
                    found += contest.rows(architecture)
                    progress.advance()
    console.print(markdown(found), soft_wrap=True, markup=False) if config.markdown else console.print(_table(found))
    settings = timing.settings(config, "peer_env", "quick")
    work = " ".join(__doc__.split("\n\n")[1].split())
    told = {"machine": timing.machine("cpu"), "peers": versions, "settings": settings, "work": work, "results": found}
    timing.write(config.out, told)
    console.print(f"figures: {config.out}", soft_wrap=True)
    return 0


# ---- what is told -------------------------------------------------------------------------------------------------

_COLUMNS = ("architecture", "trainer", "FVU", "loss recovered", "L0", "dead latents", "seconds", "learning rate")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table: means over seeds, with half of the way from the least to the greatest."""
    way = row["recipe"].partition(" ")[2]
    return (
        row["architecture"],
        row["trainer"] + (f" ({way})" if way else ""),
        f"{row['fvu']['mean']:.4f} ± {_half(row['fvu']):.4f}",
        f"{row['loss_recovered']['mean']:.4f} ± {_half(row['loss_recovered']):.4f}",
        f"{row['l0']['mean']:.1f}",
        f"{row['dead_fraction']['mean']:.1%}",
        f"{row['seconds']['mean']:.1f} ± {_half(row['seconds']):.1f}",
        f"{row['rate']:g}" if row["rate"] else "own",
    )


def _half(values: dict[str, float]) -> float:
    return (values["max"] - values["min"]) / 2


def _table(found: Sequence[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(*_COLUMNS, title="reconstruction at equal L0")
    for row in found:
        table.add_row(*_cells(row), style="bold" if row["trainer"] == OURS else None)
    return table


def markdown(found: Sequence[dict[str, Any]]) -> str:
    """The table as Markdown."""
    return tables.as_markdown(_COLUMNS, [_cells(row) for row in found])
