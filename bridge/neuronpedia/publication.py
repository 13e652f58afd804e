"""The upload of a run's features to a Neuronpedia: requests on the disk, and the run's ledger of what was sent."""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.neuronpedia.api import api_features
from bridge.neuronpedia.client import Client, site
from bridge.neuronpedia.ledger import Ledger
from bridge.neuronpedia.payload import MAX_BYTES, MAX_FEATURES, Plan, Target
from bridge.neuronpedia.sources import Source
from bridge.neuronpedia.upload import NeuronpediaUploader, Progress
from bridge.run import Run
from bridge.run.labels import Names


@dataclass(frozen=True)
class Missing:
    """The part of a publication whose arrival the ledger does not confirm."""

    features: int
    requests: int
    size: int
    """In bytes."""


class Publication:
    """The features of one SAE of a run, ready to be sent to a server.

    Args:
      run: whose ledger knows what was sent before.
      plan: the checked bodies of the requests.
      server: the address of the site.
    """

    def __init__(self, run: Run, plan: Plan, server: str):
        self.plan, self.server = plan, server
        self._ledger_file = run.uploads_file
        self._uploader = NeuronpediaUploader(plan.target)

    @classmethod
    def prepare(
        cls,
        run: Run,
        source: Source,
        server: str,
        *,
        out: Path | None = None,
        max_features: int = MAX_FEATURES,
        max_bytes: int = MAX_BYTES,
        each: Callable[[Iterable[dict[str, Any]]], Iterable[dict[str, Any]]] = iter,
    ) -> "Publication":
        """Check all features and write the bodies of the requests; send nothing.

        Args:
          run: the run.
          source: one of its SAEs.
          server: the address of the site.
          out: where the bodies are written, in folders per model and source; None is the run's own folder.
          max_features: features per request at most.
          max_bytes: bytes per request at most.
          each: yields the features that it gets, and may show how many have gone by.

        Raises:
          FileNotFoundError, StoreError: no records, or none that fit.
          PayloadError: the server would refuse something.
          OSError: the bodies cannot be written.
        """
        ids, about, store = source.ids, source.about, source.store()
        target = Target(ids, about.n_layer, description=about.description, url=about.url)
        plan = NeuronpediaUploader(target).prepare_sae_for_upload(
            each(api_features(store, source.sae_dir, Names.read(run.path, ids.hook))),
            (out or run.bodies_folder) / ids.model / ids.source,
            d_sae=store.header.d_sae,
            max_features=max_features,
            max_bytes=max_bytes,
        )
        return cls(run, plan, server)

    @property
    def link(self) -> str:
        """The source's path on the site."""
        return self.plan.target.ids.link

    def missing(self, keep: bool = False) -> Missing:
        """Return what is to be sent.

        Args:
          keep: leave features that were uploaded with other content as they are there.

        Raises:
          PayloadError: without `keep`, for such features.
        """
        ledger = self._ledger()
        with ledger if ledger.path.is_file() else contextlib.nullcontext():
            batches = self._uploader.missing(self.plan, ledger, keep)
        return Missing(
            sum(len(indices) for _, indices in batches), len(batches), sum(batch.size for batch, _ in batches)
        )

    def send(
        self, client: Client, keep: bool = False, report: Callable[[Progress], None] = lambda progress: None
    ) -> Progress:
        """Send what is missing; what arrived is in the ledger when this is interrupted.

        Args:
          client: of the site, with an API key.
          keep: as in `missing`.
          report: is called after every request.

        Raises:
          PayloadError, ApiError: see `NeuronpediaUploader.upload`.
        """
        with self._ledger() as ledger:
            return self._uploader.upload(self.plan, client, ledger, keep=keep, report=report)

    def _ledger(self) -> Ledger:
        ids = self.plan.target.ids
        return Ledger(self._ledger_file, (site(self.server), ids.model, ids.source))
