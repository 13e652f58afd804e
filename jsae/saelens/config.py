"""The settings of a SAELens directory: read and check its `cfg.json`, of any version of SAELens."""

import json
from pathlib import Path
from typing import Any, NoReturn

from packaging.version import InvalidVersion, Version

from jsae.saelens.bookkeeping import BOOKKEEPING
from jsae.saelens.settings import (
    CFG,
    CHECKPOINTS,
    DTYPES,
    ENCODERS,
    RANKED,
    TRANSCODERS,
    Settings,
    require_file,
    shown,
    shown_key,
)

_ESTIMATED = ("expected_average_only_in", "covariance_whitening")
_PER_TOKEN = ("layer_norm", "constant_norm_rescale")
_LEGACY_NAMES = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
_TEXTS = ("model_name", "hook_name", "hook_name_out", "model_fingerprint", "model_class_name", "neuronpedia_id")
_READ = {
    *("architecture", "d_in", "d_sae", "d_out", "dtype", "device", "k", "metadata"),
    *("apply_b_dec_to_input", "normalize_activations", "reshape_activations", "rescale_acts_by_decoder_norm"),
    *("activation_fn", "activation_fn_kwargs", "finetuning_scaling_factor", "hook_head_index", "sae_lens_version"),
    *_TEXTS,
}
_CROSSCODER = ("layers", "activation")
MAX_BYTES, _MAX_DEPTH = 16 * 2**20, 64


def read(folder: str | Path) -> Settings:
    """Read and check the `cfg.json` of a SAELens directory. Weights are not opened.

    Configurations of SAELens before version 6 are read as SAELens 6 reads them. Every setting that changes the
    computation is applied by `jsae.saelens.read` or refused here by name. Settings that are not known, neither as
    changing the computation nor as `BOOKKEEPING`, are refused too.

    Raises:
      FileNotFoundError: there is no `cfg.json`.
      ValueError: a broken file, a setting that is unknown, of the wrong type, or not supported; names file and setting.
    """
    folder = Path(folder)
    file = folder / CFG
    require_file(file)
    written = _parsed(file)
    legacy = _is_legacy(file, written)
    cfg = _renamed(file, written)
    unknown = sorted(set(cfg) - _READ - set(_CROSSCODER) - BOOKKEEPING)
    if unknown:
        raise ValueError(
            f"{file}: unknown setting {', '.join(map(repr, map(shown_key, unknown[:5])))}: it could change what the "
            "SAE computes. Remove it if it does not, or put what describes the SAE under metadata"
        )
    metadata = _metadata(file, cfg, legacy)
    if cfg.get("architecture") == "crosscoder":
        return _crosscoder(folder, file, written, cfg, metadata)
    architecture, k = _architecture(file, cfg, legacy)
    for name in _CROSSCODER:
        if name in cfg:
            _refuse(file, name, cfg[name], f"a {architecture} SAE has no such setting")
    d_in, d_sae, d_out = _widths(file, cfg, architecture)
    transcoder = architecture in TRANSCODERS
    subtracts = _switch(file, cfg, "apply_b_dec_to_input", True)
    if transcoder and subtracts:
        raise ValueError(f"{file}: apply_b_dec_to_input must be false for a transcoder, which has no bias of its input")
    return Settings(
        folder=folder,
        written=written,
        legacy=legacy,
        architecture=architecture,
        d_in=d_in,
        d_sae=d_sae,
        d_out=d_out,
        layers=None,
        k=_k(file, k, d_sae) if architecture in RANKED else None,
        dtype=_dtype(file, cfg),
        subtracts_b_dec=subtracts,
        rescales=_rescales(file, cfg, architecture),
        normalization=_normalization(file, cfg, legacy, transcoder),
        finetuned=_switch(file, cfg, "finetuning_scaling_factor", False),
        metadata=metadata,
    )


# ---- the file ------------------------------------------------------------------------------------------------------


def _parsed(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file; check its size, its depth, and that its names are unique."""
    size = file.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{file} has {size:,} bytes: at most {MAX_BYTES:,} are read as the settings of an SAE")
    try:
        cfg = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_unique)
        level, depth = [cfg], 0
        while level:
            depth += 1
            if depth > _MAX_DEPTH:
                raise ValueError(f"nested more than {_MAX_DEPTH} levels deep")
            inner = (part for part in level if isinstance(part, dict | list))
            level = [x for part in inner for x in (part.values() if isinstance(part, dict) else part)]
    except RecursionError as error:
        raise ValueError(f"{file.parent} holds a broken export: {CFG} is broken: nested too deep") from error
    except ValueError as error:
        raise ValueError(f"{file.parent} holds a broken export: {CFG} is broken: {error}") from error
    if not isinstance(cfg, dict):
        raise ValueError(f"{file} holds {shown(cfg)}: expected an object with the settings of an SAE")
    return cfg


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    settings = dict(pairs)
    if len(settings) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{shown_key(twice)!r} is set twice")
    return settings


def _is_legacy(file: Path, cfg: dict[str, Any]) -> bool:
    """Return whether SAELens 6 reads the file as one of an earlier version: by its version, or without one."""
    metadata = cfg.get("metadata")
    version = cfg.get("sae_lens_version") or (isinstance(metadata, dict) and metadata.get("sae_lens_version")) or None
    if version is None:
        return True
    try:
        return Version(version) < Version("6.0.0rc0")
    except (InvalidVersion, TypeError):
        _refuse(file, "sae_lens_version", version, "must be a version such as '6.54.12'")


def _renamed(file: Path, written: dict[str, Any]) -> dict[str, Any]:
    """Return the settings under the names of SAELens 6."""
    cfg = {name: value for name, value in written.items() if name not in _LEGACY_NAMES}
    for old, name in _LEGACY_NAMES.items():
        if old in written:
            if name in written and written[name] != written[old]:
                _refuse(file, old, written[old], f"contradicts {name}, which is {shown(written[name])}")
            cfg[name] = written[old]
    return cfg


# ---- the settings --------------------------------------------------------------------------------------------------


def _metadata(file: Path, cfg: dict[str, Any], legacy: bool) -> dict[str, Any]:
    """Return the metadata of the SAE. In files before version 6 it is mixed with the settings."""
    metadata = {} if cfg.get("metadata") is None else cfg["metadata"]
    if not isinstance(metadata, dict):
        _refuse(file, "metadata", metadata, "must be an object")
    if legacy:
        described = {name: cfg[name] for name in (*_TEXTS, "hook_head_index", *_LEGACY_METADATA) if name in cfg}
        metadata = metadata | described
    for name in _TEXTS:
        if not isinstance(metadata.get(name), str | None):
            _refuse(file, name, metadata[name], "must be text or null")
    names = metadata.get("hook_names")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        _refuse(file, "hook_names", names, "must be a list of texts")
    head = metadata.get("hook_head_index", cfg.get("hook_head_index"))
    if head is not None:
        _refuse(file, "hook_head_index", head, "must be null: no hook of a nanochat gives one attention head")
    if legacy and "hook_z" in (metadata.get("hook_name") or "") and "reshape_activations" not in cfg:
        _refuse(file, "hook_name", metadata["hook_name"], "has activations by head, which are not supported")
    return metadata


_LEGACY_METADATA = (
    *("model_from_pretrained_kwargs", "prepend_bos", "exclude_special_tokens", "context_size", "seqpos_slice"),
    *("dataset_path", "sae_lens_version", "sae_lens_training_version", "hf_hook_name", "hf_hook_name_out"),
)


def _architecture(file: Path, cfg: dict[str, Any], legacy: bool) -> tuple[str, Any]:
    """Return the architecture and the file's k. Before version 6 the activation function makes an SAE TopK."""
    known = (*ENCODERS, *TRANSCODERS, *CHECKPOINTS)
    architecture = cfg.get("architecture", "standard" if legacy else None)
    if not isinstance(architecture, str) or architecture not in known:
        raise ValueError(f"{file}: architecture {shown(architecture)} is unknown: expected one of {', '.join(known)}")
    activation = cfg.get("activation_fn")
    kwargs = {} if cfg.get("activation_fn_kwargs") is None else cfg["activation_fn_kwargs"]
    if activation not in (None, "relu", "topk") or isinstance(activation, dict | list):
        _refuse(file, "activation_fn", activation, "must be 'relu' or 'topk'")
    if not isinstance(kwargs, dict) or set(kwargs) - {"k"}:
        _refuse(file, "activation_fn_kwargs", kwargs, "must be an object with k at most")
    if activation == "topk" and legacy and architecture == "standard":
        architecture = "topk"
    if (activation == "topk" and architecture != "topk") or (kwargs and architecture not in RANKED):
        _refuse(file, "activation_fn", activation, f"does not go with architecture {architecture!r}")
    if architecture not in (*RANKED, *CHECKPOINTS) and cfg.get("k") is not None:
        _refuse(file, "k", cfg["k"], f"a {architecture} SAE has no k")
    k = kwargs.get("k", cfg.get("k"))
    if cfg.get("k") is not None and k != cfg["k"]:
        _refuse(file, "k", cfg["k"], f"contradicts activation_fn_kwargs, where it is {shown(k)}")
    return architecture, k


def _widths(file: Path, cfg: dict[str, Any], architecture: str) -> tuple[int, int, int]:
    d_in, d_sae, d_out = cfg.get("d_in"), cfg.get("d_sae"), cfg.get("d_out", cfg.get("d_in"))
    if not all(_is_size(width) for width in (d_in, d_sae, d_out)):
        widths = ", ".join(f"{name}={shown(w)}" for name, w in (("d_in", d_in), ("d_sae", d_sae), ("d_out", d_out)))
        raise ValueError(f"{file}: d_in, d_sae and d_out must be positive integers, not {widths}")
    if architecture not in TRANSCODERS and d_out != d_in:
        _refuse(file, "d_out", d_out, f"a {architecture} SAE reconstructs its input: W_dec has width d_in={d_in}")
    return d_in, d_sae, d_out


def _crosscoder(
    folder: Path, file: Path, written: dict[str, Any], cfg: dict[str, Any], metadata: dict[str, Any]
) -> Settings:
    """Return the settings of a crosscoder, in the layout of `jsae.export.write_plain`."""
    sizes = {name: cfg.get(name) for name in ("layers", "d_in", "d_sae")}
    if not all(_is_size(size) for size in sizes.values()):
        text = ", ".join(f"{name!r}: {shown(size)}" for name, size in sizes.items())
        raise ValueError(f"{file}: layers, d_in and d_sae of a crosscoder must be positive integers, not {{{text}}}")
    activation = cfg.get("activation")
    if not isinstance(activation, str) or activation not in ENCODERS:
        known = ", ".join(ENCODERS)
        raise ValueError(f"{file}: a crosscoder's activation {shown(activation)} is unknown: expected one of {known}")
    if not _switch(file, cfg, "apply_b_dec_to_input", True):
        raise ValueError(f"{file}: apply_b_dec_to_input must be true for a crosscoder")
    for name, only in (
        ("normalize_activations", "none"),
        ("activation_fn", None),
        ("activation_fn_kwargs", None),
        ("d_out", None),
    ):
        if cfg.get(name, only) != only:
            _refuse(file, name, cfg[name], f"a crosscoder takes {only!r} only")
    for name in ("rescale_acts_by_decoder_norm", "finetuning_scaling_factor"):
        if _switch(file, cfg, name, False):
            _refuse(file, name, True, "a crosscoder takes false only")
    if activation not in RANKED and cfg.get("k") is not None:
        _refuse(file, "k", cfg["k"], f"a {activation} crosscoder has no k")
    _reshaping(file, cfg)
    return Settings(
        folder=folder,
        written=written,
        legacy=False,
        architecture=activation,
        d_in=sizes["d_in"],
        d_sae=sizes["d_sae"],
        d_out=sizes["d_in"],
        layers=sizes["layers"],
        k=_k(file, cfg.get("k"), sizes["d_sae"]) if activation in RANKED else None,
        dtype=_dtype(file, cfg),
        subtracts_b_dec=True,
        rescales=False,
        normalization="none",
        finetuned=False,
        metadata=metadata,
    )


def _k(file: Path, k: Any, d_sae: int) -> int:
    if not _is_size(k) or k > d_sae:
        _refuse(file, "k", k, f"it must be an integer between 1 and d_sae={d_sae}")
    return k


def _dtype(file: Path, cfg: dict[str, Any]) -> str:
    dtype = cfg.get("dtype", "float32")
    name = dtype.removeprefix("torch.") if isinstance(dtype, str) else None
    if name not in DTYPES:
        _refuse(file, "dtype", dtype, f"must be one of {', '.join(DTYPES)}")
    if not isinstance(cfg.get("device", "cpu"), str):
        _refuse(file, "device", cfg["device"], "must be the name of a device")
    return name


def _rescales(file: Path, cfg: dict[str, Any], architecture: str) -> bool:
    rescales = _switch(file, cfg, "rescale_acts_by_decoder_norm", architecture in CHECKPOINTS)
    if rescales and architecture not in (*RANKED, *CHECKPOINTS):
        _refuse(file, "rescale_acts_by_decoder_norm", True, f"a {architecture} SAE has no such setting")
    return rescales


def _normalization(file: Path, cfg: dict[str, Any], legacy: bool, transcoder: bool) -> str:
    """Return how inputs are scaled before encoding: "none", or by statistics stored beside the weights."""
    _reshaping(file, cfg)
    name = "normalize_activations"
    value = cfg.get(name, "none")
    if legacy and (value is None or isinstance(value, bool)):
        value = "expected_average_only_in" if value else "none"
    if not isinstance(value, str) or value not in ("none", *_ESTIMATED, *_PER_TOKEN):
        _refuse(file, name, value, f"must be one of none, {', '.join((*_ESTIMATED, *_PER_TOKEN))}")
    if value in _PER_TOKEN:
        _refuse(
            file,
            name,
            value,
            "scales every token by its own statistics, which cannot be folded into the weights: this reader takes "
            "'none' only",
        )
    if value in _ESTIMATED and transcoder:
        _refuse(file, name, value, "is not defined for a transcoder's output: this reader takes 'none' only")
    return value


def _reshaping(file: Path, cfg: dict[str, Any]) -> None:
    if cfg.get("reshape_activations", "none") != "none":
        _refuse(file, "reshape_activations", cfg["reshape_activations"], "this reader takes 'none' only")


def _switch(file: Path, cfg: dict[str, Any], name: str, default: bool) -> bool:
    value = cfg.get(name, default)
    if not isinstance(value, bool):
        _refuse(file, name, value, "must be true or false")
    return value


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**63


def _refuse(file: Path, name: str, value: Any, expected: str) -> NoReturn:
    raise ValueError(f"{file}: {name} is {shown(value)}: {expected}")
