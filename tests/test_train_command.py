"""The main job as its user runs it: a real process on the packaged nanochat, killed, stopped, starved and misled."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import alone
import file_limit
import jax.numpy as jnp
import numpy as np
import pytest
import sae_lens
import torch
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import bridge.nanochat
from bridge import torch_sae
from bridge.hooks import capture
from jsae import export
from jsae.architectures import sae_config
from jsae.config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
HOOK = "blocks.2.hook_resid_post"
SMALL = {
    "num_activations": 24_000,
    "batch_size": 500,
    "block_size": 5_000,
    "context_size": 64,
    "tokens_per_forward": 2048,
    "checkpoint_every": 4_000,
    "log_every": 5,
    "heldout_tokens": 4_000,
    "expansion_factor": 2,
    "k": 8,
    "dead_after": 5_000,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Some thirty files of Python."""
    folder = tmp_path_factory.mktemp("text")
    for path in sorted(Path(json.__file__).parents[1].glob("*.py"))[:60:2]:
        shutil.copy(path, folder)
    return folder


def command(run: Path, text: Path, **flags: object) -> list[str]:
    flags = {**SMALL, "data": f"{text}/*.py", "output_dir": run, **flags}
    told = [f"--{name}" if value is True else f"--{name}={value}" for name, value in flags.items()]
    return [sys.executable, "-m", "experiments.train", *told]


def run_to_the_end(run: Path, text: Path, **flags: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(run, text, **flags), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )


def start(run: Path, text: Path, **flags: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(run, text, **flags),
        cwd=ROOT,
        env=file_limit.ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_checkpoint(run: Path, process: subprocess.Popen[str], number: int = 1) -> None:
    """Returns when the run has written its first checkpoints."""
    until = time.monotonic() + 200
    while len(steps(run)) < number:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.02)


def steps(run: Path) -> list[int]:
    folder = run / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def weights(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / "sae" / HOOK / "sae_weights.safetensors")


def lines(run: Path) -> list[dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith("per_second")} for line in found]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, text) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A run that nothing happened to."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    return run, run_to_the_end(run, text)


def test_a_run_says_what_it_did_and_leaves_everything_it_promises(whole):
    run, done = whole
    assert done.returncode == 0, done.stderr
    assert {p.name for p in run.iterdir()} == {"checkpoints", "config.json", "eval.json", "metrics.jsonl", "sae", "tb"}
    assert {p.name for p in (run / "sae" / HOOK).iterdir()} == {
        "cfg.json",
        "sae_weights.safetensors",
        "sparsity.safetensors",
    }
    summary = json.loads((run / "eval.json").read_text())[HOOK]
    assert summary["l0"] <= 8
    assert 0 < summary["fvu"] < 0.9
    assert f"{summary['fvu']:.4f}" in done.stdout
    assert str(run / "sae" / HOOK) in done.stdout
    reports = lines(run)
    assert [r["step"] for r in reports][-1] == 48
    assert reports[-1]["fvu"] < reports[0]["fvu"]
    assert {"loss", "fvu", "l0", "dead_fraction", "learning_rate"} <= set(reports[0])
    assert list((run / "tb").iterdir())
    record = json.loads((run / "config.json").read_text())
    assert record["flags"]["k"] == [8]
    assert len(record["facts"]["model"]) == 64
    assert record["facts"]["operations"] == "cpu"
    assert record["facts"]["compiled"] is None
    assert record["reasons"]["operations"] == "the device is a processor"
    assert record["reasons"]["compiled"]


def test_the_export_is_read_by_torch_and_saelens_with_its_metadata(whole):
    folder = whole[0] / "sae" / HOOK
    ours, lens = torch_sae.load(folder), sae_lens.SAE.load_from_disk(str(folder))
    assert (ours.d_in, ours.d_sae, ours.cfg["k"]) == (128, 256, 8)
    assert lens.cfg.metadata.hook_name == HOOK
    assert lens.cfg.metadata.context_size == 64
    sparsity = load_file(folder / "sparsity.safetensors")["sparsity"]
    assert sparsity.shape == (256,)
    assert sparsity.max() <= 0


@pytest.mark.parametrize(
    "config",
    [
        sae_config("topk", 128, 512, k=16),
        sae_config("relu", 128, 512, l1_coefficient=2.0),
        sae_config("gated", 128, 512, l1_coefficient=2.0),
    ],
    ids=lambda c: c.architecture,
)
def test_jax_torch_and_saelens_agree_on_real_activations(config, tmp_path):
    nano = bridge.nanochat.load("demo")
    ids = nano.tokenizer.encode(Path(json.__file__).read_text(), prepend_bos=True)[:512]
    with torch.no_grad(), capture(nano.model, [HOOK], stop=True) as acts:
        nano.model(torch.tensor([ids]))
    x = acts[HOOK][0, 1:]
    run = TrainConfig(num_activations=511 * 40, batch_size=511, learning_rate=1e-3)
    state = alone.begin(config, run, jnp.asarray(x.numpy()))
    *_, (_, state, _) = alone.fit(config, run, state, [jnp.asarray(x.numpy())] * 40)
    export.write(tmp_path / "sae", config, state.sae.arrays(), float(state.scale), float(state.scale), {})
    scaled = jnp.asarray(x.numpy()) * state.scale
    expected = np.asarray(state.sae.decode(state.sae.encode(scaled), scaled) / state.scale)
    ours, lens = torch_sae.load(tmp_path / "sae"), sae_lens.SAE.load_from_disk(str(tmp_path / "sae"))
    sure = np.ones(len(x), bool)
    if config.architecture == "gated":  # a gate within rounding of its jump is open in one library, shut in the other
        gates = (x - ours.b_dec) @ ours.W_enc + ours.b_gate
        sure = (gates.abs() > 2e-6 * gates.abs().max()).all(1).numpy()
        assert sure.mean() > 0.9
    for other in (ours, lens):
        with torch.no_grad():
            x_hat = other.forward(x).numpy()
        assert np.abs(x_hat - expected)[sure].max() < 1e-5 * np.abs(expected).max()


def test_a_run_killed_at_any_moment_resumes_to_the_same_bits(whole, text, tmp_path):
    run = tmp_path / "killed"
    process = start(run, text)
    wait_for_checkpoint(run, process, number=2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    reached = steps(run)
    assert reached
    assert max(reached) < 48
    done = run_to_the_end(run, text, resume=True)
    assert done.returncode == 0, done.stderr
    expected, found = weights(whole[0]), weights(run)
    assert expected.keys() == found.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    assert lines(run)[-1] == lines(whole[0])[-1]
    assert [line["step"] for line in lines(run)] == sorted({line["step"] for line in lines(run)})


def test_a_damaged_checkpoint_is_named_and_the_run_goes_on_from_the_one_before_to_the_same_bits(whole, text, tmp_path):
    run = tmp_path / "damaged"
    shutil.copytree(whole[0], run)
    shutil.rmtree(run / "sae")
    (run / "eval.json").unlink()
    last = run / "checkpoints" / "48"
    file = max(last.rglob("states/**/d/*"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    done = run_to_the_end(run, text, resume=True)
    assert done.returncode == 0, done.stderr
    told = next(line for line in done.stdout.splitlines() if "damaged" in line)
    assert told.startswith("WARNING the checkpoint of step 48 is damaged")
    assert str(file) in told
    assert "continuing from the checkpoint of step 40" in done.stdout
    for name, expected in weights(whole[0]).items():
        np.testing.assert_array_equal(weights(run)[name], expected, err_msg=name)
    assert lines(run) == lines(whole[0])
    assert (run / "eval.json").read_bytes() == (whole[0] / "eval.json").read_bytes()
    assert steps(run) == steps(whole[0])
    assert (run / "checkpoints" / "48.damaged").is_dir()
    events = EventAccumulator(str(run / "tb")).Reload()
    assert [event.step for event in events.Scalars("fvu")] == [line["step"] for line in lines(run)]


def test_when_every_checkpoint_is_damaged_one_line_names_them_all(whole, text, tmp_path):
    run = tmp_path / "damaged"
    shutil.copytree(whole[0], run)
    for step in steps(run):
        (run / "checkpoints" / str(step) / "notes" / "metadata").unlink()
    done = run_to_the_end(run, text, resume=True)
    assert done.returncode == 1
    (fatal,) = (line for line in done.stderr.splitlines() if "FATAL" in line)
    assert all(f"step {step}: " in fatal for step in steps(whole[0]))
    assert "Traceback" not in done.stderr
    assert steps(run) == steps(whole[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_asked_to_stop_saves_says_how_to_resume_and_does(number, whole, text, tmp_path):
    run = tmp_path / "stopped"
    process = start(run, text)
    wait_for_checkpoint(run, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 75, err
    assert "stopped and saved; continue with: python -m experiments.train" in out
    assert "Traceback" not in err
    if number == signal.SIGTERM:
        assert run_to_the_end(run, text, resume=True).returncode == 0
        for name, expected in weights(whole[0]).items():
            np.testing.assert_array_equal(weights(run)[name], expected)


def test_a_finished_run_resumed_just_exports_again(whole, text, tmp_path):
    run = tmp_path / "again"
    shutil.copytree(whole[0], run)
    shutil.rmtree(run / "sae")
    done = run_to_the_end(run, text, resume=True)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(weights(run)["W_dec"], weights(whole[0])["W_dec"])


def test_a_full_disk_stops_the_run_and_leaves_the_checkpoint_before(text, tmp_path):
    run = tmp_path / "full"
    process = start(run, text, expansion_factor=8)
    wait_for_checkpoint(run, process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))  # no file may grow beyond this now
    kept = max(steps(run))
    _, err = process.communicate(timeout=200)
    assert process.returncode == 1, err
    assert "FATAL" in err
    assert kept in steps(run)
    done = run_to_the_end(run, text, expansion_factor=8, resume=True)
    assert done.returncode == 0, done.stderr


def with_nan_for(token: int, folder: Path) -> Path:
    """A copy of the demo whose embedding of one token is not a number."""
    demo = Path(bridge.nanochat.__file__).parent / "demo"
    shutil.copytree(demo, folder)
    (file,) = folder.glob("model_*.pt")
    state = torch.load(file, weights_only=True)
    state["transformer.wte.weight"][token] = torch.nan
    torch.save(state, file)
    return folder


def test_activations_that_are_nan_stop_the_run_with_the_step_and_keep_the_last_good_checkpoint(text, tmp_path):
    nano = bridge.nanochat.load("demo")
    counts = np.zeros(nano.config.vocab_size, int)
    for path in text.iterdir():
        counts += np.bincount(nano.tokenizer.encode(path.read_text(errors="replace")), minlength=len(counts))
    rare = int(np.flatnonzero(counts == 3)[0])
    run = tmp_path / "nan"
    done = run_to_the_end(
        run, text, checkpoint=with_nan_for(rare, tmp_path / "broken"), num_activations=200_000, checkpoint_every=500
    )
    assert done.returncode == 1
    assert "not finite at step" in done.stderr
    assert "activations" in done.stderr
    named = int(done.stderr.split("at step ")[1].split(";")[0])
    assert all(step < named for step in steps(run))


BAD = {
    "a checkpoint that is not there": ({"checkpoint": "nowhere/d20"}, "nowhere"),
    "a layer out of range": ({"layer": 6}, "6 layers, 0 to 5"),
    "a negative layer": ({"layer": -1}, "layer '-1' is neither a number from 0 nor 'all'"),
    "k above d_sae": ({"k": 257}, "k=257 active latents out of d_sae=256"),
    "an unknown flag": ({"lr": 3}, "Unknown command line flag 'lr'"),
    "a value of the wrong kind": ({"k": "many"}, "flag --k=many"),
    "an unknown architecture": ({"activation": "topp"}, "topk"),
    "a step that is not there": ({"step": 77}, "77"),
    "text that is not there": ({"data": "nowhere/*.txt"}, "nowhere"),
    "a home that is not there": ({"data": "~nosuchuser/x"}, "names the home of ~nosuchuser, an unknown user"),
    "a variable that is not set": ({"data": "$NOT_SET_AT_ALL/x"}, "NOT_SET_AT_ALL, which is not set"),
    "a batch above the block": ({"block_size": 400}, "block_size"),
    "a context beyond the tables": ({"context_size": 10**6}, "context_size is 1000000"),
    "nothing to resume": ({"resume": True}, "no run to resume"),
    "a GPU that is not there": ({"device": "cuda"}, "no GPU"),
    "a device that jax and torch do not share": ({"device": "mps"}, "cpu or cuda"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_in_one_line_before_anything_starts(what, text, tmp_path):
    flags, complaint = BAD[what]
    done = run_to_the_end(tmp_path / "run", text, **flags)
    assert done.returncode in (1, 2)
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr
    assert not steps(tmp_path / "run")


def test_empty_text_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.py").touch()
    done = run_to_the_end(tmp_path / "run", tmp_path / "empty")
    assert done.returncode == 1
    assert "no document" in done.stderr or "no text" in done.stderr


def test_held_out_text_that_is_too_short_to_measure_on_is_refused_before_training(text, tmp_path):
    (tmp_path / "short").mkdir()
    for i in range(60):
        (tmp_path / "short" / f"{i}.py").write_text(f"x = {i}\n")
    done = run_to_the_end(tmp_path / "run", tmp_path / "short", context_size=512)
    assert done.returncode == 1
    assert "shorter than one row of 512 tokens" in done.stderr
    assert not steps(tmp_path / "run")


def test_a_tokenizer_of_another_vocabulary_is_refused(goldens, text, tmp_path):
    (other,) = goldens.glob("basedir-*/nanochat/tokenizer")
    done = run_to_the_end(tmp_path / "run", text, tokenizer=other)
    assert done.returncode == 1
    assert "320" in done.stderr


def test_another_run_is_never_overwritten(whole, text):
    run, _ = whole
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    done = run_to_the_end(run, text)
    assert done.returncode == 1
    assert f"{run} already holds this run, finished. Next: " in done.stderr
    for name in ("evaluate", "explore", "steer"):
        assert f"-m experiments.{name} --run_dir={run}" in done.stderr
    done = run_to_the_end(run, text, k=4)
    assert done.returncode == 1
    assert f"{run} already holds another run: choose another --output_dir" in done.stderr
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before


def test_resuming_with_other_flags_or_another_text_is_refused(whole, text, tmp_path):
    run, _ = whole
    done = run_to_the_end(run, text, resume=True, k=4)
    assert done.returncode == 1
    assert "--k=8 (now 4)" in done.stderr
    moved = tmp_path / "run"
    shutil.copytree(run, moved)
    record = json.loads((moved / "config.json").read_text())
    record["facts"]["data"] = "other"
    (moved / "config.json").write_text(json.dumps(record))
    done = run_to_the_end(moved, text, resume=True)
    assert done.returncode == 1
    assert "same numbers" in done.stderr


def test_a_malicious_checkpoint_and_tokenizer_run_nothing(text, tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    (tmp_path / "evil").mkdir()
    torch.save({"a": Evil()}, tmp_path / "evil" / "model_000001.pt")
    (tmp_path / "evil" / "tokenizer.pkl").write_bytes(pickle.dumps(Evil()))
    for flags in ({"checkpoint": tmp_path / "evil"}, {"tokenizer": tmp_path / "evil"}):
        done = run_to_the_end(tmp_path / "run", text, **flags)
        assert done.returncode == 1
        assert "FATAL" in done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "pwned").exists()
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
