"""Reads nanochat checkpoints of every generation, without trusting them and without a second copy in memory."""

import dataclasses
import functools
import hashlib
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bridge.nanochat import deduce, locate
from bridge.nanochat.config import GPTConfig
from bridge.nanochat.model import GPT
from bridge.nanochat.tokenizer import Tokenizer
from bridge.nanochat.tokenizer import load as load_tokenizer
from jsae.files import is_system_error

_MAX_META_BYTES = 2**24


@dataclasses.dataclass(frozen=True)
class Nanochat:
    """A loaded nanochat: a frozen model in eval mode, its tokenizer (None if none was found), and where it is from."""

    model: GPT
    tokenizer: Tokenizer | None
    meta: dict[str, Any]
    config: GPTConfig
    generation: str
    path: Path

    @functools.cached_property
    def fingerprint(self) -> str:
        """The sha256 of the weights file, read when first asked for."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def load(
    path: str | Path,
    step: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    tokenizer: Tokenizer | str | Path | None = None,
    **overrides: Any,
) -> Nanochat:
    """A nanochat of any generation, from upstream's own files.

    Args:
        path: a checkpoint directory (base_checkpoints/d20), one model_*.pt in it, a `*_checkpoints` or a base
            directory (then upstream's default choice), or "demo", the small model that comes along.
        step: the step of a directory to take, the last one unless given.
        device: where the model shall be.
        dtype: of the matrices; unless given float32, and bfloat16 on CUDA. Scalars stay in float32, as upstream's.
        tokenizer: a tokenizer, or the path of one; unless given, looked for beside and above the checkpoint.
        overrides: generation, softcap, rope_table, rope_base, qk_scale, window_pattern, sequence_len, n_head,
            vocab_size: what the files tell wrongly or not at all.

    On the CPU the weights are mapped from the file, not read into memory: do not overwrite it while the model lives.

    Warns (UserWarning) wherever the files leave a choice open.

    Raises:
        FileNotFoundError: there is no such checkpoint or step.
        ValueError: the file is damaged, holds more than tensors (nothing of it is run), is not a nanochat, or
            contradicts its meta file or tokenizer.
        TypeError: an override of another name.
    """
    deduce.check_overrides(overrides)
    files = locate.find(path, step)
    meta = read_meta(files.meta) if files.meta else {}
    if tokenizer is None:
        tokenizer = files.tokenizer
    if isinstance(tokenizer, (str, Path)):
        tokenizer = load_tokenizer(tokenizer)
    weights = read_weights(files.weights)
    try:
        shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        generation, config = deduce.deduce(shapes, meta, overrides, tokenizer and tokenizer.vocab_size)
        with torch.device("meta"):
            model = GPT(config)
        _compare(shapes, model, generation)
    except ValueError as error:
        raise ValueError(f"{files.weights}: {error}") from error
    if tokenizer is not None and tokenizer.vocab_size != config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the model {files.weights} has {config.vocab_size}: "
            "give the tokenizer it was trained with as tokenizer="
        )
    _assign(model, weights, torch.device(device), dtype)
    return Nanochat(model, tokenizer, meta, config, generation, files.weights)


def read_meta(path: Path) -> dict[str, Any]:
    """The meta file of a checkpoint. Raises ValueError if it is not a JSON table of a sane size."""
    if path.stat().st_size > _MAX_META_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, more than any meta file of nanochat")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}; mend it, or move it away and give the sizes") from error
    if not isinstance(meta, dict):
        raise ValueError(f"{path} must hold a JSON table, got {type(meta).__name__}")
    return meta


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a model file by upstream's names, mapped from the file and not yet read.

    Raises ValueError if the file is damaged or holds anything but tensors; nothing of it is run.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("it is compressed, so that reading a part of it may fill the memory")
        weights = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors; nothing of it was run. {_first_line(error)}") from error
    except Exception as error:  # a damaged file may raise nearly anything
        if is_system_error(error):
            raise
        raise ValueError(f"{path} is damaged or not a file of torch.save: {_first_line(error)}") from error
    if not isinstance(weights, dict) or not all(isinstance(k, str) for k in weights):
        raise ValueError(f"{path} must hold weights by name, got {type(weights).__name__}: give a model_*.pt")
    for name, tensor in weights.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or not tensor.is_floating_point():
            kind = f"a tensor of {tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{path} must hold floating-point tensors by name, but {name!r} is {kind}")
    # Strides of 0 would make of a small file a tensor that fills the memory once it is converted.
    if sum(t.numel() * t.element_size() for t in weights.values()) > path.stat().st_size:
        raise ValueError(f"{path} describes tensors that are larger than the file")
    named = {name.removeprefix("_orig_mod."): tensor for name, tensor in weights.items()}
    if len(named) < len(weights):
        raise ValueError(f"{path} holds some weights twice, with and without the prefix _orig_mod.")
    return named


def _compare(shapes: dict[str, tuple[int, ...]], model: GPT, generation: str) -> None:
    """Raises ValueError unless the file has exactly the model's weights, naming what differs."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = [f"{k} is {shapes[k]} and not {expected[k]}" for k in expected if k in shapes and shapes[k] != expected[k]]
    differences = {
        "missing": sorted(expected.keys() - shapes.keys()),
        "unexpected": sorted(shapes.keys() - expected.keys()),
        "of another shape": wrong,
    }
    if any(differences.values()):
        told = "; ".join(f"{kind}: {_few(names)}" for kind, names in differences.items() if names)
        raise ValueError(f"these are not the weights of a nanochat of generation {generation} and these sizes. {told}")


def _assign(model: GPT, weights: dict[str, Tensor], device: torch.device, dtype: torch.dtype | None) -> None:
    """Puts the weights into a model on the meta device, converted one tensor at a time, and moves its tables along."""
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    for name, tensor in weights.items():
        weights[name] = tensor.to(device, torch.float32 if tensor.ndim == 1 else dtype)
    model.load_state_dict(weights, strict=True, assign=True)
    model.to(device).eval().requires_grad_(False)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _few(names: list[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
