"""What is measured: the SAEs that flags mean, the nanochat each reads, the text."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge.run import directory as rundir
from jsae.settings import require

if TYPE_CHECKING:
    from bridge.evaluate.text import Text
    from bridge.nanochat import Nanochat
    from bridge.torch_sae import TorchSAE
    from experiments.evaluate import EvaluateConfig


@dataclasses.dataclass(frozen=True)
class Subject:
    """One SAE to measure."""

    place: Path
    """The run or the export that was named."""
    hook: str
    sae: TorchSAE
    nano: Nanochat
    excluded: tuple[int, ...]
    drop_sinks: bool


def find(config: EvaluateConfig) -> list[Subject]:
    """The SAEs of the flags with their models, which are what the SAEs were trained on.

    Raises:
      ConfigError, ValueError: an SAE for another width, layer or model; says what there is.
      FileNotFoundError: no such run, export or checkpoint.
    """
    import bridge.nanochat
    from bridge import finite
    from bridge.runtime import InterpretableModel

    models: dict[tuple[Any, ...], Nanochat] = {}
    subjects = []
    for place in places(config):
        flags = told(config, place)
        saes = _saes(config, place)
        key = tuple(flags[name] for name in ("checkpoint", "step", "tokenizer"))
        if key not in models:
            checkpoint, step, tokenizer = key
            models[key] = bridge.nanochat.load(checkpoint, step, config.device, tokenizer=tokenizer)
            finite.warn_of_broken_weights(models[key].model)
        nano = models[key]
        require(nano.tokenizer is not None, f"no tokenizer lies beside {key[0]}: give its directory with --tokenizer")
        InterpretableModel.from_nanochat(nano, saes)  # refuses what does not fit
        subjects += [
            Subject(place, hook, sae, nano, _excluded(config, place, sae, nano), _drop_sinks(config, sae, flags))
            for hook, sae in saes.items()
        ]
    return subjects


def _excluded(config: EvaluateConfig, place: Path, sae: TorchSAE, nano: Nanochat) -> tuple[int, ...]:
    """The ids that are left out: those of --exclude_tokens, or those that were left out in training."""
    from bridge.selection import excluded_ids, recorded_ids

    if config.exclude_tokens is not None:
        return excluded_ids(config.exclude_tokens, nano.tokenizer)
    try:
        return recorded_ids(sae.metadata, nano.tokenizer)
    except ValueError as error:
        raise ValueError(f"{place}: cfg.json: {error}") from error


def _drop_sinks(config: EvaluateConfig, sae: TorchSAE, flags: dict[str, Any]) -> bool:
    """Whether sinks are left out: as a flag says, as the export's metadata says, or as the run's flags do."""
    recorded = sae.metadata.get("drop_sinks") if isinstance(sae.metadata, dict) else None
    return recorded if config.drop_sinks is None and isinstance(recorded, bool) else flags["drop_sinks"]


def places(config: EvaluateConfig) -> list[Path]:
    """The runs and exports that are measured."""
    return [Path(place) for place in config.compare or (config.sae or config.run_dir,)]


def told(config: EvaluateConfig, place: Path) -> dict[str, Any]:
    """What the flags say of model and text, and where they say nothing, what the run's said.

    Raises:
      ConfigError: nothing says which model.
    """
    recorded = _recorded(config, place)
    if config.checkpoint is not None:  # then the run's step and tokenizer are of another one
        recorded = recorded | {"step": None, "tokenizer": None}
    names = ("checkpoint", "step", "tokenizer", "data", "context_size", "drop_sinks")
    wanted = {name: getattr(config, name) for name in names}
    return {name: recorded.get(name, _DEFAULTS.get(name)) if v is None else v for name, v in wanted.items()}


def _recorded(config: EvaluateConfig, place: Path) -> dict[str, Any]:
    """The flags of `--run_dir`; of what is compared, or without it, first those of the run at or around the place."""
    given = [Path(config.run_dir)] if config.run_dir else []
    around = [place, *place.resolve().parents[:2]] if config.compare or not given else []
    for run in (*around, *given):
        if (run / "config.json").is_file():
            return rundir.read(run)["flags"]
    require(
        config.checkpoint is not None,
        f"{(*around, *given)[0]} is no run and lies in none (a run has a config.json): say with --checkpoint which "
        "nanochat is read, or with --run_dir a run on the same one",
    )
    return {}


_DEFAULTS = {"data": "stdlib", "drop_sinks": True}


def text_for(config: EvaluateConfig, nano: Nanochat) -> Text:
    """The text of the first place, in the tokens of a model: the same for everything that is compared.

    Raises:
      ConfigError: rows longer than the model takes.
      ValueError: not enough text for one row.
    """
    from bridge.evaluate import text

    flags = told(config, places(config)[0])
    row_len = flags["context_size"] or nano.config.sequence_len
    longest = nano.config.max_positions
    require(2 <= row_len <= longest, f"context_size is {row_len}: this model takes 2 to {longest} tokens")
    documents = text.documents(flags["data"], config.split, nano.tokenizer)
    return text.read(documents, nano.tokenizer, row_len, config.heldout_tokens)


def _saes(config: EvaluateConfig, place: Path) -> dict[str, TorchSAE]:
    """The SAEs of a place by hook; `--hook` chooses one, or says what a lone export does not."""
    from bridge import torch_sae
    from bridge.run.exports import within
    from bridge.runtime import load_saes

    if config.hook is not None and (place / "cfg.json").is_file():
        sae = torch_sae.load(place, config.device)
        recorded = (isinstance(sae.metadata, dict) and sae.metadata.get("hook_name")) or config.hook
        require(recorded == config.hook, f"{place} is an SAE of {recorded}, not of --hook={config.hook}")
        saes = {config.hook: sae}
    else:
        saes = load_saes(place, config.device)
    if config.hook is not None:
        require(config.hook in saes, f"{place} has no SAE of {config.hook}: there are {', '.join(saes)}")
        saes = {config.hook: saes[config.hook]}
    if config.sae is not None and config.run_dir is not None:
        run = [export.name for export in within(Path(config.run_dir) / "sae")]
        for hook in saes:
            require(
                not run or hook in run,
                f"{place} is an SAE of {hook}; those of {config.run_dir} are of {', '.join(run)}",
            )
    return saes
