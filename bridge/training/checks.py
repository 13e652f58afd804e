"""Checks of settings of a training run against each other, before anything is loaded."""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

from bridge import accelerators
from bridge.stages import names
from bridge.training.settings import RunSettings, settings_of
from jsae.settings import require

SWEPT: Mapping[str, str] = {
    "k": "k",
    "l1_coefficient": "l1_",
    "l0_coefficient": "l0c",
    "target_l0": "l0_",
    "learning_rate": "lr",
    "seed": "seed",
}
"""Settings that take several values, and their abbreviations in the names of variants."""

UNSET: Mapping[str, Any] = {"k": (32,), "expansion_factor": 8}
"""What settings become that are not given, unless the SAE that a run continues has them."""

_OF_TEXT = ("context_size", "tokens_per_forward", "compile_model", "exclude_tokens", "drop_sinks")
"""Settings of reading text through a model."""
_WITH_K = ("k_start", "k_anneal_fraction")
_WITHOUT_K = ("sparsity_warmup_fraction",)
_OWN = (
    "k",
    "hierarchical_k",
    "nested_widths",
    "l1_coefficient",
    "sparsity_penalty",
    "l0_coefficient",
    "jump_recipe",
    "bandwidth",
    "target_l0",
)
"""Settings of some architectures. The two tuples above are settings of training, with and without a k."""

MOST_VARIANTS = 1000


def check(config: RunSettings) -> None:
    """Check that the settings of a run fit together.

    Raises:
      ConfigError: names the settings, what was given and what is allowed.
    """
    accelerators.check_name(config.device)
    require(config.checkpoint_every >= config.batch_size, "checkpoint_every must be at least one batch")
    window = min(config.log_every * config.batch_size, config.checkpoint_every, config.num_activations)
    require(window < 2**31, f"log_every={config.log_every} steps are {window} activations: report at least every 2**31")
    require(config.block_size >= config.batch_size, "block_size must be at least one batch")
    require(
        config.data_shards is None or config.batch_size % config.data_shards == 0,
        f"a batch of --batch_size={config.batch_size} tokens cannot be divided into --data_shards={config.data_shards} "
        "equal parts: give a multiple",
    )
    require(
        config.jax_memory_fraction is None or 0 < config.jax_memory_fraction < 0.95,
        f"jax_memory_fraction is {config.jax_memory_fraction}: it must lie between 0 and 0.95",
    )
    for layer in config.layer:
        require(layer == "all" or _is_number(layer), f"layer {layer!r} is neither a number from 0 nor 'all'")
    given = f"--layer={','.join(config.layer)}"
    require("all" not in config.layer or len(config.layer) == 1, f"{given} names layers beside all of them")
    require(len(set(config.layers(0))) == len(config.layers(0)), f"{given} names a layer twice")
    require(
        not (config.find_lr and config.learning_rate),
        f"--find_lr chooses the learning rate, and --learning_rate={','.join(map(str, config.learning_rate))} gives "
        "it: leave out one of them",
    )
    _check_kind(config)
    _check_swept(config)
    _check_stored(config)
    check_used(config)
    _check_neuronpedia(config)


def _check_kind(config: RunSettings) -> None:
    """Check the settings of transcoders and crosscoders."""
    require(not config.aligned or config.target_hook is None, "--aligned is for autoencoders: leave out --target_hook")
    require(not config.skip or config.target_hook is not None, "--skip is for a transcoder: give --target_hook")
    require(
        config.target_hook != config.hook_type,
        f"--target_hook={config.target_hook} equals --hook_type: a transcoder needs two different activations",
    )
    if config.crosscoder:
        require(config.target_hook is None, "--crosscoder reconstructs its input: leave out --target_hook")
        require(
            len(config.layer) > 1 or config.layer == ("all",),
            "--crosscoder reads several layers: give them with --layer=1,2,3 or --layer=all",
        )
    _check_stages(config)


def _check_stages(config: RunSettings) -> None:
    """Check the settings of crosscoders over checkpoints, and of exclusive latents."""
    require(
        not config.exclusive_latents or config.crosscoder or bool(config.checkpoints),
        "--exclusive_latents are of a crosscoder: give --checkpoints, or --crosscoder and several layers",
    )
    require(
        not config.exclusive_latents or config.init_from is None,
        "--exclusive_latents begin with weights that are 0, and --init_from with those of an SAE: leave out one",
    )
    if not config.checkpoints:
        require(config.models_in_memory == "all", "--models_in_memory is for --checkpoints: leave it out")
        return
    names.parse(config.checkpoints)
    for name, reason in {
        "crosscoder": "--checkpoints makes a crosscoder of each of --layer",
        "target_hook": "a crosscoder reconstructs its input",
        "activations": "a store has the activations of one model",
    }.items():
        require(not getattr(config, name), f"{reason}: leave out --{name}")
    for name in ("checkpoint", "step"):
        default = type(config).__dataclass_fields__[name].default
        require(getattr(config, name) == default, f"--checkpoints names the models: leave out --{name}")


def _check_stored(config: RunSettings) -> None:
    """Check that settings of model and text have their defaults where a store is read."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name in _OF_TEXT:
        require(
            config.activations is None or getattr(config, name) == defaults[name],
            f"--{name} means nothing with --activations, whose store was written with its own: leave it out",
        )


def _check_swept(config: RunSettings) -> None:
    """Check that no SAE would be trained twice, and that there are not too many."""
    for name in SWEPT:
        values = getattr(config, name)
        require(len(set(values)) == len(values), f"--{name}={','.join(map(str, values))} has a value twice")
        require(bool(values) or name in ("k", "learning_rate", "target_l0"), f"--{name} needs at least one value")
    count = math.prod(max(len(getattr(config, name)), 1) for name in SWEPT)
    require(count <= MOST_VARIANTS, f"these flags ask for {count} variants: at most {MOST_VARIANTS} train together")


def check_used(config: RunSettings, given: Collection[str] = ()) -> None:
    """Check that settings which the architecture does not have are not given, and have their defaults."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    if config.init_from is None:
        defaults |= UNSET
    own = settings_of(config.architecture)
    used = {*own, *(_WITH_K if "k" in own else _WITHOUT_K)}
    names = ", ".join(f"--{name}" for name in (*_OWN, *_WITH_K, *_WITHOUT_K) if name in used) or "no flags"
    for name in (*_OWN, *_WITH_K, *_WITHOUT_K):
        require(
            name in used or (name not in given and getattr(config, name) == defaults[name]),
            f"--{name} means nothing to {config.activation}: leave it out. {config.activation} has {names}",
        )
    require(
        config.k_start is not None or config.k_anneal_fraction == defaults["k_anneal_fraction"],
        "--k_anneal_fraction needs --k_start, which is not given: over it, k is lowered from k_start",
    )


def _check_neuronpedia(config: RunSettings) -> None:
    """Check the names that Neuronpedia would refuse after the training."""
    from bridge.neuronpedia import ids

    require(
        not config.prepare_neuronpedia or not (config.target_hook or config.crosscoder or config.checkpoints),
        "--prepare_neuronpedia is for SAEs of one activation: no transcoder (--target_hook), no crosscoder "
        "(--crosscoder, --checkpoints)",
    )
    checks = {"model_id": ids.check_model, "source_set": ids.check_source_set}
    for name, check in checks.items():
        value = getattr(config, name)
        if value is not None:
            require(config.prepare_neuronpedia, f"--{name} needs --prepare_neuronpedia, which is not given")
            check(value)


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdecimal() and len(word) <= 4
