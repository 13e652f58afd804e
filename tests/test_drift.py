"""SAEs follow activations whose scale and mean drift."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsae import TopK, TrainConfig, drift, loop, metrics, step
from jsae.loop import Member

pytestmark = pytest.mark.usefixtures("quickly_compiled")

D, F, N = 16, 32, 128
MEMBER = Member(TopK.Config(D, F, k=4), TrainConfig(N * 400, N, learning_rate=2e-3, decay_fraction=0.0))


def acts(seed: int, scale: float = 1.0, mean: float = 0.0) -> np.ndarray:
    """Sparse sums of fixed directions, (N, D)."""
    directions = np.random.default_rng(0).standard_normal((32, D))
    random = np.random.default_rng(seed)
    codes = random.exponential(size=(N, 32)) * (random.random((N, 32)) < 0.1)
    return (scale * (codes @ directions) + mean).astype(np.float32)


@pytest.fixture(scope="module")
def advance():
    ops = MEMBER.ops

    def one(state, means, x, follows):
        if follows:
            state, means = drift.follow(state, means, x)
        return *step.update(MEMBER.train, ops, state, x), means

    return jax.jit(one, static_argnums=3)


def start(x: np.ndarray):
    return loop.init([MEMBER], (jnp.asarray(x),))[0], drift.init(jnp.asarray(x))


def test_the_means_begin_with_those_of_the_sample():
    x = acts(1, mean=2.0)
    state, means = start(x)
    assert float(state.scale) == pytest.approx(1 / np.sqrt(float(means.power)), rel=1e-6)
    np.testing.assert_allclose(means.mean, x.mean(0), rtol=1e-5, atol=1e-5)


def test_a_batch_like_the_sample_moves_nothing():
    x = jnp.asarray(acts(1, mean=2.0))
    state, means = start(x)
    new, after = drift.follow(state, means, x)
    np.testing.assert_allclose(new.scale, state.scale, rtol=1e-6)
    np.testing.assert_allclose(new.sae.b_dec[...], state.sae.b_dec[...], atol=1e-5)
    assert int(after.batches) == 2


def test_means_and_scale_are_those_of_the_formula_in_float64():
    first, second = acts(1).astype(np.float64), acts(2, 3.0, 1.0).astype(np.float64)
    state, means = start(first.astype(np.float32))
    new, after = drift.follow(state, means, jnp.asarray(second, jnp.float32))
    mean = first.mean(0) + 0.5 * (second.mean(0) - first.mean(0))
    power = np.square(first).mean() + 0.5 * (np.square(second).mean() - np.square(first).mean())
    np.testing.assert_allclose(after.mean, mean, rtol=1e-5, atol=1e-6)
    shift = mean / np.sqrt(power) - float(state.scale) * first.mean(0)
    np.testing.assert_allclose(new.sae.b_dec[...] - state.sae.b_dec[...], shift, rtol=1e-3, atol=1e-5)
    assert float(new.scale) == pytest.approx(power**-0.5, rel=1e-5)
    assert new.scale_out is new.scale or float(new.scale_out) == float(new.scale)


def test_an_average_of_the_weights_is_shifted_too():
    member = MEMBER._replace(train=dataclasses.replace(MEMBER.train, average_fraction=0.1))
    state = loop.init([member], (jnp.asarray(acts(1)),))[0]
    new, _ = drift.follow(state, drift.init(jnp.asarray(acts(1))), jnp.asarray(acts(2, mean=3.0)))
    moved = new.sae.b_dec[...] - state.sae.b_dec[...]
    np.testing.assert_allclose(new.average.b_dec[...] - state.average.b_dec[...], moved, atol=1e-6)
    assert float(jnp.abs(moved).max()) > 0.1


def test_a_batch_that_is_not_finite_moves_nothing():
    x = acts(1)
    state, means = start(x)
    bad = x.copy()
    bad[3, 2] = np.nan
    new, after = drift.follow(state, means, jnp.asarray(bad))
    np.testing.assert_array_equal(after.mean, means.mean)
    np.testing.assert_allclose(new.sae.b_dec[...], state.sae.b_dec[...], atol=1e-6)


def test_an_sae_that_follows_keeps_its_quality_while_activations_grow_and_move(advance):
    def fvu(follows: bool) -> float:
        state, means = start(acts(1))
        for number in range(100):
            growth = number / 100
            x = jnp.asarray(acts(10 + number, 1 + 29 * growth, 90 * growth))
            state, sums, means = advance(state, means, x, follows)
        return metrics.summarize(jax.device_get(sums))["fvu"]

    following, fixed = fvu(True), fvu(False)
    assert following < 0.35
    assert following < 0.9 * fixed
