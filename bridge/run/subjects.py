"""What a command reads: the SAEs that a user chooses, the nanochat each belongs to, the tokens that count."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge.run import directory
from bridge.run.exports import within
from bridge.run.layout import Layout
from bridge.run.model import ModelPath
from bridge.settings import ExcludeTokens
from jsae.settings import require

if TYPE_CHECKING:
    from bridge.nanochat import Nanochat
    from bridge.torch_sae import TorchSAE


@dataclass(frozen=True)
class Choice:
    """Which SAEs are read, on which model and text. What is None is as the run recorded it."""

    places: tuple[Path, ...]
    """Runs, exported SAEs, or folders of exported SAEs."""
    run: Path | None = None
    """The run whose model and text are read; None is the one at or around each place."""
    own_runs_first: bool = False
    """Whether the run at or around a place comes before `run`."""
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


@dataclass(frozen=True)
class Reading:
    """What is read at one place: the model, the text, and whether tokens of extreme norm are left out."""

    model: ModelPath
    data: str
    context_size: int | None
    """Tokens per row of text; None is the model's own length."""
    drop_sinks: bool


@dataclass(frozen=True)
class Subject:
    """One SAE with its model."""

    place: Path
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
    for place in choice.places:
        wanted = reading(choice, place)
        saes = _saes(choice, place)
        if wanted.model not in models:
            models[wanted.model] = wanted.model.load(choice.device)
        nano = models[wanted.model]
        compatibility.check(nano.model, saes, compatibility.known_fingerprint(nano, saes))
        for hook, sae in saes.items():
            excluded, drop_sinks = _excluded(choice, place, sae, nano), _drop_sinks(choice, sae, wanted)
            subjects.append(Subject(place, hook, sae, nano, excluded, drop_sinks))
    return subjects


def reading(choice: Choice, place: Path) -> Reading:
    """Return what is read at a place: what the user chose, and where that says nothing, what the run recorded.

    Raises:
      ConfigError: nothing says which model.
    """
    recorded = _recorded(choice, place)
    data = recorded.get("data", "stdlib") if choice.data is None else choice.data
    context_size = recorded.get("context_size") if choice.context_size is None else choice.context_size
    drop_sinks = recorded.get("drop_sinks", True) if choice.drop_sinks is None else choice.drop_sinks
    return Reading(ModelPath.of(vars(choice), recorded), data, context_size, drop_sinks)


def _recorded(choice: Choice, place: Path) -> dict[str, Any]:
    """Return the flags of the run that says what is read at a place; {} if there is none and a checkpoint is given."""
    run = next(_runs(choice, place), None)
    if run is not None:
        return directory.read(run)["flags"]
    first = place if choice.own_runs_first or choice.run is None else choice.run
    require(
        choice.checkpoint is not None,
        f"{first} is not a run and lies in none (a run has a config.json): say with --checkpoint which "
        "nanochat is read, or with --run_dir a run on the same one",
    )
    return {}


def _runs(choice: Choice, place: Path) -> Iterator[Path]:
    """Yield the runs that may say what is read at a place, the first choice first."""
    if (choice.own_runs_first or choice.run is None) and (run := directory.around(place)) is not None:
        yield run
    if choice.run is not None and Layout(choice.run).config_file.is_file():
        yield choice.run


def _excluded(choice: Choice, place: Path, sae: TorchSAE, nano: Nanochat) -> tuple[int, ...]:
    """Return the ids that are left out: those that the user chose, or those that were left out in training."""
    from bridge.selection import excluded_ids, recorded_ids

    if choice.exclude_tokens is not None:
        return excluded_ids(choice.exclude_tokens, nano.tokenizer)
    try:
        return recorded_ids(sae.metadata, nano.tokenizer)
    except ValueError as error:
        raise ValueError(f"{place}: cfg.json: {error}") from error


def _drop_sinks(choice: Choice, sae: TorchSAE, wanted: Reading) -> bool:
    """Return whether sinks are left out: as the user chose, as the export's metadata says, or as the run's flags do."""
    recorded = sae.metadata.get("drop_sinks") if isinstance(sae.metadata, dict) else None
    return recorded if choice.drop_sinks is None and isinstance(recorded, bool) else wanted.drop_sinks


def _saes(choice: Choice, place: Path) -> dict[str, TorchSAE]:
    """Return the SAEs of a place by hook; `choice.hook` takes one, or says what a lone export does not."""
    from bridge import torch_sae
    from bridge.run.saes import is_export, load_saes

    if choice.hook is not None and is_export(place):
        sae = torch_sae.load(place, choice.device)
        recorded = (isinstance(sae.metadata, dict) and sae.metadata.get("hook_name")) or choice.hook
        require(recorded == choice.hook, f"{place} is an SAE of {recorded}, not of --hook={choice.hook}")
        saes = {choice.hook: sae}
    else:
        saes = load_saes(place, choice.device)
    if choice.hook is not None:
        require(choice.hook in saes, f"{place} has no SAE of {choice.hook}: there are {', '.join(saes)}")
        saes = {choice.hook: saes[choice.hook]}
    if choice.run is not None and not choice.own_runs_first and place != choice.run:
        hooks = [export.name for export in within(Layout(choice.run).saes_folder)]
        for hook in saes:
            require(
                not hooks or hook in hooks,
                f"{place} is an SAE of {hook}; those of {choice.run} are of {', '.join(hooks)}",
            )
    return saes
