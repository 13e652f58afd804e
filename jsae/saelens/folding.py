"""Exact folding of an SAE's settings into its weights, so that one plain form computes the same as every file."""

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open

from jsae import jsons
from jsae.files import is_system_error
from jsae.saelens.settings import CHECKPOINTS, FACTORS, SCALER, WHITENING, Settings, shown

_COLUMNS = 8192  # columns of W_enc that are converted to float64 at a time
_ROUNDING = 1e-6  # relative error of the norm of a float32 row: closer to 1, it is 1

Weights = dict[str, np.ndarray]


def fold(settings: Settings, weights: Weights) -> Weights:
    """Return the weights of the same SAE in plain form: `f = act((x - b_dec) W_enc + b)`, `y = f W_dec + b_dec`.

    Folded in this order: input statistics that a training checkpoint stores beside the weights, decoder norms that
    rescale latents, the threshold of a BatchTopK checkpoint, factors learned in finetuning, and the bias if it is not
    subtracted from the input. Latents are equal to SAELens's. A transcoder subtracts no bias in any form.

    Args:
      settings: of the file.
      weights: float32, by name, with the shapes of `Settings.checked`.

    Raises:
      ValueError: statistics that are missing or broken, decoder rows of norm 0 where norms are divided by, or factors
        that contradict the settings.
    """
    weights = dict(weights)
    if "log_threshold" in weights:
        weights["threshold"] = np.exp(weights.pop("log_threshold"))
    if settings.layers is not None:
        weights = _side_by_side(settings, weights)
    factors = _factors(settings, weights)
    rescales = settings.rescales
    if settings.normalization == "covariance_whitening":
        if rescales:  # the norms that rank are those before the rows are mapped back
            weights, rescales = _norms(settings, weights), False
        weights = _whitening(settings, weights)
    elif settings.normalization == "expected_average_only_in":
        weights = _scale(settings, weights)
    if rescales:
        weights = _norms(settings, weights)
    if settings.architecture in CHECKPOINTS:
        weights["threshold"] = np.full(settings.d_sae, weights.pop("topk_threshold"), np.float32)
    if factors is not None:
        weights["W_dec"] = weights["W_dec"] * factors[:, None]
    if not settings.subtracts_b_dec and not settings.is_transcoder:
        weights = _shifted(weights, weights["b_dec"])
    return weights


def _side_by_side(settings: Settings, weights: Weights) -> Weights:
    """Return a crosscoder's arrays, reshaped to one SAE of its layers side by side."""
    flat = {"W_enc": (-1, settings.d_sae), "W_dec": (settings.d_sae, -1), "b_dec": (-1,)}
    return weights | {name: weights[name].reshape(shape) for name, shape in flat.items()}


def _norms(settings: Settings, weights: Weights) -> Weights:
    """Rescale latents to unit decoder rows: multiply `W_enc` and biases by the norms, divide `W_dec` by them."""
    squares = np.einsum("fo,fo->f", weights["W_dec"], weights["W_dec"], dtype=np.float64)
    norms = np.sqrt(squares).astype(np.float32)
    zeros = int((norms == 0).sum())
    if zeros:
        raise ValueError(
            f"{settings.folder}: rescale_acts_by_decoder_norm divides by the norms of decoder rows, and {zeros} are 0"
        )
    norms = np.where(np.abs(norms - 1) < _ROUNDING, np.float32(1), norms)
    scaled = {"W_enc": weights["W_enc"] * norms, "W_dec": weights["W_dec"] / norms[:, None]}
    return weights | scaled | {"b_enc": weights["b_enc"] * norms}


def _factors(settings: Settings, weights: Weights) -> Float[np.ndarray, " f"] | None:
    """Remove the factors on latents before decoding from the weights; return them, or None if they are 1."""
    names = [name for name in FACTORS if name in weights]
    if len(names) > 1:
        raise ValueError(f"{settings.folder}: the weights hold both {' and '.join(names)}: expected one of them")
    factors = weights.pop(names[0]) if names else None
    if names and np.allclose(factors, 1):
        return None
    if settings.finetuned != bool(names):
        contents = f"the weights hold {names[0]}" if names else f"the weights hold no {FACTORS[0]}"
        raise ValueError(
            f"{settings.folder}: finetuning_scaling_factor is {str(settings.finetuned).lower()}, but {contents}: one "
            "of them belongs to another SAE"
        )
    if names and settings.rescales:
        raise ValueError(
            f"{settings.folder}: finetuning_scaling_factor and rescale_acts_by_decoder_norm exclude each other"
        )
    return factors


def _scale(settings: Settings, weights: Weights) -> Weights:
    """Fold the input scale s: multiply `W_enc` by s; divide `W_dec`, `b_dec` and a rescaled threshold by s."""
    scale = _scaler(settings).get("scaling_factor")
    if not jsons.is_finite(scale) or scale <= 0:
        raise ValueError(f"{settings.folder / SCALER}: scaling_factor is {shown(scale)}: expected a number above 0")
    folded = {"W_enc": weights["W_enc"] * scale, "W_dec": weights["W_dec"] / scale, "b_dec": weights["b_dec"] / scale}
    if "topk_threshold" in weights and settings.rescales:
        folded["topk_threshold"] = weights["topk_threshold"] / scale
    return weights | folded


def _whitening(settings: Settings, weights: Weights) -> Weights:
    """Fold the whitening `(x - mean) M` of the input, as `fold_activation_whitening` of SAELens does."""
    if _scaler(settings).get("has_whitening") is False:
        raise ValueError(f"{settings.folder / SCALER}: has_whitening is false, but normalize_activations asks for it")
    file, d = settings.folder / WHITENING, settings.d_in
    expected = {"mean": (d,), "matrix": (d, d), "inverse_matrix": (d, d)}
    try:
        file.open("rb").close()  # safetensors reports every file that it cannot open as missing
        with safe_open(file, framework="numpy") as opened:
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
            if shapes != expected:
                raise ValueError(f"expected {expected}")
            mean, matrix, inverse = (opened.get_tensor(name).astype(np.float64) for name in expected)
    except (SafetensorError, OSError, ValueError) as error:
        if is_system_error(error):
            raise
        raise ValueError(f"{file} is missing or broken: {error}. Export the SAE by save_inference_model") from error
    folded = {
        "W_enc": _float32(matrix @ weights["W_enc"].astype(np.float64)),
        "W_dec": _float32(weights["W_dec"].astype(np.float64) @ inverse),
        "b_dec": _float32(weights["b_dec"].astype(np.float64) @ inverse + mean),
    }
    weights = weights | folded
    # If b_dec is subtracted from the input, the folded b_dec subtracts the mean too.
    return weights if settings.subtracts_b_dec else _shifted(weights, -mean)


def _shifted(weights: Weights, by: Float[np.ndarray, " d"]) -> Weights:
    """Return weights whose pre-activations of `x - by` equal those of `x` before: biases gain `by W_enc`."""
    W_enc, by = weights["W_enc"], by.astype(np.float64)
    parts = (W_enc[:, start : start + _COLUMNS] for start in range(0, W_enc.shape[1], _COLUMNS))
    gain = np.concatenate([by @ part.astype(np.float64) for part in parts])
    gains = {"b_enc": gain, "b_gate": gain}
    if "r_mag" in weights:
        gains["b_mag"] = gain * np.exp(weights["r_mag"].astype(np.float64))
    return weights | {name: _float32(weights[name] + g) for name, g in gains.items() if name in weights}


def _float32(array: np.ndarray) -> np.ndarray:
    """Return an array in float32; numbers out of its range become infinite."""
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def _scaler(settings: Settings) -> dict:
    """Return the statistics that SAELens's trainer stores beside the weights of a checkpoint."""
    file = settings.folder / SCALER
    if not file.is_file():
        raise ValueError(
            f"{settings.folder / 'cfg.json'}: normalize_activations is {settings.normalization!r}, but its statistics "
            f"are missing ({SCALER}): inputs would not be scaled. Export the SAE by save_inference_model"
        )
    try:
        if file.stat().st_size > 2**16:
            raise ValueError("it is too large")
        statistics = jsons.loads(file.read_text(encoding="utf-8"))
        if not isinstance(statistics, dict):
            raise ValueError(f"expected an object, not {type(statistics).__name__}")
    except ValueError as error:
        raise ValueError(f"{file} is broken: {error}") from error
    return statistics
