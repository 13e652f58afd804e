"""Recurrence of latents in SAEs of other seeds: the numbers, the file beside a run, and who reads it."""

import json
from pathlib import Path

import explorer_toy as toy
import numpy as np
import pytest

from bridge.neuronpedia import api
from bridge.run import Run, recurrence
from bridge.run.labels import Names
from bridge.run.recurrence import Recurrence
from experiments import stability as command
from jsae import export, stability
from jsae.architectures import sae_config
from jsae.records.store import digest
from jsae.settings import ConfigError

HOOK = toy.HOOK
WIDTH, LATENTS = 16, 24


def rows(seed: int) -> np.ndarray:
    made = np.random.default_rng(seed).normal(size=(LATENTS, WIDTH))
    return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)


def write(run: Path, decoder: np.ndarray, dead: int = 0, hook: str = HOOK, model: str = "m") -> Path:
    """Write a run with an SAE of this decoder, whose first `dead` latents never fire."""
    arrays = {"W_enc": decoder, "W_dec": decoder, "b_enc": np.zeros(len(decoder)), "b_dec": np.zeros(WIDTH)}
    arrays = {name: np.asarray(array, np.float32) for name, array in arrays.items()}
    folder = Run(run).sae_folder(hook)
    config = sae_config("topk", WIDTH, len(decoder), k=2)
    export.write(folder, config, arrays, 1.0, 1.0, {"hook_name": hook, "model_fingerprint": model})
    export.write_sparsity(folder, np.where(np.arange(len(decoder)) < dead, 0, 0.1))
    flags = {"seed": [int(run.name[-1])], "k": [2]}
    Run(run).config_file.write_text(json.dumps({"flags": flags, "facts": {}, "versions": {}}))
    return run


@pytest.fixture
def sweep(tmp_path) -> Path:
    """Three seeds: the second has the first's latents in another order, the third half of them."""
    first = rows(0)
    third = rows(7)
    third[:12] = first[12:]
    write(tmp_path / "seed0", first)
    write(tmp_path / "seed1", first[::-1])
    write(tmp_path / "seed2", third, dead=2)
    return tmp_path


# ---- the numbers ----------------------------------------------------------------------------------------------------


def test_a_latent_recurs_where_its_match_is_alike_enough():
    first, second = rows(0), rows(1)
    second[4], second[5] = first[9], first[8]
    share, other = stability.recurrence([first, second])
    assert set(np.flatnonzero(share)) >= {8, 9}
    assert set(np.flatnonzero(other)) >= {4, 5}
    assert share.sum() == other.sum()  # one to one
    assert set(np.unique(share)) <= {0.0, 1.0}


def test_of_several_seeds_it_is_a_share_and_dead_latents_have_none():
    first = rows(0)
    alive = np.arange(LATENTS) > 0
    shares = stability.recurrence([first, first, rows(5)], [alive, np.ones(LATENTS, bool), alive], bar=0.999)
    assert np.isnan(shares[0][0])
    np.testing.assert_array_equal(shares[0][1:], 0.5)
    assert shares[1][0] == 0  # the latent that it would be matched with is dead
    np.testing.assert_array_equal(shares[2][1:], 0)


# ---- the file -------------------------------------------------------------------------------------------------------


def test_the_command_writes_a_share_for_every_latent_of_every_run(sweep, capsys):
    command.main(command.StabilityConfig(run_dir=str(sweep), same=0.95))
    shown = capsys.readouterr().out
    table = json.loads((sweep / "seed0" / "stability.json").read_text())[HOOK]
    assert table["others"] == 2
    assert table["sae"] == digest(sweep / "seed0" / "sae" / HOOK)
    np.testing.assert_array_equal(table["recurs"][:12], 0.5)
    assert table["recurs"][14:] == [1.0] * 10  # two of the third's are dead
    assert table["recurs"][12:14] == [0.5, 0.5]
    third = recurrence.read(sweep / "seed2", HOOK)
    assert np.isnan(third.share[:2]).all()
    assert third.text(0) == ""
    assert third.text(2) == "recurs in 2 of 2 other seeds"
    assert "10 (41.7%)" in shown


def test_runs_may_be_given_one_by_one(sweep):
    command.main(command.StabilityConfig(runs=(str(sweep / "seed0"), str(sweep / "seed1"))))
    assert recurrence.read(sweep / "seed1", HOOK).others == 1
    assert recurrence.read(sweep / "seed2", HOOK) is None


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda sweep: (sweep / "seed0", sweep / "seed0"), "a run is given twice"),
        (lambda sweep: (sweep / "seed0", write(sweep / "x1", rows(1), model="n")), "trained on another model than"),
        (
            lambda sweep: (sweep / "seed0", write(sweep / "x1", rows(1), hook="blocks.1.hook_mlp_out")),
            r"has SAEs of blocks\.1\.hook_mlp_out, .* of blocks\.2\.hook_resid_post: give runs of the same hooks",
        ),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(spoil, problem, sweep):
    runs = spoil(sweep)
    with pytest.raises(ConfigError, match=problem):
        recurrence.compare(runs)
    assert not (sweep / "seed0" / "stability.json").exists()


def test_saes_of_other_sizes_and_sweeps_without_seeds_are_refused(sweep):
    with pytest.raises(ValueError, match="give SAEs of one size"):
        recurrence.compare([sweep / "seed0", write(sweep / "x1", rows(1)[:20])])
    other = write(sweep / "alone" / "k16-seed0", rows(0)).parent
    with pytest.raises(ConfigError, match="no variants that differ in their seed only: train with --seed=0,1,2"):
        recurrence.seeds_of(other)


def test_a_broken_file_is_named_with_the_command_that_writes_it(sweep):
    file = sweep / "seed0" / "stability.json"
    for entry in ({"recurs": [2.0], "others": 1, "same_from_cosine": 0.7}, {"others": 1}, {"recurs": 3}):
        file.write_text(json.dumps({HOOK: entry}))
        with pytest.raises(ValueError, match=r"stability\.json is broken at blocks.*experiments\.stability"):
            recurrence.read(sweep / "seed0", HOOK)


def test_shares_of_an_earlier_sae_are_not_shown(sweep, capsys):
    recurrence.compare([sweep / "seed0", sweep / "seed1"])
    write(sweep / "seed0", rows(3))
    assert recurrence.read(sweep / "seed0", HOOK) is None
    assert "is of an earlier SAE" in capsys.readouterr().err


# ---- who reads it ---------------------------------------------------------------------------------------------------


def test_descriptions_for_neuronpedia_say_how_often_a_latent_recurs(tmp_path):
    store = toy.write_store(tmp_path / "run")
    shares = [0.5, None, 1.0, 0.0, 0.5, 0.5, 0.5, 0.5]
    entry = {"sae": digest(tmp_path / "run" / "sae" / HOOK), "others": 2, "same_from_cosine": 0.7, "recurs": shares}
    (tmp_path / "run" / "stability.json").write_text(json.dumps({HOOK: entry}))
    names = Names.read(tmp_path / "run", HOOK)
    assert names.description(toy.DENSE) == "any token (recurs in 2 of 2 other seeds)"
    assert names.description(toy.DEAD) == ""
    run = Run(tmp_path / "run")
    sent = {f["index"]: f["explanations"] for f in api.api_features(run.records(HOOK), run.sae_folder(HOOK), names)}
    assert sent[toy.ORDINARY] == [{"text": "token ' cat' (recurs in 1 of 2 other seeds)"}]
    assert store.is_dir()


def test_one_other_seed_is_spoken_of_in_the_singular():
    assert Recurrence(np.array([1.0]), 1, 0.7).text(0) == "recurs in 1 of 1 other seed"
