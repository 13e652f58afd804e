"""Formats that nanochats come in, made here: what pairs with what, what is computed, what is refused and how."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_nanochat import SIZES, model_config, tiny, tokens, write

from bridge import nanochat
from bridge.nanochat import locate
from bridge.nanochat import tokenizer as tokenizers
from bridge.nanochat.model import GPT, GPTConfig
from bridge.nanochat.tokenizer import PATTERN, SPECIAL_TOKENS, Tokenizer

HF_NAMES = {"attn.c_q": "self_attn.q_proj", "attn.c_k": "self_attn.k_proj", "attn.c_v": "self_attn.v_proj"}
HF_NAMES |= {"attn.c_proj": "self_attn.o_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
HF_NAMES |= {"transformer.wte": "model.embed_tokens", "transformer.h": "model.layers"}


def quietly(*args, **kwargs):
    with warnings.catch_warnings(action="ignore"):
        return nanochat.load(*args, **kwargs)


def save(folder: Path, weights: dict, name: str = "model.safetensors", **metadata: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / name, metadata or None)
    return folder


def put(folder: Path, name: str, table: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(table))
    return folder


def meta(model: GPT, **more) -> dict:
    return {"model_config": model_config(model) | more, "device_batch_size": 2, "user_config": {"depth": 4}}


def hf_config(model: GPT, **changes) -> dict:
    config = model.config
    return {
        "architectures": ["NanoChatForCausalLM"],
        "model_type": "nanochat",
        "attention_bias": False,
        "attention_dropout": 0.1,
        "final_logit_softcapping": 15.0,
        "hidden_act": "relu2",
        "hidden_size": config.n_embd,
        "intermediate_size": 4 * config.n_embd,
        "max_position_embeddings": config.sequence_len,
        "num_attention_heads": config.n_head,
        "num_hidden_layers": config.n_layer,
        "num_key_value_heads": config.n_kv_head,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "vocab_size": config.vocab_size,
    } | changes


def hf(folder: Path, model: GPT, **changes) -> Path:
    weights = model.state_dict()
    for ours, theirs in HF_NAMES.items():
        weights = {name.replace(ours, theirs): tensor for name, tensor in weights.items()}
    return put(save(folder, weights, format="pt"), "config.json", hf_config(model, **changes))


def remote(folder: Path, model: GPT, prefix: str = "", **changes) -> Path:
    config = (
        model_config(model) | {"auto_map": {"AutoModel": "modeling_nanochat.X"}, "model_type": "nanochat"} | changes
    )
    save(folder, {prefix + name: tensor for name, tensor in model.state_dict().items()})
    (folder / "modeling_nanochat.py").write_text("raise RuntimeError")
    return put(folder, "config.json", {name: value for name, value in config.items() if value != "absent"})


def same(nano: nanochat.Nanochat, model: GPT) -> bool:
    return torch.equal(nano.model(tokens(30)), model(tokens(30)))


# ---- safetensors with nanochat's keys -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        ("model_000010.safetensors", "meta_000010.json"),
        ("model_d20.safetensors", "meta_d20.json"),
        ("model_d20_sft-v2.safetensors", "meta_d20_sft-v2.json"),
        ("model.safetensors", "meta.json"),
        ("model_000010.safetensors", "config_000010.json"),
    ],
)
def test_safetensors_are_paired_with_the_meta_file_of_their_name(tmp_path, weights, told):
    model = tiny("G7")
    put(save(tmp_path, model.state_dict(), weights), told, meta(model))
    put(tmp_path, "meta_other.json", meta(model, n_layer=3))
    for path in (tmp_path, tmp_path / weights):
        nano = nanochat.load(path)
        assert (nano.generation, nano.config, nano.name) == ("G7", model.config, tmp_path.name)
        assert same(nano, model)


@pytest.mark.parametrize("names", ["nanochat", "transformers"])
def test_without_a_meta_file_config_json_has_the_sizes(tmp_path, names):
    model = tiny("G3", window_pattern="SL")
    sizes = model_config(model)
    if names == "transformers":
        aliases = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
        aliases |= {"n_kv_head": "num_key_value_heads", "sequence_len": "max_position_embeddings"}
        sizes = {aliases.get(name, name): value for name, value in sizes.items()}
    put(save(tmp_path, model.state_dict()), "config.json", sizes)
    nano = nanochat.load(tmp_path)
    assert (nano.generation, nano.config) == ("G3", model.config)
    assert same(nano, model)


def test_a_config_that_contradicts_the_meta_file_is_refused(tmp_path):
    model = tiny("G7")
    put(write(tmp_path, model, "G7"), "config.json", {"n_head": 4, "hidden_size": 32})
    assert nanochat.load(tmp_path).config == model.config
    put(tmp_path, "config.json", {"n_head": 8})
    with pytest.raises(ValueError, match=r"config\.json says n_head=8, but the meta file's model_config n_head=4"):
        nanochat.load(tmp_path)
    put(tmp_path, "config.json", {"qk_scale": 1.15})
    with pytest.raises(ValueError, match=r"config\.json has qk_scale=1\.15, but a nanochat of G7 has 1\.2"):
        nanochat.load(tmp_path)


def test_the_folders_that_forks_write_for_transformers_are_steps(tmp_path):
    models = {step: tiny("G7", n_layer=n) for step, n in ((5, 2), (10, 3))}
    for step, model in models.items():
        put(remote(tmp_path / f"hf_{step:06d}", model, prefix="model."), "meta.json", meta(model))
    assert nanochat.load(tmp_path).config.n_layer == 3
    assert nanochat.load(tmp_path, step=5).config.n_layer == 2
    assert nanochat.load(tmp_path / "hf_000005").config.n_layer == 2
    with pytest.raises(FileNotFoundError, match=r"no step 6 in .*; there are 5, 10"):
        nanochat.load(tmp_path, step=6)
    write(tmp_path, tiny("G7"), "G7", step=7)
    assert nanochat.load(tmp_path).config.n_layer == 4  # nanochat's own file counts where there is one


def test_several_models_without_a_step_give_a_warning_and_one_can_be_chosen(tmp_path):
    for name, n in (("model", 2), ("model_d3", 3)):
        model = tiny("G7", n_layer=n)
        put(
            save(tmp_path, model.state_dict(), f"{name}.safetensors"),
            f"{name.replace('model', 'meta')}.json",
            meta(model),
        )
    with pytest.warns(
        UserWarning, match=r"several models, model.safetensors, model_d3.safetensors: loading model.safeten"
    ):
        assert nanochat.load(tmp_path).config.n_layer == 2
    assert nanochat.load(tmp_path / "model_d3.safetensors").config.n_layer == 3
    with pytest.raises(FileNotFoundError, match=r"no step 3 in .*; there are none, but model.safetensors, model_d3"):
        nanochat.load(tmp_path, step=3)


def test_optimizer_shards_and_variants_beside_a_checkpoint_do_not_matter(tmp_path):
    model = tiny("G7")
    for name in ("base", "sft"):
        write(tmp_path / name, model, "G7", step=3)
        (tmp_path / name / "optim_000003_rank0.pt").write_bytes(b"not read")
    tokenizers.save(tiny_tokenizer(), tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer has 265 tokens, but the model .* has 50"):
        nanochat.load(tmp_path / "sft")  # the tokenizer above it was found


def test_a_file_of_safetensors_with_the_name_of_a_torch_file_is_read_as_what_it_is(tmp_path):
    model = tiny("G7")
    put(save(tmp_path, model.state_dict(), "model_d4.safetensors"), "meta_d4.json", meta(model))
    torch.save(model.state_dict(), tmp_path / "model_d4.safetensors")
    assert same(nanochat.load(tmp_path), model)


def test_paths_may_be_relative_or_begin_at_home(tmp_path, monkeypatch):
    write(tmp_path / "d4", tiny("G7"), "G7")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("d4", "./d4/model_000000.pt", "~/d4", Path("~/d4/model_000000.pt")):
        nano = nanochat.load(path)
        assert (nano.name, nano.generation) == ("d4", "G7")
    tokenizers.save(tiny_tokenizer(), tmp_path / "t")
    assert tokenizers.load("~/t").vocab_size == 265
    for load in (nanochat.load, tokenizers.load):
        with pytest.raises(ValueError, match="no home directory is known for ~nosuchuser/x"):
            load("~nosuchuser/x")


# ---- several files ------------------------------------------------------------------------------------------------


def shard(folder: Path, count: int = 3) -> dict[str, str]:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    mapping = {name: f"model-{i % count + 1:05d}-of-{count:05d}.safetensors" for i, name in enumerate(names)}
    for file in set(mapping.values()):
        save_file({name: weights[name] for name in names if mapping[name] == file}, folder / file)
    put(folder, "model.safetensors.index.json", {"weight_map": mapping})
    return mapping


@pytest.mark.parametrize("index", [True, False])
def test_the_parts_of_a_model_in_several_files_are_put_together(tmp_path, index):
    model = tiny("G7")
    put(save(tmp_path, model.state_dict()), "meta.json", meta(model))
    shard(tmp_path)
    if not index:
        (tmp_path / "model.safetensors.index.json").unlink()
    nano = nanochat.load(tmp_path)
    assert same(nano, model)
    assert len(nano.files) == 3


def test_the_fingerprint_covers_every_part(tmp_path):
    model = tiny("G7")
    put(save(tmp_path, model.state_dict()), "meta.json", meta(model))
    mapping = shard(tmp_path)
    prints = {nanochat.load(tmp_path).fingerprint}
    for file in sorted(set(mapping.values())):
        weights = load_file(tmp_path / file)
        save_file({name: tensor + 1 for name, tensor in weights.items()}, tmp_path / file)
        prints.add(nanochat.load(tmp_path).fingerprint)
    assert len(prints) == 4


def test_parts_that_are_missing_extra_or_elsewhere_are_named(tmp_path):
    model = tiny("G7")
    put(save(tmp_path, model.state_dict()), "meta.json", meta(model))
    mapping = shard(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": mapping | {"one.more": "model-00001-of-00003.safetensors"}}))
    with pytest.raises(ValueError, match=r"and its files list different tensors: one\.more in only one place"):
        nanochat.load(tmp_path)
    index.write_text(json.dumps({"weight_map": mapping}))
    save_file({"lm_head.weight": torch.zeros(2, 2)}, tmp_path / "model-00002-of-00003.safetensors")
    with pytest.raises(ValueError, match=r"contains lm_head\.weight, which another file also|list different tensors"):
        nanochat.load(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"3 files, of which model-00002-of-00003\.safetensors is missing"):
        nanochat.load(tmp_path)


# ---- transformers and mlx -----------------------------------------------------------------------------------------


def test_weights_of_transformers_are_computed_as_transformers_does(tmp_path):
    model = tiny("G0")
    hf(tmp_path, model)
    with pytest.warns(UserWarning, match=r"eps=1e-06 .*rope_table=\"compute\".*use its model_\*\.pt") as caught:
        nano = nanochat.load(tmp_path)
    assert len(caught) == 1
    assert (nano.config.eps, nano.config.rope_table, nano.generation) == (1e-6, "compute", "G0")
    assert not same(nano, model)
    assert same(quietly(tmp_path, rope_table="bf16", eps=2**-23), model)


def test_the_eps_reaches_every_norm():
    ids = tokens(30)
    small = tiny("G7", eps=1e-6)
    for name, weight in small.named_parameters():
        weight.mul_(0.01 if "wte" in name else 1.0)
    default = GPT(GPTConfig.of_generation("G7", **SIZES)).eval().requires_grad_(False)
    default.load_state_dict(small.state_dict())
    norms = [module.eps for module in small.modules() if hasattr(module, "eps")]
    assert norms == [1e-6] * (1 + 2 * SIZES["n_layer"])
    assert (small(ids) - default(ids)).abs().max() > 1e-3


def test_older_names_of_the_same_settings_are_read(tmp_path):
    model = tiny("G0")
    hf(tmp_path, model)
    old = hf_config(model, rope_theta=50000.0, logits_soft_cap=15.0, rope_scaling=None, qkv_bias=False)
    for name in ("rope_parameters", "final_logit_softcapping", "intermediate_size"):
        del old[name]
    old["num_key_value_heads"] = model.config.n_kv_head
    put(tmp_path, "config.json", old)
    nano = quietly(tmp_path)
    assert (nano.config.rope_base, nano.config.softcap) == (50000.0, 15.0)


REFUSED = {
    "intermediate_size": (80, "intermediate_size=80"),
    "hidden_act": ("gelu", "hidden_act='gelu'"),
    "rope_parameters": ({"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, "rope_type='linear'"),
    "rope_scaling": ({"type": "yarn", "factor": 4.0}, "type='yarn'"),
    "tie_word_embeddings": (True, "tie_word_embeddings=True"),
    "attention_bias": (True, "attention_bias=True"),
    "qkv_bias": (True, "qkv_bias=True"),
    "final_logit_softcapping": (None, "final_logit_softcapping=None"),
    "logits_soft_cap": (30.0, "logits_soft_cap=30.0"),
    "use_rope": (False, "use_rope=False.*rotary"),
    "quantization_config": ({"bits": 4}, r"quantization_config=\{'bits': 4\}.*give the model_\*\.pt"),
    "num_experts": (8, "num_experts=8"),
    "window_pattern": ("SSSL", "window_pattern"),
    "rms_norm_eps": ("small", "rms_norm_eps='small'"),
    "hidden_size": (None, "lacks n_embd"),
    "vocab_size": (50.0, r"must be whole numbers"),
}


@pytest.mark.parametrize("setting", list(REFUSED))
def test_an_unknown_setting_of_transformers_is_refused_by_name(tmp_path, setting):
    value, message = REFUSED[setting]
    hf(tmp_path, tiny("G0"), **{setting: value})
    with pytest.raises(ValueError, match=message):
        quietly(tmp_path)


def test_a_model_that_lost_weights_in_the_conversion_is_refused_where_its_meta_file_tells(tmp_path):
    put(hf(tmp_path, tiny("G0")), "meta.json", meta(tiny("G7")))
    with pytest.raises(ValueError, match=r"window_pattern='SSSL', so .* lost weights .* give its model_\*\.pt"):
        quietly(tmp_path)


def test_weights_of_transformers_need_their_config(tmp_path):
    (hf(tmp_path, tiny("G0")) / "config.json").unlink()
    with pytest.raises(ValueError, match=r"weights of transformers need the sizes in config\.json, which is missing"):
        quietly(tmp_path)


def mlx(folder: Path, model: GPT, **changes) -> Path:
    config = hf_config(model) | {"rope_theta": 10000.0, "rope_parameters": None} | changes
    return put(save(folder, model.state_dict(), format="mlx"), "config.json", config)


def test_weights_of_mlx_are_computed_as_mlx_does(tmp_path):
    mlx(tmp_path, tiny("G0"))
    with pytest.warns(UserWarning, match=r"weights of mlx: computed as mlx-lm does, with eps=1e-05, softcap=15"):
        nano = nanochat.load(tmp_path)
    assert (nano.config.eps, nano.config.rope_table, nano.config.softcap) == (1e-5, "compute", 15.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization": {"bits": 8, "group_size": 64}}, "quantization=.*Quantized weights are not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "type='linear'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
        ({"rope_theta": "x"}, "rope_theta='x'"),
    ],
)
def test_an_unknown_setting_of_mlx_is_refused(tmp_path, changes, message):
    mlx(tmp_path, tiny("G0"), **changes)
    with pytest.raises(ValueError, match=message):
        quietly(tmp_path)


def test_newer_generations_in_mlx_are_refused(tmp_path):
    mlx(tmp_path, tiny("G7"))
    with pytest.raises(ValueError, match=r"do not fit a nanochat of generation G0.*unexpected: .*lambda"):
        quietly(tmp_path)


def test_quantized_weights_of_mlx_are_named(tmp_path):
    weights = tiny("G0").state_dict()
    weights["lm_head.scales"] = torch.ones(50, 1)
    weights["lm_head.weight"] = torch.zeros(50, 4, dtype=torch.uint32)
    save(tmp_path, weights, format="mlx")
    with pytest.raises(ValueError, match=r"contains quantized weights \(lm_head\.scales; .*give the model_\*\.pt"):
        nanochat.load(tmp_path)


# ---- remote code --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "model.", "_orig_mod.", "module.", "model._orig_mod."])
def test_the_weights_of_remote_code_are_loaded_without_it(tmp_path, prefix):
    model = tiny("G7")
    remote(tmp_path, model, prefix)
    nano = nanochat.load(tmp_path)
    assert (nano.generation, nano.config) == ("G7", model.config)
    assert same(nano, model)


@pytest.mark.parametrize(
    "vocabulary",
    [
        {"padded_vocab_size": 64},
        {"pad_vocab_size_to": 64},
        {"vocab_size": 64, "text_vocab_size": 50},
    ],
    ids=str,
)
def test_padded_vocabularies_of_remote_code_are_distinguished(tmp_path, vocabulary):
    model = tiny("G7")
    nano = nanochat.load(remote(tmp_path, model, **vocabulary))
    assert nano.config == model.config


def test_extra_settings_of_remote_code_must_be_what_the_generation_computes(tmp_path):
    model = tiny("G7")
    right = {"rope_base": 100000.0, "rope_theta": 100000, "logit_softcap": 15.0, "qk_scale": 1.2, "mlp_type": "relu2"}
    right |= {
        "ve_gate_channels": 12,
        "ve_gate_scale": 3.0,
        "intermediate_size": 128,
        "use_rope": True,
        "use_xsa": False,
    }
    assert nanochat.load(remote(tmp_path / "right", model, **right)).config == model.config
    wrong = {
        "rope_base": 10000.0,
        "logit_softcap": 30.0,
        "qk_scale": 1.15,
        "mlp_type": "swiglu",
        "ve_gate_channels": 32,
    }
    wrong |= {"use_rope": False, "use_xsa": True, "rope_type": "yarn", "head_dim": 16, "padded_vocab_size": 128}
    for name, value in wrong.items():
        remote(tmp_path / name, model, **{name: value})
        with pytest.raises(ValueError, match=rf"config\.json has {name}={value!r}"):
            nanochat.load(tmp_path / name)
        assert nanochat.load(tmp_path / name, ignore=[name]).generation == "G7"
    assert nanochat.load(tmp_path / "qk_scale", qk_scale=1.15).config.qk_scale == 1.15


def test_remote_code_without_a_window_pattern_has_the_exporters_default(tmp_path):
    remote(tmp_path, tiny("G7"), window_pattern="absent")
    with pytest.warns(UserWarning, match='window_pattern: assumed "SSSL"'):
        assert nanochat.load(tmp_path).config.window_pattern == "SSSL"


def test_a_softcap_in_config_json_tells_g5_from_g4(tmp_path):
    assert nanochat.load(remote(tmp_path / "a", tiny("G5"), logit_softcap=20.0)).generation == "G5"
    assert nanochat.load(remote(tmp_path / "b", tiny("G4"), logit_softcap=15)).generation == "G4"


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (
            ("attn.c_", "attn.x_"),
            r"not the weights of a nanochat: no matrix transformer\.h\.0\.attn\.c_k\.weight.*found ",
        ),
        (("mlp.c_fc", "mlp.w_gate"), "SwiGLU"),
        (("mlp.", "moe.experts."), "mixture of experts"),
        (("lm_head", "head"), "lm_head.weight is missing, so its embeddings are tied"),
        (("attn.c_proj", "attn_hc.c_proj"), "hyper-connections"),
    ],
    ids=str,
)
def test_tensors_that_are_not_nanochats_are_refused_and_named(tmp_path, rename, message):
    model = tiny("G7")
    put(tmp_path, "config.json", model_config(model))
    save(tmp_path, {name.replace(*rename): tensor for name, tensor in model.state_dict().items()})
    with pytest.raises(ValueError, match=message):
        nanochat.load(tmp_path)


def test_a_pytorch_model_bin_is_read_and_missing_weights_are_reported(tmp_path):
    torch.save({"model.layers.0.attn.q_proj.weight": torch.ones(2, 2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"code of a checkpoint is never executed"):
        nanochat.load(tmp_path)


def test_a_transposed_matrix_is_called_so(tmp_path):
    folder = write(tmp_path, tiny("G7"), "G7")
    weights = torch.load(folder / "model_000000.pt", weights_only=True)
    weights["transformer.h.1.mlp.c_fc.weight"] = weights["transformer.h.1.mlp.c_fc.weight"].T.contiguous()
    torch.save(weights, folder / "model_000000.pt")
    with pytest.raises(ValueError, match=r"Transposed, \(in, out\) .*: transformer\.h\.1\.mlp\.c_fc\.weight"):
        nanochat.load(folder)


# ---- settings of the meta file ------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["loop_state", "user_config"])
@pytest.mark.parametrize(("name", "value"), [("use_rope", False), ("use_xsa", True), ("rope_type", "yarn")])
def test_settings_without_a_trace_in_the_weights_are_looked_for_where_scripts_note_them(tmp_path, table, name, value):
    write(tmp_path, tiny("G7"), "G7", **{table: {name: value, "depth": 4}})
    with pytest.raises(ValueError, match=rf"the meta file's {table} has {name}={value!r}"):
        nanochat.load(tmp_path)


@pytest.mark.parametrize("value", [True, None])
def test_settings_that_are_as_they_must_be_do_not_matter(tmp_path, value):
    write(tmp_path, tiny("G7"), "G7", loop_state={"use_rope": value, "min_val_bpb": 1.0})
    assert nanochat.load(tmp_path).generation == "G7"


def test_a_tuned_model_is_refused_for_what_its_base_model_notes(tmp_path):
    write(tmp_path / "base_checkpoints" / "d4", tiny("G7"), "G7", step=9, loop_state={"use_rope": False})
    write(tmp_path / "chatsft_checkpoints" / "d4", tiny("G7"), "G7", step=5)
    with pytest.raises(ValueError, match=r"base loop_state has use_rope=False"):
        nanochat.load(tmp_path / "chatsft_checkpoints" / "d4")
    assert nanochat.load(tmp_path / "chatsft_checkpoints", ignore=["use_rope"]).generation == "G7"


@pytest.mark.parametrize("value", [False, 0, None, "", 0.0])
def test_an_unknown_setting_that_is_off_does_not_matter(tmp_path, value):
    model = tiny("G7")
    write(tmp_path, model, "G7", model_config=model_config(model) | {"use_xsa": value})
    assert nanochat.load(tmp_path).config == model.config


@pytest.mark.parametrize(
    ("setting", "right", "wrong"),
    [("mlp_type", "relu2", "gelu"), ("rope_base", 100000, 10000), ("n_exp", 0, 8), ("dropout", 0.0, 0.1)],
)
def test_a_setting_of_model_config_must_be_off_or_what_the_generation_does(tmp_path, setting, right, wrong):
    model = tiny("G7")
    write(tmp_path, model, "G7", model_config=model_config(model) | {setting: right})
    assert nanochat.load(tmp_path).config == model.config
    write(tmp_path, model, "G7", model_config=model_config(model) | {setting: wrong})
    with pytest.raises(ValueError, match=rf"model_config has {setting}={wrong!r}"):
        nanochat.load(tmp_path)


# ---- formats that are not read ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model-f32.gguf", "NANOCHAT.Q4_K_M.GGUF", "weights.npz", "flax_model.msgpack"])
def test_formats_that_are_not_read_are_named_with_the_file_to_give(tmp_path, name):
    (tmp_path / name).write_bytes(b"GGUF")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match=r"not read; give the model_\*\.pt or safetensors"):
            nanochat.load(path)
    write(tmp_path, tiny("G7"), "G7")
    assert nanochat.load(tmp_path).generation == "G7"


@pytest.mark.parametrize("suffix", [".scales", ".qweight", ".SCB", ".weight_scale"])
def test_quantized_tensors_of_any_tool_are_named(tmp_path, suffix):
    save(tmp_path, tiny("G7").state_dict() | {f"transformer.h.0.attn.c_q{suffix}": torch.ones(2)})
    with pytest.raises(ValueError, match=r"contains quantized weights \(transformer\.h\.0\.attn\.c_q"):
        nanochat.load(tmp_path)


def test_names_from_a_file_cannot_write_lines_of_their_own(tmp_path):
    save(tmp_path, {"a\nFATAL all is well\x1b[2J": torch.ones(2)})
    with pytest.raises(ValueError, match=r"found a\\nFATAL all is well\\x1b\[2J") as error:
        nanochat.load(tmp_path)
    assert "\n" not in str(error.value)


# ---- tokenizer.json -----------------------------------------------------------------------------------------------


def tiny_tokenizer(**more) -> Tokenizer:
    ranks = {bytes([i]): i for i in range(256)}
    return Tokenizer(ranks | {token.encode(): 256 + i for i, token in enumerate(more.get("merges", ()))})


LETTERS = {b: chr(b) for b in [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]}
LETTERS |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in LETTERS)}


def as_json(tokenizer: Tokenizer, merges: list) -> dict:
    """Return a tokenizer as transformers' converter writes it."""
    names = {tokenizer.token_bytes_of(i): i for i in range(tokenizer.bos_token_id)}
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": [{"id": tokenizer.special_tokens[t], "content": t, "special": True} for t in SPECIAL_TOKENS],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "model": {
            "type": "BPE",
            "byte_fallback": False,
            "vocab": {"".join(LETTERS[b] for b in token): i for token, i in names.items()},
            "merges": merges,
        },
    }


MERGES = ["th", "the", " t", " the", "é", "in"]
PAIRS = [["t", "h"], ["th", "e"], ["Ġ", "t"], ["Ġ", "the"], ["Ã", "©"], ["i", "n"]]


@pytest.mark.parametrize("pairs", [PAIRS, [" ".join(pair) for pair in PAIRS], []], ids=["lists", "strings", "none"])
def test_a_converted_tokenizer_gives_the_same_ids(tmp_path, pairs):
    expected = tiny_tokenizer(merges=MERGES)
    put(tmp_path, "tokenizer.json", as_json(expected, pairs))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = tokenizers.load(path)
        assert loaded.fingerprint == expected.fingerprint
        assert loaded.special_tokens == expected.special_tokens
        assert loaded.encode("the thé in the 123") == expected.encode("the thé in the 123")


def test_the_tokenizer_of_every_golden_survives_its_conversion(goldens, tmp_path):
    upstream = tokenizers.load(goldens / "basedir-2026-07-03-92d63d4" / "nanochat" / "tokenizer")
    put(tmp_path, "tokenizer.json", as_json(upstream, []))
    assert tokenizers.load(tmp_path).fingerprint == upstream.fingerprint


def test_nanochats_own_file_counts_where_both_are(tmp_path):
    tokenizers.save(tiny_tokenizer(), tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    assert tokenizers.load(tmp_path).vocab_size == 265
    assert locate.find(write(tmp_path, tiny("G7"), "G7")).tokenizer == tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["model"].update(type="Unigram"), "not BPE"),
        (lambda t: t["model"].update(byte_fallback=True), "byte_fallback=True"),
        (lambda t: t["model"].update(dropout=0.1), "dropout="),
        (lambda t: t["model"].update(vocab=[]), "does not map tokens to ids"),
        (lambda t: t["model"]["vocab"].update({"你": 263}), "not in the byte-level encoding"),
        (lambda t: t["model"].update(merges=PAIRS[::-1]), "not in the order of their ids"),
        (lambda t: t["model"].update(merges=[["x", "y"]]), "not in the order of their ids"),
        (lambda t: t["model"].update(merges=[1]), "not a pair"),
        (lambda t: t.update(normalizer={"type": "NFC"}), "a normalizer"),
        (lambda t: t.update(pre_tokenizer={"type": "Whitespace"}), "not a Split and a ByteLevel"),
        (
            lambda t: t["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
            "does not split as nanochat does",
        ),
        (lambda t: t["pre_tokenizer"]["pretokenizers"][0].update(pattern={"String": " "}), "regular expression"),
        (
            lambda t: t["added_tokens"].append({"id": 300, "content": "<|image|>"}),
            "special tokens that no nanochat has",
        ),
        (lambda t: t["added_tokens"].pop(), "special tokens must be"),
        (lambda t: t["added_tokens"][0].update(id=999), "special tokens must be"),
        (lambda t: t.update(added_tokens=3), "added_tokens"),
        (lambda t: t["model"]["vocab"].pop("é" if "é" in t["model"]["vocab"] else "Ã©"), "each once"),
    ],
)
def test_a_tokenizer_of_another_kind_is_refused(tmp_path, change, message):
    table = as_json(tiny_tokenizer(merges=MERGES), PAIRS)
    change(table)
    put(tmp_path, "tokenizer.json", table)
    with pytest.raises(ValueError, match=message):
        tokenizers.load(tmp_path)
