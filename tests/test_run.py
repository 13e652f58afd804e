"""A run as a Python user opens it: one that was trained, explored and evaluated with the real parts."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from bridge import formats
from bridge.evaluate.evaluation import Extent as Measured
from bridge.evaluate.evaluation import evaluate
from bridge.exploration import Extent, explore, of_run
from bridge.neuronpedia.sources import Wanted
from bridge.neuronpedia.sources import of_run as sources_of
from bridge.run import Run, directory
from bridge.run.model import ModelPath
from bridge.runtime import InterpretableModel
from bridge.training.config import RunConfig
from experiments import train
from jsae import files
from jsae.records.store import StoreError
from jsae.settings import ConfigError

HOOK = "blocks.2.hook_resid_post"
SMALL = Extent(num_tokens=4000, context_length=64)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """A run on the demo: trained, with records and an evaluation."""
    text = tmp_path_factory.mktemp("text")
    for path in sorted(Path(json.__file__).parent.glob("*.py")):
        shutil.copy(path, text)
    run = Run(tmp_path_factory.mktemp("runs") / "small")
    config = RunConfig(
        output_dir=str(run.path),
        data=f"{text}/*.py",
        num_activations=4000,
        batch_size=500,
        block_size=2000,
        context_size=64,
        checkpoint_every=4000,
        heldout_tokens=500,
        expansion_factor=1,
        learning_rate=(1e-2,),
        k=(4,),
    )
    assert train.main(config) == 0
    explore(of_run(run), SMALL)
    ((subject, results),) = evaluate(of_run(run), Measured("all", heldout_tokens=1000, probes=False))
    run.write_evaluation({subject.hook: results})
    return run


@pytest.fixture
def copy(run, tmp_path) -> Run:
    return Run(shutil.copytree(run.path, tmp_path / "copy"))


def test_everything_of_a_run_is_at_hand(run):
    nano, sae, store = run.model(), run.sae(HOOK), run.records(HOOK)
    assert nano.fingerprint == run.facts["model"]
    assert nano.tokenizer.decode(nano.tokenizer.encode("def")) == "def"
    assert run.flags["checkpoint"] == "demo"
    assert "torch" in run.versions
    assert (sae.d_in, sae.d_sae) == (nano.config.n_embd, store.header.d_sae)
    assert list(run.exports) == run.recorded_hooks == list(run.labels) == list(run.evaluation) == [HOOK]
    assert 0 < run.evaluation[HOOK]["fvu"] < 2
    labelled = [latent for latent in run.labels[HOOK] if run.labels[HOOK].label(latent)]
    assert len(labelled) > 10
    assert run.variants == []
    assert run.notes == []


def test_what_is_the_only_one_needs_no_name(run):
    assert torch.equal(run.sae().W_dec, run.sae(HOOK).W_dec)
    assert np.array_equal(run.records()["max"], run.records(HOOK)["max"])


def test_model_and_saes_fit_each_other(run):
    im = InterpretableModel.from_nanochat(run.model(), run.saes())
    with im.interpretation_enabled():
        im(torch.tensor([[1, 2, 3]]))
    assert im.get_active_features(HOOK).indices.shape[:2] == (1, 3)


def test_a_label_that_a_person_gave_is_read_at_once(copy):
    from bridge.run import labels

    labels.append(copy.path, HOOK, 3, "mine")
    assert copy.labels[HOOK].label(3) == "mine"
    assert [line["label"] for line in copy.notes] == ["mine"]


def test_records_are_those_of_the_sae_at_hand(copy):
    weights = copy.sae_folder(HOOK) / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(StoreError, match="trained again or its settings changed since"):
        copy.records(HOOK)


def test_records_that_fit_are_kept_and_others_gathered_again(copy, capsys):
    def said(extent: Extent) -> str:
        capsys.readouterr()
        explore(of_run(copy), extent)
        return capsys.readouterr().err.splitlines()[0]

    assert "fit" in said(SMALL)
    assert "num_tokens was 4000" in said(Extent(num_tokens=2000, context_length=64))
    assert copy.records(HOOK).texts.header.rows * 64 <= 2000


def test_formats_are_written_from_python(copy):
    sources = sources_of(copy.path, Wanted("toy", "toy-res"))
    written = list(formats.write(copy, sources, ("sae_lens", "neuronpedia", "delphi")))
    assert [w.format for w in written] == ["sae_lens", "neuronpedia", "delphi"]
    assert all(file.is_relative_to(copy.neuronpedia_folder) for w in written for file in w.files)
    assert str(written[1]).startswith("neuronpedia     ")
    assert "MiB" in str(written[1])


def test_what_is_missing_is_named_with_the_command_that_makes_it(copy, tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"no exported SAE of blocks\.9.*there are {HOOK}"):
        copy.sae("blocks.9.hook_mlp_out")
    with pytest.raises(KeyError, match=f"there are {HOOK}"):
        copy.labels["blocks.9.hook_mlp_out"]
    shutil.rmtree(copy.records_folder)
    with pytest.raises(FileNotFoundError, match=r"experiments\.explore"):
        copy.records()
    with pytest.raises(FileNotFoundError, match=r"experiments\.explore"):
        copy.records(HOOK)
    copy.table_file("eval").unlink()
    with pytest.raises(FileNotFoundError, match=r"experiments\.evaluate"):
        copy.evaluation  # noqa: B018
    with pytest.raises(ConfigError, match=r"is not a run: it has no config\.json"):
        Run(tmp_path / "nowhere").model()
    with pytest.raises(FileNotFoundError, match=r"experiments\.train"):
        Run(tmp_path / "nowhere").sae()


def test_a_broken_evaluation_is_named(copy):
    copy.table_file("eval").write_text('{"half')
    with pytest.raises(ValueError, match=r"eval\.json is broken"):
        copy.evaluation  # noqa: B018


def test_variants_of_a_sweep_are_runs_of_their_own(run, tmp_path):
    sweep = Run(tmp_path / "sweep")
    for name in ("k4", "k8"):
        shutil.copytree(run.path, sweep.path / name)
    assert [variant.path.name for variant in sweep.variants] == ["k4", "k8"]
    assert all(variant.sae().d_sae == run.sae().d_sae for variant in sweep.variants)
    for read in (lambda: sweep.exports, sweep.saes, sweep.sae, lambda: sweep.labels):
        with pytest.raises(FileNotFoundError, match=r"is a sweep.*there are k4, k8"):
            read()


def test_the_run_around_a_folder_is_found_also_through_links(copy, tmp_path):
    export = copy.sae_folder(HOOK)
    assert directory.enclosing(copy.path) == copy.path
    assert directory.enclosing(export) == copy.path
    (tmp_path / "link").symlink_to(export)
    assert directory.enclosing(tmp_path / "link") == copy.path
    assert directory.enclosing(tmp_path) is None


def test_who_holds_a_run_and_who_cannot(copy, monkeypatch):
    lock = copy.path / files.LOCK
    with copy.held():
        assert lock.is_file()
    assert not lock.exists()
    monkeypatch.setattr(directory, "is_writable", lambda folder: False)
    with copy.held():
        assert not lock.exists()


def test_a_run_is_a_path_for_whoever_takes_one(run):
    assert Path(run) == run.path
    assert str(run.path) in repr(run)


def test_a_checkpoint_that_is_given_leaves_out_what_belongs_to_another():
    recorded = {"checkpoint": "old", "step": 5, "tokenizer": "old/tokenizer"}
    assert ModelPath.resolve({}, recorded) == ModelPath("old", 5, "old/tokenizer")
    assert ModelPath.resolve({"step": 7}, recorded) == ModelPath("old", 7, "old/tokenizer")
    assert ModelPath.resolve({"checkpoint": "new", "step": None}, recorded) == ModelPath("new")
    with pytest.raises(ConfigError, match="--checkpoint"):
        ModelPath.resolve({}, {})
