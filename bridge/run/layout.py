"""Layout of a run directory. These names are spelt here and nowhere else.

    config.json                 flags, facts (hashes of model and data) and versions
    metrics.jsonl               a line of metrics per report and SAE
    tb/                         events for TensorBoard
    checkpoints/                states of the training
    sae/NAME/                   an exported SAE in SAELens format, named after its hook
    eval.json                   metrics of the exported SAEs, by hook
    latents.json, labels.json   columns and automatic labels of all latents, by hook
    steering.json               effect and side effect of steering with some latents, by hook
    stability.json              how often every latent recurs in SAEs of other seeds, by hook
    stages.json                 what became of every latent of a crosscoder over checkpoints, by hook
    provenance/NAME/LATENT.json documents and tokens that a latent of such a crosscoder comes from
    stages/CHECKPOINT/NAME/     of such a crosscoder: every checkpoint's own SAE in SAELens format; of a watched
                                training: its SAE as it was at that checkpoint
    plots/                      pictures of an evaluation
    explorer/index.html         the explorer's page, with its data in page-DIGEST/
    explorer/graphs/            attribution graphs that the page shows
    explorer/records/HOOK/      records of an SAE (`jsae.records.store`); their texts are in records/texts/; of a
                                checkpoint's own SAE also losses.json, of every checkpoint where each latent fires
    explorer/records/lenses.json    lenses on a few of these texts, and what latents write by the Jacobian lens
    explorer/notes.jsonl        labels and notes that people wrote
    neuronpedia/FOLDER/         files in the format of another tool, a folder per format
    neuronpedia/upload/         bodies of requests to Neuronpedia
    neuronpedia/uploads.jsonl   what was sent to Neuronpedia
    graphs/SITE/SLUG.json       attribution graphs, a folder per site that shows them
    lenses/KIND.pt              fitted lenses on the model: jacobian.pt and tuned.pt
    VARIANT/                    of a sweep: a run of its own, whose checkpoints and events are in the sweep's directory

No torch, and nothing is read.
"""

import os
from pathlib import Path
from typing import Literal

Table = Literal["eval", "latents", "labels", "steering", "stability", "stages"]
"""A file that an evaluation writes, a JSON object by hook."""

WRITTEN = (
    *("config.json", "config", "metrics.jsonl"),
    *("eval.json", "eval", "latents.json", "labels.json", "steering.json"),
    *("stability.json", "stages.json"),
)
"""Files that this or an earlier version writes directly into a run: a killed process may have left remains of them."""


class Layout:
    """The files and folders of a run directory, whether they exist or not.

    Args:
      path: the directory.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"

    @property
    def config_file(self) -> Path:
        """Flags, facts and versions; every run has one."""
        return self.path / "config.json"

    @property
    def metrics_file(self) -> Path:
        """Metrics of the training, a JSON object per line."""
        return self.path / "metrics.jsonl"

    @property
    def events_folder(self) -> Path:
        """Events for TensorBoard."""
        return self.path / "tb"

    @property
    def checkpoints_folder(self) -> Path:
        """States of the training."""
        return self.path / "checkpoints"

    @property
    def saes_folder(self) -> Path:
        """The folder of the exported SAEs."""
        return self.path / "sae"

    def sae_folder(self, name: str) -> Path:
        """The folder of one exported SAE."""
        return self.saes_folder / name

    def table_file(self, table: Table) -> Path:
        """A table of an evaluation."""
        return self.path / f"{table}.json"

    def stage_folder(self, stage: str, name: str) -> Path:
        """The SAE of one checkpoint: cut out of the crosscoder of this name, or as it was then in a live one."""
        return self.path / "stages" / stage / name

    def provenance_file(self, name: str, latent: int) -> Path:
        """The documents and tokens that a latent of the crosscoder of this name comes from."""
        return self.path / "provenance" / name / f"{latent}.json"

    @property
    def plots_folder(self) -> Path:
        """Pictures of an evaluation."""
        return self.path / "plots"

    @property
    def explorer_folder(self) -> Path:
        """The explorer's page, records and notes: what the server shows."""
        return self.path / "explorer"

    @property
    def page_file(self) -> Path:
        """The explorer's page."""
        return self.explorer_folder / "index.html"

    @property
    def shown_graphs_folder(self) -> Path:
        """Attribution graphs that the explorer's page shows."""
        return self.explorer_folder / "graphs"

    @property
    def notes_file(self) -> Path:
        """Labels and notes that people wrote, a JSON object per line."""
        return self.explorer_folder / "notes.jsonl"

    @property
    def records_folder(self) -> Path:
        """Records of all SAEs and the texts they point into."""
        return self.explorer_folder / "records"

    def store_folder(self, hook: str) -> Path:
        """The records of one SAE."""
        return self.records_folder / hook

    @property
    def lens_tables_file(self) -> Path:
        """Lenses on a few texts of the records, and on the directions of latents."""
        return self.records_folder / "lenses.json"

    def losses_file(self, hook: str) -> Path:
        """Losses of every checkpoint on the texts of the latents, beside the records of a checkpoint's own SAE."""
        return self.store_folder(hook) / "losses.json"

    @property
    def graphs_folder(self) -> Path:
        """Attribution graphs, a folder per site that shows them."""
        return self.path / "graphs"

    def lens_file(self, kind: Literal["jacobian", "tuned"]) -> Path:
        """A fitted lens on the run's model."""
        return self.path / "lenses" / f"{kind}.pt"

    @property
    def lens_files(self) -> list[Path]:
        """The fitted lenses that the run has."""
        return [file for file in (self.lens_file("jacobian"), self.lens_file("tuned")) if file.is_file()]

    @property
    def neuronpedia_folder(self) -> Path:
        """Files in formats of other tools, a folder per format."""
        return self.path / "neuronpedia"

    @property
    def bodies_folder(self) -> Path:
        """Bodies of requests to Neuronpedia."""
        return self.neuronpedia_folder / "upload"

    @property
    def uploads_file(self) -> Path:
        """The ledger of what was sent to Neuronpedia."""
        return self.neuronpedia_folder / "uploads.jsonl"
