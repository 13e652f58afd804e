"""Output of every command into a file: progress on the way, the next commands at the end."""

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import python_text
from absl import flags as absl_flags

import bridge.run.commands
from bridge.run import commands
from experiments import flags
from experiments.bench import BENCHES

ROOT = Path(__file__).resolve().parents[1]
HOOK = "blocks.2.hook_resid_post"
CONFIGS = {
    "train": "RunConfig",
    "evaluate": "EvaluateConfig",
    "explore": "ExploreConfig",
    "export": "ExportConfig",
    "publish": "PublishConfig",
    "steer": "SteerConfig",
    "pretrain": "PretrainConfig",
}
SCRIPT = """
import runpy, sys
import jsae.progress
jsae.progress.EVERY = 0.01  # a line every hundredth of a second instead of every ten seconds
name, sys.argv = sys.argv[1], sys.argv[1:]
runpy.run_module(f"experiments.{name}", run_name="__main__", alter_sys=True)
"""


def command(name: str, *words: str, **given: object) -> subprocess.CompletedProcess[str]:
    line = [*words, *(f"--{flag}" if value is True else f"--{flag}={value}" for flag, value in given.items())]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, name, *line],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    """A few files that are quick to read."""
    return python_text.copied(tmp_path_factory.mktemp("text"), 60)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs") / "a run"


@pytest.fixture(scope="module")
def trained(run, text) -> subprocess.CompletedProcess[str]:
    small = {"num_activations": 24_000, "batch_size": 500, "block_size": 5_000, "context_size": 64, "log_every": 5}
    small |= {"tokens_per_forward": 2048, "heldout_tokens": 4_000, "expansion_factor": 2, "k": 8}
    return command("train", data=text, output_dir=run, **small)


@pytest.fixture(scope="module")
def explored(trained, run) -> subprocess.CompletedProcess[str]:
    return command("explore", run_dir=run, num_tokens=20_000, context_length=64)


def next_lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Return the lines below "next:", which is printed once, at the end."""
    before, _, after = done.stdout.partition("\nnext:\n")
    assert "next:" not in before + after + done.stderr
    assert after.endswith("\n")
    lines = after.splitlines()
    assert all(line.startswith("  ") for line in lines)
    return [line[2:] for line in lines]


def parsed(line: str) -> tuple[str, dict[str, object]]:
    """The command of a line, and the flags that its config accepts and that are not its defaults."""
    words = shlex.split(line, comments=True)
    while "=" in words[0] and "/" not in words[0]:
        words.pop(0)  # a variable of the environment
    program, dash_m, module, *given = words
    assert Path(ROOT / program).exists() or shutil.which(program)
    assert dash_m == "-m"
    name = module.removeprefix("experiments.")
    values = absl_flags.FlagValues()
    config_class = getattr(importlib.import_module(module), CONFIGS[name])
    flags.define(config_class, flag_values=values)
    values([program, *given])
    config = flags.parse(config_class, flag_values=values)
    return name, {word[2:].partition("=")[0]: getattr(config, word[2:].partition("=")[0]) for word in given}


def progress(done: subprocess.CompletedProcess[str], name: str) -> list[str]:
    """The lines of progress of a phase."""
    return [line for line in done.stderr.splitlines() if line.startswith(f"{name}: ")]


LINE = r"\d+ %, [\d.,]+ (\S+/s|%/min), (\d+:)?\d+:\d\d left"


def assert_progress(done: subprocess.CompletedProcess[str], name: str) -> None:
    lines = progress(done, name)
    assert any(re.search(LINE, line) for line in lines), done.stderr
    assert "\x1b" not in done.stderr
    assert "\r" not in done.stderr


def test_training(trained, run):
    assert_progress(trained, "training")
    assert re.search(r"steps/s, .*left, FVU [\d.]+  L0 [\d.]+", "\n".join(progress(trained, "training")))
    assert progress(trained, f"measuring {HOOK}")
    assert list(map(parsed, next_lines(trained))) == [
        ("evaluate", {"run_dir": str(run)}),
        ("explore", {"run_dir": str(run), "serve": True}),
        ("steer", {"run_dir": str(run), "prompt": "def "}),
    ]


def test_exploring(explored, run):
    assert_progress(explored, "running the model")
    assert progress(explored, "labelling latents")
    assert list(map(parsed, next_lines(explored))) == [
        ("explore", {"run_dir": str(run), "serve": True}),
        ("evaluate", {"run_dir": str(run)}),
        ("export", {"run_dir": str(run), "format": ("neuronpedia",)}),
        ("publish", {"run_dir": str(run), "dry_run": True}),
    ]


def test_evaluating(trained, run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    done = command("evaluate", run_dir=copy, heldout_tokens=4000, probe_tokens=20_000, plots=False)
    assert_progress(done, f"measuring {HOOK}")
    assert progress(done, "reading activations for probes")
    assert progress(done, "fitting probes")
    assert progress(done, "labelling latents")
    shares = [int(share) for share in re.findall(r"(\d+) %", "\n".join(progress(done, f"measuring {HOOK}")))]
    assert shares == sorted(shares)
    assert max(shares) == 100
    assert [parsed(line)[0] for line in next_lines(done)] == ["explore", "steer"]
    assert commands._is_evaluated(copy)
    assert not commands._is_evaluated(run)


def test_exporting_and_publishing(explored, run):
    done = command("export", run_dir=run, format="sae_lens,neuronpedia,delphi")
    assert_progress(done, "exporting")
    lens, neuronpedia, delphi = next_lines(done)
    folder = re.fullmatch(r'sae_lens.SAE.load_from_disk\("(.*)"\)', lens)[1]
    assert (Path(folder) / "cfg.json").is_file()
    assert parsed(neuronpedia) == ("publish", {"run_dir": str(run), "dry_run": True})
    assert Path(re.search(r'LatentDataset\("(.*?)"', delphi)[1]).is_dir()
    done = command("publish", run_dir=run, dry_run=True)
    assert progress(done, "preparing 2-" + done.stdout.split("/2-")[1].split()[0]), done.stderr
    (line,) = next_lines(done)
    assert line.startswith("NEURONPEDIA_API_KEY=… ")
    assert parsed(line) == ("publish", {"run_dir": str(run)})


def test_steering(trained, run):
    done = command("steer", run_dir=run, prompt="def ", max_tokens=4)
    (name, given), (other, _) = map(parsed, next_lines(done))
    assert (name, other) == ("steer", "explore")
    assert given["mode"] == "clamp"
    done = command("steer", run_dir=run, prompt="def ", max_tokens=4, feature=given["feature"][0])
    assert parsed(next_lines(done)[0])[1]["interactive"] is True


def test_pretraining(text, tmp_path):
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_kv_head": 2, "sequence_len": 32, "vocab_size": 320}
    few = {"steps": 30, "batch_rows": 2, "micro_rows": 2, "eval_every": 30, "eval_rows": 2}
    done = command("pretrain", out=tmp_path / "chat", data=text, **sizes, **few)
    assert_progress(done, "pretraining")
    ((name, given),) = map(parsed, next_lines(done))
    assert name == "train"
    assert given == {"checkpoint": str(tmp_path / "chat"), "data": text, "output_dir": str(tmp_path / "chat-sae")}


def test_benches(tmp_path):
    sizes = {"sizes": "16:64:4:128", "architectures": "topk", "rounds": 2, "out": tmp_path / "step.json"}
    done = command("bench", "step", **sizes)
    assert_progress(done, "timing")
    assert set(BENCHES) >= {"step", "stream", "sweep", "runtime", "memory", "quality"}


# ---- the lines themselves ------------------------------------------------------------------------------------------


def test_a_run_of_several_saes_names_one_for_steering(tmp_path):
    for hook in ("blocks.1.hook_mlp_out", "blocks.2.hook_resid_post"):
        (tmp_path / "sae" / hook).mkdir(parents=True)
        (tmp_path / "sae" / hook / "cfg.json").touch()
    assert "--hook=blocks.1.hook_mlp_out" in commands.after_training(tmp_path)[-1]


def test_an_extra_that_is_missing_is_told_with_its_command(monkeypatch, tmp_path):
    monkeypatch.setattr(bridge.run.commands, "is_installed", lambda extra: extra != "web")
    evaluate, explore, _ = commands.after_training(tmp_path)
    assert "pip" not in evaluate
    assert explore.endswith(f"--serve  # first: {commands.python()} -m pip install -e '.[web]'")


def test_the_interpreter_is_named_as_the_shell_finds_it(monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert commands.python() == "python"
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.chdir(tmp_path)
    assert commands.python() == "bin/python"


def test_the_best_labelled_latent_is_proposed(tmp_path):
    assert commands._best(tmp_path, None) == 0
    (tmp_path / "labels.json").write_text(json.dumps({"a": {"3": {"f1": 0.5}, "7": {"f1": 0.9}, "8": {"f1": None}}}))
    assert commands._best(tmp_path, None) == commands._best(tmp_path, "a") == 7
    assert commands._best(tmp_path, "b") == 0


def test_an_unfinished_run_of_the_same_flags_says_how_it_goes_on(tmp_path):
    from bridge.run import directory
    from bridge.training.config import RunConfig

    run = tmp_path / "run"
    config = RunConfig(output_dir=str(run))
    with directory.claimed(run, config):
        directory.record(run, config, {})
    with (
        pytest.raises(ValueError, match="already holds this run, unfinished: continue it with --resume"),
        directory.claimed(run, config),
    ):
        pass
