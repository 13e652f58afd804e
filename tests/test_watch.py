"""Watching a training as upstream's script runs it: nothing disturbs it, and what is learned survives it."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import upstream_loop
from safetensors.numpy import load_file
from several_processes import Processes
from test_pretrain import TINY, trainer
from torch import nn

from bridge.live import Watcher, remote
from bridge.run import Run
from bridge.run.saes import load_saes
from bridge.stages import survival
from experiments import pretrain
from jsae.settings import ConfigError

pytestmark = pytest.mark.usefixtures("quickly_compiled")

HOOK = "blocks.1.hook_resid_post"
WATCH = {
    **{"layer": ["1"], "tokens": 64, "batch_size": 32, "k": 4, "expansion_factor": 2, "share": 1e6},
    **{"log_every": 2, "exclude_tokens": "bos"},
}
STEPS = 9


@pytest.fixture(autouse=True)
def patience(monkeypatch) -> None:
    """Processes beside the training end before their test does, however busy the machine is."""
    monkeypatch.setattr(remote, "_CLOSE_TIMEOUT", 600.0)


def watch(folder: Path, **settings: Any) -> dict[str, Any]:
    return WATCH | {"output_dir": str(folder / "run")} | settings


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "run" / "sae" / HOOK / "sae_weights.safetensors")


def assert_same_saes(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def unwatched(tmp_path_factory) -> list[float]:
    """The losses of the training alone."""
    return upstream_loop.train(tmp_path_factory.mktemp("alone"), STEPS)["losses"]


@pytest.fixture(scope="module")
def watched(tmp_path_factory) -> dict[str, Any]:
    """A training that was watched to its end."""
    folder = tmp_path_factory.mktemp("watched")
    result = upstream_loop.train(folder, STEPS, watch(folder))
    result["watcher"].close()
    return result | {"folder": folder}


# ---- training is not disturbed ------------------------------------------------------------------------------------


def test_the_losses_are_the_same_bits(unwatched, watched):
    assert watched["losses"] == unwatched
    assert watched["watcher"].batches == 2 * STEPS


def test_compiled_losses_are_the_same_bits(tmp_path):
    losses = []
    for settings in (None, watch(tmp_path, every=2)):
        torch._dynamo.reset()
        result = upstream_loop.train(tmp_path, 4, settings, compiler="aot_eager")
        losses.append(result["losses"])
    torch._dynamo.reset()
    assert losses[0] == losses[1]
    assert result["watcher"].batches == 4  # of steps 0 and 2
    result["watcher"].close()


def test_two_processes_train_the_same_and_the_first_watches(tmp_path):
    losses = []
    for name, settings in (("alone", None), ("watched", watch(tmp_path))):
        arguments = {"folder": str(tmp_path / name), "steps": 4, "ddp": True, "watch": settings}
        command = ["tests/upstream_loop.py", json.dumps(arguments)]
        with Processes(command, 2) as processes:
            results = processes.finish(600)
        assert [code for code, _, _ in results] == [0, 0], "\n".join(err[-2000:] for _, _, err in results)
        losses.append([json.loads(out.split("result ")[1])["losses"] for _, out, _ in results])
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][1]  # each process has its own part of the batch
    assert lines(tmp_path)[-1]["batches"] == 8
    assert "watch:" not in results[1][2]


def test_threads_of_this_projects_pretraining_are_watched(tmp_path):
    """The tiny model's steps have few tokens, so that they are gathered over several."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i}.txt").write_text(f"{i}: " + "the lamp, the boat, the pier; " * 12)
    losses = []
    for settings in (None, watch(tmp_path, checkpoint="models")):
        learner = trainer(f"{folder}/*.txt", workers=2, steps=6)
        watcher = None if settings is None else Watcher(learner.model, **settings)
        own = []
        for figures in learner.run():
            own.append(figures["loss"])
            if watcher is not None:
                watcher.step(learner.step)
        losses.append(own)
    assert losses[0] == losses[1]
    assert watcher.batches == 6 * 2
    watcher.close()


# ---- the result is a run ------------------------------------------------------------------------------------------


def test_the_result_is_a_run_that_others_read(watched):
    run = Run(watched["folder"] / "run")
    (sae,) = load_saes(run.path).values()
    assert (sae.d_in, sae.d_sae) == (upstream_loop.WIDTH, 2 * upstream_loop.WIDTH)
    assert sae.metadata["model_step"] == STEPS
    assert sae.metadata["exclude_special_tokens"] == [upstream_loop.VOCAB - 9]
    assert 0 < run.evaluation[HOOK]["fvu"] < 1
    assert run.flags["checkpoint"].endswith("base_checkpoints/d3")
    last = lines(watched["folder"])[-1]
    assert (last["step"], last["batches"]) == (STEPS, 2 * STEPS)
    assert last["scale"] > 0
    assert {"watch_share", "watch_seconds", "setup_seconds", "due", "skipped"} <= last.keys()
    histogram = last["density_histogram"]
    assert sum(histogram["counts"]) + histogram["never"] == sae.d_sae


def test_every_checkpoint_of_the_model_has_its_saes(watched):
    run = Run(watched["folder"] / "run")
    models = sorted(path.stem for path in (watched["folder"] / "base_checkpoints/d3").glob("model_*.pt"))
    assert models == ["model_000004", "model_000008", "model_000009"]
    assert sorted(p.name for p in run.checkpoints_folder.iterdir() if p.is_dir()) == ["4", "8", "9"]
    stages = [run.stage_folder(f"step{step:06d}", HOOK) for step in (4, 8, 9)]
    links = survival.follow([survival.read(folder) for folder in stages])
    assert [len(link.cosine) for link in links] == [2 * upstream_loop.WIDTH] * 2


# ---- resuming -----------------------------------------------------------------------------------------------------


def test_a_training_that_goes_on_continues_its_saes_exactly(tmp_path, watched, unwatched):
    begun = upstream_loop.train(tmp_path, STEPS, watch(tmp_path), stop_at=6)
    begun["watcher"].close()
    result = upstream_loop.train(tmp_path, STEPS, watch(tmp_path), resume_from_step=4)
    result["watcher"].close()
    assert result["losses"] == unwatched[2 * 4 :]
    assert_same_saes(tmp_path, watched["folder"])
    steps = [line["step"] for line in lines(tmp_path)]
    assert steps == sorted(steps) == [line["step"] for line in lines(watched["folder"])]


def test_a_killed_training_loses_nothing_since_its_last_save(tmp_path, unwatched, capsys):
    arguments = {"folder": str(tmp_path), "steps": STEPS, "watch": watch(tmp_path), "kill_at": 6}
    with Processes(["tests/upstream_loop.py", json.dumps(arguments)], 1) as processes:
        ((code, _, errors),) = processes.finish(600)
    assert code == -signal.SIGKILL, errors[-2000:]
    result = upstream_loop.train(tmp_path, STEPS, watch(tmp_path), resume_from_step=4)
    result["watcher"].close()
    assert result["losses"] == unwatched[2 * 4 :]
    assert "no checkpoint" not in capsys.readouterr().err
    assert [(line["step"], line["batches"]) for line in lines(tmp_path)] == [(s, 2 * s) for s in range(1, STEPS + 1)]


def test_a_process_beside_a_killed_training_saves_what_it_was_told(tmp_path, capsys):
    settings = watch(tmp_path, place="sidecar", tokens=32)
    arguments = {"folder": str(tmp_path), "steps": STEPS, "watch": settings, "kill_at": 6}
    with Processes(["tests/upstream_loop.py", json.dumps(arguments)], 1) as processes:
        ((code, _, errors),) = processes.finish(600)
    assert code == -signal.SIGKILL, errors[-2000:]
    run = Run(tmp_path / "run")
    until = time.monotonic() + 600
    while not run.table_file("eval").is_file() and time.monotonic() < until:
        time.sleep(0.2)
    assert sorted(p.name for p in run.checkpoints_folder.iterdir() if p.name.isdecimal()) == ["4"]
    result = upstream_loop.train(tmp_path, STEPS, settings, resume_from_step=4)
    assert result["watcher"].active
    result["watcher"].close()
    assert "anew" not in capsys.readouterr().err


def test_a_step_without_a_checkpoint_is_reported(tmp_path, watched, capsys):
    model = upstream_loop.GPT()
    settings = watch(watched["folder"]) | {"checkpoint": watched["folder"] / "base_checkpoints" / "d3"}
    with pytest.raises(ConfigError, match="already holds this run, finished"):
        Watcher(model, **settings)
    Watcher(model, resume_from=6, **settings).close()
    assert "no checkpoint of step 6: they go on from that of step 4" in capsys.readouterr().err
    Watcher(model, resume_from=2, **settings).close()
    assert "begin anew at step 2" in capsys.readouterr().err


# ---- bad input ----------------------------------------------------------------------------------------------------


def test_wrong_models_and_settings_are_refused_before_anything_is_written(tmp_path, watched):
    settings = watch(tmp_path, checkpoint="models")
    with pytest.raises(ValueError, match=r"blocks\.7\.hook_resid_post: the model has 3 layers, 0 to 2"):
        Watcher(upstream_loop.GPT(), **settings | {"layer": [7]})
    with pytest.raises(ValueError, match=r"no transformer\.wte"):
        Watcher(nn.Linear(2, 2), **settings)
    with pytest.raises(ConfigError, match="checkpoint is not given"):
        Watcher(upstream_loop.GPT(), output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    other = watch(watched["folder"]) | {"checkpoint": watched["folder"] / "base_checkpoints" / "d3", "resume_from": 4}
    with pytest.raises(ConfigError, match="sizes was"):
        Watcher(upstream_loop.GPT(width=64), **other)
    with pytest.raises(ConfigError, match="--k=4 \\(now 5\\)"):
        Watcher(upstream_loop.GPT(), **other | {"k": 5})


def test_a_replaced_model_is_reported_and_attached(tmp_path, capsys):
    model, new = upstream_loop.GPT(), upstream_loop.GPT()
    watcher = Watcher(model, checkpoint="models", **watch(tmp_path))
    for step in range(6):
        watcher.step(step)
        new(*upstream_loop.batch(step, 0, 0, 4))
    assert capsys.readouterr().err.count("nothing was heard in the last 3 steps") == 1
    watcher.attach(new)
    new(*upstream_loop.batch(6, 0, 0, 4))
    watcher.step(7)
    assert watcher.batches == 2
    watcher.attach(upstream_loop.GPT(width=64))
    assert "the new model has the width 64, not 32" in capsys.readouterr().err
    assert not watcher.active
    watcher.step(8)


def test_a_model_that_was_compiled_before_is_reported_and_heard_when_it_is_compiled_anew(tmp_path, capsys):
    model = upstream_loop.GPT()
    compiled = torch.compile(model, backend="eager")
    compiled(*upstream_loop.batch(0, 0, 0, 4))
    watcher = Watcher(model, checkpoint="models", **watch(tmp_path))
    for step in range(5):
        watcher.step(step)
        compiled(*upstream_loop.batch(step, 0, 0, 4))
    assert "was compiled and ran before it was watched" in capsys.readouterr().err
    assert watcher.batches == 0
    torch._dynamo.reset()
    for step in range(5, 8):
        watcher.step(step)
        compiled(*upstream_loop.batch(step, 0, 0, 4))
    assert watcher.active
    assert watcher.batches == 4  # of two steps
    watcher.close()


def test_a_model_that_is_compiled_anew_under_the_watcher_is_heard_as_before(tmp_path, capsys):
    torch._dynamo.reset()
    model = upstream_loop.GPT()
    watcher = Watcher(model, checkpoint="models", **watch(tmp_path))
    compiled = torch.compile(model, backend="eager")
    for step in range(6):
        if step == 2:  # new code for the same model
            torch._dynamo.reset()
            compiled = torch.compile(model, dynamic=False, backend="aot_eager")
        watcher.step(step)
        compiled(*upstream_loop.batch(step, 0, 0, 8 if step >= 4 else 4))  # of another shape: compiled once more
    watcher.step(6)
    assert watcher.batches == 12  # two of every step
    assert "nothing was heard" not in capsys.readouterr().err
    watcher.close()
    torch._dynamo.reset()


def test_activations_that_are_not_finite_are_left_out(tmp_path, capsys):
    model = upstream_loop.GPT()
    watcher = Watcher(model, checkpoint="models", **watch(tmp_path))
    model(*upstream_loop.batch(0, 0, 0, 4))
    watcher.step(1)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_proj.weight[0, 0] = float("nan")
    model(*upstream_loop.batch(1, 0, 0, 4))
    watcher.step(2)
    assert "not finite: they are left out" in capsys.readouterr().err
    assert watcher.active
    assert watcher.batches == 2
    watcher.close()


def test_an_error_ends_the_watching_and_not_the_training(tmp_path, unwatched, capsys):
    def fail(step: int, model: nn.Module) -> None:
        if step == 5:
            (tmp_path / "run" / "checkpoints" / "8").write_text("in the way")

    result = upstream_loop.train(tmp_path, STEPS, watch(tmp_path), on_step=fail)
    assert result["losses"] == unwatched
    assert not result["watcher"].active
    errors = capsys.readouterr().err
    assert "watching ended at step 8, and the training goes on" in errors
    assert "What was saved before" in errors
    assert Run(tmp_path / "run").evaluation


def test_saes_that_are_too_slow_for_their_share_wait(tmp_path, capsys):
    model = upstream_loop.GPT()
    watcher = Watcher(model, checkpoint="models", **watch(tmp_path, share=1e-6))
    for step in range(25):
        watcher.step(step)
        model(*upstream_loop.batch(step, 0, 0, 4))
    assert "pays for one in" in capsys.readouterr().err
    assert watcher.budget.skipped > 20
    watcher.close()


def test_a_process_that_dies_ends_the_watching_only(tmp_path, capsys):
    model = upstream_loop.GPT()
    watcher = Watcher(model, checkpoint="models", **watch(tmp_path, place="sidecar"))
    watcher.step(0)
    model(*upstream_loop.batch(0, 0, 0, 4))
    os.kill(watcher._learner._process.pid, signal.SIGKILL)
    watcher._learner._process.wait()
    for step in range(1, 4):
        watcher.step(step)
        model(*upstream_loop.batch(step, 0, 0, 4))
        time.sleep(0.1)
    assert not watcher.active
    assert "the process beside the training has ended" in capsys.readouterr().err


def test_a_process_that_cannot_start_says_why(watched):
    with pytest.raises(ConfigError, match=r"cannot watch: .*already holds another run"):
        Watcher(upstream_loop.GPT(), checkpoint="models", **watch(watched["folder"], place="sidecar"))


# ---- the command --------------------------------------------------------------------------------------------------


def test_pretraining_is_watched_stopped_and_resumed(tmp_path, monkeypatch):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i}.txt").write_text(f"{i}: " + "the lamp, the boat, the pier; " * 12)
    settings = TINY | {
        **{"data": f"{folder}/*.txt", "vocab_size": 265, "watch_layer": ("1",), "watch_k": 4, "watch_tokens": 64},
        **{"watch_share": 1e6, "watch_expansion_factor": 2},
    }
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert pretrain.main(pretrain.PretrainConfig(out=str(whole), steps=12, **settings)) == 0

    class Stopping:
        """Asks twice a step: a request after step 4."""

        asked = 0

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def __bool__(self):
            self.asked += 1
            return self.asked > 8

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "stop_requests", Stopping)
        assert pretrain.main(pretrain.PretrainConfig(out=str(parts), steps=12, **settings)) == pretrain.STOPPED
    assert pretrain.main(pretrain.PretrainConfig(out=str(parts), steps=12, resume=True, **settings)) == 0
    for name in ("whole", "parts"):
        (sae,) = load_saes(f"{tmp_path / name}-watch").values()
        assert sae.metadata["model_step"] == 12
    first, second = (load_file(f"{p}-watch/sae/{HOOK}/sae_weights.safetensors") for p in (whole, parts))
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)


def test_flags_of_watching_need_a_layer_that_exists():
    with pytest.raises(ConfigError, match="--watch_k means nothing without --watch_layer"):
        pretrain.PretrainConfig(watch_k=8)
    with pytest.raises(ConfigError, match="--watch_layer=9: the model has layers 0 to 5"):
        pretrain.PretrainConfig(watch_layer=("9",))
