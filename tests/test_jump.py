"""The jump and its gradients against their definitions, written out number by number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from alone import begin

from jsae import jump, step
from jsae.architectures import Context, Forward, JumpReLU, make, sae_config
from jsae.config import TrainConfig
from jsae.ops import choose

WIDTH = 0.5
# Far below, in the window below, at the threshold, in the window above, far above: of a threshold of 1 and one of 2.
PRE = jnp.array([[0.5, 1.5], [0.8, 1.9], [1.0, 2.0], [1.2, 2.2], [3.0, 4.0], [-2.0, 2.2]])
THRESHOLD = jnp.array([1.0, 2.0])
G = jnp.array([[1.0, 2.0], [3.0, 5.0], [7.0, 11.0], [13.0, 17.0], [19.0, 23.0], [29.0, 31.0]])


def gradients(function, *args):
    return [np.asarray(g) for g in jax.vjp(function, PRE, THRESHOLD)[1](*args)]


def test_the_jump_lets_through_as_it_is_what_exceeds_its_threshold_and_nothing_else():
    expected = [[0, 0], [0, 0], [0, 0], [1.2, 2.2], [3.0, 4.0], [0, 2.2]]
    np.testing.assert_array_equal(jump.jump_relu(PRE, THRESHOLD, WIDTH, False), np.float32(expected))
    np.testing.assert_array_equal(jump.jump_relu(PRE, THRESHOLD, WIDTH, True), np.float32(expected))


def test_the_jump_passes_gradients_to_what_it_lets_through_and_to_thresholds_within_the_window():
    """Rajamanoharan et al. 2024, equation 11: d / d threshold = -(threshold / width) K((pre - threshold) / width)."""
    to_pre, to_threshold = gradients(lambda p, t: jump.jump_relu(p, t, WIDTH, False), G)
    np.testing.assert_array_equal(to_pre, [[0, 0], [0, 0], [0, 0], [13, 17], [19, 23], [0, 31]])
    # In the window of latent 0: 0.8, 1.0, 1.2; of latent 1: 1.9, 2.0, 2.2, 2.2.
    expected = [-(1 / 0.5) * (3 + 7 + 13), -(2 / 0.5) * (5 + 11 + 17 + 31)]
    np.testing.assert_allclose(to_threshold, expected, rtol=1e-6)


def test_the_recipe_of_anthropic_gives_pre_activations_within_the_window_what_it_takes_from_thresholds():
    to_pre, to_threshold = gradients(lambda p, t: jump.jump_relu(p, t, WIDTH, True), G)
    window = [[0, 0], [2 * 3, 4 * 5], [2 * 7, 4 * 11], [2 * 13, 4 * 17], [0, 0], [0, 4 * 31]]
    own = [[0, 0], [0, 0], [0, 0], [13, 17], [19, 23], [0, 31]]
    np.testing.assert_allclose(to_pre, np.add(window, own), rtol=1e-6)
    np.testing.assert_allclose(to_threshold, -np.sum(window, 0), rtol=1e-6)


def test_the_step_counts_what_exceeds_its_threshold_and_its_gradient_reaches_thresholds_alone():
    """Rajamanoharan et al. 2024, equation 12: d / d threshold = -(1 / width) K((pre - threshold) / width)."""
    np.testing.assert_array_equal(jump.step(PRE, THRESHOLD, WIDTH), [[0, 0], [0, 0], [0, 0], [1, 1], [1, 1], [0, 1]])
    to_pre, to_threshold = gradients(lambda p, t: jump.step(p, t, WIDTH), G)
    assert not to_pre.any()
    np.testing.assert_allclose(to_threshold, [-2 * (3 + 7 + 13), -2 * (5 + 11 + 17 + 31)], rtol=1e-6)


def test_a_window_that_covers_everything_gives_thresholds_the_slope_of_a_smoothed_count():
    """The gradient is that of a count whose edge is smeared over the window: seen with many pre-activations."""
    pre, width = jnp.linspace(-1, 3, 4001)[:, None], 0.5

    def smeared(threshold: float) -> float:
        return float(np.clip((np.asarray(pre, np.float64)[:, 0] - threshold) / width + 0.5, 0, 1).sum())

    slope = (smeared(1.01) - smeared(0.99)) / 0.02
    ours = jax.grad(lambda t: jump.step(pre, t, width).sum())(jnp.array([1.0]))
    np.testing.assert_allclose(ours, [slope], rtol=5e-3)


# ---- both recipes, as an SAE learns by them ------------------------------------------------------------------------

N, D, F = 40, 6, 16


def sae_and_input(recipe: str) -> tuple[JumpReLU, np.ndarray]:
    config = sae_config("jumprelu", D, F, l0_coefficient=0.7, jump_recipe=recipe, bandwidth=0.8, initial_threshold=0.3)
    sae = make(config, key=jax.random.key(0), b_dec=jnp.linspace(-0.2, 0.3, D))
    sae.W_dec[...] = sae.W_dec * jnp.linspace(0.5, 2, F)[:, None]  # rows that are not unit, so that norms show
    return sae, np.asarray(jax.random.normal(jax.random.key(1), (N, D)))


def penalty(sae: JumpReLU, x: np.ndarray, strength: float) -> float:
    context, x = Context(choose(), training=True, strength=jnp.float32(strength)), jnp.asarray(x)
    latents, extra = sae.activate(x, context)
    return float(sae.penalty(Forward(x, x, 0 * x, latents, extra, context)))


def parts(sae: JumpReLU, x: np.ndarray) -> tuple[np.ndarray, ...]:
    """Pre-activations, latents, decoder norms, in float64."""
    W_enc, W_dec, b_dec = (np.asarray(getattr(sae, n)[...], np.float64) for n in ("W_enc", "W_dec", "b_dec"))
    pre = (x - b_dec) @ W_enc.T
    return pre, np.where(pre > 0.3, pre, 0), np.linalg.norm(W_dec, axis=1)


def test_the_penalty_of_anthropics_recipe_is_tanh_of_weighted_latents_and_a_pull_on_what_is_below():
    sae, x = sae_and_input("tanh")
    pre, latents, norms = parts(sae, x)
    sparsity = 0.5 * 0.7 * np.tanh(4 * latents * norms).sum(1).mean()
    pull = 3e-6 * (np.maximum(0.3 - pre, 0) * norms).sum(1).mean()
    assert penalty(sae, x, 0.5) == pytest.approx(sparsity + pull, rel=1e-5)
    assert penalty(sae, x, 0.0) == pytest.approx(pull, rel=1e-4)  # the warm-up is of sparsity alone


def test_the_penalty_of_gemma_scopes_recipe_is_the_number_of_active_latents():
    sae, x = sae_and_input("l0")
    pre, _, _ = parts(sae, x)
    assert penalty(sae, x, 0.5) == pytest.approx(0.5 * 0.7 * (pre > 0.3).sum(1).mean(), rel=1e-6)


@pytest.mark.parametrize("recipe", ["tanh", "l0"])
def test_the_gradient_of_log_thresholds_is_what_the_recipe_says_number_by_number(recipe):
    sae, x = sae_and_input(recipe)
    context = Context(choose(), training=True)
    ours = jax.grad(lambda sae: step.loss_of(sae, jnp.asarray(x), jnp.asarray(x), context)[0])(sae).log_threshold
    pre, latents, norms = parts(sae, x)
    theta, width = 0.3, 0.8
    window = np.abs(pre - theta) < width / 2
    W_dec, b_dec = np.asarray(sae.W_dec[...], np.float64), np.asarray(sae.b_dec[...], np.float64)
    to_latents = 2 * (latents @ W_dec + b_dec - x) @ W_dec.T / N  # of the squared error
    if recipe == "tanh":
        to_latents = to_latents + 0.7 * 4 * norms / np.cosh(4 * latents * norms) ** 2 / N
        direct = 3e-6 * (pre < theta) * norms / N
    else:
        direct = -0.7 * window / width / N
    to_threshold = (-theta / width * window * to_latents + direct).sum(0)
    np.testing.assert_allclose(ours, theta * to_threshold, rtol=1e-4, atol=1e-7)  # theta = exp(log_threshold)


def test_thresholds_start_where_l0_is_four_times_its_target():
    x = np.random.default_rng(0).normal(size=(500, D)).astype(np.float32)
    config = sae_config("jumprelu", D, 64, target_l0=3.0)
    state = begin(config, TrainConfig(num_activations=1000, batch_size=500), x)
    latents = np.asarray(state.sae.encode(x * state.scale))
    assert (latents != 0).sum(1).mean() == pytest.approx(12, abs=0.01)


def test_exported_thresholds_are_no_logarithms():
    sae, _ = sae_and_input("tanh")
    assert "log_threshold" not in sae.arrays()
    np.testing.assert_allclose(sae.arrays()["threshold"], 0.3, rtol=1e-6)
