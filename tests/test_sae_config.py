"""Settings and weights of others: every wrong value is refused in one line that names file and setting."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bridge import torch_sae
from jsae import architectures, export
from jsae.architectures import SAEConfig
from jsae.saelens import config as sae_config

D, F = 6, 10
WRONG = {
    "true": True,
    "false": False,
    "a list": [1, 2],
    "a word": "thirty",
    "an empty word": "",
    "a fraction": 0.5,
    "a whole fraction": 32.0,
    "null": None,
    "nested": {"a": {"b": [1]}},
    "negative": -1,
    "zero": 0,
    "huge": 10**300,
    "not a number": float("nan"),
    "infinite": float("inf"),
    "a long word": "x" * 10**5,
}
EXPORTS = {
    "topk": architectures.sae_config("topk", D, F, k=3),
    "jumprelu": architectures.sae_config("batchtopk", D, F, k=3),
    "gated": architectures.sae_config("gated", D, F),
    "skip_transcoder": architectures.sae_config("relu", D, F, d_out=D + 1, skip=True),
    "crosscoder": architectures.sae_config("topk", 2 * D, F, k=3, layers=2),
}
SETTINGS = (
    *("architecture", "d_in", "d_sae", "d_out", "layers", "activation", "k", "dtype", "device", "metadata"),
    *("apply_b_dec_to_input", "normalize_activations", "reshape_activations", "rescale_acts_by_decoder_norm"),
    *("activation_fn", "activation_fn_str", "activation_fn_kwargs", "finetuning_scaling_factor", "hook_head_index"),
    *("sae_lens_version", "anything_else"),
)
DESCRIPTION = ("hook_name", "model_name", "hook_names", "hook_name_out", "model_fingerprint", "sae_lens_version")


def weights_of(config: SAEConfig) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    d_out = config.d_out or config.d_in
    shapes = {"W_enc": (F, config.d_in), "W_dec": (F, d_out), "b_dec": (d_out,)}
    if config.architecture == "gated":
        shapes |= dict.fromkeys(("b_gate", "b_mag", "r_mag"), (F,))
    else:
        shapes["b_enc"] = (F,)
    if config.architecture == "batchtopk":
        shapes["threshold"] = (F,)
    if config.skip:
        shapes["W_skip"] = (d_out, config.d_in)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="module", params=EXPORTS)
def folder(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sae") / request.param
    config = EXPORTS[request.param]
    export.write(folder, config, weights_of(config), 1.0, 1.0, {"hook_name": "blocks.0.hook_resid_post"})
    return folder


def copied(source: Path, target: Path, cfg: dict[str, Any]) -> Path:
    target.mkdir()
    (target / "cfg.json").write_text(json.dumps(cfg))
    (target / "sae_weights.safetensors").write_bytes((source / "sae_weights.safetensors").read_bytes())
    return target


def same(ours: torch_sae.TorchSAE, theirs: torch_sae.TorchSAE) -> bool:
    x = torch.from_numpy(np.random.default_rng(1).standard_normal((20, ours.d_in))).float()
    with torch.no_grad():
        return torch.equal(ours(x), theirs(x)) and torch.equal(ours.encode(x), theirs.encode(x))


def told(folder: Path) -> str | torch_sae.TorchSAE:
    """Return the error of loading a folder, or the SAE."""
    try:
        return torch_sae.load(folder)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_of_another_kind_is_refused_by_name_or_changes_nothing(setting, folder, tmp_path):
    """A folder that loads computes the same as before: the value was right, or it is that of an absent setting."""
    cfg, whole = json.loads((folder / "cfg.json").read_text()), torch_sae.load(folder)
    refused = 0
    for i, (what, value) in enumerate(WRONG.items()):
        odd = copied(folder, tmp_path / str(i), cfg | {setting: value})
        found = told(odd)
        if isinstance(found, str):
            name = {"activation_fn_str": "activation_fn"}.get(setting, setting)
            assert re.fullmatch(rf"{odd}[^\n]*{name}[^\n]*", found), (what, found)
            assert len(found) < 1000, what
            refused += 1
        elif (setting, what) not in (("apply_b_dec_to_input", "false"), ("rescale_acts_by_decoder_norm", "true")):
            assert same(found, whole), what
    assert refused > len(WRONG) / 2


@pytest.mark.parametrize("name", DESCRIPTION)
def test_a_description_of_another_kind_is_refused_by_name(name, folder, tmp_path):
    cfg, whole = json.loads((folder / "cfg.json").read_text()), torch_sae.load(folder)
    for i, (what, value) in enumerate(WRONG.items()):
        odd = copied(folder, tmp_path / str(i), cfg | {"metadata": cfg["metadata"] | {name: value}})
        found = told(odd)
        text = isinstance(value, str) and name not in ("hook_names", "sae_lens_version")
        if text or value is None or (name == "sae_lens_version" and not value):
            assert same(found, whole), what
        else:
            assert re.fullmatch(rf"{odd}/cfg.json: {name} is [^\n]{{1,200}}", found), (what, found)


def test_every_setting_that_is_missing_is_named_or_has_the_default_of_saelens(folder, tmp_path):
    cfg = json.loads((folder / "cfg.json").read_text())
    required = {"architecture", "d_in", "d_sae", "k", "layers", "activation", "d_out"}
    for i, setting in enumerate(cfg):
        odd = copied(folder, tmp_path / str(i), {name: value for name, value in cfg.items() if name != setting})
        if setting in required or (setting == "apply_b_dec_to_input" and "transcoder" in cfg["architecture"]):
            with pytest.raises(ValueError, match=setting if setting != "d_out" else "W_dec"):
                torch_sae.load(odd)
        else:
            assert same(torch_sae.load(odd), torch_sae.load(folder))


def test_unknown_settings_are_named_and_bookkeeping_is_not_asked_about(folder, tmp_path):
    cfg = json.loads((folder / "cfg.json").read_text())
    with pytest.raises(ValueError, match=r"cfg.json: unknown setting 'use_softmax'"):
        torch_sae.load(copied(folder, tmp_path / "odd", cfg | {"use_softmax": False}))
    kept = dict.fromkeys(sae_config.BOOKKEEPING, 3)
    assert same(torch_sae.load(copied(folder, tmp_path / "kept", cfg | kept)), torch_sae.load(folder))


def test_bookkeeping_is_what_the_trainer_of_saelens_writes_beside_what_is_read():
    """A field that a later sae-lens adds to its inference configurations is not taken for bookkeeping."""
    import dataclasses

    from sae_lens.registry import SAE_CLASS_REGISTRY

    fields = {f.name for _, config in SAE_CLASS_REGISTRY.values() for f in dataclasses.fields(config)}
    assert not fields & sae_config.BOOKKEEPING


BROKEN = {
    "nothing": "",
    "half of it": '{"architecture": "topk", ',
    "a list": "[1]",
    "null": "null",
    "deep lists": "[" * 10**6,
    "deep objects": '{"a":' * 10**5 + "1" + "}" * 10**5,
    "deep metadata": '{"metadata": ' + "[" * 500 + "]" * 500 + "}",
    "a number of a million digits": '{"d_in": ' + "9" * 10**6 + "}",
    "a setting twice": '{"k": 3, "k": 4}',
    "no text": "\xff\xfe",
    "too many bytes": " " * (17 * 2**20),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_of_settings_is_refused_in_one_line(what, folder, tmp_path):
    odd = copied(folder, tmp_path / "odd", {})
    (odd / "cfg.json").write_text(BROKEN[what], encoding="latin-1")
    with pytest.raises(ValueError, match=r"^\S*odd[^\n]{1,300}$"):
        torch_sae.load(odd)


STORED = {
    "float8": (torch.float8_e4m3fn, "F8_E4M3"),
    "another float8": (torch.float8_e5m2, "F8_E5M2"),
    "bytes": (torch.int8, "I8"),
    "unsigned bytes": (torch.uint8, "U8"),
    "integers": (torch.int64, "I64"),
    "truth values": (torch.bool, "BOOL"),
}


@pytest.mark.parametrize("what", STORED)
def test_weights_of_other_types_are_refused_by_name(what, folder, tmp_path):
    odd = copied(folder, tmp_path / "odd", json.loads((folder / "cfg.json").read_text()))
    weights = load_file(folder / "sae_weights.safetensors")
    dtype, name = STORED[what]
    save_file(weights | {"W_dec": weights["W_dec"].to(dtype)}, odd / "sae_weights.safetensors")
    with pytest.raises(ValueError, match=rf"sae_weights.safetensors: W_dec is stored as {name}"):
        torch_sae.load(odd)


@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_dec"])
def test_arrays_that_are_missing_too_many_or_of_another_shape_are_named(name, folder, tmp_path):
    cfg = json.loads((folder / "cfg.json").read_text())
    weights = load_file(folder / "sae_weights.safetensors")
    sparse = {f"{name}.values": torch.ones(3), f"{name}.crow_indices": torch.ones(3)}
    changes = (
        {n: w for n, w in weights.items() if n != name},
        weights | {f"{name}_2": torch.ones(2)},
        weights | {name: weights[name].reshape(-1)[:-1].clone()},
        {n: w for n, w in weights.items() if n != name} | sparse,
    )
    for i, changed in enumerate(changes):
        odd = copied(folder, tmp_path / str(i), cfg)
        save_file(changed, odd / "sae_weights.safetensors")
        with pytest.raises(ValueError, match=rf"^{odd}: [^\n]*{name}[^\n]*sae_weights.safetensors"):
            torch_sae.load(odd)


def test_weights_that_are_cut_anywhere_are_refused_in_one_line(folder, tmp_path):
    odd = copied(folder, tmp_path / "odd", json.loads((folder / "cfg.json").read_text()))
    whole = (folder / "sae_weights.safetensors").read_bytes()
    for size in (0, 1, 8, 9, 64, len(whole) // 2, len(whole) - 1):
        (odd / "sae_weights.safetensors").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"odd holds a broken export: sae_weights.safetensors is broken[^\n]*$"):
            torch_sae.load(odd)


def test_numbers_that_are_not_finite_are_refused_wherever_they_are(folder, tmp_path):
    cfg = json.loads((folder / "cfg.json").read_text())
    weights = load_file(folder / "sae_weights.safetensors")
    for name, weight in weights.items():
        for number in (torch.nan, torch.inf):
            odd = copied(folder, tmp_path / f"{name}{number}", cfg)
            broken = weight.clone()
            broken.view(-1)[-1] = number
            save_file(weights | {name: broken}, odd / "sae_weights.safetensors")
            with pytest.raises(ValueError, match=rf"sae_weights.safetensors: {name} holds numbers that are not finite"):
                torch_sae.load(odd)


# ---- every room reads by it ----------------------------------------------------------------------------------------


def hub_plan(run: Path) -> object:
    from bridge import hub

    return hub.plan(run, "someone/saes", license="mit")


def neuronpedia_sources(run: Path) -> object:
    from bridge.neuronpedia.sources import Wanted, of_run

    return of_run(run, Wanted(model_id="toy", layers=4))


def neuronpedia_saelens(run: Path) -> object:
    from bridge.neuronpedia import saelens
    from bridge.neuronpedia.ids import Ids

    (folder,) = (run / "sae").iterdir()
    return saelens.write(folder, run / "out", ids=Ids("toy", "set", "release", folder.name))


def loaded_saes(run: Path) -> object:
    from bridge.runtime import load_saes

    return load_saes(run)


@pytest.fixture
def run(tmp_path) -> Path:
    hook = "blocks.1.hook_resid_post"
    config = EXPORTS["topk"]
    export.write(tmp_path / "sae" / hook, config, weights_of(config), 1.0, 1.0, {"hook_name": hook})
    return tmp_path


@pytest.mark.parametrize("reader", [hub_plan, neuronpedia_sources, neuronpedia_saelens, loaded_saes])
def test_every_room_refuses_what_the_reader_refuses(reader, run):
    reader(run)
    file = next(run.glob("sae/*/cfg.json"))
    cfg = json.loads(file.read_text())
    for text, name in (
        (json.dumps(cfg | {"k": True}), "k is True"),
        (json.dumps(cfg | {"d_sae": [F]}), "d_sae"),
        (json.dumps(cfg | {"use_softmax": True}), "use_softmax"),
        (json.dumps(cfg | {"metadata": [1]}), "metadata is"),
        ("[" * 10**6, "nested too deep"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=rf"^[^\n]*{name}[^\n]*$"):
            reader(run)


def test_a_place_on_neuronpedia_is_written_where_saelens_looks_for_it(run):
    """Of a file of a version before 6, SAELens passes nested metadata over."""
    import sae_lens

    file = next(run.glob("sae/*/cfg.json"))
    cfg = json.loads(file.read_text())
    for written in (cfg, {**cfg, "metadata": {}, "sae_lens_version": "5.0.0", "hook_name": "blocks.1.hook_resid_post"}):
        file.write_text(json.dumps(written))
        neuronpedia_saelens(run)
        found = sae_lens.SAE.load_from_disk(str(run / "out" / "blocks.1.hook_resid_post"))
        assert found.cfg.metadata.neuronpedia_id == "toy/1-set"
