"""Load nanochat checkpoints of every generation and format, without trusting the files or copying the weights."""

import dataclasses
import functools
import hashlib
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bridge.accelerators import computes_in_bfloat16
from bridge.nanochat import deduce, hub, json_file, locate
from bridge.nanochat import weights as weights_file
from bridge.nanochat.config import GPTConfig
from bridge.nanochat.model import GPT
from bridge.nanochat.names import few
from bridge.nanochat.settings import Settings, check_others, from_meta, from_mlx, from_transformers
from bridge.nanochat.tokenizer import Tokenizer
from bridge.nanochat.tokenizer import load as load_tokenizer
from bridge.nanochat.weights import Weights
from jsae.settings import require

_CHAT_FOLDERS = ("mid_checkpoints", "chatsft_checkpoints", "chatrl_checkpoints")


@dataclasses.dataclass(frozen=True)
class Nanochat:
    """A loaded nanochat: a frozen model in eval mode, its tokenizer (None if none was found), and its origin."""

    model: GPT
    tokenizer: Tokenizer | None
    meta: dict[str, Any]
    config: GPTConfig
    generation: str
    path: Path
    """The weights file, or the index of a sharded one."""
    files: tuple[Path, ...]
    """All files that contain weights."""
    name: str
    """A display name: that of its directory, or of its repository on the hub."""

    @property
    def is_chat(self) -> bool:
        """True if the path is that of a chat checkpoint: nanochat gives them folders of their own."""
        return any(part in _CHAT_FOLDERS for part in self.path.parts)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights file, as hex; for several files, of their digests in order. Computed on first use."""
        digests = []
        for part in self.files:
            with part.open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256"))
        if len(digests) == 1:
            return digests[0].hexdigest()
        return hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()

    def row_length(self, context_size: int | None) -> int:
        """Return the tokens of a row of text: the given number, or the model's own length.

        Raises:
          ConfigError: a model without a tokenizer, or a number that it does not take.
        """
        require(
            self.tokenizer is not None,
            f"there is no tokenizer beside or above {self.path}: give its directory with --tokenizer",
        )
        row_len, longest = context_size or self.config.sequence_len, self.config.max_positions
        require(2 <= row_len <= longest, f"context_size is {row_len}: this model takes 2 to {longest} tokens")
        return row_len


def load(
    path: str | Path,
    step: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    tokenizer: Tokenizer | str | Path | None = None,
    ignore: Sequence[str] = (),
    **overrides: Any,
) -> Nanochat:
    """Load a nanochat of any generation, from upstream's own files or those of other libraries.

    Args:
        path: a checkpoint directory (base_checkpoints/d20), a weights file in it, a `*_checkpoints` or base directory
            (upstream's default choice is made), an address on the Hugging Face hub
            (hf://owner/name@revision/folder), or "demo", the small packaged model. Weights may be nanochat's
            model_*.pt, or safetensors (one file or shards) with the tensor names of nanochat, transformers or mlx.
        step: the training step to load from a directory; default: the last one.
        device: the device of the model.
        dtype: the dtype of matrices; default: float32, on GPUs with bfloat16 that. Vectors and scalars are float32, as
            upstream.
        tokenizer: a tokenizer, or the path of one; default: the one found in, beside or above the checkpoint.
        ignore: names of unknown settings in meta.json or config.json that are known to change nothing.
        overrides: generation, softcap, rope_table, rope_base, qk_scale, eps, window_pattern, sequence_len, n_head,
            vocab_size: values that are missing or wrong in the files.

    On the CPU the weights are memory-mapped: do not overwrite the file while the model is in use. transformers and mlx
    use a different eps and an unrounded rope table. Their files are loaded with their arithmetic;
    rope_table="bf16" with eps=2**-23 restores nanochat's own.

    Warns (UserWarning) of every setting that the files do not determine.

    Raises:
        FileNotFoundError: no such checkpoint or step, or the hub cannot be reached and the cache lacks the files.
        ValueError: the file is damaged, contains more than tensors (it is never executed), is not a nanochat, has a
            setting that no nanochat has, or contradicts its meta file or tokenizer.
        TypeError: an unknown override.
        ImportError: an address on the hub is given, and huggingface_hub is not installed.
    """
    deduce.check_overrides(overrides)
    files = hub.find(path, step) if hub.is_address(path) else locate.find(path, step)
    tables = _tables(files)
    tokenizer = files.tokenizer if tokenizer is None else tokenizer
    if isinstance(tokenizer, (str, Path)):
        tokenizer = load_tokenizer(tokenizer)
    weights = weights_file.read(files.weights)
    try:
        shapes = {name: tuple(tensor.shape) for name, tensor in weights.tensors.items()}
        weights_file.refuse_foreign(shapes)
        settings = _settings(weights, *tables)
        generation, config = deduce.deduce(shapes, settings, overrides, tokenizer.vocab_size if tokenizer else None)
        overridden = [name for name, value in overrides.items() if value is not None]
        check_others(settings, config, generation, (*ignore, *overridden))
        with torch.device("meta"):
            model = GPT(config)
        _compare(shapes, model, generation)
    except ValueError as error:
        raise ValueError(f"{files.weights}: {error}") from error
    if tokenizer is not None and tokenizer.vocab_size != config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the model {files.weights} has {config.vocab_size}: "
            "pass the tokenizer that the model was trained with as tokenizer="
        )
    _warn_of_arithmetic(weights, config)
    _assign(model, weights.tensors, torch.device(device), dtype)
    name = hub.parse(path).name if hub.is_address(path) else files.weights.absolute().parent.name
    return Nanochat(model, tokenizer, dict(settings.meta), config, generation, files.weights, weights.files, name)


def _tables(files: locate.Files) -> list[dict[str, Any]]:
    """Return the contents of the meta file, the configuration and the base model's meta file; {} for a missing file."""
    advice = "repair it, or move it away and pass the sizes as arguments"
    paths = ((files.meta, "meta"), (files.config, "config"), (files.base_meta, "meta"))
    return [json_file.read_table(path, f"{kind} file", advice) if path else {} for path, kind in paths]


def _settings(weights: Weights, meta: dict[str, Any], config: dict[str, Any], base: dict[str, Any]) -> Settings:
    """Return the settings in the files beside the weights."""
    if weights.transformers:
        return from_transformers(config, meta)
    if weights.mlx:
        return from_mlx(config, meta)
    return from_meta(meta, config, base)


def _warn_of_arithmetic(weights: Weights, config: GPTConfig) -> None:
    """Warn that another library's arithmetic is used, and of the settings that its files lack."""
    if weights.transformers:
        warnings.warn(
            f"weights of transformers' NanoChat: computed as transformers does, with eps={config.eps:.3g} and "
            f'rope_table="{config.rope_table}". transformers supports the generations G0 and G1 only: if the model is '
            "newer (trained after 2026-01-11), the conversion silently dropped weights; use its model_*.pt instead",
            stacklevel=3,
        )
    elif weights.mlx:
        warnings.warn(
            f"weights of mlx: computed as mlx-lm does, with eps={config.eps:.3g}, softcap={config.softcap:g} and "
            f'rope_table="{config.rope_table}"; eps and softcap are in no file',
            stacklevel=3,
        )


def _compare(shapes: dict[str, tuple[int, ...]], model: GPT, generation: str) -> None:
    """Raise ValueError, naming the differences, unless the names and shapes of the weights are those of the model."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = [f"{k} is {shapes[k]} and not {expected[k]}" for k in expected if k in shapes and shapes[k] != expected[k]]
    differences = {
        "missing": sorted(expected.keys() - shapes.keys()),
        "unexpected": sorted(shapes.keys() - expected.keys()),
        "of another shape": wrong,
    }
    if any(differences.values()):
        transposed = [n for n in expected if shapes.get(n, ())[::-1] == expected[n] != shapes.get(n, ())]
        details = "; ".join(f"{kind}: {few(names)}" for kind, names in differences.items() if names)
        details += f". Transposed, (in, out) instead of nanochat's (out, in): {few(transposed)}" * bool(transposed)
        raise ValueError(f"the weights do not fit a nanochat of generation {generation} with these sizes. {details}")


def _assign(model: GPT, weights: dict[str, Tensor], device: torch.device, dtype: torch.dtype | None) -> None:
    """Convert the weights one tensor at a time, assign them to a model on the meta device, and move its buffers."""
    if dtype is None:
        dtype = torch.bfloat16 if computes_in_bfloat16(str(device)) else torch.float32
        if device.type == "cuda" and dtype is torch.float32:
            name = torch.cuda.get_device_name(device)
            print(f"note: the {name} has no bfloat16: the model is loaded in float32", file=sys.stderr, flush=True)
    for name, tensor in weights.items():
        weights[name] = tensor.to(device, torch.float32 if tensor.ndim == 1 else dtype)
    model.load_state_dict(weights, strict=True, assign=True)
    model.to(device).eval().requires_grad_(False)
