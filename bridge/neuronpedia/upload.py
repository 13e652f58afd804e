"""Upload an SAE's features to Neuronpedia's public API, each exactly once, even if the upload is interrupted."""

import dataclasses
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from bridge.neuronpedia.client import ApiError, Client
from bridge.neuronpedia.ledger import Ledger
from bridge.neuronpedia.payload import MAX_BYTES, MAX_FEATURES, Batch, PayloadError, Plan, Target, prepare

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Progress:
    """The progress of an upload."""

    features: int
    """Number of features that the server has accepted, in this upload or an earlier one."""
    total: int
    """Number of features of the plan."""
    sent: int
    """Bytes sent by this upload, including retries."""


class NeuronpediaUploader:
    """Prepare features for Neuronpedia and upload them.

        uploader = NeuronpediaUploader(Target(ids, layers=20))
        plan = uploader.prepare_sae_for_upload(features, folder)     # sends nothing
        with Client(api_key) as client, Ledger(path, (client.base_url, ids.model, ids.source)) as ledger:
            uploader.upload(plan, client, ledger)

    If a feature is sent twice, the server stores its activations twice. So before features that may have arrived are
    sent again, the server is asked for them: after a dropped connection or a status of 5xx, when an interrupted upload
    resumes (the ledger knows what was being sent), and when the source set was not created by an upload of this ledger.

    Args:
      target: the destination of the features.
    """

    def __init__(self, target: Target):
        self.target = target

    def prepare_sae_for_upload(
        self,
        features: Iterable[Mapping[str, Any]],
        output_dir: Path,
        *,
        d_sae: int | None = None,
        max_features: int = MAX_FEATURES,
        max_bytes: int = MAX_BYTES,
    ) -> Plan:
        """Check all features and write the bodies of the requests into a folder; see `payload.prepare`.

        Raises:
          PayloadError: the server would refuse a feature.
        """
        return prepare(
            features, self.target, Path(output_dir), d_sae=d_sae, max_features=max_features, max_bytes=max_bytes
        )

    def missing(self, plan: Plan, ledger: Ledger, keep: bool = False) -> list[tuple[Batch, list[int]]]:
        """Return the batches of a plan with the features that have not been accepted according to the ledger.

        Args:
          plan: a plan for this target.
          ledger: the ledger, inside its `with` block.
          keep: keep features that were accepted with other content.

        Raises:
          PayloadError: there are such features and `keep` is False: the server cannot replace them.
        """
        missing, changed = [], []
        for batch in plan.batches:
            states = {index: ledger.state(index, content) for index, content in batch.contents.items()}
            changed += [index for index, state in states.items() if state == "changed"]
            indices = [index for index, state in states.items() if state in (None, "sending")]
            if indices:
                missing.append((batch, indices))
        if changed and not keep:
            names = ", ".join(map(str, sorted(changed)[:5])) + (", …" if len(changed) > 5 else "")
            raise PayloadError(
                f"{len(changed)} features ({names}) are already at {self.target.ids.link}, with other content. The "
                "server cannot replace them: choose another --source_set, or keep them with --keep_uploaded"
            )
        return missing

    def upload(
        self,
        plan: Plan,
        client: Client,
        ledger: Ledger,
        *,
        keep: bool = False,
        report: Callable[[Progress], None] = lambda progress: None,
    ) -> Progress:
        """Create model and source set if they do not exist, and send the features that are missing there.

        Args:
          plan: a plan for this target.
          client: a client with an API key.
          ledger: the ledger of this server and source, inside its `with` block.
          keep: see `missing`.
          report: called with the progress after every batch.

        Returns:
          The final progress.

        Raises:
          PayloadError: see `missing`.
          ApiError: the server refuses a request, or cannot be reached for too long; the ledger has what was accepted.
        """
        missing = self.missing(plan, ledger, keep)
        done = plan.features - sum(len(indices) for _, indices in missing)
        self._create(client, ledger)
        sent = 0
        for batch, indices in missing:
            sent += self._send(plan, batch, indices, client, ledger)
            done += len(indices)
            report(Progress(done, plan.features, sent))
        return Progress(done, plan.features, sent)

    def _create(self, client: Client, ledger: Ledger) -> None:
        """Create model and source set if they do not exist. Raises ApiError if they do not fit the target."""
        ids = self.target.ids
        source_set = client.source_set(ids.model, ids.source_set)
        if source_set is None:
            if ledger.last_sent:
                raise ApiError(
                    f"{client.base_url} has no source set {ids.model}/{ids.source_set}, but according to {ledger.path} "
                    "features were uploaded to it: if the site was emptied, move that file away"
                )
            if not client.create_model(self.target):
                _log.warning("the model %s exists already: the source set is added to it", ids.model)
            if client.create_source_set(self.target):
                ledger.created()
            source_set = client.source_set(ids.model, ids.source_set) or {}
        sources = source_set.get("sources") or ()
        if not any(isinstance(source, dict) and source.get("id") == ids.source for source in sources):
            raise ApiError(
                f"{client.base_url} has {ids.model}/{ids.source_set} without the source {ids.source}: it belongs to "
                "somebody else, or its model has fewer layers. Choose another --model_id or --source_set"
            )

    def _send(self, plan: Plan, batch: Batch, indices: list[int], client: Client, ledger: Ledger) -> int:
        """Send the features of a batch that the server does not have; return the number of bytes sent."""
        contents = {index: batch.contents[index] for index in indices}
        uncertain = [i for i in indices if not ledger.complete or ledger.state(i, contents[i]) == "sending"]
        if uncertain:
            client.pause(max(0.0, ledger.last_sent + client.patience.recheck - time.time()))
        absent = set(indices) - self._present(batch, uncertain, client)
        sent = 0

        def body() -> bytes | None:
            nonlocal sent
            if not absent:
                return None
            data = plan.body(batch, absent)
            sent += len(data)
            return data

        def remaining() -> bytes | None:
            absent.difference_update(self._present(batch, sorted(absent), client))
            return body()

        first = body()
        if first is not None:
            ledger.write("sending", {index: contents[index] for index in sorted(absent)})
            client.upload(first, remaining)
        ledger.write("accepted", contents)
        return sent

    def _present(self, batch: Batch, indices: Collection[int], client: Client) -> set[int]:
        """Return which of these features the server has with activations; others can be sent again."""
        ids = self.target.ids
        present = set()
        for index in indices:
            feature = client.feature(ids.model, ids.source, index)
            count = len(feature.get("activations") or ()) if feature else 0
            if count:
                present.add(index)
            if 0 < count < batch.texts[index]:
                details = (ids.link, index, count, batch.texts[index])
                _log.warning("%s/%d has %d of its %d texts, and the server cannot add the others", *details)
        return present
