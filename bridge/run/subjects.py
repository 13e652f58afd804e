"""Subjects of a command: the SAEs that a user chooses, the nanochat of each, and the tokens that count."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bridge.run import directory
from bridge.run.exports import within
from bridge.run.layout import Layout
from bridge.run.model import ModelPath
from bridge.settings import ExcludeTokens
from jsae.settings import require

if TYPE_CHECKING:
    from bridge.nanochat import Nanochat
    from bridge.torch_sae import TorchSAE


Encoder = Literal["own", "matching_pursuit"]


@dataclass(frozen=True)
class Choice:
    """The SAEs, model and text that a user chooses. A setting that is None is as the run recorded it."""

    paths: tuple[Path, ...]
    """Runs, exported SAEs, or folders of exported SAEs."""
    run: Path | None = None
    """The run whose model and text are read; None is the run that each path is or belongs to."""
    own_runs_first: bool = False
    """Whether the run that a path is or belongs to takes precedence over `run`."""
    hook: str | None = None
    """Only the SAE of this hook."""
    checkpoint: str | None = None
    step: int | None = None
    tokenizer: str | None = None
    data: str | None = None
    context_size: int | None = None
    exclude_tokens: ExcludeTokens | None = None
    drop_sinks: bool | None = None
    device: str = "cpu"
    encoder: Encoder = "own"
    """How SAEs encode (`bridge.torch_sae.TorchSAE.with_encoder`)."""
    encoder_k: int | None = None
    """Latents per token of the encoder; None is the SAE's own k."""
    transcoders: bool = False
    """True if transcoders are allowed beside SAEs, by the hook of their input."""


@dataclass(frozen=True)
class Reading:
    """Model and text of one path, and whether tokens of extreme norm are left out."""

    model: ModelPath
    data: str
    context_size: int | None
    """Tokens per row of text; None is the model's own length."""
    drop_sinks: bool


@dataclass(frozen=True)
class Subject:
    """One SAE with its model."""

    path: Path
    """The run or export that was chosen."""
    hook: str
    sae: TorchSAE
    nano: Nanochat
    excluded: tuple[int, ...]
    """Ids of tokens that are left out."""
    drop_sinks: bool
    """Whether tokens of extreme norm are left out."""


def find(choice: Choice) -> list[Subject]:
    """Load the chosen SAEs and the models they were trained on, each model once.

    Raises:
      ConfigError, ValueError: an SAE for another width, layer or model; says what there is.
      FileNotFoundError: no such run, export or checkpoint.
    """
    from bridge import compatibility

    models: dict[ModelPath, Nanochat] = {}
    subjects = []
    for path in choice.paths:
        inputs = reading(choice, path)
        saes = _saes(choice, path)
        if inputs.model not in models:
            models[inputs.model] = inputs.model.load(choice.device)
        nano = models[inputs.model]
        fingerprint = compatibility.known_fingerprint(nano, saes)
        compatibility.check(nano.model, saes, fingerprint, transcoders=choice.transcoders)
        for hook, sae in saes.items():
            excluded, drop_sinks = _excluded(choice, path, sae, nano), _drop_sinks(choice, sae, inputs)
            encoding = _with_encoder(choice, path, sae)
            subjects.append(Subject(path, hook, encoding, nano, excluded, drop_sinks))
    return subjects


def _with_encoder(choice: Choice, path: Path, sae: TorchSAE) -> TorchSAE:
    """Return an SAE with the chosen encoder.

    Raises:
      ValueError: it cannot have it.
    """
    if choice.encoder == "own" and choice.encoder_k is None:
        return sae
    try:
        return sae.with_encoder(choice.encoder, choice.encoder_k)
    except ValueError as error:
        raise ValueError(f"{path} with --encoder={choice.encoder}: {error} (--encoder_k)") from error


def reading(choice: Choice, path: Path) -> Reading:
    """Return model and text of a path: as the user chose, else as the run recorded.

    Raises:
      ConfigError: neither names a model.
    """
    recorded = _recorded(choice, path)
    data = recorded.get("data", "stdlib") if choice.data is None else choice.data
    context_size = recorded.get("context_size") if choice.context_size is None else choice.context_size
    drop_sinks = recorded.get("drop_sinks", True) if choice.drop_sinks is None else choice.drop_sinks
    return Reading(ModelPath.resolve(vars(choice), recorded), data, context_size, drop_sinks)


def _recorded(choice: Choice, path: Path) -> dict[str, Any]:
    """Return the flags of the run that a path is read with; {} if there is none and a checkpoint is given."""
    run = next(_runs(choice, path), None)
    if run is not None:
        return directory.read(run)["flags"]
    first = path if choice.own_runs_first or choice.run is None else choice.run
    require(
        choice.checkpoint is not None,
        f"{first} is not a run and not in one (a run has a config.json): give the nanochat with --checkpoint, or a "
        "run on the same nanochat with --run_dir",
    )
    return {}


def _runs(choice: Choice, path: Path) -> Iterator[Path]:
    """Yield the runs that a path may be read with, in order of precedence."""
    if (choice.own_runs_first or choice.run is None) and (run := directory.enclosing(path)) is not None:
        yield run
    if choice.run is not None and Layout(choice.run).config_file.is_file():
        yield choice.run


def _excluded(choice: Choice, path: Path, sae: TorchSAE, nano: Nanochat) -> tuple[int, ...]:
    """Return the ids of tokens to leave out: as the user chose, else as in training."""
    from bridge.selection import excluded_ids, recorded_ids

    if choice.exclude_tokens is not None:
        return excluded_ids(choice.exclude_tokens, nano.tokenizer)
    try:
        return recorded_ids(sae.metadata, nano.tokenizer)
    except ValueError as error:
        raise ValueError(f"{path}: cfg.json: {error}") from error


def _drop_sinks(choice: Choice, sae: TorchSAE, inputs: Reading) -> bool:
    """Return whether sinks are left out: as the user chose, else as the export's metadata or the run's flags say."""
    recorded = sae.metadata.get("drop_sinks") if isinstance(sae.metadata, dict) else None
    return recorded if choice.drop_sinks is None and isinstance(recorded, bool) else inputs.drop_sinks


def _saes(choice: Choice, path: Path) -> dict[str, TorchSAE]:
    """Return the SAEs of a path by hook; `choice.hook` selects one, or names the hook of a lone export."""
    from bridge import torch_sae
    from bridge.run.saes import is_export, load_saes

    if choice.hook is not None and is_export(path):
        sae = torch_sae.load(path, choice.device)
        recorded = (isinstance(sae.metadata, dict) and sae.metadata.get("hook_name")) or choice.hook
        require(recorded == choice.hook, f"{path} is an SAE of {recorded}, not of --hook={choice.hook}")
        saes = {choice.hook: sae}
    else:
        saes = load_saes(path, choice.device, transcoders=choice.transcoders)
    if choice.hook is not None:
        require(choice.hook in saes, f"{path} has no SAE of {choice.hook}: there are {', '.join(saes)}")
        saes = {choice.hook: saes[choice.hook]}
    if choice.run is not None and not choice.own_runs_first and path != choice.run:
        hooks = [export.name for export in within(Layout(choice.run).saes_folder)]
        for hook in saes:
            require(
                not hooks or hook in hooks,
                f"{path} is an SAE of {hook}; those of {choice.run} are of {', '.join(hooks)}",
            )
    return saes
