"""Time of one training step: jsae, SAELens, dictionary_learning and sparsify in turn.

Every trainer has its own defaults, the same widths, k and batch, and takes the steps that its own loop takes: forward,
backward, clipping, optimiser, unit norms, dead counters. Neither the penalty nor L0 changes the time of a dense step.
The product of a batch with the encoder is timed in jax and in torch: on some processors one multiplies much faster
than the other, whatever the trainer does. sparsify runs with Adam, as all the others do, and with its own default,
signum; on a GPU it always computes under autocast. Each trainer has its own process, which sleeps while another one
computes. Ratios compare times of the same round.

The trainers have their own environment, --peer_env, which is created if it does not exist (pip, about 2 GB).
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
from experiments.benches.quality_config import ARCHITECTURES, architectures_of
from experiments.benches.shapes import Dtype, Size

OURS, MATMUL, THEIR_MATMUL = "jsae", "encoder matmul", "encoder matmul in torch"
TRAINERS: Mapping[str, tuple[str, ...]] = {
    name: architectures_of(name.split()[0])
    for name in ("SAELens", "dictionary_learning", "sparsify", "sparsify signum")
}
"""The other trainers, sparsify with both of its optimisers, and the architectures that each has."""
SCRIPT = Path(__file__).with_name("contest_peer.py")
ASLEEP = {
    "OMP_WAIT_POLICY": "passive"
}  # threads that spin while they wait would take cores from the process that computes


@dataclass(frozen=True)
class Config:
    """Sizes, trainers and rounds of the measurement."""

    sizes: tuple[str, ...] = flag((shapes.SIZE, shapes.LARGE), shapes.SIZES_HELP)
    architectures: tuple[str, ...] = flag(ARCHITECTURES, "Architectures at the first size.")
    later_architectures: tuple[str, ...] = flag(("topk", "batchtopk"), "Architectures at the other sizes.")
    trainers: tuple[str, ...] = flag(tuple(TRAINERS), "Trainers beside jsae, each for the architectures that it has.")
    warmup_steps: int = flag(5, "Untimed steps of every trainer before the first round.")
    rounds: int = flag(10, "Timed rounds, at least 2.")
    threads: int | None = flag(None, "Threads of torch; none is torch's default. jax uses all cores.")
    matmul_dtype: Dtype = flag("float32", shapes.DTYPE_HELP)
    device: Literal["cpu", "cuda"] = flag("cpu", "Device of all trainers.")
    autocast: bool = flag(False, "On a GPU: let the other trainers multiply in bfloat16.")
    markdown: bool = flag(False, "Print the table as Markdown.")
    peer_env: FilePath = flag(peers.TRAINERS_HOME, "The virtual environment of the other trainers.")
    out: FilePath = flag("experiments/results/peers_{device}.json", "File for the results.")

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
    """Check names of trainers and the use of autocast.

    Raises:
      ValueError: an unknown trainer, or autocast on a CPU.
    """
    if not set(trainers) <= set(TRAINERS):
        raise ValueError(f"trainers must be some of {', '.join(TRAINERS)}, got {', '.join(trainers)}")
    if autocast and where == "cpu":
        raise ValueError("autocast is for --device=cuda: on a CPU all trainers compute in float32")


def main(config: Config) -> int:
    """Measure all trainers, print a table, write the results."""
    if config.device != "cpu":
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the others need GPU memory too
    device.jax_alone(config.device)
    python, results = peers.trainers(config.peer_env), []
    versions: dict[str, str] = {}
    for i, size in enumerate(map(Size.parse, config.sizes)):
        for architecture in config.architectures:
            if i == 0 or architecture in config.later_architectures:
                trainer_versions, row = _measure(config, python, size, architecture)
                versions |= trainer_versions
                results.append(row)
    machine = timing.machine("cpu") | shapes.device_name(config.device) | versions
    tables.show("one training step", _COLUMNS, _rows(results), machine, config.markdown)
    work = " ".join(__doc__.split("\n\n")[1].split())
    out = config.out.format(device=config.device)
    timing.write(
        out,
        {
            "machine": machine,
            "settings": timing.settings(config, "peer_env", "device"),
            "work": work,
            "results": results,
        },
    )
    print(f"figures: {out}")
    return 0


def _measure(
    config: Config, python: Path | str, size: Size, architecture: str
) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the versions of the other trainers, and one result: seconds of all trainers and their ratios."""
    names = [name for name in config.trainers if architecture in TRAINERS[name]]
    settings = {"threads": config.threads, "autocast": config.autocast, "warmup_steps": config.warmup_steps}
    with sides(python, names, size, architecture, config.device, settings) as (versions, asks):
        own = shapes.stepping(architecture, size, warmup_steps=config.warmup_steps, matmul_dtype=config.matmul_dtype)
        cases = {MATMUL: timed(shapes.encoder_matmul(size, config.matmul_dtype)), OURS: timed(own)}
        cases |= {name: asking(ask, "step") for name, ask in asks.items()}
        if asks:
            cases[THEIR_MATMUL] = asking(next(iter(asks.values())), "matmul")
        seconds = by_turns(cases, config.rounds)
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
    """Start the processes of other trainers, ready to step; yield their versions and a function for each to send jobs.

    With `matmul` the first of them also times the encoder's product. The processes end with the context.
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
            trainer_versions, asks[name] = running.enter_context(peers.process(python, SCRIPT, Path(folder), ASLEEP))
            asks[name]({**job, "trainer": name, "matmul": matmul and name == names[0]})
            versions |= trainer_versions
        yield versions, asks


def timed(case: Callable[[], None], steps: int = 1) -> Callable[[], float]:
    """Return a function that runs a case of some steps and returns the seconds of one."""

    def run() -> float:
        start = time.perf_counter()
        case()
        return (time.perf_counter() - start) / steps

    return run


def asking(ask: peers.Ask, work: str, **settings: int) -> Callable[[], float]:
    """Return a function that has a trainer's process do some work, and returns the seconds that it measured."""
    return lambda: ask({"do": work, **settings})["seconds"]


def by_turns(cases: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Return `timing.by_turns` of cases that measure their own seconds: talking to another process does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}

    def recording(name: str) -> Callable[[], None]:
        return lambda: seconds[name].append(cases[name]())

    timing.by_turns({name: recording(name) for name in cases}, rounds)
    return {name: own[1:] for name, own in seconds.items()}


_COLUMNS = ("size", "architecture", "trainer", "ms", f"over {MATMUL}", f"over {THEIR_MATMUL}", "jsae is faster by")


def _rows(results: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    rows = []
    for result in results:
        heading = (str(Size(**result["size"])), result["architecture"])
        for name, seconds in result["seconds"].items():
            ratios = (result[kind].get(name) for kind in ("over_matmul", "over_their_matmul", "times_faster"))
            cells = ("" if ratio is None else tables.ratio(ratio) for ratio in ratios)
            rows.append((*heading, name, tables.ms(seconds), *cells))
            heading = ("", "")
    return rows
