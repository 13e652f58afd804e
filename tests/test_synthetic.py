"""Synthetic worlds: their rules, their streams of samples, and training on them."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import jsae
from jsae.synthetic import PRESETS, SyntheticWorld, WorldConfig, features, world
from jsae.synthetic.features import levels, mean_max_cosine

TINY = WorldConfig(
    num_features=60,
    d_in=16,
    max_probability=0.35,
    min_probability=0.02,
    correlation_rank=3,
    correlation_scale=0.3,
    roots=4,
    branching=3,
    depth=2,
    orthogonal_steps=50,
    orthogonal_rate=1e-2,
)
ROWS = 3 * world.PIECE + 7


@pytest.fixture(scope="module")
def tiny():
    return SyntheticWorld(TINY)


def filled(source, rows):
    filling = source.fill(rows)
    while True:
        try:
            next(filling)
        except StopIteration as done:
            return np.asarray(done.value)


def test_activations_are_the_sum_of_their_features(tiny):
    acts, values = tiny.sample(5, 300)
    assert acts.shape == (300, 16)
    assert values.shape == (300, 60)
    np.testing.assert_allclose(acts, values @ tiny.features + tiny.bias, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(tiny.features, axis=1), 1, rtol=1e-6)
    assert float(jnp.linalg.norm(tiny.bias)) == pytest.approx(TINY.bias_norm)


def test_children_fire_with_their_parents_only_and_one_at_a_time(tiny):
    fires = np.asarray(tiny.sample(0, ROWS).feature_activations) > 0
    for level in levels(TINY):
        parents = fires[:, level.parents, None]
        children = fires[:, level.children].reshape(ROWS, -1, TINY.branching)
        assert not (children & ~parents).any()
        assert children.sum(2).max() == 1
        assert children.any(axis=(0,)).all()


def test_children_of_parents_that_are_not_exclusive_fire_together():
    free = SyntheticWorld(dataclasses.replace(TINY, exclusive_fraction=0.5))
    fires = np.asarray(free.sample(0, ROWS).feature_activations) > 0
    exclusive = np.asarray(free.parts.exclusive)
    assert exclusive.sum() == 8  # of 4 + 12 parents
    for level in levels(TINY):
        most = fires[:, level.children].reshape(ROWS, -1, TINY.branching).sum(2).max(0)
        assert (most[exclusive[level.parents]] == 1).all()
        assert (most[~exclusive[level.parents]] > 1).all()


def test_a_child_is_scaled_by_its_parent():
    fixed = dataclasses.replace(TINY, spread_mean=0.0, spread_std=0.0, compensate=False, correlation_rank=0)
    parts = features.make(fixed)
    spreads = parts.spreads.at[:4].set(1.0)
    values = np.asarray(
        SyntheticWorld(fixed, parts=parts._replace(spreads=spreads)).sample(0, ROWS).feature_activations
    )
    child, parent, mean = values[:, 4], values[:, 0], float(parts.means[0])
    both = child > 0
    np.testing.assert_allclose(child[both], float(parts.means[4]) * parent[both] / mean, rtol=1e-5)
    assert parent[both].std() > 0.5


def test_compensated_features_fire_about_as_often_as_the_zipf_law_says():
    independent = dataclasses.replace(TINY, correlation_rank=0, max_probability=0.3, min_probability=2e-3)
    law = features.zipf(60, 0.5, 0.3, 2e-3)
    rates = {}
    for compensate in (True, False):
        made = SyntheticWorld(dataclasses.replace(independent, compensate=compensate))
        rates[compensate] = (np.asarray(made.sample(0, 40_000).feature_activations) > 0).mean(0)
    trees = slice(4, 52)
    assert rates[True][trees].mean() == pytest.approx(law[trees].mean(), rel=0.25)
    assert rates[False][trees].mean() < 0.5 * law[trees].mean()


def test_vectors_become_more_orthogonal(tiny):
    random = SyntheticWorld(dataclasses.replace(TINY, orthogonal_steps=0))
    assert mean_max_cosine(tiny.features) < mean_max_cosine(random.features) - 0.05


def test_rows_do_not_depend_on_the_size_of_blocks(tiny):
    at_once = filled(tiny.with_samples(0), ROWS)
    again = tiny.with_samples(0)
    parts = [filled(again, rows) for rows in (1, world.PIECE, 500, ROWS - world.PIECE - 501)]
    assert np.array_equal(at_once, np.concatenate(parts))
    assert np.array_equal(at_once[1000:1100], tiny.sample(1000, 100).activations)


def test_streams_of_samples_differ_and_their_features_do_not(tiny):
    other = tiny.with_samples(1)
    assert np.array_equal(tiny.features, other.features)
    fires = [np.asarray(each.sample(0, 500).feature_activations) > 0 for each in (tiny, other)]
    assert (fires[0] == fires[1]).all(1).mean() < 0.2  # some rows are empty in both
    assert not np.array_equal(SyntheticWorld(dataclasses.replace(TINY, seed=7)).features, tiny.features)


def test_a_stream_goes_on_from_its_position(tiny):
    first = tiny.with_samples(3)
    filled(first, 1500)
    position = first.position()
    rest = filled(first, 700)
    second = SyntheticWorld(TINY, sample_seed=3)
    second.seek(position)
    assert np.array_equal(filled(second, 700), rest)


@pytest.mark.parametrize(
    "other",
    [
        lambda tiny: tiny.with_samples(1),
        lambda tiny: SyntheticWorld(dataclasses.replace(TINY, compensate=False), parts=tiny.parts),
        lambda tiny: SyntheticWorld(TINY, parts=tiny.parts._replace(bias=jnp.zeros(16))),
    ],
)
def test_a_position_of_another_world_is_refused(tiny, other):
    with pytest.raises(jsae.ConfigError, match="another synthetic world, or of samples with another seed"):
        tiny.with_samples(0).seek(other(tiny).position())


def test_an_interrupted_training_ends_with_the_same_weights(tiny, tmp_path):
    sae = jsae.TopK.Config(16, 32, k=4)
    config = jsae.TrainConfig(6000, batch_size=100, learning_rate=3e-3, dead_after=6000)
    options = {"block_size": 1000, "checkpoint_every": 2000}
    whole = jsae.train(tiny.with_samples(0), sae, config)
    reference = jsae.train(tiny.with_samples(0), sae, config, **options)
    for report in jsae.fit(tiny.with_samples(0), sae, config, checkpoints=tmp_path, report_every=10, **options):
        if report.step == 30:
            break
    resumed = jsae.train(tiny.with_samples(0), sae, config, checkpoints=tmp_path, **options)
    assert np.array_equal(resumed.W_dec, reference.W_dec)
    assert resumed.metrics["fvu"] < 0.6
    assert whole.metrics["fvu"] == pytest.approx(resumed.metrics["fvu"], rel=0.1)


def test_settings_survive_json():
    for config in PRESETS.values():
        assert WorldConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_features": 50}, "trees of 52 features, more than num_features=50"),
        ({"min_probability": 0.5}, r"min_probability=0\.5 is above max_probability"),
        ({"max_probability": 1.5}, "max_probability is 1.5"),
        ({"d_in": 0}, "d_in is 0"),
        ({"last_magnitude": 0.0}, "must be positive"),
    ],
)
def test_worlds_that_cannot_be_are_refused(wrong, message):
    with pytest.raises(jsae.ConfigError, match=message):
        dataclasses.replace(TINY, **wrong)


def test_arrays_that_do_not_fit_are_refused(tiny):
    with pytest.raises(jsae.ConfigError, match=r"features has the shape \(60, 8\): this world needs \(60, 16\)"):
        SyntheticWorld(TINY, parts=tiny.parts._replace(features=jnp.zeros((60, 8))))
    with pytest.raises(jsae.ConfigError, match=r"lie in \[0\.02.*, 2\]"):
        SyntheticWorld(TINY, parts=tiny.parts._replace(probabilities=tiny.parts.probabilities.at[0].set(2)))
    with pytest.raises(jsae.ConfigError, match="squares sum to"):
        SyntheticWorld(TINY, parts=tiny.parts._replace(loadings=jnp.ones((60, 3))))
    with pytest.raises(jsae.ConfigError, match="'big' is no synthetic world: choose one of published, small"):
        SyntheticWorld("big")
