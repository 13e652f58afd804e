"""What the files beside the weights say of a model: nanochat's meta file, or the config.json of other libraries."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from bridge.nanochat.config import SMEAR_CHANNELS, GPTConfig
from bridge.nanochat.names import shown

SIZES = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
META = "the meta file's model_config"
_ALIASES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_kv_head",
    "max_position_embeddings": "sequence_len",
    "block_size": "sequence_len",
    "n_positions": "sequence_len",
    "n_ctx": "sequence_len",
}
_TRANSFORMERS_EPS, _MLX_EPS = 1e-6, 1e-5
_TRANSFORMERS_DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": _TRANSFORMERS_EPS}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the files say of a model."""

    source: str = ""
    """The file, in words; empty where there is none."""
    sizes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Of nanochat's six sizes those that are told."""
    window_pattern: Any = None
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The meta file, empty where there is none."""
    others: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Every other setting; it must be one that changes nothing (`check_others`)."""
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of the config that another library computes with."""
    generation: str | None = None
    """The only generation that the library computes."""

    @property
    def softcap(self) -> float | int | None:
        """The softcap that a file tells under any of its names."""
        told = [value for name, value in self.others.items() if _last(name) in _SOFTCAPS and _is_number(value)]
        return told[0] if told else None


def of_meta(meta: Mapping[str, Any], config: Mapping[str, Any], base: Mapping[str, Any]) -> Settings:
    """Return the settings of a meta file, those of a config.json beside it being others.

    Args:
        meta: the meta file; empty where there is none.
        config: the config.json; empty where there is none. It counts where the meta file tells nothing.
        base: the meta file of the base model that this one was tuned from; empty where there is none.

    Raises ValueError for a meta file without sizes, and for a config.json that gives one size twice.
    """
    if not meta and "model_config" in config:
        meta, config = config, {}
    told = meta.get("model_config", {})
    if not isinstance(told, dict) or (meta and not told):
        raise ValueError(f"the meta file's model_config must be a table of sizes, got {str(told)[:100]!r}")
    others = {f"model_config.{k}": v for k, v in told.items() if k not in (*SIZES, "window_pattern")}
    others |= _noted("", meta) | _noted("base ", base)
    container = _flat(config)
    if not meta:
        sizes = _sizes(container)
        pattern = container.pop("window_pattern", None)
        return Settings("config.json" if config else "", sizes, pattern, {}, _without_inert(container))
    sizes = {name: told[name] for name in SIZES if name in told}
    if lacking := [name for name in SIZES if name not in told]:
        raise ValueError(f"{META} lacks {', '.join(lacking)}")
    for name, value in _sizes(container).items():
        if value != sizes[name]:
            raise ValueError(f"config.json says {name}={str(value)[:50]}, but {META} {name}={str(sizes[name])[:50]}")
    pattern = told.get("window_pattern")
    container.pop("window_pattern", None)
    return Settings(META, sizes, pattern, meta, others | _without_inert(container))


def of_transformers(config: Mapping[str, Any], meta: Mapping[str, Any]) -> Settings:
    """Return what transformers' NanoChatForCausalLM computes with, from its config.json.

    Raises ValueError for a directory without config.json, and for a model that lost weights in the conversion.
    """
    if not config:
        raise ValueError("there is no config.json beside these weights of transformers, and it has the sizes: fetch it")
    told = meta.get("model_config")
    if isinstance(told, dict) and told.get("window_pattern") is not None:
        raise ValueError(
            f"the meta file has window_pattern={told['window_pattern']!r}, so the model was trained after 2026-01-11 "
            "and lost weights in the conversion to transformers' NanoChat: bring its model_*.pt"
        )
    container = _TRANSFORMERS_DEFAULTS | _flat(config)
    sizes = _sizes(container)
    if sizes.get("n_kv_head") is None and "n_head" in sizes:
        sizes["n_kv_head"] = sizes["n_head"]
    if lacking := [name for name in SIZES if name not in sizes]:
        raise ValueError(f"config.json lacks {', '.join(lacking)}")
    fixed = {
        "eps": _number(container.pop("rms_norm_eps"), "rms_norm_eps"),
        "rope_table": "compute",
        "rope_base": _number(_rope_base(container), "rope_theta"),
        "softcap": _number(container.pop("final_logit_softcapping", 15.0), "final_logit_softcapping"),
    }
    return Settings("config.json", sizes, None, meta, _without_inert(container), fixed, "G0")


def of_mlx(config: Mapping[str, Any], meta: Mapping[str, Any]) -> Settings:
    """Return what mlx-lm computes with: eps and softcap are in its code, the rest in config.json.

    Raises ValueError for a directory without config.json.
    """
    if not config:
        raise ValueError("there is no config.json beside these weights of mlx, and it has the sizes: fetch it")
    container = _flat(config)
    container.pop("rms_norm_eps", None)  # mlx-lm does not read it
    sizes = _sizes(container)
    if sizes.get("n_kv_head") is None and "n_head" in sizes:
        sizes["n_kv_head"] = sizes["n_head"]
    if lacking := [name for name in SIZES if name not in sizes]:
        raise ValueError(f"config.json lacks {', '.join(lacking)}")
    base = container.pop("rope_theta", 10000.0)
    fixed = {"eps": _MLX_EPS, "rope_table": "compute", "rope_base": _number(base, "rope_theta"), "softcap": 15.0}
    return Settings("config.json", sizes, None, meta, _without_inert(container), fixed, "G0")


def check_others(settings: Settings, config: GPTConfig, generation: str, known: Iterable[str]) -> None:
    """Raise ValueError for a setting that no nanochat has, or that differs from what the generation computes.

    Args:
        settings: their `others` are checked.
        config: what is computed.
        generation: what it is of, for the error.
        known: settings, or fields of the config, that the caller answers for.
    """
    known = set(known)
    problems, names, remedies = [], [], []
    for name, value in settings.others.items():
        last, where = _last(name), name.rpartition(".")[0]
        fields = _FIELDS.get(last, ())
        accepted = _EQUIVALENT[last](config) if last in _EQUIVALENT else None
        if known & {name, last, *fields} or _is_harmless(last, value, accepted):
            continue
        source = f"{'config.json' if where in _ROPE_TABLES else 'the meta file'}'s {where}" if where else "config.json"
        if accepted is None:
            problems.append(f"{source} has {shown(last)}={_shown(value)}, which no nanochat has")
        else:
            computed = " or ".join(map(_shown, accepted)) or "none such"
            problems.append(f"{source} has {last}={_shown(value)}, but a nanochat of {generation} has {computed}")
        names.append(last)
        remedies.append(f"{fields[0]}={_shown(value)}" if fields and _is_number(value) else f"ignore=[{last[:100]!r}]")
    if problems:
        advice = " ".join(dict.fromkeys(_ADVICE[name] for name in names if name in _ADVICE))
        raise ValueError(
            f"{'; '.join(problems[:_SHOWN])}{f' and {len(problems) - _SHOWN} more' if len(problems) > _SHOWN else ''}: "
            f"its weights would be read as another model. {advice + ' ' if advice else ''}If you know better, pass "
            f"{', '.join(dict.fromkeys(remedies[:_SHOWN]))} to bridge.nanochat.load"
        )


def _is_harmless(name: str, value: Any, accepted: tuple | None) -> bool:
    """Return whether a setting is off, or is what the model computes with."""
    if accepted is None:
        return _is_off(value)
    return (value is None and name not in _SOFTCAPS) or _equal(value, accepted)


# ---- names --------------------------------------------------------------------------------------------------------


_SOFTCAPS = (
    "softcap",
    "logit_softcap",
    "logits_softcap",
    "logits_soft_cap",
    "logit_cap",
    "logit_softcapping",
    "final_logit_softcapping",
)
_BASES = ("rope_base", "rope_theta", "rotary_base")
_EPS = ("rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon", "eps")
_ACTIVATIONS = ("mlp_type", "hidden_act", "hidden_activation", "activation", "activation_function", "act_fn")
_WIDTHS = ("intermediate_size", "n_inner", "mlp_hidden_dim", "ffn_hidden_size", "d_ff")

# What a setting of a name must be, because the model computes with it; all others must be off.
_EQUIVALENT: dict[str, Callable[[GPTConfig], tuple]] = {
    **dict.fromkeys(_SOFTCAPS, lambda config: (config.softcap,)),
    **dict.fromkeys(_BASES, lambda config: (config.rope_base,)),
    **dict.fromkeys(_EPS, lambda config: (config.eps,)),
    **dict.fromkeys(_ACTIVATIONS, lambda _: ("relu2", "relu_squared", "relu^2", "squared_relu")),
    **dict.fromkeys(_WIDTHS, lambda config: (4 * config.n_embd,)),
    **dict.fromkeys(("mlp_ratio", "mlp_mult", "mlp_expansion", "expansion_factor"), lambda _: (4,)),
    **dict.fromkeys(
        ("use_rope", "rope", "use_rotary", "qk_norm", "use_qk_norm", "causal", "is_causal"), lambda _: (True,)
    ),
    **dict.fromkeys(("rope_type", "type"), lambda _: ("default", "rope", "standard")),
    **dict.fromkeys(("norm_type", "norm"), lambda _: ("rmsnorm", "rms_norm", "rms", "RMSNorm")),
    **dict.fromkeys(("partial_rotary_factor", "rope_scale", "rope_factor", "factor"), lambda _: (1,)),
    **dict.fromkeys(("smear_channels", "smear_gate_channels"), lambda _: (SMEAR_CHANNELS,)),
    **dict.fromkeys(("ve_gate_mult", "ve_gate_scale"), lambda config: (config.ve_gate_mult,)),
    **dict.fromkeys(("use_smear", "smear"), lambda config: (config.smear,)),
    **dict.fromkeys(("use_backout", "backout"), lambda config: (config.backout,)),
    **dict.fromkeys(("depth", "num_layers"), lambda config: (config.n_layer,)),
    **dict.fromkeys(("padded_vocab_size", "padded_vocab"), lambda config: (config.padded_vocab,)),
    "pad_vocab_size_to": lambda config: tuple(
        n for n in (1, 8, 16, 32, 64, 128, 256) if -(-config.vocab_size // n) * n == config.padded_vocab
    ),
    "ve_gate_channels": lambda config: (config.ve_gate_channels,),
    "qk_scale": lambda config: (config.qk_scale,),
    "head_dim": lambda config: (config.head_dim,),
    "lambdas": lambda config: (config.lambdas,),
}
# Overrides of `load` that settle a setting of a name.
_FIELDS = {
    **dict.fromkeys(_SOFTCAPS, ("softcap", "generation")),
    **dict.fromkeys(_BASES, ("rope_base",)),
    **dict.fromkeys(_EPS, ("eps",)),
    "qk_scale": ("qk_scale",),
    "head_dim": ("n_head",),
    "padded_vocab_size": ("vocab_size",),
    "pad_vocab_size_to": ("vocab_size",),
}
_SHOWN = 4  # problems of one file that are told
_ROPE_TABLES = ("rope_parameters", "rope_scaling")
_QUANTIZED = "Quantized weights are not read: bring the model_*.pt or the safetensors file they were made of."
_ADVICE = {
    "use_rope": "Without rotary embeddings (RoPE) it needs the code it was trained with.",
    "use_xsa": "Exclusive self-attention needs the code it was trained with.",
    "tie_word_embeddings": "No nanochat's embeddings are tied.",
    "quantization": _QUANTIZED,
    "quantization_config": _QUANTIZED,
}
# Settings that change the arithmetic and leave no trace in the weights, where training scripts note them.
_TRACELESS = ("use_rope", "drop_rope", "drope", "use_xsa", "xsa", "rope_type", "rope_scaling", "use_alibi", "qk_norm")
# Fields of config.json that change no number: transformers' own bookkeeping, dropout, and settings of sampling.
_INERT = (
    "architectures auto_map model_type torch_dtype dtype transformers_version use_cache bos_token_id eos_token_id "
    "pad_token_id sep_token_id decoder_start_token_id initializer_range attention_dropout dropout resid_pdrop "
    "embd_pdrop attn_pdrop hidden_dropout _name_or_path _commit_hash id2label label2id num_labels problem_type "
    "output_attentions output_hidden_states return_dict use_return_dict torchscript tokenizer_class prefix "
    "finetuning_task task_specific_params chunk_size_feed_forward max_length min_length do_sample early_stopping "
    "num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty "
    "length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size num_return_sequences output_scores "
    "return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values "
    "exponential_decay_length_penalty suppress_tokens begin_suppress_tokens bad_words_ids _attn_implementation "
    "attn_implementation _attn_implementation_autoset is_decoder pretraining_tp gradient_checkpointing "
    "ignore_keys_at_rope_validation name model_name model_tag step val_bpb"
)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a config.json, with those of rope_parameters and rope_scaling among them."""
    flat = {name: value for name, value in config.items() if name not in _ROPE_TABLES}
    for table in _ROPE_TABLES:
        nested = config.get(table)
        if isinstance(nested, dict):
            flat |= {
                (f"{table}.{name}" if name != "rope_theta" else _free(flat, table)): v for name, v in nested.items()
            }
        elif nested is not None:
            flat[table] = nested
    return flat


def _free(flat: Mapping[str, Any], table: str) -> str:
    """Return the name under which a nested rope_theta goes: its own, unless the config has one besides."""
    return f"{table}.rope_theta" if "rope_theta" in flat else "rope_theta"


def _rope_base(container: dict[str, Any]) -> Any:
    base = container.pop("rope_theta", None)
    return 10000.0 if base is None else base


def _sizes(container: dict[str, Any]) -> dict[str, Any]:
    """Take nanochat's sizes out of a config.json, under their own names or those of transformers.

    Raises ValueError for a size that is told twice, and differently.
    """
    sizes: dict[str, Any] = {}
    real = container.pop("text_vocab_size", None)
    padded = container.pop("vocab_size", None)
    if real is not None:
        sizes["vocab_size"] = real
        container.setdefault("padded_vocab_size", padded)
    elif padded is not None:
        sizes["vocab_size"] = padded
    names = {name: name for name in SIZES} | _ALIASES
    for name, size in names.items():
        value = container.pop(name, None)
        if value is None:
            continue
        if size in sizes and sizes[size] != value:
            raise ValueError(f"config.json tells {size} twice: {str(sizes[size])[:50]} and {name}={str(value)[:50]}")
        sizes[size] = value
    return sizes


def _noted(where: str, meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a training script noted of settings that leave no trace in the weights."""
    tables = ("loop_state", "user_config") if not where else ("model_config", "loop_state", "user_config")
    noted: dict[str, Any] = {}
    for table in tables:
        told = meta.get(table)
        if isinstance(told, dict):
            noted |= {f"{where}{table}.{name}": told[name] for name in _TRACELESS if name in told}
    return noted


def _without_inert(container: Mapping[str, Any]) -> dict[str, Any]:
    inert = frozenset(_INERT.split())
    return {name: value for name, value in container.items() if name not in inert}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(value: Any, name: str) -> float | int:
    if not _is_number(value):
        raise ValueError(f"config.json says {name}={_shown(value)}, and a nanochat computes with a number there")
    return value


def _is_off(value: Any) -> bool:
    return value is None or (isinstance(value, (bool, int, float, str, list, dict)) and not value)


def _equal(value: Any, accepted: tuple) -> bool:
    for right in accepted:
        if _is_number(value) and _is_number(right):
            if math.isclose(value, right, rel_tol=1e-6):
                return True
        elif value == right and isinstance(value, bool) == isinstance(right, bool):
            return True
    return False


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
