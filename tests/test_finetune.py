"""Fine-tuning by the output of the model: its gradient, its steps, what it writes, and what is refused before."""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import python_text
import torch
from safetensors.numpy import load_file

import bridge.nanochat
from bridge import torch_sae
from bridge.evaluate.site import Site
from bridge.evaluate.splice import effects
from bridge.finetuning import FinetuneConfig, finetune
from bridge.finetuning import subject as subjects
from bridge.finetuning.spliced import SplicedModel
from bridge.nanochat.corpus import Corpus
from bridge.run import Run, directory
from bridge.run.subjects import Choice
from bridge.run.subjects import find as find_subjects
from bridge.training.config import RunConfig
from bridge.training.finish import UnusableError
from bridge.training.pipeline import train
from jsae import export
from jsae.architectures import make, sae_config
from jsae.settings import ConfigError

pytestmark = pytest.mark.usefixtures("quickly_compiled")
HOOK = "blocks.2.hook_resid_post"
TRANSCODER = ("blocks.3.ln2.hook_normalized", "blocks.3.hook_mlp_out")
SMALL = {
    "num_activations": 16_384,
    "batch_size": 512,
    "block_size": 8_192,
    "context_size": 64,
    "heldout_tokens": 2_048,
    "expansion_factor": 2,
}
TUNING = {"num_activations": 4_096, "batch_size": 256, "heldout_tokens": 2_048, "log_every": 8}


@pytest.fixture(scope="module")
def nano():
    return bridge.nanochat.load("demo")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return python_text.copied(tmp_path_factory.mktemp("text"), 40)


@pytest.fixture(scope="module")
def windows(nano, text) -> np.ndarray:
    """Three windows of 64 tokens; BOS first in each."""
    return Corpus(text, nano.tokenizer, row_len=64).next_rows(3)


@pytest.fixture(scope="module")
def run_of(tmp_path_factory, text):
    """Small runs by their flags, each trained once."""
    runs: dict[str, Path] = {}

    def trained(name: str, **flags) -> Path:
        if name not in runs:
            runs[name] = tmp_path_factory.mktemp("runs") / name
            with contextlib.suppress(UnusableError):  # so short a run of a transcoder; it is exported nevertheless
                train(RunConfig(data=text, output_dir=str(runs[name]), **SMALL, **flags))
        return runs[name]

    return trained


@pytest.fixture(scope="module")
def topk(run_of) -> Path:
    return run_of("topk", k=(8,))


def spliced(nano, hooks=(HOOK,), objective="kl", rows=3, drop_sinks=True) -> SplicedModel:
    excluded = (nano.tokenizer.bos_token_id,)
    return SplicedModel(nano.model, hooks, objective, excluded=excluded, drop_sinks=drop_sinks, rows_per_forward=rows)


def noisy(acts: torch.Tensor) -> torch.Tensor:
    """A reconstruction with an error of a fifth of the activations' size."""
    noise = torch.randn(acts.shape, generator=torch.Generator().manual_seed(0))
    return acts + 0.2 * acts.square().mean().sqrt() * noise


# ---- the gradient -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hooks", [(HOOK,), ("blocks.3.hook_attn_out",), TRANSCODER], ids=["resid", "attn", "mlp"])
@pytest.mark.parametrize("objective", ["kl", "ce"])
def test_the_gradient_is_that_of_finite_differences(nano, windows, hooks, objective):
    model = spliced(nano, hooks, objective)
    batch = model.read(windows)
    target = batch.acts[-1]
    y_hat = noisy(target)
    found = model.output(batch, y_hat, target, scale=0.5)
    weight = 0.25 * (y_hat - target).square().sum(1).mean() / found.divergence
    name = "divergence" if objective == "kl" else "cross_entropy"
    slope = found.gradient / found.gradient.norm()
    step = 0.02 * (y_hat - target).norm()
    ends = [getattr(model.output(batch, y_hat + sign * step * slope, target), name).double() for sign in (1, -1)]
    expected = weight * (ends[0] - ends[1]) / (2 * step)
    torch.testing.assert_close(found.gradient.norm().double(), expected.double(), rtol=0.02, atol=0)


def test_the_windows_may_be_read_in_several_passes(nano, windows):
    one, two = (spliced(nano, rows=rows) for rows in (3, 2))
    batches = one.read(windows), two.read(windows)
    assert [len(batch.passes) for batch in batches] == [1, 2]
    torch.testing.assert_close(batches[0].acts[0], batches[1].acts[0], rtol=1e-4, atol=1e-4)
    y_hat = noisy(batches[0].acts[0])
    outputs = [model.output(b, y_hat, b.acts[0]) for model, b in zip((one, two), batches, strict=True)]
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(a.abs().max()))


def test_rows_are_the_tokens_that_count_and_repetitions_have_no_gradient(nano, windows):
    model = spliced(nano, drop_sinks=False)
    batch = model.read(windows)
    counted = windows.size - int((windows == nano.tokenizer.bos_token_id).sum())
    assert batch.kept == [counted]
    assert len(batch.acts[0]) == windows.size > counted
    acts, repeated = batch.acts[0], windows.size - counted
    torch.testing.assert_close(acts[counted:], acts[:repeated], rtol=0, atol=0)
    gradient = model.output(batch, noisy(acts), acts).gradient
    assert not gradient[counted:].any()
    assert gradient[:counted].any()


def test_a_perfect_reconstruction_leaves_the_model_as_it_is(nano, windows):
    """Tokens that are left out keep their activations, otherwise the output would change."""
    model = spliced(nano, TRANSCODER)
    batch = model.read(windows)
    found = model.output(batch, batch.acts[1], batch.acts[1])
    assert float(found.divergence) < 1e-9
    assert torch.isfinite(found.gradient).all()


@pytest.mark.parametrize("kind", ["topk", "transcoder"])
def test_divergence_and_cross_entropy_are_those_of_the_evaluation(nano, windows, run_of, kind):
    run = run_of(kind, **KINDS.get(kind, {"k": (8,)}))
    hooks = TRANSCODER if kind == "transcoder" else (HOOK,)
    sae = torch_sae.load(run / "sae" / hooks[0])
    model = spliced(nano, hooks)
    batch = model.read(windows)
    found = model.output(batch, sae(batch.acts[0]), batch.acts[-1])
    site = Site(nano.model, hooks[0], (nano.tokenizer.bos_token_id,), other_hooks=hooks[1:])
    mean = np.zeros(sae.d_out, np.float32)
    effect = effects(site, sae, [windows], mean, nano.tokenizer.token_bytes)["with_sae"]
    assert float(found.divergence) == pytest.approx(effect.divergence, rel=1e-4)
    assert float(found.cross_entropy) == pytest.approx(effect.cross_entropy, rel=1e-5)


def test_windows_without_a_token_that_counts_are_refused(nano):
    bos = np.full((2, 16), nano.tokenizer.bos_token_id, np.int32)
    with pytest.raises(ValueError, match="none of the 32 tokens of a batch counts"):
        spliced(nano).read(bos)


# ---- the whole ----------------------------------------------------------------------------------------------------


def tuned(sae: Path, out: Path, **settings) -> dict:
    """Fine-tune, and return the metrics before and after."""
    with contextlib.suppress(UnusableError):
        finetune(FinetuneConfig(sae=str(sae), out=str(out), **TUNING | settings))
    (entry,) = Run(out).evaluation.values()
    return entry["finetuning"]


def test_by_kl_the_divergence_falls_further_than_by_squared_error_alone(topk, tmp_path, capsys):
    kl, mse = (
        tuned(topk, tmp_path / objective, objective=objective, learning_rate=1e-3) for objective in ("kl", "mse")
    )
    assert kl["before"] == mse["before"]
    assert kl["after"]["kl"] < 0.99 * min(kl["before"]["kl"], mse["after"]["kl"])
    assert kl["after"]["loss_recovered"] > max(kl["before"]["loss_recovered"], mse["after"]["loss_recovered"])
    assert kl["after"]["fvu"] < 1.1 * kl["before"]["fvu"]
    assert "fine-tunes" in capsys.readouterr().out


def test_the_cross_entropy_falls_too(topk, tmp_path):
    found = tuned(topk, tmp_path / "run", objective="ce", learning_rate=1e-3)
    assert found["after"]["ce"] < found["before"]["ce"]


def test_the_new_directory_is_a_run_with_its_own_metrics(topk, tmp_path, text):
    out = tmp_path / "run"
    found = tuned(topk, out)
    run = Run(out)
    assert run.flags["checkpoint"] == "demo"
    assert run.flags["data"] == text
    assert (run.flags["context_size"], run.flags["exclude_tokens"], run.flags["drop_sinks"]) == (64, "bos", True)
    assert 0 < run.facts["finetuning"]["rate"] < 0.01
    metadata = torch_sae.load(out / "sae" / HOOK).metadata
    assert metadata["finetuning"] == {"objective": "kl", "activations": 4096}
    assert metadata["training_tokens"] == SMALL["num_activations"] + 4096
    assert metadata["init_from"]["path"] == str(topk / "sae" / HOOK)
    lines = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 8, 16, 16]
    assert (lines[0]["heldout"], lines[-1]["heldout"]) == (found["before"], found["after"])
    assert {"kl", "ce", "fvu", "l0", "learning_rate"} <= lines[1].keys()
    assert lines[2]["learning_rate"] < lines[1]["learning_rate"]
    histogram = lines[1]["density_histogram"]
    assert sum(histogram["counts"]) + histogram["never"] == torch_sae.load(out / "sae" / HOOK).d_sae
    (subject,) = find_subjects(Choice((out,)))
    assert (subject.hook, subject.drop_sinks) == (HOOK, True)
    assert directory.enclosing(out / "sae" / HOOK) == out


def test_the_same_seed_gives_the_same_weights(topk, tmp_path):
    weights = []
    for number in range(2):
        tuned(topk, tmp_path / str(number), num_activations=512)
        weights.append(load_file(tmp_path / str(number) / "sae" / HOOK / "sae_weights.safetensors")["W_dec"])
    np.testing.assert_array_equal(*weights)


KINDS = {
    "batchtopk": {"activation": "batchtopk", "k": (8,)},
    "relu": {"activation": "relu", "target_l0": (12.0,)},
    "gated": {"activation": "gated", "target_l0": (12.0,)},
    "jumprelu": {"activation": "jumprelu", "target_l0": (12.0,)},
    "transcoder": {
        "activation": "batchtopk",
        "k": (8,),
        "layer": ("3",),
        "hook_type": "mlp_in",
        "target_hook": "mlp",
        "skip": True,
    },
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_sae_is_fine_tuned_and_keeps_its_l0(run_of, tmp_path, name):
    sae = run_of(name, **KINDS[name])
    found = tuned(sae, tmp_path / "run", learning_rate=5e-4)
    assert found["after"]["kl"] < found["before"]["kl"]
    # The threshold of a transcoder of 32 steps is re-estimated on batches of four windows.
    bound = 0.25 if name == "transcoder" else 0.15
    assert found["after"]["l0"] == pytest.approx(found["before"]["l0"], rel=bound)


@pytest.mark.parametrize("name", ["jumprelu", "transcoder"])
def test_with_a_rate_of_nothing_the_sae_comes_back(run_of, tmp_path, name):
    sae = run_of(name, **KINDS[name])
    tuned(sae, tmp_path / "run", learning_rate=1e-12, num_activations=512)
    (folder,) = (sae / "sae").iterdir()
    before, after = (
        load_file(path / "sae_weights.safetensors") for path in (folder, tmp_path / "run/sae" / folder.name)
    )
    for array, weight in before.items():
        # The threshold of BatchTopK is estimated anew: within a twentieth of the largest bias.
        estimated = name == "transcoder" and array == "threshold"
        limit = 0.05 * np.abs(before["b_enc"]).max() if estimated else 5e-6 * np.abs(weight).max()
        assert np.abs(after[array] - weight).max() < limit, array


# ---- refusals -----------------------------------------------------------------------------------------------------


def changed(topk: Path, to: Path, **metadata) -> str:
    """A copy of an export outside a run, with other metadata; None removes an entry."""
    shutil.copytree(topk / "sae" / HOOK, to)
    cfg = json.loads((to / "cfg.json").read_text())
    cfg["metadata"] = {k: v for k, v in (cfg["metadata"] | metadata).items() if v is not None}
    (to / "cfg.json").write_text(json.dumps(cfg))
    return str(to)


REFUSED = {
    "no run and no text": ({}, {"data": None}, "belongs to no run, which would record its text: give text with --data"),
    "no run and no model": ({}, {"checkpoint": None}, "no checkpoint is recorded: give it with --checkpoint"),
    "no hook": ({"hook_name": None}, {}, "does not name the activation that it reads: give it with --hook"),
    "a hook of nowhere": ({"hook_name": "blocks.1.attn.hook_z"}, {}, "no hook is called 'blocks.1.attn.hook_z'"),
    "another hook": ({}, {"hook": "blocks.1.hook_resid_post"}, "is an SAE of blocks.2.hook_resid_post, not of --hook"),
    "a layer too deep": ({"hook_name": "blocks.9.hook_resid_post"}, {}, "the model has 6 layers"),
    "tokens of its own": ({"exclude_special_tokens": [5, 7]}, {}, "without the tokens 5, 7.* give --exclude_tokens"),
    "a list of nonsense": ({"exclude_special_tokens": [-1]}, {}, "exclude_special_tokens is .-1.: expected true"),
    "less than a window": ({}, {"batch_size": 63}, "--batch_size=63 is less than one window of 64 tokens"),
    "another architecture": ({}, {"activation": "relu"}, "is a topk SAE, which relu.* cannot continue"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_in_one_line(topk, text, tmp_path, name):
    metadata, settings, message = REFUSED[name]
    sae = changed(topk, tmp_path / "sae", **metadata)
    given = {"checkpoint": "demo", "data": text, "context_size": 64} | TUNING | settings
    with pytest.raises(ValueError, match=message) as error:
        finetune(FinetuneConfig(sae=sae, out=str(tmp_path / "run"), **given))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "config.json").exists()


def test_an_sae_of_another_checkpoint_is_tuned_to_the_one_that_is_given(topk, text, tmp_path, capsys):
    sae = changed(topk, tmp_path / "sae", model_fingerprint="0" * 64)
    small = TUNING | {"num_activations": 256}
    finetune(sae=sae, out=str(tmp_path / "run"), checkpoint="demo", data=text, context_size=64, **small)
    assert "note: the SAE was trained on the checkpoint with sha256 000" in capsys.readouterr().out


def test_a_crosscoder_is_refused(tmp_path):
    config = sae_config("topk", 2 * 128, 64, k=4, layers=2)
    arrays = make(config, key=jax.random.key(0)).arrays()
    export.write(tmp_path / "sae", config, arrays, 1.0, 1.0, {"hook_name": HOOK})
    with pytest.raises(ConfigError, match="is a topk crosscoder of 2 layers: fine-tuning replaces one activation"):
        finetune(sae=str(tmp_path / "sae"), out=str(tmp_path / "run"))


def test_of_a_run_with_several_saes_one_is_chosen(topk, tmp_path):
    for layer in (1, 2):
        name = f"blocks.{layer}.hook_resid_post"
        changed(topk, tmp_path / "sae" / name, hook_name=name)
    run = str(tmp_path)
    with pytest.raises(ConfigError, match=r"has several SAEs: choose one with --hook, of blocks\.1.*, blocks\.2"):
        subjects.find(FinetuneConfig(sae=run, out="run"))
    chosen = subjects.find(FinetuneConfig(sae=run, hook=HOOK, out="run"))
    assert chosen.hooks == (HOOK,)
    with pytest.raises(ConfigError, match=r"has no SAE of --hook=blocks\.4"):
        subjects.find(FinetuneConfig(sae=run, hook="blocks.4.hook_resid_post", out="run"))


def test_a_directory_that_holds_something_is_refused(topk, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"already holds something \(note.txt\): choose another --out"):
        finetune(sae=str(topk), out=str(tmp_path))


def test_the_name_of_an_architecture_in_a_file_imports_no_module(topk, tmp_path, monkeypatch):
    (tmp_path / "planted.py").write_text("raise SystemExit('executed')")
    monkeypatch.syspath_prepend(tmp_path)
    sae = changed(topk, tmp_path / "sae", training_architecture="planted:SAE")
    config = FinetuneConfig(sae=sae, out="run", checkpoint="demo", data="stdlib")
    assert subjects.resolved(config, subjects.find(config)).activation == "topk"


def test_settings_that_are_missing_are_named():
    for settings, message in (
        ({"out": "run"}, "give --sae"),
        ({"sae": "x"}, "give --out"),
        ({"sae": "x", "out": "run", "num_activations": 100}, "less than one batch"),
    ):
        with pytest.raises(ConfigError, match=message):
            FinetuneConfig(**settings)


def test_a_run_that_is_tuned_gives_its_settings_and_flags_change_them(topk):
    config = FinetuneConfig(sae=str(topk), out="run", context_size=32, drop_sinks=False)
    found = subjects.resolved(config, subjects.find(config))
    assert (found.context_size, found.drop_sinks, found.checkpoint, found.activation) == (32, False, "demo", "topk")
    settings = subjects.run_config(found, subjects.find(config), bridge.nanochat.load("demo"))
    assert settings.dead_after == 64 * 32 > 0.015 * Run(topk).flags["num_activations"]
    assert settings.batch_size % 32 == 0
    assert (settings.warmup_fraction, settings.decay_fraction) == (0.0, 1.0)
    assert dataclasses.asdict(settings)["init_from"] == str(topk / "sae" / HOOK)


@pytest.mark.parametrize(
    ("recorded", "penalty"), [({}, "l1"), ({"sparsity_penalty": "log"}, "log")], ids=["old", "new"]
)
def test_a_relu_run_that_is_older_than_the_choice_of_a_penalty_goes_on_with_l1(topk, recorded, penalty):
    config = FinetuneConfig(sae=str(topk), out="run")
    subject = subjects.find(config)
    flags = {name: value for name, value in subject.recorded.items() if name != "sparsity_penalty"}
    subject = dataclasses.replace(subject, recorded=flags | {"activation": "relu", "l1_coefficient": [2.0]} | recorded)
    found = dataclasses.replace(subjects.resolved(config, subject), activation="relu")
    settings = subjects.run_config(found, subject, bridge.nanochat.load("demo"))
    assert (settings.l1_coefficient, settings.sparsity_penalty) == ((2.0,), penalty)
