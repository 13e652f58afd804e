"""Deduce the generation of a checkpoint from the names and shapes of its weights and from the files beside them."""

import re
import warnings
from collections.abc import Mapping
from typing import Any

from bridge.nanochat.config import GENERATIONS, HEAD_DIM, GPTConfig
from bridge.nanochat.settings import SIZES, Settings

OVERRIDES = (
    "generation",
    "softcap",
    "rope_table",
    "rope_base",
    "qk_scale",
    "eps",
    "window_pattern",
    "sequence_len",
    "n_head",
    "vocab_size",
)
_ARITHMETIC = ("softcap", "rope_table", "rope_base", "qk_scale", "eps")
_LONGEST_PATTERN = 1024  # letters
_SEQUENCE_LEN = 2048  # default of all upstream scripts, for files that do not say
_G5_EVAL_TOKENS = 41943040  # base training's default from 2026-03-04 on; the softcap was 20 until 03-09

Shapes = Mapping[str, tuple[int, ...]]


def check_overrides(overrides: Mapping[str, Any]) -> None:
    """Raise TypeError for an override that is not in `OVERRIDES`."""
    for name in overrides:
        if name not in OVERRIDES:
            raise TypeError(f"no override {name!r} for a checkpoint; there are {', '.join(OVERRIDES)}")


def deduce(
    shapes: Shapes, settings: Settings, overrides: Mapping[str, Any], vocab_size: int | None = None
) -> tuple[str, GPTConfig]:
    """Return the generation and config of a checkpoint, without allocating the model.

    Args:
        shapes: shape of every tensor, by nanochat's names.
        settings: settings from the files beside the weights.
        overrides: values given by the caller, which take precedence; see `OVERRIDES`.
        vocab_size: the tokenizer's, for files that lack it.

    Warns (UserWarning) of every setting that the files do not determine, and names the override for it.

    Raises:
        ValueError: the weights are not those of a nanochat on its main branch, or contradict the settings.
    """
    overrides = {name: value for name, value in overrides.items() if value is not None}
    fields = _sizes(shapes, settings, overrides, vocab_size)
    pattern = overrides.get("window_pattern", settings.window_pattern)
    if not isinstance(pattern, str | None) or len(pattern or "") > _LONGEST_PATTERN:
        raise ValueError(f"window_pattern must consist of the letters S and L, got {str(pattern)[:100]!r}")
    generation = overrides.get("generation") or settings.generation
    generation = generation or _generation(shapes, settings, pattern, fields["vocab_size"])
    if generation == "G4" and "generation" not in overrides:
        generation = _g4_or_g5(settings.meta, overrides.get("softcap", settings.softcap))
    if "window" in GENERATIONS.get(generation, ()):
        fields["window_pattern"] = _missing_pattern(settings.meta) if pattern is None else pattern.upper()
    elif pattern is not None and "generation" not in overrides:
        raise ValueError(f"window_pattern {pattern!r} is given, but the weights are of {generation}, without windows")
    arithmetic = {name: overrides[name] for name in _ARITHMETIC if name in overrides}
    return generation, GPTConfig.of_generation(generation, **fields, **{**settings.fixed, **arithmetic})


def _sizes(shapes: Shapes, settings: Settings, overrides: Mapping[str, Any], vocab_size: int | None) -> dict[str, Any]:
    """Return upstream's six sizes, from overrides, files and shapes in this order. Files must agree with shapes."""
    rows, n_embd = shapes["transformer.wte.weight"]
    layers = {match[1] for name in shapes if (match := re.match(r"transformer\.h\.(\d+)\.", name))}
    overridden = {k: v for k, v in overrides.items() if k in SIZES}
    stored = dict(settings.sizes)
    if wrong := {k: v for k, v in stored.items() if type(v) is not int}:
        raise ValueError(f"the sizes in {settings.source} must be whole numbers, got {str(wrong)[:200]}")
    guesses = {"sequence_len": _SEQUENCE_LEN, "n_head": max(1, n_embd // HEAD_DIM)}
    guesses["vocab_size"] = rows if vocab_size is None else vocab_size
    if guessed := {k: v for k, v in guesses.items() if k not in stored and k not in overridden}:
        names = ", ".join(f"{k}={v}" for k, v in guessed.items())
        reason = "no meta file beside the weights" if not settings.source else f"{settings.source} lacks some sizes"
        tokenizers = " (vocab_size is the tokenizer's)" if "vocab_size" in guessed and vocab_size is not None else ""
        warnings.warn(f"{reason}: assumed {names}{tokenizers}; pass other values as arguments", stacklevel=4)
    sizes = {"n_layer": len(layers), "n_embd": n_embd} | guesses | stored | overridden
    if "n_head" in overridden or "n_kv_head" not in stored:
        sizes["n_kv_head"] = _kv_heads(shapes, n_embd, sizes["n_head"])
    for name, actual in (("n_layer", len(layers)), ("n_embd", n_embd)):
        if sizes[name] != actual:
            raise ValueError(f"{settings.source} says {name}={sizes[name]!r}, but the weights have {actual}")
    return sizes


def _kv_heads(shapes: Shapes, n_embd: int, n_head: Any) -> int:
    rows = shapes["transformer.h.0.attn.c_k.weight"][0]
    if not isinstance(n_head, int) or n_head < 1 or n_embd % n_head or rows % (n_embd // n_head):
        raise ValueError(f"n_head={n_head!r} does not divide n_embd {n_embd} and the {rows} rows of c_k into heads")
    return rows // (n_embd // n_head)


def _generation(shapes: Shapes, settings: Settings, pattern: str | None, vocab_size: int) -> str:
    """Return the generation that the weights show. They do not contain the softcap of G5, so G5 is returned as G4."""
    gates = {shape[-1] for name, shape in shapes.items() if name.endswith(".attn.ve_gate.weight") and shape}
    if gates == {12}:
        return "G7" if "smear_gate.weight" in shapes else "G6"
    if gates == {32}:
        return "G4e" if "bigram_embed.embed.weight" in shapes else "G4"
    if gates:
        raise ValueError(f"value embedding gates of width {sorted(gates)}; nanochat's are 32 or, later, 12 wide")
    if "resid_lambdas" not in shapes:
        return "G0" if shapes["transformer.wte.weight"][0] == vocab_size else "G1"
    if pattern is not None:
        return "G3"
    meta = settings.meta
    if not meta:
        warnings.warn(
            'no meta file beside the weights: assumed generation="G2"; G3 has weights of the same names',
            stacklevel=4,
        )
        return "G2"
    # Only base training stores its batch size. Other files without a pattern are from mid-training, which did not
    # store the pattern. Upstream reads them as "L", which is G3: even long layers have a window of sequence_len.
    return "G2" if "device_batch_size" in meta or "max_seq_len" in meta else "G3"


def _missing_pattern(meta: Mapping[str, Any]) -> str:
    pattern, why = ("L", "as upstream does") if meta else ("SSSL", "upstream's default")
    warnings.warn(
        f'no file contains the window_pattern: assumed "{pattern}", {why}; models tuned from 2026-01-11 to 02-01 lack '
        'it, and their base models had "SSSL"',
        stacklevel=4,
    )
    return pattern


def _g4_or_g5(meta: Mapping[str, Any], softcap: float | int | None) -> str:
    """Return "G5", which is G4 with softcap 20, or "G4", judged by the settings that the training script stored."""
    if softcap is not None:
        return "G5" if softcap == 20 else "G4"
    user = meta.get("user_config")
    user = user if isinstance(user, dict) else {}
    if user.get("eval_tokens") == _G5_EVAL_TOKENS:
        return "G5"
    before_patterns = bool(meta) and "window_pattern" not in meta["model_config"]  # tuned before 2026-02-01
    before_fp8 = "depth" in user and "fp8" not in user  # a base model from before 2026-02-03
    if not (before_patterns or before_fp8):
        warnings.warn(
            "no file contains the softcap: assumed 15; models trained from 2026-03-03 to 03-09 have 20 (softcap=20)",
            stacklevel=4,
        )
    return "G4"
