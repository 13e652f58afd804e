"""The upload of an SAE's features to Neuronpedia's public API: every feature once, however often it is interrupted."""

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
    """How far an upload has come."""

    features: int
    """Accepted by the server, in this upload or an earlier one."""
    of: int
    sent: int
    """Bytes sent by this upload, those sent again included."""


class NeuronpediaUploader:
    """Prepares features for Neuronpedia and uploads them.

        uploader = NeuronpediaUploader(Target(ids, layers=20))
        plan = uploader.prepare_sae_for_upload(features, folder)     # sends nothing
        with Client(api_key) as client, Ledger(path, (client.base_url, ids.model, ids.source)) as ledger:
            uploader.upload(plan, client, ledger)

    The server adds the activations of a feature that it has already a second time. So what may have arrived is asked
    for before it is sent again: after a dropped connection or a 5xx, when a killed upload goes on (the ledger knows
    what was under way), and when the source set was not made by an upload of this ledger.

    Args:
      target: where the features go.
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
        """Checks all features and writes the requests' bodies into a folder; see `payload.prepare`.

        Raises:
          PayloadError: the server would refuse something.
        """
        return prepare(
            features, self.target, Path(output_dir), d_sae=d_sae, max_features=max_features, max_bytes=max_bytes
        )

    def missing(self, plan: Plan, ledger: Ledger, keep: bool = False) -> list[tuple[Batch, list[int]]]:
        """What of a plan the ledger does not know to have arrived.

        Args:
          plan: of this target.
          ledger: inside its `with`.
          keep: leave features that arrived with other content as they are there.

        Raises:
          PayloadError: without `keep`, for such features: the server cannot replace them.
        """
        found, changed = [], []
        for batch in plan.batches:
            states = {index: ledger.state(index, content) for index, content in batch.contents.items()}
            changed += [index for index, state in states.items() if state == "changed"]
            wanted = [index for index, state in states.items() if state in (None, "sending")]
            if wanted:
                found.append((batch, wanted))
        if changed and not keep:
            told = ", ".join(map(str, sorted(changed)[:5])) + (", …" if len(changed) > 5 else "")
            raise PayloadError(
                f"{len(changed)} features ({told}) are at {self.target.ids.link} already, with other content. The "
                "server cannot replace them: choose another --source_set, or leave them as they are, --keep_uploaded"
            )
        return found

    def upload(
        self,
        plan: Plan,
        client: Client,
        ledger: Ledger,
        *,
        keep: bool = False,
        told: Callable[[Progress], None] = lambda progress: None,
    ) -> Progress:
        """Makes model and source set where they are missing and sends what is not there yet.

        Args:
          plan: of this target.
          client: with an API key.
          ledger: of this server and source, inside its `with`.
          keep: as in `missing`.
          told: hears of the progress after every batch.

        Raises:
          PayloadError: as in `missing`.
          ApiError: the server refuses, or cannot be reached for too long; what arrived is in the ledger.
        """
        missing = self.missing(plan, ledger, keep)
        done = plan.features - sum(len(indices) for _, indices in missing)
        self._make(client, ledger)
        sent = 0
        for batch, indices in missing:
            sent += self._send(plan, batch, indices, client, ledger)
            done += len(indices)
            told(Progress(done, plan.features, sent))
        return Progress(done, plan.features, sent)

    def _make(self, client: Client, ledger: Ledger) -> None:
        """Makes model and source set where they are missing."""
        ids = self.target.ids
        found = client.source_set(ids.model, ids.source_set)
        if found is None:
            if ledger.last_sent:
                raise ApiError(
                    f"{client.base_url} has no source set {ids.model}/{ids.source_set}, but {ledger.path} says that "
                    "features were uploaded to it: if the site was emptied, move that file away"
                )
            if not client.create_model(self.target):
                _log.warning("the model %s exists already: the source set is added to it", ids.model)
            if client.create_source_set(self.target):
                ledger.created()
            found = client.source_set(ids.model, ids.source_set) or {}
        sources = found.get("sources") or ()
        if not any(isinstance(source, dict) and source.get("id") == ids.source for source in sources):
            raise ApiError(
                f"{client.base_url} has {ids.model}/{ids.source_set} without the source {ids.source}: is it another's, "
                "or has its model fewer layers? Choose another --model_id or --source_set"
            )

    def _send(self, plan: Plan, batch: Batch, indices: list[int], client: Client, ledger: Ledger) -> int:
        """Sends the features of a batch that are not there; bytes sent."""
        contents = {index: batch.contents[index] for index in indices}
        asked = [i for i in indices if not ledger.complete or ledger.state(i, contents[i]) == "sending"]
        if asked:
            client.pause(max(0.0, ledger.last_sent + client.patience.settle - time.time()))
        absent = set(indices) - self._present(batch, asked, client)
        sent = 0

        def body() -> bytes | None:
            nonlocal sent
            if not absent:
                return None
            found = plan.body(batch, absent)
            sent += len(found)
            return found

        def again() -> bytes | None:
            absent.difference_update(self._present(batch, sorted(absent), client))
            return body()

        first = body()
        if first is not None:
            ledger.write("sending", {index: contents[index] for index in sorted(absent)})
            client.upload(first, again)
        ledger.write("accepted", contents)
        return sent

    def _present(self, batch: Batch, indices: Collection[int], client: Client) -> set[int]:
        """Which of these features the server has, with activations: without, sending them adds what is missing."""
        ids = self.target.ids
        present = set()
        for index in indices:
            found = client.feature(ids.model, ids.source, index)
            there = len(found.get("activations") or ()) if found else 0
            if there:
                present.add(index)
            if 0 < there < batch.texts[index]:
                told = (ids.link, index, there, batch.texts[index])
                _log.warning("%s/%d has %d of its %d texts, and the server cannot add the rest alone", *told)
        return present
