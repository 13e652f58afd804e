"""Time saved by training many SAEs in one pass over the model, compared with one run for each.

The demo nanochat; TopK SAEs that differ in k and seed. `one pass` is the whole streaming run with N SAEs over N times
the run with one. Beside it, the step alone on one batch: SAEs of one shape stepped one after the other in one program
(as in training), stacked with `vmap`, and stacked with `map`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bridge.locations import FilePath
from bridge.settings import flag
from experiments.benches import timing

if TYPE_CHECKING:
    from jsae.loop import Member
    from jsae.state import TrainState

ALONE, TURN, STACKED, MAPPED = "alone", "one program", "vmap", "map"


@dataclass(frozen=True)
class Config:
    """SAEs and rounds of the measurement."""

    counts: tuple[int, ...] = flag((2, 4, 8), "SAEs in one pass.")
    hook: str = flag("blocks.2.hook_resid_post", "Hook of the demo nanochat that they read.")
    expansion_factor: int = flag(8, "Latents per channel.")
    k: int = flag(32, "Active latents per token.")
    batch_size: int = flag(1024, "Activations per step.")
    block_size: int = flag(16384, "Activations per block; a round trains on two.")
    rounds: int = flag(5, "Timed rounds, at least 2.")
    threads: int = flag(1, "Threads of torch; jax uses all cores.")
    out: FilePath = flag("experiments/results/sweep_cpu.json", "File for the results.")

    def __post_init__(self) -> None:
        for name in ("expansion_factor", "k", "batch_size", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.rounds < 2:
            raise ValueError(f"rounds must be at least 2, got {self.rounds}")
        if min(self.counts, default=0) < 1:
            raise ValueError(f"counts must name at least one number of SAEs, got {self.counts}")
        if self.block_size % self.batch_size:
            raise ValueError(f"block_size={self.block_size} is no multiple of batch_size={self.batch_size}")


def main(config: Config) -> int:
    """Measure all counts, print a table, write the results."""
    import torch
    from rich.console import Console

    torch.set_num_threads(config.threads)
    passes = timing.by_turns(_passes(config), config.rounds)
    ratios = timing.ratios(passes, ALONE)
    steps = timing.by_turns(_steps(config), config.rounds)
    results = [
        {
            "count": n,
            "one_pass_over_runs": {name: value / n for name, value in ratios[str(n)].items()},
            "step_over_one_program": {
                way: timing.ratios({w: steps[f"{w} {n}"] for w in (TURN, STACKED, MAPPED)}, TURN)[way]
                for way in (STACKED, MAPPED)
            },
        }
        for n in config.counts
    ]
    settings = {name: v for name, v in dataclasses.asdict(config).items() if name not in ("out", "threads")}
    timing.write(config.out, {"machine": timing.machine("cpu"), "settings": settings, "results": results})
    Console().print(_table(results))
    Console().print(f"figures: {config.out}", soft_wrap=True)
    return 0


def _members(config: Config, n: int, d_in: int, num_activations: int, same: bool) -> list[Member]:
    """Return N members: all of the `same` shape, or every other one with half the k."""
    from jsae.architectures import sae_config
    from jsae.config import TrainConfig
    from jsae.loop import Member

    def one(i: int) -> Member:
        k = config.k if same or i % 2 == 0 else max(config.k // 2, 1)
        sae = sae_config("topk", d_in, d_in * config.expansion_factor, k=k)
        return Member(sae, TrainConfig(num_activations, config.batch_size, seed=i), 0)

    return [one(i) for i in range(n)]


def _passes(config: Config) -> dict[str, Callable[[], None]]:
    """Return cases that stream two blocks, compiled before, for one SAE and for many."""
    import itertools

    import jax

    import bridge.nanochat
    from bridge.nanochat.corpus import Corpus
    from bridge.stream import ActivationStream
    from jsae import loop
    from jsae.data import Shuffled

    nano = bridge.nanochat.load("demo")
    corpus = Corpus("stdlib", nano.tokenizer, split="train", row_len=256)
    start = corpus.position()
    steps = 2 * config.block_size // config.batch_size

    def case(n: int) -> Callable[[], None]:
        # The runs are longer than the measurement, so that every round continues with the same program.
        members = _members(config, n, nano.config.n_embd, config.batch_size * steps * (config.rounds + 2), same=False)
        run_state: list[Any] = []  # states of the SAEs, then the compiled programs

        def run() -> None:
            corpus.seek(start)
            excluded = (nano.tokenizer.bos_token_id,)
            source = ActivationStream(nano.model, corpus, [[config.hook]], excluded=excluded, rows_per_forward=8)
            batches = Shuffled(
                source,
                batch_size=config.batch_size,
                batches_per_block=config.block_size // config.batch_size,
                seed=0,
                num_batches=steps,
            )
            if not run_state:
                run_state.append(loop.init(members, batches.peek()))
                run_state.append(loop.Programs(members))
            *_, (_, last, _) = itertools.islice(loop.fit(members, run_state[0], batches, run_state[1]), steps)
            run_state[0] = jax.block_until_ready(last)

        return run

    return {ALONE: case(1)} | {str(n): case(n) for n in config.counts}


def _steps(config: Config) -> dict[str, Callable[[], None]]:
    """Return cases that step SAEs of one shape on one batch, in the three ways."""
    import jax
    import jax.numpy as jnp

    from jsae import loop, step

    d_in = 128
    x = jax.random.normal(jax.random.key(0), (config.batch_size, d_in))

    def cases(n: int) -> dict[str, Callable[[], None]]:
        members = _members(config, n, d_in, 2**30, same=True)
        states = loop.init(members, (x,))
        train_config, ops = members[0].train, members[0].ops
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        together = loop.Programs(members).at(1)

        def one(state: TrainState, x: jax.Array) -> TrainState:
            return step.update(train_config, ops, state, x)[0]

        ways = {
            TURN: (lambda s, x: together(s, (x,))[0], states),
            STACKED: (jax.jit(jax.vmap(one, (0, None)), donate_argnums=0), stacked),
            MAPPED: (jax.jit(lambda s, x: jax.lax.map(lambda each: one(each, x), s), donate_argnums=0), stacked),
        }

        def case(program: Callable[[Any, jax.Array], Any], initial: Any) -> Callable[[], None]:
            current = [jax.tree.map(jnp.copy, initial)]

            def run() -> None:
                current[0] = jax.block_until_ready(program(current[0], x))

            return run

        return {f"{way} {n}": case(*parts) for way, parts in ways.items()}

    return {name: run for n in config.counts for name, run in cases(n).items()}


def _table(results: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    columns = ("SAEs", "one pass over as many runs", "quartiles", "vmap over one program", "map over one program")
    table = Table(*columns, title="many SAEs in one pass", title_justify="left")
    for entry in results:
        whole, step = entry["one_pass_over_runs"], entry["step_over_one_program"]
        table.add_row(
            str(entry["count"]),
            f"{whole['median']:.2f}",
            f"{whole['q1']:.2f} to {whole['q3']:.2f}",
            f"{step[STACKED]['median']:.2f}",
            f"{step[MAPPED]['median']:.2f}",
        )
    return table
