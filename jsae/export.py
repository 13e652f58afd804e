"""The exported SAE: a SAELens directory, with input scale and decoder norms folded into the weights. numpy only."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors.numpy import save_file

from jsae.config import SAEConfig, require

SAELENS_VERSION = "6.54.12"
"""The version of the file format; SAELens reads a file without one as a much older form."""

ARCHITECTURES: Mapping[str, str] = {"topk": "topk", "relu": "standard", "gated": "gated"}
"""Names here to names in SAELens."""

Arrays = Mapping[str, np.ndarray]


def fold(weights: Arrays, scale: float) -> dict[str, np.ndarray]:
    """The same SAE for activations as the model has them, with unit decoder rows, W_enc turned to (d_in, d_sae).

    Trained on `scale * x`. With W_enc' = scale W_enc, W_dec' = W_dec / scale and b_dec' = b_dec / scale the latents
    stay as they are; then row norms n of W_dec' move into the latents: W_enc'' = n W_enc', biases of latents times n.

    Args:
      weights: by name, in the trainer's layout (`jsae.axes.AXES`).
      scale: the factor on activations in training.

    Raises:
      ConfigError: a weight that is not finite, or a decoder row of norm 0.
    """
    exact = {name: np.asarray(w, np.float64) for name, w in weights.items()}
    for name, w in exact.items():
        require(bool(np.isfinite(w).all()), f"{name} holds numbers that are not finite: this SAE cannot be exported")
    exact["W_dec"] = exact["W_dec"] / scale
    exact["b_dec"] = exact["b_dec"] / scale
    norms = np.linalg.norm(exact["W_dec"], axis=1)
    require(bool((norms > 0).all()), f"{int((norms == 0).sum())} decoder rows have norm 0: they cannot be normalised")
    exact["W_dec"] = exact["W_dec"] / norms[:, None]
    exact["W_enc"] = (exact["W_enc"] * scale * norms[:, None]).T
    for name in set(exact) - {"W_enc", "W_dec", "b_dec", "r_mag"}:  # r_mag is the log of a ratio of weights
        exact[name] = exact[name] * norms
    return {name: np.ascontiguousarray(w, np.float32) for name, w in exact.items()}


def write(folder: Path, config: SAEConfig, weights: Arrays, scale: float, metadata: Mapping[str, Any]) -> None:
    """Writes `cfg.json` and `sae_weights.safetensors` into `folder`, whole or not at all.

    Args:
      folder: made new; an export that is there is replaced.
      config: the SAE's.
      weights: in the trainer's layout.
      scale: the factor on activations in training.
      metadata: what SAELens keeps about an SAE: model_name, hook_name, context_size, prepend_bos and more.

    Raises:
      ConfigError: weights that cannot be folded.
    """
    cfg: dict[str, Any] = {
        "architecture": ARCHITECTURES[config.architecture],
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": SAELENS_VERSION, **metadata},
    }
    if config.architecture == "topk":
        cfg |= {"k": config.k, "rescale_acts_by_decoder_norm": False}
    folded = fold(weights, scale)
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    save_file(folded, unfinished / "sae_weights.safetensors")
    (unfinished / "cfg.json").write_text(json.dumps(cfg, indent=2, allow_nan=False) + "\n")
    outdated = folder.with_name(folder.name + ".outdated")
    if folder.exists():
        folder.replace(outdated)
    unfinished.replace(folder)
    shutil.rmtree(outdated, ignore_errors=True)


def write_sparsity(folder: Path, density: Float[np.ndarray, " f"]) -> None:
    """Writes `sparsity.safetensors`: log10 of the share of tokens on which each latent fires, plus 1e-10."""
    save_file({"sparsity": np.log10(density + 1e-10).astype(np.float32)}, folder / "sparsity.safetensors")
