"""SAEDashboard's side of the `dashboard` measurement. Run by path in an environment of its own, which has no jsae.

Builds a GPT-2 with random weights and its activations, then computes the dashboards once for every line on stdin, as
SAEDashboard's own NeuronpediaRunner does, and answers each with a line of JSON.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import peer_protocol  # beside this file

_PACKAGES = ("sae-dashboard", "sae-lens", "transformer-lens", "torch", "numpy")


def main(folder: Path) -> None:
    """Do the job that `job.json` in `folder` describes, once for every line on stdin."""
    answers = peer_protocol.open_answers()
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    model, sae, tokens = _subjects(folder, job)
    _activations(folder, job, model, sae, tokens)
    peer_protocol.answer(answers, {"versions": peer_protocol.versions(*_PACKAGES)})
    for _ in peer_protocol.jobs():
        peer_protocol.answer(answers, _round(folder, job, model, sae, tokens))


def _subjects(folder: Path, job: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Return the model, the SAE and the tokens; write the unembedding for the other side."""
    import numpy as np
    import torch
    from sae_lens import SAE, HookedSAETransformer
    from transformer_lens import HookedTransformerConfig

    if job["threads"] is not None:
        torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    config = HookedTransformerConfig(
        n_layers=job["layers"],
        d_model=job["d_model"],
        n_ctx=job["length"],
        d_head=job["d_model"] // 4,
        n_heads=4,
        d_mlp=4 * job["d_model"],
        d_vocab=job["vocab_size"],
        act_fn="gelu_new",
        normalization_type="LN",
        device="cpu",
    )
    model = HookedSAETransformer(config).eval()
    np.save(folder / "unembed.npy", model.W_U.detach().numpy().T)
    sae = SAE.load_from_disk(folder / "sae" / job["hook"], device="cpu")
    sae.cfg.rescale_acts_by_decoder_norm = True  # required by its runner; no effect on rows of norm 1
    return model, sae, torch.from_numpy(np.load(folder / "tokens.npy"))


def _config(folder: Path, job: dict[str, Any], features: list[int]) -> Any:
    """Return the config that NeuronpediaRunner gives to SaeVisRunner for a batch of features, with its defaults."""
    from sae_dashboard.components_config import (
        ActsHistogramConfig,
        Column,
        FeatureTablesConfig,
        LogitsHistogramConfig,
        LogitsTableConfig,
        SequencesConfig,
    )
    from sae_dashboard.layout import SaeVisLayoutConfig
    from sae_dashboard.sae_vis_data import SaeVisConfig

    parts = (
        SequencesConfig(
            stack_mode="stack-all",
            buffer=None,
            compute_buffer=True,
            n_quantiles=5,
            top_acts_group_size=20,
            quantile_group_size=5,
        ),
        ActsHistogramConfig(),
        LogitsHistogramConfig(),
        LogitsTableConfig(),
        FeatureTablesConfig(n_rows=3),
    )
    return SaeVisConfig(
        hook_point=job["hook"],
        features=features,
        minibatch_size_features=128,
        minibatch_size_tokens=32,
        quantile_feature_batch_size=64,
        verbose=False,
        device="cpu",
        feature_centric_layout=SaeVisLayoutConfig(columns=[Column(*parts)]),
        dtype="float32",
        cache_dir=folder / "activations",
        ignore_tokens={job["bos"]},
    )


def _activations(folder: Path, job: dict[str, Any], model: Any, sae: Any, tokens: Any) -> None:
    """Run the model once over all tokens; SAEDashboard keeps the activations in files, which both sides read."""
    import torch
    from sae_dashboard.sae_vis_runner import FeatureDataGeneratorFactory

    config = _config(folder, job, [0])
    config.cache_dir.mkdir(exist_ok=True)
    generator = FeatureDataGeneratorFactory.create(config, model, sae, tokens)
    with torch.inference_mode():
        for i, batch in enumerate(generator.token_minibatches):
            generator.get_model_acts(i, batch)


def _round(folder: Path, job: dict[str, Any], model: Any, sae: Any, tokens: Any) -> dict[str, Any]:
    """Compute all features, batch after batch, and write their JSON; return the seconds without and with the JSON."""
    from sae_dashboard.neuronpedia.neuronpedia_converter import NeuronpediaConverter
    from sae_dashboard.neuronpedia.neuronpedia_runner_config import NeuronpediaRunnerConfig
    from sae_dashboard.sae_vis_runner import SaeVisRunner

    words = {i: f" t{i}" for i in range(job["vocab_size"])}
    names = NeuronpediaRunnerConfig(sae_set="toy", sae_path="", outputs_dir="", n_prompts_total=len(tokens))
    names.model_id, names.layer = "toy", job["layers"] // 2
    seconds = {"records": 0.0, "files": 0.0}
    for number, first in enumerate(range(0, job["d_sae"], 128)):
        start = time.perf_counter()
        features = list(range(first, min(first + 128, job["d_sae"])))
        dashboards = SaeVisRunner(_config(folder, job, features)).run(encoder=sae, model=model, tokens=tokens)
        seconds["records"] += time.perf_counter() - start
        text = NeuronpediaConverter.convert_to_np_json(model, dashboards, names, words)
        (folder / f"batch-{number}.json").write_text(text, encoding="utf-8")
        seconds["files"] += time.perf_counter() - start
    return seconds


if __name__ == "__main__":
    main(Path(sys.argv[1]))
