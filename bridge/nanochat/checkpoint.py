"""Loads nanochat checkpoints of every generation and format, without trusting them and without a second copy."""

import dataclasses
import functools
import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bridge.nanochat import deduce, hub, json_file, locate
from bridge.nanochat import weights as weights_file
from bridge.nanochat.config import GPTConfig
from bridge.nanochat.model import GPT
from bridge.nanochat.names import few
from bridge.nanochat.settings import Settings, check_others, of_meta, of_mlx, of_transformers
from bridge.nanochat.tokenizer import Tokenizer
from bridge.nanochat.tokenizer import load as load_tokenizer
from bridge.nanochat.weights import Weights

_CHAT_FOLDERS = ("mid_checkpoints", "chatsft_checkpoints", "chatrl_checkpoints")


@dataclasses.dataclass(frozen=True)
class Nanochat:
    """A loaded nanochat: a frozen model in eval mode, its tokenizer (None if none was found), and where it is from."""

    model: GPT
    tokenizer: Tokenizer | None
    meta: dict[str, Any]
    config: GPTConfig
    generation: str
    path: Path
    """The file of weights, or the index of several."""
    files: tuple[Path, ...]
    """Every file that the weights are in."""
    name: str
    """What to call it: its directory, or its repository on the hub."""

    @property
    def is_chat(self) -> bool:
        """Whether the path says that it was trained to chat: nanochat gives such checkpoints folders of their own."""
        return any(part in _CHAT_FOLDERS for part in self.path.parts)

    @functools.cached_property
    def fingerprint(self) -> str:
        """The sha256 of the weights file, of several that of their digests in order; read when first asked for."""
        digests = []
        for part in self.files:
            with part.open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256"))
        if len(digests) == 1:
            return digests[0].hexdigest()
        return hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()


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
        path: a checkpoint directory (base_checkpoints/d20), one file of weights in it, a `*_checkpoints` or a base
            directory (then upstream's default choice), an address on the Hugging Face hub
            (hf://owner/name@revision/folder), or "demo", the small model that comes along. Weights may be nanochat's
            model_*.pt, or safetensors (one file or several) under nanochat's names, transformers' or mlx'.
        step: the step of a directory to take, the last one unless given.
        device: where the model shall be.
        dtype: of the matrices; unless given float32, and bfloat16 on CUDA. Scalars stay in float32, as upstream's.
        tokenizer: a tokenizer, or the path of one; unless given, looked for beside and above the checkpoint.
        ignore: names of settings in meta.json or config.json that are refused, but known to change nothing.
        overrides: generation, softcap, rope_table, rope_base, qk_scale, eps, window_pattern, sequence_len, n_head,
            vocab_size: what the files tell wrongly or not at all.

    On the CPU the weights are mapped from the file, not copied into memory: do not overwrite it while the model lives.
    transformers and mlx compute with another eps and an unrounded rope table; what they convert is loaded with their
    arithmetic, and rope_table="bf16" with eps=2**-23 gives back nanochat's own.

    Warns (UserWarning) wherever the files leave a choice open.

    Raises:
        FileNotFoundError: there is no such checkpoint or step, or the hub cannot be reached and the cache lacks it.
        ValueError: the file is damaged, holds more than tensors (nothing of it is run), is not a nanochat, has a
            setting that no nanochat has, or contradicts its meta file or tokenizer.
        TypeError: an override of another name.
        ImportError: an address on the hub without huggingface_hub.
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
        given = [name for name, value in overrides.items() if value is not None]
        check_others(settings, config, generation, (*ignore, *given))
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
    _say_arithmetic(weights, config)
    _assign(model, weights.tensors, torch.device(device), dtype)
    name = hub.parse(path).name if hub.is_address(path) else files.weights.absolute().parent.name
    return Nanochat(model, tokenizer, dict(settings.meta), config, generation, files.weights, weights.files, name)


def _tables(files: locate.Files) -> list[dict[str, Any]]:
    """Return the meta file, the configuration and the base model's meta file, empty where there is none."""
    advice = "mend it, or move it away and give the sizes"
    found = ((files.meta, "meta"), (files.config, "config"), (files.base_meta, "meta"))
    return [json_file.read_table(file, f"{what} file", advice) if file else {} for file, what in found]


def _settings(weights: Weights, meta: dict[str, Any], config: dict[str, Any], base: dict[str, Any]) -> Settings:
    """Return what the files beside the weights say."""
    if weights.transformers:
        return of_transformers(config, meta)
    if weights.mlx:
        return of_mlx(config, meta)
    return of_meta(meta, config, base)


def _say_arithmetic(weights: Weights, config: GPTConfig) -> None:
    """Warn that another library's arithmetic is computed, and what its files cannot tell."""
    if weights.transformers:
        warnings.warn(
            f"weights of transformers' NanoChat: computed as transformers does, with eps={config.eps:.3g} and "
            f'rope_table="{config.rope_table}". transformers holds the generations G0 and G1 only: of a newer model, '
            "trained after 2026-01-11, the conversion dropped weights without a word. Then bring its model_*.pt",
            stacklevel=3,
        )
    elif weights.mlx:
        warnings.warn(
            f"weights of mlx: computed as mlx-lm does, with eps={config.eps:.3g}, softcap={config.softcap:g} and "
            f'rope_table="{config.rope_table}"; eps and softcap are in no file',
            stacklevel=3,
        )


def _compare(shapes: dict[str, tuple[int, ...]], model: GPT, generation: str) -> None:
    """Raise ValueError unless the file has exactly the model's weights, naming what differs."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = [f"{k} is {shapes[k]} and not {expected[k]}" for k in expected if k in shapes and shapes[k] != expected[k]]
    differences = {
        "missing": sorted(expected.keys() - shapes.keys()),
        "unexpected": sorted(shapes.keys() - expected.keys()),
        "of another shape": wrong,
    }
    if any(differences.values()):
        turned = [name for name in expected if shapes.get(name, ())[::-1] == expected[name] != shapes.get(name, ())]
        told = "; ".join(f"{kind}: {few(names)}" for kind, names in differences.items() if names)
        told += f". Transposed, (in, out) instead of nanochat's (out, in): {few(turned)}" * bool(turned)
        raise ValueError(f"these are not the weights of a nanochat of generation {generation} and these sizes. {told}")


def _assign(model: GPT, weights: dict[str, Tensor], device: torch.device, dtype: torch.dtype | None) -> None:
    """Put the weights into a model on the meta device, converted one tensor at a time, and moves its tables along."""
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    for name, tensor in weights.items():
        weights[name] = tensor.to(device, torch.float32 if tensor.ndim == 1 else dtype)
    model.load_state_dict(weights, strict=True, assign=True)
    model.to(device).eval().requires_grad_(False)
