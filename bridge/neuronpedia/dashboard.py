"""SAEDashboard's output for Neuronpedia, as read by its converter and by other scripts.

MODEL_SET_HOOK_WIDTH[_SUFFIX]/run_settings.json, skipped_indexes.json, tokens_N.pt, batch-0.json, batch-1.json, …
"""

from pathlib import Path
from typing import Any

import numpy as np

from bridge.neuronpedia.about import About, dataset
from bridge.neuronpedia.ids import CREATOR, Ids
from bridge.neuronpedia.rows import Context, Latent, Latents
from bridge.neuronpedia.strict import write_json
from jsae import files
from jsae.records.store import Store
from jsae.saelens.settings import WEIGHTS

PER_BATCH = 128
"""Largest number of latents per file, as in SAEDashboard."""

_THRESHOLD = 1
"""log10 of the density above which SAEDashboard's runner skips a latent; above 0 it skips none."""


def write(store: Store, sae_dir: Path, out: Path, *, ids: Ids, about: About, vectors: bool = False) -> list[Path]:
    """Write the folder of one SAE into `out` atomically; an earlier one is replaced.

    Args:
      store: the records.
      sae_dir: the export of the same SAE.
      out: the folder of all SAEs.
      ids: Neuronpedia's ids of the SAE.
      about: the description of the export.
      vectors: whether to include the decoder rows.

    Returns:
      The paths of the files.

    Raises:
      FileNotFoundError, StoreError: there is no export, or the records are of another SAE.
      NotStorableError: a number is not finite, or a text is not valid Unicode.
    """
    latents = Latents(store, sae_dir, vectors)
    suffix = f"_{ids.suffix}" if ids.suffix else ""
    folder = out / f"{ids.model}_{ids.source_set}_{ids.hook}_{len(latents)}{suffix}"
    with files.replacing_folder(folder) as partial:
        write_json(partial / "run_settings.json", settings(store, ids, about), indent=4)
        write_json(partial / "skipped_indexes.json", skipped(ids))
        _write_tokens(partial / f"tokens_{store.texts.header.rows}.pt", store.texts.tokens)
        spans = np.array_split(np.arange(len(latents)), -(-len(latents) // PER_BATCH))
        for number, span in enumerate(spans):
            features = [feature(latents[i], store) for i in span.tolist()]
            write_json(partial / f"batch-{number}.json", _head(ids) | {"features": features})
    return sorted(folder.iterdir())


def _head(ids: Ids) -> dict[str, Any]:
    return {"model_id": ids.model, "layer": ids.layer, "sae_set": ids.source_set, "sae_id_suffix": ids.suffix}


def feature(latent: Latent, store: Store) -> dict[str, Any]:
    """Return a latent as an element of `features`."""
    texts = store.texts.header
    return {
        "feature_index": latent.index,
        **latent.tables,
        "n_prompts_total": texts.rows,
        "n_tokens_in_prompt": texts.row_length,
        "dataset": dataset(store),
        "activations": [activation(context) for context in latent.contexts],
        "vector": latent.vector,
    }


def activation(context: Context) -> dict[str, Any]:
    """Return a text as an element of a feature's `activations`."""
    return {
        "bin_min": context.low,
        "bin_max": context.high,
        "bin_contains": context.share,
        "tokens": context.tokens,
        "values": context.values,
        "qualifying_token_index": context.qualifying,
    }


def skipped(ids: Ids) -> dict[str, Any]:
    """Return the content of `skipped_indexes.json`: no latent is skipped, not even dead ones."""
    return {
        "model_id": ids.model,
        "layer": str(ids.layer),
        "sae_set": ids.source_set,
        "log_sparsity": _THRESHOLD,
        "skipped_indexes": [],
    }


def settings(store: Store, ids: Ids, about: About) -> dict[str, Any]:
    """Return the content of `run_settings.json`: settings of SAEDashboard's runner with the values of these records."""
    from bridge.selection import SINK_NORM_MULTIPLE

    texts, record_settings = store.texts.header, store.header.settings
    top, *intervals = _group_sizes(store)
    excluded = record_settings.get("excluded", [texts.bos])  # records of earlier versions always excluded BOS
    return {
        "sae_set": ids.source_set,
        "sae_path": ids.hook,
        "outputs_dir": ".",
        "np_sae_id_suffix": ids.suffix,
        "np_set_name": ids.source_set,
        "from_local_sae": True,
        "sparsity_threshold": _THRESHOLD,
        "huggingface_dataset_path": dataset(store),
        "n_prompts_total": texts.rows,
        "n_tokens_in_prompt": texts.row_length,
        "n_prompts_in_forward_pass": 32,
        "n_features_at_a_time": PER_BATCH,
        "quantile_feature_batch_size": 64,
        "start_batch": 0,
        "end_batch": None,
        "n_quantiles": len(intervals),
        "top_acts_group_size": top,
        "quantile_group_size": max(intervals),
        "use_dfa": False,
        "model_dtype": "float32",
        "sae_dtype": "float32",
        "model_id": ids.model,
        "layer": ids.layer,
        "sae_device": "cpu",
        "activation_store_device": "cpu",
        "model_device": "cpu",
        "model_n_devices": 1,
        "use_wandb": False,
        "shuffle_tokens": True,
        "prefix_str": None,
        "suffix_str": None,
        "ignore_positions": None,
        "prepend_bos": True,
        "ignore_high_activation_norm_multiple": SINK_NORM_MULTIPLE if record_settings.get("drop_sinks") else None,
        "free_unused_model_layers": False,
        "hf_model_path": None,
        "use_transcoder": False,
        "use_skip_transcoder": False,
        "use_clt": False,
        "clt_layer_idx": None,
        "clt_dtype": "",
        "clt_weights_filename": "",
        "sae_converter_name": None,
        "use_huggingface": False,
        "output_neuronpedia_exports": False,
        "neuronpedia_creator_name": about.creator,
        "neuronpedia_creator_id": CREATOR,
        "neuronpedia_release_id": ids.release,
        "neuronpedia_release_title": about.title,
        "neuronpedia_release_url": about.url,
        "neuronpedia_source_set_description": about.description,
        "neuronpedia_model_name": ids.model,
        "neuronpedia_hf_weights_repo_id": about.hub_repo,
        "neuronpedia_hf_weights_path": f"{ids.hook}/{WEIGHTS}" if about.hub_repo else None,
        "neuronpedia_zero_out_bos_token": texts.bos in excluded,
        "neuronpedia_exports_dir": None,
    }


def _group_sizes(store: Store) -> list[int]:
    """Return the largest number of texts of any latent in each group, from the strongest to the lowest interval."""
    owner = np.repeat(np.arange(store.header.d_sae), np.diff(store["example_offsets"]))
    return [int(np.bincount(owner[store["example_group"] == group], minlength=1).max()) for group in range(6)]


def _write_tokens(path: Path, tokens: np.ndarray) -> None:
    """Save the prompts, (R, T), as an int64 tensor."""
    import torch

    with path.open("wb") as file:  # given a path, torch.save hides the cause of a failure
        torch.save(torch.from_numpy(tokens.astype(np.int64)), file)
