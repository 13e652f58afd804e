"""All measurements of speed on a GPU, one after the other: step, peers, memory, stream; products in bfloat16.

The step is also measured in float32, and with the other implementations of its operations.

Each measurement runs in its own process, which has the GPU to itself, and writes its JSON to --folder. Failures are
reported at the end, after all other measurements. The other trainers' environment needs a torch with CUDA: where pip
cannot create it, give one with --peer_env.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bridge.locations import FilePath
from bridge.settings import flag
from bridge.training import device
from experiments.benches import contest, memory, peers, shapes, step, stream
from experiments.flags import EXPECTED_ERRORS

OTHERS = {"plain": "plain", "dense": "xla-dense"}
"""Further implementations that the step is measured with, by the names of their result files."""
MEASUREMENTS = ("step", *(f"step_{name}" for name in OTHERS), "step_float32", "peers", "memory", "stream")
_TOKENS_PER_FORWARD = 16 * 2048


@dataclass(frozen=True)
class Config:
    """Measurements, sizes and models."""

    measurements: tuple[str, ...] = flag(MEASUREMENTS, "Measurements to run.")
    sizes: tuple[str, ...] = flag(("1280:20480:64:16384",), shapes.SIZES_HELP)
    models: tuple[str, ...] = flag(("d20",), "nanochats to stream: demo, or dN for random weights.")
    rounds: int = flag(20, "Timed rounds, at least 2.")
    trace_dir: FilePath | None = flag(None, "Folder for a profile of a few steps; none writes no profile.")
    markdown: bool = flag(False, "Print tables as Markdown.")
    peer_env: FilePath = flag(peers.TRAINERS_HOME, "The virtual environment of the other trainers.")
    folder: FilePath = flag("experiments/results", "Folder for the results.")

    def __post_init__(self) -> None:
        if not self.measurements or not set(self.measurements) <= set(MEASUREMENTS):
            given = ", ".join(self.measurements) or "none"
            raise ValueError(f"measurements must be some of {', '.join(MEASUREMENTS)}, got {given}")
        suite(self)  # its configs check themselves


def main(config: Config) -> int:
    """Run the suite; return 1 if a measurement failed.

    Raises:
      ConfigError: torch or jax finds no GPU.
    """
    _alone(device.share, "cuda", 0.2)
    failed = {}
    for name, (run, measurement) in suite(config).items():
        print(f"---- {name}", flush=True)
        try:
            _alone(run, measurement)
        except (*EXPECTED_ERRORS, RuntimeError) as error:
            failed[name] = str(error)
    for name, reason in failed.items():
        print(f"FAILED {name}: {reason}", file=sys.stderr)
    return 1 if failed else 0


def suite(config: Config) -> Mapping[str, tuple[Callable[[Any], int], Any]]:
    """Return the measurements by the names of their result files: the function that runs each, and its config."""
    common: dict[str, Any] = {"device": "cuda", "markdown": config.markdown}
    sized = common | {"sizes": config.sizes}
    against = sized | {"peer_env": config.peer_env, "autocast": True}
    rounds: dict[str, Any] = {"rounds": config.rounds}

    def out(name: str) -> dict[str, Any]:
        return {"out": f"{config.folder}/{name}_cuda.json"}

    fast: dict[str, Any] = {"matmul_dtype": "bfloat16"}
    every: dict[str, tuple[Callable[[Any], int], Any]] = {
        "step": (step.main, step.Config(**sized, **rounds, **fast, trace_dir=config.trace_dir, **out("step"))),
        **{
            f"step_{name}": (step.main, step.Config(**sized, **rounds, **fast, ops=ops, **out(f"step_{name}")))
            for name, ops in OTHERS.items()
        },
        "step_float32": (step.main, step.Config(**sized, **rounds, **out("step_float32"))),
        "peers": (contest.main, contest.Config(**against, **rounds, **fast, **out("peers"))),
        "memory": (memory.main, memory.Config(**against, **fast, **out("memory"))),
        "stream": (
            stream.main,
            stream.Config(
                **common,
                **rounds,
                **fast,
                **out("stream"),
                models=config.models,
                k=64,
                expansion_factor=16,
                batch_size=16384,
                block_size=2**18,
                tokens_per_forward=_TOKENS_PER_FORWARD,
            ),
        ),
    }
    return {name: measurement for name, measurement in every.items() if name in config.measurements}


def _alone(work: Callable[..., object], *args: Any) -> None:
    """Call a function in a fresh process, which then ends and frees the GPU; raise the function's exceptions."""
    fresh = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=fresh) as pool:
        pool.submit(work, *args).result()
