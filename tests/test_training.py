"""Training on a nanochat from Python: one call, without flags."""

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import bridge.nanochat
from bridge.run import Run, directory
from bridge.settings import from_keywords
from bridge.stream import forbid_waiting
from bridge.training import RunConfig, Stopped, device, loop, pipeline, plan, train
from bridge.training import text as training_text
from jsae.architectures import BatchTopK
from jsae.loop import Choice
from jsae.ops import Gpu, Xla
from jsae.settings import ConfigError

ROOT = Path(__file__).resolve().parents[1]
HOOK = "blocks.2.hook_resid_post"
SMALL = {
    "num_activations": 4000,
    "batch_size": 500,
    "block_size": 1000,
    "context_size": 64,
    "tokens_per_forward": 512,
    "expansion_factor": 1,
    "heldout_tokens": 512,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "some.txt").write_text("\n\n".join(f"def f{i}(x):\n    return x + {i}" for i in range(4000)))
    return folder / "some.txt"


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory) -> Run:
    """A run that was trained with keyword arguments."""
    return train(checkpoint="demo", data=text, k=8, output_dir=tmp_path_factory.mktemp("runs") / "run", **SMALL)


def python(code: str) -> list[str]:
    """Run code in a fresh process and return the lines that it prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_run_is_trained_in_one_call_without_flags_and_commands(text, tmp_path):
    code = f"""
import sys
from bridge.training import RunConfig, train
print("light:", not {{"absl", "experiments", "torch"}} & set(sys.modules))
config = RunConfig(checkpoint="demo", data={str(text)!r}, k=(8,), output_dir={str(tmp_path / "run")!r}, **{SMALL!r})
run = train(config)
from absl import flags  # which the libraries of checkpoints and events load
print("experiments" in sys.modules, flags.FLAGS.is_parsed(), "k" in flags.FLAGS)
print(run.path, list(run.exports), run.evaluation[{HOOK!r}]["l0"], run.sae().d_sae)
"""
    lines = python(code)
    assert lines[0] == "light: True"
    assert lines[-2:] == ["False False False", f"{tmp_path / 'run'} ['{HOOK}'] 8.0 128"]


def test_keyword_arguments_train_the_same_sae_as_a_config_and_a_run_is_resumed_by_them(trained, text, tmp_path):
    config = RunConfig(checkpoint="demo", data=str(text), k=(8,), output_dir=str(tmp_path / "run"), **SMALL)
    assert train(config).evaluation == trained.evaluation
    with pytest.raises(ConfigError, match="already holds this run, finished"):
        train(data=text, k=8, output_dir=trained.path, **SMALL)
    again = train(data=text, k=8, output_dir=trained, resume=True, **SMALL)
    assert again.evaluation == trained.evaluation


def test_a_run_that_is_asked_to_stop_is_saved_and_goes_on_to_the_same_numbers(trained, text, tmp_path):
    settings = {"data": text, "k": 8, "output_dir": tmp_path / "run", **SMALL}
    with pytest.raises(Stopped, match=r"run was asked to stop and is saved: resume=True continues it$") as stopped:
        train(**settings, stop_requests=lambda: contextlib.nullcontext(["now"]))
    assert stopped.value.run.path == tmp_path / "run"
    assert not stopped.value.run.exports
    steps = [json.loads(line)["step"] for line in stopped.value.run.metrics_file.read_text().splitlines()]
    assert steps == [1]
    assert train(**settings, resume=True).evaluation == trained.evaluation


def test_a_request_after_the_last_step_and_before_the_export_stops_the_run_too(trained, text, tmp_path, monkeypatch):
    from bridge.training import finish

    settings = {"data": text, "k": 8, "output_dir": tmp_path / "run", **SMALL}
    finished, requests, left = finish.finished, [], []

    @contextlib.contextmanager
    def stop_requests():
        yield requests
        left.append(len(requests))

    def asked_meanwhile(states):
        requests.append("now")
        return finished(states)

    monkeypatch.setattr(finish, "finished", asked_meanwhile)
    with pytest.raises(Stopped) as stopped:
        train(**settings, stop_requests=stop_requests)
    assert left == [1]  # nothing interrupts what the processes do together
    assert not stopped.value.run.exports
    monkeypatch.setattr(finish, "finished", finished)
    assert train(**settings, resume=True).evaluation == trained.evaluation


def test_of_a_sweep_the_variants_are_runs_of_their_own(text, tmp_path):
    run = train(data=text, k=[4, 8], output_dir=tmp_path / "sweep", **SMALL)
    assert [variant.path.name for variant in run.variants] == ["k4", "k8"]
    assert [variant.evaluation[HOOK]["l0"] for variant in run.variants] == [4.0, 8.0]


def test_python_values_stand_for_what_flags_hold(tmp_path):
    settings = {"k": 16, "seed": range(2), "layer": 3, "output_dir": tmp_path, "learning_rate": 1e-3}
    config = from_keywords(RunConfig, settings)
    assert config == RunConfig(k=(16,), seed=(0, 1), layer=("3",), output_dir=str(tmp_path), learning_rate=(1e-3,))
    assert RunConfig.from_json(config.to_json()) == config
    assert from_keywords(RunConfig, {"layer": [1, 2]}).layer == ("1", "2")
    assert from_keywords(RunConfig, {"learning_rate": None}) == RunConfig()
    assert from_keywords(RunConfig, {"activation": BatchTopK}).activation == "batchtopk"
    assert from_keywords(RunConfig, {"data": [tmp_path / "a.txt", "stdlib"]}).data == f"{tmp_path}/a.txt,stdlib"
    numbers = from_keywords(
        RunConfig, {"k": np.array([8, 16]), "seed": np.int64(3), "block_size": np.int32(4096), "skip": np.bool_(False)}
    )
    assert numbers == RunConfig(k=(8, 16), seed=(3,), block_size=4096)
    json.dumps(numbers.to_json())


BAD = {
    "a name that is nearly one": (
        {"num_activation": 1000},
        "^num_activation is not a setting of RunConfig: did you mean num_activations[?]$",
    ),
    "a name like no other": ({"xyzzy": 1}, "^xyzzy is not a setting of RunConfig: the settings are checkpoint, step, "),
    "a value out of range": ({"k": 0}, "k is 0: it must be at least 1"),
    "a text for a number": ({"k": "many"}, "k is 'many': it must be a whole number"),
    "a number for a text": ({"checkpoint": 5}, "checkpoint is 5: it must be text"),
    "a text for a switch": ({"drop_sinks": "no"}, "drop_sinks is 'no': it must be True or False"),
    "a config and settings": ({"config": RunConfig(), "k": 8}, "give a config or settings, not both: k"),
    "a path for a config": ({"config": "demo"}, "config is 'demo': give a RunConfig, or settings by name"),
}


def refuse_all() -> None:
    """Print the complaint about every bad call as JSON."""
    complaints = {}
    for what, (settings, _) in BAD.items():
        try:
            train(**settings)
        except ConfigError as error:
            complaints[what] = str(error)
    print(json.dumps(complaints))


def test_settings_that_cannot_be_are_refused_before_anything_starts(tmp_path):
    """In a process of its own: here, functions and constructors check types before they say what is wrong."""
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from test_training import refuse_all
os.chdir({str(tmp_path)!r})
refuse_all()
"""
    complaints = json.loads(python(code)[-1])
    assert complaints.keys() == BAD.keys()
    for what, (_, pattern) in BAD.items():
        assert re.search(pattern, complaints[what]), what
    assert not list(tmp_path.iterdir())


def test_a_device_other_than_the_one_that_jax_computes_on_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(ConfigError, match="--device=cpu: jax already computes on a gpu in this process"):
        device.share("cpu", 0.4)


def test_every_step_but_the_first_is_taken_within_the_guard(text, tmp_path):
    config = RunConfig(data=str(text), k=(8,), log_every=2, output_dir=str(tmp_path / "run"), **SMALL)
    nano, run = bridge.nanochat.load("demo"), Path(config.output_dir)
    trainees, (corpus, _) = plan.trainees(run, config, nano), training_text.texts(config, nano)
    run.mkdir()
    entered = []

    @contextlib.contextmanager
    def guard():
        with forbid_waiting():
            entered.append(True)
            yield

    source = training_text.stream(config, nano, (nano.model,), corpus, plan.sites(trainees))
    (state,) = loop.train(run, config, trainees, source, guard=guard)
    assert int(state.step) == len(entered) == 8  # seven steps after the first, and the end


def test_a_run_that_began_without_kernels_continues_without_them(monkeypatch, tmp_path):
    directory.record(tmp_path, RunConfig(), {"model": "hash", "operations": "xla"})
    kernels = Choice(Gpu("bfloat16"), "kernels run here")
    monkeypatch.setattr("jsae.loop.choose_ops", lambda members, mesh: kernels)
    again = RunConfig(resume=True)
    assert pipeline._choose(Run(tmp_path), again, []) == Choice(Xla("bfloat16"), "the run began with it")
    assert pipeline._choose(Run(tmp_path / "new"), again, []) == kernels
    assert pipeline._choose(Run(tmp_path), RunConfig(), []) == kernels
