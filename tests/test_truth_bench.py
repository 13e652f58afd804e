"""The measurement of recovery: presets, and training on samples that are made on the device."""

import dataclasses

import pytest
from test_synthetic import TINY

from experiments.benches import quality, quality_subjects, truth
from experiments.benches.quality_config import OURS, Recipe
from experiments.benches.quality_contest import Contest, Trained
from jsae.synthetic import PRESETS, SyntheticWorld


def plan(trainers):
    config = truth.Config(
        rate=0.02,
        rate_range=(0.02, 0.02),
        trainers=trainers,
        num_activations=3200,
        batch_size=32,
        d_sae=48,
        l0s=(4,),
        seeds=1,
    )
    return truth._plan(config.sizes())


def test_a_world_without_a_file_is_trained_on_its_device(tmp_path):
    on = quality_subjects.endless(tmp_path, SyntheticWorld(TINY), 2000, "f1")
    alone = Contest(plan((OURS,)), on, tmp_path, truth._no_peers, print)
    ours, _ = alone.rows("matryoshka")
    assert 0.05 < ours["scores"]["f1"]["mean"] < 1
    assert not (tmp_path / "train.npy").exists()
    recipe = Recipe(OURS, "matryoshka")
    assert alone._train(recipe, 0.013, 0, None).peak == pytest.approx(0.013)
    assert alone._with_nothing_given(recipe).peak > 0  # where the search begins
    with pytest.raises(ValueError, match="SAELens is not trained on this world"):
        Contest(plan(("SAELens",)), on, tmp_path, truth._no_peers, print).rows("topk")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"l0s": ()}, "l0s is empty"),
        ({"l0s": (300,)}, "l0s: 300 is not between 1 and d_sae=256"),
        ({"preset": "big"}, "choose one of small, published"),
        ({"num_activations": 1000}, "less than 100 batches"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"world": ("seed",)}, "world: 'seed' is not name=value"),
        ({"world": ("seed=seven",)}, "world: 'seed=seven' is not name=value"),
        ({"world": ("colour=1",)}, "WorldConfig has no field colour"),
        ({"world": ("d_in=0",)}, "d_in"),
    ],
)
def test_sizes_of_worlds_that_cannot_be_measured_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        truth.Config(**wrong)


def test_the_preset_decides_what_is_not_given():
    assert truth.Config().sizes().d_sae == 256
    published = truth.Config(preset="published", d_sae=64, l0s=(5,)).sizes()
    assert (published.d_sae, published.l0s, published.num_activations) == (64, (5,), 200_000_000)


def test_settings_of_the_world_replace_the_presets():
    world = truth.Config(world=("seed=7", "d_in=64", "max_probability=0.2", "compensate=false")).world_config()
    assert world == dataclasses.replace(PRESETS["small"], seed=7, d_in=64, max_probability=0.2, compensate=False)
    assert truth.Config(preset="published").world_config() == PRESETS["published"]


@pytest.mark.parametrize(("every", "rates"), [(False, {None}), (True, {None, 0.02})])
def test_the_rate_of_the_first_l0_stays_unless_it_is_searched_at_every_one(every, rates, tmp_path, monkeypatch):
    config = truth.Config(rate=0.01, rate_range=(0.01, 0.02), trainers=(OURS,), l0s=(4, 6), search_every_l0=every)
    on = quality_subjects.endless(tmp_path, SyntheticWorld(TINY), 100, "f1")
    contest = Contest(truth._plan(config.sizes()), on, tmp_path, truth._no_peers, lambda line: None)

    def trained(self, recipe, rate, seed, coefficient, **how):
        scores = {"f1": 1 - (rate or 0.01), "l0": float(self._plan.k), "fvu": 0.1}  # the lowest rate is the best
        return Trained(recipe, rate, seed, coefficient, scores=scores, folder=tmp_path, peak=0.01)

    monkeypatch.setattr(Contest, "_train", trained)
    monkeypatch.setattr("experiments.benches.quality_contest.recurring", lambda folders: {})
    found = truth._at_every_l0(contest, "topk", config.l0s)
    assert {t["rate"] for t in found[4][0]["tried"]} == {None, 0.02}, "jsae's default stands for 0.01"
    assert {t["rate"] for t in found[6][0]["tried"]} == rates


def test_published_scores_stand_beside_those_of_the_published_world():
    rows = [{"architecture": "batchtopk"}, {"architecture": "relu"}]
    (published,) = truth._published(PRESETS["published"], rows, 25)
    assert published["scores"]["f1"]["mean"] == 0.73
    assert truth._published(PRESETS["small"], rows, 25) == []
    assert truth._published(dataclasses.replace(PRESETS["published"], seed=7), rows, 25) == [], "another world"
    assert "SAELens, published" in quality.markdown([published])
