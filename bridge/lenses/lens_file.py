"""Files of lenses, and the merging of Jacobian lenses of different prompts.

A Jacobian lens is in the format of Neuronpedia and anthropics/jacobian-lens, a file of torch.save:

    {"J": {layer: float16 (C, C)}, "n_prompts": int, "source_layers": [int], "d_model": int, "provenance": {...}}

A tuned lens has `"A"` and `"b"` in the place of `"J"`, in float32, and `"signs"`. Files are not trusted: they are read
without torch's unpickler (`bridge.nanochat.torch_file`), and everything in them is checked before it is used.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from bridge.lenses.lens import FittedLens, JacobianLens, TunedLens
from bridge.nanochat import torch_file
from bridge.nanochat.names import shown
from jsae import files

_Parsed = TypeVar("_Parsed")
MOMENTS = {"A_mean": 2, "A_square": 2, "b_mean": 1, "b_square": 1}
"""Adam's moments of the matrices and biases of a tuned lens by name, with their dimensions, in an unfinished fit."""
_READ_AT = {"capture_point": "block_output", "stream_reduce": "none"}
"""The activation that a lens reads, in the words of Neuronpedia: a block's output, the only stream of a nanochat."""
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MOST_LAYERS = 2**10
_WIDEST = 2**16
_MOST_PROMPTS = 2**48
_LONGEST_TEXT = 1000


def save(
    lens: FittedLens,
    path: Path,
    dtype: torch.dtype | None = None,
    moments: Mapping[str, Mapping[int, Tensor]] | None = None,
) -> None:
    """Write a lens atomically.

    Args:
      lens: the lens.
      path: the file; its folder is created if it is missing.
      dtype: of the numbers; None is float16 for a Jacobian lens, as the format says, and float32 for a tuned one.
      moments: of an unfinished fit of a tuned lens, those of `MOMENTS`.

    Raises:
      ValueError: a number is not finite or does not fit the dtype.
      OSError: the file cannot be written; its previous content remains.
    """
    if isinstance(lens, JacobianLens):
        content: dict[str, Any] = {"J": _stored(lens.matrices, dtype or torch.float16), "n_prompts": lens.n_prompts}
    else:
        kind = dtype or torch.float32
        parts = {"A": _stored(lens.matrices, kind), "b": _stored(lens.biases, kind)}
        content = parts | {"signs": {layer: lens.signs[layer] for layer in lens.layers}}
    content |= {name: _stored(part, torch.float32) for name, part in (moments or {}).items()}
    content |= {
        "source_layers": list(lens.layers),
        "d_model": lens.width,
        "provenance": _READ_AT | dict(lens.provenance),
    }
    data = io.BytesIO()
    torch.save(content, data)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, data.getvalue())


def load(path: str | Path, device: torch.device | str = "cpu") -> FittedLens:
    """Read a lens in float32; a Jacobian lens may be another library's.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is damaged, contains more than tensors and plain values (it is never executed), or is not a lens;
        names the file and the part.
    """
    return _read(Path(path), lambda content: _parse(content, device))


def load_unfinished(
    path: Path, device: torch.device | str = "cpu"
) -> tuple[TunedLens, Mapping[str, Mapping[int, Tensor]]]:
    """Read an unfinished fit of a tuned lens: the lens, and Adam's moments by name and layer.

    Raises:
      FileNotFoundError, ValueError: as `load`; or it is no such fit.
    """

    def parse(content: Any) -> tuple[TunedLens, Mapping[str, Mapping[int, Tensor]]]:
        lens = _parse(content, device)
        if not isinstance(lens, TunedLens) or not set(MOMENTS) <= set(content):
            raise ValueError(f"a {lens.name} lens without {', '.join(MOMENTS)} is no unfinished fit of a tuned lens")
        moments = {name: _tensors(content, name, dimensions, device) for name, dimensions in MOMENTS.items()}
        for name, part in moments.items():
            sizes = {layer: len(tensor) for layer, tensor in part.items()}
            if sizes != {layer: len(matrix) for layer, matrix in lens.matrices.items()}:
                raise ValueError(f"A and {name} have other layers or widths: it is broken")
        return lens, moments

    return _read(path, parse)


def _read(path: Path, parse: Callable[[Any], _Parsed]) -> _Parsed:
    """Return what `parse` makes of the content of a file."""
    if not path.is_file():
        raise FileNotFoundError(f"no lens at {path}: fit one with `python -m experiments.lens --fit=jacobian`")
    try:
        content = torch_file.read(path)
        _check_size(content, path.stat().st_size)
        return parse(content)
    except ValueError as error:
        raise ValueError(f"{path} is not a lens that can be read: {error}") from error


def merge(lenses: Sequence[JacobianLens]) -> JacobianLens:
    """Return the lens of the prompts of several: the mean of their matrices, weighted by their numbers of prompts.

    Raises:
      ValueError: there are fewer than two, their layers, widths or models differ, or two say that they were fitted on
        the same prompts.
    """
    if len(lenses) < 2:
        raise ValueError(f"got {len(lenses)} Jacobian lenses to merge: give at least two")
    first, total = lenses[0], sum(lens.n_prompts for lens in lenses)
    for lens in lenses[1:]:
        if lens.layers != first.layers or lens.width != first.width:
            raise ValueError(
                f"lenses of layers {list(first.layers)} and width {first.width}, and of layers {list(lens.layers)} and "
                f"width {lens.width}, cannot be merged: give lenses of one model and the same layers"
            )
        _check_same(first, lens, "model_fingerprint", "models")
    _check_disjoint(lenses)
    matrices = {
        layer: sum((lens.matrices[layer] * (lens.n_prompts / total) for lens in lenses), start=torch.zeros(()))
        for layer in first.layers
    }
    provenance = {
        name: value
        for name, value in first.provenance.items()
        if all(lens.provenance.get(name) == value for lens in lenses)
    }
    return JacobianLens(matrices, total, provenance | {"merged": [part for lens in lenses for part in _parts(lens)]})


def _stored(tensors: Mapping[int, Tensor], dtype: torch.dtype) -> dict[int, Tensor]:
    """Return contiguous copies in a dtype.

    Raises:
      ValueError: a number is not finite in it.
    """
    stored = {layer: tensor.detach().to("cpu", dtype).contiguous().clone() for layer, tensor in tensors.items()}
    for layer, tensor in stored.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"layer {layer} has numbers that are not finite in {dtype}: they cannot be saved")
    return stored


# ---- reading --------------------------------------------------------------------------------------------------------


def _check_size(content: Any, size: int) -> None:
    """Raise ValueError if tensors share their numbers, so that copies of them may fill the memory."""
    parts = content.values() if type(content) is dict else ()
    tensors = [tensor for part in parts if type(part) is dict for tensor in part.values() if isinstance(tensor, Tensor)]
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if total > size:
        raise ValueError(f"its tensors have {total:,} bytes, more than the file: several are the same one")


def _parse(content: Any, device: torch.device | str) -> FittedLens:
    if type(content) is not dict:
        raise ValueError(f"it holds a {type(content).__name__}, expected a dict")
    provenance = _provenance(content.get("provenance"))
    if "J" in content:
        matrices = _tensors(content, "J", 2, device)
        n_prompts = content.get("n_prompts")
        if type(n_prompts) is not int or not 1 <= n_prompts <= _MOST_PROMPTS:
            raise ValueError(f"n_prompts is {shown(n_prompts)}: expected a whole number from 1")
        _check_declared(content, matrices)
        return JacobianLens(matrices, n_prompts, provenance)
    if "A" in content and "b" in content:
        matrices, biases = _tensors(content, "A", 2, device), _tensors(content, "b", 1, device)
        _check_declared(content, matrices)
        if {i: len(bias) for i, bias in biases.items()} != {i: len(matrix) for i, matrix in matrices.items()}:
            raise ValueError("A and b have other layers or widths: it is broken")
        return TunedLens(_signs(content.get("signs"), matrices), matrices, biases, provenance)
    names = ", ".join(sorted(shown(name) for name in list(content)[:10]))
    raise ValueError(f"it has {names or 'nothing'}: a Jacobian lens has J, a tuned lens A and b")


def _tensors(content: Mapping[Any, Any], name: str, dimensions: int, device: torch.device | str) -> dict[int, Tensor]:
    """Return the tensors of a part by layer, in float32 in memory of their own."""
    part = content[name]
    if type(part) is not dict or not 1 <= len(part) <= _MOST_LAYERS:
        raise ValueError(f"{name} is not a dict of 1 to {_MOST_LAYERS} layers")
    tensors: dict[int, Tensor] = {}
    width = None
    for layer, tensor in part.items():
        if type(layer) is not int or not 0 <= layer < _MOST_LAYERS:
            raise ValueError(f"{name} has the layer {shown(layer)}: layers are whole numbers from 0")
        if not isinstance(tensor, Tensor) or tensor.dtype not in _FLOATS:
            kind = tensor.dtype if isinstance(tensor, Tensor) else getattr(tensor, "kind", type(tensor).__name__)
            raise ValueError(f"{name}[{layer}] is {kind}: expected a tensor of floats")
        width = tensor.shape[0] if width is None and tensor.ndim else width
        if tensor.shape != (width,) * dimensions or not 1 <= width <= _WIDEST:
            raise ValueError(f"{name}[{layer}] has the shape {tuple(tensor.shape)}: expected {('C',) * dimensions}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name}[{layer}] is not contiguous: it may be larger in memory than in the file")
        tensors[layer] = tensor.to(device, torch.float32, copy=True)
        if not torch.isfinite(tensors[layer]).all():
            raise ValueError(f"{name}[{layer}] has numbers that are not finite")
    return dict(sorted(tensors.items()))


def _check_declared(content: Mapping[Any, Any], matrices: Mapping[int, Tensor]) -> None:
    """Raise ValueError if the file declares other layers or another width than it has."""
    width = len(next(iter(matrices.values())))
    if content.get("d_model", width) != width:
        raise ValueError(f"d_model is {shown(content['d_model'])}, but the matrices have width {width}")
    layers = content.get("source_layers", list(matrices))
    if type(layers) is not list or not all(type(i) is int for i in layers) or sorted(layers) != list(matrices):
        raise ValueError(f"source_layers is not the list of its layers {list(matrices)}")


def _signs(signs: Any, matrices: Mapping[int, Tensor]) -> dict[int, float]:
    if type(signs) is not dict or set(signs) != set(matrices) or not all(s in (-1.0, 1.0) for s in signs.values()):
        raise ValueError("signs does not give 1.0 or -1.0 for each of its layers")
    return {layer: float(signs[layer]) for layer in matrices}


def _provenance(provenance: Any) -> dict[str, Any]:
    """Return the plain values of a provenance.

    Raises:
      ValueError: the lens reads another activation than a block's output, or the provenance is no dict.
    """
    if provenance is None:
        return {}
    if type(provenance) is not dict:
        raise ValueError(f"provenance is a {type(provenance).__name__}, expected a dict")
    for name, expected in _READ_AT.items():
        if provenance.get(name, expected) != expected:
            raise ValueError(f"it reads {name} {shown(provenance[name])}: only {expected!r} exists in a nanochat")
    return {name: value for name, value in provenance.items() if type(name) is str and _is_plain(value)}


def _is_plain(value: Any, depth: int = 4) -> bool:
    """Return whether a value is a short text, a finite number, or lists and dicts of these."""
    if type(value) is str:
        return len(value) <= _LONGEST_TEXT
    if type(value) is list:
        return depth > 0 and all(_is_plain(one, depth - 1) for one in value)
    if type(value) is dict:
        return depth > 0 and all(type(name) is str and _is_plain(one, depth - 1) for name, one in value.items())
    return value is None or type(value) in (bool, int) or (type(value) is float and math.isfinite(value))


# ---- merging --------------------------------------------------------------------------------------------------------


def _check_same(first: JacobianLens, other: JacobianLens, name: str, what: str) -> None:
    a, b = (lens.provenance.get(name) for lens in (first, other))
    if a is not None and b is not None and a != b:
        raise ValueError(f"lenses of different {what} cannot be merged: {name} is {shown(a)} and {shown(b)}")


def _parts(lens: JacobianLens) -> list[Any]:
    """Return what each part of a lens, which may be merged already, says of its prompts."""
    merged = lens.provenance.get("merged")
    return merged if isinstance(merged, list) else [_summary(lens)]


def _summary(lens: JacobianLens) -> dict[str, Any]:
    return {"n_prompts": lens.n_prompts} | {name: lens.provenance.get(name) for name in ("prompts", "text")}


def _check_disjoint(lenses: Sequence[JacobianLens]) -> None:
    """Raise ValueError if two lenses say that they were fitted on the same prompts of the same text."""
    seen: list[tuple[Any, int, int]] = []
    for part in (part for lens in lenses for part in _parts(lens) if isinstance(part, dict)):
        span, text = part.get("prompts"), part.get("text")
        if text is None or type(span) is not list or len(span) != 2 or not all(type(i) is int for i in span):
            continue
        start, stop = span
        for other, low, high in seen:
            if other == text and start < high and low < stop:
                raise ValueError(
                    f"two lenses were fitted on the same text, on prompts {low} to {high - 1} and {start} to "
                    f"{stop - 1}: their prompts must differ; fit them with other values of --first_prompt"
                )
        seen.append((text, start, stop))
