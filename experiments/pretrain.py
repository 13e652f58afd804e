"""Trains a small nanochat of the newest generation from scratch, tokenizer included, and saves it as nanochat does.

    python -m experiments.pretrain --flagfile=experiments/configs/pretrain_demo.flags

A run that was stopped or killed goes on from its last save with --resume. One that was asked to stop (Ctrl-C, SIGTERM)
saves and exits with code 75.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from experiments import flags
from experiments.flags import flag
from experiments.signals import STOPPED, stop_requests

if TYPE_CHECKING:
    from bridge.nanochat.corpus import Corpus
    from bridge.nanochat.pretraining import Trainer


@dataclass(frozen=True)
class PretrainConfig:
    """What one run of pretraining is."""

    out: str = flag("runs/nanochat", "Directory to write: model_*.pt, meta_*.json, tokenizer/.")
    data: str = flag("stdlib", "What to learn: stdlib, parquet shards, .jsonl[.gz] or text files; comma-separated.")
    tokenizer: str = flag("", "Directory of a tokenizer to use; empty: train one on the data.")
    vocab_size: int = flag(4096, "Tokens of a tokenizer that is trained here.")
    n_layer: int = flag(6, "Layers.")
    n_embd: int = flag(128, "Channels.")
    n_head: int = flag(4, "Query heads.")
    n_kv_head: int = flag(4, "Key and value heads.")
    sequence_len: int = flag(512, "Tokens the model sees at once.")
    window_pattern: str = flag("SSSL", "Attention windows of the layers: S short, L long; the last is always L.")
    steps: int = flag(2000, "Optimiser steps.")
    batch_rows: int = flag(16, "Rows of sequence_len tokens per step.")
    micro_rows: int = flag(2, "Rows per forward: memory and speed.")
    matrix_lr: float = flag(0.02, "Muon's rate for the matrices of the blocks.")
    embedding_lr: float = flag(0.1, "AdamW's rate for the embeddings.")
    head_lr: float = flag(0.01, "AdamW's rate for the head.")
    scalar_lr: float = flag(0.02, "AdamW's rate for gates and scalars.")
    weight_decay: float = flag(0.05, "Weight decay of the matrices of the blocks.")
    warmup_steps: int = flag(40, "Steps over which the rates rise.")
    warmdown: float = flag(0.5, "Part of the steps, at the end, over which the rates fall to zero.")
    grad_clip: float = flag(1.0, "Largest norm of a gradient.")
    bf16: bool = flag(True, "Compute in bfloat16 where that is safe; weights stay float32.")
    save_bf16: bool = flag(True, "Save matrices rounded to bfloat16: half the size.")
    eval_every: int = flag(200, "Steps between measurements of held-out bits per byte, and saves.")
    eval_rows: int = flag(64, "Held-out rows per measurement during training; at the end, four times as many.")
    log_every: int = flag(20, "Steps between lines of progress.")
    heldout_fraction: float = flag(0.05, "Part of the documents held out.")
    seed: int = flag(0, "Of the weights and of the order of the data.")
    workers: int = flag(2, "Forwards at a time on a CPU, one thread each; changes no number.")
    device: str = flag("cpu", "Where to train.")
    resume: bool = flag(False, "Go on from the last save in out.")

    def __post_init__(self):
        for name in ("eval_every", "eval_rows", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def main(config: PretrainConfig) -> int:
    """Trains until the last step, or until told to stop; both save."""
    import torch

    from bridge.nanochat.pretraining import last_state

    if config.device == "cpu":
        torch.set_num_threads(1)  # each worker is one
    elif not torch.cuda.is_available():
        raise ValueError(f"--device={config.device}, but torch sees no GPU here; use --device=cpu")
    out = Path(config.out)
    state = last_state(out) if config.resume else None
    if state is None and any(out.glob("model_*.pt")):
        told = "there is no optim_*_rank0.pt to resume from" if config.resume else "give --resume to go on with it"
        raise ValueError(f"{out} already holds a model: {told}, or give another --out")
    trainer, heldout, token_bytes = _build(config, out)
    if state is not None:
        trainer.load_state_dict(state)
    count = sum(weight.numel() for weight in trainer.model.parameters())
    print(f"{count:,} parameters, from step {trainer.step} to {config.steps}", flush=True)
    with stop_requests() as stopped:
        for figures in trainer.run():
            if trainer.step % config.log_every == 0:
                speed = config.batch_rows * config.sequence_len / figures["seconds"]
                print(f"step {trainer.step} loss {figures['loss']:.4f} {speed:,.0f} tokens/s", flush=True)
            if stopped or trainer.step % config.eval_every == 0 or trainer.step == config.steps:
                _save(config, out, trainer, heldout, token_bytes)
            if stopped and trainer.step < config.steps:
                print("stopped and saved; --resume goes on from here", flush=True)
                return STOPPED
    return 0


def _build(config: PretrainConfig, out: Path) -> tuple[Trainer, Corpus, object]:
    """The trainer at step 0, the held-out corpus, and the bytes of each token."""
    import torch

    from bridge.nanochat import tokenizer as tokenizers
    from bridge.nanochat.corpus import Corpus
    from bridge.nanochat.model import GPT, GPTConfig
    from bridge.nanochat.pretraining import Recipe, Trainer

    recipe = Recipe(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Recipe)})
    sizes = ("sequence_len", "n_layer", "n_head", "n_kv_head", "n_embd", "window_pattern")
    sizes = {name: getattr(config, name) for name in sizes}
    GPTConfig.of("G7", vocab_size=config.vocab_size, **sizes)  # complains before anything is read
    data = {"row_len": config.sequence_len + 1, "seed": config.seed, "heldout_fraction": config.heldout_fraction}
    made = out / "tokenizer"
    if config.tokenizer or (config.resume and made.is_dir()):
        tokenizer = tokenizers.load(config.tokenizer or made)
    else:
        bytes_only = tokenizers.Tokenizer({bytes([i]): i for i in range(256)})
        tokenizer = tokenizers.train(Corpus(config.data, bytes_only, **data).documents(), config.vocab_size)
    tokenizers.save(tokenizer, made)
    model = GPT(GPTConfig.of("G7", vocab_size=tokenizer.vocab_size, **sizes))
    model.init_weights(torch.Generator().manual_seed(config.seed))
    corpus = Corpus(config.data, tokenizer, split="train", **data)
    heldout = Corpus(config.data, tokenizer, split="heldout", **data)
    return Trainer(model.to(config.device), corpus, recipe, config.workers), heldout, tokenizer.token_bytes


def _save(config: PretrainConfig, out: Path, trainer: Trainer, heldout: Corpus, token_bytes) -> None:
    """Measures held-out bits per byte, as trained and as saved, and writes the checkpoint."""
    import copy

    from bridge.nanochat import pretraining

    done = trainer.step == config.steps
    rows = config.eval_rows * (4 if done else 1)
    weights, saved = trainer.model.state_dict(), trainer.model
    if config.save_bf16:
        weights, saved = pretraining.rounded(weights), copy.deepcopy(trainer.model)
        saved.load_state_dict(weights)
    measured = {"val_bpb": pretraining.heldout_bits_per_byte(saved, heldout, token_bytes, rows, config.micro_rows)}
    if done and config.save_bf16:
        exact = pretraining.heldout_bits_per_byte(trainer.model, heldout, token_bytes, rows, config.micro_rows)
        measured["val_bpb_float32"] = exact
    told = ", ".join(f"{name} {value:.4f}" for name, value in measured.items())
    print(f"step {trainer.step} held out: {told} ({trainer.seconds:.0f} s)", flush=True)
    tokens = trainer.step * config.batch_rows * config.sequence_len
    sizes = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "window_pattern")
    meta = {
        "step": trainer.step,
        "val_bpb": measured["val_bpb"],
        "model_config": {name: getattr(trainer.model.config, name) for name in sizes},
        "user_config": dataclasses.asdict(config),
        "device_batch_size": config.micro_rows,
        "max_seq_len": config.sequence_len,
        "total_batch_size": config.batch_rows * config.sequence_len,
        "loop_state": {**measured, "tokens": tokens, "total_training_time": trainer.seconds},
    }
    pretraining.save(out, weights, meta, trainer.state_dict())


if __name__ == "__main__":
    flags.run(PretrainConfig, main)
