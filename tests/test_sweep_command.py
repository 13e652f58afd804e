"""Many SAEs, transcoders and crosscoders as a user trains them on the packaged nanochat, and what reads them then."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import python_text
import sae_lens
import torch
from safetensors.numpy import load_file

import bridge.nanochat
from bridge import torch_sae
from bridge.hooks import capture
from bridge.training.config import RunConfig
from experiments import evaluate, explore, steer, train
from experiments.evaluate import EvaluateConfig
from experiments.explore import ExploreConfig
from experiments.export import ExportConfig
from experiments.export import main as export_main
from experiments.steer import SteerConfig
from jsae.records.store import Store, digest

ROOT = Path(__file__).resolve().parents[1]
HOOKS = ("blocks.1.hook_resid_post", "blocks.2.hook_resid_post")
SMALL = {
    "num_activations": 8_000,
    "batch_size": 500,
    "block_size": 2_000,
    "context_size": 64,
    "checkpoint_every": 2_000,
    "log_every": 4,
    "heldout_tokens": 2_000,
    "expansion_factor": 1,
    "learning_rate": 2e-3,
    "dead_after": 2_000,
}
LONGER = {"num_activations": 40_000, "batch_size": 200, "learning_rate": (4e-3,), "checkpoint_every": 40_000}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    """Some thirty files of Python."""
    return python_text.copied(tmp_path_factory.mktemp("text"), 60)


def command(run: Path, text: str, **flags: object) -> list[str]:
    told = {**SMALL, "data": text, "output_dir": run, **flags}
    words = [f"--{name}" if value is True else f"--{name}={value}" for name, value in told.items()]
    return [sys.executable, "-m", "experiments.train", *words]


def process(run: Path, text: str, **flags: object) -> subprocess.CompletedProcess[str]:
    line = command(run, text, **flags)
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def trained(run: Path, text: str, **flags: object) -> Path:
    """The same without a process of its own, with the shapes of everything checked."""
    told = {**SMALL, "learning_rate": (2e-3,), "data": text, "output_dir": str(run), **flags}
    assert train.main(RunConfig(**told)) == 0
    return run


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "sae_weights.safetensors")


def lines(run: Path) -> list[dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith("per_second")} for line in found]


def measured(run: Path) -> dict[str, dict]:
    return json.loads((run / "eval.json").read_text())


def activations(*hooks: str) -> list[torch.Tensor]:
    """Of a text that no run saw, without BOS."""
    nano = bridge.nanochat.load("demo")
    ids = nano.tokenizer.encode(Path(json.__file__).read_text(), prepend_bos=True)[:256]
    with torch.no_grad(), capture(nano.model, list(hooks), stop=True) as acts:
        nano.model(torch.tensor([ids]))
    return [acts[hook][0, 1:] for hook in hooks]


# ---- a sweep -------------------------------------------------------------------------------------------------------

SWEEP = {"layer": "1,2", "k": "8,16"}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory, text) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Two values of k at two layers in one pass."""
    run = tmp_path_factory.mktemp("runs") / "sweep"
    return run, process(run, text, **SWEEP)


def test_a_sweep_leaves_a_run_for_every_variant(sweep):
    run, done = sweep
    assert done.returncode == 0, done.stderr
    assert {p.name for p in run.iterdir()} == {"checkpoints", "config.json", "tb", "k8", "k16"}
    for k in (8, 16):
        variant = run / f"k{k}"
        assert {p.name for p in variant.iterdir()} == {"config.json", "eval.json", "metrics.jsonl", "sae"}
        record = json.loads((variant / "config.json").read_text())
        assert (record["flags"]["k"], record["flags"]["layer"]) == ([k], ["1", "2"])
        found = measured(variant)
        assert set(found) == {p.name for p in (variant / "sae").iterdir()} == set(HOOKS)
        for hook, summary in found.items():
            assert 0 < summary["fvu"] < 0.9
            assert k / 2 < summary["l0"] <= k
            assert torch_sae.load(variant / "sae" / hook).cfg["k"] == k
            assert sae_lens.SAE.load_from_disk(str(variant / "sae" / hook)).cfg.metadata.hook_name == hook
            assert f"{summary['fvu']:.4f}" in done.stdout
            assert f"k{k} {hook}" in done.stdout
        reports = lines(variant)
        assert [(r["step"], r["hook"]) for r in reports] == [(s, hook) for s in (4, 8, 12, 16) for hook in HOOKS]
        assert reports[-1]["l0"] <= k
    assert measured(run / "k16")[HOOKS[0]]["fvu"] < measured(run / "k8")[HOOKS[0]]["fvu"]


def test_what_is_measured_after_training_has_its_standard_names(sweep):
    summary = measured(sweep[0] / "k8")[HOOKS[0]]
    assert set(summary) == {
        "tokens",
        "fvu",
        "explained_variance",
        "explained_variance_legacy",
        "mse",
        "l0",
        "l1",
        "cosine",
        "l2_ratio",
        "relative_reconstruction_bias",
        "dead_fraction",
        "density_histogram",
    }
    histogram = summary["density_histogram"]
    assert sum(histogram["counts"]) + histogram["never"] == 128
    assert summary["dead_fraction"] == pytest.approx(histogram["never"] / 128)
    assert 1800 < summary["tokens"] < 2000


def test_each_sae_of_the_sweep_is_the_one_that_is_trained_alone(sweep, text, tmp_path):
    alone = trained(tmp_path / "alone", text, layer=("2",), k=(16,))
    expected, found = weights(alone / "sae" / HOOKS[1]), weights(sweep[0] / "k16" / "sae" / HOOKS[1])
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5 * np.abs(value).max(), err_msg=name)
    assert measured(alone)[HOOKS[1]]["fvu"] == pytest.approx(measured(sweep[0] / "k16")[HOOKS[1]]["fvu"], rel=1e-5)
    mine = [line for line in lines(sweep[0] / "k16") if line["hook"] == HOOKS[1]]
    for ours, theirs in zip(lines(alone), mine, strict=True):
        assert ours.pop("hook") == theirs.pop("hook")
        densities, others = ours.pop("density_histogram"), theirs.pop("density_histogram")
        assert densities["log10_edges"] == others["log10_edges"]
        assert np.abs(np.subtract(densities["counts"], others["counts"])).sum() <= 4, (
            "a token may fall on the other side"
        )
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_sweep_that_was_killed_resumes_to_the_same_bits(sweep, text, tmp_path):
    run = tmp_path / "killed"
    with subprocess.Popen(
        command(run, text, **SWEEP), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as p:
        until = time.monotonic() + 200
        while not any(run.glob("checkpoints/[0-9]*/_CHECKPOINT_METADATA")):
            assert p.poll() is None, p.stderr.read()
            assert time.monotonic() < until
            time.sleep(0.01)
        p.send_signal(signal.SIGKILL)
    assert not (run / "k8" / "sae").exists()
    done = process(run, text, **SWEEP, resume=True)
    assert done.returncode == 0, done.stderr
    for variant in ("k8", "k16"):
        for hook in HOOKS:
            for name, value in weights(sweep[0] / variant / "sae" / hook).items():
                np.testing.assert_array_equal(weights(run / variant / "sae" / hook)[name], value, err_msg=name)
        assert lines(run / variant) == lines(sweep[0] / variant)
        assert measured(run / variant) == measured(sweep[0] / variant)


def test_a_variant_is_a_run_to_measure_and_to_explore(sweep, tmp_path):
    run = shutil.copytree(sweep[0] / "k8", tmp_path / "k8")
    small = {"heldout_tokens": 1000, "probes": False, "plots": False}
    assert evaluate.main(EvaluateConfig(run_dir=str(run), hook=HOOKS[0], **small)) == 0
    found = measured(run)[HOOKS[0]]
    assert found["model_performance_preservation"]["ce_loss_score"] < 1
    assert found["setting"]["context_size"] == 64
    assert explore.main(ExploreConfig(run_dir=str(run), num_tokens=4000, keep_activations=False)) == 0
    assert (run / "explorer" / "index.html").is_file()
    assert Store(run / "explorer" / "records" / HOOKS[1], digest(run / "sae" / HOOKS[1])).header.d_sae == 128


READERS = {
    "evaluate": lambda run: evaluate.main(EvaluateConfig(run_dir=run, probes=False, plots=False)),
    "explore": lambda run: explore.main(ExploreConfig(run_dir=run)),
    "steer": lambda run: steer.main(SteerConfig(run_dir=run, feature=(1,), strength=(1.0,), prompt="x")),
    "export": lambda run: export_main(ExportConfig(run_dir=run)),
}


@pytest.mark.parametrize("reader", READERS)
def test_the_folder_of_the_whole_sweep_is_refused_with_the_variants_there_are(reader, sweep):
    with pytest.raises(FileNotFoundError, match=r"sweep is a sweep.* give one of them, .*there are k16, k8$"):
        READERS[reader](str(sweep[0]))
    assert not (sweep[0] / "explorer").exists()


# ---- transcoders ---------------------------------------------------------------------------------------------------

READ, MADE = "blocks.4.ln2.hook_normalized", "blocks.4.hook_mlp_out"


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "skip"])
def transcoder(request, tmp_path_factory, text) -> Path:
    run = tmp_path_factory.mktemp("runs") / "transcoder"
    flags = {"activation": "relu", "l1_coefficient": (0.5,), "layer": ("4",), "hook_type": "mlp_in"}
    return trained(run, text, target_hook="mlp", skip=request.param, **flags, **LONGER)


def test_a_transcoder_makes_of_what_the_mlp_reads_what_it_gives(transcoder):
    folder = transcoder / "sae" / READ
    ours, lens = torch_sae.load(folder), sae_lens.SAE.load_from_disk(str(folder))
    kind = "skip_transcoder" if "W_skip" in weights(folder) else "transcoder"
    assert (lens.cfg.architecture(), ours.architecture, ours.d_out) == (kind, kind, 128)
    told = lens.cfg.metadata
    assert (told.hook_name, told.hook_name_out) == (READ, MADE)
    assert (told.hf_hook_name, told.hf_hook_name_out) == ("transformer.h.4.mlp",) * 2
    x, y = activations(READ, MADE)
    with torch.no_grad():
        y_hat = ours(x)
        torch.testing.assert_close(lens(x), y_hat, rtol=1e-4, atol=1e-4)
    fvu = float((y - y_hat).square().sum() / (y - y.mean(0)).square().sum())
    assert fvu < 0.6
    assert measured(transcoder)[READ]["fvu"] == pytest.approx(fvu, abs=0.2)


@pytest.mark.parametrize("reader", ["evaluate", "steer"])
def test_commands_for_saes_say_of_a_transcoder_that_it_is_none(reader, transcoder):
    with pytest.raises(ValueError, match=f"is a transcoder, which predicts {MADE} from its input"):
        READERS[reader](str(transcoder))


def test_the_skip_path_helps(text, tmp_path):
    """It is the whole output if all latents are silent."""
    flags = {"activation": "relu", "l1_coefficient": (1000.0,), "layer": ("4",), "hook_type": "mlp_in"}
    run = trained(tmp_path / "run", text, target_hook="mlp", skip=True, **flags, **LONGER)
    assert measured(run)[READ]["l0"] < 1
    assert measured(run)[READ]["fvu"] < 0.5


# ---- crosscoders ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def crosscoder(tmp_path_factory, text) -> Path:
    run = tmp_path_factory.mktemp("runs") / "crosscoder"
    done = process(run, text, layer="1,2,3", crosscoder=True, activation="batchtopk", k=16)
    assert done.returncode == 0, done.stderr
    assert "sae_lens" not in done.stdout  # which has no form of it
    return run


def test_a_crosscoder_makes_all_its_layers_of_one_code(crosscoder):
    name = "blocks.1-2-3.hook_resid_post"
    (folder,) = (crosscoder / "sae").iterdir()
    assert folder.name == name
    hooks = [f"blocks.{layer}.hook_resid_post" for layer in (1, 2, 3)]
    sae = torch_sae.load(folder)
    assert (sae.layers, sae.d_in, sae.d_sae, sae.architecture) == (3, 384, 128, "jumprelu")
    assert sae.metadata["hook_names"] == hooks
    x = torch.cat(activations(*hooks), dim=1)
    with torch.no_grad():
        x_hat = sae(x)
    for part, made in zip(x.chunk(3, dim=1), x_hat.chunk(3, dim=1), strict=True):  # no layer is left out for another
        assert (part - made).square().sum() < 0.85 * (part - part.mean(0)).square().sum()
    summary = measured(crosscoder)[name]
    assert 0 < summary["fvu"] < 0.7
    assert 4 < summary["l0"] < 32
    assert weights(folder)["W_dec"].shape == (128, 3, 128)


@pytest.mark.parametrize("reader", ["evaluate", "steer"])
def test_commands_for_saes_say_of_a_crosscoder_that_it_is_none(reader, crosscoder):
    with pytest.raises(ValueError, match="is a crosscoder, which reconstructs 3 layers from one code"):
        READERS[reader](str(crosscoder))


# ---- other architectures, from flags to files ----------------------------------------------------------------------


def test_every_layer_of_the_model_gets_its_sae_with_l0_led_to_its_target(text, tmp_path):
    run = trained(tmp_path / "run", text, activation="jumprelu", target_l0=(12.0,), layer=("all",), **LONGER)
    found = measured(run)
    assert list(found) == [f"blocks.{layer}.hook_resid_post" for layer in range(6)]
    for hook, summary in found.items():
        assert torch_sae.load(run / "sae" / hook).architecture == "jumprelu"
        assert summary["fvu"] < 0.8
    last = [line for line in lines(run) if line["step"] == 200]
    assert [line["l0"] for line in last] == pytest.approx([12] * 6, rel=0.1)


def test_a_matryoshka_sae_reconstructs_by_its_first_latents_alone(text, tmp_path):
    flags = {"activation": "matryoshka", "k": (16,), "nested_widths": (32, 64), "k_start": 48}
    run = trained(tmp_path / "run", text, **flags, **LONGER)
    sae = torch_sae.load(run / "sae" / HOOKS[1])
    assert sae.architecture == "jumprelu"
    assert sae.metadata["training_architecture"] == "matryoshka"
    (x,) = activations(HOOKS[1])
    latents = sae.encode(x)
    errors = []
    for width in (32, 64, 128):
        x_hat = latents[:, :width] @ sae.W_dec[:width] + sae.b_dec
        errors.append(float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.9


def test_signed_latents_go_all_the_way_to_measurement_records_and_steering(text, tmp_path, capsys):
    run = trained(tmp_path / "run", text, activation="abstopk", k=(8,))
    sae = torch_sae.load(run / "sae" / HOOKS[1])
    (x,) = activations(HOOKS[1])
    latents = sae.encode(x)
    assert (latents < 0).any()
    assert ((latents != 0).sum(1) == 8).all()
    assert measured(run)[HOOKS[1]]["l0"] == pytest.approx(8)
    assert evaluate.main(EvaluateConfig(run_dir=str(run), heldout_tokens=1000, probes=False, plots=False)) == 0
    found = measured(run)[HOOKS[1]]
    assert found["l0"] == pytest.approx(8)
    assert found["labels"]["labelled"] > 0
    assert explore.main(ExploreConfig(run_dir=str(run), num_tokens=4000)) == 0
    store = Store(run / "explorer" / "records" / HOOKS[1], digest(run / "sae" / HOOKS[1]))
    assert (store["max"] >= 0).all()
    assert store["count"].sum() > 0
    index = int(store["count"].argmax())
    flags = {"feature": (index,), "mode": "scale", "strength": (2.0,), "prompt": "import os", "max_tokens": 4}
    assert steer.main(SteerConfig(run_dir=str(run), temperature=0.0, **flags)) == 0
    assert re.search(r"[1-9]\d* of \d+", capsys.readouterr().out)


# ---- an architecture of one's own ----------------------------------------------------------------------------------

OWN = """
import dataclasses
import jax
from jsae.architectures import SAE, SAEConfig

class Plain(SAE):
    form, sparse = "standard", False

    @dataclasses.dataclass(frozen=True)
    class Config(SAEConfig):
        l1_coefficient: float = 1.0

    @classmethod
    def initial_latents(cls, config):
        return {"b_enc": 0.0}

    def activate(self, x, context):
        return jax.nn.relu(self.pre_activations(x, context)), None

    def penalty(self, forward):
        return forward.context.strength * self.config.l1_coefficient * forward.latents.sum(-1).mean()

    def inference_arrays(self):
        return {"b_enc": self.b_enc[...]}
"""


def test_a_class_in_a_file_of_ones_own_is_trained_exported_and_resumed_by_its_name(text, tmp_path, monkeypatch):
    (tmp_path / "my_own_sae.py").write_text(OWN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    flags = {"activation": "my_own_sae:Plain", "l1_coefficient": "0.3,0.6"}
    done = process(tmp_path / "run", text, **flags)
    assert done.returncode == 0, done.stderr
    assert "2 my_own_sae:Plain SAEs" in done.stdout
    for variant in ("l1_0.3", "l1_0.6"):
        folder = tmp_path / "run" / variant / "sae" / HOOKS[1]
        assert torch_sae.load(folder).architecture == "standard"
        assert json.loads((folder / "cfg.json").read_text())["metadata"]["training_architecture"] == "my_own_sae:Plain"
        assert measured(tmp_path / "run" / variant)[HOOKS[1]]["fvu"] < 0.9
    done = process(tmp_path / "run", text, resume=True, **flags)
    assert done.returncode == 0, done.stderr
    done = process(tmp_path / "other", text, activation="my_own_sae:Plain", k=8)
    assert done.returncode == 2
    assert "--k means nothing to my_own_sae:Plain: leave it out" in done.stderr
    assert "Traceback" not in done.stderr


# ---- what is refused -----------------------------------------------------------------------------------------------

BAD = {
    "more latents active than there are": ({"k": "8,129"}, "k=129 active latents out of d_sae=128"),
    "a value twice": ({"k": "8,8"}, "--k=8,8 has a value twice"),
    "a sweep beyond the memory": ({"k": "8,16", "expansion_factor": 2_000_000}, "2 SAEs need about 3395.1 GiB"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_trained_is_refused_in_one_line_before_anything_starts(what, text, tmp_path):
    flags, complaint = BAD[what]
    done = process(tmp_path / "run", text, **flags)
    assert done.returncode in (1, 2)
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()
