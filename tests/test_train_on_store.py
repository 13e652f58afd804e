"""`train --activations`: SAEs trained on a store without the model, resumed, refused, and read by later commands."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import bridge.nanochat
from bridge import collecting, torch_sae
from bridge.hooks import hook_name
from bridge.training import RunConfig, Stopped, train
from jsae import store
from jsae.config import RECIPE
from jsae.settings import ConfigError
from jsae.store import IncompleteError

HOOKS = [hook_name(layer, kind) for layer in (1, 2) for kind in ("resid_post", "mlp_in", "mlp")]
SETTINGS = {
    "num_activations": 8192,
    "batch_size": 256,
    "block_size": 2048,
    "expansion_factor": 2,
    "k": 8,
    "heldout_tokens": 2000,
    "checkpoint_every": 2048,
    "log_every": 4,
    "dead_after": 2000,
}


@pytest.fixture(scope="module")
def acts(tmp_path_factory) -> Path:
    """Six hooks of the demo on some Python, 16,384 tokens."""
    folder = tmp_path_factory.mktemp("stores")
    texts = ",".join(map(str, sorted(Path(json.__file__).parents[1].glob("*.py"))[:40]))
    text = collecting.Text(data=texts, num_tokens=16_384, context_size=64, tokens_per_forward=2048)
    collecting.collect(bridge.nanochat.load("demo"), HOOKS, folder / "acts", text)
    return folder / "acts"


def weights(run: Path, hook: str) -> dict[str, np.ndarray]:
    return load_file(run / "sae" / hook / "sae_weights.safetensors")


def test_every_layer_of_the_type_gets_an_sae_that_is_measured_on_rows_it_never_saw(acts, tmp_path, capsys):
    run = train(activations=str(acts), output_dir=str(tmp_path / "run"), **SETTINGS)
    opened = store.open(acts)
    assert sorted(run.exports) == [HOOKS[0], HOOKS[3]]
    summary = run.evaluation[HOOKS[0]]
    assert 0 < summary["fvu"] < 0.9
    held_out = opened.rows - round(0.95 * opened.rows / opened.layout.chunk_rows) * opened.layout.chunk_rows
    assert 0 < summary["tokens"] <= held_out < 0.1 * opened.rows
    sae = run.sae(HOOKS[0])
    metadata = sae.cfg["metadata"]
    assert metadata["activation_store_digest"] == opened.manifest.digest
    assert metadata["model_fingerprint"] == opened.manifest.origin["model"] == run.facts["model"]
    assert metadata["hook_name"] == HOOKS[0]
    assert metadata["exclude_special_tokens"] == opened.manifest.origin["excluded"]
    last = opened.rows - 500
    x = opened.read(HOOKS[0], last, opened.rows, np.float32)[opened.kept(HOOKS[0], last, opened.rows)]
    error = np.square(sae(torch.from_numpy(x)).numpy() - x).sum()
    assert error / np.square(x - x.mean(0)).sum() == pytest.approx(summary["fvu"], rel=0.3)
    assert f"the store {acts}" in capsys.readouterr().out


def test_transcoders_crosscoders_and_sweeps_read_what_they_need(acts, tmp_path):
    settings = SETTINGS | {"activations": str(acts), "activation": "batchtopk", "learning_rate": 0.01}
    transcoder = {"k": 32, "layer": "2", "hook_type": "mlp_in", "target_hook": "mlp"}
    run = train(**settings | transcoder, output_dir=str(tmp_path / "transcoder"))
    metadata = run.sae().cfg["metadata"]
    assert (metadata["hook_name"], metadata["hook_name_out"]) == (HOOKS[4], HOOKS[5])
    crosscoder = {"k": (8, 16), "layer": ("1", "2"), "crosscoder": True}
    run = train(**settings | crosscoder, output_dir=str(tmp_path / "crosscoder"))
    assert sorted(variant.path.name for variant in run.variants) == ["k16", "k8"]
    for variant in run.variants:
        ((_, summary),) = variant.evaluation.items()
        assert 0 < summary["fvu"] < 0.9
        assert variant.sae().cfg["metadata"]["hook_names"] == [HOOKS[0], HOOKS[3]]


def test_a_stopped_run_resumes_to_the_same_bits(acts, tmp_path):
    whole = train(activations=str(acts), layer="1", output_dir=str(tmp_path / "whole"), **SETTINGS)
    settings = {"activations": str(acts), "layer": "1", "output_dir": str(tmp_path / "run"), **SETTINGS}
    with pytest.raises(Stopped):
        train(**settings, stop_requests=lambda: contextlib.nullcontext(["now"]))
    resumed = train(**settings, resume=True)
    expected, found = weights(whole.path, HOOKS[0]), weights(resumed.path, HOOKS[0])
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def test_a_store_of_another_model_with_a_hook_of_any_name(tmp_path):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((8192, 16)) @ rng.standard_normal((16, 24))).astype(np.float32)
    store.write(tmp_path / "acts", {"encoder.7": x})
    run = train(activations=str(tmp_path / "acts"), output_dir=str(tmp_path / "run"), **SETTINGS)
    (folder,) = run.exports.values()
    metadata = torch_sae.load(folder).cfg["metadata"]
    assert metadata["hook_name"] == "encoder.7"
    assert "hf_hook_name" not in metadata
    assert run.evaluation["encoder.7"]["fvu"] < 0.5


def test_what_a_store_cannot_give_is_refused_before_the_training(acts, tmp_path):
    def refused(message: str, error: type[Exception] = ConfigError, **settings: object) -> None:
        values = {"activations": str(acts), "output_dir": str(tmp_path / "run"), **SETTINGS, **settings}
        with pytest.raises(error, match=message):
            train(**values)

    refused("has no hook blocks.3.hook_resid_post", layer="3")
    refused("has no attn", hook_type="attn")
    refused("--context_size means nothing with --activations", context_size=32)
    refused("--nodrop_sinks|--drop_sinks means nothing with --activations", drop_sinks=False)
    refused("no store", FileNotFoundError, activations=str(tmp_path / "nothing"))
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "writing.json").write_bytes((acts / "store.json").read_bytes())
    refused("still being written|damaged", (IncompleteError, OSError), activations=str(tmp_path / "begun"))
    store.write(tmp_path / "zeros", np.zeros((8192, 8), np.float32))
    refused("zero", ValueError, activations=str(tmp_path / "zeros"))


def test_a_run_does_not_continue_on_another_store(acts, tmp_path):
    x = np.random.default_rng(0).standard_normal((8192, 24)).astype(np.float32)
    store.write(tmp_path / "acts", x)
    settings = {"activations": str(tmp_path / "acts"), "output_dir": str(tmp_path / "run"), **SETTINGS}
    with pytest.raises(Stopped):
        train(**settings, stop_requests=lambda: contextlib.nullcontext(["now"]))
    (tmp_path / "acts").rename(tmp_path / "moved")
    store.write(tmp_path / "acts", x + 1)
    with pytest.raises(ConfigError, match="cannot continue with the same numbers: data was"):
        train(**settings, resume=True)


def test_a_run_on_a_store_is_a_config_of_its_own():
    assert RunConfig(activations="somewhere").activations == "somewhere"
    with pytest.raises(ConfigError, match="--tokens_per_forward means nothing with --activations"):
        RunConfig(activations="somewhere", tokens_per_forward=4096)


@pytest.mark.parametrize("recipe", [1, None])
def test_a_run_of_another_recipe_is_not_resumed(acts, tmp_path, recipe):
    """The same settings train differently now, so the run would be one thing at first and another afterwards."""
    settings = {"activations": str(acts), "output_dir": str(tmp_path / "run"), **SETTINGS}
    with pytest.raises(Stopped):
        train(**settings, stop_requests=lambda: contextlib.nullcontext(["now"]))
    config_file = tmp_path / "run" / "config.json"
    config = json.loads(config_file.read_text())
    assert config["facts"].pop("recipe") == RECIPE
    config["facts"] |= {} if recipe is None else {"recipe": recipe}
    config_file.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=f"cannot continue with the same numbers: recipe was {recipe}, is {RECIPE}"):
        train(**settings, resume=True)
