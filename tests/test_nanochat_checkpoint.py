"""Checkpoint files: which one is meant, what it is taken for, and everything that can be wrong with it."""

import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from tiny_nanochat import (
    model_config,
    tiny,
    tokens,
    write,
)

from bridge import nanochat
from bridge.nanochat import locate, tokenizer
from bridge.nanochat.deduce import OVERRIDES
from bridge.nanochat.model import GPT, GPTConfig

OVERRIDE_WORDS = ", ".join(OVERRIDES)


@pytest.fixture
def folder(tmp_path):
    """A G7 checkpoint."""
    return write(tmp_path / "d4", tiny("G7"), "G7")


def meta_of(folder: Path) -> dict:
    return json.loads((folder / "meta_000000.json").read_text())


def change_meta(folder: Path, **model_config) -> Path:
    meta = meta_of(folder)
    meta["model_config"] |= model_config
    (folder / "meta_000000.json").write_text(json.dumps(meta))
    return folder


def change_weights(folder: Path, change) -> Path:
    file = folder / "model_000000.pt"
    weights = torch.load(file, weights_only=True)
    weights = change(weights) or weights
    torch.save(weights, file)
    return folder


def without_meta(folder: Path) -> Path:
    (folder / "meta_000000.json").unlink()
    return folder


def quietly(*args, **kwargs):
    with warnings.catch_warnings(action="ignore"):
        return nanochat.load(*args, **kwargs)


# ---- which file is meant ----


def test_the_last_step_of_a_directory_is_the_default_and_others_can_be_named(tmp_path):
    for step in (2, 10, 9):
        write(tmp_path, tiny("G7"), "G7", step=step)
    assert nanochat.load(tmp_path).meta["step"] == 10
    assert nanochat.load(tmp_path, step=2).path == tmp_path / "model_000002.pt"
    assert nanochat.load(str(tmp_path / "model_000009.pt")).meta["step"] == 9
    with pytest.raises(FileNotFoundError, match=r"no step 3 in .*; there are 2, 9, 10"):
        nanochat.load(tmp_path, step=3)
    with pytest.raises(ValueError, match="omit the step"):
        nanochat.load(tmp_path / "model_000009.pt", step=9)


def test_the_deepest_model_of_a_base_directory_is_the_default(tmp_path):
    for tag in ("d4", "d12", "d12_again", "zoo", "d2"):
        (tmp_path / "base_checkpoints" / tag).mkdir(parents=True)
        (tmp_path / "base_checkpoints" / tag / "model_000001.pt").touch()
    (tmp_path / "base_checkpoints" / "d32").mkdir()  # a run that has not saved yet
    for path in (tmp_path, tmp_path / "base_checkpoints"):
        assert locate.find(path).weights.parent.name == "d12"


def test_without_depths_in_the_names_the_directory_changed_last_is_the_default(tmp_path):
    for age, tag in enumerate(("newest", "older", "oldest")):
        (tmp_path / tag).mkdir()
        (tmp_path / tag / "model_000001.pt").touch()
        os.utime(tmp_path / tag, (1e9 - age, 1e9 - age))
    assert locate.find(tmp_path).weights.parent.name == "newest"


@pytest.mark.parametrize("place", ["base/tokenizer", "base/base_checkpoints/d4/tokenizer", "base/base_checkpoints/d4"])
def test_a_tokenizer_is_found_in_the_checkpoint_and_in_the_base_directory(tmp_path, place):
    weights = tmp_path / "base" / "base_checkpoints" / "d4" / "model_000001.pt"
    for file in (weights, tmp_path / place / "tokenizer.pkl"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    assert locate.find(weights).tokenizer == tmp_path / place
    assert locate.find(tmp_path / "base").tokenizer == tmp_path / place


def test_an_error_for_a_missing_path_lists_what_exists(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match=re.escape(f"no checkpoint at {tmp_path}/d5/x; {tmp_path} contains d4")):
        nanochat.load(tmp_path / "d5" / "x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="it contains nothing: give a checkpoint directory"):
        nanochat.load(tmp_path / "empty")
    (tmp_path / "base" / "chatsft_checkpoints" / "d4").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="contains chatsft_checkpoints: give"):
        nanochat.load(tmp_path / "base")


def test_an_installation_without_the_demo_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.resources.files", lambda _: tmp_path)
    with pytest.raises(FileNotFoundError, match="demo model is not part of this installation"):
        nanochat.load("demo")
    write(tmp_path / "demo", tiny("G7"), "G7")
    assert nanochat.load("demo").generation == "G7"


# ---- what it is taken for ----


def test_a_loaded_model_is_frozen_and_knows_where_it_is_from(folder):
    nano = nanochat.load(folder)
    assert not nano.model.training
    assert not any(weight.requires_grad for weight in nano.model.parameters())
    assert nano.tokenizer is None
    assert nano.meta == meta_of(folder)
    assert nano.fingerprint == hashlib.sha256((folder / "model_000000.pt").read_bytes()).hexdigest()


def test_embeddings_stored_in_bfloat16_become_float32_on_the_cpu(folder):
    def store(weights):
        return {k: v.bfloat16() if "wte" in k or "value_embeds" in k else v for k, v in weights.items()}

    nano = nanochat.load(change_weights(folder, store))
    assert {weight.dtype for weight in nano.model.parameters()} == {torch.float32}
    assert {b.dtype for b in nano.model.buffers()} == {torch.float32}
    wte = tiny("G7").transformer.wte.weight
    assert torch.equal(nano.model.transformer.wte.weight, wte.bfloat16().float())


def test_the_prefix_of_a_compiled_model_is_not_part_of_a_name(folder):
    expected = nanochat.load(folder).model(tokens(9))
    change_weights(folder, lambda weights: {"_orig_mod." + k: v for k, v in weights.items()})
    assert torch.equal(nanochat.load(folder).model(tokens(9)), expected)
    change_weights(folder, lambda weights: weights | {"lm_head.weight": weights["_orig_mod.lm_head.weight"]})
    with pytest.raises(ValueError, match="some weights twice"):
        nanochat.load(folder)


def test_every_override_reaches_the_config(folder):
    given = {
        "softcap": 30,
        "rope_table": "bf16",
        "rope_base": 5000,
        "qk_scale": 1.3,
        "window_pattern": "sl",
        "sequence_len": 96,
    }
    nano = nanochat.load(folder, **given)
    assert {name: getattr(nano.config, name) for name in given} == given | {"window_pattern": "SL"}
    assert nanochat.load(folder, generation="G7", vocab_size=49).config.vocab_size == 49
    assert nanochat.load(folder, **dict.fromkeys(OVERRIDES)).config == nanochat.load(folder).config


def test_n_head_takes_the_key_heads_along(tmp_path):
    write(tmp_path, tiny("G3"), "G3")
    config = nanochat.load(tmp_path, n_head=2).config
    assert (config.n_head, config.n_kv_head, config.head_dim) == (2, 1, 16)
    with pytest.raises(ValueError, match="n_head=5 does not divide n_embd 32"):
        nanochat.load(tmp_path, n_head=5)


def test_an_override_with_a_typo_is_refused_with_the_names_there_are(folder):
    with pytest.raises(TypeError, match=f"no override 'soft_cap' .* there are {OVERRIDE_WORDS}"):
        nanochat.load(folder, soft_cap=20)


def test_a_generation_that_the_weights_are_not_of_is_refused(folder):
    with pytest.raises(ValueError, match=r"do not fit a nanochat of generation G6 .*unexpected: .*smear_gate"):
        nanochat.load(folder, generation="G6")
    with pytest.raises(ValueError, match="no generation 'G9'"):
        nanochat.load(folder, generation="G9")


# (generation of the model, what replaces keys of its meta, generation it is taken for, softcap)
SOFTCAPS = [
    ("G4", {}, "G4", 15),
    ("G4", {"user_config": {"depth": 4, "eval_tokens": 20971520}}, "G4", 15),  # before fp8, with --eval-tokens
    ("G5", {}, "G5", 20),
    ("G4e", {"user_config": {"depth": 4, "fp8": False}}, "G4e", 15),
    ("G6", {"user_config": {"depth": 4, "fp8": False}}, "G6", 15),
]
UNSURE_SOFTCAPS = [
    {"user_config": {"depth": 4, "fp8": False, "eval_tokens": 20971520}},  # base: the first 43 hours of G5 look so
    {"user_config": {"run": "dummy", "eval_tokens": 20971520}},  # SFT
    {"user_config": None},  # RL
]


@pytest.mark.parametrize(("generation", "meta", "taken", "softcap"), SOFTCAPS)
def test_the_softcap_is_deduced_from_the_training_script_s_settings(tmp_path, generation, meta, taken, softcap):
    nano = nanochat.load(write(tmp_path, tiny(generation), generation, **meta))
    assert (nano.generation, nano.config.softcap) == (taken, softcap)


@pytest.mark.parametrize("meta", UNSURE_SOFTCAPS, ids=["base", "sft", "rl"])
def test_a_softcap_in_no_file_gives_a_warning_and_can_be_passed(tmp_path, meta):
    write(tmp_path, tiny("G5"), "G5", **meta)
    with pytest.warns(UserWarning, match=r"softcap: assumed 15; .* 2026-03-03 to 03-09 have 20") as caught:
        nano = nanochat.load(tmp_path)
    assert len(caught) == 1
    assert (nano.generation, nano.config.softcap) == ("G4", 15)
    for given, generation in (({"softcap": 20}, "G5"), ({"generation": "G5"}, "G5"), ({"generation": "G4"}, "G4")):
        nano = nanochat.load(tmp_path, **given)
        assert (nano.generation, nano.config.softcap) == (generation, 20 if generation == "G5" else 15)


def drop_pattern(model: GPT) -> dict:
    return {name: value for name, value in model_config(model).items() if name != "window_pattern"}


@pytest.mark.parametrize("generation", ["G3", "G4"])
def test_a_tuned_model_without_a_pattern_is_long_everywhere_as_upstream_reads_it(tmp_path, generation):
    model = tiny(generation)
    write(tmp_path, model, generation, model_config=drop_pattern(model), user_config={})
    meta = json.loads((tmp_path / "meta_000000.json").read_text())
    del meta["device_batch_size"], meta["max_seq_len"]  # mid-training and SFT do not write them
    (tmp_path / "meta_000000.json").write_text(json.dumps(meta))
    with pytest.warns(UserWarning, match='window_pattern: assumed "L", as upstream does') as caught:
        nano = nanochat.load(tmp_path)
    assert len(caught) == 1
    assert (nano.generation, nano.config.window_sizes) == (generation, (400,) * 4)
    assert nanochat.load(tmp_path, window_pattern="SSSL").config == model.config


def test_a_base_model_with_lambdas_and_without_a_pattern_has_no_windows(tmp_path):
    model = tiny("G3")
    write(tmp_path, model, "G2", model_config=drop_pattern(model))
    nano = nanochat.load(tmp_path)
    assert (nano.generation, nano.config.window_sizes) == ("G2", (None,) * 4)
    assert nanochat.load(tmp_path, window_pattern="SSSL").config == model.config


def test_a_pattern_for_weights_without_windows_is_refused(tmp_path):
    write(tmp_path, tiny("G0"), "G0")
    with pytest.raises(ValueError, match="of G0, without windows"):
        nanochat.load(tmp_path, window_pattern="SL")


def test_settings_of_model_config_that_are_unknown_are_refused(folder):
    change_meta(folder, use_xsa=True)
    expected = (
        r"model_config has use_xsa=True, which no nanochat has: .* pass ignore=\['use_xsa'\] to bridge.nanochat.load"
    )
    with pytest.raises(ValueError, match=expected):
        nanochat.load(folder)
    assert nanochat.load(folder, ignore=["use_xsa"]).generation == "G7"


@pytest.mark.parametrize(
    ("generation", "warned"),
    [
        ("G0", ["n_head"]),
        ("G1", ["n_head"]),
        ("G2", ["n_head", "G2"]),
        ("G4", ["n_head", "softcap", "window_pattern"]),
        ("G7", ["n_head", "window_pattern"]),
    ],
)
def test_without_a_meta_file_every_guess_is_named(tmp_path, generation, warned):
    model = tiny(generation, sequence_len=2048, n_embd=256, n_head=2, n_kv_head=1, vocab_size=64)
    without_meta(write(tmp_path, model, generation))
    with pytest.warns(UserWarning) as caught:  # noqa: PT030
        nano = nanochat.load(tmp_path)
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == len(warned)
    assert "sequence_len=2048, n_head=2, vocab_size=64" in messages[0]
    assert all(any(word in message for message in messages) for word in warned)
    assert nano.meta == {}
    assert nano.config == model.config or generation == "G1"  # 64 rows need no padding: G1 is G0
    assert torch.equal(nano.model(tokens(9)), model(tokens(9)))


def test_without_a_meta_file_the_sizes_can_be_given(tmp_path):
    model = tiny("G3")
    without_meta(write(tmp_path, model, "G3"))
    nano = nanochat.load(tmp_path, sequence_len=400, n_head=4, vocab_size=50, window_pattern="SSSL")
    assert (nano.generation, nano.config) == ("G3", model.config)


# ---- the tokenizer ----


class Words(tokenizer.Tokenizer):
    """A tokenizer of some size; the rest is not needed here."""

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size


def test_a_tokenizer_gives_the_vocabulary_of_a_model_without_meta(tmp_path):
    without_meta(write(tmp_path, tiny("G1"), "G1"))
    nano = quietly(tmp_path, tokenizer=Words(50), n_head=4)
    assert (nano.generation, nano.config.vocab_size) == ("G1", 50)


def test_a_tokenizer_of_another_vocabulary_is_refused(folder):
    with pytest.raises(ValueError, match=r"tokenizer has 51 tokens, but the model .* has 50: pass the tokenizer"):
        nanochat.load(folder, tokenizer=Words(51))
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        nanochat.load(folder, tokenizer=folder / "nowhere")


# ---- everything that can be wrong ----


class Bomb:
    """A pickle that creates a file when it is opened."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return Path.touch, (Path(self.target),)


def test_a_pickle_that_runs_code_is_refused_and_nothing_of_it_runs(folder, tmp_path):
    target = tmp_path / "touched"
    file = folder / "model_000000.pt"
    torch.save({"transformer.wte.weight": Bomb(target)}, file)
    with pytest.raises(ValueError, match="contains more than tensors; it was not executed"):
        nanochat.load(folder)
    file.write_bytes(pickle.dumps({"a": Bomb(target)}))
    with pytest.raises(ValueError, match="damaged or not a file"):
        nanochat.load(folder)
    assert not target.exists()
    pickle.loads(file.read_bytes())
    assert target.exists()  # it would have


@pytest.mark.parametrize("size", [0, 1, 1000, -1])
def test_a_truncated_file_is_refused(folder, size):
    file = folder / "model_000000.pt"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"model_000000\.pt is damaged or not a file of torch.save"):
        nanochat.load(folder)


def test_a_compressed_file_is_refused_before_it_fills_the_memory(folder):
    file = folder / "model_000000.pt"
    with zipfile.ZipFile(file) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    with pytest.raises(ValueError, match="it is compressed"):
        nanochat.load(folder)


def test_a_zip_archive_of_something_else_is_refused(folder):
    with zipfile.ZipFile(folder / "model_000000.pt", "w") as archive:
        archive.writestr("notes.txt", "no weights")
    with pytest.raises(ValueError, match="damaged or not a file"):
        nanochat.load(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(3)], "weights by name, got list"),
        ({1: torch.zeros(3)}, "weights by name"),
        ({"state": {}, "param_groups": []}, "'state' is dict"),
        ({"wte": torch.zeros(3, dtype=torch.int64)}, "'wte' is a tensor of torch.int64"),
        ({"wte": torch.zeros(1).expand(10**6)}, "tensors that are larger than the file"),
        ({}, "no matrix transformer.wte.weight, .*found nothing"),
        ({"gpt_neox.embed_in.weight": torch.zeros(4, 4)}, "found gpt_neox.embed_in.weight"),
        ({"transformer.wte.weight": torch.zeros(4)}, "no matrix transformer.wte.weight"),
        ({"transformer.h.0.mlp.router.gate.weight": torch.zeros(4)}, "mixture of experts"),
        ({"transformer.h.0.moe.router.weight": torch.zeros(4)}, "mixture of experts"),
        ({"value_embed_A.weight": torch.zeros(4), "v0_lambdas": torch.zeros(4)}, "side branch ve"),
        ({"value_embed.weight": torch.zeros(4), "v0_lambdas": torch.zeros(4)}, "side branch ve"),
        ({"value_embeds.0.weight": torch.zeros(4), "v0_lambdas": torch.zeros(4)}, "side branch ve"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_of_another_kind_are_refused(folder, content, message):
    torch.save(content, folder / "model_000000.pt")
    with pytest.raises(ValueError, match=message):
        nanochat.load(folder)


def test_weights_that_are_missing_too_many_or_of_another_shape_are_named(folder):
    def change(weights):
        weights.pop("transformer.h.1.mlp.c_fc.weight")
        weights["transformer.h.1.ln.weight"] = torch.ones(32)
        weights["transformer.h.2.mlp.c_fc.weight"] = torch.ones(100, 32)

    change_weights(folder, change)
    expected = (
        r"missing: transformer\.h\.1\.mlp\.c_fc\.weight; unexpected: transformer\.h\.1\.ln\.weight; "
        r"of another shape: transformer\.h\.2\.mlp\.c_fc\.weight is \(100, 32\) and not \(128, 32\)"
    )
    with pytest.raises(ValueError, match=expected):
        nanochat.load(folder)


def test_gates_of_an_unknown_width_are_refused(folder):
    change_weights(folder, lambda weights: {k: v[:, :7] if "ve_gate" in k else v for k, v in weights.items()})
    with pytest.raises(ValueError, match=r"gates of width \[7\]"):
        nanochat.load(folder)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"n_layer": 5}, "says n_layer=5, but the weights have 4"),
        ({"n_layer": 10**12}, "says n_layer=1000000000000, but the weights have 4"),
        ({"n_embd": 64}, "says n_embd=64, but the weights have 32"),
        ({"n_kv_head": 4}, r"c_k\.weight is \(16, 32\) and not \(32, 32\)"),
        ({"n_head": 8}, r"of another shape: .*c_k"),
        ({"vocab_size": 65}, r"wte\.weight is \(64, 32\) and not \(128, 32\)"),
        ({"vocab_size": 10**15}, "vocab_size must be a whole number from 1 to"),
        ({"sequence_len": 10**15}, "sequence_len must be a whole number from 1 to"),
        ({"sequence_len": -1}, "sequence_len must be a whole number from 1 to"),
        ({"sequence_len": "400"}, "must be whole numbers, got {'sequence_len': '400'}"),
        ({"n_head": 4.0}, "must be whole numbers"),
        ({"n_head": 0}, "n_head must be a whole number"),
        ({"window_pattern": "SSQ"}, "letters S and L"),
        ({"window_pattern": 3}, "letters S and L"),
    ],
    ids=str,
)
def test_a_meta_file_that_contradicts_the_weights_or_asks_the_absurd_is_refused(folder, sizes, message):
    change_meta(folder, **sizes)
    with pytest.raises(ValueError, match=message):
        nanochat.load(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("\xff", "is not JSON"),
        ("[" * 100000, "is not JSON"),
        ("[]", "must contain a JSON object, got list"),
        ('{"step": 1}', "model_config must be a table of sizes"),
        ('{"model_config": null}', "model_config must be a table of sizes"),
        ('{"model_config": {"n_layer": 4}}', "lacks sequence_len, vocab_size"),
    ],
    ids=lambda text: text[:20],
)
def test_a_broken_meta_file_is_refused(folder, text, message):
    (folder / "meta_000000.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        nanochat.load(folder)


def test_a_meta_file_of_gigabytes_is_not_read(folder):
    with (folder / "meta_000000.json").open("r+b") as file:
        file.truncate(2**33)
    with pytest.raises(ValueError, match="more than any meta file"):
        nanochat.load(folder)


# ---- cost ----

MEASURE = """
import sys
import torch
from bridge import nanochat
from bridge.nanochat import checkpoint

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024

torch.set_num_threads(1)
before = peak()
nano = nanochat.load(sys.argv[1])
loaded = peak()
with torch.no_grad():
    nano.model(torch.zeros(1, 4, dtype=torch.long))
print(loaded - before, peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process's memory is read from /proc")
def test_loading_and_running_take_no_second_copy_of_the_weights(tmp_path):
    sizes = {"sequence_len": 256, "vocab_size": 4096, "n_layer": 6, "n_head": 6, "n_kv_head": 6, "n_embd": 768}
    config = GPTConfig.of_generation("G0", **sizes)
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in GPT(config).state_dict().items()}
    file = tmp_path / "model_000000.pt"
    torch.save({name: torch.full(shape, 0.01) for name, shape in shapes.items()}, file)
    (tmp_path / "meta_000000.json").write_text(json.dumps({"model_config": sizes}))
    size = file.stat().st_size
    assert size > 190e6
    run = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True)
    loaded, used = map(int, run.stdout.split())
    assert loaded < 0.1 * size
    assert 0.8 * size < used < 1.3 * size  # every weight was read, once


def test_importing_the_package_imports_no_torch():
    code = (
        "import sys, bridge.nanochat, bridge.nanochat.config; assert not {'torch', 'jax', 'numpy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = nanochat.lod
