"""All measurements on a GPU in one call: steps, peers, memory, stream, model, determinism; in bfloat16.

Each part runs in its own process, which has the GPU to itself and a limit of time, and writes its JSON to --folder as
its results come. A part that fails or is late does not stop the others; what has not begun after --minutes is left out.
Failures are listed at the end. The other trainers come from --peer_env, which pip creates, or where it cannot, from
--peer_wheels, a folder of their wheels, for the torch that runs this.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bridge.locations import FilePath
from bridge.settings import flag
from experiments.benches import peers, shapes

REFERENCE, WIDE = "1280:20480:64:16384", "1280:131072:64:16384"
MEASUREMENTS = ("step", "peers", "memory", "stream", "model", "determinism")
_ROOT = Path(__file__).resolve().parents[2]
_LEAST = 15  # seconds that a part needs to be worth beginning


class Part(NamedTuple):
    """One process of the suite."""

    command: tuple[str, ...]
    """Arguments of Python."""
    seconds: int
    """Limit of time."""


@dataclass(frozen=True)
class Config:
    """Measurements, sizes and models."""

    measurements: tuple[str, ...] = flag(MEASUREMENTS, "Measurements to run, in this order.")
    size: str = flag(REFERENCE, "Size of the steps, d_in:d_sae:k:batch.")
    wide: str = flag(WIDE, "Size of one further TopK step; empty leaves it out.")
    models: tuple[str, ...] = flag(("d20",), "nanochats to stream: demo, or dN for random weights.")
    minutes: float = flag(8.0, "Time for all measurements together.")
    peer_env: FilePath = flag(peers.TRAINERS_HOME, "The virtual environment of the other trainers.")
    peer_wheels: FilePath | None = flag(
        None, "A folder of their wheels to use instead of --peer_env, with this Python."
    )
    folder: FilePath = flag("experiments/results", "Folder for the results.")

    def __post_init__(self) -> None:
        if not self.measurements or not set(self.measurements) <= set(MEASUREMENTS):
            given = ", ".join(self.measurements) or "none"
            raise ValueError(f"measurements must be some of {', '.join(MEASUREMENTS)}, got {given}")
        shapes.check([self.size, *filter(None, [self.wide])], ["topk"], ["topk"])
        if not all(
            name == "demo" or (name[:1] == "d" and name[1:].isdigit() and int(name[1:]) >= 2) for name in self.models
        ):
            raise ValueError(f"models are demo, or d12 for random weights of 12 layers, got {', '.join(self.models)}")
        if not self.minutes > 0:
            raise ValueError(f"minutes must be above 0, got {self.minutes}")


def main(config: Config) -> int:
    """Run the suite; return 1 if a measurement failed or was left out.

    Raises:
      ConfigError: torch or jax finds no GPU.
    """
    _check_gpu()
    return follow(suite(config), config.minutes * 60)


def suite(config: Config) -> dict[str, Part]:
    """Return the parts by the names of their result files."""

    def flags(name: str, **own: object) -> tuple[str, ...]:
        words = {"device": "cuda", "out": f"{config.folder}/{name}_cuda.json"} | own
        return tuple(f"--{key}={value}" for key, value in words.items() if value is not None)

    size, fast = {"size": config.size}, {"matmul_dtype": "bfloat16"}
    bench = ("-m", "experiments.bench")
    streamed: dict[str, object] = {
        "k": 64,
        "expansion_factor": 16,
        "batch_size": 16384,
        "block_size": 2**18,
        "rounds": 4,
    }
    streamed |= {"models": ",".join(config.models), "tokens_per_forward": 16 * 2048}
    measured = {"sizes": config.size, "architectures": "topk,batchtopk,relu", "trainers": ""}
    others = {"peer_env": config.peer_env, "peer_wheels": config.peer_wheels}
    every = {
        "step": Part(("-m", "experiments.benches.gpu_steps", *flags("step", **size, wide=config.wide)), 170),
        "peers": Part(("-m", "experiments.benches.gpu_peers", *flags("peers", **size, **others)), 150),
        "memory": Part((*bench, "memory", *flags("memory", **measured, **fast)), 100),
        "stream": Part((*bench, "stream", *flags("stream", **fast, **streamed)), 120),
        "model": Part(("-m", "experiments.benches.gpu_model", *flags("model")), 160),
        "determinism": Part(("-m", "experiments.benches.gpu_determinism", *flags("determinism", **size)), 150),
    }
    return {name: every[name] for name in config.measurements}


def follow(parts: dict[str, Part], seconds: float) -> int:
    """Run parts one after the other within some seconds; return 1 if one failed, was late or was left out."""
    end, failed = time.monotonic() + seconds, {}
    for name, part in parts.items():
        left = end - time.monotonic()
        if left < min(_LEAST, part.seconds):
            failed[name] = f"left out: the time of {seconds / 60:g} minutes is over"
        else:
            begun = time.monotonic()
            print(f"---- {name}: python {shlex.join(part.command)}", flush=True)
            if problem := alone(part.command, min(part.seconds, left)):
                failed[name] = problem
            print(f"---- {name}: {problem or 'done'} after {time.monotonic() - begun:.0f} s", flush=True)
    for name, reason in failed.items():
        print(f"FAILED {name}: {reason}", file=sys.stderr, flush=True)
    return 1 if failed else 0


def alone(command: Sequence[str], seconds: float) -> str | None:
    """Run Python with these arguments in a session of its own; return what went wrong, or None.

    When the time is over the process is ended with all that it started, so that the next one has the GPU to itself.
    """
    process = subprocess.Popen([sys.executable, *command], cwd=_ROOT, start_new_session=True)
    try:
        code = process.wait(seconds)
        return None if code == 0 else f"exit code {code}"
    except subprocess.TimeoutExpired:
        return f"not done after {seconds:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _check_gpu() -> None:
    """Raise unless torch and jax see a GPU, in a process that then frees it."""
    code = "from bridge.training import device; device.share('cuda', 0.2)"
    check = subprocess.run([sys.executable, "-c", code], cwd=_ROOT, capture_output=True, text=True, check=False)
    if check.returncode:
        last = check.stderr.strip().splitlines()[-1:]
        raise ValueError(last[0].partition(": ")[2] if last else f"the check ended with code {check.returncode}")


if __name__ == "__main__":
    from experiments.flags import run

    run(Config, main)
