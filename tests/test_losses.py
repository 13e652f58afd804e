"""Every term of the loss against its definition, written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsae import auxk, losses
from jsae.architectures import Context, Forward, make, sae_config
from jsae.ops import Cpu, Input, Ops, Reference, Xla, choose

OPS: dict[str, Ops] = {"cpu": Cpu(), "xla": Xla(), "reference": Reference()}


@pytest.fixture(params=OPS)
def ops(request) -> Ops:
    return OPS[request.param]


def weights(seed: int, f: int, d: int) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(seed), 6)
    shapes = [(f, d), (f,), (f, d), (d,), (7, d), (7, d)]
    return tuple(jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))


def by_definition(x, residual, W_enc, b_enc, W_dec, b_dec, dead, tokens, lifted, power=1.0):
    e = np.asarray(residual, np.float64)
    pre = np.asarray((x - b_dec) @ W_enc.T + b_enc, np.float64)
    norm = np.linalg.norm(np.asarray(x - b_dec, np.float64), axis=1, keepdims=True)
    rank = pre if lifted else (pre - np.maximum(b_enc, 0)) / norm**power
    e_hat = np.zeros_like(e)
    for i in np.nonzero(dead)[0]:
        order = np.argsort(-rank[:, i])
        floor = pre[order[tokens], i] if lifted else 0
        for n in order[:tokens]:
            e_hat[n] += (pre[n, i] - floor) * np.asarray(W_dec[i], np.float64)
    share = np.square(e - e_hat).sum() / np.square(e - e.mean(0)).sum()
    return np.square(np.asarray(x) - np.asarray(x).mean(0)).sum(1).mean() * share if dead.any() else 0


def aux(ops, inputs, residual, W_enc, b_enc, W_dec, dead, tokens=2, step=0, **given) -> jax.Array:
    """The term as an SAE computes it, which reconstructs its input."""
    parts = auxk.decode_dead(ops, inputs, W_enc, b_enc, W_dec, dead, tokens, step, **given)
    return auxk.loss(inputs.x, residual, parts, dead)


@pytest.mark.parametrize(("lifted", "power"), [(False, 1.0), (False, 0.5), (True, 1.0)])
@pytest.mark.parametrize("n_dead", [0, 2, 5, 16])
def test_auxk_equals_its_definition_for_no_few_and_many_dead_latents(ops, n_dead, lifted, power):
    W_enc, b_enc, W_dec, b_dec, x, residual = weights(1, 16, 5)
    dead = np.arange(16) >= 16 - n_dead
    given = {"lifted": lifted, "norm_power": power}
    ours = aux(ops, Input(x, None, b_dec), residual, W_enc, b_enc, W_dec, jnp.asarray(dead), **given)
    wanted = by_definition(x, residual, W_enc, b_enc, W_dec, b_dec, dead, 2, lifted, power)
    np.testing.assert_allclose(ours, wanted, rtol=1e-4)


@pytest.mark.parametrize("lifted", [False, True])
@pytest.mark.parametrize("n_dead", [2, 9])
def test_the_gradient_of_auxk_reaches_encoder_and_decoder_of_the_dead_only_and_not_the_residual(ops, n_dead, lifted):
    W_enc, b_enc, W_dec, b_dec, x, residual = weights(2, 16, 5)
    dead = jnp.arange(16) < n_dead

    def term(residual, W_enc, W_dec):
        return aux(ops, Input(x, None, b_dec), residual, W_enc, b_enc, W_dec, dead, lifted=lifted)

    to_residual, *to_weights = jax.grad(term, (0, 1, 2))(residual, W_enc, W_dec)
    assert not np.asarray(to_residual).any()
    for gradient in to_weights:
        assert np.isfinite(gradient).all()
        assert np.asarray(gradient[:n_dead]).any(1).all()  # every dead latent has tokens
        assert not np.asarray(gradient[n_dead:]).any()


def test_dead_latents_select_tokens_by_direction_not_by_norm_and_never_a_token_that_is_zero(ops):
    """By pre-activation the token of great norm would be the largest, and with a positive bias the zero one too."""
    along = jnp.array([3.0, 0.0])
    x = jnp.stack([along, jnp.array([4.0, 12.0]), -along, 0 * along, 1e-12 * along])
    W, b_enc, b_dec = jnp.array([[1.0, 0.0]]), jnp.array([0.5]), jnp.array([0.3, -0.7])
    inputs = Input((x + b_dec) / 0.7, jnp.float32(0.7), b_dec)
    largest, others = auxk.decode_dead(ops, inputs, W, b_enc, W, jnp.ones(1, bool), 1, 0)
    np.testing.assert_array_equal(np.asarray(largest[:, 0]) != 0, [True, False, False, False, False])
    assert not np.asarray(others).any()


@pytest.mark.parametrize(("name", "chosen"), [("topk", 0), ("abstopk", 0), ("batchtopk", 1), ("matryoshka", 1)])
def test_a_token_of_great_norm_teaches_dead_latents_only_where_tokens_compete(name, chosen):
    """The first token has the dead latent's direction; the second is ten times as long and 60 degrees off."""
    x = jnp.array([[1.0, 0.0], [5.0, 75**0.5]])
    config = sae_config(name, 2, 4, k=1, **({"nested_widths": (2,)} if name == "matryoshka" else {}))
    sae = make(config, key=jax.random.key(0))
    sae.W_enc[...] = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    context = Context(choose(), training=True, dead=jnp.arange(4) == 0, step=1)
    latents, extra = sae.activate(x, context)
    error = sae.decode(latents, x, context.ops) - x

    def term(sae):
        return sae.of_dead(Forward(x, x, error, latents, extra, context))

    gradient = np.asarray(jax.grad(term)(sae).W_enc[...][0])
    direction = np.asarray(x[chosen] / jnp.linalg.norm(x[chosen]))
    assert np.linalg.norm(gradient) > 0
    np.testing.assert_allclose(abs(gradient @ direction), np.linalg.norm(gradient), rtol=1e-5)


def test_auxk_and_the_squared_error_keep_their_ratio_where_activations_are_scaled(ops):
    W_enc, b_enc, W_dec, b_dec, x, residual = weights(4, 16, 5)
    dead = jnp.arange(16) < 6

    def terms(factor):
        inputs = Input(factor * x, None, factor * b_dec)
        term = aux(ops, inputs, factor * residual, W_enc, factor * b_enc, W_dec, dead)
        return term / losses.mean_square(factor * residual)

    np.testing.assert_allclose(terms(1.0), terms(7.0), rtol=1e-4)


def test_auxk_of_a_residual_that_is_zero_is_zero_with_a_finite_gradient(ops):
    W_enc, b_enc, W_dec, b_dec, x, residual = weights(3, 16, 5)

    def term(W_dec):
        return aux(ops, Input(x, None, b_dec), residual * 0, W_enc, b_enc, W_dec, jnp.ones(16, bool))

    value, gradient = jax.value_and_grad(term)(W_dec)
    assert float(value) == 0
    assert np.isfinite(gradient).all()


def test_the_largest_dead_latent_of_a_token_learns_its_residual_alone_and_the_others_what_it_leaves(ops):
    x, residual = jnp.array([[2.0, 0.0], [0.0, 1.0]]), jnp.array([[1.0, 0.5], [0.0, 0.0]])
    W_enc = jnp.array([[0.5, 0.1], [0.7, 0.0], [0.6, -0.2], [0.0, 1.0]])  # the first three choose the first token
    W_dec = jnp.array([[0.6, 0.8], [1.0, 0.0], [0.8, -0.6], [0.0, 1.0]])

    def gradient(dead, **given):
        def term(W_enc):
            return aux(ops, Input(x), residual, W_enc, jnp.zeros(4), W_dec, jnp.asarray(dead), tokens=1, **given)

        return np.asarray(jax.grad(term)(W_enc))

    def together(W_enc):
        return jnp.square(residual[0] - (W_enc[:3] @ x[0]) @ W_dec[:3]).sum()

    alone, three = gradient([False, True, False, False]), gradient([True, True, True, False])
    np.testing.assert_allclose(three[1], alone[1], rtol=1e-5)
    shared = np.asarray(jax.grad(together)(W_enc))
    unit = alone[1, 0] / (-2 * 2 * float(residual[0, 0] - W_enc[1] @ x[0]))  # what both are multiplied by
    np.testing.assert_allclose(three[[0, 2]], unit * shared[[0, 2]], rtol=1e-4, atol=1e-6)
    assert abs(three[1, 0] - unit * shared[1, 0]) > 0.1


@pytest.mark.parametrize("n_dead", [3, 130, 700, 1200])
def test_all_dead_latents_have_a_turn_within_a_few_steps_however_many_they_are(n_dead):
    f, d, n = 1200, 4, 32
    keys = jax.random.split(jax.random.key(5), 4)
    W_enc, W_dec, x, residual = (
        jax.random.normal(key, s) for key, s in zip(keys, [(f, d), (f, d), (n, d), (n, d)], strict=True)
    )
    dead = jnp.zeros(f, bool).at[jax.random.permutation(jax.random.key(6), f)[:n_dead]].set(True)

    @jax.jit
    def gradient(step):
        return jax.grad(lambda W: aux(Cpu(), Input(x), residual, W_enc, jnp.zeros(f), W, dead, step=step))(W_dec)

    reached = [np.asarray(gradient(step)).any(1) for step in range(1, 5)]
    for some in reached:
        assert min(n_dead, auxk.room(f)) == some.sum() or n_dead > auxk.room(f) == some.sum()
        assert not some[~np.asarray(dead)].any()
    np.testing.assert_array_equal(np.any(reached, axis=0), dead)


def test_an_average_latent_fires_on_its_share_of_the_tokens():
    assert auxk.tokens_of(2048, 32.0, 1024) == 64
    assert auxk.tokens_of(8, 1.0, 4096) == 1
    assert auxk.tokens_of(8, 64.0, 64) == 8


def test_a_lifted_latent_learns_from_few_tokens_where_many_are_active():
    assert auxk.tokens_of(512, 5.0, 256, lifted=True) == 10, "an average latent's"
    assert auxk.tokens_of(512, 80.0, 1024, lifted=True) == 5, "as with an L0 of 10"
    assert auxk.tokens_of(512, 128.0, 4096, lifted=True) == 4, "at least 4 ..."
    assert auxk.tokens_of(512, 16.0, 4096, lifted=True) == 2, "... but not more than an average latent"


def test_l1_weighs_latents_by_their_decoder_norm():
    latents, W_dec = jnp.array([[1.0, 2.0], [0.0, 4.0]]), jnp.array([[3.0, 4.0], [0.0, 1.0]])
    assert float(losses.l1(latents.mean(0), W_dec)) == pytest.approx((1 * 5 + 2 * 1 + 0 + 4 * 1) / 2)


def test_squared_error_sums_over_width_and_averages_over_tokens():
    x, x_hat = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[0.0, 0.0], [3.0, 3.0]])
    assert float(losses.squared_error(x, x_hat)) == pytest.approx((1 + 4 + 0 + 1) / 2)
