"""Neuronpedia's bulk export: a folder per source, which Neuronpedia's importer reads into a database.

    MODEL/SOURCE/release.jsonl, model.jsonl, sourceset.jsonl, source.jsonl
                 features/batch-N.jsonl.gz, activations/batch-N.jsonl.gz, explanations/batch-N.jsonl.gz

The importer requires the same keys in all lines of a file, integers in integer columns, ids that never change, and a
creator that exists in the database.
"""

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bridge.neuronpedia.about import About, dataset
from bridge.neuronpedia.ids import CREATOR, Ids
from bridge.neuronpedia.rows import Context, Latent, Latents
from bridge.neuronpedia.strict import Lines, write_line
from bridge.run.labels import Name, Names
from jsae import files
from jsae.records.store import Store

PER_FILE = 1024
"""Latents per file, as in Neuronpedia's own exports."""
MAX_FILES = 1000
"""Files per folder; the importer lists no more."""

Row = dict[str, Any]


def write(
    store: Store, sae_dir: Path, out: Path, *, ids: Ids, about: About, names: Names, vectors: bool = False
) -> list[Path]:
    """Write `out/MODEL/SOURCE` atomically; an earlier one is replaced.

    Args:
      store: the records.
      sae_dir: the export of the same SAE.
      out: the folder of all models.
      ids: Neuronpedia's ids of the SAE.
      about: the description of the export.
      names: manual and automatic labels, which become explanations, with how often latents recur in other seeds.
      vectors: whether to include decoder rows, with which a host of the model can steer without the SAE.

    Returns:
      The paths of the files, the four of metadata first.

    Raises:
      FileNotFoundError, StoreError: there is no export, or the records are of another SAE.
      NotStorableError: Postgres would refuse a value.
    """
    latents = Latents(store, sae_dir, vectors)
    folder = out / ids.model / ids.source
    with files.replacing_folder(folder) as partial:
        for name, row in metadata(store, ids, about).items():
            write_line(partial / f"{name}.jsonl", row)
        per_file = max(PER_FILE, -(-len(latents) // MAX_FILES))
        for number, first in enumerate(range(0, len(latents), per_file)):
            span = range(first, min(first + per_file, len(latents)))
            _write_batch(partial, f"batch-{number}.jsonl.gz", (latents[i] for i in span), ids, about, names)
    return sorted(folder.rglob("*.*"), key=lambda path: (path.parent != folder, str(path)))


def _write_batch(folder: Path, name: str, latents: Iterable[Latent], ids: Ids, about: About, names: Names) -> None:
    """Write the three files of one batch, with the same latents in each."""
    kinds = ("features", "activations", "explanations")
    with contextlib.ExitStack() as stack:
        features, activations, explanations = (stack.enter_context(Lines(folder / kind / name)) for kind in kinds)
        for latent in latents:
            features.add(feature(latent, ids, about))
            for rank, context in enumerate(latent.contexts):
                activations.add(activation(latent.index, rank, context, ids, about))
            if text := names.description(latent.index):
                explanations.add(explanation(latent.index, text, names[latent.index], ids, about))


def metadata(store: Store, ids: Ids, about: About) -> dict[str, Row]:
    """Return the rows of release, model, source set and source, by the name of their file.

    Args:
      store: the records.
      ids: Neuronpedia's ids of the SAE.
      about: the description of the export.
    """
    header, texts = store.header, store.texts.header
    common = {"creatorId": CREATOR, "createdAt": about.time, "visibility": "PUBLIC"}
    urls = [about.url] if about.url else []
    release = {
        "name": ids.release,
        "description": about.title,
        "descriptionShort": about.title,
        "creatorName": about.creator,
        "creatorNameShort": about.creator,
        "creatorEmail": None,
        "isNewUi": False,
        "featured": False,
        "urls": urls,
        "defaultSourceSetName": None,
        "defaultSourceId": None,
        "defaultUmapSourceIds": [],
    }
    model = {
        "id": ids.model,
        "instruct": False,
        "displayNameShort": ids.model,
        "displayName": ids.model,
        "tlensId": None,
        "dimension": header.d_in,
        "defaultSourceSetName": None,  # neither exists when the model is imported
        "defaultSourceId": None,
        "inferenceEnabled": False,
        "layers": about.n_layer,
        "neuronsPerLayer": 4 * header.d_in,
        "updatedAt": about.time,
        "owner": about.creator,
        "website": None,
    }
    source_set = {
        "modelId": ids.model,
        "name": ids.source_set,
        "hasDashboards": True,
        "description": about.description,
        "type": "",
        "creatorName": about.creator,
        "urls": urls,
        "creatorEmail": None,
        "releaseName": ids.release,
        "defaultOfModelId": None,
        "defaultRange": 1,
        "defaultShowBreaks": True,
        "showDfa": False,
        "showCorrelated": False,
        "showHeadAttribution": False,
        "showUmap": False,
    }
    source = {
        "id": ids.source,
        "modelId": ids.model,
        "setName": ids.source_set,
        "hasDashboards": True,
        "inferenceEnabled": False,
        "inferenceHosts": [],
        "saelensRelease": None,
        "saelensSaeId": None,
        "hfRepoId": about.hub_repo,
        "hfFolderId": header.hook if about.hub_repo else None,
        "defaultOfModelId": None,
        "hasUmap": False,
        "hasUmapLogSparsity": False,
        "hasUmapClusters": False,
        "num_prompts": texts.rows,
        "num_tokens_in_prompt": texts.row_length,
        "dataset": dataset(store),
        "notes": None,
    }
    rows = {"release": release, "model": model, "sourceset": source_set, "source": source}
    return {name: row | common for name, row in rows.items()}


def feature(latent: Latent, ids: Ids, about: About) -> Row:
    """Return a latent's row of the table Neuron."""
    near, cosines = latent.neighbours
    return {
        "modelId": ids.model,
        "layer": ids.source,
        "index": str(latent.index),
        "creatorId": CREATOR,
        "createdAt": about.time,
        "maxActApprox": latent.max,
        "hasVector": bool(latent.vector),
        "vector": latent.vector,
        "vectorLabel": None,
        "vectorDefaultSteerStrength": latent.max,
        "hookName": ids.hook,
        "topkCosSimIndices": near,
        "topkCosSimValues": cosines,
        **latent.tables,
        "sourceSetName": ids.source_set,
    }


def activation(index: int, rank: int, context: Context, ids: Ids, about: About) -> Row:
    """Return a text's row of the table Activation, whose key depends only on the latent and the rank of the text."""
    return {
        "id": ids.activation(index, rank),
        "tokens": context.tokens,
        "index": str(index),
        "layer": ids.source,
        "modelId": ids.model,
        "maxValue": context.max,
        "maxValueTokenIndex": context.values.index(context.max),
        "minValue": min(context.values),
        "values": context.values,
        "creatorId": CREATOR,
        "dataSource": None,
        "dataIndex": None,
        "dfaValues": [],
        "dfaTargetIndex": None,
        "dfaMaxValue": None,
        "createdAt": about.time,
        "lossValues": [],
        "logitContributions": None,
        "binMin": context.low,
        "binMax": context.high,
        "binContains": context.share,
        "qualifyingTokenIndex": context.qualifying,
    }


def explanation(index: int, text: str, name: Name, ids: Ids, about: About) -> Row:
    """Return a row of the table Explanation, without type and model, which the site would have to know.

    Args:
      index: of the latent.
      text: its description: the label, with how often it recurs in other seeds where that is known.
      name: its label with scores and note.
      ids: Neuronpedia's ids of the SAE.
      about: the description of the export.
    """
    note = None if name.f1 is None else f"found automatically, F1 {name.f1:.2f}"
    return {
        "id": ids.explanation(index),
        "modelId": ids.model,
        "layer": ids.source,
        "index": str(index),
        "description": text,
        "authorId": CREATOR,
        "typeName": None,
        "explanationModelName": None,
        "notes": name.note or note,
        "createdAt": about.time,
    }
