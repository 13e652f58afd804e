"""Runs of several real processes on the CPU (gloo): one result, one writer, signals, kills, and wrong starts."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from several_processes import ROOT, Processes

import jsae
from bridge import launch
from jsae import store
from jsae.health import ActivationsError, NotFiniteError
from jsae.processes import SharedError, connected, same_everywhere
from jsae.settings import ConfigError

HOOK = "blocks.2.hook_resid_post"
FLAGS = {
    "num_activations": 32_768,
    "batch_size": 512,
    "block_size": 4096,
    "context_size": 64,
    "tokens_per_forward": 512,
    "checkpoint_every": 4096,
    "log_every": 8,
    "heldout_tokens": 2000,
    "expansion_factor": 4,
    "k": 8,
    "dead_after": 2000,
    "learning_rate": 0.001,
}
STEPS = 64


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Some thirty files of Python."""
    folder = tmp_path_factory.mktemp("text")
    for path in sorted(Path(json.__file__).parents[1].glob("*.py"))[:60:2]:
        shutil.copy(path, folder)
    return folder


def command(run: Path, text: Path, **flags: object) -> list[str]:
    values = {**FLAGS, "data": f"{text}/*.py", "output_dir": run, **flags}
    words = [f"--{name}" if value is True else f"--{name}={value}" for name, value in values.items()]
    return ["-m", "experiments.train", *words]


def weights(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / "sae" / HOOK / "sae_weights.safetensors")


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def steps(run: Path) -> list[int]:
    folder = run / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def wait_for_checkpoint(run: Path, processes: Processes) -> None:
    until = time.monotonic() + 200
    while not steps(run):
        assert all(process.poll() is None for process in processes.all), processes.finish()
        assert time.monotonic() < until
        time.sleep(0.02)


def same(run: Path, whole: Path) -> None:
    """Two runs end with the same SAE, to what a few selections that rounding decides can change."""
    ours, theirs = weights(run), weights(whole)
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        difference = np.linalg.norm(ours[name] - expected) / np.linalg.norm(expected)
        assert difference < 1e-3, (name, difference)
    last, expected_last = lines(run)[-1], lines(whole)[-1]
    for name in ("loss", "fvu", "l0", "dead_fraction"):
        assert last[name] == pytest.approx(expected_last[name], rel=1e-4), name
    assert [line["step"] for line in lines(run)] == [line["step"] for line in lines(whole)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, text) -> Path:
    """The run of a single process."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    done = subprocess.run(
        [sys.executable, *command(run, text)], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    return run


# ---- one result ----------------------------------------------------------------------------------------------------


MESHES = {"2x1": (2, 1), "1x2": (2, 2), "2x2": (4, 2)}


@pytest.mark.parametrize(
    ("architecture", "meshes"), [("topk", ("2x1", "1x2", "2x2")), ("batchtopk", ("2x2",)), ("relu", ("2x1",))]
)
def test_fifty_steps_of_one_two_and_four_processes_end_with_the_same_state(architecture, meshes, tmp_path):
    """The largest difference of any number of the state, relative to the largest number of its array."""
    for name in ("1", *meshes):
        count, latent = MESHES.get(name, (1, 1))
        worker = ["-m", "mesh_worker", architecture, str(latent), str(tmp_path / f"{name}.npz")]
        if count == 1:
            done = subprocess.run(
                [sys.executable, *worker], cwd=ROOT / "tests", capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
            continue
        with Processes(worker, count) as processes:
            assert [code for code, _, _ in processes.finish()] == [0] * count
    with np.load(tmp_path / "1.npz") as expected:
        for name in meshes:
            with np.load(tmp_path / f"{name}.npz") as state:
                assert state.keys() == expected.keys()
                for leaf in expected:
                    scale = np.abs(expected[leaf].astype(np.float64)).max() + 1e-30
                    difference = np.abs(state[leaf].astype(np.float64) - expected[leaf]).max() / scale
                    assert difference < 1e-5, (name, leaf, difference)
                np.testing.assert_array_equal(state["[0].since_fired"], expected["[0].since_fired"])


def test_torchrun_starts_a_run_that_equals_one_process_and_one_of_them_reports(whole, text, tmp_path):
    run = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*torchrun, *command(run, text)], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    same(run, whole)
    assert "2 processes: 2 divide the batch, times 1 that divide the latents" in done.stdout
    assert done.stdout.count("exported SAE") == done.stdout.count("\nnext:") == 1
    assert len(list((run / "tb").iterdir())) == 1
    record = json.loads((run / "config.json").read_text())
    assert (
        record["facts"]["data_shards"] == json.loads((whole / "config.json").read_text())["facts"]["data_shards"] == 8
    )


def test_a_run_of_four_processes_stopped_by_one_signal_goes_on_in_fewer(whole, text, tmp_path):
    run = tmp_path / "run"
    with Processes(command(run, text, latent_shards=2), 4) as processes:
        wait_for_checkpoint(run, processes)
        processes.send(2, signal.SIGTERM)
        results = processes.finish()
    assert [code for code, _, _ in results] == [75] * 4, results
    assert "stopped and saved; continue with:" in results[0][1]
    said = [line for _, out, _ in results[1:] for line in out.splitlines() if not line.startswith("[Gloo]")]
    assert not said
    assert 0 < steps(run)[-1] < STEPS
    shutil.copytree(run, tmp_path / "copy")
    resume = [sys.executable, *command(run, text, resume=True)]
    done = subprocess.run(resume, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    same(run, whole)
    run.rename(tmp_path / "first")
    (tmp_path / "copy").rename(run)
    with Processes(command(run, text, resume=True), 2) as processes:
        assert [code for code, _, _ in processes.finish()] == [0, 0]
    same(run, whole)


@pytest.mark.parametrize("victim", [0, 1])
def test_the_others_end_soon_after_one_is_killed_and_the_run_resumes(victim, whole, text, tmp_path):
    run = tmp_path / "run"
    with Processes(command(run, text), 2) as processes:
        wait_for_checkpoint(run, processes)
        killed = processes.send(victim, signal.SIGKILL)
        results = processes.finish()
        assert time.monotonic() - killed < 60
    assert all(code for code, _, _ in results)
    message = results[1 - victim][2]
    assert "another process of the run has ended" in message or "another task died" in message
    if victim == 0:
        return
    with Processes(command(run, text, resume=True), 2) as processes:
        assert [code for code, _, _ in processes.finish()] == [0, 0]
    same(run, whole)


def test_only_errors_that_every_process_has_are_left_to_the_first(monkeypatch):
    """The first read of a device's result may find that another process was lost: perhaps the first one."""
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(SharedError), same_everywhere(NotFiniteError):
        raise ActivationsError("a number is not finite")
    lost = jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllReduce failed: Connection closed by peer [127.0.0.1]:5000")
    with (
        pytest.raises(ConnectionError, match="another process of the run has ended"),
        connected(),
        same_everywhere(NotFiniteError),
    ):
        raise lost


def test_two_processes_train_a_sweep_on_a_store_as_one_does(tmp_path):
    rng = np.random.default_rng(0)
    acts = (rng.standard_normal((16_384, 8)) @ rng.standard_normal((8, 32))).astype(np.float32)
    store.write(tmp_path / "acts", {HOOK: acts})
    names = ("num_activations", "batch_size", "block_size", "log_every", "expansion_factor", "k", "dead_after")
    flags = {name: FLAGS[name] for name in names} | {"activations": tmp_path / "acts", "num_activations": 8192}
    flags["k"] = "4,8"  # a sweep is divided over the same devices
    words = [f"--{name}={value}" for name, value in flags.items()]
    alone = [sys.executable, "-m", "experiments.train", *words, f"--output_dir={tmp_path / 'one'}"]
    done = subprocess.run(alone, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    with Processes(["-m", "experiments.train", *words, f"--output_dir={tmp_path / 'two'}"], 2) as processes:
        results = processes.finish()
    assert [code for code, _, _ in results] == [0, 0], results
    for variant in ("k4", "k8"):
        same(tmp_path / "two" / variant, tmp_path / "one" / variant)


def test_processes_that_divide_the_latents_continue_an_sae_as_one_does(tmp_path):
    rng = np.random.default_rng(0)
    acts = (rng.standard_normal((16_384, 8)) @ rng.standard_normal((8, 32))).astype(np.float32)
    store.write(tmp_path / "acts", {HOOK: acts})
    config = jsae.BatchTopK.Config(32, 128, k=4)
    jsae.train(acts, config, jsae.TrainConfig(512 * 20, 512, 2e-3)).save(tmp_path / "sae")
    names = ("batch_size", "block_size", "log_every", "dead_after")
    flags = {name: FLAGS[name] for name in names} | {"activations": tmp_path / "acts", "num_activations": 4096}
    flags |= {"init_from": tmp_path / "sae", "activation": "batchtopk", "k": 4, "latent_shards": 2}
    words = [f"--{name}={value}" for name, value in flags.items()]
    alone = [sys.executable, "-m", "experiments.train", *words[:-1], f"--output_dir={tmp_path / 'one'}"]
    done = subprocess.run(alone, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    with Processes(["-m", "experiments.train", *words, f"--output_dir={tmp_path / 'two'}"], 2) as processes:
        results = processes.finish()
    assert [code for code, _, _ in results] == [0, 0], results
    assert "continues" in results[0][1]
    same(tmp_path / "two", tmp_path / "one")


def test_three_processes_share_six_parts(text, tmp_path):
    flags = {"data_shards": 6, "batch_size": 510, "num_activations": 4080, "heldout_tokens": 500}
    with Processes(command(tmp_path / "run", text, **flags), 3) as processes:
        results = processes.finish()
    assert [code for code, _, _ in results] == [0] * 3, results
    assert lines(tmp_path / "run")[-1]["step"] == 8


@pytest.mark.parametrize("asked", [(0,), (1,), (0, 1)])
def test_a_request_to_stop_while_the_first_process_measures_ends_all(asked, text, tmp_path):
    run = tmp_path / "run"
    with Processes(command(run, text, num_activations=4096, heldout_tokens=200_000), 2) as processes:
        until = time.monotonic() + 200
        while not (run / "sae" / HOOK / "cfg.json").is_file():
            assert time.monotonic() < until
            time.sleep(0.02)
        for index in asked:
            processes.send(index, signal.SIGTERM)
        results = processes.finish(100)
    assert [code for code, _, _ in results] == [75, 75], results
    assert "stopped and saved" in results[0][1]


# ---- wrong starts --------------------------------------------------------------------------------------------------


def test_processes_with_other_settings_are_refused(text, tmp_path):
    several = [command(tmp_path / "run", text), command(tmp_path / "run", text, k=9)]
    with Processes([], 2, several) as processes:
        results = processes.finish()
    assert [code for code, _, _ in results] == [1, 1]
    assert "FATAL process 0 of 2: settings, model, data, device or versions of process 1 on" in results[0][2]


def test_an_error_of_one_process_is_the_end_of_all_and_named(text, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.py").write_text("x = 1\n")
    several = [command(tmp_path / "run", text), command(tmp_path / "run", text, data=f"{other}/*.py")]
    with Processes([], 2, several) as processes:
        results = processes.finish()
    assert [code for code, _, _ in results] == [1, 1]
    assert "FATAL process 0 of 2: process 1 of 2 ended: " in results[0][2]
    assert "FATAL process 1 of 2: " in results[1][2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"latent_shards": 4}, "2 processes cannot be divided by --latent_shards=4"),
        ({"data_shards": 1}, "2 processes cannot share 1 part(s) of text and batches: give --data_shards=2"),
    ],
)
def test_what_cannot_be_divided_is_refused_once(flags, message, text, tmp_path):
    with Processes(command(tmp_path / "run", text, **flags), 2) as processes:
        results = processes.finish()
    assert [code for code, _, _ in results] == [1, 1]
    assert f"FATAL process 0 of 2: {message}" in results[0][2]
    assert "FATAL process" not in results[1][2]


def test_a_directory_that_is_refused_ends_all(text, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    start = time.monotonic()
    with Processes(command(tmp_path / "run", text), 2) as processes:
        results = processes.finish(100)
    assert time.monotonic() - start < 60
    assert all(code for code, _, _ in results)
    assert "already holds something else" in results[0][2]


def test_a_single_process_has_no_latents_to_share(text, tmp_path):
    done = subprocess.run(
        [sys.executable, *command(tmp_path / "run", text, latent_shards=2)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "--latent_shards=2 is for several processes, and this is one" in done.stderr


# ---- launchers -----------------------------------------------------------------------------------------------------

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "host",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "16",
    "SLURM_LOCALID": "3",
    "SLURM_STEP_NODELIST": "a[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (TORCHRUN, launch.Launch(5, 8, 1, 4, "host:29501")),
        (SLURM, launch.Launch(3, 16, 3, 8, None)),
        (OPEN_MPI, launch.Launch(2, 4, 0, 2, None)),
        (TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1"}, None),
        (SLURM | {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, None),
        ({}, None),
    ],
)
def test_a_launcher_is_recognised_by_its_variables(environment, expected):
    assert launch.detected(environment) == expected


@pytest.mark.parametrize(
    "wrong", [{"RANK": "8"}, {"WORLD_SIZE": "many"}, {"MASTER_PORT": "65535"}, {"LOCAL_RANK": "-1"}]
)
def test_variables_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ConfigError, match=r"torchrun|launcher"):
        launch.detected(TORCHRUN | wrong)
