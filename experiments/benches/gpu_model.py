"""The nanochat side on a GPU: forward passes to a hook, decoding, and the stream of activations without waiting.

Random weights in the shape of a d20, in bfloat16. Every part is printed and written as soon as it is measured, and a
part that fails does not stop the others: `python -m experiments.benches.gpu_model`.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bridge.accelerators import check_name
from bridge.locations import FilePath
from bridge.settings import flag
from bridge.training import device
from experiments.benches import models, timing

if TYPE_CHECKING:
    import torch

    from bridge.nanochat.compiled import Programs
    from bridge.nanochat.model import GPT
    from bridge.runtime import InterpretableModel

PARTS = ("forward", "decode", "handover", "stream", "loop")


@dataclass(frozen=True)
class Config:
    """Parts, shapes and rounds of the measurement."""

    parts: tuple[str, ...] = flag(PARTS, "Parts to measure.")
    depth: int = flag(20, "Layers of the model; its width is 64 times that.")
    layer: int = flag(10, "Layer whose output is read.")
    vocab_size: int = flag(65536, "Tokens of the vocabulary.")
    rows: int = flag(16, "Rows in one forward pass.")
    row_len: int = flag(2048, "Tokens in a row.")
    rounds: int = flag(5, "Timed rounds, at least 2.")
    prompt: int = flag(64, "Tokens of the prompt.")
    tokens: int = flag(128, "Tokens decoded in a round.")
    expansion_factor: int = flag(8, "Latents per channel.")
    k: int = flag(32, "Active latents per token.")
    batch_size: int = flag(8192, "Activations per step.")
    steps: int = flag(24, "Steps of the loop.")
    device: str = flag("cuda", "Device of torch and jax: cpu, cuda or cuda:N.")
    jax_memory_fraction: float = flag(0.3, "Fraction of the GPU's memory for jax; torch has the rest.")
    out: FilePath = flag("experiments/results/model_{device}.json", "File for the results.")

    def __post_init__(self) -> None:
        if not self.parts or not set(self.parts) <= set(PARTS):
            raise ValueError(f"parts must be some of {', '.join(PARTS)}, got {', '.join(self.parts) or 'none'}")
        check_name(self.device)
        if self.rounds < 2 or self.tokens < 2 or not 0 <= self.layer < self.depth:
            raise ValueError("rounds and tokens must be at least 2, and layer a layer of the model")


def main(config: Config) -> int:
    """Measure every part, print its lines, write the results; return 1 if a part failed."""
    kind = device.share(config.device, config.jax_memory_fraction)
    bench = _Bench(config, kind)
    results: dict[str, Any] = {}
    failed = False
    for name in config.parts:
        print(f"---- {name}", flush=True)
        start = time.perf_counter()
        lines = results[name] = []
        try:
            for line in getattr(bench, name)():
                lines.append(line)
                print("  ".join(f"{key}: {_shown(value)}" for key, value in line.items()), flush=True)
        except Exception as error:
            failed = True
            lines.append({"failed": f"{type(error).__name__}: {error}"[:500]})
            traceback.print_exc(limit=-6)
            print(f"FAILED {name}: {type(error).__name__}: {str(error)[:500]}", file=sys.stderr, flush=True)
        print(f"({name} took {time.perf_counter() - start:.0f} s)", flush=True)
        record = {"machine": timing.machine(kind), "settings": timing.settings(config, "device"), "results": results}
        timing.write(config.out.format(device=kind), record)
    return int(failed)


class _Bench:
    """The model, and the parts: generators of lines, dictionaries of figures by name."""

    def __init__(self, config: Config, kind: str):
        from bridge.hooks import hook_name

        self.config, self.kind = config, kind
        self.model: GPT = models.random_nanochat(config.depth, config.vocab_size, kind)
        self.hook = hook_name(config.layer, "resid_post")

    def forward(self) -> Iterator[dict[str, Any]]:
        """Time passes up to the hook: eager, compiled with masks, compiled with flex_attention."""
        import torch

        from bridge.nanochat.compiled import Programs

        config, head_dim = self.config, self.model.config.head_dim
        generator = torch.Generator().manual_seed(0)
        shape = (config.rows, config.row_len)
        ids = torch.randint(0, config.vocab_size, shape, generator=generator).to(self.kind)
        inside = [f"blocks.{config.layer // 2}.hook_attn_out", self.hook]
        cases: dict[str, tuple[Callable[[], Programs | None], list[str]]] = {
            "eager": (lambda: None, [self.hook]),
            "compiled, masks": (lambda: Programs(head_dim, use_flex=False), [self.hook]),
            "compiled, flex": (lambda: Programs(head_dim, use_flex=True), [self.hook]),
            "compiled, flex, a hook inside": (lambda: Programs(head_dim, use_flex=True), inside),
        }
        reference = None
        for name, (make, hooks) in cases.items():
            run = make()

            def work(run: Programs | None = run, hooks: list[str] = hooks) -> torch.Tensor:
                return self._pass(ids, hooks, run)

            start = time.perf_counter()
            acts = work().float()
            first = time.perf_counter() - start
            reference = acts if reference is None else reference
            seconds = self._seconds(work)
            yield {
                "case": name,
                "ms": 1e3 * seconds,
                "tokens_per_second": ids.numel() / seconds,
                "first_call_seconds": first,
                "relative_difference": float((acts - reference).norm() / reference.norm()),
                "note": None if run is None else run.failure,
            }

    def decode(self) -> Iterator[dict[str, Any]]:
        """Time decoding of one row: bare, tracked and steered, in the plain way and as a CUDA graph."""
        from bridge.nanochat import engine
        from bridge.runtime import Steer

        im, config = self._interpretable(), self.config
        prompt = list(range(1, config.prompt + 1))
        additive, clamp = (Steer(self.hook, 7, mode, 2.0) for mode in ("additive", "clamp"))

        def bare(graphs: bool) -> Iterator[Any]:
            return engine.generate(self.model, prompt, max_tokens=config.tokens, graphs=graphs, read_last=True)

        def tracked(graphs: bool, steer: tuple[Steer, ...] = ()) -> Iterator[Any]:
            return im.generate(prompt, steer, max_tokens=config.tokens, features=10, graphs=graphs)

        cases: dict[str, Callable[[], Iterator[Any]]] = {
            "plain": lambda: bare(False),
            "plain, tracked": lambda: tracked(False),
            "graph": lambda: bare(True),
            "graph, tracked": lambda: tracked(True),
            "graph, tracked, additive": lambda: tracked(True, (additive,)),
            "graph, tracked, clamp": lambda: tracked(True, (clamp,)),
        }
        whole: dict[str, list[float]] = {name: [] for name in cases}
        steady: dict[str, list[float]] = {name: [] for name in cases}
        for round_ in range(config.rounds + 1):
            for name, make in list(cases.items())[:: (-1) ** round_]:  # what drifts favours no case
                if round_ > 2 and name.startswith("plain"):
                    continue  # slow, and not the question
                start = time.perf_counter()
                times = [time.perf_counter() for _ in make()]
                if round_:
                    whole[name].append(len(times) / (times[-1] - start))
                    steady[name].append(1 / statistics.median(b - a for a, b in itertools.pairwise(times)))
        for name in cases:
            yield {
                "case": name,
                "tokens_per_second": statistics.median(whole[name]),
                "steady_tokens_per_second": statistics.median(steady[name]),
                "steady_over_graph": statistics.median(steady[name]) / statistics.median(steady["graph"]),
                "kernels_us_per_token": None if name.startswith("plain") else self._kernels(cases[name]()),
            }
        plain, graph = (
            [column[0] for column in engine.generate(self.model, prompt, max_tokens=48, temperature=0, graphs=graphs)]
            for graphs in (False, True)
        )
        same = next((i for i, (a, b) in enumerate(zip(plain, graph, strict=True)) if a != b), len(plain))
        yield {"case": "greedy tokens that agree with the plain way", "same": same, "of": len(plain)}
        yield {"case": "logits of a step", "relative_difference": self._logits_difference(prompt)}

    def handover(self) -> Iterator[dict[str, Any]]:
        """Count arrays that torch overwrites before jax, behind a queue of products, has read them."""
        import jax
        import jax.numpy as jnp
        import torch

        from bridge import handover

        work = jax.jit(lambda x: jax.lax.fori_loop(0, 20, lambda i, y: (y @ x) / jnp.abs(y).max(), x))
        total = jax.jit(lambda x: x.astype(jnp.float32).sum())
        busy = jnp.ones((4096, 4096) if self.kind == "cuda" else (64, 64), jnp.bfloat16)
        ways = {"raw DLPack": lambda acts: jax.dlpack.from_dlpack(acts, copy=False), "to_jax": handover.to_jax}
        for name, hand_over in ways.items():
            wrong = 0
            for _ in range(10):
                acts = torch.ones(2**22, device=self.kind)
                array = hand_over(acts)
                del acts
                queued = work(busy)
                found = total(array)
                del array
                for _ in range(4):
                    torch.full((2**22,), 2.0, device=self.kind)
                wrong += int(float(found) != 2**22)
                jax.block_until_ready(queued)
            yield {"case": name, "wrong_reads": wrong, "of": 10}

    def stream(self) -> Iterator[dict[str, Any]]:
        """Time blocks of the stream alone, while torch may not wait for the GPU."""
        import torch

        from bridge.nanochat.compiled import Programs
        from bridge.stream import forbid_waiting

        rows = 8 * self.config.rows * self.config.row_len
        for name, run in {"eager": None, "compiled": Programs(self.model.config.head_dim)}.items():
            source = self._source(run)
            self._fill(source, rows // 8)
            seconds = []
            for _ in range(2):
                start = time.perf_counter()
                with forbid_waiting():
                    self._fill(source, rows)
                self._wait()
                seconds.append(time.perf_counter() - start)
            yield {"case": f"{name} stream alone", "activations_per_second": rows / min(seconds)}
        start = time.perf_counter()
        source._rows.next_rows(8 * self.config.rows)
        yield {"case": "text alone", "tokens_per_second": rows / (time.perf_counter() - start)}
        del source
        if torch.cuda.is_available():
            yield {"case": "torch's peak", "gib": torch.cuda.max_memory_allocated() / 2**30}

    def loop(self) -> Iterator[dict[str, Any]]:
        """Time the loop of training, of which every step but the first must not wait for the GPU."""
        import jax

        from bridge.nanochat.compiled import Programs
        from bridge.stream import forbid_waiting
        from jsae import loop
        from jsae.architectures import sae_config
        from jsae.config import TrainConfig
        from jsae.data import Shuffled

        config, width = self.config, self.model.config.n_embd
        sae = sae_config("topk", width, width * config.expansion_factor, k=config.k)
        run = TrainConfig(config.batch_size * 2 * config.steps, config.batch_size, matmul_dtype="bfloat16")
        members = [loop.Member(sae, run, 0)]
        source = self._source(Programs(self.model.config.head_dim))
        batches = Shuffled(source, batch_size=config.batch_size, batches_per_block=8, seed=0)
        steps = loop.fit(members, loop.init(members, batches.peek()), batches)
        for _ in range(9):  # more than a block, so that every program of the loop is compiled
            _, states, _ = next(steps)
        jax.block_until_ready(states)
        start = time.perf_counter()
        for _ in range(config.steps):
            with forbid_waiting():
                _, states, _ = next(steps)
        sent = time.perf_counter() - start
        jax.block_until_ready(states)
        self._wait()
        seconds = time.perf_counter() - start
        yield {
            "case": "loop that may not wait",
            "activations_per_second": config.steps * config.batch_size / seconds,
            "host_share": sent / seconds,
            "peak_gib_of_torch": self._peak(),
        }

    # ---- parts of the parts ----------------------------------------------------------------------------------------

    def _pass(self, ids: torch.Tensor, hooks: list[str], run: Programs | None) -> torch.Tensor:
        import torch

        from bridge.hooks import capture

        with torch.no_grad(), capture(self.model, hooks, stop=True) as acts:
            self.model(ids, **({} if run is None else {"run": run}))
        self._wait()
        return acts[self.hook]

    def _seconds(self, work: Callable[[], object]) -> float:
        """Return the median seconds of some rounds of work that waits for its device."""
        seconds = []
        for _ in range(self.config.rounds + 1):
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds[1:])

    def _logits_difference(self, prompt: list[int]) -> float:
        """Return the largest relative difference of the logits of recorded steps to those of a full pass."""
        import torch

        from bridge.nanochat.decoding import Decoder

        ids = torch.tensor([prompt], device=self.kind)
        cache = self.model.new_cache(1, len(prompt))
        with torch.no_grad():
            self.model(ids[:, :8], cache=cache)
            decoder = Decoder(self.model, self.model, cache, len(prompt) - 8)
            steps = torch.cat([decoder.step(ids[:, t : t + 1]).clone() for t in range(8, len(prompt))], dim=1)
            expected = self.model(ids)[:, 8:]
        return float(((steps - expected).norm(dim=-1) / expected.norm(dim=-1)).max())

    def _kernels(self, tokens: Iterator[Any]) -> float | None:
        """Return the microseconds per token that kernels take; the first half of the tokens is not counted."""
        import torch

        if self.kind != "cuda":
            return None
        half = self.config.tokens // 2
        for _ in range(half):
            next(tokens)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            counted = sum(1 for _ in tokens)
            torch.cuda.synchronize()
        return sum(event.device_time for event in profile.events()) / max(counted, 1)

    def _interpretable(self) -> InterpretableModel:
        import torch

        from bridge.runtime import InterpretableModel
        from bridge.torch_sae import TorchSAE

        d_in, k = self.model.config.n_embd, self.config.k
        d_sae = d_in * self.config.expansion_factor
        rows = torch.randn(d_sae, d_in, generator=torch.Generator().manual_seed(0))
        W_dec = torch.nn.functional.normalize(rows, dim=1)
        weights = {"W_enc": W_dec.T, "W_dec": W_dec, "b_enc": torch.zeros(d_sae), "b_dec": torch.zeros(d_in)}
        cfg = {"architecture": "topk", "d_in": d_in, "d_sae": d_sae, "k": k, "metadata": {}}
        return InterpretableModel(self.model, {self.hook: TorchSAE(cfg, weights).eval().to(self.kind)})

    def _source(self, run: Programs | None) -> Any:
        import bridge.nanochat
        from bridge.nanochat.corpus import Corpus
        from bridge.stream import ActivationStream

        demo = bridge.nanochat.load("demo")
        corpus = Corpus("stdlib", demo.tokenizer, split="train", row_len=self.config.row_len)
        excluded = (demo.tokenizer.bos_token_id,)
        rows = self.config.rows
        return ActivationStream(self.model, corpus, [[self.hook]], excluded=excluded, rows_per_forward=rows, run=run)

    def _fill(self, source: Any, rows: int) -> None:
        for _ in source.fill(rows):
            pass

    def _wait(self) -> None:
        import torch

        if self.kind == "cuda":
            torch.cuda.synchronize()

    def _peak(self) -> float | None:
        import torch

        return torch.cuda.max_memory_allocated() / 2**30 if self.kind == "cuda" else None


def _shown(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}"


if __name__ == "__main__":
    from experiments import flags

    flags.run(Config, main)
