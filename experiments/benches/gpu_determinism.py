"""Cost of computing the same bits every time on a GPU, and whether two processes do, under several settings of XLA.

Under each setting one process measures, alone on the card, the training steps and the forward pass of a nanochat to
the middle layer. Then a second process of every setting repeats the same steps, all of them side by side; the weights
after these steps must have the same digest. `--deterministic` of training sets what is called `deterministic` here,
and is on by default where its cost is at most 5 %.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bridge.accelerators import require_torch
from bridge.locations import FilePath
from bridge.settings import flag
from bridge.training import determinism, device
from experiments.benches import shapes, timing
from experiments.benches.shapes import Dtype, Size
from experiments.flags import run

DEFAULT, DETERMINISTIC = "default", "deterministic"
XLA_FLAGS: Mapping[str, tuple[str, ...]] = {
    DEFAULT: (),
    DETERMINISTIC: determinism.XLA,
    "deterministic, Triton products": ("--xla_gpu_deterministic_ops=true",),
    "kept autotuning": (
        "--xla_gpu_exclude_nondeterministic_ops=true",
        "--xla_gpu_per_fusion_autotune_cache_dir={kept}",
    ),
}
"""Flags by setting; {kept} is a folder that the two processes of the setting share."""
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Config:
    """Settings, sizes and steps of the measurement."""

    settings: tuple[str, ...] = flag(tuple(XLA_FLAGS), "Settings of XLA.")
    size: str = flag("1280:20480:64:16384", "Size of the SAE, d_in:d_sae:k:batch.")
    architectures: tuple[str, ...] = flag(("topk", "batchtopk"), "Architectures.")
    depth: int = flag(20, "Layers of the random nanochat.")
    rows: int = flag(8, "Rows of its context length in a forward pass.")
    steps: int = flag(20, "Steps after which weights are compared; their last three quarters are timed.")
    matmul_dtype: Dtype = flag("bfloat16", shapes.DTYPE_HELP)
    device: Literal["cpu", "cuda"] = flag("cuda", "Device.")
    job: str | None = flag(None, "For the processes of the measurement: the setting that this one is under.")
    out: FilePath = flag("experiments/results/determinism_{device}.json", "File for the results.")

    def __post_init__(self) -> None:
        shapes.check([self.size], self.architectures, shapes.known_architectures())
        if not self.settings or not set(self.settings) <= set(XLA_FLAGS):
            raise ValueError(
                f"settings must be some of {'; '.join(XLA_FLAGS)}, got {'; '.join(self.settings) or 'none'}"
            )
        if self.steps < 8:
            raise ValueError(f"steps must be at least 8, got {self.steps}")


def main(config: Config) -> int:
    """Measure every setting; return 1 if a process failed or `--deterministic` does not do what it promises."""
    if config.job is not None:
        print(json.dumps(_job(config)), flush=True)
        return 0
    require_torch(config.device)
    out, failed = config.out.format(device=config.device), {}
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in config.settings:
            process = _start(config, name, folder)
            results[name] = {"first": _answer(process, f"{name}, first", failed)}
            _write(out, config, results, failed)
        again = {name: _start(config, name, folder) for name in config.settings}
        for name, process in again.items():
            results[name]["second"] = _answer(process, f"{name}, second", failed)
    for name, result in results.items():
        first, second = result["first"], result["second"]
        result["identical"] = bool(first and second and first["digests"] == second["digests"])
        result["cost"] = _cost(first, results.get(DEFAULT, {}).get("first"))
        print(_line(name, result), flush=True)
    _write(out, config, results, failed)
    for name, reason in failed.items():
        print(f"FAILED {name}: {reason}", flush=True)
    print(f"figures: {out}")
    return 1 if failed or not results.get(DETERMINISTIC, {"identical": True})["identical"] else 0


def _start(config: Config, name: str, folder: str) -> subprocess.Popen[str]:
    kept = Path(folder) / str(list(XLA_FLAGS).index(name))
    kept.mkdir(exist_ok=True)
    own = [word.format(kept=kept) for word in XLA_FLAGS[name]]
    dropped = ("JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS")
    variables = {key: value for key, value in os.environ.items() if key not in dropped}
    variables |= {"XLA_FLAGS": " ".join(own), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    same = ("size", "depth", "rows", "steps", "matmul_dtype", "device")
    words = [f"--{key}={getattr(config, key)}" for key in same]
    words += [f"--architectures={','.join(config.architectures)}", f"--job={name}"]
    return subprocess.Popen(
        [sys.executable, "-m", __spec__.name, *words],
        cwd=_ROOT,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _answer(process: subprocess.Popen[str], what: str, failed: dict[str, str]) -> dict[str, Any] | None:
    """Return what a process measured; None if it failed, which is noted."""
    out, err = process.communicate()
    lines = [line for line in out.splitlines() if line.startswith("{")]
    if process.returncode or not lines:
        failed[what] = f"exit code {process.returncode}: {err[-1500:]}"
        return None
    return json.loads(lines[-1])


def _job(config: Config) -> dict[str, Any]:
    """Return seconds per step of every architecture, digests of their weights, and seconds of a forward pass."""
    if config.job == DETERMINISTIC:
        determinism.enforce(config.device)
    device.jax_alone(config.device)
    size = Size.parse(config.size)
    steps = {name: _steps(config, name, size) for name in config.architectures}
    forward = _forward(config)
    return {
        "seconds": {name: seconds for name, (seconds, _) in steps.items()} | {"forward": forward[0]},
        "digests": {name: digest for name, (_, digest) in steps.items()} | {"forward": forward[1]},
    }


def _steps(config: Config, architecture: str, size: Size) -> tuple[float, str]:
    """Return the median seconds of a step, and the digest of all weights after the last."""
    import jax
    import numpy as np

    member, inputs = shapes.member(architecture, size, config.matmul_dtype), shapes.batches(size)
    states, program, seconds = shapes.begin(member, inputs[0]), shapes.program(member), []
    for number in range(config.steps):
        start = time.perf_counter()
        states, _ = program(states, (inputs[number % len(inputs)],))
        jax.block_until_ready(states)
        seconds.append(time.perf_counter() - start)
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(states[0].sae):
        digest.update(np.asarray(leaf).tobytes())
    return statistics.median(seconds[config.steps // 4 :]), digest.hexdigest()


def _forward(config: Config) -> tuple[float, str]:
    """Return the median seconds of a random nanochat's forward pass to its middle layer, and the digest of it."""
    import torch

    from bridge.hooks import capture, hook_name
    from experiments.benches.models import random_nanochat

    torch.manual_seed(0)
    model = random_nanochat(config.depth, 4096, config.device)
    hook = hook_name(config.depth // 2, "resid_post")
    length = model.config.sequence_len if config.device != "cpu" else 64
    tokens: Any = torch.randint(0, 4096, (config.rows, length), device=config.device)
    wait: Callable[[], None] = torch.cuda.synchronize if config.device != "cpu" else lambda: None
    seconds = []
    for _ in range(6):
        wait()
        start = time.perf_counter()
        with torch.no_grad(), capture(model, [hook], stop=True) as acts:
            model(tokens)
        wait()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:]), hashlib.sha256(acts[hook].float().cpu().numpy().tobytes()).hexdigest()


def _cost(own: dict[str, Any] | None, default: dict[str, Any] | None) -> dict[str, float]:
    """Return times over those of the default setting, minus 1."""
    if not own or not default:
        return {}
    return {name: seconds / default["seconds"][name] - 1 for name, seconds in own["seconds"].items()}


def _line(name: str, result: dict[str, Any]) -> str:
    seconds = (result["first"] or {}).get("seconds", {})
    parts = [f"{what} {1e3 * s:.2f} ms ({result['cost'].get(what, 0):+.1%})" for what, s in seconds.items()]
    return f"{name:32} {'identical' if result['identical'] else 'DIFFERENT'}  {'  '.join(parts)}"


def _write(out: str, config: Config, results: Mapping[str, Any], failed: Mapping[str, str]) -> None:
    settings = timing.settings(config, "device", "job")
    timing.write(
        out, {"machine": timing.machine(config.device), "settings": settings, "results": results, "failed": failed}
    )


if __name__ == "__main__":
    run(Config, main)
