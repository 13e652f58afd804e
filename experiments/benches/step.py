"""What a training step costs: every architecture over the encoder's matmul alone, and the parts of the TopK step.

A step is forward, backward, optimiser, unit decoder rows, dead counters and metrics, in one program. Cases run by
turns after some steps of warm-up, and ratios are of the same round. The parts are compiled by themselves: the
selection from given pre-activations, the decode of given codes, the gradient of one of the two weights from given
codes, and the optimiser with all its arrays. Activations per second are absolute and count on a GPU only.
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
    """What is measured, and how often."""

    sizes: tuple[str, ...] = flag((shapes.SIZE,), shapes.SIZES_HELP)
    architectures: tuple[str, ...] = flag((), "Architectures, none is all; with topk come its parts.")
    dead: float = flag(0.0, "Part of the latents that is dead: above 0 the TopK family learns with AuxK.")
    warmup_steps: int = flag(20, "Steps before the first that counts.")
    rounds: int = flag(15, "Rounds that count, at least 2.")
    matmul_dtype: Dtype = flag("float32", shapes.DTYPE_HELP)
    ops: str | None = flag(
        None, "Implementation: cpu, xla, xla-dense, plain or reference; none is the one for the device."
    )
    device: Literal["cpu", "cuda"] = flag("cpu", "Where it runs.")
    trace_dir: FilePath | None = flag(None, "Also write a profile of a few steps of every architecture there.")
    markdown: bool = flag(False, "Print tables as Markdown.")
    out: FilePath = flag("experiments/results/step_{device}.json", "Where the figures go.")

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
    """Return the implementation that was asked for; None is the one for the device."""
    from jsae.ops import IMPLEMENTATIONS

    if config.ops is None:
        return None
    if config.ops not in IMPLEMENTATIONS:
        raise ValueError(f"ops must be one of {', '.join(IMPLEMENTATIONS)}, got {config.ops}")
    return dataclasses.replace(IMPLEMENTATIONS[config.ops], matmul_dtype=config.matmul_dtype)


def main(config: Config) -> int:
    """Measures every size, prints tables, writes the figures."""
    device.jax_alone(config.device)
    machine, found = None, []
    for size in map(Size.parse, config.sizes):
        found.append(_measure(config, size))
        machine = machine or _machine(config)
        tables.show(f"one training step, {size}", _COLUMNS, _rows(found[-1]), machine, config.markdown)
    out = config.out.format(device=config.device)
    timing.write(
        out, {"machine": machine, "settings": timing.settings(config, "trace_dir", "device"), "results": found}
    )
    print(f"figures: {out}")
    return 0


def _machine(config: Config) -> dict[str, Any]:
    told = timing.machine("cpu") | shapes.device_name(config.device)
    return {name: value for name, value in told.items() if name not in ("torch", "threads")}


def _measure(config: Config, size: Size) -> dict[str, Any]:
    """Seconds of all cases of a size, and their ratios to the matmul and to the TopK step."""
    how = (config.dead, config.warmup_steps, config.matmul_dtype, _ops(config))
    steps = {architecture: shapes.stepping(architecture, size, *how) for architecture in config.architectures}
    parts = _parts(config, size) if TOPK in steps else {}
    cases = {MATMUL: shapes.encoder_matmul(size, config.matmul_dtype), **steps, **parts}
    seconds = timing.by_turns(cases, config.rounds)
    if config.trace_dir is not None:
        _trace(config.trace_dir, steps)
    spreads = {name: timing.spread(own) for name, own in seconds.items()}
    found = {
        "size": size._asdict(),
        "seconds": spreads,
        "over_matmul": timing.ratios(seconds, MATMUL),
        "activations_per_second": {a: size.batch / spreads[a]["median"] for a in steps},
    }
    if TOPK in steps:
        found["over_topk"] = timing.ratios({a: seconds[a] for a in steps}, TOPK)
    return found


def _parts(config: Config, size: Size) -> dict[str, Callable[[], None]]:
    """The parts of the TopK step, each a program of its own on arrays that are there."""
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
    gradient = jax.jit(lambda picked, W, g: jax.vjp(lambda W: ops.decode(picked, W, zeros), W)[1](g))
    picked = select(pre)

    def waiting(program: Callable[..., Any], *arrays: Any) -> Callable[[], None]:
        def run() -> None:
            jax.block_until_ready(program(*arrays))

        return run

    return {
        SELECTION: waiting(select, pre),
        DECODE: waiting(decode, picked, W_dec, zeros),
        GRADIENT: waiting(gradient, picked, W_dec, x),
        OPTIMISER: _optimiser(jax.tree.map(jnp.copy, state), member.train, ops),  # which donates it
    }


def _optimiser(state: TrainState, config: TrainConfig, ops: Ops) -> Callable[[], None]:
    """The update of all weights from given gradients; weights and moments are donated, as in the step."""
    import jax

    from jsae import optim

    optimizer = optim.make(config, state.sae.config.d_sae, ops)
    grads = jax.tree.map(lambda w: 1e-3 * jax.random.normal(jax.random.key(2), w.shape), state.sae)

    def moved(grads: Any, sae: Any, opt: Any) -> tuple[Any, Any]:
        return optimizer.apply(grads, opt, sae)

    program = jax.jit(moved, donate_argnums=(1, 2))
    kept = [(state.sae, state.opt)]

    def run() -> None:
        kept[0] = jax.block_until_ready(program(grads, *kept[0]))

    return run


def _trace(folder: str, steps: dict[str, Callable[[], None]]) -> None:
    """A profile for TensorBoard or Perfetto, in which every architecture's steps carry its name."""
    import jax

    with jax.profiler.trace(folder):
        for architecture, run in steps.items():
            with jax.profiler.TraceAnnotation(architecture):
                for _ in range(_TRACED):
                    run()


_COLUMNS = ("", "ms", "over the encoder matmul", "over the TopK step", "activations per second")


def _rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, seconds in found["seconds"].items():
        topk = found.get("over_topk", {}).get(name)
        per_second = found["activations_per_second"].get(name)
        rows.append(
            (
                f"  {name}" if name in PARTS else name,
                tables.ms(seconds),
                tables.ratio(found["over_matmul"][name]),
                "" if topk is None else tables.ratio(topk),
                "" if per_second is None else f"{per_second:,.0f}",
            )
        )
    return rows
