"""The SAE to fine-tune: its hooks, model, text and training settings, from its metadata, its run and the flags."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from bridge.finetuning.config import FinetuneConfig
from bridge.hooks import parse
from bridge.run import directory
from bridge.run.model import ModelPath
from bridge.run.saes import exports_at
from bridge.selection import excluded_ids, recorded_ids
from bridge.settings import ExcludeTokens
from bridge.training.config import RunConfig
from jsae import pretrained
from jsae.config import TrainConfig
from jsae.pretrained import Pretrained
from jsae.saelens.repository import is_address
from jsae.settings import ConfigError, require

if TYPE_CHECKING:
    from bridge.nanochat import Nanochat

_DEAD_AFTER = 10_000_000  # of an SAE whose run is not known, as in Gao et al. 2024
_SILENT_WINDOWS = 64
"""Windows at least on which a dead latent did not fire. Tokens of a window are alike, so that a latent may be silent on
several windows; revival losses would turn it to something else."""
_RECORDED = (
    "l1_coefficient",
    "sparsity_penalty",
    "l0_coefficient",
    "jump_recipe",
    "bandwidth",
    "hierarchical_k",
    "nested_widths",
)
"""Settings of architectures that a run records and an export does not."""
_FORMER: Mapping[str, Any] = {"sparsity_penalty": "l1"}
"""Settings of runs that do not record them, because they are older than the setting."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """An SAE with all that its fine-tuning needs to know."""

    path: str
    """The export."""
    start: Pretrained
    hooks: tuple[str, ...]
    """The hook that it reads, and of a transcoder the one that it predicts."""
    recorded: Mapping[str, Any]
    """The flags of its run; {} if it belongs to none."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """SAELens's metadata."""
        metadata = self.start.plain.cfg.get("metadata")
        return metadata if isinstance(metadata, dict) else {}

    @property
    def training_tokens(self) -> int | None:
        """Activations that it was trained on, where its metadata says it."""
        number = self.metadata.get("training_tokens")
        return number if type(number) is int and 0 < number < 2**63 else None


def find(config: FinetuneConfig) -> Subject:
    """Return the SAE that a user chose.

    Raises:
      ConfigError: several SAEs and no choice, a crosscoder, or an SAE that does not name its hook.
      FileNotFoundError, ValueError, ImportError: it cannot be read.
    """
    path = _export(config)
    start = pretrained.read(path)
    require(
        start.description.layers == 1,
        f"{path} is {start.description.kind}: fine-tuning replaces one activation by its reconstruction, so give an "
        "SAE or a transcoder",
    )
    run = None if is_address(path) else directory.enclosing(Path(path))
    subject = Subject(path, start, (), {} if run is None else directory.read(run)["flags"])
    return dataclasses.replace(subject, hooks=_hooks(config, subject))


def resolved(config: FinetuneConfig, subject: Subject) -> FinetuneConfig:
    """Return the settings with model, text and architecture filled in from what the SAE's run recorded.

    Raises:
      ConfigError: no model or no text is recorded and none is given.
    """
    recorded, metadata = subject.recorded, subject.metadata
    model = ModelPath.resolve(vars(config), recorded)
    data = config.data
    if data is None:
        stored = recorded.get("activations") is not None
        data = None if stored else recorded.get("data")
        why = "was trained on a store of activations" if stored else "belongs to no run, which would record its text"
        require(data is not None, f"{subject.path} {why}: give text with --data")
    drop_sinks = config.drop_sinks
    if drop_sinks is None:
        known = metadata.get("drop_sinks")
        drop_sinks = known if isinstance(known, bool) else recorded.get("drop_sinks", True)
    return dataclasses.replace(
        config,
        sae=subject.path,
        hook=subject.hooks[0],
        checkpoint=model.checkpoint,
        step=model.step,
        tokenizer=model.tokenizer,
        data=data,
        context_size=config.context_size or recorded.get("context_size"),
        drop_sinks=drop_sinks,
        activation=_architecture(config, subject),
    )


def run_config(config: FinetuneConfig, subject: Subject, nano: Nanochat) -> RunConfig:
    """Return the settings of the training run that the fine-tuning is, for the model.

    The rate falls linearly from the first step, and neither it nor penalties warm up.

    Args:
      config: with all settings filled in.
      subject: the SAE.
      nano: its model.

    Raises:
      ConfigError: windows that the model does not take or that are longer than a batch, or settings of another
        architecture.
    """
    row_len = nano.row_length(config.context_size)
    require(
        config.batch_size >= row_len,
        f"--batch_size={config.batch_size} is less than one window of {row_len} tokens: give a multiple of {row_len}, "
        "or a smaller --context_size",
    )
    batch_size = config.batch_size // row_len * row_len
    layer, _ = parse(subject.hooks[0])
    kinds: list[Any] = [parse(hook)[1] for hook in subject.hooks]
    own = _own_settings(config, subject)
    return RunConfig(
        **{name: getattr(config, name) for name in ("step", "tokenizer", "context_size", "device")},
        **{name: getattr(config, name) for name in ("tokens_per_forward", "heldout_tokens", "log_every")},
        checkpoint=config.checkpoint,
        data=config.data,
        exclude_tokens=config.exclude_tokens or _excluded(subject, nano),
        drop_sinks=config.drop_sinks,
        dead_after=config.dead_after or max(_dead_after(subject.recorded), _SILENT_WINDOWS * row_len),
        layer=(str(layer),),
        hook_type=kinds[0],
        target_hook=kinds[1] if len(kinds) > 1 else None,
        skip=subject.start.description.skip,
        activation=config.activation,
        init_from=subject.path,
        num_activations=config.num_activations,
        batch_size=batch_size,
        block_size=max(batch_size, 65536),
        checkpoint_every=max(batch_size, 1_000_000),
        learning_rate=() if config.learning_rate is None else (config.learning_rate,),
        warmup_fraction=0.0,
        decay_fraction=1.0,
        data_seed=config.seed,
        compile_model="off",
        output_dir=config.out,
        **own,
    )


def _export(config: FinetuneConfig) -> str:
    """Return the path of the one export that is meant."""
    if is_address(config.sae):
        return config.sae
    folders = exports_at(Path(config.sae).absolute())
    if len(folders) == 1:
        return str(folders[0])
    names = ", ".join(folder.name for folder in folders[:12])
    require(config.hook is not None, f"{config.sae} has several SAEs: choose one with --hook, of {names}")
    chosen = [folder for folder in folders if folder.name == config.hook]
    require(bool(chosen), f"{config.sae} has no SAE of --hook={config.hook}: it has {names}")
    return str(chosen[0])


def _hooks(config: FinetuneConfig, subject: Subject) -> tuple[str, ...]:
    """Return the hook that an SAE reads, and a transcoder's target."""
    path, metadata = subject.path, subject.metadata
    recorded = metadata.get("hook_name")
    name = config.hook if recorded is None else recorded
    require(isinstance(name, str), f"{path} does not name the activation that it reads: give it with --hook")
    require(config.hook in (None, name), f"{path} is an SAE of {name!s:.80}, not of --hook={config.hook}")
    names = (name,)
    if subject.start.description.d_out is not None:
        target = metadata.get("hook_name_out")
        require(isinstance(target, str), f"{path} is a transcoder that does not name its target (hook_name_out)")
        names = (name, target)
    try:
        places = [parse(hook) for hook in names]
    except ValueError as error:
        raise ConfigError(f"{path}: {str(error)[:300]}") from None
    layers = {layer for layer, _ in places}
    require(len(layers) == 1, f"{path} predicts {names[-1]} from {names[0]}: both must be of one layer")
    require(len(set(places)) == len(places), f"{path} is a transcoder from {name} to itself")
    return names


def _architecture(config: FinetuneConfig, subject: Subject) -> str:
    """Return the architecture to train as: the given one, the recorded one, or the one called as the SAE's form.

    The name of a file is taken only if it is one of this package's: another would import a module.
    """
    description = subject.start.description
    if config.activation is not None:
        return config.activation
    able = description.architectures
    for name in (subject.recorded.get("activation"), subject.metadata.get("training_architecture"), description.form):
        if isinstance(name, str) and name in able:
            return name
    require(bool(able), f"{subject.path} is {description.kind}, which no architecture of this package can continue")
    return able[0]


def _own_settings(config: FinetuneConfig, subject: Subject) -> dict[str, Any]:
    """Return the settings that only some architectures have, as the SAE's run recorded them."""
    from jsae.architectures import find

    names = {field.name for field in dataclasses.fields(find(config.activation).Config)}
    own: dict[str, Any] = {} if "k" in names else {"sparsity_warmup_fraction": 0.0}
    if subject.recorded.get("activation") != config.activation:
        return own
    recorded = {**_FORMER, **subject.recorded}
    for name in _RECORDED:
        if name in names and recorded.get(name) is not None:
            value = recorded[name]
            own[name] = tuple(value) if isinstance(value, list) else value
    return own


def _excluded(subject: Subject, nano: Nanochat) -> ExcludeTokens:
    """Return the choice of special tokens that were left out when the SAE was trained."""
    try:
        ids = recorded_ids(subject.metadata, nano.tokenizer)
    except ValueError as error:
        raise ConfigError(f"{subject.path}: cfg.json: {error}") from None
    for choice in get_args(ExcludeTokens):
        if excluded_ids(choice, nano.tokenizer) == ids:
            return choice
    raise ConfigError(
        f"{subject.path} was trained without the tokens {', '.join(map(str, ids[:12]))}, which are not nanochat's "
        f"special tokens: give --exclude_tokens, one of {', '.join(get_args(ExcludeTokens))}"
    )


def _dead_after(recorded: Mapping[str, Any]) -> int:
    """Return after how many activations a latent was dead in the run of an SAE."""
    try:
        values = {name: recorded[name] for name in ("num_activations", "batch_size", "dead_after")}
        return TrainConfig(**values).dead_window
    except (KeyError, ConfigError, TypeError):
        return _DEAD_AFTER
