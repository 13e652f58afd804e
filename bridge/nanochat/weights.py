"""Read the weights of a checkpoint in every format, by nanochat's names, and refuse those of other models."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from bridge.nanochat import json_file, pickles, safetensors_file, torch_file
from bridge.nanochat.names import few, shown

_REMEDY = "give the model_*.pt or safetensors file that it was converted from"
_PREFIXES = ("_orig_mod.", "module.", "model.")  # of a compiled model, a parallel one, a wrapper of transformers
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_MAX_SHARDS = 1024
_FLOATS = {"F64", "F32", "F16", "BF16"}
_QUANTIZED_NAME = re.compile(
    r"\.(scales|biases|qweight|qzeros|g_idx|SCB|absmax|quant_map|weight_scale(_inv)?|weight_format|quant_state\..*)$"
)
_TRANSFORMERS = {
    "embed_tokens.weight": "transformer.wte.weight",
    "self_attn.q_proj": "attn.c_q",
    "self_attn.k_proj": "attn.c_k",
    "self_attn.v_proj": "attn.c_v",
    "self_attn.o_proj": "attn.c_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_TRANSFORMERS_LAYER = re.compile(r"layers\.(\d+)\.(self_attn\.[qkvo]_proj|mlp\.fc[12])\.(.+)")


@dataclasses.dataclass(frozen=True)
class Weights:
    """The weights of a checkpoint, by nanochat's names."""

    tensors: dict[str, Tensor]
    files: tuple[Path, ...]
    """All files that contain weights."""
    transformers: bool
    """Whether the files use the names of transformers' NanoChatForCausalLM."""
    mlx: bool
    """Whether mlx wrote the files."""


def read(path: Path) -> Weights:
    """Return the memory-mapped weights of a model_*.pt, a safetensors file or a safetensors index.

    Raises:
        ValueError: a file is damaged, contains anything but tensors (it is never executed), has an unsupported format,
            is quantized, or describes tensors larger than the file.
        FileNotFoundError: a file in the index is missing.
    """
    kind = _kind(path)
    files: tuple[Path, ...]
    mlx = False
    if kind == "torch":
        files, tensors = (path,), _read_torch(path)
    else:
        files, index = _shards(path) if kind == "index" or _SHARD.fullmatch(path.name) else ((path,), None)
        tensors = {}
        for file in files:
            shard, metadata = _read_safetensors(file)
            mlx = mlx or metadata.get("format") == "mlx"
            if duplicates := tensors.keys() & shard.keys():
                raise ValueError(f"{file} contains {few(sorted(duplicates))}, which another file also contains")
            tensors |= shard
        if index is not None and index != tensors.keys():
            raise ValueError(
                f"{path} and its files list different tensors: {few(sorted(index ^ tensors.keys()))} in only one place"
            )
    named = {_without_prefixes(name): tensor for name, tensor in tensors.items()}
    if len(named) < len(tensors):
        raise ValueError(f"{path} contains some weights twice, with and without the prefix _orig_mod. or model.")
    transformers = "embed_tokens.weight" in named and "layers.0.mlp.fc1.weight" in named
    if transformers:
        named = {_from_transformers(name): tensor for name, tensor in named.items()}
    return Weights(named, files, transformers, mlx)


def _kind(path: Path) -> str:
    """Return "torch", "safetensors" or "index", judged by the name and first bytes of a file."""
    if path.name.endswith(".index.json"):
        return "index"
    with path.open("rb") as file:
        start = file.read(9)
    if start[:4] == b"GGUF":
        raise ValueError(f"{path}: GGUF is not read; {_REMEDY}")
    if start[:4] == b"PK\x03\x04":
        return "torch"
    if path.suffix == ".safetensors" or (start[8:] == b"{" and path.suffix != ".pt"):
        return "safetensors"
    return "torch"


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        weights = torch_file.read(path)
    except pickles.ForbiddenError as error:
        raise ValueError(f"{path} contains more than tensors; it was not executed: {shown(error, 300)}") from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged or not a file of torch.save: {shown(error, 300)}") from error
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        raise ValueError(f"{path} must contain weights by name, got {type(weights).__name__}: give a model_*.pt")
    for name, tensor in weights.items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype.itemsize > 1:
            continue
        if isinstance(tensor, torch_file.Other):
            kind = tensor.kind
        elif isinstance(tensor, Tensor):
            kind = f"a tensor of {tensor.dtype}"
        else:
            kind = type(tensor).__name__
        quantized = _QUANTIZED_NAME.search(name) or "quantized" in kind or "float8" in kind or "int8" in kind
        raise ValueError(
            f"{path} must contain floating-point tensors by name, but {shown(name)!r} is {kind}"
            + f": quantized weights are not supported; {_REMEDY}" * bool(quantized)
        )
    # With strides of 0, a small file can describe a tensor that fills the memory once it is converted.
    if sum(t.numel() * t.element_size() for t in weights.values()) > path.stat().st_size:
        raise ValueError(f"{path} describes tensors that are larger than the file")
    return weights


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of one file."""
    try:
        header = safetensors_file.read_header(path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {shown(error, 300)}") from error
    unsupported = {name: dtype for name, (dtype, _) in header.tensors.items() if dtype not in _FLOATS}
    quantized = [name for name in header.tensors if _QUANTIZED_NAME.search(name)]
    if quantized or any(
        dtype.startswith(("F8", "F6", "F4", "U32", "I32", "I8", "U8")) for dtype in unsupported.values()
    ):
        names = quantized or list(unsupported)
        kinds = ", ".join(sorted(set(unsupported.values()))) or "floating-point"
        raise ValueError(
            f"{path} contains quantized weights ({few(names)}; tensors of {kinds}), which are not supported; {_REMEDY}"
        )
    if unsupported:
        name, dtype = next(iter(unsupported.items()))
        raise ValueError(f"{path} must contain floating-point tensors, but {shown(name)!r} is a tensor of {dtype}")
    try:
        return safetensors_file.read(path), header.metadata
    except ValueError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {shown(error, 300)}") from error


def _shards(path: Path) -> tuple[tuple[Path, ...], set[str] | None]:
    """Return the files of a sharded model, and the names of its tensors if there is an index, otherwise None."""
    if match := _SHARD.fullmatch(path.name):
        count = int(match[3])
        if not 1 <= count <= _MAX_SHARDS:
            raise ValueError(f"{path} is one of {count} files; at most {_MAX_SHARDS} are read")
        names = [f"{match[1]}-{i:05d}-of-{match[3]}.safetensors" for i in range(1, count + 1)]
        index = None
    else:
        table = json_file.read_table(path, "index", "fetch it again")
        mapping = table.get("weight_map")
        if not isinstance(mapping, dict) or not mapping or not all(_is_file_name(name) for name in mapping.values()):
            raise ValueError(f"{path} must give the file of every tensor in weight_map")
        names, index = sorted(set(mapping.values())), set(mapping)
        if len(names) > _MAX_SHARDS:
            raise ValueError(f"{path} lists {len(names)} files; at most {_MAX_SHARDS} are read")
    files = tuple(path.with_name(name) for name in names)
    if missing := [file.name for file in files if not file.is_file()]:
        raise FileNotFoundError(f"{path} belongs to {len(files)} files, of which {few(missing)} is missing: fetch it")
    return files, index


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and not set(name) & set("/\\\0")


def _without_prefixes(name: str) -> str:
    while match := next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None):
        name = name.removeprefix(match)
    return name


def _from_transformers(name: str) -> str:
    """Return nanochat's name of a tensor of transformers' NanoChat; other names are returned unchanged."""
    if match := _TRANSFORMERS_LAYER.fullmatch(name):
        return f"transformer.h.{match[1]}.{_TRANSFORMERS[match[2]]}.{match[3]}"
    return _TRANSFORMERS.get(name, name)


def refuse_foreign(shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError for weights that are not a nanochat's, naming their architecture if it is known.

    Args:
        shapes: shape of every tensor, by nanochat's names.
    """
    for pattern, description in _ALTERED:
        if match := next((name for name in shapes if re.search(pattern, name)), None):
            raise ValueError(f"{description}, which is not supported: it has {shown(match)}")
    needed = ("transformer.wte.weight", "transformer.h.0.attn.c_k.weight", "lm_head.weight")
    missing = [name for name in needed if len(shapes.get(name, ())) != 2]
    if missing == ["lm_head.weight"] and "lm_head.weight" not in shapes:
        raise ValueError(
            "lm_head.weight is missing, so its embeddings are tied (tie_word_embeddings), which no nanochat's are: "
            "give the model_*.pt that nanochat's own script wrote"
        )
    if missing:
        raise ValueError(
            f"these are not the weights of a nanochat: no matrix {', '.join(missing)} (found "
            f"{few(shapes) or 'nothing'}). Their arithmetic is defined by the code that wrote them, and code of a "
            "checkpoint is never executed"
        )


_ALTERED = (
    (
        r"\.(router|moe|experts|shared_expert)s?\.",
        "this is a mixture of experts, as in nanochat's side branches moe and moe3",
    ),
    (
        r"^(value_embed_A|value_embed)\.|^v0_lambdas",
        "this is an experiment of 2026-01-16 from nanochat's side branch ve (v0_lambdas instead of gates)",
    ),
    (r"\.mlp\.(w_gate|w_up|gate_proj|up_proj)\.", "its MLP is gated (SwiGLU) instead of relu squared"),
    (r"\.(attn_hc|mlp_hc)\.", "it has hyper-connections"),
    (r"(^|\.)mtp_", "it uses multi-token prediction (MTP)"),
    (r"attnres_", "it has attention residuals"),
    (r"\.lambda_[qk][12]$", "it has differential attention"),
    (r"\.(lora_A|lora_B)\.", "these are the weights of a LoRA adapter without its model"),
)
