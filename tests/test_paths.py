"""Every way through a step gives the numbers of the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsae import codes, optim, paths, saes, train
from jsae.config import SAEConfig, TrainConfig
from jsae.paths import Paths

D, F, N = 16, 96, 60
PIECES = Paths(chunk=20 * F, least=2, tokens=20, block=24 * D, sorts=4, decode="by part", gradients="sorted")
PLAIN = paths.WAYS["plain"]
WAYS = {"in pieces": PIECES, "gpu": paths.GPU, "dense": paths.WAYS["dense"]}
SPARSE = {
    "topk": SAEConfig("topk", D, F, k=4, aux_k=5),
    "batchtopk": SAEConfig("batchtopk", D, F, k=4, aux_k=5),
    "matryoshka": SAEConfig("matryoshka", D, F, k=4, nested_widths=(24,), aux_k=5),
    "abstopk": SAEConfig("abstopk", D, F, k=4, aux_k=5),
    "transcoder": SAEConfig("topk", D, F, k=4, aux_k=5, d_out=8),
}
DENSE = {
    "relu": SAEConfig("relu", D, F, l1_coefficient=0.1),
    "gated": SAEConfig("gated", D, F, l1_coefficient=0.1),
    "jumprelu": SAEConfig("jumprelu", D, F, l0_coefficient=0.01, jump_recipe="l0", bandwidth=0.5),
    "controlled": SAEConfig("jumprelu", D, F, target_l0=5.0),
    "crosscoder": SAEConfig("relu", D, F, l1_coefficient=0.1, layers=2),
}


def steps(config: SAEConfig, way: Paths) -> tuple[train.TrainState, list]:
    """The state after three steps, the last two of which have dead latents, and their sums."""
    how = TrainConfig(num_activations=50 * N, batch_size=N, learning_rate=1e-2, dead_after=1)
    x = jax.random.normal(jax.random.key(0), (3, N, D)) + 0.2
    batches = list(x) if config.layers == 1 else [tuple(jnp.split(batch, config.layers, axis=1)) for batch in x]
    with paths.force(way):
        state = train.init(config, how, batches[0])
        step, seen = jax.jit(lambda state, acts: train.update(how, state, acts)), []
        for batch in batches:
            state, sums = step(state, batch)
            seen.append(sums)
    return state, seen


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", *DENSE])
def test_a_step_in_pieces_is_the_step_as_a_whole(architecture):
    config = (SPARSE | DENSE)[architecture]
    plain, wanted = steps(config, PLAIN)
    state, found = steps(config, PIECES)
    for ours, theirs in zip(jax.tree.leaves((state.sae, found)), jax.tree.leaves((plain.sae, wanted)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-5)
    np.testing.assert_array_equal(state.since_fired, plain.since_fired)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("architecture", SPARSE)
def test_gradients_are_the_same_on_every_way(architecture, way):
    config = SPARSE[architecture]
    sae = saes.make(config, key=jax.random.key(1))
    x = jax.random.normal(jax.random.key(2), (N, D))
    y = x[:, :8] if config.is_transcoder else x

    def gradients(way: Paths) -> list[jax.Array]:
        now = saes.Now(jnp.float32(1), jnp.arange(F) % 3 == 0)
        with paths.force(way):
            return jax.tree.leaves(jax.jit(jax.grad(lambda sae: train._loss(sae, x, y, now)[0]))(sae))

    plain = gradients(PLAIN)
    largest = max(float(jnp.abs(g).max()) for g in plain)
    for ours, theirs in zip(gradients(WAYS[way]), plain, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6 * largest)


def test_latents_are_put_in_order_where_number_and_place_fit_no_word_too():
    indices = jax.random.randint(jax.random.key(0), (500,), 0, F)
    short = codes._order(indices, F)
    long = codes._order(indices, 2**32 // 500 + 1)  # as if of so many latents
    np.testing.assert_array_equal(indices[short], np.sort(indices))
    np.testing.assert_array_equal(short, long)


def test_the_optimiser_overwrites_blocks_without_an_array_of_all():
    """What a step needs beside weights, moments and gradients is a few blocks, whatever the number of latents."""
    config, d, f = TrainConfig(num_activations=2**20), 64, 8192
    sae = jax.eval_shape(lambda: saes.make(SAEConfig("topk", d, f), key=jax.random.key(0)))
    moments = jax.eval_shape(optim.optimizer(config, f).init, sae)

    def planned(way: Paths) -> int:
        def step(params, state, grads):
            return optim.apply(config, f, grads, state, params)

        with paths.force(way):
            return (
                jax.jit(step, donate_argnums=(0, 1))
                .lower(sae, moments, sae)
                .compile()
                .memory_analysis()
                .temp_size_in_bytes
            )

    block = 2**15
    assert planned(paths.CPU._replace(block=block)) < 8 * 4 * block
    assert planned(PLAIN) >= 4 * d * f


def test_the_device_decides_unless_a_way_is_forced():
    assert paths.chosen() == paths.CPU
    with paths.force(paths.GPU):
        assert paths.chosen() == paths.forced() == paths.GPU
    assert paths.forced() is None


@pytest.mark.parametrize(("whole", "most", "part"), [(6144, 341, 256), (100, 100, 100), (97, 50, 97), (96, 12, 12)])
def test_parts_are_of_one_size_or_the_whole(whole, most, part):
    assert paths.part_of(whole, most) == part
