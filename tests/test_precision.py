"""Products of rounded numbers: what is rounded, what is not, and what it costs."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsae import precision, saes, train
from jsae.config import SAEConfig, TrainConfig

D, F, N = 16, 64, 128
CASES = {
    "topk": SAEConfig("topk", D, F, k=4),
    "batchtopk": SAEConfig("batchtopk", D, F, k=4),
    "relu": SAEConfig("relu", D, F),
    "gated": SAEConfig("gated", D, F),
    "jumprelu": SAEConfig("jumprelu", D, F),
    "transcoder": SAEConfig("topk", D, F, k=4, d_out=D, skip=True),
}


def run(config: SAEConfig, dtype: str) -> tuple[train.TrainState, float]:
    """The state after 40 steps, and the last FVU."""
    how = TrainConfig(num_activations=50 * N, batch_size=N, learning_rate=5e-3, matmul_dtype=dtype)
    x = jax.random.normal(jax.random.key(0), (N, D)) @ jax.random.normal(jax.random.key(1), (D, D)) + 5
    acts = (x, x) if config.is_transcoder else x
    state = train.init(config, how, acts)
    step = train.make_step(how, F)
    for _ in range(40):
        state, sums = step(state, acts)
    return state, float(sums.squared_error / (sums.squared_norm - jnp.square(sums.total).sum() / N))


@pytest.mark.parametrize("name", CASES)
def test_rounded_products_learn_as_well_with_weights_that_are_not_rounded(name):
    exact, rounded = run(CASES[name], "float32"), run(CASES[name], "bfloat16")
    assert rounded[1] == pytest.approx(exact[1], rel=0.05)
    for weights in jax.tree.leaves((rounded[0].sae, rounded[0].opt)):
        assert weights.dtype in (jnp.float32, jnp.int32)
        if weights.ndim == 2:  # none of them is a number of eight bits
            assert not np.array_equal(weights, weights.astype(jnp.bfloat16).astype(jnp.float32))


@pytest.mark.parametrize("name", CASES)
def test_no_large_product_is_of_whole_floats_forwards_or_backwards(name):
    config = CASES[name]
    how = TrainConfig(num_activations=50 * N, batch_size=N, matmul_dtype="bfloat16")
    x = jax.random.normal(jax.random.key(0), (N, D))
    acts = (x, x) if config.is_transcoder else x
    state = jax.eval_shape(lambda: train.init(config, how, acts))
    text = jax.jit(lambda s, a: train.update(how, s, a)).lower(state, acts).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line and "batching_dims" not in line]
    sides = [re.search(r": \((tensor<\S+>), (tensor<\S+>)\)", line).groups() for line in products]
    large = [pair for pair in sides if all(re.fullmatch(r"tensor<\d+x\d+x\w+>", side) for side in pair)]
    assert large
    assert all("bf16" in side for pair in large for side in pair), large


def test_what_activations_have_in_common_does_not_cost_the_digits_that_tell_them_apart():
    """With a mean a thousand times their spread, rounding them as they are would leave nothing."""
    noise = jax.random.normal(jax.random.key(0), (N, D))
    far = jnp.full(D, 1000.0)
    sae = saes.make(CASES["relu"], key=jax.random.key(1), b_dec=far)
    exact = sae.pre_activations(noise + far)
    with precision.multiplying_in("bfloat16"):
        rounded = sae.pre_activations(noise + far)
    assert float(jnp.abs(rounded - exact).max()) < 0.03
    gradient = jax.grad(lambda sae: jnp.sin(sae.pre_activations(noise + far)).sum())
    with precision.multiplying_in("bfloat16"):
        found = gradient(sae)
    wanted = gradient(sae)
    np.testing.assert_allclose(found.b_dec[...], wanted.b_dec[...], atol=0.05 * float(jnp.abs(wanted.b_dec[...]).max()))


def test_gradients_of_a_rounded_product_are_rounded_products():
    a, b, g = (jax.random.normal(jax.random.key(i), (8, 8)) for i in range(3))
    with precision.multiplying_in("bfloat16"):
        product, pull = jax.vjp(precision.matmul, a, b)
    da, db = pull(g)
    for found, left, right in ((product, a, b), (da, g, b.T), (db, a.T, g)):
        rounded = (np.asarray(m.astype(jnp.bfloat16), np.float64) for m in (left, right))
        np.testing.assert_allclose(found, np.matmul(*rounded), rtol=1e-4, atol=1e-5)
        assert found.dtype == jnp.float32
