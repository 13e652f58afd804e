"""HierarchicalTopK: its loss and gradients against the formula, its settings, and what it is for."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsae
from bridge.training.config import RunConfig
from jsae import pretrained
from jsae.architectures import Context, make, sae_config
from jsae.config import TrainConfig
from jsae.ops import Reference, choose
from jsae.pretrained import details
from jsae.settings import ConfigError
from jsae.step import loss_of

pytestmark = pytest.mark.usefixtures("quickly_compiled")
D, F, N, K, INNER = 8, 32, 64, 6, (1, 2, 4)


def drawn(config, seed: int = 0):
    random = np.random.default_rng(seed)
    sae = make(config, key=jax.random.key(seed))
    for name in ("W_enc", "b_enc", "b_dec", *(("W_skip",) if config.skip else ())):
        array = getattr(sae, name)
        array[...] = array[...] + jnp.asarray(0.3 * random.standard_normal(array.shape), jnp.float32)
    x, y = (jnp.asarray(random.standard_normal((N, width)), jnp.float32) for width in (D, config.width_out))
    return sae, x, y if config.is_transcoder else x


def formula(sae, x, y, counts):
    """The mean over j of mean |y - y_hat_j|^2, from all latents sorted."""
    pre = (x - (0 if sae.config.is_transcoder else sae.b_dec[...])) @ sae.W_enc[...].T + sae.b_enc[...]
    order = jnp.argsort(-pre, axis=1)
    rank = jnp.argsort(order, axis=1)
    errors = []
    for count in counts:
        latents = jnp.where(rank < count, jax.nn.relu(pre), 0)
        y_hat = latents @ sae.W_dec[...] + sae.b_dec[...] + (x @ sae.W_skip[...].T if sae.config.skip else 0)
        errors.append(jnp.square(y - y_hat).sum(-1).mean())
    return jnp.stack(errors).mean()


@pytest.mark.parametrize("ops", [Reference(), choose()], ids=["reference", "of the device"])
@pytest.mark.parametrize("kind", [{}, {"d_out": 5}, {"d_out": 5, "skip": True}], ids=["sae", "transcoder", "skip"])
def test_loss_and_gradients_are_those_of_the_formula(kind, ops):
    config = dataclasses.replace(sae_config("topk", D, F, k=K, hierarchical_k=INNER), **kind)
    sae, x, y = drawn(config)
    ours = jax.value_and_grad(lambda sae: loss_of(sae, x, y, Context(ops, training=True))[0])(sae)
    theirs = jax.value_and_grad(lambda sae: formula(sae, x, y, (*INNER, K)))(sae)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5 * float(np.abs(b).max()) + 1e-7)


def test_without_inner_numbers_it_is_topk():
    plain, with_k = (sae_config("topk", D, F, k=K, hierarchical_k=inner) for inner in ((), (K,)))
    sae, x, y = drawn(plain)
    other, *_ = drawn(with_k)
    context = Context(training=True)
    assert loss_of(sae, x, y, context)[0] == loss_of(other, x, y, context)[0]


def test_one_sae_reconstructs_at_every_sparsity_better_than_plain_topk():
    random = np.random.default_rng(0)
    parts = random.exponential(size=(8192, 20)) * (random.random((8192, 20)) < 0.2)
    acts = (parts @ random.normal(size=(20, D))).astype(np.float32)
    run = jsae.TrainConfig(64 * 500, 64, 3e-3)
    fvu = {}
    for inner in ((), (1, 2)):
        trained = jsae.train(acts, jsae.TopK.Config(D, F, k=K, hierarchical_k=inner), run)
        for k in (1, 2, K):
            error = acts - np.asarray(trained.with_k(k)(acts))
            fvu[inner, k] = np.square(error).sum() / np.square(acts - acts.mean(0)).sum()
    assert fvu[(1, 2), 1] < 0.9 * fvu[(), 1]
    assert fvu[(1, 2), 2] < 0.95 * fvu[(), 2]
    assert fvu[(), K] < fvu[(1, 2), K]


def test_another_k_is_a_copy_and_checked(tmp_path):
    trained = jsae.train(
        np.random.default_rng(0).normal(size=(512, D)).astype(np.float32),
        jsae.TopK.Config(D, F, k=K),
        jsae.TrainConfig(64 * 5, 64),
    )
    smaller = trained.with_k(2)
    assert (smaller.cfg["k"], trained.cfg["k"]) == (2, K)
    assert jsae.load(smaller.save(tmp_path / "sae")).cfg["k"] == 2
    with pytest.raises(ValueError, match="k is 33: it must lie between 1 and d_sae=32"):
        trained.with_k(F + 1)


@pytest.mark.parametrize("wrong", [(0, 2), (2, 2), (4, 2), (2, 8)])
def test_numbers_increase_up_to_k(wrong):
    with pytest.raises(ConfigError, match="hierarchical_k must increase strictly from at least 1 up to k=6"):
        sae_config("topk", D, F, k=K, hierarchical_k=wrong)


def test_a_flag_sets_them_and_the_export_says_so():
    config = RunConfig(k=(K,), hierarchical_k=INNER).sae_config(D)
    assert config.hierarchical_k == INNER
    assert details(config) == {"hierarchical_k": [1, 2, 4]}
    with pytest.raises(ConfigError, match="--hierarchical_k means nothing to batchtopk"):
        RunConfig(activation="batchtopk", hierarchical_k=INNER)


@pytest.mark.parametrize(("given", "expected"), [({}, INNER), ({"k": (3,)}, (1, 2)), ({"hierarchical_k": (2,)}, (2,))])
def test_an_sae_that_is_continued_keeps_them(given, expected, tmp_path):
    """As far as they fit a smaller k, and where none are given."""
    config = sae_config("topk", D, F, k=K, hierarchical_k=INNER)
    acts = np.random.default_rng(0).standard_normal((512, D)).astype(np.float32)
    jsae.train(acts, config, TrainConfig(512, 128)).save(tmp_path / "sae")
    cfg = tmp_path / "sae" / "cfg.json"
    values = json.loads(cfg.read_text())
    values["metadata"]["training_architecture_details"] = details(config)  # as the export of a run has them
    cfg.write_text(json.dumps(values))
    start = pretrained.read(tmp_path / "sae").description
    assert start.hierarchical_k == INNER
    assert RunConfig(init_from=str(tmp_path / "sae"), **given).sae_config(D, start=start).hierarchical_k == expected
