"""Write the activations of a nanochat on text to a store, from which SAEs are trained without the model.

    python -m experiments.collect --checkpoint=demo --layer=2,3 --num_tokens=1_000_000 --out=runs/acts
    python -m experiments.collect --checkpoint=DIR --layer=10 --hook_type=mlp_in,mlp --storage=int8 --out=gs://bucket/acts

The store may be on local disk, gs:// or s3://. Several layers and hook types are written in one pass. A command that
was stopped or killed continues with the same flags and --resume. One that is asked to stop (Ctrl-C, SIGTERM) keeps
complete shards and exits with code 75.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from typing import Literal

from bridge import launch
from bridge.accelerators import check_name, require_torch
from bridge.locations import Checkpoint, Data, FilePath
from bridge.run import commands
from bridge.settings import CONTEXT, LONG_SEED, STEP, ExcludeTokens, flag, settle
from experiments import flags, signals
from jsae.settings import TOKENS, at_least, require

HookType = Literal["resid_post", "attn", "mlp_in", "mlp"]


@dataclass(frozen=True)
class CollectConfig:
    """Model, text and store."""

    out: FilePath | None = flag(None, "Store to write: a directory, gs://bucket/path or s3://bucket/path.")
    checkpoint: Checkpoint = flag("demo", "The nanochat, as for training.")
    step: int | None = flag(None, "Step of the checkpoint directory; none is the last.", STEP)
    tokenizer: FilePath | None = flag(None, "Directory of the tokenizer; none looks beside and above the checkpoint.")
    data: Data = flag("stdlib", "Text, as for training.")
    split: Literal["train", "heldout", "all"] = flag("train", "Part of the text.")
    layer: tuple[str, ...] = flag((), "Layers to read, counted from 0; or 'all'; none is the middle one.")
    hook_type: tuple[HookType, ...] = flag(("resid_post",), "Activations of every layer to read.")
    num_tokens: int = flag(10_000_000, "Tokens of text to read.", TOKENS)
    context_size: int | None = flag(None, "Tokens of a row of text, BOS first; none is the model's own.", CONTEXT)
    storage: Literal["bfloat16", "int8", "float32"] = flag(
        "bfloat16", "Type of the stored activations; int8 has a scale per token and half the size."
    )
    exclude_tokens: ExcludeTokens = flag(
        "bos", "Special tokens to mark as not counting: bos, special (all nine), or nothing."
    )
    drop_sinks: bool = flag(True, "Mark tokens of extreme norm as not counting.")
    data_seed: int = flag(0, "Seed of the order of the text.", LONG_SEED)
    tokens_per_forward: int = flag(
        2048, "Tokens in one forward pass of the model; a GPU wants 16 times as many.", at_least(1, 2**24)
    )
    shard_rows: int | None = flag(None, "Tokens in a file; none is about 65,536, fewer for a small store.", at_least(1))
    streams: int = flag(
        8, "Most parts in which the text is read, and processes that can write at once.", at_least(1, 2**15)
    )
    device: str = flag("cpu", "Device of the model.")
    resume: bool = flag(False, "Continue a store that was interrupted.")

    def __post_init__(self) -> None:
        settle(self)
        check_name(self.device)
        require(bool(self.out), "nowhere to write: give --out, a directory, gs://bucket/path or s3://bucket/path")
        require(bool(self.hook_type), "nothing to read: give --hook_type")
        for layer in self.layer:
            valid = layer == "all" or (layer.isascii() and layer.isdecimal() and len(layer) <= 4)
            require(valid, f"--layer has {layer!r}: give numbers from 0, or all")

    def layers(self, n_layer: int) -> tuple[int, ...]:
        """Return the layers to read in a model of `n_layer`."""
        if not self.layer:
            return ((n_layer - 1) // 2,)
        return tuple(range(n_layer)) if "all" in self.layer else tuple(sorted({int(layer) for layer in self.layer}))


def main(config: CollectConfig) -> int:
    """Write the store, or this process's part of it; return the exit code."""
    from jsae.store.backend import locate

    locate(config.out)  # before torch is loaded
    device = launch.own_device(config.device)
    require_torch(device)
    import bridge.nanochat
    from bridge import collecting
    from bridge.hooks import hook_name

    nano = bridge.nanochat.load(config.checkpoint, config.step, device, tokenizer=config.tokenizer)
    hooks = [hook_name(layer, kind) for layer in config.layers(nano.config.n_layer) for kind in config.hook_type]
    text = collecting.Text(**flags.shared(collecting.Text, config))
    try:
        manifest = collecting.collect(
            nano,
            hooks,
            config.out,
            text,
            resume=config.resume,
            stop_requests=signals.stop_requests,
            show_progress=launch.is_first(),
        )
    except collecting.Stopped:
        if not launch.is_first():
            return signals.STOPPED
        command = shlex.join(word for word in sys.argv[1:] if word not in ("--resume", "--resume=true"))
        print(f"stopped; continue with: python -m experiments.collect {command} --resume", flush=True)
        return signals.STOPPED
    if manifest is None:
        if not launch.is_first():
            return 0
        print(f"this process's part of {config.out} is written; the last process completes the store", flush=True)
        return 0
    for hook, statistics in manifest.statistics.items():
        norm = statistics.mean_squared_norm**0.5
        print(f"{hook}: {statistics.kept:,} of {manifest.rows:,} tokens count, root mean squared norm {norm:.4g}")
    size = manifest.rows * manifest.layout.row_bytes
    print(f"written to {config.out}: {manifest.rows:,} tokens, {size / 2**30:.2f} GiB", flush=True)
    collecting.warn_of_degenerate(manifest)
    return 0


def next_commands(config: CollectConfig) -> list[str]:
    """Return what to do with the store; nothing before it is complete."""
    from jsae.store import IncompleteError, Store

    try:
        Store(config.out)
    except (IncompleteError, FileNotFoundError):
        return []
    model = {name: getattr(config, name) for name in ("step", "tokenizer")}
    model["checkpoint"] = None if config.checkpoint == "demo" else config.checkpoint
    return [commands.line("train", activations=config.out, **model, output_dir="runs/from-store")]


if __name__ == "__main__":
    flags.run(CollectConfig, main, after=next_commands)
