"""The settings of a training run, one flag each."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from bridge.locations import Checkpoint, Data, FilePath, Stage
from bridge.settings import CONTEXT, LONG_SEED, STEP, ExcludeTokens, InMemory, flag
from bridge.stages import names
from jsae.settings import (
    AVERAGED,
    COUNT,
    DEAD_AFTER,
    FRACTION,
    RATE,
    SEED,
    TOKENS,
    WEIGHT,
    Json,
    at_least,
)

if TYPE_CHECKING:
    from jsae.architectures import SAE

HookType = Literal["resid_post", "attn", "mlp_in", "mlp"]


def settings_of(architecture: "type[SAE]") -> set[str]:
    """Return the names of an architecture's settings."""
    return {field.name for field in dataclasses.fields(architecture.Config)}


def _architectures(having: str | None = None) -> str:
    """Return the names of the architectures, or of those that have a setting; their module is imported."""
    from jsae.architectures import ARCHITECTURES

    return ", ".join(name for name, sae in ARCHITECTURES.items() if having is None or having in settings_of(sae))


def _of(setting: str, text: str) -> Callable[[], str]:
    """Return the help of a setting, with the names of the architectures that have it."""
    return lambda: f"{text} ({_architectures(setting)})."


@dataclass(frozen=True)
class RunSettings(Json):
    """Settings of a run as they are given: `bridge.training.config.RunConfig` checks them."""

    checkpoint: Checkpoint = flag(
        "demo", "nanochat checkpoint: a directory, a file of weights, hf://owner/name, or 'demo', which is included."
    )
    step: int | None = flag(None, "Step of the checkpoint directory; none is the last.", STEP)
    tokenizer: FilePath | None = flag(None, "Directory of the tokenizer; none looks beside and above the checkpoint.")
    checkpoints: tuple[Stage, ...] = flag(
        (),
        "Train a crosscoder for every --layer that reads several checkpoints in the place of --checkpoint, over a "
        "training or its stages: PATH@STEP,STEP,… or NAME=PATH[@STEP],….",
    )
    models_in_memory: InMemory = flag(
        "all",
        "Of --checkpoints: 'all', or 'one' that has the weights of every checkpoint in turn, read from its file for "
        "every block of text.",
    )
    data: Data = flag("stdlib", "Text: stdlib, parquet shards, .jsonl, .json or text files, globs; comma-separated.")
    activations: FilePath | None = flag(
        None,
        "Train on a store of activations (`experiments.collect`), a directory, gs:// or s3://, without the model and "
        "its text; --checkpoint is only recorded, for later commands.",
    )
    layer: tuple[str, ...] = flag(
        (), "Layers to read, counted from 0, an SAE each; or 'all'; none is the middle one, or all of a store."
    )
    hook_type: HookType = flag("resid_post", "Activation of a layer to read.")
    target_hook: HookType | None = flag(
        None, "Train a transcoder that predicts this activation of the same layer: mlp from mlp_in."
    )
    skip: bool = flag(False, "Give a transcoder a linear skip connection.")
    aligned: bool = flag(
        False, "Keep the inner product of every latent's encoder and decoder row at 1 (aligned training)."
    )
    crosscoder: bool = flag(False, "Train one crosscoder that reads and reconstructs all of --layer.")
    exclusive_latents: int = flag(
        0, "Latents of a crosscoder for each layer or checkpoint that read and write it alone.", at_least(0, 2**28)
    )
    activation: str | None = flag(
        None,
        lambda: (
            f"Architecture of the SAE: {_architectures()}, or your own class, written module:Class; its settings "
            "without a flag keep their defaults; none is topk, or batchtopk for a transcoder."
        ),
    )
    init_from: FilePath | None = flag(
        None,
        "Continue from an exported SAE of the same kind, of this project or SAELens: its directory, hf://owner/name, a "
        "run or a folder with one for every hook. Sizes and k are its own.",
    )
    expansion_factor: int | None = flag(
        None, "Latents per dimension of the model; none is 8, or as --init_from has.", at_least(1, 2**28)
    )
    k: tuple[int, ...] = flag(
        (),
        _of(
            "k",
            "Active latents per token, on average where they are selected in a whole batch; none is 32, or as "
            "--init_from has",
        ),
        COUNT,
    )
    hierarchical_k: tuple[int, ...] = flag(
        (),
        _of("hierarchical_k", "Also reconstruct from these smaller numbers of latents, for use at several sparsities"),
        COUNT,
    )
    nested_widths: tuple[int, ...] = flag(
        (), _of("nested_widths", "Widths of the inner SAEs; none is 1/16, 1/8, 1/4 and 1/2"), COUNT
    )
    l1_coefficient: tuple[float, ...] = flag((5.0,), _of("l1_coefficient", "Weight of the sparsity penalty"), WEIGHT)
    sparsity_penalty: Literal["log", "l1"] = flag(
        "log", _of("sparsity_penalty", "Logarithm of the latents, which hardly shrinks large ones, or L1")
    )
    l0_coefficient: tuple[float, ...] = flag((5.0,), _of("l0_coefficient", "Weight of the sparsity penalty"), WEIGHT)
    jump_recipe: Literal["tanh", "l0"] = flag(
        "tanh", _of("jump_recipe", "Anthropic's recipe of January 2025, or Gemma Scope's")
    )
    bandwidth: float | None = flag(
        None,
        _of(
            "bandwidth", "Width of the window around thresholds in which they have gradients; none is 1, or 0.5 for l0"
        ),
    )
    target_l0: tuple[float, ...] = flag((), _of("target_l0", "Adjust the penalty to reach this mean L0"))
    num_activations: int = flag(10_000_000, "Activations to train on.", TOKENS)
    batch_size: int = flag(2048, "Activations per step.", at_least(1, 2**24))
    learning_rate: tuple[float, ...] = flag(
        (), "Peak rate; none is a rate for these sizes and this length, which the run prints.", RATE
    )
    find_lr: bool = flag(
        False, "First find the peak rate by short runs at about nine rates, a twentieth of the run each."
    )
    warmup_fraction: float = flag(0.02, "Fraction of the run over which the learning rate rises.", FRACTION)
    decay_fraction: float = flag(0.2, "Fraction of the run, at the end, over which it falls to zero.", FRACTION)
    sparsity_warmup_fraction: float = flag(0.05, "Fraction of the run over which sparsity penalties rise.", FRACTION)
    k_start: int | None = flag(None, "Active latents at the start, lowered to k.", COUNT)
    k_anneal_fraction: float = flag(0.1, "Fraction of the run over which k is lowered.", FRACTION)
    average_fraction: float | None = flag(
        None, "Export a running mean of the weights over this fraction of the run.", AVERAGED
    )
    dead_after: int | None = flag(
        None,
        "Activations without firing after which a latent is dead; none is 1.5 % of the run, at most 10 million.",
        DEAD_AFTER,
    )
    matmul_dtype: Literal["float32", "bfloat16"] = flag(
        "float32", "Type of the factors of matrix products; bfloat16 is for GPUs."
    )
    resample_every: int | None = flag(None, "Activations between resamplings of dead latents; none is never.", TOKENS)
    seed: tuple[int, ...] = flag((0,), "Seed of the initial weights.", SEED)
    data_seed: int = flag(0, "Seed of the order of the text and of the shuffle.", LONG_SEED)
    context_size: int | None = flag(None, "Tokens per row of text; none is the model's sequence_len.", CONTEXT)
    tokens_per_forward: int = flag(
        2048, "Tokens in one forward pass of the model; a GPU wants 16 times as many.", COUNT
    )
    compile_model: Literal["auto", "on", "off"] = flag(
        "auto", "Compile the model's forward passes on a GPU; auto does where a run is long enough to gain from it."
    )
    block_size: int = flag(65536, "Activations that are kept in memory and shuffled together.", COUNT)
    exclude_tokens: ExcludeTokens = flag("bos", "Special tokens to leave out: bos, all nine (special), or nothing.")
    drop_sinks: bool = flag(True, "Leave out tokens whose norm exceeds 10 times the 0.9 quantile of their row.")
    heldout_tokens: int = flag(200_000, "Held-out tokens for the final metrics.", TOKENS)
    checkpoint_every: int = flag(1_000_000, "Activations between checkpoints.", TOKENS)
    log_every: int = flag(50, "Steps between reports.", COUNT)
    device: str = flag("cpu", "Device of torch and jax: cpu, cuda or cuda:N.")
    latent_shards: int = flag(
        1,
        "Of several processes: how many divide the latents of every SAE among themselves; the others divide the batch. "
        "With more latents than --batch_size this sends less.",
        COUNT,
    )
    data_shards: int | None = flag(
        None,
        "Parts that text and batches are divided into; several processes share them, so their number must divide this. "
        "The result depends on it, not on the processes. None is 8, or fewer for short blocks or little text.",
        COUNT,
    )
    deterministic: bool = flag(
        True, "On a GPU: end with the same bits on the same card and versions, also after --resume. A CPU does anyway."
    )
    jax_memory_fraction: float | None = flag(
        None, "Fraction of a GPU's memory for jax; none is what the SAEs need; torch has the rest."
    )
    output_dir: FilePath = flag("runs/sae", "Directory of the run.")
    resume: bool = flag(False, "Continue from the last checkpoint in --output_dir.")
    wandb_project: str | None = flag(None, "Also log to this Weights & Biases project (extra [wandb]).")
    prepare_neuronpedia: bool = flag(False, "At the end, also gather records and write Neuronpedia's bulk export.")
    model_id: str | None = flag(None, "Model id for --prepare_neuronpedia; none is nanochat-dDEPTH-HASH.")
    source_set: str | None = flag(
        None, "Source set for --prepare_neuronpedia; none is SITE-WIDTH-HASH, such as res-16k-1a2b3c."
    )

    def layers(self, n_layer: int) -> tuple[int, ...]:
        """Return the layers to read in a model of `n_layer`."""
        if not self.layer:
            return ((n_layer - 1) // 2,)
        return tuple(range(n_layer)) if "all" in self.layer else tuple(int(layer) for layer in self.layer)

    @property
    def stages(self) -> "tuple[names.Stage, ...]":
        """The checkpoints of `--checkpoints`; () where there is one model."""
        return names.parse(self.checkpoints) if self.checkpoints else ()

    @property
    def architecture(self) -> "type[SAE]":
        """The class of the SAE; its module is imported.

        Raises:
          ConfigError: there is no such architecture.
        """
        from jsae.architectures import find

        return find(self.activation)
