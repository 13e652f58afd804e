"""Training on a nanochat from Python: one call, without flags."""

import subprocess
import sys
from pathlib import Path

import pytest

from bridge.run import Run
from bridge.training import RunConfig, train
from bridge.training.pipeline import config_of
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


def test_a_run_is_trained_in_one_call_without_flags_and_commands(text, tmp_path):
    code = f"""
import sys
from bridge.training import train
run = train(checkpoint="demo", data={str(text)!r}, k=8, output_dir={str(tmp_path / "run")!r}, **{SMALL!r})
print("experiments" in sys.modules)
print(list(run.exports), run.evaluation[{HOOK!r}]["l0"], run.sae().d_sae)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["False", f"['{HOOK}'] 8.0 128"]
    with pytest.raises(ConfigError, match="already holds another run"):
        train(data=str(text), k=8, output_dir=tmp_path / "run", **SMALL)
    again = train(data=str(text), k=8, output_dir=tmp_path / "run", resume=True, **SMALL)
    assert again.evaluation == Run(tmp_path / "run").evaluation


def test_single_values_lists_and_paths_stand_for_what_flags_hold(tmp_path):
    config = config_of({"k": 16, "seed": [0, 1], "layer": 3, "output_dir": tmp_path, "learning_rate": 1e-3})
    assert config == RunConfig(k=(16,), seed=(0, 1), layer=("3",), output_dir=str(tmp_path), learning_rate=(1e-3,))
    assert RunConfig.from_json(config.to_json()) == config


BAD = {
    "a name that is none": (
        {"num_activation": 1000},
        "num_activation is no setting of a run: did you mean num_activations?",
    ),
    "a name like no other": ({"xyzzy": 1}, "^xyzzy is no setting of a run$"),
    "a value out of range": ({"k": 0}, "k is 0: it must be at least 1"),
    "a config and settings": ({"config": RunConfig(), "k": 8}, "give a config or settings, not both: k"),
}


@pytest.mark.parametrize("what", BAD)
def test_settings_that_cannot_be_are_refused_before_anything_starts(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings, complaint = BAD[what]
    with pytest.raises(ConfigError, match=complaint):
        train(**settings)
    assert not list(tmp_path.iterdir())
