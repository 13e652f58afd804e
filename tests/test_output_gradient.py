"""Steps that also minimise a term of the reconstruction that is known by its gradient alone."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementations import PIECES

from jsae import loop, optim, step
from jsae.architectures import Forward, SAEConfig, sae_config
from jsae.config import TrainConfig
from jsae.ops import Ops, Reference
from jsae.state import TrainState, input_and_target

pytestmark = pytest.mark.usefixtures("quickly_compiled")
D, F, OUT, N = 16, 96, 8, 60
CASES = {
    "topk": sae_config("topk", D, F, k=4),
    "hierarchical": sae_config("topk", D, F, k=4, hierarchical_k=(2,)),
    "batchtopk": sae_config("batchtopk", D, F, k=4),
    "matryoshka": sae_config("matryoshka", D, F, k=4, nested_widths=(24,)),
    "relu": sae_config("relu", D, F, l1_coefficient=0.1),
    "aligned": sae_config("relu", D, F, l1_coefficient=0.1, aligned=True),
    "gated": sae_config("gated", D, F, l1_coefficient=0.1),
    "jumprelu": sae_config("jumprelu", D, F, target_l0=5.0),
    "skip transcoder": sae_config("topk", D, F, k=4, d_out=OUT, skip=True),
    "crosscoder": sae_config("relu", 2 * D, F, l1_coefficient=0.1, layers=2),
}
RUN = TrainConfig(num_activations=50 * N, batch_size=N, learning_rate=1e-2, dead_after=1)


@dataclasses.dataclass(frozen=True)
class Recorder:
    """An optimiser that moves nothing, and whose state is the gradient of the loss."""

    def init(self, params: Any) -> Any:
        return params

    def apply(self, grads: Any, state: Any, params: Any, rate: Any, factor: float = 1.0) -> tuple[Any, Any]:
        return params, jax.tree.map(lambda g: factor * g, grads)


def batch(config: SAEConfig, seed: int = 0) -> Any:
    """Activations whose scales are far from 1 and differ between input, target and layers."""
    widths = [D, OUT] if config.is_transcoder else [D] * config.layers
    random = np.random.default_rng(seed)
    parts = tuple(
        jnp.asarray(5.0 ** (i + 1) * (random.standard_normal((N, width)) + 0.3), jnp.float32)
        for i, width in enumerate(widths)
    )
    return parts if len(parts) > 1 else parts[0]


@functools.cache
def trained(config: SAEConfig) -> TrainState:
    """The state after two steps, with seven latents that count as dead."""
    members = [loop.Member(config, RUN)]
    programs, states = loop.Programs(members, Reference()), loop.init(members, [batch(config)], Reference())
    for number in (1, 2):
        states, _ = programs.at(number)(states, [batch(config, number)])
    return states[0]._replace(since_fired=jnp.where(jnp.arange(F) < 7, RUN.dead_window, 0))


def downstream(y_hat: jax.Array) -> jax.Array:
    """A term that is neither quadratic nor a sum over channels, a mean over tokens as a model's loss is."""
    mixing = jax.random.normal(jax.random.key(4), (y_hat.shape[1], 12)) / 20
    return jnp.logaddexp(y_hat @ mixing, jnp.roll(y_hat, 1, 0) @ mixing).mean()


def gradients_of_step(config: SAEConfig, ops: Ops, output_gradient: jax.Array | None) -> dict[str, np.ndarray]:
    """The gradients that a step hands to its optimiser, by the name of the array."""
    state = trained(config)
    after, _ = jax.jit(
        lambda state, acts, g: step.update(RUN, ops, state, acts, optimizer=Recorder(), output_gradient=g)
    )(state, batch(config, 3), output_gradient)
    return by_name(after.opt)


def by_name(tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {optim.names_of(path)[0]: np.asarray(leaf) for path, leaf in leaves}


@pytest.mark.parametrize("ops", [Reference(), PIECES], ids=["whole", "in pieces"])
@pytest.mark.parametrize("name", CASES)
def test_a_step_has_the_gradient_of_the_loss_plus_the_term(name, ops):
    config, acts = CASES[name], batch(CASES[name], 3)
    state = trained(config)
    x, y = input_and_target(config, acts)
    context = step._context(RUN, Reference(), state, state.step + 1, None)
    context = context._replace(dead=state.since_fired >= RUN.dead_window)
    assert int(context.dead.sum()) == 7

    def whole(sae):
        if config.aligned:
            sae = jax.tree.map(jnp.copy, sae)
            sae.align()
        loss, outputs = step.loss_of(sae, x, y * state.scale_out, context)
        _, extra = sae.activate(x, context)
        of_dead = sae.loss_of_dead(Forward(x, y * state.scale_out, outputs.error, outputs.latents, extra, context))
        return loss + (0 if of_dead is None else of_dead) + downstream(y + outputs.error / state.scale_out)

    expected = by_name(jax.grad(whole)(state.sae))
    cotangent = jax.grad(downstream)(step.reconstruct(RUN, Reference(), state, acts))
    found = gradients_of_step(config, ops, cotangent)
    statistics = state.sae.initial_statistics(config)
    without = gradients_of_step(config, ops, None)
    for array in expected.keys() - statistics.keys():
        scale = np.abs(expected[array]).max()
        np.testing.assert_allclose(found[array], expected[array], atol=2e-4 * scale, err_msg=array)
    assert np.abs(found["W_dec"] - without["W_dec"]).max() > 0.01 * np.abs(without["W_dec"]).max()


@pytest.mark.parametrize("name", CASES)
def test_the_reconstruction_is_the_one_that_the_loss_is_of(name):
    config, acts = CASES[name], batch(CASES[name], 3)
    state = trained(config)
    y_hat = step.reconstruct(RUN, Reference(), state, acts)
    _, sums = step.update(RUN, Reference(), state, acts)
    error = np.square(np.asarray(y_hat - input_and_target(config, acts)[1], np.float64)).sum()
    np.testing.assert_allclose(error, float(sums.squared_error), rtol=1e-4)


def test_a_term_without_gradient_changes_nothing():
    config = CASES["jumprelu"]
    zero = gradients_of_step(config, PIECES, jnp.zeros((N, D)))
    for name, gradient in gradients_of_step(config, PIECES, None).items():
        np.testing.assert_allclose(zero[name], gradient, rtol=1e-6, atol=1e-6, err_msg=name)


@functools.cache
def converged(coefficient: float) -> tuple[TrainConfig, TrainState, jax.Array]:
    """A ReLU SAE that was trained until its loss stands still."""
    run = TrainConfig(num_activations=1500 * N, batch_size=N, learning_rate=1e-3, beta2=0.999)
    config = sae_config("relu", D, 24, l1_coefficient=coefficient, revival_coefficient=0.0)
    members = [loop.Member(config, run)]
    acts = batch(config)
    programs, states = loop.Programs(members, Reference()), loop.init(members, [acts], Reference())
    for number in range(1, run.num_steps + 1):
        states, _ = programs.at(number)(states, [acts])
    return run, states[0], acts


def test_the_balanced_strength_of_a_trained_sae_is_that_of_its_training():
    run, state, acts = converged(1.0)
    strength = float(step.balanced_strength(run, Reference(), state, acts))
    assert 0.8 < strength < 1.2, strength


def test_a_penalty_with_a_larger_coefficient_balances_at_a_smaller_strength():
    run, state, acts = converged(1.0)
    stronger = jax.tree.map(jnp.copy, state.sae)
    stronger.config = dataclasses.replace(state.sae.config, l1_coefficient=4.0)
    strengths = [
        float(step.balanced_strength(run, Reference(), state._replace(sae=sae), acts)) for sae in (state.sae, stronger)
    ]
    np.testing.assert_allclose(strengths[0], 4 * strengths[1], rtol=1e-3)


def test_a_further_term_raises_the_strength_that_balances_it():
    """A term that is the squared error again doubles the rest of the loss, and so the strength."""
    run, state, acts = converged(1.0)
    y_hat = step.reconstruct(run, Reference(), state, acts)
    again = 2 / N * (y_hat - acts) * state.scale_out**2
    alone, both = (float(step.balanced_strength(run, Reference(), state, acts, g)) for g in (None, again))
    np.testing.assert_allclose(both, 2 * alone, rtol=0.05)


def test_without_a_sparsity_penalty_the_strength_is_1():
    config = CASES["topk"]
    assert float(step.balanced_strength(RUN, Reference(), trained(config), batch(config))) == 1
