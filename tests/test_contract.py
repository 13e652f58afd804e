"""The contract of every architecture: a newcomer is one line in `CASES` and inherits every test."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sae_lens
import torch
import toy
from alone import begin, fit, stepping

from bridge import torch_sae
from jsae import axes, dead, export, metrics, step, train
from jsae.architectures import ARCHITECTURES, Context, SAEConfig, sae_config
from jsae.checkpoint import Checkpoints
from jsae.config import TrainConfig
from jsae.data import ArraySource, Shuffled
from jsae.ops import Codes, Latents, choose
from jsae.state import Acts, TrainState, input_and_target, shard

D, F = toy.D_IN, 64
CASES = {
    "topk": sae_config("topk", D, F, k=3),
    "batchtopk": sae_config("batchtopk", D, F, k=3),
    "matryoshka": sae_config("matryoshka", D, F, k=3, nested_widths=(52,)),
    "abstopk": sae_config("abstopk", D, F, k=3),
    "relu": sae_config("relu", D, F, l1_coefficient=2.0),
    "gated": sae_config("gated", D, F, l1_coefficient=2.0, target_l0=2.5),
    "jumprelu": sae_config("jumprelu", D, F, l0_coefficient=0.5, target_l0=2.0),
    "jumprelu_l0": sae_config("jumprelu", D, F, l0_coefficient=0.5, jump_recipe="l0", target_l0=2.0),
    "transcoder": sae_config("relu", D, F, l1_coefficient=1.0, d_out=toy.D_OUT),
    "skip_transcoder": sae_config("batchtopk", D, F, k=3, d_out=toy.D_OUT, skip=True),
    "crosscoder": sae_config("batchtopk", 2 * D, F, k=3, layers=2),
}
SHARDED = ("topk", "batchtopk", "relu", "gated", "jumprelu", "skip_transcoder")
N, BLOCK = 500, 10_000
RUN = TrainConfig(num_activations=300_000, batch_size=N, learning_rate=4e-3, dead_after=20_000)


def test_every_architecture_is_in_the_contract():
    assert {c.architecture for c in CASES.values()} == set(ARCHITECTURES)


@functools.cache
def world(d_out: int | None, layers: int) -> toy.World:
    return toy.world(20_000, d_out, layers)


def world_of(config: SAEConfig) -> toy.World:
    return world(config.d_out, config.layers)


def rows(config: SAEConfig, start: int, stop: int) -> Acts:
    """Some activations, as a training step gets them."""
    acts = tuple(jnp.asarray(a[start:stop]) for a in world_of(config).acts)
    return acts if len(acts) > 1 else acts[0]


def begun(config: SAEConfig) -> TrainState:
    """The state before the first step, on as many activations everywhere: it is compiled once."""
    return begin(config, RUN, rows(config, 0, BLOCK))


def scaled(config: SAEConfig, state: TrainState) -> tuple[jax.Array, jax.Array]:
    """A batch as the SAE knows it: what is read, and what is to be made of it."""
    x, y = input_and_target(config, rows(config, 0, N))
    return x * state.scale, y * state.scale_out


OPS = choose()
activate = jax.jit(lambda sae, x: sae.activate(x, Context(OPS, training=True))[0])
encode = jax.jit(lambda sae, x: sae.encode(x, OPS))
decode = jax.jit(lambda sae, latents, x: sae.decode(latents, x, OPS))


@pytest.fixture(scope="module")
def trained() -> dict[str, tuple[TrainState, dict[str, float]]]:
    """One run per case: its last state, and the metrics of its last tenth."""
    runs = {}
    for name, config in CASES.items():
        source = ArraySource(*world_of(config).acts)
        batches = BLOCK // N
        stream = Shuffled(source, batch_size=N, batches_per_block=batches, seed=0, num_batches=RUN.num_steps)
        initial, tail = begin(config, RUN, stream.peek()), None
        for number, state, sums in fit(config, RUN, initial, stream):  # noqa: B007 - the last state is wanted
            if number > 0.9 * RUN.num_steps:
                tail = sums if tail is None else metrics.add(tail, sums)
        train.check_finite(state, tail)
        runs[name] = (state, metrics.summarize(tail))
    return runs


@pytest.fixture(params=CASES)
def name(request) -> str:
    return request.param


@pytest.fixture
def case(name) -> SAEConfig:
    return CASES[name]


@pytest.fixture
def state(name, trained) -> TrainState:
    return trained[name][0]


def scales(state: TrainState) -> tuple[np.ndarray, np.ndarray]:
    """Of what is read and what is made, for the export."""
    return np.asarray(state.scale), np.asarray(state.scale_out)


def dense(latents: Latents) -> np.ndarray:
    return np.asarray(latents.dense(N, F) if isinstance(latents, Codes) else latents)


def test_it_recovers_the_true_directions(name, case, trained):
    state, summary = trained[name]
    world, weights = world_of(case), state.sae.arrays()
    truth = world.beside(weights["W_skip"] * state.scale / state.scale_out) if case.skip else world.truth
    signed = case.architecture != "abstopk"
    assert toy.recovery(weights["W_dec"], truth, signed) > 0.9
    assert summary["fvu"] < 0.15


def test_it_keeps_its_promise_of_l0_and_kills_few_latents(name, case, trained):
    state, summary = trained[name]
    if case.architecture in ("topk", "batchtopk", "matryoshka", "abstopk"):
        assert summary["l0"] <= case.k
    if case.target_l0 is not None:
        assert summary["l0"] == pytest.approx(case.target_l0, rel=0.05)
    assert 1 <= summary["l0"] <= 8
    assert float((state.since_fired >= RUN.dead_after).mean()) < 0.3


def test_decoder_rows_stay_unit(state):
    np.testing.assert_allclose(np.linalg.norm(state.sae.W_dec, axis=1), 1, atol=1e-5)


def test_jit_equals_eager(case, state):
    x, _ = scaled(case, state)
    with jax.disable_jit():
        eager = dense(state.sae.encode(x, OPS))
    compiled = dense(encode(state.sae, x))
    np.testing.assert_allclose(compiled, eager, rtol=1e-4, atol=1e-5)


def test_gradients_are_finite_and_reach_every_parameter(case):
    start = begun(case)
    context = Context(OPS, training=True, dead=jnp.arange(F) % 2 == 0)
    x, y = scaled(case, start)
    gradients = jax.jit(jax.grad(lambda sae: step.loss_of(sae, x, y, context)[0]))(start.sae)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(gradient).all(), path
        assert np.asarray(gradient).any() or "threshold" in str(path), path


def test_the_sparse_form_decodes_as_the_dense_one(case, state):
    x, _ = scaled(case, state)
    latents = activate(state.sae, x)
    weights = state.sae.arrays()
    by_hand = dense(latents) @ weights["W_dec"] + weights["b_dec"]
    if case.skip:
        by_hand = by_hand + np.asarray(x) @ weights["W_skip"].T
    np.testing.assert_allclose(decode(state.sae, latents, x), by_hand, rtol=1e-4, atol=1e-4)


def test_latents_that_fired_are_counted_by_value(case, state):
    latents = activate(state.sae, scaled(case, state)[0])
    expected = (dense(latents) != 0).sum(0)
    np.testing.assert_array_equal(dead.times_fired(latents, F), expected)


def test_a_checkpoint_gives_back_every_number(case, state, tmp_path):
    notes = {"cursor": {"block": 3, "batch": 1, "position": {"row": 7}}}
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(600, (state,), notes, fvu=0.1)
        checkpoints.wait()
        found = checkpoints.restore(jax.eval_shape(lambda: (begun(case),)))
    assert (found.step, found.notes) == (600, notes)
    assert jax.tree.structure(found.states) == jax.tree.structure((state,))
    for ours, theirs in zip(jax.tree.leaves(found.states), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", SHARDED)
def test_sharded_equals_whole(name, case):
    mesh = axes.make_mesh(latent=2)
    assert mesh.shape == {"data": 2, "latent": 2}
    whole, sharded = begun(case), begun(case)
    sharded = shard(sharded, mesh)
    cut = jax.NamedSharding(mesh, axes.spec(("n", "d")))
    program = stepping(case, RUN)
    for i in range(5):
        batch = rows(case, N * i, N * (i + 1))
        whole, sums = program(whole, batch)
        sharded, sharded_sums = program(sharded, jax.device_put(batch, cut))
    for ours, theirs in zip(jax.tree.leaves(sharded), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)
    assert metrics.summarize(sharded_sums) == pytest.approx(metrics.summarize(sums), rel=1e-3)
    assert not sharded.sae.W_dec[...].sharding.is_fully_replicated


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def test_jax_torch_and_saelens_agree_on_the_export(name, case, state, tmp_path):
    """But for a crosscoder, whose layout is this project's own; test_export.py works out its files by hand."""
    sae = state.sae
    metadata = {"model_name": "toy", "hook_name": "blocks.0.hook_resid_post", "context_size": 8, "prepend_bos": True}
    export.write(tmp_path / "sae", case, sae.arrays(), *scales(state), metadata)
    readers = [torch_sae.load(tmp_path / "sae")]
    if case.layers == 1:
        readers.append(sae_lens.SAE.load_from_disk(str(tmp_path / "sae")))
        assert readers[-1].cfg.metadata.hook_name == "blocks.0.hook_resid_post"
    x, _ = scaled(case, state)
    latents = encode(sae, x)
    norms = np.linalg.norm(np.asarray(sae.W_dec) / state.scale_out, axis=1)  # which go into the latents
    by_jax, y_hat = dense(latents) * norms, np.asarray(decode(sae, latents, x)) / state.scale_out
    raw = torch.from_numpy(np.asarray(x) / np.asarray(state.scale))
    for reader in readers:
        with torch.no_grad():
            encoded = reader.encode(raw)
            assert relative(encoded.numpy(), by_jax) < 1e-5
            assert relative(reader.forward(raw).numpy(), y_hat) < 1e-5
            if not case.skip:
                assert relative(reader.decode(encoded).numpy(), y_hat) < 1e-5
    np.testing.assert_allclose(readers[0].W_dec.norm(dim=1), 1, atol=1e-5)


def test_an_export_replaces_the_one_before_and_leaves_nothing_else(case, state, tmp_path):
    for _ in range(2):
        export.write(tmp_path / "sae", case, state.sae.arrays(), *scales(state), {})
    export.write_sparsity(tmp_path / "sae", np.linspace(0, 1, case.d_sae))
    assert [p.name for p in tmp_path.iterdir()] == ["sae"]
    names = {"cfg.json", "sae_weights.safetensors", "sparsity.safetensors"}
    assert {p.name for p in Path(tmp_path / "sae").iterdir()} == names


def test_resampling_renews_the_dead_and_nothing_else(case, state):
    sae, is_dead = state.sae, jnp.arange(F) % 5 == 0
    x, y = scaled(case, state)
    renewed, moments = dead.resample(sae, state.opt, is_dead, x, y, jax.random.key(3), OPS)
    gone = np.asarray(is_dead)
    start = sae.initial_latents(case)
    for name in ("W_enc", "W_dec", *start):
        before, after = np.asarray(getattr(sae, name)), np.asarray(getattr(renewed, name))
        np.testing.assert_array_equal(after[~gone], before[~gone])
        if name in start:
            np.testing.assert_allclose(after[gone], start[name], rtol=1e-6)
    np.testing.assert_array_equal(renewed.b_dec, sae.b_dec)
    directions = np.asarray(renewed.W_dec)[gone]
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1, atol=1e-5)
    assert len(np.unique(directions.round(5), axis=0)) == gone.sum()  # drawn without replacement
    assert not np.asarray(moments.mu.W_dec)[gone].any()
    assert np.asarray(moments.mu.W_dec)[~gone].any()
