"""Read the weights of a SAELens directory, folded to the plain form that jsae and bridge compute with."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from jsae import jsons
from jsae.files import is_system_error
from jsae.saelens import config
from jsae.saelens.folding import fold
from jsae.saelens.repository import is_address, local_folder
from jsae.saelens.settings import CHECKPOINTS, WEIGHTS, Settings


class Plain(NamedTuple):
    """An SAE in plain form: `f = act((x - b_dec) W_enc + b)`, `y = f W_dec + b_dec (+ x W_skip^T)`.

    A transcoder does not subtract `b_dec`. A crosscoder is one SAE of its layers side by side.
    """

    cfg: dict[str, Any]
    """Settings by SAELens's names, as in an export of jsae; `d_in` is the width of all layers."""
    weights: dict[str, np.ndarray]
    """float32: `W_enc` (d_in, d_sae), `W_dec` (d_sae, d_out), `b_dec` (d_out,), arrays of latents (d_sae,), and
    `W_skip` (d_out, d_in) of a transcoder with a skip path."""
    layers: int
    """Layers of a crosscoder; 1 for everything else."""


def read(path: str | Path) -> Plain:
    """Read a SAELens directory, `cfg.json` and `sae_weights.safetensors`, of any version of SAELens.

    Weights are rounded to the file's `dtype`, as SAELens does. Settings that can be folded exactly are folded into the
    weights (`jsae.saelens.folding`), and `cfg` has the folded values.

    Args:
      path: the directory, or `hf://owner/name[@revision]/folder` on the Hugging Face hub.

    Raises:
      FileNotFoundError: no such directory, or a file in it is missing.
      ValueError: a broken file, a setting that is unknown or not supported, an array that is missing, unexpected or of
        another shape or type, or numbers that are not finite; names file and setting.
      ImportError: an address on the hub, and huggingface_hub is not installed.
    """
    settings = config.read(local_folder(path) if is_address(path) else path)
    file = settings.folder / WEIGHTS
    try:
        file.open("rb").close()  # safetensors reports every file that it cannot open as missing
        weights = {name: rounded(array, settings.dtype) for name, array in _arrays(file, settings).items()}
    except (SafetensorError, OSError) as error:
        if isinstance(error, FileNotFoundError) or is_system_error(error):
            raise
        raise ValueError(f"{settings.folder} holds a broken export: {WEIGHTS} is broken: {error}") from error
    _require_finite(file, weights, f" in {settings.dtype}")
    weights = fold(settings, weights)
    _require_finite(file, weights, " once its settings are folded into the weights")
    return Plain(_plain(settings), weights, settings.layers or 1)


def rounded(array: np.ndarray, dtype: str) -> np.ndarray:
    """Return an array in float32, rounded to a type first: float64, float32, float16 or bfloat16."""
    with np.errstate(over="ignore"):  # numbers out of the type's range become infinite
        array = array.astype(np.float32)
        if dtype == "float16":
            return array.astype(np.float16).astype(np.float32)
    if dtype != "bfloat16":
        return array
    bits = array.view(np.uint32)  # round half to even
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return np.where(np.isfinite(array), nearest.view(np.float32), array)


def _arrays(file: Path, settings: Settings) -> dict[str, np.ndarray]:
    """Return the arrays of a file, after a check of its header."""
    names = settings.checked()
    with safe_open(file, framework="numpy") as opened:
        kinds = {name: opened.get_slice(name).get_dtype() for name in names}
        arrays = {name: opened.get_tensor(name) for name in names if kinds[name] != "BF16"}
    return arrays | _bfloat16(file, {name: names[name] for name in names if kinds[name] == "BF16"})


def _bfloat16(file: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Return bfloat16 arrays, which numpy lacks, in float32. safetensors has already checked the file."""
    with file.open("rb") as opened:
        start = 8 + int.from_bytes(opened.read(8), "little")
        header = jsons.loads(opened.read(start - 8)) if shapes else {}
        arrays = {}
        for name, shape in shapes.items():
            first, last = header[name]["data_offsets"]
            opened.seek(start + first)
            halves = np.frombuffer(opened.read(last - first), "<u2").astype(np.uint32)
            arrays[name] = (halves << np.uint32(16)).view(np.float32).reshape(shape)
    return arrays


def _require_finite(file: Path, weights: dict[str, np.ndarray], where: str) -> None:
    for name, weight in weights.items():
        if not np.isfinite(weight).all():
            raise ValueError(f"{file}: {name} holds numbers that are not finite{where}")


def _plain(settings: Settings) -> dict[str, Any]:
    """Return the settings that belong to the folded weights, as in an export of jsae."""
    layers = settings.layers or 1
    cfg: dict[str, Any] = {
        "architecture": "jumprelu" if settings.architecture in CHECKPOINTS else settings.architecture,
        "d_in": layers * settings.d_in,
        "d_sae": settings.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": not settings.is_transcoder,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": settings.metadata,
    }
    if settings.is_transcoder:
        cfg["d_out"] = settings.d_out
    if settings.k is not None:
        cfg |= {"k": settings.k, "rescale_acts_by_decoder_norm": False}
    return cfg
