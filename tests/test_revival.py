"""The losses of dead latents: the pull of pre-activations up to thresholds, and AuxK of dense architectures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from alone import begin, fit

from jsae import step
from jsae.architectures import SAE, Context, Forward, make, sae_config
from jsae.config import TrainConfig
from jsae.ops import choose

D, F, N = 8, 24, 64
ARCHITECTURES = {
    "relu": {},
    "gated": {},
    "jumprelu": {},
    "counted": {"jump_recipe": "l0"},
}
RUN = TrainConfig(num_activations=200 * N, batch_size=N, learning_rate=0.03, dead_after=N)


def sae_of(name: str, d_sae: int = F, **settings) -> SAE:
    config = sae_config(name.replace("counted", "jumprelu"), D, d_sae, **ARCHITECTURES[name], **settings)
    sae = make(config, key=jax.random.key(0))
    sae.W_enc[...] *= 0.3
    if name == "gated":
        sae.b_gate[...] = jax.random.normal(jax.random.key(2), (d_sae,)) / 9
    return sae


def x(seed: int = 1) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (N, D))


def loss(sae: SAE, dead: np.ndarray | None) -> jax.Array:
    mask = None if dead is None else jnp.asarray(dead)
    return step.loss_of(sae, x(), x(), Context(choose(), training=True, dead=mask))[0]


def below_thresholds(sae: SAE) -> np.ndarray:
    """How far every pre-activation is below its threshold on average, by definition."""
    h = (np.asarray(x(), np.float64) - np.asarray(sae.b_dec[...])) @ np.asarray(sae.W_enc[...]).T
    if sae.name == "gated":
        threshold = -np.asarray(sae.b_gate[...])
    elif sae.name == "jumprelu":
        threshold = np.asarray(sae.threshold) - np.asarray(sae.b_enc[...])
    else:
        threshold = -np.asarray(sae.b_enc[...])
    return np.maximum(threshold - h, 0).mean(0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_loss_of_dead_latents_is_how_far_they_are_below_their_thresholds(name):
    sae, dead = sae_of(name, revival_coefficient=0.5), np.arange(F) % 3 == 0
    expected = 0.5 * below_thresholds(sae)[dead].sum()
    assert expected > 0.1
    added = loss(sae, dead) - loss(sae, np.zeros(F, bool))
    np.testing.assert_allclose(added, expected, rtol=2e-4)
    assert loss(sae, None) == loss(sae, np.zeros(F, bool))


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(("d_sae", "gated_share"), [(60, 1 / 3), (240, 0.3)], ids=["a_sixtieth", "a_240th"])
def test_few_dead_latents_of_gated_are_pulled_less(name, d_sae, gated_share):
    sae, dead = sae_of(name, d_sae=d_sae, revival_coefficient=5.0), np.arange(d_sae) == 7
    expected = 5 * below_thresholds(sae)[7] * (gated_share if name == "gated" else 1)
    assert expected > 0.01
    added = loss(sae, dead) - loss(sae, np.zeros(d_sae, bool))
    np.testing.assert_allclose(added, expected, rtol=1e-2)  # a difference of sums in float32


@pytest.mark.parametrize(
    ("d_sae", "l0", "weight"), [(24, 0.5, 1.5), (24, 0.25, 3), (24, 0.125, 4), (24, 0.0625, 4), (12, 0.5, 1)]
)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_auxk_of_relu_and_jumprelu_is_heavier_where_latents_fire_rarely(name, d_sae, l0, weight):
    def auxk(target_l0: float) -> float:
        sae = sae_of(name, d_sae=d_sae, target_l0=target_l0)
        context = Context(choose(), training=True, dead=jnp.arange(d_sae) % 3 == 0, step=1)
        latents, extra = sae.activate(x(), context)
        error = sae.decode(latents, x(), context.ops) - x()
        return float(sae.loss_of_dead(Forward(x(), x(), error, latents, extra, context)))

    assert auxk(l0) > 0.01
    expected = weight / max(d_sae / 32 / 0.5, 1) if name != "gated" else 1
    np.testing.assert_allclose(auxk(l0) / auxk(0.5), expected, rtol=1e-3)  # both L0s are one token per dead latent


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_its_gradient_reaches_the_encoder_of_the_dead_alone_and_no_decoder(name):
    sae, dead = sae_of(name, revival_coefficient=0.5), np.arange(F) < 5
    with_dead, without = (jax.grad(lambda sae, mask=mask: loss(sae, mask))(sae) for mask in (dead, np.zeros(F, bool)))
    change = jax.tree.map(lambda a, b: np.abs(a - b), with_dead, without)
    assert change.W_enc[...][dead].max() > 1e-3
    assert change.W_enc[...][~dead].max() < 1e-6
    assert change.W_dec[...].max() < 1e-6


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_latents_that_never_fire_come_back(name):
    """Latents whose bias is far too low fire again after a short run by the pull alone, and do not without it."""
    dead = np.arange(F) < 6
    fired = {}
    for coefficient in (0.0, 0.5):
        config = sae_of(name, revival_coefficient=coefficient, aux_coefficient=0.0).config
        state = begin(config, RUN, x())
        bias = "b_gate" if name == "gated" else "b_enc"
        array = getattr(state.sae, bias)
        array[...] = jnp.where(dead, -4.0, array[...])
        batches = [x(seed) for seed in range(2, 202)]
        for _, now, sums in fit(config, RUN, state, batches):
            last, state = sums, now
        fired[coefficient] = float((np.asarray(state.since_fired)[dead] < 20 * N).mean())
        assert np.isfinite(last.loss)
    assert fired[0.0] < 0.2
    assert fired[0.5] > 0.8


def test_a_latent_is_dead_after_a_share_of_the_run_or_after_the_given_time():
    def window(num_activations: int, **given) -> int:
        return TrainConfig(num_activations=num_activations, batch_size=1, **given).dead_window

    assert window(1_000_000) == 10 * window(100_000) > 0
    assert window(2 * 10**9) == 10_000_000, "as in Gao et al. 2024"
    assert window(1) == 1
    assert window(1_000_000, dead_after=77) == 77


@pytest.mark.parametrize(("n", "every"), [(510, 1), (512, 1), (1024, 2), (1536, 1), (2048, 4), (8192, 4)])
def test_auxk_is_estimated_from_a_part_of_a_large_batch(n, every):
    acts = jax.random.normal(jax.random.key(4), (n, D))
    config = sae_config("relu", D, F, aux_coefficient=0.5, revival_coefficient=0.0)
    run = TrainConfig(num_activations=200 * n, batch_size=n, learning_rate=0.03, dead_after=1)
    state = begin(config, run, acts)._replace(since_fired=jnp.arange(F) % 4)  # all but a quarter are dead

    def loss_of_step(since_fired):
        after = jax.jit(lambda state: step.update(run, choose(), state, acts))(state._replace(since_fired=since_fired))
        return float(after[1].loss / n)

    part = acts[::every]
    context = Context(choose(), training=True, dead=state.since_fired >= 1, scale=state.scale, step=1)
    latents, extra = state.sae.activate(part, context)
    error = state.sae.decode(latents, part * state.scale, context.ops) - part * state.scale
    expected = state.sae.loss_of_dead(Forward(part, part * state.scale, error, latents, extra, context))
    assert float(expected) > 0.1
    added = loss_of_step(state.since_fired) - loss_of_step(jnp.zeros(F, jnp.int32))
    np.testing.assert_allclose(added, expected, rtol=1e-3)
