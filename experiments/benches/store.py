"""The activation store: writing, reading, disk, quality of its types and its shuffle, speed of training from it.

Parts, each alone with --parts: `throughput` writes and reads a store of normal numbers of width --width; `types` trains
the same SAE on the demo nanochat's activations in every type; `shuffle` measures batches of the store, of a perfect
permutation and of text in order, and trains on each; `speed` compares training from a store on disk with training from
an array in memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import ml_dtypes
import numpy as np

from bridge.locations import FilePath
from bridge.settings import flag
from experiments.benches import timing
from experiments.benches.shapes import Size
from jsae.settings import at_least, require

if TYPE_CHECKING:
    from jsae.store import Store

Part = Literal["throughput", "types", "shuffle", "speed"]
STORAGES = ("float32", "bfloat16", "int8")


@dataclass(frozen=True)
class Config:
    """Parts and sizes of the measurement."""

    parts: tuple[Part, ...] = flag(("throughput", "types", "shuffle", "speed"), "Parts to measure.")
    rows: int = flag(393_216, "Rows of the store that is written and read.", at_least(2**16))
    width: int = flag(1280, "Width of its activations.", at_least(1))
    hook: str = flag("blocks.3.hook_resid_post", "Hook of the demo nanochat that SAEs are trained on.")
    tokens: int = flag(1_000_000, "Tokens of the demo's text to collect.", at_least(2**13))
    d_sae: int = flag(1024, "Latents of the TopK SAEs.", at_least(32))
    k: int = flag(32, "Active latents.", at_least(1))
    num_activations: int = flag(1_000_000, "Activations that an SAE is trained on.", at_least(2**12))
    seeds: int = flag(2, "Seeds of every SAE.", at_least(1))
    batch_size: int = flag(2048, "Activations per step.", at_least(1))
    sizes: tuple[str, ...] = flag(
        ("128:1024:32:2048", "768:6144:32:2048"), "Steps whose speed is compared, each d_in:d_sae:k:batch."
    )
    rounds: int = flag(4, "Rounds of speed, at least 2.", at_least(2))
    folder: FilePath | None = flag(None, "Folder for temporary stores, on the disk to measure; none is the system's.")
    out: FilePath = flag("experiments/results/store_cpu.json", "File for the results.")

    def __post_init__(self) -> None:
        for size in self.sizes:
            Size.parse(size)
        require(bool(self.parts), "parts must name at least one part")


def main(config: Config) -> int:
    """Measure the parts, print and write the results; those of other parts stay."""
    import torch
    from rich.console import Console

    torch.set_num_threads(1)  # jax uses all cores
    measure: dict[str, Callable[[Config, Path], Any]] = {
        "throughput": _throughput,
        "types": _types,
        "shuffle": _shuffle,
        "speed": _speed,
    }
    path = Path(config.out)
    results = json.loads(path.read_text(encoding="utf-8"))["results"] if path.is_file() else {}
    for part in config.parts:
        with tempfile.TemporaryDirectory(prefix="store-", dir=config.folder) as folder:
            results[part] = measure[part](config, Path(folder))
        Console().print_json(json.dumps({part: results[part]}))
        described = {"machine": timing.machine("cpu"), "settings": timing.settings(config, "parts", "folder")}
        timing.write(config.out, {**described, "results": results})
    return 0


# ---- throughput ---------------------------------------------------------------------------------------------------


def _throughput(config: Config, folder: Path) -> dict[str, Any]:
    """Return GB/s of writing and of reading in the order of training, cold and warm, by type; and bytes on disk."""
    from jsae import store

    rng = np.random.default_rng(0)
    block = (
        rng.standard_normal((65_536, config.width), np.float32) * np.exp(rng.standard_normal(config.width))
    ).astype(np.float32)
    rows = config.rows // len(block) * len(block)
    results = {}
    for storage in STORAGES:
        location = folder / storage
        started = time.perf_counter()
        opened = store.write(location, (block for _ in range(rows // len(block))), storage=storage, rows=rows)
        written = time.perf_counter() - started
        files = [path for path in location.rglob("*") if path.is_file()]
        payload = rows * opened.layout.row_bytes
        results[storage] = {
            "write_gb_per_s": payload / written / 1e9,
            "rows_written_per_s": rows / written,
            "disk_bytes_per_row": sum(path.stat().st_size for path in files) / rows,
            "files": len(files),
        }
        for state in ("cold", "warm"):
            if state == "cold":
                _drop(files)
            seconds = _read_epoch(opened)
            results[storage] |= {f"{state}_gb_per_s": payload / seconds / 1e9, f"{state}_rows_per_s": rows / seconds}
        for path in files:
            path.unlink()
    results["needed"] = _needed(results)
    return results


def _read_epoch(opened: Store) -> float:
    """Return the seconds of reading every row once, in blocks of 65,536 on the device, with nothing else to do."""
    import jax

    from jsae.store import StoreSource

    source = StoreSource(opened, memory=1)  # groups of 65,536 rows, of which a small store has several
    started = time.perf_counter()
    for _ in range(opened.rows // 65_536):
        jax.block_until_ready(_filled(source, 65_536))
    return time.perf_counter() - started


def _needed(results: dict[str, Any]) -> dict[str, Any]:
    """Return the bytes per second that a GPU's steps take, from the measured steps of an H200, by type."""
    measured = Path("experiments/results/peers_cuda.json")
    if not measured.is_file():
        return {}
    entry = json.loads(measured.read_text(encoding="utf-8"))["results"][0]
    size, seconds = entry["size"], entry["seconds"]["jsae"]["median"]
    rows = size["batch"] / seconds
    widths = {"float32": 4 * size["d_in"] + 1, "bfloat16": 2 * size["d_in"] + 1, "int8": size["d_in"] + 3}
    return {"step": size, "step_seconds": seconds, "rows_per_s": rows} | {
        f"{storage}_gb_per_s": rows * width / 1e9 for storage, width in widths.items()
    }


def _drop(files: list[Path]) -> None:
    """Drop files from the system's cache of pages."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _filled(source: Any, rows: int) -> Any:
    filling = source.fill(rows)
    while True:
        try:
            next(filling)
        except StopIteration as done:
            return done.value


# ---- quality ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _collected(config: Config, folder: Path) -> Iterator[tuple[Store, np.ndarray]]:
    """Yield a float32 store of the demo's activations, and held-out activations that count, in memory."""
    import bridge.nanochat
    from bridge import collecting
    from jsae import store

    nano = bridge.nanochat.load("demo")
    opened = []
    for split, tokens in (("train", config.tokens), ("heldout", min(100_000, config.tokens))):
        text = collecting.Text(split=split, num_tokens=tokens, storage="float32")
        collecting.collect(nano, [config.hook], folder / split, text, show_progress=True)
        opened.append(store.open(folder / split))
    yield opened[0], opened[1].read(config.hook, 0, opened[1].rows)[opened[1].kept(config.hook, 0, opened[1].rows)]


def _types(config: Config, folder: Path) -> dict[str, Any]:
    """Return the FVU on held-out float32 activations of SAEs that were trained on each type, and the type's error."""
    from jsae import store
    from jsae.store import StoreSource

    results = {}
    with _collected(config, folder) as (whole, heldout):
        acts, kept = whole.read(config.hook, 0, whole.rows), whole.kept(config.hook, 0, whole.rows)
        variance = acts[kept].var(0).sum()
        for storage in STORAGES:
            batch = {"acts": acts, "kept": kept}
            opened = store.write(folder / storage, batch, storage=storage, row_len=whole.row_len)
            error = np.square(opened.read("acts", 0, opened.rows, np.float32)[kept] - acts[kept]).sum(1).mean()
            fvus = [_fvu(config, StoreSource(opened, seed=seed), heldout, seed) for seed in range(config.seeds)]
            results[storage] = {"error_over_variance": float(error / variance), "fvu": fvus}
    return results


def _shuffle(config: Config, folder: Path) -> dict[str, Any]:
    """Return the quality of batches, and the FVU of SAEs trained on them, of several orders of the same rows."""
    from jsae.store.quality import quality

    with _collected(config, folder) as (whole, heldout):
        acts, text = whole.read(config.hook, 0, whole.rows), whole.text(0, whole.rows)
        rows = np.flatnonzero(whole.kept(config.hook, 0, whole.rows))
        results: dict[str, Any] = {"rows": whole.rows, "chunk_rows": whole.layout.chunk_rows}
        results["document_length"] = float(np.bincount(np.unique(text, return_inverse=True)[1]).mean())
        for name, order in {
            **{f"groups of {mixed:,}": _group_order(whole, mixed, len(rows)) for mixed in (65_536, 131_072, 262_144)},
            "perfect": lambda seed: np.random.default_rng(seed).permutation(rows),
            "text": lambda seed: rows,
        }.items():
            batches = _batches(order(0), config.batch_size)
            fvus = [
                _fvu(config, _reading(acts, order, config, seed), heldout, seed, block=config.batch_size)
                for seed in range(config.seeds)
            ]
            results[name] = quality(batches, acts, text)._asdict() | {"batches": len(batches), "fvu": fvus}
    return results


def _group_order(whole: Store, mixed: int, rows: int) -> Callable[[int], np.ndarray]:
    """Return a function of a seed: an epoch of a store's rows as they are read where so many rows are mixed."""
    from jsae.store import StoreSource

    memory = 4 * sum(whole.hooks.values()) * mixed
    return lambda seed: StoreSource(whole, seed=seed, memory=memory).row_numbers(rows)


def _batches(order: np.ndarray, size: int) -> list[np.ndarray]:
    return [order[start : start + size] for start in range(0, len(order) - size + 1, size)]


def _reading(acts: np.ndarray, order: Callable[[int], np.ndarray], config: Config, seed: int) -> Iterator[np.ndarray]:
    """Yield batches in an order, epoch after epoch."""
    epoch = 0
    while True:
        for rows in _batches(order(seed + 1000 * epoch), config.batch_size):
            yield acts[rows]
        epoch += 1


def _fvu(config: Config, acts: Any, heldout: np.ndarray, seed: int, block: int = 65_536) -> float:
    """Train an SAE; return its FVU on held-out activations."""
    import jsae

    sae = jsae.TopK.Config(heldout.shape[1], config.d_sae, k=config.k)
    settings = jsae.TrainConfig(config.num_activations, config.batch_size, seed=seed)
    trained = jsae.train(acts, sae, settings, block_size=block, data_seed=seed)
    error = sum(
        float(np.square(np.asarray(trained(part)) - part).sum())
        for part in np.array_split(heldout, len(heldout) // 8192 + 1)
    )
    return error / float(np.square(heldout - heldout.mean(0)).sum())


# ---- speed --------------------------------------------------------------------------------------------------------


def _speed(config: Config, folder: Path) -> list[dict[str, Any]]:
    """Return how fast steps on a store on disk are, over steps on the same activations in memory, by size."""
    from jsae import store

    results = []
    for text in config.sizes:
        size = Size.parse(text)
        rng = np.random.default_rng(0)
        acts = rng.standard_normal((262_144, size.d_in), np.float32).astype(ml_dtypes.bfloat16)
        opened = store.write(folder / text.replace(":", "-"), acts)
        sources: dict[str, Any] = {}
        cases = {name: _case(size, name, opened, acts, sources) for name in ("memory", "store", "store, cold")}
        seconds = timing.by_turns(cases, config.rounds)
        ratio = {
            name: timing.spread([m / s for m, s in zip(seconds["memory"], seconds[name], strict=True)])
            for name in cases
        }
        rows = _STEPS * size.batch
        results.append(
            {
                "size": text,
                "rows_per_s": {name: rows / timing.spread(values)["median"] for name, values in seconds.items()},
                "speed_over_memory": {name: ratio[name] for name in cases if name != "memory"},
                "seconds_waited_per_step": {
                    name: source.waited / (_STEPS * (config.rounds + 1)) for name, source in sources.items()
                },
            }
        )
    return results


_STEPS = 64  # of a case: two blocks


def _case(size: Size, name: str, opened: Store, acts: np.ndarray, sources: dict[str, Any]) -> Callable[[], None]:
    """Return a case that trains for two blocks, with what was compiled in the round before."""
    import itertools

    import jax

    from jsae import loop
    from jsae.architectures import sae_config
    from jsae.arrays import source_of
    from jsae.config import TrainConfig
    from jsae.data import Shuffled
    from jsae.store import StoreSource

    sae = sae_config("topk", size.d_in, size.d_sae, k=size.k)
    members = [loop.Member(sae, TrainConfig(2**20 * size.batch, size.batch), 0)]
    source = source_of(acts, 0) if name == "memory" else sources.setdefault(name, StoreSource(opened, memory=1))
    files = [path for path in Path(opened.location).rglob("*") if path.is_file()]
    state: list[Any] = []

    def run() -> None:
        if name == "store, cold":
            _drop(files)
        batches = Shuffled(source, batch_size=size.batch, batches_per_block=_STEPS // 2, seed=0, num_batches=_STEPS)
        if not state:
            state.extend((loop.init(members, (batches.peek(),)), loop.Programs(members)))
        pairs = ((batch,) for batch in batches)
        *_, (_, last, _) = itertools.islice(loop.fit(members, state[0], pairs, state[1]), _STEPS)
        state[0] = jax.block_until_ready(last)

    return run
