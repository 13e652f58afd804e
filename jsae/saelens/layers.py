"""One layer of a crosscoder as an SAE of its own, which every tool that reads SAELens directories can use."""

import numpy as np
from jaxtyping import Bool, Float

from jsae.saelens.reading import Plain
from jsae.saelens.settings import ENCODERS
from jsae.settings import require

LEAST_SHARE = 0.02
"""Share of a latent's pre-activation below which a layer does not have the latent."""


def single(crosscoder: Plain, layer: int) -> Plain:
    """Return the SAE that reads and reconstructs one layer of a crosscoder, with the same latents in the same order.

    A crosscoder adds up what its encoder reads in all layers. Where only latent j fires, with value v, layer l is
    x_l = v d_jl + b_l, and adds v e_jl d_jl. So its share of the sum is s_jl = e_jl d_jl / sum_m e_jm d_jm, and
    e_jl / s_jl alone reads v. That is the encoder of the SAE; biases and thresholds are the crosscoder's. A latent
    whose share is below `LEAST_SHARE` is silent: it reads nothing and never fires, and its decoder row is the first
    axis.

    Decoder rows keep their norms in the layer, so a latent has the value that it has in the crosscoder.

    Args:
      crosscoder: in plain form.
      layer: from 0.

    Raises:
      ConfigError: it is no crosscoder, or has no such layer.
    """
    require(
        crosscoder.layers > 1 and 0 <= layer < crosscoder.layers,
        f"layer {layer} of an SAE of {crosscoder.layers} layer(s): give a layer of a crosscoder, counted from 0",
    )
    weights = crosscoder.weights
    width = crosscoder.cfg["d_in"] // crosscoder.layers
    own = slice(layer * width, (layer + 1) * width)
    share = shares(crosscoder)[:, layer]
    silent = share < LEAST_SHARE
    form = crosscoder.cfg["architecture"]
    of_layer = {
        "W_enc": weights["W_enc"][own] / np.where(silent, np.inf, share),
        "W_dec": np.where(silent[:, None], np.eye(1, width), weights["W_dec"][:, own]),
        "b_dec": weights["b_dec"][own],
        **_latents({name: weights[name] for name in ENCODERS[form]}, silent, 0.0 if form == "abstopk" else -1.0),
    }
    plain = {name: np.ascontiguousarray(array, np.float32) for name, array in of_layer.items()}
    return Plain(crosscoder.cfg | {"d_in": width}, plain, 1)


def with_encoder(sae: Plain, W_enc: Float[np.ndarray, "d f"], intercept: Float[np.ndarray, " f"]) -> Plain:
    """Return the SAE of one layer with another encoder, for the latents that are not silent.

    Args:
      sae: of `single`.
      W_enc: reads the centred activations of the layer.
      intercept: is added to what it reads.
    """
    off = _silent(sae)
    weights = dict(sae.weights)
    shift = dict.fromkeys(("b_enc", "b_gate"), intercept)
    if "r_mag" in weights:  # the magnitude of a gated SAE reads the same product, rescaled
        shift["b_mag"] = intercept * np.exp(weights["r_mag"])
    for name, value in shift.items():
        if name in weights:
            weights[name] = np.where(off, weights[name], weights[name] + value).astype(np.float32)
    weights["W_enc"] = np.ascontiguousarray(np.where(off, 0, W_enc), np.float32)
    return Plain(sae.cfg, weights, 1)


def _silent(sae: Plain) -> Bool[np.ndarray, " f"]:
    """Return which latents of a layer's SAE read nothing."""
    return np.abs(sae.weights["W_enc"]).max(axis=0) == 0


def shares(crosscoder: Plain) -> Float[np.ndarray, "f layers"]:
    """Return the share that every layer has in the pre-activation of a latent that fires alone; from 0 to 1."""
    enc, dec = crosscoder.weights["W_enc"].T, crosscoder.weights["W_dec"]
    products = (enc.astype(np.float64) * dec).reshape(len(dec), crosscoder.layers, -1).sum(2).clip(min=0)
    total = products.sum(1, keepdims=True)
    return products / np.where(total > 0, total, 1)


def _latents(arrays: dict[str, np.ndarray], silent: Bool[np.ndarray, " f"], bias: float) -> dict[str, np.ndarray]:
    """Return arrays of latents with which silent ones never fire: their pre-activation or gate is `bias`."""
    off = {"b_enc": bias, "b_gate": -1.0, "b_mag": 0.0, "r_mag": 0.0, "threshold": 0.0}
    return {name: np.where(silent, np.float32(off[name]), array) for name, array in arrays.items()}
