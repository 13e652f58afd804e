"""Time of a whole streaming run, text to trained SAE, compared with the bare nanochat forward to the same hook.

`stream` is what `experiments.train` does between two blocks: the forward of the next block, the shuffle, a TopK step
for every batch of this one. `forward` only runs the model up to the hook, on the same rows and as many in one pass:
with all cores, and with the threads that the stream leaves to torch; on a GPU both are compiled. `steps` trains on
activations in memory. Hidden is the fraction of the shorter of forward and steps that overlaps with the other:
(forward + steps - stream) / min(forward, steps), with the forward on the stream's threads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bridge.accelerators import check_name
from bridge.locations import FilePath
from bridge.settings import flag
from bridge.training import device
from experiments.benches import models, shapes, tables, timing
from experiments.benches.shapes import Dtype

if TYPE_CHECKING:
    import numpy as np
    import torch

    from jsae.loop import Member

FORWARD, ITS_FORWARD, STEPS, STREAM = "forward", "forward, the stream's threads", "steps", "stream"


@dataclass(frozen=True)
class Config:
    """Models, SAE and rounds of the measurement."""

    models: tuple[str, ...] = flag(("demo", "d12"), "demo, or dN for random weights in the shape of N layers.")
    layer: int | None = flag(None, "Layer whose residual stream is read; none is the middle one.")
    expansion_factor: int = flag(8, "Latents per channel.")
    k: int = flag(32, "Active latents per token.")
    batch_size: int = flag(2048, "Activations per step.")
    block_size: int = flag(8192, "Activations per block; a round takes one block.")
    tokens_per_forward: int = flag(2048, "Tokens in one forward pass; a GPU wants 16 times as many.")
    vocab_size: int = flag(32768, "Tokens of the random models' vocabulary.")
    rounds: int = flag(5, "Timed rounds, at least 2.")
    threads: int | None = flag(None, "Threads of torch in the stream; none is as in training, all cores.")
    compile_model: bool = flag(True, "Compile the model's forward passes on a GPU, as a long run does.")
    matmul_dtype: Dtype = flag("float32", shapes.DTYPE_HELP)
    device: str = flag("cpu", "Device of torch and jax: cpu, cuda or cuda:N.")
    jax_memory_fraction: float = flag(0.4, "Fraction of the GPU's memory for jax; torch has the rest.")
    markdown: bool = flag(False, "Print the table as Markdown.")
    out: FilePath = flag("experiments/results/stream_{device}.json", "File for the results.")

    def __post_init__(self) -> None:
        for name in self.models:
            if name != "demo" and not (name[:1] == "d" and name[1:].isdigit() and int(name[1:]) >= 2):
                raise ValueError(f"models are demo, or d12 for random weights of 12 layers, got {name!r}")
        for name in ("expansion_factor", "k", "batch_size", "tokens_per_forward", "threads"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.rounds < 2:
            raise ValueError(f"rounds must be at least 2, got {self.rounds}")
        if not self.models or self.block_size < self.batch_size or self.block_size % self.batch_size:
            raise ValueError(f"block_size={self.block_size} is no multiple of batch_size={self.batch_size}")
        check_name(self.device)
        if not 0 < self.jax_memory_fraction < 0.95:
            raise ValueError(f"jax_memory_fraction must lie between 0 and 0.95, got {self.jax_memory_fraction}")


def main(config: Config) -> int:
    """Measure every model, print a table, write the results."""
    kind = device.share(config.device, config.jax_memory_fraction)
    results = [_measure(config, name, kind) for name in config.models]
    machine = {key: value for key, value in timing.machine(kind).items() if key != "threads"}
    tables.show("a streaming run", _COLUMNS, _rows(results), machine, config.markdown)
    out = config.out.format(device=kind)
    timing.write(out, {"machine": machine, "settings": timing.settings(config, "device"), "results": results})
    print(f"figures: {out}")
    return 0


def _measure(config: Config, name: str, device_kind: str) -> dict[str, Any]:
    """Return seconds per block of all cases of a model, their ratios, and the hidden fraction."""
    run = _Run(config, name, device_kind)
    seconds = timing.by_turns(run.cases(), config.rounds)
    hidden = [
        (forward + steps - stream) / min(forward, steps)
        for forward, steps, stream in zip(seconds[ITS_FORWARD], seconds[STEPS], seconds[STREAM], strict=True)
    ]
    return {
        "model": name,
        "hook": run.hook,
        "d_in": run.member.sae.d_in,
        "d_sae": run.member.sae.d_sae,
        "threads": run.threads,
        "seconds_per_block": {case: timing.spread(s) for case, s in seconds.items()},
        "activations_per_second": {case: config.block_size / timing.spread(s)["median"] for case, s in seconds.items()},
        "stream_over_forward": timing.ratios(seconds, STREAM)[FORWARD],
        "hidden": timing.spread(hidden),
    }


class _Run:
    """A model, its text, and the SAE that learns from it."""

    def __init__(self, config: Config, name: str, device_kind: str):
        import torch

        import bridge.nanochat
        from bridge.hooks import find, hook_name
        from bridge.nanochat.compiled import Programs
        from bridge.nanochat.corpus import Corpus
        from jsae.architectures import sae_config
        from jsae.config import TrainConfig
        from jsae.loop import Member

        demo = bridge.nanochat.load("demo", device=device_kind)
        self.model = (
            demo.model if name == "demo" else models.random_nanochat(int(name[1:]), config.vocab_size, device_kind)
        )
        shape = self.model.config
        if shape.vocab_size < demo.config.vocab_size:
            raise ValueError(f"vocab_size={shape.vocab_size}: the text has up to {demo.config.vocab_size} tokens")
        self.hook = hook_name(shape.n_layer // 2 if config.layer is None else config.layer, "resid_post")
        find(self.model, self.hook)
        compiles = config.compile_model and device_kind == "cuda"
        self.run = Programs(shape.head_dim) if compiles else None
        self.corpus = Corpus("stdlib", demo.tokenizer, split="train", row_len=shape.sequence_len)
        self.bos = demo.tokenizer.bos_token_id
        self.rows_per_forward = max(config.tokens_per_forward // self.corpus.row_len, 1)
        # The run is longer than the measurement.
        self.member: Member = Member(
            sae_config("topk", shape.n_embd, shape.n_embd * config.expansion_factor, k=config.k),
            TrainConfig(config.block_size * (config.rounds + 2), config.batch_size, matmul_dtype=config.matmul_dtype),
        )
        self.threads = {FORWARD: device.cores(), STREAM: config.threads or torch.get_num_threads()}
        self._config, self._device = config, device_kind

    def cases(self) -> dict[str, Callable[[], None]]:
        """Return the cases to time: each does its part of the work of one block."""
        import torch

        def case(work: Callable[[], None], threads: int) -> Callable[[], None]:
            def run() -> None:
                torch.set_num_threads(threads)
                work()
                if self._device != "cpu":
                    torch.cuda.synchronize()

            return run

        start = self.corpus.position()
        tokens = self.corpus.next_rows(-(-self._config.block_size // self.corpus.row_len))
        self.corpus.seek(start)
        forward, (stream, steps) = self._forward(tokens), self._training()
        stream_threads = self.threads[STREAM]
        return {
            FORWARD: case(forward, self.threads[FORWARD]),
            ITS_FORWARD: case(forward, stream_threads),
            STEPS: case(steps, stream_threads),
            STREAM: case(stream, stream_threads),
        }

    def _forward(self, rows: np.ndarray) -> Callable[[], None]:
        """Return a case that runs the bare model on the rows of a block, up to the hook."""
        import torch

        from bridge.hooks import capture

        ids: torch.Tensor = torch.from_numpy(rows.astype("int64")).to(self._device)

        @torch.no_grad()
        def run() -> None:
            for part in ids.split(self.rows_per_forward):
                with capture(self.model, [self.hook], stop=True):
                    self.model(part, run=self.run)

        return run

    def _training(self) -> tuple[Callable[[], None], Callable[[], None]]:
        """Return two cases: a block of a streaming run, and the steps of a block of activations in memory."""
        import jax

        from bridge.stream import ActivationStream
        from jsae import loop
        from jsae.data import Shuffled

        source = ActivationStream(
            self.model,
            self.corpus,
            [[self.hook]],
            excluded=(self.bos,),
            rows_per_forward=self.rows_per_forward,
            run=self.run,
        )
        size, count = self._config.batch_size, self._config.block_size // self._config.batch_size
        batches = Shuffled(source, batch_size=size, batches_per_block=count, seed=0)
        sample, members = batches.peek(), [self.member]
        in_memory = [jax.tree.map(lambda acts, i=i: acts[i * size : (i + 1) * size], sample) for i in range(count)]
        programs = loop.Programs(members)
        run = loop.fit(members, loop.init(members, sample), batches, programs)
        current = [loop.init(members, sample)]

        def stream() -> None:
            *_, (_, states, _) = (next(run) for _ in range(count))
            jax.block_until_ready(states)

        def steps() -> None:
            for batch in in_memory:
                current[0], _ = programs.at(1)(current[0], batch)
            jax.block_until_ready(current[0])

        return stream, steps


_COLUMNS = ("model", "d_sae", "", "ms per block", "activations per second", "stream over forward", "hidden")


def _rows(results: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for entry in results:
        heading = (entry["model"], str(entry["d_sae"]))
        for case, seconds in entry["seconds_per_block"].items():
            last = ("", "")
            if case == STREAM:
                last = tables.ratio(entry["stream_over_forward"]), tables.ratio(entry["hidden"])
            rows.append((*heading, case, tables.ms(seconds), f"{entry['activations_per_second'][case]:,.0f}", *last))
            heading = ("", "")
    return rows
