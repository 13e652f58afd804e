"""The same training step by jsae and by SAELens, dictionary_learning and sparsify, by turns.

Every trainer has its own defaults, the same widths, k and batch, and takes the steps that its own loop takes: forward,
backward, clipping, optimiser, unit norms, dead counters. What an SAE's penalty is does not matter to the time of a
dense step, nor does its L0. The product of a batch with the encoder is timed in jax and in torch: on some processors
one multiplies much faster than the other, which no trainer can help. sparsify runs with Adam, as all the others do,
and with its own default, signum; on a GPU it always computes under autocast. A trainer has a process to itself, which
sleeps while another one computes. Ratios are of the same round.

The trainers live in an environment of their own, --peer_env, which is made when it is not there (pip, about 2 GB).
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bridge.locations import FilePath
from bridge.settings import flag
from bridge.training import device
from experiments.benches import peers, shapes, tables, timing
from experiments.benches.shapes import Dtype, Size

OURS, MATMUL, THEIR_MATMUL = "jsae", "encoder matmul", "encoder matmul in torch"
ARCHITECTURES = ("topk", "batchtopk", "matryoshka", "relu", "gated", "jumprelu")
TRAINERS: Mapping[str, tuple[str, ...]] = {
    "SAELens": ARCHITECTURES,
    "dictionary_learning": ARCHITECTURES,
    "sparsify": ("topk",),
    "sparsify signum": ("topk",),
}
SCRIPT = Path(__file__).with_name("contest_peer.py")
_ASLEEP = {"OMP_WAIT_POLICY": "passive"}  # threads that wait for work in a loop take the cores of the one that computes


@dataclass(frozen=True)
class Config:
    """What is measured, and how often."""

    sizes: tuple[str, ...] = flag((shapes.SIZE, shapes.LARGE), shapes.SIZES_HELP)
    architectures: tuple[str, ...] = flag(ARCHITECTURES, "Architectures at the first size.")
    later_architectures: tuple[str, ...] = flag(("topk", "batchtopk"), "Those of them at the other sizes too.")
    trainers: tuple[str, ...] = flag(tuple(TRAINERS), "Trainers beside jsae, each where it has the architecture.")
    warmup_steps: int = flag(5, "Steps of everyone before the first that counts.")
    rounds: int = flag(10, "Rounds that count, at least 2.")
    threads: int | None = flag(None, "Threads of torch; none: as many as it takes by itself. jax has all cores.")
    matmul_dtype: Dtype = flag("float32", shapes.DTYPE_HELP)
    device: Literal["cpu", "cuda"] = flag("cpu", "Where all run.")
    autocast: bool = flag(False, "On a GPU: let the others multiply in bfloat16.")
    markdown: bool = flag(False, "Print the table as Markdown.")
    peer_env: FilePath = flag(peers.TRAINERS_HOME, "The virtual environment of the other trainers.")
    out: FilePath = flag("experiments/results/peers_{device}.json", "Where the figures go.")

    def __post_init__(self) -> None:
        shapes.check(self.sizes, self.architectures, ARCHITECTURES)
        check(self.trainers, self.autocast, self.device)
        if not set(self.later_architectures) <= set(ARCHITECTURES):
            given = ", ".join(self.later_architectures)
            raise ValueError(f"later_architectures must be some of {', '.join(ARCHITECTURES)}, got {given}")
        if self.rounds < 2:
            raise ValueError(f"rounds must be at least 2, got {self.rounds}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be at least 0, got {self.warmup_steps}")


def check(trainers: Sequence[str], autocast: bool, where: str) -> None:
    """Refuses what the other trainers cannot do.

    Raises:
      ValueError: a trainer that is not known, or autocast on a CPU.
    """
    if not set(trainers) <= set(TRAINERS):
        raise ValueError(f"trainers must be some of {', '.join(TRAINERS)}, got {', '.join(trainers)}")
    if autocast and where == "cpu":
        raise ValueError("autocast is for --device=cuda: on a CPU all compute in float32")


def main(config: Config) -> int:
    """Measures all, prints a table, writes the figures."""
    if config.device != "cpu":
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the others need memory of the card, too
    device.jax_alone(config.device)
    python, found = peers.trainers(config.peer_env), []
    versions: dict[str, str] = {}
    for i, size in enumerate(map(Size.parse, config.sizes)):
        for architecture in config.architectures:
            if i == 0 or architecture in config.later_architectures:
                told, row = _measure(config, python, size, architecture)
                versions |= told
                found.append(row)
    machine = timing.machine("cpu") | shapes.device_name(config.device) | versions
    tables.show("one training step", _COLUMNS, _rows(found), machine, config.markdown)
    work = " ".join(__doc__.split("\n\n")[1].split())
    out = config.out.format(device=config.device)
    timing.write(
        out,
        {"machine": machine, "settings": timing.settings(config, "peer_env", "device"), "work": work, "results": found},
    )
    print(f"figures: {out}")
    return 0


def _measure(
    config: Config, python: Path | str, size: Size, architecture: str
) -> tuple[dict[str, str], dict[str, Any]]:
    """What the others' processes say of themselves; seconds of all in every round, and their ratios."""
    names = [name for name in config.trainers if architecture in TRAINERS[name]]
    settings = {"threads": config.threads, "autocast": config.autocast, "warmup_steps": config.warmup_steps}
    with sides(python, names, size, architecture, config.device, settings) as (versions, asks):
        own = shapes.stepping(architecture, size, warmup_steps=config.warmup_steps, matmul_dtype=config.matmul_dtype)
        cases = {MATMUL: _timed(shapes.encoder_matmul(size, config.matmul_dtype)), OURS: _timed(own)}
        cases |= {name: _asking(ask, "step") for name, ask in asks.items()}
        if asks:
            cases[THEIR_MATMUL] = _asking(next(iter(asks.values())), "matmul")
        seconds = _by_turns(cases, config.rounds)
    spreads = {name: timing.spread(own) for name, own in seconds.items()}
    over_ours = timing.ratios(seconds, OURS)
    return versions, {
        "size": size._asdict(),
        "architecture": architecture,
        "seconds": spreads,
        "over_matmul": timing.ratios(seconds, MATMUL),
        "over_their_matmul": timing.ratios(seconds, THEIR_MATMUL) if asks else {},
        "times_faster": {name: over_ours[name] for name in asks},
        "activations_per_second": {name: size.batch / spreads[name]["median"] for name in (OURS, *asks)},
    }


@contextlib.contextmanager
def sides(
    python: Path | str,
    names: Sequence[str],
    size: Size,
    architecture: str,
    where: str,
    settings: Mapping[str, Any],
    *,
    matmul: bool = True,
) -> Iterator[tuple[dict[str, str], dict[str, peers.Ask]]]:
    """The processes of other trainers, ready to step: versions, and how each is asked. They end with the context.

    With `matmul` the first of them can be asked for the encoder's product.
    """
    import numpy as np

    job = {
        "do": "make",
        "architecture": architecture,
        "nested_widths": size.nested_widths,
        "device": where,
        **size._asdict(),
        **settings,
    }
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as running:
        np.save(Path(folder) / "x.npy", np.stack([np.asarray(x) for x in shapes.batches(size)]))
        versions: dict[str, str] = {}
        asks = {}
        for name in names:
            told, asks[name] = running.enter_context(peers.process(python, SCRIPT, Path(folder), _ASLEEP))
            asks[name]({**job, "trainer": name, "matmul": matmul and name == names[0]})
            versions |= told
        yield versions, asks


def _timed(case: Callable[[], None]) -> Callable[[], float]:
    def run() -> float:
        start = time.perf_counter()
        case()
        return time.perf_counter() - start

    return run


def _asking(ask: peers.Ask, what: str) -> Callable[[], float]:
    return lambda: ask({"do": what})["seconds"]


def _by_turns(cases: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """As `timing.by_turns`, of cases that tell their own seconds: the way to another process does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}

    def telling(name: str) -> Callable[[], None]:
        return lambda: seconds[name].append(cases[name]())

    timing.by_turns({name: telling(name) for name in cases}, rounds)
    return {name: own[1:] for name, own in seconds.items()}


_COLUMNS = ("size", "architecture", "trainer", "ms", f"over {MATMUL}", f"over {THEIR_MATMUL}", "jsae is faster by")


def _rows(found: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    rows = []
    for row in found:
        about = (str(Size(**row["size"])), row["architecture"])
        for name, seconds in row["seconds"].items():
            ratios = (row[what].get(name) for what in ("over_matmul", "over_their_matmul", "times_faster"))
            cells = ("" if ratio is None else tables.ratio(ratio) for ratio in ratios)
            rows.append((*about, name, tables.ms(seconds), *cells))
            about = ("", "")
    return rows
