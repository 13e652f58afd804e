"""Which generation a checkpoint is of, from the names and shapes of its weights and what its meta file tells."""

import re
import warnings
from collections.abc import Mapping
from typing import Any

from bridge.nanochat.config import GENERATIONS, HEAD_DIM, GPTConfig

OVERRIDES = (
    "generation",
    "softcap",
    "rope_table",
    "rope_base",
    "qk_scale",
    "window_pattern",
    "sequence_len",
    "n_head",
    "vocab_size",
)
_SIZES = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
_SEQUENCE_LEN = 2048  # of every script of upstream, for files that do not say
_G5_EVAL_TOKENS = 41943040  # base training's default from 2026-03-04 on; the softcap was 20 until 03-09

Shapes = Mapping[str, tuple[int, ...]]


def check_overrides(overrides: Mapping[str, Any]) -> None:
    """Raises TypeError for a name that no override has."""
    for name in overrides:
        if name not in OVERRIDES:
            raise TypeError(f"no override {name!r} for a checkpoint; there are {', '.join(OVERRIDES)}")


def deduce(
    shapes: Shapes, meta: Mapping[str, Any], overrides: Mapping[str, Any], vocab_size: int | None = None
) -> tuple[str, GPTConfig]:
    """The generation and config of a checkpoint. Nothing larger than the config is made.

    Args:
        shapes: of every tensor, by its name without the prefix of a compiled model.
        meta: the meta file, empty where there is none.
        overrides: what the caller knows better; see OVERRIDES.
        vocab_size: the tokenizer's, for files without meta.

    Warns (UserWarning) of every choice that the files leave open, and names the override that settles it.

    Raises:
        ValueError: these are no weights of a nanochat, of a side branch, or not those that meta tells of.
    """
    _refuse_foreign(shapes)
    overrides = {name: value for name, value in overrides.items() if value is not None}
    told = meta.get("model_config", {})
    if not isinstance(told, dict) or (meta and not told):
        raise ValueError(f"the meta file's model_config must be a table of sizes, got {told!r}")
    fields = _sizes(shapes, told, overrides, vocab_size)
    pattern = overrides.get("window_pattern", told.get("window_pattern"))
    if not isinstance(pattern, str | None):
        raise ValueError(f"window_pattern must be of the letters S and L, got {pattern!r}")
    generation = overrides.get("generation") or _generation(shapes, meta, pattern, fields["vocab_size"])
    if generation == "G4" and "generation" not in overrides:
        generation = _g4_or_g5(meta, overrides.get("softcap"))
    if "window" in GENERATIONS.get(generation, ()):
        fields["window_pattern"] = _missing_pattern(meta) if pattern is None else pattern.upper()
    elif pattern is not None and "generation" not in overrides:
        raise ValueError(f"a window_pattern {pattern!r}, but the weights are of {generation}, which knows no windows")
    arithmetic = {k: v for k, v in overrides.items() if k in ("softcap", "rope_table", "rope_base", "qk_scale")}
    return generation, GPTConfig.of(generation, **fields, **arithmetic)


def _refuse_foreign(shapes: Shapes) -> None:
    if any(re.search(r"\.(router|moe|experts|shared_expert)\.", name) for name in shapes):
        raise ValueError(
            "this is a mixture of experts of nanochat's side branches moe and moe3, which is not supported"
        )
    if any(name.startswith(("value_embed_A.", "value_embed.", "v0_lambdas")) for name in shapes):
        raise ValueError(
            "this is an experiment of 2026-01-16 from nanochat's side branch ve (v0_lambdas instead of gates), "
            "which is not supported"
        )
    needed = ("transformer.wte.weight", "transformer.h.0.attn.c_k.weight", "lm_head.weight")
    if missing := [name for name in needed if len(shapes.get(name, ())) != 2]:
        found = ", ".join(list(shapes)[:4]) or "nothing"
        raise ValueError(f"these are not a nanochat's weights: no matrix {', '.join(missing)}; found {found}, ...")


def _sizes(shapes: Shapes, told: dict, overrides: Mapping[str, Any], vocab_size: int | None) -> dict[str, Any]:
    """Upstream's six sizes, from overrides, meta and shapes in that order; what meta says must fit the shapes."""
    rows, n_embd = shapes["transformer.wte.weight"]
    layers = {match[1] for name in shapes if (match := re.match(r"transformer\.h\.(\d+)\.", name))}
    given = {k: v for k, v in overrides.items() if k in _SIZES}
    if told:
        if missing := [k for k in _SIZES if k not in told]:
            raise ValueError(f"the meta file's model_config lacks {', '.join(missing)}")
        if wrong := {k: told[k] for k in _SIZES if type(told[k]) is not int}:
            raise ValueError(f"the meta file's model_config must hold whole numbers, got {wrong}")
        if extra := sorted(told.keys() - {*_SIZES, "window_pattern"}):
            warnings.warn(f"the meta file's model_config has {', '.join(extra)}, unknown here: ignored", stacklevel=4)
        sizes = {k: told[k] for k in _SIZES} | given
    else:
        sizes = _sizes_without_meta(rows, n_embd, len(layers), given, vocab_size)
    if "n_head" in given or not told:
        sizes["n_kv_head"] = _kv_heads(shapes, n_embd, sizes["n_head"])
    for name, found in (("n_layer", len(layers)), ("n_embd", n_embd)):
        if sizes[name] != found:
            raise ValueError(f"the meta file says {name}={sizes[name]!r}, but the weights have {found}")
    return sizes


def _sizes_without_meta(rows: int, n_embd: int, n_layer: int, given: dict, vocab_size: int | None) -> dict[str, Any]:
    guesses = {"sequence_len": _SEQUENCE_LEN, "n_head": max(1, n_embd // HEAD_DIM)}
    if vocab_size is None:
        guesses["vocab_size"] = rows
    if guessed := {k: v for k, v in guesses.items() if k not in given}:
        names = ", ".join(f"{k}={v}" for k, v in guessed.items())
        warnings.warn(f"no meta file beside the weights: took {names}; give what is wrong as arguments", stacklevel=5)
    return {"n_layer": n_layer, "n_embd": n_embd, "vocab_size": vocab_size} | guesses | given


def _kv_heads(shapes: Shapes, n_embd: int, n_head: Any) -> int:
    rows = shapes["transformer.h.0.attn.c_k.weight"][0]
    if not isinstance(n_head, int) or n_head < 1 or n_embd % n_head or rows % (n_embd // n_head):
        raise ValueError(f"n_head={n_head!r} does not divide n_embd {n_embd} and the {rows} rows of c_k into heads")
    return rows // (n_embd // n_head)


def _generation(shapes: Shapes, meta: Mapping[str, Any], pattern: str | None, vocab_size: int) -> str:
    """The generation by its weights; the softcap of G5 leaves no trace there, so G5 is G4 here."""
    gates = {shape[-1] for name, shape in shapes.items() if name.endswith(".attn.ve_gate.weight") and shape}
    if gates == {12}:
        return "G7" if "smear_gate.weight" in shapes else "G6"
    if gates == {32}:
        return "G4e" if "bigram_embed.embed.weight" in shapes else "G4"
    if gates:
        raise ValueError(f"value embedding gates of width {sorted(gates)}; nanochat's have 32 or, later, 12")
    if "resid_lambdas" not in shapes:
        return "G0" if shapes["transformer.wte.weight"][0] == vocab_size else "G1"
    if pattern is not None:
        return "G3"
    if not meta:
        warnings.warn(
            'no meta file beside the weights: took generation="G2", whose weights have the same names as those of G3',
            stacklevel=4,
        )
        return "G2"
    # Only base training notes its batch size. Other files without a pattern are of mid-training, which did not write
    # it down; upstream reads them as "L", and that is G3: even long layers are windowed to sequence_len.
    return "G2" if "device_batch_size" in meta or "max_seq_len" in meta else "G3"


def _missing_pattern(meta: Mapping[str, Any]) -> str:
    pattern, why = ("L", "as upstream does") if meta else ("SSSL", "upstream's default")
    warnings.warn(
        f'no file tells the window_pattern: took "{pattern}", {why}; models tuned from 2026-01-11 to 02-01 lack it, '
        'and their base models had "SSSL"',
        stacklevel=4,
    )
    return pattern


def _g4_or_g5(meta: Mapping[str, Any], softcap: float | int | None) -> str:
    """G5 is G4 with softcap 20. What tells them apart is when the training script wrote which settings."""
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
            "no file tells the softcap: took 15, but models trained from 2026-03-03 to 03-09 have 20 (softcap=20)",
            stacklevel=4,
        )
    return "G4"
