"""The SAEs of a run as Neuronpedia's sources: their files and their ids on the site."""

import dataclasses
from pathlib import Path

from bridge.neuronpedia import ids as names
from bridge.neuronpedia.about import CREATED_AT, About
from bridge.neuronpedia.ids import Ids
from bridge.run import Run
from jsae.records.store import Store, digest
from jsae.saelens import config as sae_config
from jsae.settings import require


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Names that a user gives to model, source set and release; None is a default with the hashes of model and SAEs."""

    model_id: str | None = None
    source_set: str | None = None
    release: str | None = None
    title: str | None = None
    creator: str = "jsae"
    url: str | None = None
    created_at: str = CREATED_AT
    hub_repo: str | None = None
    layers: int | None = None
    """Of the whole model; None asks its checkpoint."""

    def __post_init__(self) -> None:
        checks = (
            (self.model_id, names.check_model),
            (self.source_set, names.check_source_set),
            (self.release, names.check_release),
        )
        for name, check in checks:
            if name is not None:
                check(name)


@dataclasses.dataclass(frozen=True)
class Source:
    """One SAE of a run, with its records and its names."""

    sae_dir: Path
    records: Path
    ids: Ids
    about: About

    def store(self) -> Store:
        """Open its records.

        Raises:
          FileNotFoundError: none were gathered.
          StoreError: of another version or SAE, or broken.
        """
        return Store(self.records, digest(self.sae_dir), self.records.name)


def of_run(path: str | Path, wanted: Wanted, hook: str | None = None) -> list[Source]:
    """Return the exported SAEs of a run, or that of one hook, with names that Neuronpedia takes; read no records.

    Raises:
      FileNotFoundError: the run has no export, or none of the hook, or is a sweep; says what to run.
      ConfigError: a name that would be refused, or one for two SAEs.
    """
    run = Run(path)
    exports = run.exports
    if not exports:
        raise FileNotFoundError(
            f"{run.path} holds no exported SAE: `python -m experiments.train --output_dir={run.path}` writes one when "
            "it ends"
        )
    if hook is not None and hook not in exports:
        raise FileNotFoundError(f"{run.path} has no SAE of {hook}: there are {', '.join(exports)}")
    digests = [digest(folder) for folder in exports.values()]
    n_layer = _layers(run) if wanted.layers is None else wanted.layers
    chosen = [
        _source(run, name, folder, wanted, n_layer, digests) for name, folder in exports.items() if hook in (None, name)
    ]
    links = [source.ids.link for source in chosen]
    twice = next((link for link in links if links.count(link) > 1), None)
    require(
        twice is None, f"two SAEs of {run.path} would be {twice}: export one --hook after the other, under two sets"
    )
    return chosen


def _source(run: Run, hook: str, folder: Path, wanted: Wanted, n_layer: int, digests: list[str]) -> Source:
    settings = sae_config.read(folder)
    fingerprint, d_sae = settings.metadata.get("model_fingerprint"), settings.d_sae
    require(
        wanted.model_id is not None or isinstance(fingerprint, str),
        f"{folder} does not say which model it is of: give --model_id",
    )
    model = wanted.model_id or names.default_model(n_layer, str(fingerprint))
    description = names.describe(hook, d_sae)
    ids = Ids(
        model,
        wanted.source_set or names.default_source_set(hook, d_sae, digests),
        wanted.release or names.default_release(model, digests),
        hook,
    )
    require(ids.layer < n_layer, f"{folder} is of layer {ids.layer}, but the model has {n_layer} layers")
    about = About(
        n_layer,
        wanted.title or f"Sparse autoencoders of {model}",
        description,
        wanted.creator,
        wanted.url,
        wanted.created_at,
        wanted.hub_repo,
    )
    return Source(folder, run.store_folder(hook), ids, about)


def _layers(run: Run) -> int:
    """Return how many layers the model of a run has; its checkpoint knows."""
    flags = run.flags if run.config_file.is_file() else {}
    require(
        isinstance(flags.get("checkpoint"), str),
        f"{run.config_file} names no checkpoint: give --layers, those of the model",
    )
    try:
        return run.model_path().layers()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}. Without the checkpoint, give --layers, those of the model") from error
