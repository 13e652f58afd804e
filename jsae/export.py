"""Export of an SAE: a SAELens directory, with input scale and decoder norms folded into the weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors.numpy import save, save_file

from jsae import files, jsons
from jsae.architectures import ARCHITECTURES, SAEConfig
from jsae.saelens import Plain
from jsae.saelens.settings import CFG, ENCODERS, RANKED, SPARSITY, TRANSCODERS, WEIGHTS
from jsae.settings import require

SAELENS_VERSION = "6.54.12"
"""The version of the file format; SAELens reads a file without a version as a much older form."""

Arrays = Mapping[str, np.ndarray]
Scale = float | np.ndarray

_ROUNDING = 1e-6  # relative error of the norm of a float32 row


def architecture(config: SAEConfig) -> str:
    """Return SAELens's name for the exported form of an SAE.

    Raises:
      ConfigError: there is no exported form of this transcoder.
    """
    form = config.sae.form
    if not config.is_transcoder:
        return form
    names = {form: name for name, form in TRANSCODERS.items() if ("skip" in name) == config.skip}
    others = ", ".join(sae.name for sae in ARCHITECTURES.values() if sae.form in names)
    require(form in names, f"there is no exported form of a {config.architecture} transcoder: use {others}")
    return names[form]


def fold(weights: Arrays, scale: Scale, scale_out: Scale, ranked: bool = False) -> dict[str, np.ndarray]:
    """Return the weights for unscaled activations, with unit decoder rows and W_enc transposed to (d_in, d_sae).

    The SAE was trained on `scale * x`. With W_enc' = scale W_enc, W_dec' = W_dec / scale and b_dec' = b_dec / scale the
    latents are unchanged; then the norms n of the rows of W_dec' move into the latents: W_enc'' = n W_enc', and biases
    of latents are multiplied by n.

    Args:
      weights: by name, in the trainer's layout (`jsae.axes.AXES`).
      scale: the factor on the input in training, one number or one per dimension.
      scale_out: the factor on the target, which differs from `scale` only in a transcoder.
      ranked: whether the SAE selects latents by their size. If norms differ, n is then their mean for all latents:
        other factors would change the selection. Norms differ in a crosscoder and where weights were averaged.

    Returns:
      float32 arrays by name.

    Raises:
      ConfigError: a weight that is not finite, or a decoder row of norm 0.
    """
    exact = {name: np.asarray(w, np.float64) for name, w in weights.items()}
    for name, w in exact.items():
        require(bool(np.isfinite(w).all()), f"{name} holds numbers that are not finite: this SAE cannot be exported")
    scale = np.asarray(scale, np.float64)
    scale_out = np.asarray(scale_out, np.float64)
    exact["W_dec"] = exact["W_dec"] / scale_out
    exact["b_dec"] = exact["b_dec"] / scale_out
    if "W_skip" in exact:
        exact["W_skip"] = exact["W_skip"] * scale / np.reshape(scale_out, (-1, 1))
    norms = np.linalg.norm(exact["W_dec"], axis=1)
    require(bool((norms > 0).all()), f"{int((norms == 0).sum())} decoder rows have norm 0: they cannot be normalised")
    if ranked and not _are_equal(norms):
        norms = np.full_like(norms, norms.mean())
    exact["W_dec"] = exact["W_dec"] / norms[:, None]
    exact["W_enc"] = (exact["W_enc"] * scale * norms[:, None]).T
    for name in set(exact) - {"W_enc", "W_dec", "b_dec", "W_skip", "r_mag"}:  # r_mag is the log of a ratio of weights
        exact[name] = exact[name] * norms
    return {name: np.ascontiguousarray(w, np.float32) for name, w in exact.items()}


def _are_equal(norms: Float[np.ndarray, " f"]) -> bool:
    """Return whether norms of decoder rows are equal up to rounding, so that they do not change a ranking."""
    return bool(np.abs(norms / norms.mean() - 1).max() < _ROUNDING)


def plain(config: SAEConfig, weights: Arrays, scale: Scale, scale_out: Scale) -> Plain:
    """Return the SAE in plain form, for unscaled activations, with input scale and decoder norms folded.

    Args:
      config: of the SAE.
      weights: in the trainer's layout.
      scale: the factor on the input in training.
      scale_out: the factor on the target in training.

    Raises:
      ConfigError: weights that cannot be folded, arrays of latents that the SAE's form does not have, or an
        architecture without an exported form.
    """
    cfg: dict[str, Any] = {
        "architecture": architecture(config),
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": not config.is_transcoder,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": SAELENS_VERSION},
    }
    latents = set(weights) - {"W_enc", "W_dec", "b_dec", "W_skip"}
    expected = ENCODERS[config.sae.form]
    require(
        latents == set(expected),
        f"{config.architecture} is exported as a {config.sae.form} SAE, which has the arrays of latents "
        f"{', '.join(expected)}, but its inference_arrays are {', '.join(sorted(latents)) or 'none'}",
    )
    if config.is_transcoder:
        cfg["d_out"] = config.width_out
    ranked = cfg["architecture"] in RANKED
    if ranked:
        cfg |= {"k": config.k, "rescale_acts_by_decoder_norm": False}
    return Plain(cfg, fold(weights, scale, scale_out, ranked), config.layers)


def write(
    folder: Path,
    config: SAEConfig,
    weights: Arrays,
    scale: Scale,
    scale_out: Scale,
    metadata: Mapping[str, Any],
) -> None:
    """Write the SAE of a training state as a SAELens directory: `plain`, then `write_plain`.

    Args:
      folder: to create; an existing export is replaced.
      config: of the SAE.
      weights: in the trainer's layout.
      scale: the factor on the input in training.
      scale_out: the factor on the target in training.
      metadata: SAELens's metadata: model_name, hook_name, context_size, prepend_bos and more.

    Raises:
      ConfigError: weights that cannot be folded, or an architecture without an exported form.
      OSError: the folder cannot be written, for example because the disk is full; an earlier export is kept.
    """
    write_plain(folder, plain(config, weights, scale, scale_out), metadata)


def write_plain(folder: Path, sae: Plain, metadata: Mapping[str, Any]) -> None:
    """Write `cfg.json` and `sae_weights.safetensors` into `folder`, whole or not at all.

    A crosscoder's directory has the same files in its own layout: architecture `crosscoder` with the encoder's form
    under `activation`, `W_enc` (layers, d, d_sae), `W_dec` (d_sae, layers, d), `b_dec` (layers, d), and `d_in` the
    width of one layer; a decoder row has norm 1 over all its layers (approximately for `RANKED` forms, see `fold`).

    A TopK or AbsTopK SAE with unit decoder rows sets `rescale_acts_by_decoder_norm`, as SAELens's own do: this does not
    change the latents, and SAELens folds decoder norms only if it is set.

    Args:
      folder: to create; an existing export is replaced.
      sae: the SAE.
      metadata: added to the SAE's own.

    Raises:
      OSError: the folder cannot be written, for example because the disk is full; an earlier export is kept.
    """
    cfg, weights, layers = dict(sae.cfg), dict(sae.weights), sae.layers
    cfg["metadata"] = cfg["metadata"] | metadata
    if cfg["architecture"] in RANKED:
        norms = np.linalg.norm(weights["W_dec"].astype(np.float64), axis=1)
        cfg["rescale_acts_by_decoder_norm"] = layers == 1 and bool(np.abs(norms - 1).max() < _ROUNDING)
    if layers > 1:
        cfg |= {"architecture": "crosscoder", "activation": cfg["architecture"], "layers": layers}
        cfg["d_in"] = d = cfg["d_in"] // layers
        weights["W_enc"] = weights["W_enc"].reshape(layers, d, -1)
        weights["W_dec"] = weights["W_dec"].reshape(-1, layers, d)
        weights["b_dec"] = weights["b_dec"].reshape(layers, d)
    with files.replacing_folder(folder) as partial:
        save_file(weights, partial / WEIGHTS)
        (partial / CFG).write_text(json.dumps(cfg, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def mark(folder: Path, problem: str) -> None:
    """Write `problem`, the reason why an SAE is of no use, into the metadata of its export; SAELens keeps it.

    Raises:
      OSError: the file cannot be written.
    """
    path = folder / CFG
    cfg = jsons.read(path)
    cfg["metadata"]["problem"] = problem
    files.write(path, json.dumps(cfg, indent=2, allow_nan=False) + "\n")


def write_sparsity(folder: Path, density: Float[np.ndarray, " f"]) -> None:
    """Write `sparsity.safetensors`: log10 of the fraction of tokens on which each latent fires, plus 1e-10.

    Raises:
      OSError: the file cannot be written; an earlier one is kept.
    """
    files.write(folder / SPARSITY, save({"sparsity": np.log10(density + 1e-10).astype(np.float32)}))
