"""Time of a training step: every architecture over the encoder's matmul alone, and the parts of the TopK step.

A step is forward, backward, optimiser, unit decoder rows, dead counters and metrics, in one program. Cases run in
turn after some steps of warm-up, and ratios compare times of the same round. The parts are compiled separately: the
selection from given pre-activations, the decode of given codes, the gradient of one of the two weights from given
codes, and the optimiser with all its arrays. Activations per second are absolute and meaningful on a GPU only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from bridge.locations import FilePath
from bridge.settings import flag
from bridge.training import device
from experiments.benches import shapes, tables, timing
from experiments.benches.shapes import Dtype, Size

if TYPE_CHECKING:
    from jsae.config import TrainConfig
    from jsae.ops import Ops
    from jsae.state import TrainState

MATMUL, TOPK = "encoder matmul", "topk"
SELECTION, DECODE, GRADIENT, OPTIMISER = "top-k selection", "decode", "gradient of one weight", "optimiser"
PARTS = (SELECTION, DECODE, GRADIENT, OPTIMISER)
_TRACED = 3  # steps


@dataclass(frozen=True)
class Config:
    """Sizes, architectures and rounds of the measurement."""

    sizes: tuple[str, ...] = flag((shapes.SIZE,), shapes.SIZES_HELP)
    architectures: tuple[str, ...] = flag((), "Architectures; none is all. The parts of topk are measured with it.")
    dead: float = flag(0.0, "Fraction of the latents that are dead: above 0 the TopK family learns with AuxK.")
    warmup_steps: int = flag(20, "Untimed steps before the first round.")
    rounds: int = flag(15, "Timed rounds, at least 2.")
    matmul_dtype: Dtype = flag("float32", shapes.DTYPE_HELP)
    ops: str | None = flag(
        None, "Implementation of the operations: cpu, xla, xla-dense, plain or reference; none chooses by the device."
    )
    device: Literal["cpu", "cuda"] = flag("cpu", "Device of the step.")
    trace_dir: FilePath | None = flag(None, "Folder for a profile of a few steps per architecture; none writes none.")
    markdown: bool = flag(False, "Print tables as Markdown.")
    out: FilePath = flag("experiments/results/step_{device}.json", "File for the results.")

    def __post_init__(self) -> None:
        known = shapes.known_architectures()
        object.__setattr__(self, "architectures", self.architectures or known)
        shapes.check(self.sizes, self.architectures, known)
        if not 0 <= self.dead < 1:
            raise ValueError(f"dead must be at least 0 and below 1, got {self.dead}")
        _ops(self)
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be at least 0, got {self.warmup_steps}")
        if self.rounds < 2:
            raise ValueError(f"rounds must be at least 2, got {self.rounds}")


def _ops(config: Config) -> Ops | None:
    """Return the implementation that the flag names; None means the one for the device."""
    from jsae.ops import IMPLEMENTATIONS

    if config.ops is None:
        return None
    if config.ops not in IMPLEMENTATIONS:
        raise ValueError(f"ops must be one of {', '.join(IMPLEMENTATIONS)}, got {config.ops}")
    return dataclasses.replace(IMPLEMENTATIONS[config.ops], matmul_dtype=config.matmul_dtype)


def main(config: Config) -> int:
    """Measure every size, print tables, write the results."""
    device.jax_alone(config.device)
    machine, results = None, []
    for size in map(Size.parse, config.sizes):
        results.append(_measure(config, size))
        machine = machine or _machine(config)
        tables.show(f"one training step, {size}", _COLUMNS, _rows(results[-1]), machine, config.markdown)
    out = config.out.format(device=config.device)
    settings = timing.settings(config, "trace_dir", "device")
    timing.write(out, {"machine": machine, "settings": settings, "results": results})
    print(f"figures: {out}")
    return 0


def _machine(config: Config) -> dict[str, Any]:
    machine = timing.machine("cpu") | shapes.device_name(config.device)
    return {name: value for name, value in machine.items() if name not in ("torch", "threads")}


def _measure(config: Config, size: Size) -> dict[str, Any]:
    """Return seconds of all cases of a size, and their ratios to the matmul and to the TopK step."""
    settings = (config.dead, config.warmup_steps, config.matmul_dtype, _ops(config))
    steps = {architecture: shapes.stepping(architecture, size, *settings) for architecture in config.architectures}
    parts = _parts(config, size) if TOPK in steps else {}
    cases = {MATMUL: shapes.encoder_matmul(size, config.matmul_dtype), **steps, **parts}
    seconds = timing.by_turns(cases, config.rounds)
    if config.trace_dir is not None:
        _trace(config.trace_dir, steps)
    spreads = {name: timing.spread(times) for name, times in seconds.items()}
    result = {
        "size": size._asdict(),
        "seconds": spreads,
        "over_matmul": timing.ratios(seconds, MATMUL),
        "activations_per_second": {a: size.batch / spreads[a]["median"] for a in steps},
    }
    if TOPK in steps:
        result["over_topk"] = timing.ratios({a: seconds[a] for a in steps}, TOPK)
    return result


def _parts(config: Config, size: Size) -> dict[str, Callable[[], None]]:
    """Return the parts of the TopK step, each its own program on existing arrays."""
    import jax
    import jax.numpy as jnp

    x, member = shapes.activations(size), shapes.member(TOPK, size, config.matmul_dtype)
    ops = _ops(config) or member.ops
    (state,) = shapes.begin(member, x, ops=ops)
    sae, zeros = state.sae, jnp.zeros_like(x)
    W_enc, W_dec = sae.W_enc[...], sae.W_dec[...]
    pre = jax.jit(lambda x, W: x @ W.T)(x, W_enc)
    select = jax.jit(lambda pre: ops.top_k(pre, size.k))
    decode = jax.jit(ops.decode)
    gradient = jax.jit(lambda codes, W, g: jax.vjp(lambda W: ops.decode(codes, W, zeros), W)[1](g))
    codes = select(pre)

    def synchronized(program: Callable[..., Any], *arrays: Any) -> Callable[[], None]:
        def run() -> None:
            jax.block_until_ready(program(*arrays))

        return run

    return {
        SELECTION: synchronized(select, pre),
        DECODE: synchronized(decode, codes, W_dec, zeros),
        GRADIENT: synchronized(gradient, codes, W_dec, x),
        OPTIMISER: _optimiser(jax.tree.map(jnp.copy, state), member.train, ops),  # a copy, as it is donated
    }


def _optimiser(state: TrainState, config: TrainConfig, ops: Ops) -> Callable[[], None]:
    """Return a case that updates all weights from given gradients; it donates weights and moments, as the step does."""
    import jax

    from jsae import optim

    optimizer = optim.make(config, state.sae.config, ops)
    grads = jax.tree.map(lambda w: 1e-3 * jax.random.normal(jax.random.key(2), w.shape), state.sae)

    def update(grads: Any, sae: Any, opt: Any) -> tuple[Any, Any]:
        return optimizer.apply(grads, opt, sae, 1e-3)

    program = jax.jit(update, donate_argnums=(1, 2))
    current = [(state.sae, state.opt)]

    def run() -> None:
        current[0] = jax.block_until_ready(program(grads, *current[0]))

    return run


def _trace(folder: str, steps: dict[str, Callable[[], None]]) -> None:
    """Write a profile for TensorBoard or Perfetto, in which every architecture's steps carry its name."""
    import jax

    with jax.profiler.trace(folder):
        for architecture, run in steps.items():
            with jax.profiler.TraceAnnotation(architecture):
                for _ in range(_TRACED):
                    run()


_COLUMNS = ("", "ms", "over the encoder matmul", "over the TopK step", "activations per second")


def _rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, seconds in result["seconds"].items():
        topk = result.get("over_topk", {}).get(name)
        per_second = result["activations_per_second"].get(name)
        rows.append(
            (
                f"  {name}" if name in PARTS else name,
                tables.ms(seconds),
                tables.ratio(result["over_matmul"][name]),
                "" if topk is None else tables.ratio(topk),
                "" if per_second is None else f"{per_second:,.0f}",
            )
        )
    return rows
