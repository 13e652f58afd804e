"""Settings of a training run, and the configurations of the SAEs that they describe."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from bridge import accelerators
from bridge.locations import Checkpoint, Data, FilePath, Stage
from bridge.settings import CONTEXT, LONG_SEED, STEP, ExcludeTokens, InMemory, flag, settle
from bridge.stages import names
from jsae.config import TrainConfig
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
    require,
)

if TYPE_CHECKING:
    from jsae.architectures import SAE, SAEConfig
    from jsae.pretrained import Description

HookType = Literal["resid_post", "attn", "mlp_in", "mlp"]

SWEPT: Mapping[str, str] = {
    "k": "k",
    "l1_coefficient": "l1_",
    "l0_coefficient": "l0c",
    "target_l0": "l0_",
    "learning_rate": "lr",
    "seed": "seed",
}
"""Settings that take several values, and their abbreviations in the names of variants."""

_OF_TEXT = ("context_size", "tokens_per_forward", "compile_model", "exclude_tokens", "drop_sinks")
"""Settings of reading text through a model."""
_WITH_K = ("k_start", "k_anneal_fraction")
_WITHOUT_K = ("sparsity_warmup_fraction",)
_OWN = (
    "k",
    "hierarchical_k",
    "nested_widths",
    "l1_coefficient",
    "l0_coefficient",
    "jump_recipe",
    "bandwidth",
    "target_l0",
)
"""Settings of some architectures. The two tuples above are settings of training, with and without a k."""

MOST_VARIANTS = 1000
_UNSET: Mapping[str, Any] = {"k": (32,), "expansion_factor": 8}
"""What settings become that are not given, unless the SAE that a run continues has them."""
_WIDEST = 2**20  # stands for the width of a model that is not known yet


def _architectures(having: str | None = None) -> str:
    """Return the names of the architectures, or of those that have a setting; their module is imported."""
    from jsae.architectures import ARCHITECTURES

    return ", ".join(name for name, sae in ARCHITECTURES.items() if having is None or having in _settings(sae))


def _settings(architecture: "type[SAE]") -> set[str]:
    """Return the names of an architecture's settings."""
    return {field.name for field in dataclasses.fields(architecture.Config)}


def _of(setting: str, text: str) -> Callable[[], str]:
    """Return the help of a setting, with the names of the architectures that have it."""
    return lambda: f"{text} ({_architectures(setting)})."


@dataclass(frozen=True)
class RunConfig(Json):
    """Settings of a run: one pass over text that trains one SAE, or several where settings have several values.

    The command line has a flag for every field, and error messages name fields as flags (`--k`). `bridge.train` also
    takes the fields as keyword arguments, with single values in the place of tuples.

    Raises:
      ConfigError: settings that cannot work; names the field, what was given and what is allowed.
    """

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
    l1_coefficient: tuple[float, ...] = flag((5.0,), _of("l1_coefficient", "Weight of the L1 penalty"), WEIGHT)
    l0_coefficient: tuple[float, ...] = flag((5.0,), _of("l0_coefficient", "Weight of the sparsity penalty"), WEIGHT)
    jump_recipe: Literal["tanh", "l0"] = flag(
        "tanh", _of("jump_recipe", "Anthropic's recipe of January 2025, or Gemma Scope's")
    )
    bandwidth: float | None = flag(
        None,
        _of(
            "bandwidth", "Width of the window around thresholds in which they have gradients; none is 2, or 0.5 for l0"
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
    drop_sinks: bool = flag(True, "Leave out tokens whose norm exceeds 10 times the median.")
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

    def __post_init__(self) -> None:
        settle(self)
        if self.activation is None:  # there is no exported form of a TopK transcoder
            object.__setattr__(self, "activation", "topk" if self.target_hook is None else "batchtopk")
        if self.init_from is None:
            for name, value in _UNSET.items():
                object.__setattr__(self, name, getattr(self, name) or value)
        accelerators.check_name(self.device)
        require(self.checkpoint_every >= self.batch_size, "checkpoint_every must be at least one batch")
        window = min(self.log_every * self.batch_size, self.checkpoint_every, self.num_activations)
        require(
            window < 2**31, f"log_every={self.log_every} steps are {window} activations: report at least every 2**31"
        )
        require(self.block_size >= self.batch_size, "block_size must be at least one batch")
        require(
            self.data_shards is None or self.batch_size % self.data_shards == 0,
            f"a batch of --batch_size={self.batch_size} tokens cannot be divided into --data_shards={self.data_shards} "
            "equal parts: give a multiple",
        )
        require(
            self.jax_memory_fraction is None or 0 < self.jax_memory_fraction < 0.95,
            f"jax_memory_fraction is {self.jax_memory_fraction}: it must lie between 0 and 0.95",
        )
        for layer in self.layer:
            require(layer == "all" or _is_number(layer), f"layer {layer!r} is neither a number from 0 nor 'all'")
        given = f"--layer={','.join(self.layer)}"
        require("all" not in self.layer or len(self.layer) == 1, f"{given} names layers beside all of them")
        require(len(set(self.layers(0))) == len(self.layers(0)), f"{given} names a layer twice")
        require(
            not (self.find_lr and self.learning_rate),
            f"--find_lr chooses the learning rate, and --learning_rate={','.join(map(str, self.learning_rate))} gives "
            "it: leave out one of them",
        )
        self._check_kind()
        self._check_swept()
        self._check_stored()
        self._check_used()
        self._check_neuronpedia()
        for variant in self.variants():  # before the model is loaded
            variant.train_config()
            variant.check_sae()

    def _check_kind(self) -> None:
        """Check the settings of transcoders and crosscoders."""
        require(not self.aligned or self.target_hook is None, "--aligned is for autoencoders: leave out --target_hook")
        require(not self.skip or self.target_hook is not None, "--skip is for a transcoder: give --target_hook")
        require(
            self.target_hook != self.hook_type,
            f"--target_hook={self.target_hook} equals --hook_type: a transcoder needs two different activations",
        )
        if self.crosscoder:
            require(self.target_hook is None, "--crosscoder reconstructs its input: leave out --target_hook")
            require(
                len(self.layer) > 1 or self.layer == ("all",),
                "--crosscoder reads several layers: give them with --layer=1,2,3 or --layer=all",
            )
        self._check_stages()

    def _check_stages(self) -> None:
        """Check the settings of crosscoders over checkpoints, and of exclusive latents."""
        require(
            not self.exclusive_latents or self.crosscoder or bool(self.checkpoints),
            "--exclusive_latents are of a crosscoder: give --checkpoints, or --crosscoder and several layers",
        )
        require(
            not self.exclusive_latents or self.init_from is None,
            "--exclusive_latents begin with weights that are 0, and --init_from with those of an SAE: leave out one",
        )
        if not self.checkpoints:
            require(self.models_in_memory == "all", "--models_in_memory is for --checkpoints: leave it out")
            return
        names.parse(self.checkpoints)
        for name, reason in {
            "crosscoder": "--checkpoints makes a crosscoder of each of --layer",
            "target_hook": "a crosscoder reconstructs its input",
            "activations": "a store has the activations of one model",
        }.items():
            require(not getattr(self, name), f"{reason}: leave out --{name}")
        for name in ("checkpoint", "step"):
            default = type(self).__dataclass_fields__[name].default
            require(getattr(self, name) == default, f"--checkpoints names the models: leave out --{name}")

    def _check_stored(self) -> None:
        """Check that settings of model and text have their defaults where a store is read."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in _OF_TEXT:
            require(
                self.activations is None or getattr(self, name) == defaults[name],
                f"--{name} means nothing with --activations, whose store was written with its own: leave it out",
            )

    def _check_swept(self) -> None:
        """Check that no SAE would be trained twice, and that there are not too many."""
        for name in SWEPT:
            values = getattr(self, name)
            require(len(set(values)) == len(values), f"--{name}={','.join(map(str, values))} has a value twice")
            require(bool(values) or name in ("k", "learning_rate", "target_l0"), f"--{name} needs at least one value")
        count = math.prod(max(len(getattr(self, name)), 1) for name in SWEPT)
        require(count <= MOST_VARIANTS, f"these flags ask for {count} variants: at most {MOST_VARIANTS} train together")

    def check_given(self, names: Collection[str]) -> None:
        """Check flags that were given, be it with their defaults: the architecture must have them.

        Raises:
          ConfigError: names the flag, and those that the architecture has.
        """
        self._check_used(names)

    def _check_used(self, given: Collection[str] = ()) -> None:
        """Check that settings which the architecture does not have are not given, and have their defaults."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        if self.init_from is None:
            defaults |= _UNSET
        own = _settings(self.architecture)
        used = {*own, *(_WITH_K if "k" in own else _WITHOUT_K)}
        names = ", ".join(f"--{name}" for name in (*_OWN, *_WITH_K, *_WITHOUT_K) if name in used) or "no flags"
        for name in (*_OWN, *_WITH_K, *_WITHOUT_K):
            require(
                name in used or (name not in given and getattr(self, name) == defaults[name]),
                f"--{name} means nothing to {self.activation}: leave it out. {self.activation} has {names}",
            )
        require(
            self.k_start is not None or self.k_anneal_fraction == defaults["k_anneal_fraction"],
            "--k_anneal_fraction needs --k_start, which is not given: over it, k is lowered from k_start",
        )

    def _check_neuronpedia(self) -> None:
        """Check the names that Neuronpedia would refuse after the training."""
        from bridge.neuronpedia import ids

        require(
            not self.prepare_neuronpedia or not (self.target_hook or self.crosscoder or self.checkpoints),
            "--prepare_neuronpedia is for SAEs of one activation: no transcoder (--target_hook), no crosscoder "
            "(--crosscoder, --checkpoints)",
        )
        checks = {"model_id": ids.check_model, "source_set": ids.check_source_set}
        for name, check in checks.items():
            value = getattr(self, name)
            if value is not None:
                require(self.prepare_neuronpedia, f"--{name} needs --prepare_neuronpedia, which is not given")
                check(value)

    def variants(self) -> Iterator["RunConfig"]:
        """Yield the run with every combination of its values: one value for each setting that takes several."""
        values = [getattr(self, name) or (None,) for name in SWEPT]
        for chosen in itertools.product(*values):
            one: dict[str, Any] = {name: () if v is None else (v,) for name, v in zip(SWEPT, chosen, strict=True)}
            yield self if all(getattr(self, n) == v for n, v in one.items()) else dataclasses.replace(self, **one)

    def variant_name(self, variant: "RunConfig") -> str:
        """Return the folder of a variant in the run: the values that differ, such as k32-seed1, or ""."""
        several = [name for name in SWEPT if len(getattr(self, name)) > 1]
        return "-".join(SWEPT[name] + _shortest(getattr(variant, name)[0]) for name in several)

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

    def check_sae(self) -> None:
        """Check the settings of a variant's SAE that do not depend on the width of the model.

        Raises:
          ConfigError: a setting that no model's SAE can have.
        """
        # k and what goes with it, and nested widths, are checked later, against the true width of the SAE.
        known = {"hierarchical_k": (), "nested_widths": self._default_widths(_WIDEST)}
        layers = 2 if self.exclusive_latents else 1
        self._sae_config(_WIDEST // layers, _WIDEST, layers, k=1, exclusive=min(self.exclusive_latents, 1), **known)

    def sae_config(self, width: int, layers: int = 1, start: "Description | None" = None) -> "SAEConfig":
        """Return the configuration of a variant's SAE for a model of this width.

        Args:
          width: of the model.
          layers: those of a crosscoder.
          start: the SAE that is continued, which has the settings that were not given.

        Raises:
          ConfigError: settings that no SAE of this size can have, or that contradict those of the SAE to continue.
        """
        if start is None:
            return self._sae_config(width, width * self.expansion_factor, layers)
        d_sae = start.d_sae
        require(
            self.expansion_factor in (None, d_sae / width),
            f"--expansion_factor={self.expansion_factor} of width {width} contradicts {start.path} of {d_sae} latents: "
            "leave it out",
        )
        require(
            "k" not in _settings(self.architecture) or bool(self.k) or start.k is not None,
            f"{start.path} does not say how many latents were active per token: give --k",
        )
        known: dict[str, Any] = {} if self.k or start.k is None else {"k": start.k}
        known |= {} if self.nested_widths or not start.nested_widths else {"nested_widths": start.nested_widths}
        return self._sae_config(width, d_sae, layers, **known)

    def _sae_config(self, width: int, d_sae: int, layers: int, **replaced: Any) -> "SAEConfig":
        settings: dict[str, Any] = {
            "k": self.k[0] if self.k else None,
            "hierarchical_k": self.hierarchical_k,
            "nested_widths": self.nested_widths or self._default_widths(d_sae),
            "l1_coefficient": self.l1_coefficient[0],
            "l0_coefficient": self.l0_coefficient[0],
            "jump_recipe": self.jump_recipe,
            "bandwidth": self.bandwidth,
            "target_l0": self.target_l0[0] if self.target_l0 else None,
        } | replaced
        own = {name: value for name, value in settings.items() if name in _settings(self.architecture)}
        own = {"exclusive": self.exclusive_latents} | own
        d_out = None if self.target_hook is None else width
        return self.architecture.Config(
            width * layers, d_sae, d_out=d_out, skip=self.skip, layers=layers, aligned=self.aligned, **own
        )

    @staticmethod
    def _default_widths(d_sae: int) -> tuple[int, ...]:
        return tuple(sorted({max(d_sae // part, 1) for part in (16, 8, 4, 2)} - {d_sae}))

    def train_config(self) -> TrainConfig:
        """Return the settings of a variant's training.

        Raises:
          ConfigError: settings that cannot work.
        """
        shared = {
            name: getattr(self, name)
            for name in (
                "num_activations",
                "batch_size",
                "warmup_fraction",
                "decay_fraction",
                "sparsity_warmup_fraction",
                "k_start",
                "k_anneal_fraction",
                "average_fraction",
                "matmul_dtype",
                "resample_every",
            )
        }
        return TrainConfig(
            **shared,
            learning_rate=self.learning_rate[0] if self.learning_rate else None,
            dead_after=self.dead_after,
            seed=self.seed[0],
        )


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdecimal() and len(word) <= 4


def _shortest(value: int | float) -> str:
    """Return the shortest text from which the number can be read back."""
    return short if float(short := f"{value:g}") == value else repr(value)
