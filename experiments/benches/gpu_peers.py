"""Training steps of jsae, SAELens, dictionary_learning and sparsify in turn on one GPU, with their peak memory.

As `bench peers`, which says what a step of each is. Each trainer has one process for all architectures; the processes
start side by side, and steps alternate. A trainer that fails is named and left out. Results are written after every
architecture. A round takes --steps of each trainer without waiting for the GPU between them, as training does. Peaks
are those of torch's allocator during two steps.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bridge.locations import FilePath
from bridge.settings import flag
from bridge.training import device
from experiments.benches import contest, peers, shapes, timing
from experiments.benches.contest import OURS, TRAINERS
from experiments.benches.shapes import Dtype, Size
from experiments.flags import run

Asks = dict[str, peers.Ask]


@dataclass(frozen=True)
class Config:
    """Size, trainers and rounds of the measurement."""

    size: str = flag("1280:20480:64:16384", "Size, d_in:d_sae:k:batch.")
    architectures: tuple[str, ...] = flag(("topk", "batchtopk", "relu", "gated", "jumprelu"), "Architectures.")
    trainers: tuple[str, ...] = flag(("SAELens", "dictionary_learning", "sparsify"), "Trainers beside jsae.")
    warmup_steps: int = flag(4, "Untimed steps of every trainer.")
    rounds: int = flag(8, "Timed rounds, at least 2.")
    steps: int = flag(4, "Steps of a round; 1 waits for every step.")
    matmul_dtype: Dtype = flag("bfloat16", "Type of jsae's products; the others run under autocast with bfloat16.")
    device: Literal["cpu", "cuda"] = flag("cuda", "Device of all trainers.")
    peer_env: FilePath = flag(peers.TRAINERS_HOME, "The virtual environment of the other trainers.")
    peer_wheels: FilePath | None = flag(None, "A folder of wheels to use instead of --peer_env, with this Python.")
    out: FilePath = flag("experiments/results/peers_{device}.json", "File for the results.")

    def __post_init__(self) -> None:
        shapes.check([self.size], self.architectures, contest.ARCHITECTURES)
        contest.check(self.trainers, False, self.device)
        if self.rounds < 2:
            raise ValueError(f"rounds must be at least 2, got {self.rounds}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")


def main(config: Config) -> int:
    """Measure every architecture; return 1 if a trainer failed."""
    if config.device != "cpu":
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the others need GPU memory too
    device.jax_alone(config.device)
    size, out = Size.parse(config.size), config.out.format(device=config.device)
    results: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    machine = timing.machine(config.device)
    with _running(config, size, failed) as (versions, asks):
        for architecture in config.architectures:
            results.append(_measure(config, size, architecture, asks, failed))
            print(_lines(results[-1]), flush=True)
            told = {
                "machine": machine | versions,
                "settings": timing.settings(config, "peer_env", "peer_wheels", "device"),
            }
            timing.write(out, told | {"results": results, "failed": failed})
    for name, reason in failed.items():
        print(f"FAILED {name}: {reason[-600:]}", flush=True)
    print(f"figures: {out}")
    return 1 if failed else 0


@contextlib.contextmanager
def _running(config: Config, size: Size, failed: dict[str, str]) -> Iterator[tuple[dict[str, str], Asks]]:
    """Start all trainers side by side; yield their versions and a function for each to send jobs to."""
    import numpy as np

    with contextlib.ExitStack() as stack:
        folder, site = (Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(2))
        if config.peer_wheels is None:
            python, variables = peers.trainers(config.peer_env), {}
        else:
            python, variables = sys.executable, peers.from_wheels(config.peer_wheels, site)
        np.save(folder / "x.npy", np.stack([np.asarray(x) for x in shapes.batches(size)]))
        contexts = {
            name: peers.process(python, contest.SCRIPT, folder, variables | contest.ASLEEP, name=name)
            for name in config.trainers
        }
        started = _together({name: context.__enter__ for name, context in contexts.items()}, failed)
        for name in started:
            stack.push(contexts[name].__exit__)
        versions = {package: version for found, _ in started.values() for package, version in found.items()}
        yield versions, {name: ask for name, (_, ask) in started.items()}


def _together(works: Mapping[str, Callable[[], Any]], failed: dict[str, str]) -> dict[str, Any]:
    """Do all works side by side; return what they gave, without those that failed, which are noted."""
    with concurrent.futures.ThreadPoolExecutor(max(len(works), 1)) as pool:
        futures = {name: pool.submit(work) for name, work in works.items()}
    given = {}
    for name, future in futures.items():
        try:
            given[name] = future.result()
        except Exception as error:  # of another library's process
            failed[name] = f"{type(error).__name__}: {error}"
    return given


def _measure(config: Config, size: Size, architecture: str, asks: Asks, failed: dict[str, str]) -> dict[str, Any]:
    """Return seconds and peaks of all trainers at an architecture."""
    job = {
        "do": "make",
        "architecture": architecture,
        "nested_widths": size.nested_widths,
        "device": config.device,
        "threads": None,
        "autocast": config.device != "cpu",
        "warmup_steps": config.warmup_steps,
        **size._asdict(),
    }
    first = next(iter(asks), None)
    makes = {
        name: lambda ask=ask, name=name: ask({**job, "trainer": name, "matmul": name == first})
        for name, ask in asks.items()
        if architecture in TRAINERS[name]
    }
    ready = _together(makes, failed)
    for name in makes.keys() - ready.keys():
        del asks[name]
    settings = {"warmup_steps": config.warmup_steps, "matmul_dtype": config.matmul_dtype, "queued": config.steps}
    own = contest.timed(shapes.stepping(architecture, size, **settings), config.steps)
    cases = {OURS: own} | {name: contest.asking(asks[name], "step", queued=config.steps) for name in ready}
    seconds = contest.by_turns(cases, config.rounds)
    peaks = {name: asks[name]({"do": "peak", "steps": 2})["peak"] for name in ready}
    ratios = timing.ratios(seconds, OURS)
    return {
        "size": size._asdict(),
        "architecture": architecture,
        "seconds": {name: timing.spread(own) for name, own in seconds.items()},
        "times_faster": {name: ratios[name] for name in ready},
        "activations_per_second": {name: size.batch / timing.spread(own)["median"] for name, own in seconds.items()},
        "peak_bytes": peaks,
    }


def _lines(result: dict[str, Any]) -> str:
    """Return a result as lines of text."""
    lines = []
    for name, seconds in result["seconds"].items():
        faster, peak = result["times_faster"].get(name), result["peak_bytes"].get(name)
        lines.append(
            f"{result['architecture']:10} {name:20} {1e3 * seconds['median']:8.2f} ms"
            + (f"  jsae is faster by {faster['median']:.2f}" if faster else "")
            + (f"  peak {peak / 2**30:.2f} GiB" if peak else "")
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run(Config, main)
