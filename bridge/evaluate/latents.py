"""Statistics per latent: how often it fires, and cosines between its weights and those of other latents."""

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from bridge.evaluate.survey import Survey
from bridge.torch_sae import TorchSAE
from jsae import metrics

DUPLICATE_COSINE = 0.95
"""Latents whose decoder rows have a greater cosine than this count as duplicated, both of them."""
_CHUNK = 1024  # latents compared with all others at once

Columns = dict[str, np.ndarray]
"""Columns by name, each with one number per latent, (f,)."""


def columns(sae: TorchSAE, survey: Survey) -> Columns:
    """Return statistics of every latent, under the names of SAELens and SAEBench.

    `feature_density`: share of tokens on which it fires; `consistent_activation_heuristic`: firings per row of text in
    which it fires, NaN if it never does; `encoder_bias` (`b_mag` of a gated SAE), `encoder_norm`,
    `encoder_decoder_cosine_sim`; `max_encoder_cosine_sim` and `max_decoder_cosine_sim`: the greatest cosine with
    another latent, NaN where there is no other.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        consistent = np.asarray(survey.sums.fired, np.float64) / survey.rows_fired
    reads, writes = sae.W_enc.double().T, sae.W_dec.double()
    bias = sae.b_mag if sae.architecture == "gated" else sae.b_enc
    return {
        "feature_density": metrics.density(survey.sums),
        "consistent_activation_heuristic": consistent,
        "encoder_bias": bias.double().cpu().numpy(),
        "encoder_norm": reads.norm(dim=1).cpu().numpy(),
        "encoder_decoder_cosine_sim": torch.cosine_similarity(reads, writes, dim=1).cpu().numpy(),
        "max_encoder_cosine_sim": nearest(sae.W_enc.T).cpu().numpy(),
        "max_decoder_cosine_sim": nearest(sae.W_dec).cpu().numpy(),
    }


def nearest(rows: Float[torch.Tensor, "f d"]) -> Float[torch.Tensor, " f"]:
    """Return the greatest cosine of each row with any other row, (f,); NaN if there is only one row."""
    if len(rows) < 2:
        return torch.full((len(rows),), math.nan, device=rows.device)
    unit = torch.nn.functional.normalize(rows, dim=1)
    best = []
    for start in range(0, len(unit), _CHUNK):
        cosines = unit[start : start + _CHUNK] @ unit.T
        own = torch.arange(len(cosines), device=rows.device)
        cosines[own, own + start] = -math.inf
        best.append(cosines.max(dim=1).values)
    return torch.cat(best)


def summary(table: Columns) -> dict[str, Any]:
    """Return the numbers of dead, dense and duplicated latents, and means of the columns.

    `dead` latents never fired in the text; `dense_over_1_percent` and `dense_over_10_percent` latents fired on more
    than that share of its tokens; `duplicated` latents have a decoder row close to another (`DUPLICATE_COSINE`).
    """
    density = table["feature_density"]
    alive = density > 0
    return {
        "d_sae": len(density),
        "dead": int((~alive).sum()),
        "dense_over_1_percent": int((density > 0.01).sum()),
        "dense_over_10_percent": int((density > 0.1).sum()),
        "duplicated": int((table["max_decoder_cosine_sim"] > DUPLICATE_COSINE).sum()),
        "duplicate_cosine": DUPLICATE_COSINE,
        "mean_encoder_decoder_cosine_sim": float(table["encoder_decoder_cosine_sim"].mean()),
        "mean_encoder_norm": float(table["encoder_norm"].mean()),
        "mean_encoder_bias": float(table["encoder_bias"].mean()),
        "mean_consistent_activation_heuristic": (
            float(table["consistent_activation_heuristic"][alive].mean()) if alive.any() else math.nan
        ),
    }


def misc_metrics(table: Columns) -> dict[str, float]:
    """Return SAEBench's group of that name: shares of latents; those named `normalized_...` are shares of firings."""
    density = table["feature_density"]
    total = density.sum()

    def share_of_firings(above: float) -> float:
        return float(density[density > above].sum() / total) if total > 0 else 0.0

    return {
        "freq_over_1_percent": float((density > 0.01).mean()),
        "freq_over_10_percent": float((density > 0.1).mean()),
        "normalized_freq_over_1_percent": share_of_firings(0.01),
        "normalized_freq_over_10_percent": share_of_firings(0.1),
        "average_max_encoder_cosine_sim": float(table["max_encoder_cosine_sim"].mean()),
        "average_max_decoder_cosine_sim": float(table["max_decoder_cosine_sim"].mean()),
        "frac_alive": float((density > 0).mean()),
    }
