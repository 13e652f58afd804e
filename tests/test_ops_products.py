"""Products of rounded numbers: what is rounded, what is not, and what it costs."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementations import ALL

from jsae import loop, step
from jsae import state as states
from jsae.architectures import Context, SAEConfig, make, sae_config
from jsae.config import TrainConfig
from jsae.ops import Cpu, choose

pytestmark = pytest.mark.usefixtures("quickly_compiled")
D, F, N = 16, 64, 128
STEPS, BATCHES = 80, 32
CASES = {
    "topk": sae_config("topk", D, F, k=4),
    "batchtopk": sae_config("batchtopk", D, F, k=4),
    "relu": sae_config("relu", D, F, l1_coefficient=0.5),
    "gated": sae_config("gated", D, F, l1_coefficient=0.5),
    "jumprelu": sae_config("jumprelu", D, F, l0_coefficient=0.1),
    "transcoder": sae_config("topk", D, F, k=4, d_out=D, skip=True),
}


def run(config: SAEConfig, dtype: str) -> tuple[states.TrainState, float]:
    """Return the first state after all steps, and the mean of the last FVUs on all batches.

    The mean is taken because a choice of latents that rounding turns over changes one run by more
    than what is to be measured: FVUs of single runs differ by 15 %, and in both directions. What
    differs is the batch, not the seed of the SAE: a new seed would be compiled anew.
    """
    how = TrainConfig(num_activations=(STEPS + 10) * N, batch_size=N, learning_rate=5e-3, matmul_dtype=dtype)
    member = loop.Member(config, how)
    programs, states_of, fvu = loop.Programs([member]), [], []
    for key in jax.random.split(jax.random.key(0), BATCHES):
        of_tokens, of_dims = jax.random.split(key)
        x = jax.random.normal(of_tokens, (N, D)) @ jax.random.normal(of_dims, (D, D)) / 4 + 1
        acts = (x, x) if config.is_transcoder else x
        state = loop.init([member], [acts])
        for number in range(1, STEPS + 1):
            state, (sums,) = programs.at(number)(state, [acts])
        states_of.append(state[0])
        fvu.append(sums.squared_error / (sums.squared_norm - jnp.square(sums.total).sum() / N))
    return states_of[0], float(np.mean(fvu))


@pytest.mark.parametrize("name", CASES)
def test_rounded_products_learn_as_well_with_weights_that_are_not_rounded(name):
    exact, rounded = run(CASES[name], "float32"), run(CASES[name], "bfloat16")
    assert exact[1] < 0.8  # it has learnt something that rounding could spoil
    assert rounded[1] == pytest.approx(exact[1], rel=0.05)
    for weights in jax.tree.leaves((rounded[0].sae, rounded[0].opt)):
        assert weights.dtype in (jnp.float32, jnp.int32)
        if weights.ndim == 2:  # none of them is a number of eight bits
            assert not np.array_equal(weights, weights.astype(jnp.bfloat16).astype(jnp.float32))


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("name", CASES)
def test_no_large_product_is_of_whole_floats_forwards_or_backwards(name, platform):
    config, ops = CASES[name], choose("bfloat16", platform)
    how = TrainConfig(num_activations=50 * N, batch_size=N, matmul_dtype="bfloat16")
    x = jax.random.normal(jax.random.key(0), (N, D))
    acts = (x, x) if config.is_transcoder else x
    state = jax.eval_shape(lambda: states.init(config, how, ops, acts))
    text = jax.jit(lambda s, a: step.update(how, ops, s, a)).lower(state, acts).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line and "batching_dims" not in line]
    sides = [re.search(r": \((tensor<\S+>), (tensor<\S+>)\)", line).groups() for line in products]
    large = [pair for pair in sides if all(re.fullmatch(r"tensor<\d+x\d+x\w+>", side) for side in pair)]
    assert large
    assert all("bf16" in side for pair in large for side in pair), large


@pytest.mark.parametrize("name", ALL)
def test_what_activations_have_in_common_does_not_cost_the_digits_that_tell_them_apart(name):
    """With a mean a thousand times their spread, rounding them as they are would leave nothing."""
    noise = jax.random.normal(jax.random.key(0), (N, D))
    far = jnp.full(D, 1000.0)
    sae = make(CASES["relu"], key=jax.random.key(1), b_dec=far)
    exactly, roundly = (Context(dataclasses.replace(ALL[name], matmul_dtype=d)) for d in ("float32", "bfloat16"))
    exact, rounded = (sae.pre_activations(noise + far, context) for context in (exactly, roundly))
    assert float(jnp.abs(rounded - exact).max()) < 0.03
    assert not np.array_equal(rounded, exact)

    def gradient(context: Context) -> jax.Array:
        return jax.grad(lambda sae: jnp.sin(sae.pre_activations(noise + far, context)).sum())(sae).b_dec[...]

    found, wanted = gradient(roundly), gradient(exactly)
    np.testing.assert_allclose(found, wanted, atol=0.05 * float(jnp.abs(wanted).max()))


def test_gradients_of_a_rounded_product_are_rounded_products():
    a, b, g = (jax.random.normal(jax.random.key(i), (8, 8)) for i in range(3))
    product, pull = jax.vjp(Cpu("bfloat16").matmul, a, b)
    da, db = pull(g)
    for found, left, right in ((product, a, b), (da, g, b.T), (db, a.T, g)):
        rounded = (np.asarray(m.astype(jnp.bfloat16), np.float64) for m in (left, right))
        np.testing.assert_allclose(found, np.matmul(*rounded), rtol=1e-4, atol=1e-5)
        assert found.dtype == jnp.float32
