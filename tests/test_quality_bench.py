"""The measurement of quality: jsae's side on real activations, with a stand-in for the other trainers."""

import dataclasses
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.benches import peers, quality, quality_contest, quality_sides
from experiments.benches.quality_config import OURS, RECIPES, Recipe
from experiments.benches.quality_contest import Contest, Trained
from jsae.architectures import find

PEER = """
import json, sys
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file

print(json.dumps({"versions": {"stand-in": "1"}}), flush=True)
x = np.load(Path(sys.argv[1]) / "train.npy")[:256]
for line in sys.stdin:
    job = json.loads(line)
    if job["rate"] == 0.5:
        print(json.dumps({"seconds": 1.0, "finite": False}), flush=True)
        continue
    folder, d, f = Path(job["folder"]), job["d_in"], job["d_sae"]
    folder.mkdir()
    rows = np.random.default_rng(job["seed"]).standard_normal((f, d)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    mean = x.mean(0)
    pre = (x - mean) @ rows.T
    if job["coefficient"] is None:
        form, own = {"architecture": "topk", "k": job["k"]}, {}
        least = np.sort(pre, axis=1)[:, -job["k"], None]
    else:
        form, least = {"architecture": "jumprelu"}, np.float32(job["coefficient"])
        own = {"threshold": np.full(f, least)}
    made = np.where(pre > least if own else pre >= least, np.maximum(pre, 0), 0) @ rows + mean
    (folder / "cfg.json").write_text(json.dumps({"d_in": d, "d_sae": f, **form}))
    weights = {"W_enc": np.ascontiguousarray(rows.T), "W_dec": rows, "b_enc": np.zeros(f, np.float32), "b_dec": mean}
    save_file(weights | own, folder / "sae_weights.safetensors")
    np.save(folder / "made.npy", made + (3 if job["library"] == "dictionary_learning" else 0))
    print(json.dumps({"seconds": 1.0, "finite": True}), flush=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("quality")


@pytest.fixture(scope="module")
def subject(folder):
    sizes = {"train": 3200, "heldout": 600, "loss": 600}
    return quality_sides.lay_out(folder, checkpoint="demo", data="stdlib", layer=2, **sizes)


@pytest.fixture
def config():
    sizes = {"num_activations": 3200, "batch_size": 32, "d_sae": 48, "k": 4, "nested_widths": (16,)}
    return quality.Config(rates=(), seeds=1, trainers=("SAELens", OURS), **sizes)


@pytest.fixture
def contest(config, subject, folder, tmp_path):
    """Yield a function that creates contests, with the stand-in as their peer."""
    script = tmp_path / "stand_in.py"
    script.write_text(PEER)
    with peers.process(sys.executable, script, folder) as (versions, ask):
        assert versions == {"stand-in": "1"}
        yield lambda **changes: Contest(dataclasses.replace(config, **changes), subject, folder, ask, print)


def test_activations_are_written_once_and_scored_on_others(subject, folder):
    acts = np.load(folder / "train.npy")
    assert acts.shape == (3200, 128)
    assert acts.dtype == np.float32
    assert subject.heldout.shape == (600, 128)
    assert not np.isin(subject.heldout[:, 0], acts[:, 0]).all()
    assert 0 < subject.rows.size <= 600


def test_both_sides_are_trained_and_scored_alike(contest):
    peer, ours = contest().rows("topk")
    assert [row["trainer"] for row in (peer, ours)] == ["SAELens", OURS]
    assert peer["l0"]["mean"] == pytest.approx(4, abs=0.01)
    assert ours["fvu"]["mean"] < peer["fvu"]["mean"]  # whose rows are random
    assert ours["loss_recovered"]["mean"] > peer["loss_recovered"]["mean"]
    assert ours["seconds"]["mean"] > 0
    assert "| topk | SAELens | " in quality.markdown([peer, ours])


def test_a_penalty_is_searched_until_l0_is_as_wanted(contest):
    (peer,) = contest(trainers=("SAELens",), tries=8).rows("jumprelu")
    assert peer["l0"]["mean"] == pytest.approx(4, rel=0.04)


def test_the_best_rate_is_trained_with_every_seed_and_one_that_diverges_is_not_it(contest):
    (peer,) = contest(trainers=("SAELens",), rates=(0.5, 0.01), seeds=2).rows("topk")
    assert peer["rate"] is None
    assert [t["rate"] for t in peer["tried"]] == [None, 0.01]
    assert peer["fvu"]["min"] < peer["fvu"]["max"]


def test_an_export_that_computes_something_else_than_its_library_is_refused(contest):
    with pytest.raises(ValueError, match="does not reconstruct as its library does"):
        contest(trainers=("dictionary_learning",)).rows("topk")


def test_the_recipes_are_of_architectures_of_the_package():
    for name, recipes in RECIPES.items():
        settings = {field.name for field in dataclasses.fields(find(name).Config)}
        assert {recipe.name.split()[0] for recipe in recipes} == {name}
        assert {recipe.is_penalised for recipe in recipes} == {"k" not in settings}


def test_secants_find_the_strength(tmp_path):
    seen, strength = [], 1.0
    for _ in range(5):
        seen.append(
            Trained(Recipe("SAELens", "relu", 1.0), None, 0, strength, tmp_path, fvu=0.5, l0=300 / strength**0.7)
        )
        strength = quality_contest._next(seen, 32)
    assert seen[-1].l0 == pytest.approx(32, rel=0.01)


def test_a_strength_with_which_training_diverges_is_halved(tmp_path):
    diverged = Trained(Recipe("SAELens", "relu", 1.0), None, 0, 4.0, tmp_path)
    assert math.isinf(diverged.fvu)
    assert quality_contest._next([diverged], 32) == 2


def test_a_peer_that_ends_says_why(tmp_path):
    script = Path(quality.__file__).with_name("quality_peer.py")
    with (
        pytest.raises(OSError, match=r"quality_peer ended:\n(.*\n)*.*train\.npy"),
        peers.process(sys.executable, script, tmp_path),
    ):
        pytest.fail("it was ready without activations")


def test_an_environment_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="could not be created"):
        peers.environment(tmp_path / "file" / "env", [("install", "nothing")], "pass")


@pytest.mark.parametrize(
    "wrong", [{"trainers": ("me",)}, {"architectures": ()}, {"num_activations": 600}, {"k": 2000}, {"seeds": 0}]
)
def test_sizes_that_cannot_be_measured_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        quality.Config(**wrong)
