"""Training in several processes: what a step sends, how long 1, 2 and 4 processes take, and a plan for 8 and 64 GPUs.

Bytes are read from the compiled programs of meshes of virtual devices and compared with the scheme's. Times are those
of real processes that share this machine's cores: two processes of one core each beside one with two. The plan is
calculated from the scheme's bytes and from times measured on one GPU; nothing of it is measured on several.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bridge.locations import FilePath
from bridge.settings import flag
from experiments.benches import shapes, tables, timing, traffic

_MESHES = ((2, 1), (1, 2), (2, 2))
_PLANS = tuple(
    (d_sae, data, latent)
    for d_sae in (20_480, 131_072, 1_048_576)
    for data, latent in ((8, 1), (4, 2), (2, 4), (1, 8), (64, 1), (16, 4), (8, 8))
)
_COMPILING = 3  # first steps that are not timed


@dataclass(frozen=True)
class Config:
    """Sizes and rounds of the measurement."""

    size: str = flag("768:6144:32:8192", "Size of the timed steps, d_in:d_sae:k:batch.")
    architectures: tuple[str, ...] = flag(("topk", "batchtopk"), "Architectures whose traffic is listed.")
    rounds: int = flag(3, "Timed rounds, each with one run of every case, at least 2.")
    steps: int = flag(12, "Timed steps of a run.")
    out: FilePath = flag("experiments/results/scaling_cpu.json", "File for the results.")
    markdown: bool = flag(False, "Print tables as Markdown.")

    def __post_init__(self) -> None:
        size = shapes.Size.parse(self.size)
        if size.batch % 4 or size.d_sae % 4:
            raise ValueError(
                f"size={self.size}: batch and d_sae must be multiples of 4, the largest number of processes"
            )
        if self.rounds < 2 or self.steps < 1:
            raise ValueError(f"at least 2 rounds and 1 step, got rounds={self.rounds} and steps={self.steps}")


def main(config: Config) -> int:
    """Measure, print tables, write the results."""
    size = shapes.Size.parse(config.size)
    sent = [row for architecture in config.architectures for row in measured_traffic(architecture, size)]
    times = _times(config, size)
    plans = [_plan(*case) for case in _PLANS]
    machine = timing.machine("cpu")
    timing.write(
        config.out,
        {
            "machine": machine,
            "settings": timing.settings(config),
            "traffic": sent,
            "times": times,
            "assumptions": vars(traffic.Machine()),
            "plan": plans,
        },
    )
    _show(sent, times, plans, machine, config.markdown)
    return 0


# ---- what is sent --------------------------------------------------------------------------------------------------


def measured_traffic(architecture: str, size: shapes.Size) -> list[dict[str, Any]]:
    """Return for every mesh the bytes of the compiled step's collectives, beside the scheme's.

    The step is the usual one, without a dead latent.
    """
    import jax

    jax.config.update("jax_num_cpu_devices", 4)  # where no device has been started yet
    from jsae import axes, loop
    from jsae.testing.collectives import collectives

    rows = []
    for data, latent in _MESHES:
        mesh = axes.make_mesh(latent, jax.devices()[: data * latent])
        member = shapes.member(architecture, size)
        batch = jax.ShapeDtypeStruct((size.batch, size.d_in), "float32", sharding=jax.NamedSharding(mesh, axes.BATCH))
        program = loop.Programs([member], mesh=mesh).at(member.train.num_steps)
        compiled = program.lower(loop.abstract_states([member], mesh=mesh), (batch,)).compile()
        found = collectives(compiled.as_text(), branches=False)
        scheme = traffic.sent(size, data, latent, architecture)
        rows.append(
            {
                "architecture": architecture,
                "mesh": f"{data}x{latent}",
                "bytes": sum(one.bytes for one in found),
                "scheme": scheme.total,
                "by_purpose": scheme._asdict(),
                "collectives": sum(one.times for one in found),
            }
        )
    return rows


# ---- how long it takes ---------------------------------------------------------------------------------------------


def _times(config: Config, size: shapes.Size) -> list[dict[str, Any]]:
    """Return the seconds of a step in 1, 2 and 4 processes, over those of one process in the same round."""
    cases = {"1": (1, 1), "2x1": (2, 1), "1x2": (2, 2), "4x1": (4, 1), "2x2": (4, 2)}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(config.rounds):
        for name, (count, latent) in cases.items():
            steps = _run(count, str(size), "topk", latent, config.steps + _COMPILING)
            seconds[name].append(statistics.median(steps[_COMPILING:]))
    return [
        {
            "mesh": name,
            "processes": cases[name][0],
            "seconds": timing.spread(seconds[name]),
            "speed_over_one": timing.spread([b / a for a, b in zip(seconds[name], seconds["1"], strict=True)]),
        }
        for name in cases
    ]


def _run(count: int, size: str, architecture: str, latent: int, steps: int) -> list[float]:
    """Return the seconds of every step that some processes take together.

    Raises:
      RuntimeError: a process failed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-m", "experiments.benches.scaling_worker", size, architecture, str(latent), str(steps)]
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | {name: str(value) for name, value in (shared | {"RANK": i, "LOCAL_RANK": i}).items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    outputs = [process.communicate() for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        if process.returncode:
            raise RuntimeError(f"a process of {count} ended with code {process.returncode}: {errors[-500:]}")
    return json.loads(outputs[0][0].strip().splitlines()[-1])


# ---- plan and tables -----------------------------------------------------------------------------------------------


def _plan(d_sae: int, data: int, latent: int) -> dict[str, Any]:
    """Return the prediction for one mesh of GPUs: d_in 1,280, k 64, 16,384 tokens per GPU."""
    planned = traffic.plan(shapes.Size(1280, d_sae, 64, 16_384), data, latent)
    return {"d_sae": d_sae, **planned._asdict(), "efficiency": planned.efficiency}


def _show(
    sent: Sequence[dict[str, Any]],
    times: Sequence[dict[str, Any]],
    plans: Sequence[dict[str, Any]],
    machine: dict[str, Any],
    markdown: bool,
) -> None:
    tables.show(
        "Bytes of a step's collectives on one device",
        ("architecture", "mesh", "MB", "the scheme's", "ratio", "collectives"),
        [
            (
                row["architecture"],
                row["mesh"],
                f"{row['bytes'] / 1e6:.2f}",
                f"{row['scheme'] / 1e6:.2f}",
                f"{row['bytes'] / row['scheme']:.3f}",
                str(row["collectives"]),
            )
            for row in sent
        ],
        machine,
        markdown,
    )
    tables.show(
        "A TopK step in several processes that share the cores",
        ("mesh", "processes", "ms", "speed over one process"),
        [
            (
                row["mesh"],
                str(row["processes"]),
                f"{1000 * row['seconds']['median']:.0f}",
                f"{row['speed_over_one']['median']:.2f}",
            )
            for row in times
        ],
        machine,
        markdown,
    )
    tables.show(
        f"Plan for {traffic.Machine().name}: d_in 1,280, k 64, 16,384 tokens per GPU",
        ("d_sae", "GPUs", "mesh", "GB in the host", "GB to others", "sending, ms", "work, ms", "efficiency"),
        [
            (
                f"{row['d_sae']:,}",
                str(row["cards"]),
                f"{row['data']}x{row['latent']}",
                f"{row['nvlink_bytes'] / 1e9:.2f}",
                f"{row['network_bytes'] / 1e9:.2f}",
                f"{1000 * row['communication']:.1f}",
                f"{1000 * row['work']:.1f}",
                f"{row['efficiency']:.0%}",
            )
            for row in plans
        ],
        machine,
        markdown,
    )
