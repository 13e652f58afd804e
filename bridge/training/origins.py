"""Sources of a run's activations, text through a nanochat or a store, and the measuring of SAEs on held-out parts."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from bridge import torch_sae
from bridge.evaluate import Site
from bridge.evaluate.survey import survey, survey_of_rows
from bridge.hooks import module_name
from bridge.nanochat.corpus import shards_of_process
from bridge.run import Run
from bridge.selection import excluded_ids, sink_rule
from bridge.stages import loading, own_encoders
from bridge.training import text
from jsae import metrics, processes, saelens
from jsae.health import ActivationsError, DegenerateError
from jsae.progress import Progress
from jsae.saelens import Plain
from jsae.settings import ConfigError, require
from jsae.store.source import SiteSource

if TYPE_CHECKING:
    from bridge.nanochat import Nanochat
    from bridge.training.config import RunConfig
    from bridge.training.plan import Trainee
    from jsae.store.reading import Store

HELD_OUT = 0.05
"""Share of a store, at its end, that SAEs are measured on and not trained on."""
FITTED_TOKENS, FITTED_TOKENS_PER_CHANNEL = 100_000, 50
"""Tokens on which the encoders of single checkpoints are fitted, at least, and per channel of the model."""
_ROWS = 8192  # that are measured, or fitted, at once


class Origin(abc.ABC):
    """Source of a run's activations. Abstract."""

    facts: dict[str, Any]
    """Facts that the numbers of a run depend on beside its flags."""
    compiled: tuple[str | None, str]
    """Compiled parts of the model, None if it runs eagerly or not at all; and the reason."""
    data_shards: int
    """Parts of the data, which processes share."""
    own_shards: Sequence[int]
    """The numbers of those of this process."""
    name: str
    """Name for messages."""

    @abc.abstractmethod
    def source(self, sites: Sequence[tuple[str, ...]]) -> Any:
        """Return a `jsae.data.Source` with `tokens_seen` and `whole_position`, of the activations of some sites."""

    @abc.abstractmethod
    def measure(self, trainee: Trainee, folder: Path) -> metrics.Sums:
        """Return the sums of an exported SAE over held-out tokens."""

    @abc.abstractmethod
    def own_saes(self, trainee: Trainee, folder: Path) -> list[Plain]:
        """Return the SAE of every checkpoint that an exported crosscoder reads.

        Raises:
          ConfigError: it reads no checkpoints.
        """

    @abc.abstractmethod
    def metadata(self) -> dict[str, Any]:
        """Return what SAELens keeps of model and data."""


class TextOrigin(Origin):
    """Text through a nanochat, read and checked.

    Args:
      config: the run.
      nanos: its model, or the checkpoints that its crosscoders read.
      sites: the hooks of every site.
      data_shards: number of parts of the text; None chooses it.

    Raises:
      ConfigError: text that is too short or has changed, rows that a checkpoint does not take, or parts that the
        processes cannot share.
      ActivationsError, DegenerateError: activations that nothing can be learned from.
      FileNotFoundError, ValueError: data that cannot be read.
    """

    def __init__(
        self,
        config: RunConfig,
        nanos: Sequence[Nanochat],
        sites: Sequence[tuple[str, ...]],
        data_shards: int | None,
    ):
        self._config, self._nanos, self._nano = config, tuple(nanos), nanos[0]
        row_len = min(nano.row_length(config.context_size) for nano in nanos)
        self.corpus, heldout = text.texts(config, self._nano, data_shards, row_len)
        self.data_shards, self.own_shards = self.corpus.data_shards, self.corpus.own_shards
        self._models = loading.models(nanos)
        self._checkpoints = loading.facts(config.stages, nanos) if config.stages else []
        self.name = self._described()
        self.heldout = text.heldout_rows(config, heldout)
        for model in self._models:
            text.check_activations(config, dataclasses.replace(self._nano, model=model), sites, self.heldout)
        text.check_data(Run(config.output_dir).path, self.corpus)
        self._programs, reason = text.programs(config, self._nano, self.corpus, sites)
        self.compiled = (None if self._programs is None else "blocks", reason)
        corpus = self.corpus
        self.facts = {"model": self._fingerprint(), "data": corpus.fingerprint, "data_files": corpus.files}
        self.facts |= {"checkpoints": self._checkpoints} if self._checkpoints else {}

    def _described(self) -> str:
        """Return the model and text, for messages."""
        config, nano = self._config, self._nano
        model = f"({nano.generation}, {nano.config.n_layer} layers of width {nano.config.n_embd})"
        if not self._checkpoints:
            return f"nanochat {config.checkpoint} {model} on {config.data!r}"
        names = ", ".join(stage.name for stage in config.stages)
        return f"{len(self._nanos)} checkpoints of a nanochat {model}, {names}, on {config.data!r}"

    def _fingerprint(self) -> str:
        """Return the fingerprint of the model; of several that of their fingerprints."""
        if not self._checkpoints:
            return self._nano.fingerprint
        return hashlib.sha256("".join(nano.fingerprint for nano in self._nanos).encode()).hexdigest()

    def source(self, sites: Sequence[tuple[str, ...]]) -> Any:
        """Return the stream of activations on the training text."""
        return text.stream(self._config, self._nano, self._models, self.corpus, sites, self._programs)

    def measure(self, trainee: Trainee, folder: Path) -> metrics.Sums:
        """Run the model, or all checkpoints, over held-out rows of text."""
        sae = torch_sae.load(folder, self._nano.model.lm_head.weight.device)
        site, size = self._site(trainee), self.heldout.size
        with Progress(f"measuring {trainee.label}", size, "tokens") as progress, progress.tokens_of(self._nano.model):
            return survey(site, sae, site.batches(self.heldout)).sums

    def own_saes(self, trainee: Trainee, folder: Path) -> list[Plain]:
        """Fit the SAEs of all checkpoints to an exported crosscoder, on training text."""
        sae, site = torch_sae.load(folder, self._nano.model.lm_head.weight.device), self._site(trainee)
        tokens = max(FITTED_TOKENS, FITTED_TOKENS_PER_CHANNEL * self._nano.config.n_embd)
        rows = np.stack(list(self.corpus.one_pass(-(-tokens // self.corpus.row_len))))
        label = f"fitting the checkpoints' SAEs to {trainee.label}"
        with Progress(label, rows.size, "tokens") as progress, progress.tokens_of(self._nano.model):
            acts = (part for batch in site.read(site.batches(rows)) for part in batch.acts[batch.mask].split(_ROWS))
            return own_encoders.fit(saelens.read(folder), sae, acts)

    def _site(self, trainee: Trainee) -> Site:
        """Return where an SAE reads the model, or all checkpoints."""
        nano, config = self._nano, self._config
        return Site(
            nano.model,
            trainee.hooks[0],
            excluded_ids(config.exclude_tokens, nano.tokenizer),
            config.drop_sinks,
            config.tokens_per_forward,
            other_hooks=trainee.hooks[1:],
            models=self._models,
        )

    def metadata(self) -> dict[str, Any]:
        """Return all that is needed to read the same activations again."""
        config, nano = self._config, self._nano
        return {
            "model_name": "nanochat-demo" if config.checkpoint == "demo" else nano.name,
            "model_class_name": "nanochat",
            "model_fingerprint": self.facts["model"],
            **({"checkpoints": self._checkpoints} if self._checkpoints else {}),
            "context_size": self.heldout.shape[1],
            "exclude_special_tokens": list(excluded_ids(config.exclude_tokens, nano.tokenizer)),
            "drop_sinks": config.drop_sinks,
            **sink_rule(config.drop_sinks),
            "dataset_path": config.data,
            "dataset_fingerprint": self.corpus.fingerprint,
        }


class StoreOrigin(Origin):
    """The activations of a store. The last twentieth of it is held out.

    Args:
      config: the run.
      store: the store.
      sites: the hooks of every site.
      device: of torch, on which exported SAEs are measured.
      data_shards: number of parts in which the store is read; None chooses it.

    Raises:
      ConfigError: a store that is too small, or parts that the processes cannot share.
      ActivationsError, DegenerateError: activations that nothing can be learned from.
    """

    def __init__(
        self,
        config: RunConfig,
        store: Store,
        sites: Sequence[tuple[str, ...]],
        device: str,
        data_shards: int | None,
    ):
        self._config, self._store, self._device = config, store, device
        chunk = store.layout.chunk_rows
        chunks = -(-store.rows // chunk)
        held_out = max(round(HELD_OUT * chunks), 1)
        require(
            chunks > held_out, f"{store.location} has one chunk of {chunk} rows: a run needs another to be measured on"
        )
        self._train_rows = (chunks - held_out) * chunk
        self.data_shards = text.shards_of(config, data_shards, 1, chunks - held_out)
        self.own_shards = shards_of_process(self.data_shards, jax.process_index(), processes.count())
        self.name = f"the store {store.location} ({store.rows:,} tokens as {store.layout.storage})"
        self.compiled = (None, "activations are read from a store")
        origin = store.manifest.origin
        self.facts = {"model": origin.get("model"), "data": store.manifest.digest, "data_files": []}
        for hook in dict.fromkeys(hook for site in sites for hook in site):
            _check(store, hook)

    def source(self, sites: Sequence[tuple[str, ...]]) -> Any:
        """Return the source of the store's rows."""
        return SiteSource(
            self._store,
            sites,
            seed=self._config.data_seed,
            streams=self.data_shards,
            serve=tuple(self.own_shards),
            rows=self._train_rows,
        )

    def measure(self, trainee: Trainee, folder: Path) -> metrics.Sums:
        """Read held-out rows of the store."""
        store, layers = self._store, trainee.member.sae.layers
        sae = torch_sae.load(folder, self._device)
        stop = min(store.rows, self._train_rows + self._config.heldout_tokens)
        total = None
        with Progress(f"measuring {trainee.label}", stop - self._train_rows, "tokens") as progress:
            for start in range(self._train_rows, stop, _ROWS):
                end = min(start + _ROWS, stop)
                kept = np.logical_and.reduce([store.kept(hook, start, end) for hook in trainee.hooks])
                parts = [store.read(hook, start, end, np.float32)[kept] for hook in trainee.hooks]
                x = np.concatenate(parts, axis=1) if layers > 1 else parts[0]
                if len(x):
                    sums = survey_of_rows(x, x if layers > 1 else parts[-1], sae)
                    total = sums if total is None else metrics.add(total, sums)
                progress.advance(end - start)
        require(total is not None, f"no held-out row of {store.location} counts at {', '.join(trainee.hooks)}")
        return total

    def own_saes(self, trainee: Trainee, folder: Path) -> list[Plain]:
        """Raise ConfigError: a store has the activations of one model."""
        raise ConfigError(f"{folder} reads a store, not checkpoints")

    def metadata(self) -> dict[str, Any]:
        """Return what the store says of model and text."""
        origin, layout = self._store.manifest.origin, self._store.layout
        drops = bool(origin.get("drop_sinks"))
        return {
            "model_name": origin.get("model_name") or "unknown",
            "model_class_name": "nanochat" if "tokenizer" in origin else None,
            "model_fingerprint": origin.get("model"),
            "context_size": layout.row_len,
            "exclude_special_tokens": list(origin.get("excluded") or []),
            "drop_sinks": drops,
            **sink_rule(drops),
            "dataset_path": str(origin.get("data", self._store.location)),
            "dataset_fingerprint": origin.get("data_fingerprint"),
            "activation_store": self._store.location,
            "activation_store_digest": self._store.manifest.digest,
        }


def hook_metadata(hook: str, suffix: str = "") -> dict[str, Any]:
    """Return SAELens's entries for a hook; of another model's only its name."""
    try:
        module = {f"hf_hook_name{suffix}": module_name(hook)}
    except ValueError:
        module = {}
    return {f"hook_name{suffix}": hook} | module


def _check(store: Store, hook: str) -> None:
    """Check that an SAE can learn from a hook's activations, by their statistics."""
    statistics = store.manifest.statistics[hook]
    require(statistics.kept > 0, f"no row of {store.location} counts at {hook}")
    problem = statistics.problem(f"the activations of {store.location} at {hook}")
    if problem is not None:
        raise (DegenerateError if np.isfinite(statistics.largest) else ActivationsError)(problem)
