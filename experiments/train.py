"""Trains a sparse autoencoder on the activations of a nanochat and exports it for torch and SAELens.

    python -m experiments.train --flagfile=experiments/configs/demo.flags

A run that was stopped or killed goes on, to the same numbers, with the same flags and --resume.
"""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from experiments import flags, rundir
from experiments.flags import flag
from jsae.config import Architecture, Json, SAEConfig, TrainConfig, require

if TYPE_CHECKING:
    from bridge.nanochat import Nanochat
    from bridge.nanochat.corpus import Corpus


@dataclass(frozen=True)
class RunConfig(Json):
    """One training run, as the command line says it."""

    checkpoint: str = flag("demo", "nanochat checkpoint: a directory, a model_*.pt, or 'demo', which comes along.")
    step: int | None = flag(None, "Step of the checkpoint directory; none is the last.")
    tokenizer: str | None = flag(None, "Directory of the tokenizer; none looks beside and above the checkpoint.")
    data: str = flag("stdlib", "Text: stdlib, parquet shards, .jsonl[.gz] or text files, globs; comma-separated.")
    layer: int | None = flag(None, "Layer to read, from 0; none is half way through the model.")
    hook_type: Literal["resid_post", "attn", "mlp"] = flag("resid_post", "What to read there.")
    activation: Architecture = flag("topk", "Architecture of the SAE.")  # noqa: RUF009 - a field like the others
    expansion_factor: int = flag(8, "Latents per dimension of the model.")
    k: int = flag(32, "Active latents per token (topk).")
    l1_coefficient: float = flag(5.0, "Weight of the L1 penalty (relu, gated).")
    num_activations: int = flag(10_000_000, "Activations to train on.")
    batch_size: int = flag(2048, "Activations per step.")
    learning_rate: float | None = flag(None, "Peak rate; none is 2e-4 / sqrt(d_sae / 16384).")
    dead_after: int | None = flag(None, "Activations without firing that make a latent dead; none: a tenth of the run.")
    resample_every: int | None = flag(None, "Activations between resamplings of dead latents (relu, gated).")
    seed: int = flag(0, "Of the weights, the order of the text and the shuffle.")
    context_size: int | None = flag(None, "Tokens per row of text; none is the model's sequence_len.")
    tokens_per_forward: int = flag(2048, "Tokens in one forward pass of the model; a GPU wants 16 times as many.")
    block_size: int = flag(65536, "Activations that are held and shuffled together.")
    drop_sinks: bool = flag(True, "Leave out tokens whose norm exceeds 10 times the median.")
    heldout_tokens: int = flag(200_000, "Held-out tokens for the final metrics.")
    checkpoint_every: int = flag(1_000_000, "Activations between checkpoints.")
    log_every: int = flag(50, "Steps between reports.")
    device: str = flag("cpu", "Where both torch and jax run: cpu, cuda or cuda:N.")
    jax_memory_fraction: float = flag(0.4, "Part of the GPU's memory for jax; torch has the rest.")
    output_dir: str = flag("runs/sae", "Directory of the run.")
    resume: bool = flag(False, "Go on from the last checkpoint in output_dir.")
    wandb_project: str | None = flag(None, "Also log to this Weights & Biases project (extra [wandb]).")
    prepare_neuronpedia: bool = flag(False, "At the end, also gather records and write Neuronpedia's bulk export.")
    model_id: str | None = flag(None, "Of --prepare_neuronpedia: the model's id; none is nanochat-dDEPTH-HASH.")
    source_set: str | None = flag(
        None, "Of --prepare_neuronpedia: none is SITE-WIDTH-HASH, res-16k-1a2b3c for example."
    )

    def __post_init__(self) -> None:
        for name in ("expansion_factor", "tokens_per_forward", "block_size", "heldout_tokens", "log_every"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}: it must be at least 1")
        require(self.checkpoint_every >= self.batch_size, "checkpoint_every must be at least one batch")
        require(self.block_size >= self.batch_size, "block_size must be at least one batch")
        require(
            self.device == "cpu" or self.device.split(":")[0] == "cuda",
            f"device is {self.device!r}: torch and jax share either cpu or cuda",
        )
        require(
            0 < self.jax_memory_fraction < 0.95,
            f"jax_memory_fraction is {self.jax_memory_fraction}: it must lie between 0 and 0.95",
        )
        self._check_neuronpedia()
        self.train_config()  # complains before anything heavy is imported

    def _check_neuronpedia(self) -> None:
        """Refuses names that Neuronpedia would refuse when the training is over."""
        from bridge.neuronpedia import ids

        given = {"model_id": ids.check_model, "source_set": ids.check_source_set}
        for name, check in given.items():
            value = getattr(self, name)
            if value is not None:
                require(self.prepare_neuronpedia, f"--{name} is of --prepare_neuronpedia, which is not given")
                check(value)

    def sae_config(self, d_in: int) -> SAEConfig:
        """The SAE for a model of width d_in."""
        d_sae = d_in * self.expansion_factor
        return SAEConfig(self.activation, d_in, d_sae, k=self.k, l1_coefficient=self.l1_coefficient)

    def train_config(self) -> TrainConfig:
        """How it is trained."""
        return TrainConfig(
            num_activations=self.num_activations,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            dead_after=self.dead_after or min(10_000_000, max(self.num_activations // 10, 1)),
            resample_every=self.resample_every,
            seed=self.seed,
        )


def main(config: RunConfig) -> int:
    """Trains, exports, evaluates what was exported; or stops where it is asked to."""
    started = time.perf_counter()
    run = Path(config.output_dir)
    rundir.claim(run, config)
    device = _share_device(config)

    import jax

    import bridge.nanochat
    from bridge.hooks import find, hook_name
    from bridge.stream import ActivationStream
    from experiments.loop import finish, train

    # The model and the text it reads.
    nano = bridge.nanochat.load(config.checkpoint, config.step, device, tokenizer=config.tokenizer)
    layer = (nano.config.n_layer - 1) // 2 if config.layer is None else config.layer
    hook = hook_name(layer, config.hook_type)
    find(nano.model, hook)
    sae_config = config.sae_config(nano.config.n_embd)
    corpus, heldout = _texts(config, nano)
    print(
        f"nanochat {config.checkpoint} ({nano.generation}, {nano.config.n_layer} layers of width {sae_config.d_in}), "
        f"{hook}: a {config.activation} SAE of {sae_config.d_sae} latents from {config.num_activations:,} activations "
        f"of {config.data!r} on {jax.default_backend()}",
        flush=True,
    )
    rundir.record(run, config, {"model": nano.fingerprint, "data": corpus.fingerprint, "hook_name": hook})

    # The stream of activations and the loop that learns from it.
    rows = max(config.tokens_per_forward // corpus.row_len, 1)
    bos = nano.tokenizer.bos_token_id
    source = ActivationStream(
        nano.model, corpus, hook, bos_token_id=bos, rows_per_forward=rows, drop_sinks=config.drop_sinks
    )
    state = train(run, config, sae_config, source)
    if state is None:
        command = " ".join(a for a in sys.argv[1:] if a != "--resume")
        print(f"stopped and saved; go on with: python -m experiments.train {command} --resume")
        return 0
    finish(run, config, state, nano, hook, heldout)
    if config.prepare_neuronpedia:
        _prepare_neuronpedia(run, config, device)
    print(f"took {time.perf_counter() - started:.0f} s in all")
    return 0


def _share_device(config: RunConfig) -> str:
    """Decides who gets what of the device, before torch or jax take anything; gives torch's name for it."""
    kind, _, number = config.device.partition(":")
    os.environ["JAX_PLATFORMS"] = kind
    if kind == "cpu":
        import torch

        # jax computes the step on the other cores meanwhile: threads that share cores wait for each other.
        torch.set_num_threads(max(len(os.sched_getaffinity(0)) // 2, 1) if hasattr(os, "sched_getaffinity") else 1)
        return kind
    if number:
        os.environ["CUDA_VISIBLE_DEVICES"] = number  # for both alike; it is then the only one
    os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{config.jax_memory_fraction:.2f}"
    import jax
    import torch

    require(torch.cuda.is_available(), f"--device={config.device}: torch sees no GPU here; use --device=cpu")
    torch.cuda.set_per_process_memory_fraction(max(0.95 - config.jax_memory_fraction, 0.05))
    try:
        jax.devices()
    except RuntimeError as error:
        require(False, f"--device={config.device}: jax has no GPU ({error}); README says which plugin to install")
    return kind


def _texts(config: RunConfig, nano: "Nanochat") -> tuple["Corpus", "Corpus"]:
    """Training and held-out text, in rows as long as the model's context."""
    from bridge.nanochat.corpus import Corpus

    require(
        nano.tokenizer is not None,
        f"no tokenizer lies beside or above {config.checkpoint}: give its directory with --tokenizer",
    )
    longest = nano.config.max_positions
    row_len = config.context_size or nano.config.sequence_len
    require(2 <= row_len <= longest, f"context_size is {row_len}: this model takes 2 to {longest} tokens")
    train, heldout = (
        Corpus(config.data, nano.tokenizer, split=split, row_len=row_len, seed=config.seed)
        for split in ("train", "heldout")
    )
    require(
        next(heldout.one_pass(1), None) is not None,
        f"the held-out part of {config.data!r} is shorter than one row of {row_len} tokens, and the trained SAE is "
        "measured on it: give more text, or a smaller --context_size",
    )
    return train, heldout


def _prepare_neuronpedia(run: Path, config: RunConfig, device: str) -> None:
    """What `experiments.explore` and `experiments.export` do by themselves, with their defaults."""
    from experiments import explore, export

    explore.main(explore.ExploreConfig(run_dir=str(run), device=device))
    export.main(export.ExportConfig(run_dir=str(run), model_id=config.model_id, source_set=config.source_set))


if __name__ == "__main__":
    flags.run(RunConfig, main)
