"""Evaluating, exploring, steering and serving on a GPU: they succeed, and nothing warns."""

import json
import shutil
import signal
import urllib.request
from pathlib import Path

import pytest
from card import finish, start, warnings_in
from toy_saes import export, toy_sae

import bridge.nanochat

pytestmark = pytest.mark.xdist_group("commands")

HOOKS = ("blocks.1.hook_mlp_out", "blocks.2.hook_resid_post")


@pytest.fixture(scope="module")
def make_run(tmp_path_factory):
    """Return a function that writes a run with a TopK and a JumpReLU SAE of the demo, as training leaves it."""
    text = tmp_path_factory.mktemp("text")
    for path in sorted(Path(json.__file__).parents[1].glob("*.py"))[:80:2]:
        shutil.copy(path, text)
    nano = bridge.nanochat.load("demo")

    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        for i, (hook, architecture) in enumerate(zip(HOOKS, ("jumprelu", "topk"), strict=True)):
            names = {"hook_name": hook, "model_fingerprint": nano.fingerprint}
            export(toy_sae(architecture, nano.config.n_embd, 256, i, **names), folder / "sae" / hook)
        flags = {"checkpoint": "demo", "step": None, "tokenizer": None, "data": f"{text}/*.py", "drop_sinks": True}
        record = {"flags": flags | {"context_size": 128}, "facts": {}, "versions": {}}
        (folder / "config.json").write_text(json.dumps(record))
        return folder

    return make


@pytest.fixture(scope="module")
def done(make_run) -> dict[str, tuple[str, str, Path]]:
    """What the commands printed, and their runs: all at once, each on a run of its own."""
    flags = {
        "evaluate": {"heldout_tokens": 8000, "probes": "false", "plots": "false"},
        "explore": {"num_tokens": 40_000, "context_length": 64},
        "steer": {"prompt": "def read(", "feature": 3, "hook": HOOKS[1], "max_tokens": 24},
    }
    runs = {command: make_run(command) for command in flags}
    started = {name: start(f"experiments.{name}", run_dir=runs[name], **own) for name, own in flags.items()}
    return {name: (*finish(process), runs[name]) for name, process in started.items()}


@pytest.mark.parametrize("command", ["evaluate", "explore", "steer"])
def test_a_command_succeeds_without_a_warning(done, command):
    _, errors, _ = done[command]
    assert warnings_in(errors) == []


def test_an_evaluation_has_numbers_for_every_sae(done):
    scores = json.loads((done["evaluate"][2] / "eval.json").read_text())
    assert set(scores) == set(HOOKS)


def test_a_page_and_its_records_are_written(done):
    explorer = done["explore"][2] / "explorer"
    assert (explorer / "index.html").is_file()
    assert {path.name for path in (explorer / "records").iterdir()} >= set(HOOKS)


def test_a_prompt_is_continued_plainly_and_steered(done):
    assert done["steer"][0].count("def read(") >= 1


def test_a_run_is_served_and_steers_there(done, make_run):
    run = done["explore"][2]
    process = start("experiments.explore", run_dir=run, serve=True, port=0, num_tokens=40_000, context_length=64)
    try:
        told = iter(process.stdout.readline, "")
        address = next((word for line in told for word in line.split() if word.startswith("http://")), None)
        assert address is not None, f"it ended without an address:\n{process.stderr.read()[-4000:]}"
        with urllib.request.urlopen(address, timeout=60) as page:
            assert page.status == 200
        push = {"hook": HOOKS[1], "index": 7, "mode": "additive", "strength": 40, "positions": "all"}
        body = {"prompt": "def read(", "steer": [push], "max_tokens": 16, "temperature": 0}
        asked = urllib.request.Request(
            f"{address.rstrip('/')}/api/steer", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(asked, timeout=120) as answer:
            lines = [json.loads(line) for line in answer]
        assert lines
        assert not [line for line in lines if "error" in line]
    finally:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert warnings_in(errors) == []


def test_fine_tuning_lowers_the_divergence_of_the_models_output(tmp_path):
    run, out = tmp_path / "run", tmp_path / "tuned"
    sizes = {"batch_size": 1024, "heldout_tokens": 4096}
    finish(start("experiments.train", output_dir=run, num_activations=65_536, k=8, expansion_factor=2, **sizes))
    _, errors = finish(start("experiments.finetune", sae=run, out=out, num_activations=16_384, **sizes))
    assert warnings_in(errors) == []
    tuning = json.loads((out / "eval.json").read_text())[HOOKS[1]]["finetuning"]
    assert tuning["after"]["kl"] < tuning["before"]["kl"]
