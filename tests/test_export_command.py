"""The export command: every format of a run, and what it says where something is missing."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import explorer_toy as toy
import pytest
from neuronpedia_schema import hold
from sae_lens import SAE

from experiments import export
from experiments.export import ExportConfig
from experiments.train import RunConfig
from jsae.records.store import StoreError
from jsae.settings import ConfigError

ROOT = Path(__file__).resolve().parents[1]
EVERY = ("sae_lens", "neuronpedia", "saedashboard", "delphi", "circuit_tracer")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "toy"
    toy.write_store(folder)
    return folder


@pytest.fixture
def run(whole, tmp_path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(whole, tmp_path / "toy"))


def test_every_format_is_written_and_told(run, capsys):
    assert export.main(ExportConfig(run_dir=str(run), format=EVERY)) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in told] == list(EVERY)
    out = run / "neuronpedia"
    assert sorted(path.name for path in out.iterdir()) == ["circuit_tracer", "delphi", "sae_lens", "saedashboard", "v1"]
    for line in told:
        assert Path(line.split()[1]).is_relative_to(out)
        assert any(Path(line.split()[1]).iterdir())


def test_only_what_is_asked_for_is_written_where_it_is_asked_for(run, tmp_path):
    config = ExportConfig(
        run_dir=str(run), out=str(tmp_path / "out"), model_id="mine", source_set="me-res", release="r", layers=9
    )
    export.main(config)
    (folder,) = (tmp_path / "out").iterdir()
    assert folder.name == "v1"
    model = json.loads((folder / "mine" / "2-me-res" / "model.jsonl").read_text())
    assert (model["id"], model["layers"]) == ("mine", 9)
    assert not (run / "neuronpedia").exists()


def test_the_packaged_model_says_its_depth(run):
    export.main(ExportConfig(run_dir=str(run)))
    assert [path.name for path in (run / "neuronpedia" / "v1").iterdir()] == ["nanochat-d6-abababab"]


def test_saelens_reads_the_copy_and_finds_its_place_on_neuronpedia(run):
    export.main(ExportConfig(run_dir=str(run), format=("sae_lens",), model_id="mine", source_set="me-res"))
    sae = SAE.load_from_disk(run / "neuronpedia" / "sae_lens" / toy.HOOK, device="cpu")
    assert sae.cfg.metadata.neuronpedia_id == "mine/2-me-res"
    assert sae.cfg.d_sae == toy.D_SAE


def test_several_saes_of_a_run_share_a_set(run):
    toy.write_store(run, hook="blocks.4.hook_resid_post", seed=1)
    export.main(ExportConfig(run_dir=str(run)))
    (model,) = (run / "neuronpedia" / "v1").iterdir()
    names = sorted(path.name for path in model.iterdir())
    assert [name.split("-")[0] for name in names] == ["2", "4"]
    assert len({name.split("-", 1)[1] for name in names}) == 1
    export.main(ExportConfig(run_dir=str(run), hook="blocks.4.hook_resid_post", out=str(run / "one")))
    assert [path.name for path in (run / "one" / "v1" / model.name).iterdir()] == names[1:]


def test_two_saes_are_never_one_source(run):
    toy.write_store(run, hook="blocks.2.hook_mlp_out", seed=1)
    with pytest.raises(ConfigError, match=r"two SAEs of .* would be mine/2-me"):
        export.main(ExportConfig(run_dir=str(run), model_id="mine", source_set="me"))
    assert not (run / "neuronpedia").exists()


def test_a_run_without_an_export_is_told_what_to_run(run):
    shutil.rmtree(run / "sae")
    with pytest.raises(FileNotFoundError, match=r"no exported SAE: `python -m experiments.train"):
        export.main(ExportConfig(run_dir=str(run)))
    with pytest.raises(FileNotFoundError, match="is not a run"):
        export.main(ExportConfig(run_dir=str(run / "nowhere")))


def test_what_a_killed_training_left_beside_an_export_is_no_sae(run):
    shutil.copytree(run / "sae" / toy.HOOK, run / "sae" / f"{toy.HOOK}.unfinished")
    export.main(ExportConfig(run_dir=str(run), format=("sae_lens",)))
    assert [path.name for path in (run / "neuronpedia" / "sae_lens").iterdir()] == [toy.HOOK]


def test_a_run_without_records_is_told_what_to_run_and_still_gives_saelens(run):
    shutil.rmtree(run / "explorer")
    with pytest.raises(FileNotFoundError, match=r"experiments\.explore --run_dir"):
        export.main(ExportConfig(run_dir=str(run), format=("sae_lens", "delphi")))
    assert not (run / "neuronpedia").exists()
    export.main(ExportConfig(run_dir=str(run), format=("sae_lens",)))
    assert (run / "neuronpedia" / "sae_lens" / toy.HOOK / "cfg.json").is_file()


def test_records_of_another_sae_are_refused_before_anything_is_written(run):
    shutil.copytree(toy_of(run.parent / "other", seed=1) / "sae", run / "sae", dirs_exist_ok=True)
    with pytest.raises(StoreError, match="trained again or its settings changed since"):
        export.main(ExportConfig(run_dir=str(run), format=EVERY))
    assert not (run / "neuronpedia").exists()


def test_delphi_without_every_activation_is_refused_before_anything_is_written(run):
    shutil.rmtree(run / "explorer" / "records" / toy.HOOK / "all")
    with pytest.raises(FileNotFoundError, match=r"experiments\.explore"):
        export.main(ExportConfig(run_dir=str(run), format=EVERY))
    assert not (run / "neuronpedia").exists()


def toy_of(folder: Path, seed: int) -> Path:
    toy.write_store(folder, seed=seed)
    return folder


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"model_id": "No"}, "--model_id"),
        ({"source_set": "neurons"}, "--source_set"),
        ({"release": "a b"}, "--release"),
        ({"format": ()}, "--format"),
        ({"hub_repo": "me/mine"}, "--license"),
        ({"private": True}, "--hub_repo"),
        ({"dry_run": True}, "--hub_repo"),
        ({"run_dir": None}, "--run_dir"),
    ],
)
def test_flags_that_cannot_work_are_refused_at_once(flags, told):
    with pytest.raises(ConfigError, match=told):
        ExportConfig(**{"run_dir": "r"} | flags)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"layers": 2}, "of layer 2, but the model has 2 layers"),
        ({"hook": "blocks.5.hook_mlp_out"}, "has no SAE of blocks.5.hook_mlp_out: there are blocks.2"),
        ({"created_at": "now"}, "expected a time"),
        ({"title": "a\tb"}, "control characters"),
    ],
)
def test_what_does_not_fit_the_run_is_refused_before_anything_is_written(run, flags, told):
    with pytest.raises((ConfigError, FileNotFoundError), match=told):
        export.main(ExportConfig(run_dir=str(run), **flags))
    assert not (run / "neuronpedia").exists()


def test_a_checkpoint_that_is_gone_can_be_done_without(run):
    config = json.loads((run / "config.json").read_text())
    config["flags"]["checkpoint"] = str(run / "gone")
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileNotFoundError, match="Without the checkpoint, give --layers"):
        export.main(ExportConfig(run_dir=str(run)))
    export.main(ExportConfig(run_dir=str(run), layers=6))
    (run / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is broken"):
        export.main(ExportConfig(run_dir=str(run)))


def test_an_sae_that_does_not_say_its_model_asks_for_an_id(run):
    file = run / "sae" / toy.HOOK / "cfg.json"
    cfg = json.loads(file.read_text())
    del cfg["metadata"]["model_fingerprint"]
    file.write_text(json.dumps(cfg))
    with pytest.raises(ConfigError, match="give --model_id"):
        export.main(ExportConfig(run_dir=str(run)))
    export.main(ExportConfig(run_dir=str(run), model_id="mine"))


def test_the_hub_gets_what_was_told_before(run, monkeypatch, capsys):
    from bridge import hub

    toy.write_store(run, hook="blocks.4.hook_resid_post", seed=1)
    sent = []
    monkeypatch.setattr(hub, "push", lambda *args, **more: sent.append((args, more)) or [None] * 4)
    shared = {"run_dir": str(run), "format": ("neuronpedia",), "hub_repo": "me/saes", "license": "mit"}
    export.main(ExportConfig(**shared, private=True, hook=toy.HOOK))
    assert sent == [
        ((run, "me/saes"), {"license": "mit", "hooks": [toy.HOOK], "private": True, "dry_run": False}),
    ]
    told = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("hub")]
    assert [line[1] for line in told[:-1]] == [
        "README.md",
        *(f"{toy.HOOK}/{name}" for name in ("cfg.json", "sae_weights.safetensors")),
    ]
    assert all(int(line[2].replace(",", "")) > 100 for line in told[:-1])
    assert told[-1][-1] == "https://huggingface.co/me/saes"
    (file,) = run.rglob("source.jsonl")
    source = json.loads(file.read_text())
    assert (source["hfRepoId"], source["hfFolderId"]) == ("me/saes", toy.HOOK)


def test_a_dry_run_says_what_the_hub_would_get_and_asks_nobody(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    flags = {"run_dir": str(run), "format": ("sae_lens",), "hub_repo": "me/saes", "license": "mit"}
    assert export.main(ExportConfig(**flags, dry_run=True)) == 0
    assert "would go to https://huggingface.co/me/saes" in capsys.readouterr().out


def test_what_the_hub_would_refuse_is_refused_before_anything_is_written(run):
    flags = {"run_dir": str(run), "hub_repo": "me/saes"}
    for wrong, told in (
        ({"hub_repo": "me/a--b"}, "not a repository id"),
        ({"license": "My Licence"}, "is not a licence of the hub"),
    ):
        with pytest.raises(ValueError, match=told):
            export.main(ExportConfig(**flags | {"license": "mit"} | wrong))
    assert not (run / "neuronpedia").exists()


# ---- at the end of a training -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"prepare_neuronpedia": True, "model_id": "No"}, "--model_id"),
        ({"prepare_neuronpedia": True, "source_set": "a--b"}, "--source_set"),
        ({"model_id": "fine"}, "--prepare_neuronpedia"),
    ],
)
def test_a_training_that_could_not_be_exported_is_refused_before_it_starts(flags, told):
    with pytest.raises(ConfigError, match=told):
        RunConfig(**flags)


def test_a_training_leaves_an_export_when_it_is_asked_to(tmp_path):
    for path in sorted(Path(json.__file__).parents[1].glob("*.py"))[:60:3]:
        shutil.copy(path, tmp_path)
    flags = {
        "data": f"{tmp_path}/*.py",
        "output_dir": tmp_path / "run",
        "num_activations": 8000,
        "batch_size": 500,
        "block_size": 2000,
        "context_size": 64,
        "checkpoint_every": 8000,
        "heldout_tokens": 300,
        "expansion_factor": 1,
        "learning_rate": 0.01,
        "k": 4,
        "model_id": "mine",
        "source_set": "me-res",
    }
    told = [f"--{name}={value}" for name, value in flags.items()]
    command = [sys.executable, "-m", "experiments.train", "--prepare_neuronpedia", *told]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run" / "neuronpedia" / "v1" / "mine" / "2-me-res"
    assert f"neuronpedia     {folder}" in done.stdout
    assert json.loads((folder / "source.jsonl").read_text())["dataset"] == "*.py"
    hold(folder, every=50)
    assert (tmp_path / "run" / "explorer" / "index.html").is_file()
