"""`train --init_from`: what a user continues from, what is recorded of it, and what is refused before the training."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import python_text
from safetensors.numpy import load_file

import bridge.nanochat
import jsae
from bridge.training import Stopped, continuing, plan
from bridge.training.config import RunConfig
from bridge.training.pipeline import train
from jsae.settings import ConfigError

HOOKS = ("blocks.1.hook_resid_post", "blocks.2.hook_resid_post")
SMALL = {
    "num_activations": 4_000,
    "batch_size": 500,
    "block_size": 2_000,
    "context_size": 64,
    "checkpoint_every": 1_000,
    "log_every": 4,
    "heldout_tokens": 2_000,
    "dead_after": 2_000,
}
TINY_RATE = {"learning_rate": (1e-12,), "warmup_fraction": 0.0}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return python_text.copied(tmp_path_factory.mktemp("text"), 40)


@pytest.fixture(scope="module")
def first(tmp_path_factory, text) -> Path:
    """A run of two layers, 256 latents each."""
    run = tmp_path_factory.mktemp("runs") / "first"
    own = {"activation": "batchtopk", "expansion_factor": 2, "k": (6,), "layer": ("1", "2"), "learning_rate": (2e-3,)}
    train(RunConfig(data=text, output_dir=str(run), **SMALL, **own))
    return run


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "sae_weights.safetensors")


def test_a_run_continues_the_saes_of_another_hook_by_hook(first, text, tmp_path, capsys):
    """With a rate of nothing they come back as they were, in what they compute and in the units of the activations."""
    config = RunConfig(
        data=text,
        output_dir=str(tmp_path / "run"),
        init_from=str(first),
        activation="jumprelu",
        layer=("1", "2"),
        **SMALL,
        **TINY_RATE,
    )
    run = train(config)
    assert f"continues {first}/sae/{HOOKS[0]}, a jumprelu SAE" in capsys.readouterr().out
    for hook in HOOKS:
        before, after = weights(first / "sae" / hook), weights(run.path / "sae" / hook)
        for name, weight in before.items():
            assert np.abs(after[name] - weight).max() < 2e-6 * np.abs(weight).max(), (hook, name)
        start = run.facts["init_from"][hook]
        assert (start["d_sae"], start["k"], start["form"]) == (256, 6, "jumprelu")
        recorded = jsae.load(run.path / "sae" / hook).metadata["init_from"]
        assert recorded == {"path": str(first / "sae" / hook), "digest": start["digest"]}


def test_sizes_and_k_are_those_of_the_file_unless_k_is_given(first):
    nano = bridge.nanochat.load("demo")
    flags = {"init_from": str(first / "sae" / HOOKS[0]), "activation": "batchtopk", "layer": ("4",)}
    found = {}
    for k in ((), (9, 12)):
        config = RunConfig(**flags, k=k)
        found[k] = [t.member.sae for t in plan.trainees(Path("run"), config, nano, continuing.Starts(config.init_from))]
    assert [(sae.d_sae, sae.k) for sae in found[()]] == [(256, 6)]
    assert [(sae.d_sae, sae.k) for sae in found[9, 12]] == [(256, 9), (256, 12)]


def test_a_run_resumes_without_what_it_continued(first, text, tmp_path):
    copy = shutil.copytree(first / "sae" / HOOKS[1], tmp_path / "sae")
    flags = {"data": text, "init_from": str(copy), "activation": "batchtopk", "learning_rate": (1e-3,)} | SMALL
    whole = train(RunConfig(output_dir=str(tmp_path / "whole"), **flags))

    class AfterTwoSteps(list):
        def __init__(self):
            self.asked = 0

        def __bool__(self):
            self.asked += 1
            return self.asked > 2

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

    with pytest.raises(Stopped):
        train(RunConfig(output_dir=str(tmp_path / "run"), **flags), stop_requests=AfterTwoSteps)
    shutil.rmtree(copy)
    resumed = train(RunConfig(output_dir=str(tmp_path / "run"), resume=True, **flags))
    for name, weight in weights(whole.path / "sae" / HOOKS[1]).items():
        np.testing.assert_array_equal(weights(resumed.path / "sae" / HOOKS[1])[name], weight)
    shutil.rmtree(resumed.path / "checkpoints")
    with pytest.raises(FileNotFoundError, match="no SAE at"):
        train(RunConfig(output_dir=str(tmp_path / "run"), resume=True, **flags))


REFUSED = {
    "another form": (
        {"activation": "topk"},
        r"--init_from: .* is a jumprelu SAE, which topk.* are batchtopk, matryoshka",
    ),
    "another size": ({"expansion_factor": 8}, "--expansion_factor=8 of width 128 contradicts .* of 256 latents"),
    "a transcoder": (
        {"hook_type": "mlp_in", "target_hook": "mlp"},
        r"this run trains a transcoder \(--activation, --target_hook",
    ),
    "a crosscoder": ({"crosscoder": True, "layer": ("1", "2")}, "of 1 layer|of 2 layer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_continue_is_refused_before_the_training(case, first, text, tmp_path):
    flags, message = REFUSED[case]
    flags = {"activation": "batchtopk", "init_from": str(first / "sae" / HOOKS[0]), "data": text} | flags
    with pytest.raises(ConfigError, match=message):
        train(RunConfig(output_dir=str(tmp_path / "run"), **SMALL, **flags))
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_folder_without_the_hook_is_refused(first, text, tmp_path):
    config = RunConfig(
        output_dir=str(tmp_path / "run"), data=text, init_from=str(first), activation="batchtopk", layer=("3",), **SMALL
    )
    with pytest.raises(ConfigError, match=r"has no SAE of blocks.3.hook_resid_post: it has blocks.1.hook_resid_post, "):
        train(config)
    with pytest.raises(FileNotFoundError, match="no SAE at"):
        train(RunConfig(output_dir=str(tmp_path / "run"), data=text, init_from=str(tmp_path / "missing"), **SMALL))


def test_an_sae_that_does_not_say_its_k_needs_one(first, tmp_path):
    copy = shutil.copytree(first / "sae" / HOOKS[0], tmp_path / "sae")
    cfg = json.loads((copy / "cfg.json").read_text())
    cfg["metadata"].pop("training_architecture_details")
    (copy / "cfg.json").write_text(json.dumps(cfg))
    start = continuing.Starts(str(copy)).description(HOOKS[0])
    with pytest.raises(ConfigError, match="does not say how many latents were active per token: give --k"):
        RunConfig(init_from=str(copy), activation="batchtopk").sae_config(128, 1, start)
    assert RunConfig(init_from=str(copy), activation="batchtopk", k=(4,)).sae_config(128, 1, start).k == 4
    assert RunConfig(init_from=str(copy), activation="jumprelu").sae_config(128, 1, start).d_sae == 256
