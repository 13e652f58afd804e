"""The cost of watching a training: steps of a small nanochat alone, with SAEs between its steps, and with a sidecar.

Every training has the same seed, so their losses must be equal to the last bit. Counted are seconds of the clock and of
the processor per step, without the first steps; the sidecar's own processor time is not in it.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from bridge.locations import Data, FilePath
from bridge.settings import WATCH_SHARE, flag
from experiments.benches import quality_tables, timing
from jsae.settings import COUNT, at_least, check_fields


@dataclass(frozen=True)
class Config:
    """Model, training and SAEs of the measurement."""

    data: Data = flag("stdlib", "Text to learn.")
    n_layer: int = flag(3, "Layers.", at_least(1, 2**10))
    n_embd: int = flag(128, "Channels.", at_least(1, 2**16))
    sequence_len: int = flag(128, "Tokens of a row.", at_least(1, 2**17))
    batch_rows: int = flag(8, "Rows per step.", COUNT)
    steps: int = flag(60, "Steps of every training.", at_least(20))
    share: float = flag(0.05, "Share of the training's time for the SAEs.", WATCH_SHARE)
    tokens: int = flag(1024, "Activations of a step, a batch of the SAEs.", COUNT)
    expansion_factor: int = flag(8, "Latents per channel.", COUNT)
    out: FilePath = flag("experiments/results/watch_cpu.json", "File for the results.")

    def __post_init__(self) -> None:
        check_fields(self)


def main(config: Config) -> int:
    """Train in turn, print a table, write the results."""
    import torch

    from bridge.training import device

    device.open_torch("cpu")
    torch.set_num_threads(1)
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for name, place in (("alone", None), ("watched", "process"), ("sidecar", "sidecar"), ("alone again", None)):
            results[name] = _training(config, place, Path(folder) / name)
            print(f"{name}: {results[name]['seconds']:.3f} s per step", flush=True)
    losses = [result.pop("losses") for result in results.values()]
    equal = all(own == losses[0] for own in losses)
    described = {"machine": timing.machine("cpu"), "settings": timing.settings(config)}
    timing.write(config.out, described | {"losses_equal": equal, "results": results})
    console = quality_tables.console()
    console.print(_table(results))
    console.print(f"losses are {'the same bits' if equal else 'DIFFERENT'}; figures: {config.out}", soft_wrap=True)
    return 0 if equal else 1


def _training(config: Config, place: str | None, folder: Path) -> dict[str, Any]:
    """Train once; return the time of a step, what the watcher says, and all losses."""
    import torch

    from bridge.live import Watcher
    from bridge.nanochat.corpus import Corpus
    from bridge.nanochat.model import GPT, GPTConfig
    from bridge.nanochat.pretraining import Recipe, Trainer
    from bridge.nanochat.tokenizer import Tokenizer

    tokenizer = Tokenizer({bytes([i]): i for i in range(256)})
    sizes: dict[str, Any] = {"n_layer": config.n_layer, "n_embd": config.n_embd, "sequence_len": config.sequence_len}
    heads = max(config.n_embd // 32, 1)
    model = GPT(
        GPTConfig.of_generation(
            "G7", vocab_size=tokenizer.vocab_size, n_head=heads, n_kv_head=heads, window_pattern="L", **sizes
        )
    )
    model.init_weights(torch.Generator().manual_seed(0))
    corpus = Corpus(config.data, tokenizer, split="train", row_len=config.sequence_len + 1, heldout_fraction=0.05)
    trainer = Trainer(model, corpus, Recipe(steps=config.steps, batch_rows=config.batch_rows, micro_rows=2))
    watcher = None
    if place is not None:
        watcher = Watcher(
            model,
            checkpoint=folder / "model",
            output_dir=folder / "run",
            layer=config.n_layer // 2,
            share=config.share,
            tokens=config.tokens,
            batch_size=config.tokens,
            expansion_factor=config.expansion_factor,
            place=place,
        )
    skipped, losses, setup = 10, [], 0.0
    for figures in trainer.run():
        losses.append(figures["loss"])
        if watcher is not None:
            watcher.step(trainer.step)
        if trainer.step == skipped:
            wall, processor = time.perf_counter(), time.process_time()
            setup = 0.0 if watcher is None else watcher.budget.setup
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    steps = config.steps - skipped
    result: dict[str, Any] = {"seconds": wall / steps, "processor_seconds": processor / steps, "losses": losses}
    if watcher is not None:
        budget = watcher.budget
        late = budget.setup - setup  # compiled after the first steps
        result |= {"seconds": (wall - late) / steps, "share": budget.ratio, "setup_seconds": budget.setup}
        result |= {"due": budget.due, "skipped": budget.skipped, "batches": watcher.batches}
        watcher.close()
    return result


def _table(results: dict[str, dict[str, Any]]) -> Table:
    table = Table()
    for column in ("", "s per step", "processor s", "share", "batches", "skipped"):
        table.add_column(column, justify="right" if column else "left")
    for name, result in results.items():
        share = f"{result['share']:.1%}" if "share" in result else ""
        counts = [str(result.get(key, "")) for key in ("batches", "skipped")]
        table.add_row(name, f"{result['seconds']:.3f}", f"{result['processor_seconds']:.3f}", share, *counts)
    return table
