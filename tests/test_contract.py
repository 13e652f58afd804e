"""The contract of every architecture: a newcomer is one line in `CASES` and inherits every test."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sae_lens
import torch
import toy

from bridge import torch_sae
from jsae import axes, dead, export, metrics, saes, train
from jsae.checkpoint import Checkpoints
from jsae.config import SAEConfig, TrainConfig
from jsae.data import ArraySource, Shuffled
from jsae.topk import Codes

CASES = {
    "topk": SAEConfig("topk", toy.D_IN, 64, k=3),
    "relu": SAEConfig("relu", toy.D_IN, 64, l1_coefficient=2.0),
    "gated": SAEConfig("gated", toy.D_IN, 64, l1_coefficient=2.0),
}
RUN = TrainConfig(num_activations=300_000, batch_size=500, learning_rate=4e-3, dead_after=20_000)
X = toy.activations(20_000)


def test_every_architecture_is_in_the_contract():
    assert set(CASES) == set(saes.ARCHITECTURES) == set(export.ARCHITECTURES)


@pytest.fixture(params=CASES)
def case(request) -> SAEConfig:
    return CASES[request.param]


def batches(config: TrainConfig = RUN, acts: np.ndarray = X) -> Shuffled:
    return Shuffled(
        ArraySource(acts), batch_size=config.batch_size, batches_per_block=20, seed=0, num_batches=config.num_steps
    )


@pytest.fixture(scope="module")
def trained() -> dict[str, tuple[train.TrainState, dict[str, float]]]:
    """One run per architecture: its last state, and the metrics of its last tenth."""
    runs = {}
    for name, config in CASES.items():
        stream, tail = batches(), None
        initial = train.init(config, RUN, stream.peek())
        for step, state, sums in train.fit(RUN, initial, stream):  # noqa: B007 - the last state is wanted
            if step > 0.9 * RUN.num_steps:
                tail = sums if tail is None else metrics.add(tail, sums)
        train.check_finite(state, tail)
        runs[name] = (state, metrics.summarize(tail))
    return runs


@pytest.fixture
def state(case, trained) -> train.TrainState:
    return trained[case.architecture][0]


def dense(latents: saes.Latents, d_sae: int) -> np.ndarray:
    return np.asarray(latents.dense(d_sae) if isinstance(latents, Codes) else latents)


def test_it_recovers_the_true_directions(case, trained):
    state, summary = trained[case.architecture]
    assert toy.recovery(np.asarray(state.sae.W_dec)) > 0.9
    assert summary["fvu"] < 0.15


def test_it_keeps_its_promise_of_l0_and_kills_few_latents(case, trained):
    state, summary = trained[case.architecture]
    if case.architecture == "topk":
        assert summary["l0"] <= case.k
    assert 1 <= summary["l0"] <= 8
    assert float((state.since_fired >= RUN.dead_after).mean()) < 0.3


def test_decoder_rows_stay_unit(state):
    np.testing.assert_allclose(np.linalg.norm(state.sae.W_dec, axis=1), 1, atol=1e-5)


def test_jit_equals_eager(case, state):
    x = jnp.asarray(X[:50]) * state.scale
    sae = state.sae
    with jax.disable_jit():
        eager = dense(sae.encode(x), case.d_sae)
    np.testing.assert_allclose(dense(jax.jit(saes.SAE.encode)(sae, x), case.d_sae), eager, rtol=1e-4, atol=1e-5)


def test_gradients_are_finite_and_reach_every_parameter(case):
    config = dataclasses.replace(case, aux_k=4)
    start = train.init(config, RUN, jnp.asarray(X[:1000]))
    is_dead = jnp.arange(case.d_sae) % 2 == 0

    def loss(sae):
        return train._loss(sae, jnp.asarray(X[:200]) * start.scale, is_dead)[0]

    gradients = jax.grad(loss)(start.sae)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(gradient).all(), path
        assert np.asarray(gradient).any(), path


def test_the_sparse_form_decodes_as_the_dense_one(case, state):
    x = jnp.asarray(X[:64]) * state.scale
    latents = state.sae.encode(x)
    by_hand = dense(latents, case.d_sae) @ np.asarray(state.sae.W_dec) + np.asarray(state.sae.b_dec)
    np.testing.assert_allclose(state.sae.decode(latents), by_hand, rtol=1e-4, atol=1e-4)


def test_latents_that_fired_are_counted_by_value(case, state):
    latents = state.sae.encode(jnp.asarray(X[:300]) * state.scale)
    expected = (dense(latents, case.d_sae) > 0).sum(0)
    np.testing.assert_array_equal(dead.times_fired(latents, case.d_sae), expected)


def test_a_checkpoint_gives_back_every_number(case, state, tmp_path):
    notes = {"cursor": {"block": 3, "batch": 1, "position": {"row": 7}}}
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(600, state, notes, fvu=0.1)
        checkpoints.wait()
        found = checkpoints.restore(jax.eval_shape(lambda: train.init(case, RUN, X[:1000])))
    assert (found.step, found.notes) == (600, notes)
    assert jax.tree.structure(found.state) == jax.tree.structure(state)
    for ours, theirs in zip(jax.tree.leaves(found.state), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_sharded_equals_whole(case):
    mesh = axes.make_mesh(latent=2)
    assert mesh.shape == {"data": 2, "latent": 2}
    whole = train.init(case, RUN, jnp.asarray(X[:2000]))
    sharded = train.place(train.init(case, RUN, jnp.asarray(X[:2000])), mesh)
    rows = jax.NamedSharding(mesh, axes.spec(("n", "d")))
    step = train.make_step(RUN, case.d_sae)
    for i in range(5):
        batch = X[500 * i : 500 * i + 500]
        whole, sums = step(whole, jnp.asarray(batch))
        sharded, sharded_sums = step(sharded, jax.device_put(batch, rows))
    for ours, theirs in zip(jax.tree.leaves(sharded), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)
    assert metrics.summarize(sharded_sums) == pytest.approx(metrics.summarize(sums), rel=1e-3)
    assert not sharded.sae.W_dec[...].sharding.is_fully_replicated


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def test_jax_torch_and_saelens_agree_on_the_export(case, state, tmp_path):
    sae = state.sae
    metadata = {"model_name": "toy", "hook_name": "blocks.0.hook_resid_post", "context_size": 8, "prepend_bos": True}
    export.write(tmp_path / "sae", case, saes.weights(sae), float(state.scale), metadata)
    ours, lens = torch_sae.load(tmp_path / "sae"), sae_lens.SAE.load_from_disk(str(tmp_path / "sae"))
    x = X[:1000]
    latents = sae.encode(jnp.asarray(x) * state.scale)
    by_jax = dense(latents, case.d_sae) / float(state.scale)
    x_hat = np.asarray(sae.decode(latents)) / float(state.scale)
    for other in (ours, lens):
        with torch.no_grad():
            encoded = other.encode(torch.from_numpy(x))
            assert relative(encoded.numpy(), by_jax) < 1e-5
            assert relative(other.decode(encoded).numpy(), x_hat) < 1e-5
            assert relative(other.forward(torch.from_numpy(x)).numpy(), x_hat) < 1e-5
    np.testing.assert_allclose(ours.W_dec.norm(dim=1), 1, atol=1e-5)
    assert lens.cfg.metadata.hook_name == "blocks.0.hook_resid_post"


def test_an_export_replaces_the_one_before_and_leaves_nothing_else(case, state, tmp_path):
    for _ in range(2):
        export.write(tmp_path / "sae", case, saes.weights(state.sae), float(state.scale), {})
    export.write_sparsity(tmp_path / "sae", np.linspace(0, 1, case.d_sae))
    assert [p.name for p in tmp_path.iterdir()] == ["sae"]
    names = {"cfg.json", "sae_weights.safetensors", "sparsity.safetensors"}
    assert {p.name for p in Path(tmp_path / "sae").iterdir()} == names


def test_resampling_renews_the_dead_and_nothing_else(case, state):
    sae, is_dead = state.sae, jnp.arange(case.d_sae) % 5 == 0
    x = jnp.asarray(X[:400]) * state.scale
    renewed, moments = dead.resample(sae, state.opt, is_dead, x, jax.random.key(3))
    gone = np.asarray(is_dead)
    for name in saes.weights(sae):
        before, after = np.asarray(getattr(sae, name)), np.asarray(getattr(renewed, name))
        if name == "b_dec":
            np.testing.assert_array_equal(after, before)
            continue
        np.testing.assert_array_equal(after[~gone], before[~gone])
        if before.ndim == 1:
            assert not after[gone].any()
    rows = np.asarray(renewed.W_dec)[gone]
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert len(np.unique(rows.round(5), axis=0)) == gone.sum()  # drawn without replacement
    adam = moments[2]
    assert not np.asarray(adam.mu.W_dec)[gone].any()
    assert np.asarray(adam.mu.W_dec)[~gone].any()
