"""Settings from the files beside the weights: nanochat's meta file, or the config.json of other libraries."""

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
    """The settings of a model that its files contain."""

    source: str = ""
    """The name of the file, for messages; empty if there is none."""
    sizes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Those of nanochat's six sizes that the files contain."""
    window_pattern: Any = None
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The content of the meta file; empty if there is none."""
    others: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """All other settings, which must not change the arithmetic (`check_others`)."""
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of the config that another library determines."""
    generation: str | None = None
    """The only generation that the other library supports."""

    @property
    def softcap(self) -> float | int | None:
        """The softcap in the files, under any of its names; None if they lack it."""
        values = [value for name, value in self.others.items() if _last(name) in _SOFTCAPS and _is_number(value)]
        return values[0] if values else None


def from_meta(meta: Mapping[str, Any], config: Mapping[str, Any], base: Mapping[str, Any]) -> Settings:
    """Return the settings of nanochat's own files.

    Args:
        meta: the meta file; {} if there is none.
        config: the config.json; {} if there is none. It provides the sizes if there is no meta file.
        base: the meta file of the base model that this one was tuned from; {} if there is none.

    Raises ValueError if the meta file lacks sizes, or a size has two different values.
    """
    if not meta and "model_config" in config:
        meta, config = config, {}
    model_config = meta.get("model_config", {})
    if not isinstance(model_config, dict) or (meta and not model_config):
        raise ValueError(f"the meta file's model_config must be a table of sizes, got {str(model_config)[:100]!r}")
    others = {f"model_config.{k}": v for k, v in model_config.items() if k not in (*SIZES, "window_pattern")}
    others |= _training_settings("", meta) | _training_settings("base ", base)
    container = _flat(config)
    if not meta:
        sizes = _sizes(container)
        pattern = container.pop("window_pattern", None)
        return Settings("config.json" if config else "", sizes, pattern, {}, _without_inert(container))
    sizes = {name: model_config[name] for name in SIZES if name in model_config}
    if missing := [name for name in SIZES if name not in model_config]:
        raise ValueError(f"{META} lacks {', '.join(missing)}")
    for name, value in _sizes(container).items():
        if value != sizes[name]:
            raise ValueError(f"config.json says {name}={str(value)[:50]}, but {META} {name}={str(sizes[name])[:50]}")
    pattern = model_config.get("window_pattern")
    container.pop("window_pattern", None)
    return Settings(META, sizes, pattern, meta, others | _without_inert(container))


def from_transformers(config: Mapping[str, Any], meta: Mapping[str, Any]) -> Settings:
    """Return the settings of transformers' NanoChatForCausalLM, from its config.json.

    Args:
        config: the config.json; {} if there is none.
        meta: nanochat's meta file; {} if there is none.

    Raises ValueError if config.json is missing, or the model has lost weights in the conversion.
    """
    if not config:
        raise ValueError("these weights of transformers need the sizes in config.json, which is missing: fetch it")
    model_config = meta.get("model_config")
    if isinstance(model_config, dict) and model_config.get("window_pattern") is not None:
        raise ValueError(
            f"the meta file has window_pattern={model_config['window_pattern']!r}, so the model was trained after "
            "2026-01-11 and lost weights in the conversion to transformers' NanoChat: give its model_*.pt"
        )
    container = _TRANSFORMERS_DEFAULTS | _flat(config)
    sizes = _sizes(container)
    if sizes.get("n_kv_head") is None and "n_head" in sizes:
        sizes["n_kv_head"] = sizes["n_head"]
    if missing := [name for name in SIZES if name not in sizes]:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    fixed = {
        "eps": _number(container.pop("rms_norm_eps"), "rms_norm_eps"),
        "rope_table": "compute",
        "rope_base": _number(_rope_base(container), "rope_theta"),
        "softcap": _number(container.pop("final_logit_softcapping", 15.0), "final_logit_softcapping"),
    }
    return Settings("config.json", sizes, None, meta, _without_inert(container), fixed, "G0")


def from_mlx(config: Mapping[str, Any], meta: Mapping[str, Any]) -> Settings:
    """Return the settings of mlx-lm: eps and softcap are constants of its code, the rest is in config.json.

    Args:
        config: the config.json; {} if there is none.
        meta: nanochat's meta file; {} if there is none.

    Raises ValueError if config.json is missing.
    """
    if not config:
        raise ValueError("these weights of mlx need the sizes in config.json, which is missing: fetch it")
    container = _flat(config)
    container.pop("rms_norm_eps", None)  # mlx-lm does not read it
    sizes = _sizes(container)
    if sizes.get("n_kv_head") is None and "n_head" in sizes:
        sizes["n_kv_head"] = sizes["n_head"]
    if missing := [name for name in SIZES if name not in sizes]:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    base = container.pop("rope_theta", 10000.0)
    fixed = {"eps": _MLX_EPS, "rope_table": "compute", "rope_base": _number(base, "rope_theta"), "softcap": 15.0}
    return Settings("config.json", sizes, None, meta, _without_inert(container), fixed, "G0")


def check_others(settings: Settings, config: GPTConfig, generation: str, known: Iterable[str]) -> None:
    """Raise ValueError for a setting that no nanochat has, or that differs from the arithmetic of the generation.

    Args:
        settings: settings from files; `others` are checked.
        config: the config of the model.
        generation: its generation, for the error message.
        known: settings, or fields of the config, that are not checked because the caller has set them.
    """
    known = set(known)
    problems, names, remedies = [], [], []
    for name, value in settings.others.items():
        last, table = _last(name), name.rpartition(".")[0]
        fields = _FIELDS.get(last, ())
        accepted = _EQUIVALENT[last](config) if last in _EQUIVALENT else None
        if known & {name, last, *fields} or _is_harmless(last, value, accepted):
            continue
        source = f"{'config.json' if table in _ROPE_TABLES else 'the meta file'}'s {table}" if table else "config.json"
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
            f"the weights would be run as another model. {advice + ' ' if advice else ''}To load it anyway, pass "
            f"{', '.join(dict.fromkeys(remedies[:_SHOWN]))} to bridge.nanochat.load"
        )


def _is_harmless(name: str, value: Any, accepted: tuple | None) -> bool:
    """Return whether a setting is disabled, or has a value that the model uses."""
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

# The accepted values of a setting, given the config of the model. All other settings must be disabled.
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
# Overrides of `load` that determine a setting.
_FIELDS = {
    **dict.fromkeys(_SOFTCAPS, ("softcap", "generation")),
    **dict.fromkeys(_BASES, ("rope_base",)),
    **dict.fromkeys(_EPS, ("eps",)),
    "qk_scale": ("qk_scale",),
    "head_dim": ("n_head",),
    "padded_vocab_size": ("vocab_size",),
    "pad_vocab_size_to": ("vocab_size",),
}
_SHOWN = 4  # problems in one error message
_ROPE_TABLES = ("rope_parameters", "rope_scaling")
_QUANTIZED = "Quantized weights are not supported: give the model_*.pt or safetensors file that they were made from."
_ADVICE = {
    "use_rope": "Without rotary embeddings (RoPE) it needs the code it was trained with.",
    "use_xsa": "Exclusive self-attention needs the code it was trained with.",
    "tie_word_embeddings": "No nanochat's embeddings are tied.",
    "quantization": _QUANTIZED,
    "quantization_config": _QUANTIZED,
}
# Settings that change the arithmetic but not the names and shapes of the weights, as training scripts store them.
_TRACELESS = ("use_rope", "drop_rope", "drope", "use_xsa", "xsa", "rope_type", "rope_scaling", "use_alibi", "qk_norm")
# Fields of config.json that do not affect logits: transformers' bookkeeping, dropout, and settings of sampling.
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
    """Return the fields of a config.json, merged with those of the nested rope_parameters and rope_scaling."""
    flat = {name: value for name, value in config.items() if name not in _ROPE_TABLES}
    for table in _ROPE_TABLES:
        nested = config.get(table)
        if isinstance(nested, dict):
            theta = _theta_name(flat, table)
            flat |= {(f"{table}.{name}" if name != "rope_theta" else theta): v for name, v in nested.items()}
        elif nested is not None:
            flat[table] = nested
    return flat


def _theta_name(flat: Mapping[str, Any], table: str) -> str:
    """Return the name of a nested rope_theta: plain, unless the config also has one at the top level."""
    return f"{table}.rope_theta" if "rope_theta" in flat else "rope_theta"


def _rope_base(container: dict[str, Any]) -> Any:
    base = container.pop("rope_theta", None)
    return 10000.0 if base is None else base


def _sizes(container: dict[str, Any]) -> dict[str, Any]:
    """Remove nanochat's sizes from a config.json, under their own names or those of transformers, and return them.

    Raises ValueError for a size with two different values.
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
            raise ValueError(f"config.json has two values of {size}: {str(sizes[size])[:50]}, {name}={str(value)[:50]}")
        sizes[size] = value
    return sizes


def _training_settings(prefix: str, meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in a meta file that change the arithmetic but cannot be seen in the weights."""
    tables = ("loop_state", "user_config") if not prefix else ("model_config", "loop_state", "user_config")
    settings: dict[str, Any] = {}
    for table in tables:
        fields = meta.get(table)
        if isinstance(fields, dict):
            settings |= {f"{prefix}{table}.{name}": fields[name] for name in _TRACELESS if name in fields}
    return settings


def _without_inert(container: Mapping[str, Any]) -> dict[str, Any]:
    inert = frozenset(_INERT.split())
    return {name: value for name, value in container.items() if name not in inert}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(value: Any, name: str) -> float | int:
    if not _is_number(value):
        raise ValueError(f"config.json says {name}={_shown(value)}; it must be a number")
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
