"""Train a small nanochat of the newest generation from scratch, tokenizer included, and save it as nanochat does.

    python -m experiments.pretrain --flagfile=experiments/configs/pretrain_demo.flags
    python -m experiments.pretrain --init_from=runs/pretrain_demo --data=chats.jsonl --learned=assistant --out=runs/sft

The second command goes on from a checkpoint with other data, here as nanochat's chat training (SFT). A run that was
stopped or killed continues from its last save with --resume. A run that is asked to stop (Ctrl-C, SIGTERM) saves and
exits with code 75. With --watch_layer SAEs learn from the activations of the training meanwhile, in a run directory of
their own, and are saved and resumed with the model.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bridge.accelerators import check_name, require_torch
from bridge.locations import Checkpoint, Data, FilePath
from bridge.nanochat.config import GPTConfig
from bridge.run import commands
from bridge.settings import LONG_SEED, WATCH_SHARE, flag, settle
from experiments import flags
from experiments.signals import STOPPED, stop_requests
from jsae import files
from jsae.health import DivergedError, Watch
from jsae.settings import COUNT, FRACTION, RATE, ConfigError, Range, at_least, require

if TYPE_CHECKING:
    from bridge.live import WatchConfig, Watcher
    from bridge.nanochat.corpus import Corpus
    from bridge.nanochat.model import GPT
    from bridge.nanochat.pretraining import Trainer
    from bridge.nanochat.tokenizer import Tokenizer


_LAST_LOSSES = 10


@dataclass(frozen=True)
class PretrainConfig:
    """Model, text and optimiser of one run of pretraining."""

    out: FilePath = flag("runs/nanochat", "Directory to write: model_*.pt, meta_*.json, tokenizer/.")
    data: Data = flag(
        "stdlib", "Text to learn: stdlib, parquet shards, .jsonl, .json or text files, globs; comma-separated."
    )
    init_from: Checkpoint | None = flag(
        None, "Checkpoint of any generation to start from; sizes and tokenizer are its own. None starts from scratch."
    )
    learned: Literal["all", "assistant"] = flag("all", "Tokens to learn: all, or what the assistant says in chats.")
    tokenizer: FilePath = flag("", "Directory of a tokenizer; empty trains one on the data.")
    vocab_size: int = flag(4096, "Tokens of a newly trained tokenizer.", at_least(1, 2**22))
    n_layer: int = flag(6, "Layers.", at_least(1, 2**10))
    n_embd: int = flag(128, "Channels.", at_least(1, 2**16))
    n_head: int = flag(4, "Query heads.", at_least(1, 2**12))
    n_kv_head: int = flag(4, "Key and value heads.", at_least(1, 2**12))
    sequence_len: int = flag(512, "Tokens of the model's context.", at_least(1, 2**17))
    window_pattern: str = flag("SSSL", "Attention windows of the layers: S short, L long; the last is always L.")
    steps: int = flag(2000, "Optimiser steps.", COUNT)
    batch_rows: int = flag(16, "Rows of sequence_len tokens per step.", at_least(1, 2**20))
    micro_rows: int = flag(2, "Rows per forward pass; affects memory and speed only.", at_least(1, 2**20))
    matrix_lr: float = flag(0.02, "Muon's rate for the matrices of the blocks.", RATE)
    embedding_lr: float = flag(0.1, "AdamW's rate for the embeddings.", RATE)
    head_lr: float = flag(0.01, "AdamW's rate for the head.", RATE)
    scalar_lr: float = flag(0.02, "AdamW's rate for gates and scalars.", RATE)
    weight_decay: float = flag(
        0.05, "Weight decay of the matrices of the blocks.", Range(0, 100, "lie between 0 and 100")
    )
    warmup_steps: int = flag(40, "Steps over which the rates rise.", at_least(0))
    warmdown: float = flag(0.5, "Fraction of the steps, at the end, over which the rates fall to zero.", FRACTION)
    grad_clip: float = flag(1.0, "Largest norm of a gradient.", Range(1e-12, 1e30, "be positive, from 1e-12 to 1e30"))
    bf16: bool = flag(True, "Compute in bfloat16 where that is safe; weights stay float32.")
    save_bf16: bool = flag(True, "Save matrices rounded to bfloat16, in half the size.")
    eval_every: int = flag(200, "Steps between measurements of held-out bits per byte, and saves.", COUNT)
    eval_rows: int = flag(64, "Held-out rows per measurement during training; at the end, four times as many.", COUNT)
    keep_steps: tuple[int, ...] = flag((), "Steps at which a checkpoint is saved and kept; others are replaced.")
    log_every: int = flag(20, "Steps between lines of progress.", COUNT)
    heldout_fraction: float = flag(0.05, "Fraction of the documents that are held out.", FRACTION)
    seed: int = flag(0, "Seed of the weights and of the order of the data.", LONG_SEED)
    workers: int = flag(
        2, "Parallel forward passes on a CPU, one thread each; does not change results.", at_least(1, 2**10)
    )
    device: str = flag("cpu", "Device to train on.")
    resume: bool = flag(False, "Continue from the last save in --out.")
    watch_layer: tuple[str, ...] = flag(
        (), "Layers on whose activations SAEs are trained meanwhile, an SAE each, or 'all'; none trains no SAEs."
    )
    watch_dir: FilePath | None = flag(None, "Directory of the run with these SAEs; none is --out with -watch.")
    watch_activation: str = flag("topk", "Architecture of these SAEs.")
    watch_k: int = flag(32, "Active latents per token of these SAEs, where they have a k.", COUNT)
    watch_expansion_factor: int = flag(8, "Latents of these SAEs per channel of the model.", at_least(1, 2**28))
    watch_every: int = flag(1, "Steps from one whose activations are taken, to the next.", COUNT)
    watch_tokens: int = flag(2048, "Activations that are taken from such a step, a batch of the SAEs.", COUNT)
    watch_share: float = flag(
        0.05, "Largest part of the pretraining's own time for these SAEs; 1e6 is no limit.", WATCH_SHARE
    )

    def __post_init__(self):
        require(self.workers >= 1, f"workers must be at least 1, got {self.workers}")
        settle(self)
        check_name(self.device)
        require(
            self.batch_rows % self.micro_rows == 0,
            f"batch_rows={self.batch_rows} must be a multiple of micro_rows={self.micro_rows}",
        )
        require(
            not (self.init_from and self.tokenizer), "--tokenizer is for a model from scratch: leave it or --init_from"
        )
        require(
            all(0 < step <= self.steps for step in self.keep_steps),
            f"keep_steps must be from 1 to steps={self.steps}, got {', '.join(map(str, self.keep_steps))}",
        )
        sizes = ("sequence_len", "n_layer", "n_head", "n_kv_head", "n_embd", "window_pattern", "vocab_size")
        GPTConfig.of_generation("G7", **{name: getattr(self, name) for name in sizes})
        self._check_watch()

    def _check_watch(self) -> None:
        """Check the settings of watching, before any text is read."""
        if not self.watch_layer:
            for field in dataclasses.fields(self):
                require(
                    not field.name.startswith("watch_") or getattr(self, field.name) == field.default,
                    f"--{field.name} means nothing without --watch_layer: give the layers to watch",
                )
            return
        if self.init_from is not None:  # the checkpoint says how many layers there are
            return
        layers = self.watch_config(0).run_config().layers(self.n_layer)
        beyond = [layer for layer in layers if layer >= self.n_layer]
        require(not beyond, f"--watch_layer={','.join(map(str, beyond))}: the model has layers 0 to {self.n_layer - 1}")

    @property
    def watch_folder(self) -> str:
        """Directory of the run with the SAEs that are trained meanwhile."""
        return self.watch_dir or f"{self.out.rstrip('/')}-watch"

    def watch_config(self, step: int) -> WatchConfig:
        """Return the settings of watching a pretraining that stands at a step."""
        from bridge.live.config import WatchConfig

        names = ("layer", "activation", "k", "expansion_factor", "every", "tokens", "share")
        return WatchConfig(
            checkpoint=self.out,
            output_dir=self.watch_folder,
            **{name: getattr(self, f"watch_{name}") for name in names},
            batch_size=self.watch_tokens,
            seed=self.seed % 2**31,
            resume_from=step,
            keep_checkpoints=2,  # of the model there is one
            data=self.data,
        )


def main(config: PretrainConfig) -> int:
    """Train until the last step or until a request to stop, and save; return the exit code.

    Raises:
      FloatingPointError: the loss is not finite, or has become worse than guessing. The last good save is kept.
    """
    require_torch(config.device)
    with files.Lock(Path(config.out)):
        return _pretrain(config)


def _pretrain(config: PretrainConfig) -> int:
    import torch

    from bridge.nanochat.pretraining import last_state
    from jsae.progress import Progress

    if config.device == "cpu":
        torch.set_num_threads(1)  # per worker
    out = Path(config.out)
    state = last_state(out) if config.resume else None
    if state is None and any(out.glob("model_*.pt")):
        advice = "there is no optim_*_rank0.pt to resume from" if config.resume else "give --resume to continue it"
        raise ValueError(f"{out} already holds a model: {advice}, or give another --out")
    with Progress("reading text and preparing the tokenizer", None):
        trainer, heldout = _build(config, out)
    if state is not None:
        trainer.load_state_dict(state)
    guess = math.log(trainer.model.config.vocab_size)
    watch = Watch(1, 2 * guess, f"loss ({guess:.2f} is guessing)", "lower the learning rates")
    losses: collections.deque[float] = collections.deque(maxlen=_LAST_LOSSES)
    count = sum(weight.numel() for weight in trainer.model.parameters())
    print(f"{count:,} parameters, from step {trainer.step} to {config.steps}", flush=True)
    progress = Progress("pretraining", config.steps, "steps", trainer.step)
    with _watched(config, trainer) as watcher, progress, stop_requests() as stopped:
        for figures in trainer.run():
            if watcher is not None:
                watcher.step(trainer.step)
            losses.append(figures["loss"])
            progress.update(trainer.step, f"loss {figures['loss']:.4f}")
            watch.observe("", trainer.step, trainer.step, figures["loss"])
            if trainer.step % config.log_every == 0:
                speed = config.batch_rows * trainer.model.config.sequence_len / figures["seconds"]
                print(f"step {trainer.step} loss {figures['loss']:.4f} {speed:,.0f} tokens/s", flush=True)
            last = trainer.step == config.steps
            due = trainer.step % config.eval_every == 0 or trainer.step in config.keep_steps
            if stopped or last or (due and not watch.all_suspect):
                _save(config, out, trainer, heldout)
            if stopped and trainer.step < config.steps:
                print("stopped and saved; --resume continues from here", flush=True)
                return STOPPED
    loss = sum(losses) / len(losses) if losses else 0.0
    if trainer.step == config.steps and loss > 1.1 * guess:
        raise DivergedError(
            f"the model in {out} is of no use: its loss in the last {len(losses)} steps is {loss:.2f} nats per token, "
            f"and guessing is {guess:.2f}. It is kept for inspection; lower the learning rates"
        )
    return 0


def _watched(config: PretrainConfig, trainer: Trainer) -> contextlib.AbstractContextManager[Watcher | None]:
    """Return the SAEs that are trained meanwhile, if any.

    Raises:
      ConfigError: their directory holds something else.
    """
    if not config.watch_layer:
        return contextlib.nullcontext()
    from bridge.live import Watcher

    try:
        return Watcher(trainer.model, config.watch_config(trainer.step))
    except ConfigError as error:
        raise ConfigError(f"the SAEs of --watch_layer in --watch_dir: {error}") from error


def _build(config: PretrainConfig, out: Path) -> tuple[Trainer, Corpus]:
    """Return the trainer at step 0, and the held-out corpus."""
    from bridge.nanochat import tokenizer as tokenizers
    from bridge.nanochat.corpus import Corpus
    from bridge.nanochat.pretraining import Recipe, Trainer

    recipe = Recipe(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Recipe)})
    model, tokenizer = _new(config, out) if config.init_from is None else _loaded(config.init_from)
    tokenizers.save(tokenizer, out / "tokenizer")
    data = _data(config, model.config.sequence_len)
    corpus = Corpus(config.data, tokenizer, split="train", **data)
    heldout = Corpus(config.data, tokenizer, split="heldout", **data)
    return Trainer(model.to(config.device), corpus, recipe, config.workers), heldout


def _data(config: PretrainConfig, sequence_len: int) -> dict[str, Any]:
    return {"row_len": sequence_len + 1, "seed": config.seed, "heldout_fraction": config.heldout_fraction}


def _new(config: PretrainConfig, out: Path) -> tuple[GPT, Tokenizer]:
    """Return a model of random weights, and the tokenizer that is given, was trained before, or is trained now."""
    import torch

    from bridge.nanochat import tokenizer as tokenizers
    from bridge.nanochat.corpus import Corpus
    from bridge.nanochat.model import GPT

    folder = out / "tokenizer"
    if config.tokenizer or (config.resume and (folder / "tokenizer.pkl").is_file()):
        tokenizer = tokenizers.load(config.tokenizer or folder)
        if tokenizer.vocab_size != config.vocab_size:
            print(f"note: the tokenizer has {tokenizer.vocab_size} tokens; --vocab_size is for a newly trained one")
    else:
        bytes_only = tokenizers.Tokenizer({bytes([i]): i for i in range(256)})
        documents = Corpus(config.data, bytes_only, **_data(config, config.sequence_len)).documents()
        tokenizer = tokenizers.train(documents, config.vocab_size)
    fields = ("sequence_len", "n_layer", "n_head", "n_kv_head", "n_embd", "window_pattern")
    sizes: dict[str, Any] = {name: getattr(config, name) for name in fields}
    model = GPT(GPTConfig.of_generation("G7", vocab_size=tokenizer.vocab_size, **sizes))
    model.init_weights(torch.Generator().manual_seed(config.seed))
    return model, tokenizer


def _loaded(checkpoint: str) -> tuple[GPT, Tokenizer]:
    """Return the model of a checkpoint, to be trained, and its tokenizer.

    Raises:
      ConfigError: there is no tokenizer.
    """
    import torch

    from bridge import nanochat

    nano = nanochat.load(checkpoint, dtype=torch.float32)
    require(nano.tokenizer is not None, f"there is no tokenizer beside or above {nano.path}: put one there")
    assert nano.tokenizer is not None
    model = copy.deepcopy(nano.model)  # a checkpoint's file stays as it is: its weights are mapped from there
    return model.requires_grad_(True).train(), nano.tokenizer


def _save(config: PretrainConfig, out: Path, trainer: Trainer, heldout: Corpus) -> None:
    """Measure held-out bits per byte, as trained and as saved, and write the checkpoint."""
    from bridge.nanochat import pretraining

    done = trainer.step == config.steps
    rows = config.eval_rows * (4 if done else 1)
    weights, saved = trainer.model.state_dict(), trainer.model
    if config.save_bf16:
        weights, saved = pretraining.rounded(weights), copy.deepcopy(trainer.model)
        saved.load_state_dict(weights)
    measure = functools.partial(
        pretraining.heldout_bits_per_byte,
        corpus=heldout,
        rows=rows,
        micro_rows=config.micro_rows,
        learned=config.learned,
    )
    metrics = {"val_bpb": measure(saved)}
    if done and config.save_bf16:
        metrics["val_bpb_float32"] = measure(trainer.model)
    if not all(map(math.isfinite, metrics.values())):
        raise FloatingPointError(
            f"at step {trainer.step} the held-out bits per byte are {metrics['val_bpb']}: the weights are not finite. "
            "The last good save is kept; lower the learning rates"
        )
    values = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    print(f"step {trainer.step} held out: {values} ({trainer.seconds:.0f} s)", flush=True)
    model = trainer.model.config
    tokens = trainer.step * config.batch_rows * model.sequence_len
    names = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "window_pattern")
    sizes = {name: getattr(model, name) for name in names}
    meta = {
        "step": trainer.step,
        "val_bpb": metrics["val_bpb"],
        "model_config": sizes,
        "user_config": dataclasses.asdict(config) | sizes,
        "device_batch_size": config.micro_rows,
        "max_seq_len": model.sequence_len,
        "total_batch_size": config.batch_rows * model.sequence_len,
        "loop_state": {**metrics, "tokens": tokens, "total_training_time": trainer.seconds},
    }
    pretraining.save(out, weights, meta, trainer.state_dict(), config.keep_steps)


def next_commands(config: PretrainConfig) -> list[str]:
    """Return what to do next with the model."""
    watched = Path(config.watch_folder) if config.watch_layer else None
    return commands.after_pretraining(Path(config.out), config.data, watched)


if __name__ == "__main__":
    flags.run(PretrainConfig, main, after=next_commands)
