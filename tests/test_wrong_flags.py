"""Every flag of every command with wrong values: exit code 2 or 1, one FATAL line and a hint, nothing heavy before."""

import dataclasses
import importlib
import math
import os
import subprocess
import sys
import time
import typing
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from commands import CONFIGS

from bridge import accelerators
from bridge.training import device
from bridge.training.config import RunConfig
from experiments import bench, flags
from jsae import loop, settings
from jsae.architectures import JumpReLU, SAEConfig, TopK, sae_config
from jsae.config import TrainConfig
from jsae.settings import ConfigError

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = CONFIGS | {f"bench {name}": importlib.import_module(module).Config for name, module in bench.BENCHES.items()}
ON_A_RUN = ("--run_dir=runs/x",)
NEEDED = {
    "collect": ("--out=x",),
    "finetune": ("--sae=x", "--out=y"),
    "steer": ("--prompt=x", *ON_A_RUN),
    "trace": ("--prompt=x", *ON_A_RUN),
    "lens": ("--prompt=x", *ON_A_RUN),
    "provenance": ("--latent=1", *ON_A_RUN),
} | dict.fromkeys(("evaluate", "diff", "stability", "explore", "export", "publish"), ON_A_RUN)
NUMBERS = ("-1", "0", "1", "2147483648", str(2**63), "1e-320", "1e30", "nan", "inf", "-inf", "", "x", "9" * 5000)
FINITE = ("nan", "inf", "-inf", "x", "9" * 5000)


def fields(config_class: type) -> dict[str, typing.Any]:
    """The fields and their types, of a tuple or an option that of its items."""
    return {field.name: field.type for field in dataclasses.fields(config_class)}


def run(command: str, *arguments: str) -> tuple[int, list]:
    """The exit code, and what main was called with."""
    reached: list = []
    line = [command, *NEEDED.get(command, ()), *arguments]
    with pytest.raises(SystemExit) as stop:
        flags.run(COMMANDS[command], reached.append, argv=line)
    return stop.value.code or 0, reached


def assert_one_line(told: str) -> None:
    assert told.startswith("FATAL ")
    assert told.count("\n") == 2, told
    assert "Traceback" not in told
    assert len(told) < 3000


def names(command: str, of_numbers: bool) -> list[str]:
    """The flags of a command that hold numbers, or one of a few words."""
    return [field.name for field in settings._fields(COMMANDS[command]) if (field.kind is not None) == of_numbers]


@pytest.mark.parametrize("command", COMMANDS)
def test_wrong_numbers_are_refused_in_one_line_that_names_the_flag(command, capsys):
    for name in names(command, of_numbers=True):
        refused = []
        for value in NUMBERS:
            before = time.perf_counter()
            code, reached = run(command, f"--{name}={value}")
            told = capsys.readouterr().err
            assert time.perf_counter() - before < 1, (name, value)
            if reached:
                continue
            refused.append(value)
            assert code == 2, (name, value, told)
            assert_one_line(told)
            assert any(word in told for word in (name, name.replace("_", " "))), (name, value, told)
        assert set(FINITE) <= set(refused), (name, refused)


@pytest.mark.parametrize("command", COMMANDS)
def test_wrong_words_are_refused_in_one_line_that_names_the_flag(command, capsys):
    for name in names(command, of_numbers=False):
        for value in ("", "no such word", "a,b", "\x1b[31m"):
            code, reached = run(command, f"--{name}={value}")
            told = capsys.readouterr().err
            if value != "":
                assert not reached
            if not reached:
                assert code == 2
                assert_one_line(told)
                assert name in told
                assert "\x1b" not in told


@pytest.mark.parametrize("command", [name for name, of in COMMANDS.items() if "device" in fields(of)])
@pytest.mark.parametrize(
    "name", ["", "gpu", "mps", "tpu", "cuda:", "cuda:x", "cuda:-1", "cuda:1e3", "CUDA", "cpu:0", "cuda:99999"]
)
def test_wrong_names_of_devices_are_refused_at_once(command, name, capsys):
    code, reached = run(command, f"--device={name}")
    told = capsys.readouterr().err
    assert (code, reached) == (2, []), told
    assert_one_line(told)
    assert "device" in told
    assert "cuda" in told


@pytest.mark.parametrize("command", ["train", "finetune", "pretrain", "steer", "evaluate", "explore", "trace", "lens"])
def test_a_gpu_that_is_not_there_is_told_of_before_anything_is_read_or_made(command, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    module = importlib.import_module(f"experiments.{command}")
    place = {"pretrain": "--out=", "finetune": "--out=", "train": "--output_dir="}.get(command, "--run_dir=")
    arguments = [*NEEDED.get(command, ()), f"{place}{tmp_path}/none", "--device=cuda"]
    if command == "evaluate":
        (tmp_path / "none").mkdir()
    with pytest.raises(SystemExit) as stop:
        flags.run(COMMANDS[command], module.main, argv=[command, *arguments])
    told = capsys.readouterr().err
    assert stop.value.code == 1
    assert_one_line(told)
    assert "--device=cuda: torch sees no GPU here; use --device=cpu" in told
    assert not list((tmp_path / "none").glob("*"))


def test_a_gpu_of_a_number_too_high_is_told_of_with_what_there_is(monkeypatch):
    seen = accelerators.Seen("2.11.0", "13.0", 2, "", "NVIDIA H100", (9, 0), 2**36, 2**36)
    accelerators.require_torch("cuda", look=lambda number: seen)
    accelerators.require_torch("cuda:1", look=lambda number: seen)
    with pytest.raises(ConfigError, match="--device=cuda:7: torch sees 2 GPUs here, cuda:0, cuda:1"):
        accelerators.require_torch("cuda:7", look=lambda number: seen)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-abc")
    assert device._visible("cuda:1", 1) == "GPU-abc"
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES=2,GPU-abc leaves 2 to this process"):
        device._visible("cuda:2", 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert device._visible("cuda:5", 5) == "5"


EARLY = {
    "train": (
        "--data_seed=-1",
        "--average_fraction=2",
        "--num_activations=1e30",
        "--l1_coefficient=-1",
        "--device=tpu",
    ),
    "pretrain": ("--n_head=3", "--micro_rows=3", "--matrix_lr=nan", "--window_pattern=SX"),
    "steer": ("--temperature=1e-320", "--seed=-1", "--top_k=0"),
}


@pytest.mark.parametrize("command", EARLY)
def test_wrong_values_are_told_before_torch_and_jax_are_loaded(command):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    needed = NEEDED.get(command, ())
    for argument in EARLY[command]:
        words = [sys.executable, "-X", "importtime", "-m", f"experiments.{command}", *needed, argument]
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
        imported = [
            told.rsplit("|", 1)[-1].strip() for told in done.stderr.splitlines() if told.startswith("import time:")
        ]
        rest = "".join(f"{told}\n" for told in done.stderr.splitlines() if not told.startswith("import time:"))
        assert done.returncode == 2, rest
        assert_one_line(rest)
        assert not {"torch", "jax"} & set(imported), argument


# ---- the configurations of the library -----------------------------------------------------------------------------

EXTREMES = (0, -1, 1, 2**31, 2**63, 10**400, 1e-320, 1e30, math.nan, math.inf, -math.inf, "x", True, [1], None)
BASES = [
    (TopK.Config, {"d_in": 8, "d_sae": 16, "k": 4}),
    (JumpReLU.Config, {"d_in": 8, "d_sae": 16}),
    (TrainConfig, {"num_activations": 4096, "batch_size": 64}),
    (RunConfig, {}),
    (RunConfig, {"activation": "relu"}),
    (RunConfig, {"activation": "jumprelu"}),
]


def test_an_extreme_number_is_a_config_error_that_names_the_field_or_a_config_that_works():
    """In a process of its own: here, constructors check types before they say what is wrong."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests", "JAX_PLATFORMS": "cpu"}
    words = [sys.executable, "-c", "import test_wrong_flags; test_wrong_flags.try_extremes()"]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def try_extremes() -> None:
    """Every number of every config, one after the other."""
    for config_class, base in BASES:
        for field in settings._fields(config_class):
            values = [(value,) for value in EXTREMES] if field.is_list else []
            for value in [*values, *EXTREMES]:
                before = time.perf_counter()
                told = refusal(config_class, base | {field.name: value})
                assert time.perf_counter() - before < 1, (config_class, field.name, value)
                if told is not None:
                    names = (field.name, field.name.replace("_", " "), field.name.replace("architecture", "activation"))
                    assert any(name in told for name in names), (config_class, field.name, value, told)
                    assert len(told) < 1000


def refusal(config_class: type, values: dict) -> str | None:
    """Return the error of a config; None if it works."""
    try:
        works(config_class(**values))
    except ConfigError as error:
        return str(error)
    return None


def works(config: SAEConfig | TrainConfig | RunConfig) -> None:
    """Return the result of a config without memory for it."""
    if isinstance(config, TrainConfig):
        assert config.num_steps >= 1
        assert np.isfinite(config.default_rate(sae_config("topk", 8, 16, k=1)))
        assert config.anneal_steps >= 0
    elif isinstance(config, RunConfig):
        for variant in config.variants():
            variant.sae_config(8)
            works(variant.train_config())
    else:
        sample = tuple(
            jax.ShapeDtypeStruct((4, config.d_in // config.layers), np.float32) for _ in range(config.layers)
        )
        sample = (*sample, jax.ShapeDtypeStruct((4, config.d_out), np.float32)) if config.d_out else sample
        run = TrainConfig(num_activations=64, batch_size=4)
        jax.eval_shape(lambda x: loop.init([loop.Member(config, run)], (x,)), sample)


@pytest.mark.parametrize("flag", ["--k=32", "--l0_coefficient=5"])
def test_a_flag_that_the_architecture_does_not_have_is_refused_with_its_default_too(capsys, flag):
    assert run("train", "--activation=relu", flag) == (2, [])
    name = flag.partition("=")[0]
    assert f"{name} means nothing to relu: leave it out. relu has --l1_coefficient" in capsys.readouterr().err
