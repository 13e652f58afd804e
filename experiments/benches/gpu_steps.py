"""Time of whole training steps on a GPU: every architecture, a wide SAE, and latents that fire unevenly.

A timed round takes a few steps without waiting between them, as training does. Results are written after every case.
In the skewed case latent i fires on a share of the tokens that falls as a power of i, from a third of all tokens; its
peak is that of the process so far.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from bridge.locations import FilePath
from bridge.settings import flag
from bridge.training import device
from experiments.benches import shapes, timing
from experiments.benches.shapes import Dtype, Size
from experiments.flags import EXPECTED_ERRORS, run

if TYPE_CHECKING:
    from jsae.loop import Member, States

EVEN, SKEWED = "even", "skewed"
ARCHITECTURES = ("topk", "batchtopk", "matryoshka", "relu", "gated", "jumprelu")
_POWER, _MOST = 0.7, 1 / 3


@dataclass(frozen=True)
class Config:
    """Sizes, architectures and rounds of the measurement."""

    size: str = flag("1280:20480:64:16384", "Size of all architectures, d_in:d_sae:k:batch.")
    wide: str = flag("1280:131072:64:16384", "Size of one further TopK SAE; empty leaves it out.")
    architectures: tuple[str, ...] = flag(ARCHITECTURES, "Architectures.")
    skewed: bool = flag(True, "Also measure TopK and BatchTopK where latents fire unevenly.")
    warmup_steps: int = flag(8, "Untimed steps of every case.")
    rounds: int = flag(12, "Timed rounds, at least 2.")
    steps: int = flag(5, "Steps of a round.")
    matmul_dtype: Dtype = flag("bfloat16", shapes.DTYPE_HELP)
    device: Literal["cpu", "cuda"] = flag("cuda", "Device of the step.")
    out: FilePath = flag("experiments/results/step_{device}.json", "File for the results.")

    def __post_init__(self) -> None:
        shapes.check([self.size, *filter(None, [self.wide])], self.architectures, shapes.known_architectures())
        if self.rounds < 2:
            raise ValueError(f"rounds must be at least 2, got {self.rounds}")
        if self.steps < 1 or self.warmup_steps < 0:
            raise ValueError(f"steps={self.steps} and warmup_steps={self.warmup_steps}: at least 1 and 0")


class Case(NamedTuple):
    """Settings of the measured steps."""

    architecture: str
    size: Size
    firing: str = EVEN


def main(config: Config) -> int:
    """Measure every case; return 1 if one failed."""
    device.jax_alone(config.device)
    out, results, failed = config.out.format(device=config.device), [], {}
    machine = timing.machine(config.device)
    for case in cases(config):
        try:
            results.append(_measure(config, case))
            print(_line(results[-1], results), flush=True)
        except (*EXPECTED_ERRORS, RuntimeError) as error:
            failed[f"{case.architecture} {case.size} {case.firing}"] = f"{type(error).__name__}: {error}"[:2000]
            print(f"FAILED {case}: {str(error)[:500]}", flush=True)
        settings = timing.settings(config, "device")
        timing.write(out, {"machine": machine, "settings": settings, "results": results, "failed": failed})
    print(f"figures: {out}")
    return 1 if failed else 0


def cases(config: Config) -> list[Case]:
    """Return what is measured, in order."""
    size = Size.parse(config.size)
    found = [Case(architecture, size) for architecture in config.architectures]
    if config.skewed:
        found += [Case(name, size, SKEWED) for name in ("topk", "batchtopk") if name in config.architectures]
    return found + ([Case("topk", Size.parse(config.wide))] if config.wide else [])


def _measure(config: Config, case: Case) -> dict[str, Any]:
    """Return seconds per step, activations per second, and what the process used so far."""
    import jax

    member, inputs = shapes.member(case.architecture, case.size, config.matmul_dtype), shapes.batches(case.size)
    start = time.perf_counter()
    states, program = begin(member, inputs[0], case.firing), shapes.program(member)
    batches, fired = itertools.cycle(inputs), None
    for _ in range(max(config.warmup_steps, 1)):
        states, (sums,) = program(states, (next(batches),))
        fired = sums.fired
    jax.block_until_ready(states)
    compiled = time.perf_counter() - start
    seconds = []
    for _ in range(config.rounds):
        start = time.perf_counter()
        for _ in range(config.steps):
            states, _ = program(states, (next(batches),))
        jax.block_until_ready(states)
        seconds.append((time.perf_counter() - start) / config.steps)
    stats = jax.local_devices()[0].memory_stats() or {}
    return {
        "architecture": case.architecture,
        "size": case.size._asdict(),
        "firing": case.firing,
        "operations": member.ops.name,
        "seconds": timing.spread(seconds),
        "activations_per_second": case.size.batch / statistics.median(seconds),
        "most_frequent": float(fired.max()) / case.size.batch,
        "seconds_to_compile_and_warm": compiled,
        "peak_bytes_so_far": stats.get("peak_bytes_in_use"),
    }


def begin(member: Member, sample: Any, firing: str) -> States:
    """Return the state before the first step; skewed: with encoder biases that let latents fire unevenly."""
    import jax.numpy as jnp

    states = shapes.begin(member, sample)
    if firing == SKEWED:
        (state,) = states
        shares = shares_of(member.sae.d_sae, member.sae.k)
        normal = statistics.NormalDist()
        spread = float(jnp.std(sample[:1024] @ state.sae.W_enc[...].T * state.scale))
        biases = [spread * normal.inv_cdf(share) for share in shares]
        random.Random(0).shuffle(biases)
        state.sae.b_enc[...] = jnp.asarray(biases, jnp.float32)
    return states


@functools.cache
def shares_of(d_sae: int, k: int) -> tuple[float, ...]:
    """Return the share of tokens on which each latent fires: min(1/3, c / i^0.7), which add up to k."""
    ranks = [i**-_POWER for i in range(1, d_sae + 1)]
    low, high = 0.0, float(d_sae)
    for _ in range(60):
        factor = math.sqrt(max(low, 1e-9) * high)
        total = sum(min(_MOST, factor * rank) for rank in ranks)
        low, high = (factor, high) if total < k else (low, factor)
    return tuple(min(_MOST, high * rank) for rank in ranks)


def _line(result: dict[str, Any], results: list[dict[str, Any]]) -> str:
    """Return a result as a line of text, with its ratio to the first."""
    ms = 1e3 * result["seconds"]["median"]
    peak = result["peak_bytes_so_far"]
    return (
        f"{result['architecture']:11} {Size(**result['size'])!s:24} {result['firing']:7} {ms:8.2f} ms "
        f"{result['activations_per_second'] / 1e6:6.2f} M/s  {ms / 1e3 / results[0]['seconds']['median']:5.2f} x  "
        f"fires most {result['most_frequent']:.1%}  peak so far {(peak or 0) / 2**30:.2f} GiB  "
        f"first {result['seconds_to_compile_and_warm']:.0f} s  {result['operations']}"
    )


if __name__ == "__main__":
    run(Config, main)
