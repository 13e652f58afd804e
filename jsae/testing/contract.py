"""The contract of an architecture, as a class of tests that pytest runs.

    from my_package import MySAE
    import jsae

    TestMine = jsae.testing.contract(MySAE, l1_coefficient=2.0)

The SAE is trained once on a toy world with a known dictionary, which takes seconds. On one device the sharded step is
not divided; `jax.config.update("jax_num_cpu_devices", 4)` in a conftest.py divides it over four devices.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jsae import axes, dead, loop, metrics, step, trained
from jsae.architectures import SAE, Context, SAEConfig, config_from_json
from jsae.arrays import ArraySource
from jsae.checkpoint import Checkpoints
from jsae.config import TrainConfig
from jsae.data import Shuffled
from jsae.ops import Codes, Latents, choose
from jsae.state import Acts, TrainState, input_and_target
from jsae.testing import toy

D_SAE = 64
"""Default number of latents: more than the 48 directions of the toy world."""
N = 500
"""Tokens per batch."""
RUN = TrainConfig(num_activations=300_000, batch_size=N, learning_rate=4e-3, dead_after=20_000)
_ROWS, _BLOCK = 20_000, 10_000


def contract(
    sae: type[SAE] | SAEConfig, *, no_gradient: Sequence[str] = (), sharded: bool = True, **settings: Any
) -> type["Contract"]:
    """Return the tests of an architecture, a class that pytest collects under a name beginning with `Test`.

    Args:
      sae: the class of the architecture; or its settings, with the toy world's width `d_in` (32 per layer) and, for a
        transcoder, `d_out` 24.
      no_gradient: arrays of weights that may have no gradient in the first step, for example because gradients reach
        them only through a window.
      sharded: whether to compare a step on several devices with that on one.
      settings: of the architecture, such that about 1 to 8 of 64 latents are active on 2 true directions per token.

    Raises:
      ConfigError: settings that the architecture does not have, or values out of range.
    """
    config = sae if isinstance(sae, SAEConfig) else sae.Config.from_json({"d_in": toy.D_IN, "d_sae": D_SAE} | settings)
    declared = {"config": config, "no_gradient": tuple(no_gradient), "__doc__": f"The contract of {config}."}
    base = ShardedContract if sharded else Contract
    return type("Contract", (base,), declared)


class Contract:
    """The tests of an architecture; `contract` returns a subclass to run."""

    config: ClassVar[SAEConfig]
    no_gradient: ClassVar[tuple[str, ...]] = ()

    def test_its_settings_come_back_from_json(self) -> None:
        """Compare the settings with those read from their JSON."""
        assert config_from_json(self.config.to_json()) == self.config

    def test_it_recovers_the_true_directions(self) -> None:
        """Compare decoder rows with the directions of the toy world, and the error with their variance."""
        state, summary = trained_on(self.config)
        world, weights = world_of(self.config), state.sae.arrays()
        truth = world.truth
        if self.config.skip:
            truth = world.beside(weights["W_skip"] * np.asarray(state.scale / state.scale_out))
        signed = self.config.sae.form != "abstopk"
        cosine = toy.recovery(weights["W_dec"], truth, signed)
        assert cosine > 0.9, f"the true directions are found with a mean cosine of only {cosine:.3f}"
        assert summary["fvu"] < 0.15, f"the fraction of variance unexplained is {summary['fvu']:.3f}"

    def test_it_keeps_its_promise_of_l0_and_kills_few_latents(self) -> None:
        """Compare the active latents per token with k or `target_l0`, and count dead latents."""
        state, summary = trained_on(self.config)
        if self.config.k is not None:
            assert summary["l0"] <= self.config.k, f"L0 is {summary['l0']:.2f}"
        if self.config.target_l0 is not None:
            np.testing.assert_allclose(summary["l0"], self.config.target_l0, rtol=0.05)
        assert 1 <= summary["l0"] <= 8, f"L0 is {summary['l0']:.2f}"
        dead_fraction = float((state.since_fired >= RUN.dead_after).mean())
        assert dead_fraction < 0.3, f"{dead_fraction:.0%} of the latents are dead"

    def test_decoder_rows_stay_unit(self) -> None:
        """Measure decoder rows after training."""
        state, _ = trained_on(self.config)
        np.testing.assert_allclose(np.linalg.norm(state.sae.W_dec, axis=1), 1, atol=1e-5)

    def test_a_step_returns_the_types_that_it_takes(self) -> None:
        """Compare the arrays of a state with those after a step: others would be compiled for again."""
        start, batch = initial_state(self.config), rows(self.config, 0, N)
        program = programs_of(self.config).at(RUN.num_steps)
        (after,), _ = jax.eval_shape(program, (start,), (batch,))
        taken, returned = (dict(jax.tree_util.tree_leaves_with_path(state)) for state in (start, after))
        assert taken.keys() == returned.keys()
        for path, leaf in returned.items():
            found = (leaf.shape, leaf.dtype, leaf.weak_type)
            expected = (taken[path].shape, taken[path].dtype, taken[path].weak_type)
            assert found == expected, f"{jax.tree_util.keystr(path)} was {expected} and is {found} after a step"

    def test_jit_equals_eager(self) -> None:
        """Encode with and without compilation."""
        state, _ = trained_on(self.config)
        x, _ = scaled(self.config, state)
        with jax.disable_jit():
            eager = dense(self.config, state.sae.encode(x, _OPS))
        compiled = dense(self.config, encode(state.sae, x))
        np.testing.assert_allclose(compiled, eager, rtol=1e-4, atol=1e-5)

    def test_gradients_are_finite_and_reach_every_parameter(self) -> None:
        """Differentiate the loss of the first batch, with half of the latents marked as dead."""
        start = initial_state(self.config)
        context = Context(_OPS, training=True, dead=jnp.arange(self.config.d_sae) % 2 == 0)
        x, y = scaled(self.config, start)
        gradients = jax.jit(jax.grad(lambda sae: step.loss_of(sae, x, y, context)[0]))(start.sae)
        constant = {*self.no_gradient, *self.config.sae.initial_statistics(self.config)}
        for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
            names = {str(getattr(part, "key", getattr(part, "name", ""))) for part in path}
            assert np.isfinite(gradient).all(), f"the gradient of {path} is not finite"
            assert np.asarray(gradient).any() or names & constant, f"no gradient reaches {path}"

    def test_the_sparse_form_decodes_as_the_dense_one(self) -> None:
        """Compare the decoded activations with the product of all latents and the decoder."""
        state, _ = trained_on(self.config)
        x, _ = scaled(self.config, state)
        latents = activate(state.sae, x)
        weights = state.sae.arrays()
        expected = dense(self.config, latents) @ weights["W_dec"] + weights["b_dec"]
        if self.config.skip:
            expected = expected + np.asarray(x) @ weights["W_skip"].T
        np.testing.assert_allclose(decode(state.sae, latents, x), expected, rtol=1e-4, atol=1e-4)

    def test_latents_that_fired_are_counted_by_value(self) -> None:
        """Compare the counts of firing with the tokens on which each latent is not zero."""
        state, _ = trained_on(self.config)
        latents = activate(state.sae, scaled(self.config, state)[0])
        expected = (dense(self.config, latents) != 0).sum(0)
        fired = _OPS.times_fired(latents, len(expected)) if self.config.sae.sparse else _OPS.latent_totals(latents)[0]
        np.testing.assert_array_equal(fired, expected)

    def test_a_checkpoint_gives_back_every_number(self, tmp_path: Path) -> None:
        """Save and restore the state of training."""
        state, _ = trained_on(self.config)
        notes = {"cursor": {"block": 3, "batch": 1, "position": {"row": 7}}}
        with Checkpoints(tmp_path / "checkpoints") as checkpoints:
            checkpoints.save(600, (state,), notes, fvu=0.1)
            checkpoints.wait()
            restored = checkpoints.restore(jax.eval_shape(lambda: (initial_state(self.config),)))
        assert (restored.step, restored.notes) == (600, notes)
        assert repr(jax.tree.structure(restored.states)) == repr(jax.tree.structure((state,)))
        for ours, theirs in zip(jax.tree.leaves(restored.states), jax.tree.leaves(state), strict=True):
            np.testing.assert_array_equal(ours, theirs)

    def test_what_is_saved_computes_what_was_trained(self, tmp_path: Path) -> None:
        """Export the SAE, load it, and compare latents and reconstructions in the units of the activations."""
        state, _ = trained_on(self.config)
        loaded = trained.load(trained.TrainedSAE.from_state(state).save(tmp_path / "sae"))
        x, _ = scaled(self.config, state)
        latents = encode(state.sae, x)
        norms = np.linalg.norm(np.asarray(state.sae.W_dec) / np.asarray(state.scale_out), axis=1)
        raw = np.asarray(x) / np.asarray(state.scale)
        encoded, expected = np.asarray(loaded.encode(raw)), dense(self.config, latents) * norms
        same = same_latents(encoded, expected, loaded.weights.get("threshold"))
        assert _relative(encoded[same], expected[same]) < 1e-5
        y_hat = np.asarray(decode(state.sae, latents, x)) / np.asarray(state.scale_out)
        assert _relative(np.asarray(loaded(raw))[same], y_hat[same]) < 1e-5
        np.testing.assert_allclose(np.linalg.norm(loaded.W_dec, axis=1), 1, atol=1e-5)

    def test_resampling_renews_the_dead_and_nothing_else(self) -> None:
        """Resample every fifth latent, and compare weights and moments with those before."""
        state, _ = trained_on(self.config)
        sae, is_dead = state.sae, jnp.arange(self.config.d_sae) % 5 == 0
        x, y = scaled(self.config, state)
        renewed, moments = dead.resample(sae, state.opt, is_dead, x, y, jax.random.key(3), _OPS)
        mask = np.asarray(is_dead)
        start = sae.initial_latents(self.config)
        for name in ("W_enc", "W_dec", *start):
            before, after = np.asarray(getattr(sae, name)), np.asarray(getattr(renewed, name))
            np.testing.assert_array_equal(after[~mask], before[~mask])
            if name in start:
                np.testing.assert_allclose(after[mask], start[name], rtol=1e-6)
        np.testing.assert_array_equal(renewed.b_dec, sae.b_dec)
        directions = np.asarray(renewed.W_dec)[mask]
        np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1, atol=1e-5)
        assert len(np.unique(directions.round(5), axis=0)) == mask.sum(), "the same token was drawn twice"
        for name in ("W_dec", *start):
            moment = np.asarray(getattr(moments.mu, name))
            assert not moment[mask].any(), f"the moments of {name} are not renewed"
            assert moment[~mask].any(), f"the moments of {name} are all renewed"


class ShardedContract(Contract):
    """The tests of an architecture, including a step on several devices."""

    def test_sharded_equals_whole(self) -> None:
        """Take five steps on a mesh of at most 2 x 2 devices, and compare the state with that of one device."""
        devices = jax.devices()[: 2 ** min(len(jax.devices()).bit_length() - 1, 2)]
        mesh = axes.make_mesh(latent=min(len(devices), 2), devices=devices)
        member = loop.Member(self.config, RUN)
        whole = initial_state(self.config)
        (sharded,) = loop.init([member], (rows(self.config, 0, _BLOCK),), mesh=mesh)
        sharding = jax.NamedSharding(mesh, axes.BATCH)
        program = programs_of(self.config).at(RUN.num_steps)
        on_mesh = loop.Programs([member], mesh=mesh).at(RUN.num_steps)
        for i in range(5):
            batch = rows(self.config, N * i, N * (i + 1))
            (whole,), (sums,) = program((whole,), (batch,))
            (sharded,), (sharded_sums,) = on_mesh((sharded,), (jax.device_put(batch, sharding),))
        for ours, theirs in zip(jax.tree.leaves(sharded), jax.tree.leaves(whole), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)
        expected, values = metrics.summarize(sums), metrics.summarize(sharded_sums)
        np.testing.assert_allclose(list(values.values()), list(expected.values()), rtol=1e-3)
        assert sharded.sae.W_dec[...].sharding.is_fully_replicated == (len(devices) == 1)


# ---- the trained SAE and its activations ----------------------------------------------------------------------------


@functools.cache
def trained_on(config: SAEConfig) -> tuple[TrainState, dict[str, float]]:
    """Return the last state of a run on the toy world, and the metrics of its last tenth."""
    source = ArraySource(*world_of(config).acts)
    stream = Shuffled(source, batch_size=N, batches_per_block=_BLOCK // N, seed=0, num_batches=RUN.num_steps)
    members, tail = [loop.Member(config, RUN)], None
    batches, programs = ((acts,) for acts in stream), programs_of(config)
    run = loop.fit(members, loop.init(members, (stream.peek(),)), batches, programs)
    for number, states, (sums,) in run:  # noqa: B007 - the last states are returned
        if number > 0.9 * RUN.num_steps:
            tail = sums if tail is None else metrics.add(tail, sums)
    loop.check_finite(states[0], tail)
    return states[0], metrics.summarize(tail)


@functools.cache
def programs_of(config: SAEConfig) -> loop.Programs:
    """Return the steps, which are compiled once for all tests of an architecture."""
    return loop.Programs([loop.Member(config, RUN)])


def initial_state(config: SAEConfig) -> TrainState:
    """Return the state before the first step."""
    return loop.init([loop.Member(config, RUN)], (rows(config, 0, _BLOCK),))[0]


def world_of(config: SAEConfig) -> toy.World:
    """Return the toy world for an SAE, a transcoder or a crosscoder."""
    return _world(config.d_out, config.layers)


@functools.cache
def _world(d_out: int | None, layers: int) -> toy.World:
    return toy.world(_ROWS, d_out, layers)


def rows(config: SAEConfig, start: int, stop: int) -> Acts:
    """Return rows `start` to `stop` of the activations, in the form that a training step takes."""
    acts = tuple(jnp.asarray(a[start:stop]) for a in world_of(config).acts)
    return acts if len(acts) > 1 else acts[0]


def scaled(config: SAEConfig, state: TrainState) -> tuple[jax.Array, jax.Array]:
    """Return input and target of a batch, scaled as in training."""
    x, y = input_and_target(config, rows(config, 0, N))
    return x * state.scale, y * state.scale_out


_OPS = choose()
activate = jax.jit(lambda sae, x: sae.activate(x, Context(_OPS, training=True))[0])
encode = jax.jit(lambda sae, x: sae.encode(x, _OPS))
decode = jax.jit(lambda sae, latents, x: sae.decode(latents, x, _OPS))


def dense(config: SAEConfig, latents: Latents) -> np.ndarray:
    """Return the latents of a batch as an array, (n, d_sae)."""
    return np.asarray(latents.dense(N, config.d_sae) if isinstance(latents, Codes) else latents)


def same_latents(ours: np.ndarray, theirs: np.ndarray, threshold: Any) -> np.ndarray:
    """Return the mask of tokens, (n,), without a latent at its threshold (to rounding) that is active in only one.

    Such a latent may lie on either side. Without thresholds, None, every token is in the mask.
    """
    if threshold is None:
        return np.ones(len(ours), bool)
    only_one = (ours != 0) != (theirs != 0)
    at_threshold = np.abs(ours + theirs - np.asarray(threshold)) <= 1e-5 * np.abs(np.asarray(threshold))
    return ~(only_one & at_threshold).any(-1)


def _relative(ours: Any, theirs: np.ndarray) -> float:
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())
