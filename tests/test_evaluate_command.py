"""Evaluation as its user runs it: a real process on the packaged nanochat; what it writes, shows and refuses."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import core_bundle
import pytest
import sae_lens
from toy_saes import export, toy_sae

import bridge.nanochat
from experiments import evaluate, plots
from experiments.evaluate import EvaluateConfig
from jsae import extras
from jsae.settings import ConfigError

ROOT = Path(__file__).resolve().parents[1]
HOOKS = ("blocks.2.hook_mlp_out", "blocks.3.hook_resid_post")
SMALL = {"heldout_tokens": 3000, "probe_tokens": 20_000}
GROUPS = {
    "model_behavior_preservation",
    "model_performance_preservation",
    "bits_per_byte",
    "reconstruction_quality",
    "shrinkage",
    "sparsity",
    "token_stats",
    "misc_metrics",
    "latents",
    "density_histogram",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run on the demo with SAEs of two hooks, as training leaves it."""
    folder = tmp_path_factory.mktemp("runs") / "two"
    nano = bridge.nanochat.load("demo")
    for i, hook in enumerate(HOOKS):
        sae = toy_sae("topk", nano.config.n_embd, 64, i, hook_name=hook, model_fingerprint=nano.fingerprint)
        export(sae, folder / "sae" / hook)
    flags = {"checkpoint": "demo", "step": None, "tokenizer": None, "data": "stdlib", "drop_sinks": True}
    record = {"flags": flags | {"context_size": 64}, "facts": {}, "versions": {}}
    (folder / "config.json").write_text(json.dumps(record))
    lines = [{"step": step, "loss": 100 / step, "l0": 8.0} for step in (10, 20, 30)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4')
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    """A few files that are quick to read."""
    folder = tmp_path_factory.mktemp("text")
    for path in sorted(Path(json.__file__).parent.glob("*.py")):
        shutil.copy(path, folder)
    return f"{folder}/*.py"


def command(**flags: object) -> subprocess.CompletedProcess[str]:
    told = [f"--{name}" if value is True else f"--{name}={value}" for name, value in (SMALL | flags).items()]
    line = [sys.executable, "-W", "error", "-m", "experiments.evaluate", *told]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


def configured(**flags: object) -> EvaluateConfig:
    return EvaluateConfig(**(SMALL | {"split": "all", "probes": False, "labels": False, "plots": False} | flags))


def strict(path: Path) -> dict:
    """JSON that has no word for NaN."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{path} holds {word}")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def whole(run) -> subprocess.CompletedProcess[str]:
    """Everything there is, of the one hook."""
    (run / "eval.json").write_text(json.dumps({HOOKS[0]: {"fvu": 0.5}}))
    return command(run_dir=run, hook=HOOKS[1])


def test_a_run_is_measured_shown_and_written_down(whole, run):
    assert whole.returncode == 0, whole.stderr
    written = strict(run / "eval.json")
    assert written[HOOKS[0]] == {"fvu": 0.5}  # what was there of another hook stays
    entry = written[HOOKS[1]]
    assert GROUPS | {"sparse_probing", "tpp", "absorption", "labels", "setting"} <= entry.keys()
    assert {"fvu", "l0", "explained_variance", "dead_fraction"} <= entry.keys()
    losses = entry["model_performance_preservation"]
    assert losses["ce_loss_without_sae"] < losses["ce_loss_with_sae"]
    assert entry["bits_per_byte"]["without_sae"] > 0.5
    assert entry["setting"]["data"] == "stdlib"
    assert entry["setting"]["context_size"] == 64
    assert entry["token_stats"]["total_tokens_eval_reconstruction"] == 46 * 64
    assert entry["sparse_probing"]["package"]["examples"] > 100
    assert f"{losses['ce_loss_score']:.4f}" in whole.stdout
    assert "blocks.3.hook_resid_post" in whole.stdout
    assert "written to" in whole.stdout


def test_every_latent_is_described_and_labelled(whole, run):
    columns = strict(run / "latents.json")[HOOKS[1]]
    assert all(len(values) == 64 for values in columns.values())
    labels = strict(run / "labels.json")[HOOKS[1]]
    assert set(labels) == {str(i) for i in range(64)}
    assert {"label", "f1", "precision", "recall", "n"} <= labels["0"].keys()
    assert sum(label["label"] is not None for label in labels.values()) > 32


def test_plots_are_pictures(whole, run):
    for name in (f"density_{HOOKS[1]}.png", "training.png"):
        assert (run / "plots" / name).read_bytes().startswith(b"\x89PNG")
    curves = plots._curves(plots._reports(run / "metrics.jsonl"))
    assert [(name, list(by_hook.values())) for name, by_hook in curves.items()] == [
        ("loss", [([10, 20, 30], [10.0, 5.0, 100 / 30])]),
        ("l0", [([10, 20, 30], [8.0, 8.0, 8.0])]),
    ]


def test_two_are_shown_side_by_side_and_nothing_is_written(run, text, tmp_path, capsys):
    other = shutil.copytree(run, tmp_path / "other", ignore=shutil.ignore_patterns("eval.json", "labels.json", "plots"))
    before = sorted(other.rglob("*"))
    config = configured(compare=(str(run / "sae" / HOOKS[1]), str(other)), hook=HOOKS[1], data=text)
    assert evaluate.main(config) == 0
    out = capsys.readouterr().out
    (scores,) = (line for line in out.splitlines() if "CE loss score" in line)
    first, second = (cell.strip() for cell in scores.split("│")[2:4])
    assert first == second
    assert float(first) < 1
    (shared,) = (line for line in out.splitlines() if "matched one to one" in line)
    assert shared.startswith(f"{HOOKS[1]}: of ")
    assert "100.0% above a cosine of 0.7, 100.0% above a cosine of 0.9; mean 1.000" in shared
    assert sorted(other.rglob("*")) == before


def test_any_saelens_directory_is_measured_on_the_run_and_written_beside_it(run, text, tmp_path, capsys):
    other = tmp_path / "theirs"
    width = bridge.nanochat.load("demo").config.n_embd
    sae_lens.JumpReLUSAE(sae_lens.JumpReLUSAEConfig(d_in=width, d_sae=32)).save_model(str(other))
    assert evaluate.main(configured(run_dir=str(run), sae=str(other), hook=HOOKS[1], data=text, labels=True)) == 0
    assert strict(other / "eval.json")[HOOKS[1]]["latents"]["d_sae"] == 32
    assert len(strict(other / "labels.json")[HOOKS[1]]) == 32
    elsewhere = tmp_path / "made" / "new"
    config = configured(
        checkpoint="demo", sae=str(other), hook=HOOKS[0], data=text, output_dir=str(elsewhere), plots=True
    )
    assert evaluate.main(config) == 0
    assert list(strict(elsewhere / "eval.json")) == [HOOKS[0]]
    assert [path.name for path in (elsewhere / "plots").iterdir()] == [f"density_{HOOKS[0]}.png"]


def test_steering_is_scored_with_its_cost_in_capability(run, text, tmp_path, capsys):
    flags = {"run_dir": str(run), "hook": HOOKS[1], "data": text, "labels": True, "output_dir": str(tmp_path / "out")}
    small = {"steering": True, "latents": (3, 5, 7), "steering_tokens": 128, "core_examples": 2}
    bundle = core_bundle.write(tmp_path)
    assert evaluate.main(configured(**flags, **small, core_bundle=str(bundle))) == 0
    out = capsys.readouterr().out
    scores = strict(tmp_path / "out" / "steering.json")[HOOKS[1]]
    assert list(scores["latents"]) == ["3", "5", "7"]
    assert set(scores["latents"]["5"]["directions"]) >= {"latent", "random"}
    assert scores["capability"]["latents"] == [3, 5, 7]
    assert scores["capability"]["examples"] == {"colours": 2, "schemata": 2, "words": 2}
    summary = strict(tmp_path / "out" / "eval.json")[HOOKS[1]]["steering"]
    assert summary == scores["summary"]
    median = summary["promoted"]["latent"]["median"]
    (row,) = (line for line in out.splitlines() if "tokens that it promotes, by latents" in line)
    assert f"{median:+.2f}" in row
    assert "lost at 4 x the greatest activation" in out
    assert "steering.json" in out


def test_without_a_bundle_a_line_says_so_and_the_rest_is_measured(run, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "nothing"))
    config = {"run_dir": str(run), "hook": HOOKS[1], "data": text, "output_dir": str(tmp_path / "out")}
    assert evaluate.main(configured(**config, steering=True, latents=(3,), steering_tokens=64)) == 0
    assert f"{tmp_path}/nothing/eval_bundle does not exist; --core_bundle names another" in capsys.readouterr().err
    assert "capability" not in strict(tmp_path / "out" / "steering.json")[HOOKS[1]]
    with pytest.raises(FileNotFoundError, match=r"has no core\.yaml"):
        evaluate.main(configured(**config, steering=True, core_bundle=str(tmp_path)))


def test_a_run_of_many_is_measured_hook_by_hook(run, text, tmp_path, capsys):
    run = shutil.copytree(run, tmp_path / "copy")
    assert evaluate.main(configured(run_dir=str(run), data=text)) == 0
    assert set(strict(run / "eval.json")) == set(HOOKS)
    out = capsys.readouterr().out
    assert all(hook in out for hook in HOOKS)


def refused(**flags: object) -> str:
    with pytest.raises((ConfigError, ValueError, OSError)) as error:
        evaluate.main(configured(**flags))
    return str(error.value)


def test_saes_that_do_not_fit_are_refused_by_what_exists(run, text, tmp_path):
    width = bridge.nanochat.load("demo").config.n_embd
    there = {"run_dir": str(run), "data": text}

    def put(name: str, d_in: int = width, **metadata: str) -> str:
        return str(export(toy_sae("topk", d_in, 16, **metadata), tmp_path / name))

    assert f"reads 7 channels, but this model has {width}" in refused(sae=put("a", 7, hook_name=HOOKS[1]), **there)
    assert "6 layers, 0 to 5" in refused(sae=put("b", hook_name="blocks.9.hook_mlp_out"), checkpoint="demo")
    other_layer = refused(sae=put("c", hook_name="blocks.1.hook_mlp_out"), **there)
    assert all(hook in other_layer for hook in HOOKS)
    other_model = refused(sae=put("d", hook_name=HOOKS[1], model_fingerprint="0123"), **there)
    assert "0123" in other_model
    assert bridge.nanochat.load("demo").fingerprint in other_model
    assert "does not say which activation" in refused(sae=put("e"), **there)
    assert HOOKS[1] in refused(sae=put("f", hook_name=HOOKS[1]), hook=HOOKS[0], **there)
    nowhere = refused(hook="blocks.0.hook_mlp_out", **there)
    assert all(hook in nowhere for hook in HOOKS)


def test_places_that_are_not_there_are_refused_by_what_is(run, text, tmp_path):
    assert "two" in refused(run_dir=str(run.parent / "missing"))
    (tmp_path / "empty").mkdir()
    assert "is not a run" in refused(run_dir=str(tmp_path / "empty"))
    unfinished = shutil.copytree(run, tmp_path / "unfinished", ignore=shutil.ignore_patterns("sae"))
    assert "config.json" in refused(run_dir=str(unfinished))
    lonely = str(export(toy_sae("topk", 128, 16, hook_name=HOOKS[1]), tmp_path / "lonely"))
    assert "--checkpoint" in refused(sae=lonely)
    assert "nowhere.txt" in refused(run_dir=str(run), data="nowhere.txt")
    assert "2 to" in refused(run_dir=str(run), data=text, context_size=1)
    (tmp_path / "short.txt").write_text("Too short.")
    assert "does not fill one row of 64 tokens" in refused(run_dir=str(run), data=str(tmp_path / "short.txt"))


def test_flags_that_contradict_each_other_are_refused():
    for flags, complaint in (
        ({}, "--run_dir, --sae or --compare"),
        ({"compare": ("a",)}, "two"),
        ({"compare": ("a", "b"), "sae": "c"}, "leave out --sae"),
        ({"run_dir": "a", "heldout_tokens": 0}, "heldout_tokens is 0"),
        ({"run_dir": "a", "latents": (3,)}, "add --steering"),
        ({"run_dir": "a", "core_bundle": "b"}, "add --steering"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            EvaluateConfig(**flags)


def test_missing_extras_are_reported_before_any_work(run, monkeypatch):
    found = evaluate.importlib.util.find_spec
    for missing, flag in (("sklearn", "--noprobes"), ("matplotlib", "--noplots")):
        monkeypatch.setattr(
            evaluate.importlib.util, "find_spec", lambda name, m=missing: None if name == m else found(name)
        )
        with pytest.raises(ImportError, match=re.escape(extras.advice("eval")) + f".*{flag}"):
            evaluate.main(EvaluateConfig(run_dir=str(run)))


def test_an_error_is_one_line(tmp_path):
    done = command(run_dir=tmp_path / "missing")
    assert done.returncode == 1
    assert "is not a directory" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_jax_is_loaded():
    check = (
        "import sys, bridge.evaluate.labels, bridge.evaluate.classes, experiments.evaluate, bridge.run.subjects,"
        "experiments.plots, experiments.evaluate_view, bridge.runtime; assert 'jax' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_run_that_is_not_there_is_named_before_packages_that_are_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(FileNotFoundError, match="nope is not a directory: give a run or an exported SAE"):
        evaluate.main(EvaluateConfig(run_dir=str(tmp_path / "nope")))
