"""The run that comes along: whole, of the packaged model, and copied only where nothing else is."""

import importlib.resources
import json
from pathlib import Path

import pytest

import bridge.nanochat
from bridge.run import Run, packaged
from experiments.explore import DEMO_TOKENS, NUM_TOKENS, ExploreConfig
from jsae.settings import ConfigError

HOOK = "blocks.2.hook_resid_post"


@pytest.fixture
def run(tmp_path) -> Run:
    assert packaged.install(tmp_path / "runs" / "demo")
    return Run(tmp_path / "runs" / "demo")


def test_the_packaged_run_is_an_sae_of_the_packaged_model_with_labels(run):
    sae = run.sae()
    assert sae.metadata["model_fingerprint"] == bridge.nanochat.load("demo").fingerprint
    assert (sae.d_sae, run.evaluation[HOOK]["l0"]) == (1024, 32.0)
    assert run.evaluation[HOOK]["fvu"] < 0.08
    names = run.labels[HOOK]
    assert len(names) == 1024
    assert sum(names[i].f1 > 0.5 for i in names) > 700


def test_the_packaged_run_is_small_and_names_no_folder_of_the_machine_it_was_made_on():
    folder = Path(str(importlib.resources.files("bridge.run") / "demo"))
    found = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in found) < 2**21
    flags = json.loads((folder / "config.json").read_text())["flags"]
    assert not any(isinstance(value, str) and value.startswith("/") for value in flags.values())


def test_the_packaged_run_is_copied_once_and_over_nothing(run, tmp_path):
    run.notes_file.parent.mkdir()
    run.notes_file.write_text("")
    assert not packaged.install(run.path)
    assert run.notes_file.is_file()
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds another run: give --run_dir"):
        packaged.install(other)
    (other / "config.json").rename(other / "notes.txt")
    with pytest.raises(ConfigError, match="holds something else: give --run_dir"):
        packaged.install(other)
    with pytest.raises(ConfigError, match="holds something else"):
        packaged.install(other / "notes.txt")


def test_an_installation_without_the_run_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(packaged, "_packaged", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match="not part of this installation"):
        packaged.install(tmp_path / "run")


def test_the_demo_reads_less_text_and_needs_no_folder():
    assert (ExploreConfig(demo=True).run_dir, ExploreConfig(demo=True).num_tokens) == (packaged.FOLDER, DEMO_TOKENS)
    assert ExploreConfig(demo=True, run_dir="/a", num_tokens=5).num_tokens == 5
    assert ExploreConfig(run_dir="/a").num_tokens == NUM_TOKENS
    with pytest.raises(ConfigError, match="give --run_dir, or --demo"):
        ExploreConfig()
    with pytest.raises(ConfigError, match="--embed needs --serve"):
        ExploreConfig(run_dir="/a", embed=("https://a.b",))
    with pytest.raises(ConfigError, match="not an origin"):
        ExploreConfig(run_dir="/a", serve=True, embed=("*",))
