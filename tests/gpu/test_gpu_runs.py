"""Training runs on a GPU: two runs end with the same bits, and so does one that was killed and resumed."""

import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from card import REHEARSED, finish, start, warnings_in
from safetensors.numpy import load_file

pytestmark = pytest.mark.xdist_group("runs")

HOOK = "blocks.2.hook_resid_post"
FLAGS = {
    "num_activations": 200_000 if REHEARSED else 2_000_000,
    "batch_size": 2048,
    "block_size": 16_384,
    "tokens_per_forward": 16_384,
    "checkpoint_every": 20_480 if REHEARSED else 204_800,
    "log_every": 20,
    "heldout_tokens": 20_000,
    "dead_after": 50_000,
    "matmul_dtype": "bfloat16",
    "deterministic": True,
    "jax_memory_fraction": 0.1,
}
PLACES = ("undisturbed", "again", "killed")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, tuple[Path, str]]:
    """Three runs of the same flags, of which one was killed after a checkpoint and resumed; with what they said."""
    folder = tmp_path_factory.mktemp("runs")
    paths = {name: folder / name for name in PLACES}
    started = {name: start("experiments.train", output_dir=path, **FLAGS) for name, path in paths.items()}
    killed = started.pop("killed")
    until = time.monotonic() + 150
    while not _checkpoints(paths["killed"]):
        assert killed.poll() is None, "".join(killed.communicate())
        assert time.monotonic() < until, "no checkpoint after 150 s"
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL, "the run ended before it was killed: make it longer"
    started["killed"] = start("experiments.train", output_dir=paths["killed"], resume=True, **FLAGS)
    output = {name: finish(process) for name, process in started.items()}
    assert "continuing from the checkpoint of step" in output["killed"][0]
    return {name: (paths[name], "".join(output[name])) for name in PLACES}


def _checkpoints(run: Path) -> list[str]:
    folder = run / "checkpoints"
    return [path.name for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []


@pytest.mark.parametrize("name", ["again", "killed"])
def test_every_weight_is_the_undisturbed_runs_bit_for_bit(runs, name):
    ours, theirs = (load_file(runs[run][0] / "sae" / HOOK / "sae_weights.safetensors") for run in (name, "undisturbed"))
    assert ours.keys() == theirs.keys()
    far = {what: float(np.abs(ours[what] - theirs[what]).max()) for what in ours}
    assert {what: gap for what, gap in far.items() if gap or not np.array_equal(ours[what], theirs[what])} == {}


@pytest.mark.parametrize("name", ["again", "killed"])
def test_every_reported_number_is_the_undisturbed_runs(runs, name):
    def lines(run: str) -> dict[int, dict]:
        told = [json.loads(line) for line in (runs[run][0] / "metrics.jsonl").read_text().splitlines()]
        return {line["step"]: {k: v for k, v in line.items() if not k.endswith("per_second")} for line in told}

    ours, theirs = lines(name), lines("undisturbed")
    assert len(theirs) > 3
    assert ours == theirs


def test_the_run_learned_and_warned_of_nothing(runs):
    run, output = runs["undisturbed"]
    assert warnings_in(output) == []
    assert json.loads((run / "eval.json").read_text())[HOOK]["fvu"] < 0.3
