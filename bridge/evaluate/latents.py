"""What each latent is like: how often it fires, how its weights lie to those of the others."""

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from bridge.evaluate.survey import Survey
from bridge.torch_sae import TorchSAE
from jsae import metrics

DUPLICATE_COSINE = 0.95
"""Two latents whose decoder rows have a greater cosine write nearly the same thing: both are duplicated."""
_CHUNK = 1024  # latents compared with all others at once

Columns = dict[str, np.ndarray]
"""One number per latent under each name, (f,)."""


def columns(sae: TorchSAE, found: Survey) -> Columns:
    """What is known of every latent, under SAELens's and SAEBench's names.

    `feature_density`: share of tokens on which it fires; `consistent_activation_heuristic`: firings per row of text in
    which it fires, NaN if it never does; `encoder_bias` (of a gated SAE its `b_mag`), `encoder_norm`,
    `encoder_decoder_cosine_sim`; `max_encoder_cosine_sim` and `max_decoder_cosine_sim`: the greatest cosine with
    another latent, NaN where there is no other.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        consistent = np.asarray(found.sums.fired, np.float64) / found.rows_fired
    reads, writes = sae.W_enc.double().T, sae.W_dec.double()
    bias = sae.b_mag if sae.architecture == "gated" else sae.b_enc
    return {
        "feature_density": metrics.density(found.sums),
        "consistent_activation_heuristic": consistent,
        "encoder_bias": bias.double().cpu().numpy(),
        "encoder_norm": reads.norm(dim=1).cpu().numpy(),
        "encoder_decoder_cosine_sim": torch.cosine_similarity(reads, writes, dim=1).cpu().numpy(),
        "max_encoder_cosine_sim": nearest(sae.W_enc.T).cpu().numpy(),
        "max_decoder_cosine_sim": nearest(sae.W_dec).cpu().numpy(),
    }


def nearest(rows: Float[torch.Tensor, "f d"]) -> Float[torch.Tensor, " f"]:
    """The greatest cosine of each row with any other one; NaN if there is only one row."""
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


def summary(found: Columns) -> dict[str, Any]:
    """How many latents are dead, dense and duplicated, and the means of what the columns say.

    `dead` never fired in the text that was read, `dense_over_1_percent` and `dense_over_10_percent` fired on more of
    it; `duplicated` write nearly what another one writes (`DUPLICATE_COSINE`).
    """
    density = found["feature_density"]
    alive = density > 0
    return {
        "d_sae": len(density),
        "dead": int((~alive).sum()),
        "dense_over_1_percent": int((density > 0.01).sum()),
        "dense_over_10_percent": int((density > 0.1).sum()),
        "duplicated": int((found["max_decoder_cosine_sim"] > DUPLICATE_COSINE).sum()),
        "duplicate_cosine": DUPLICATE_COSINE,
        "mean_encoder_decoder_cosine_sim": float(found["encoder_decoder_cosine_sim"].mean()),
        "mean_encoder_norm": float(found["encoder_norm"].mean()),
        "mean_encoder_bias": float(found["encoder_bias"].mean()),
        "mean_consistent_activation_heuristic": (
            float(found["consistent_activation_heuristic"][alive].mean()) if alive.any() else math.nan
        ),
    }


def misc_metrics(found: Columns) -> dict[str, float]:
    """SAEBench's group of that name; shares of latents, and of all firings for the normalised ones."""
    density = found["feature_density"]
    total = density.sum()

    def share_of_firings(above: float) -> float:
        return float(density[density > above].sum() / total) if total > 0 else 0.0

    return {
        "freq_over_1_percent": float((density > 0.01).mean()),
        "freq_over_10_percent": float((density > 0.1).mean()),
        "normalized_freq_over_1_percent": share_of_firings(0.01),
        "normalized_freq_over_10_percent": share_of_firings(0.1),
        "average_max_encoder_cosine_sim": float(found["max_encoder_cosine_sim"].mean()),
        "average_max_decoder_cosine_sim": float(found["max_decoder_cosine_sim"].mean()),
        "frac_alive": float((density > 0).mean()),
    }
