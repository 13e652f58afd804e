"""All metrics of one SAE under the names of SAEBench and SAELens, with their known errors corrected.

`model_behavior_preservation`, `model_performance_preservation`, `reconstruction_quality`, `shrinkage`, `sparsity`,
`token_stats` and `misc_metrics` are SAEBench's groups and use its names. The differences, and their reasons:

- `explained_variance` is 1 - E|e|^2 / (E|x|^2 - |E x|^2) over the whole text, in float64. SAEBench 0.6.0 takes the mean
  of x squared for the mean of x, which makes the value depend on the unit of x. `explained_variance_legacy`, the mean
  over tokens of 1 - |e|^2 / |x - mean of the batch|^2, is what SAEBench's paper reports; it depends on the batches.
- `mse` is E|e|^2, summed over the dimensions. SAEBench divides it by the number of tokens once more.
- `relative_reconstruction_bias` is E|x_hat|^2 / E[x . x_hat] over the whole text, not a mean of batches' ratios.
- The ablation, like the SAE, leaves BOS and sinks unchanged; see `bridge.evaluate.splice`. `..._with_ablation` is zero
  ablation; mean ablation has names of its own.

Scores: `ce_loss_score` = (CE_ablation - CE_sae) / (CE_ablation - CE), `kl_div_score` = (KL_ablation - KL_sae) /
KL_ablation. A perfect SAE scores 1, one no better than the ablation 0. Undefined values (a division by zero) are NaN.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from bridge.evaluate import latents
from bridge.evaluate.site import Site
from bridge.evaluate.splice import Effect, effects
from bridge.evaluate.survey import Survey, survey
from bridge.torch_sae import TorchSAE
from jsae import metrics

PASSES = 5
"""Passes of `measure` over the text; one of them runs the model only up to the hook, three only the blocks after it."""


def measure(
    site: Site, sae: TorchSAE, rows: Int[np.ndarray, "R T"], token_bytes: Int[np.ndarray, " V"]
) -> tuple[dict[str, Any], latents.Columns]:
    """Return all metrics of one SAE on held-out text.

    Args:
      site: the activation that the SAE reads, in a model that returns logits.
      sae: of the model's width, on the model's device.
      rows: held-out token ids, (R, T); the model reads them `PASSES` times.
      token_bytes: the length in bytes of every token, (V,).

    Returns:
      The metrics, by group, together with those of `jsae.metrics.summarize`; and the columns of `latents.columns`.

    Raises:
      ValueError: the SAE has another width, there is no text or only BOS, or activations are not finite.
    """
    batches = site.batches(rows, max(sae.d_sae, len(token_bytes)))
    statistics = survey(site, sae, batches)
    if statistics.sums.nonfinite:
        raise ValueError(
            f"{int(statistics.sums.nonfinite)} numbers of {site.hook_name} are not finite: the model is broken"
        )
    plain = metrics.summarize(statistics.sums)
    mean = np.asarray(statistics.sums.total / statistics.sums.tokens, np.float32)
    variants = effects(site, sae, batches, mean, token_bytes)
    columns = latents.columns(sae, statistics)
    groups = {
        **preservation(variants),
        **_activations(statistics, plain),
        "token_stats": {
            "total_tokens_eval_reconstruction": rows.size,
            "total_tokens_eval_sparsity_variance": int(statistics.sums.tokens),
        },
        "misc_metrics": latents.misc_metrics(columns),
        "latents": latents.summary(columns),
        "density_histogram": metrics.histogram(columns["feature_density"], plain["tokens"]),
    }
    return {name: value for name, value in plain.items() if name != "loss"} | groups, columns


def finite(value: Any) -> Any:
    """Return a value that JSON can hold: NaN and infinities become None, arrays become lists, at any depth."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return finite(value.tolist())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [finite(item) for item in value]
    if isinstance(value, np.generic):
        return finite(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def preservation(variants: dict[str, Effect]) -> dict[str, dict[str, float]]:
    """Return how well the model is preserved, from `effects`: divergence, loss and bits per byte, with scores."""
    divergence = {name: effect.divergence for name, effect in variants.items()}
    loss = {name: effect.cross_entropy for name, effect in variants.items()}
    behavior = {f"kl_div_{name}": value for name, value in divergence.items() if name != "without_sae"}
    return {
        "model_behavior_preservation": {
            "kl_div_score": _score(divergence, "with_ablation"),
            "kl_div_score_mean_ablation": _score(divergence, "with_mean_ablation"),
            **behavior,
        },
        "model_performance_preservation": {
            "ce_loss_score": _score(loss, "with_ablation"),
            "ce_loss_score_mean_ablation": _score(loss, "with_mean_ablation"),
            **{f"ce_loss_{name}": value for name, value in loss.items()},
        },
        "bits_per_byte": {name: effect.bits_per_byte for name, effect in variants.items()},
    }


def _score(values: dict[str, float], ablation: str) -> float:
    """Return the share of the ablation's damage that the SAE avoids; NaN if the ablation does none."""
    damage = values[ablation] - values["without_sae"]
    return (values[ablation] - values["with_sae"]) / damage if damage else math.nan


def _activations(statistics: Survey, plain: dict[str, float]) -> dict[str, dict[str, float]]:
    """Return how well activations are reconstructed, and with how many latents."""
    n = plain["tokens"]
    return {
        "reconstruction_quality": {
            "explained_variance": plain["explained_variance"],
            "explained_variance_legacy": plain["explained_variance_legacy"],
            "mse": plain["mse"],
            "cossim": plain["cosine"],
        },
        "shrinkage": {
            "l2_norm_in": statistics.norm / n,
            "l2_norm_out": statistics.norm_hat / n,
            "l2_ratio": plain["l2_ratio"],
            "relative_reconstruction_bias": plain["relative_reconstruction_bias"],
        },
        "sparsity": {"l0": plain["l0"], "l1": plain["l1"]},
    }
