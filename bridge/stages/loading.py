"""Load several checkpoints of one nanochat that read the same text, each checked before any weights are read."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge.nanochat import hub, json_file, locate
from bridge.nanochat.contents import DataChangedError, Signature, signature_of
from bridge.nanochat.tokenizer import Tokenizer
from bridge.nanochat.tokenizer import load as load_tokenizer
from bridge.settings import InMemory
from bridge.stages.names import Stage
from jsae.settings import ConfigError, require

if TYPE_CHECKING:
    from bridge.nanochat import Nanochat
    from bridge.nanochat.model import GPT

_STRANGE = 0.02
"""Cosine of the blocks' matrices below which two checkpoints seem to be of different trainings."""
_ALIKE = {"n_embd": "width", "n_layer": "number of layers", "vocab_size": "size of the vocabulary"}


def load(
    stages: Sequence[Stage], device: str = "cpu", tokenizer: str | None = None, in_memory: InMemory = "all"
) -> list[Nanochat]:
    """Load the checkpoints of a comparison, in their order; all have the same tokenizer.

    Files, sizes in the meta files and tokenizers are compared before weights are read; what the weights say of sizes,
    and whether two files are copies, is compared afterwards.

    Args:
      stages: the checkpoints.
      device: of all models.
      tokenizer: directory of the tokenizer; None takes the one in, beside or above the checkpoints.
      in_memory: with "one" all share one model, which `models` fills with the weights of each in turn.

    Raises:
      ConfigError: a checkpoint or step that does not exist, a checkpoint that is given twice, checkpoints of different
        widths, depths or vocabularies, tokenizers that differ, or none; models that cannot share their memory.
      ValueError: a file that is broken or no nanochat.
    """
    import bridge.nanochat

    found = [_files(stage) for stage in stages]
    _refuse_twice(stages, [files.weights.resolve() for files in found])
    _require_alike(stages, [_sizes(files) for files in found])
    shared = _tokenizer(stages, found, tokenizer)
    nanos: list[Nanochat] = []
    for stage in stages:
        nano = bridge.nanochat.load(stage.path, stage.step, device, tokenizer=shared)
        if nanos:
            _warn_of_strangers(stages[0], nanos[0], stage, nano)
        if nanos and in_memory == "one":
            _require_shareable(stages[0], nanos[0], stage, nano)
            nano = dataclasses.replace(nano, model=nanos[0].model)
        nanos.append(nano)
    _require_alike(stages, [dataclasses.asdict(nano.config) for nano in nanos])
    _refuse_twice(stages, [nano.fingerprint for nano in nanos])
    return nanos


def models(nanos: Sequence[Nanochat]) -> Collection[GPT]:
    """Return the models of checkpoints that `load` returned, to be iterated any number of times.

    Those that share their memory are read from their files again whenever they are iterated: each is of use until the
    next one is asked for.
    """
    if len({id(nano.model) for nano in nanos}) == len(nanos):
        return tuple(nano.model for nano in nanos)
    return _InTurn(nanos)


class _InTurn:
    """Models of several checkpoints that share the memory of one."""

    def __init__(self, nanos: Sequence[Nanochat]):
        self._nanos = tuple(nanos)
        self._files = [_signatures(nano) for nano in nanos]

    def __len__(self) -> int:
        return len(self._nanos)

    def __contains__(self, model: object) -> bool:
        return any(model is nano.model for nano in self._nanos)

    def __iter__(self) -> Iterator[GPT]:
        for number in range(len(self._nanos)):
            self._fill(number)
            yield self._nanos[number].model

    def _fill(self, number: int) -> None:
        """Read the weights of a checkpoint into the shared model.

        Raises:
          DataChangedError: its files have changed since they were loaded.
        """
        import bridge.nanochat

        nano = self._nanos[number]
        if _signatures(nano) != self._files[number]:
            raise DataChangedError(nano.path, "has changed")
        device = next(nano.model.parameters()).device
        read = bridge.nanochat.load(nano.path, device=device, tokenizer=nano.tokenizer)
        nano.model.load_state_dict(read.model.state_dict())


def _warn_of_strangers(first_stage: Stage, first: Nanochat, stage: Stage, nano: Nanochat) -> None:
    """Warn of a checkpoint whose matrices are as different from the first's as those of another training."""
    matrices = [dict(one.model.named_parameters()) for one in (first, nano)]
    names = [name for name, weight in matrices[0].items() if ".h." in name and weight.ndim == 2]
    pairs = [(matrices[0][name], matrices[1].get(name)) for name in names]
    alike = [(a.float(), b.float()) for a, b in pairs if b is not None and a.shape == b.shape]
    product = sum(float((a * b).sum()) for a, b in alike)
    squares = [sum(float(pair[i].square().sum()) for pair in alike) for i in range(2)]
    cosine = product / math.sqrt(squares[0] * squares[1]) if min(squares) > 0 else 1.0
    if cosine < _STRANGE:
        print(
            f"note: {first_stage.name} and {stage.name} are as different as two trainings from other seeds (cosine of "
            f"their matrices {cosine:.3f}): is the one the successor of the other?",
            file=sys.stderr,
            flush=True,
        )


def _signatures(nano: Nanochat) -> list[Signature]:
    return [signature_of(file.stat()) for file in nano.files]


def _require_shareable(first_stage: Stage, first: Nanochat, stage: Stage, nano: Nanochat) -> None:
    """Raise ConfigError for models that are not alike in everything but their weights."""
    sizes, others = dataclasses.asdict(first.config), dataclasses.asdict(nano.config)
    differing = [f"{name} {sizes[name]} and {others[name]}" for name in sizes if sizes[name] != others[name]]
    require(
        not differing,
        f"--models_in_memory=one: {first_stage.name} and {stage.name} differ in {', '.join(differing)}: they cannot "
        "share one model, take --models_in_memory=all",
    )


def facts(stages: Sequence[Stage], nanos: Sequence[Nanochat]) -> list[dict[str, Any]]:
    """Return what a run records of its checkpoints, JSON objects; `of_record` reads them."""
    return [
        {"name": stage.name, "path": stage.path, "step": stage.step, "fingerprint": nano.fingerprint}
        for stage, nano in zip(stages, nanos, strict=True)
    ]


def of_record(record: Any) -> list[Stage]:
    """Return the checkpoints of a record, of an export's metadata or a run.

    Raises:
      ConfigError: it is no such record.
    """
    entries = record if isinstance(record, list) else []
    wanted: Mapping[str, Any] = {"name": str, "path": str, "step": int | None, "fingerprint": str}
    for entry in entries or [None]:
        require(
            isinstance(entry, dict) and all(isinstance(entry.get(name), kind) for name, kind in wanted.items()),
            "the crosscoder does not name the checkpoints that it reads: it reads layers of one model, or is broken",
        )
    return [Stage(entry["name"], entry["path"], entry["step"]) for entry in entries]


def check_recorded(record: Sequence[Mapping[str, Any]], nanos: Sequence[Nanochat]) -> None:
    """Check that checkpoints are those of a record.

    Raises:
      ConfigError: a file has changed since.
    """
    for entry, nano in zip(record, nanos, strict=True):
        require(
            entry["fingerprint"] == nano.fingerprint,
            f"checkpoint {entry['name']} at {nano.path} has other weights than the crosscoder was trained on",
        )


def _files(stage: Stage) -> locate.Files:
    """Return the files of a checkpoint."""
    try:
        if hub.is_address(stage.path):
            return hub.find(stage.path, stage.step)
        return locate.find(stage.path, stage.step)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"--checkpoints: {stage.name}: {error}") from error


def _refuse_twice(stages: Sequence[Stage], identities: Sequence[object]) -> None:
    """Raise ConfigError where two checkpoints have the same file or the same content."""
    first: dict[object, Stage] = {}
    for stage, identity in zip(stages, identities, strict=True):
        other = first.setdefault(identity, stage)
        require(
            other is stage,
            f"--checkpoints: {other.name} ({other.location}) and {stage.name} ({stage.location}) are the same "
            f"checkpoint{'' if isinstance(identity, Path) else ', copies of one file'}: leave out one of them",
        )


def _sizes(files: locate.Files) -> Mapping[str, Any]:
    """Return the sizes in a meta file; {} where there is none."""
    if files.meta is None:
        return {}
    sizes = json_file.read_table(files.meta, "meta file", "repair it, or move it away").get("model_config")
    return sizes if isinstance(sizes, dict) else {}


def _require_alike(stages: Sequence[Stage], sizes: Sequence[Mapping[str, Any]]) -> None:
    """Raise ConfigError where two checkpoints differ in a size that both have."""
    for name, called in _ALIKE.items():
        known = [(stage, size[name]) for stage, size in zip(stages, sizes, strict=True) if name in size]
        for stage, size in known:
            first, expected = known[0]
            require(
                size == expected,
                f"--checkpoints: the {called} of {first.name} is {expected}, that of {stage.name} {size}: give "
                "checkpoints of one model",
            )


def _tokenizer(stages: Sequence[Stage], found: Sequence[locate.Files], given: str | None) -> Tokenizer:
    """Return the tokenizer of all checkpoints; one without a tokenizer of its own has that of the others."""
    if given is not None:
        return load_tokenizer(given)
    folders = {files.tokenizer.resolve(): stage for stage, files in zip(stages, found, strict=True) if files.tokenizer}
    require(
        bool(folders), f"there is no tokenizer beside or above {found[0].weights}: give its directory with --tokenizer"
    )
    loaded = [(stage, folder, load_tokenizer(folder)) for folder, stage in folders.items()]
    first_stage, first_folder, first = loaded[0]
    for stage, folder, other in loaded[1:]:
        require(
            other.fingerprint == first.fingerprint,
            f"--checkpoints: {stage.name} has another tokenizer ({folder}) than {first_stage.name} ({first_folder}): "
            "the same text would be other tokens",
        )
    return first
