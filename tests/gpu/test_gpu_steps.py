"""A training step of every architecture on a GPU is that of the reference, and the same every time it is taken."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from card import REHEARSED, distance, show

from jsae import loop
from jsae.architectures import SAEConfig, sae_config
from jsae.config import TrainConfig
from jsae.ops import Input, Ops, Reference, choose
from jsae.state import TrainState

D, F, K, N = (160, 2560, 16, 256) if REHEARSED else (1280, 20480, 64, 1024)
ODD_D, ODD_F, ODD_N = 200, 1000, 300
CONFIGS = {
    "topk": sae_config("topk", D, F, k=K),
    "batchtopk": sae_config("batchtopk", D, F, k=K),
    "matryoshka": sae_config("matryoshka", D, F, k=K, nested_widths=(F // 16, F // 4)),
    "abstopk": sae_config("abstopk", D, F, k=K),
    "transcoder": sae_config("topk", D, F, k=K, d_out=D // 2),
    "crosscoder": sae_config("batchtopk", 2 * D, F // 4, k=K, layers=2),
    "relu": sae_config("relu", D, F),
    "gated": sae_config("gated", D, F),
    "jumprelu": sae_config("jumprelu", D, F),
    "odd topk": sae_config("topk", ODD_D, ODD_F, k=7),
    "odd batchtopk": sae_config("batchtopk", ODD_D, ODD_F, k=7),
    "odd matryoshka": sae_config("matryoshka", ODD_D, ODD_F, k=7, nested_widths=(33, 500)),
    "odd relu": sae_config("relu", ODD_D, ODD_F),
    "odd gated": sae_config("gated", ODD_D, ODD_F),
    "odd jumprelu": sae_config("jumprelu", ODD_D, ODD_F),
    "odd jumprelu by its count": sae_config("jumprelu", ODD_D, ODD_F, jump_recipe="l0"),
}
AT_THE_EDGE = ("jumprelu", "odd jumprelu", "odd jumprelu by its count")
"""Thresholds start at pre-activations, which rounding puts above or below."""


class Rounded(Reference):
    """The reference with pre-activations that are rounded to bfloat16, as the kernels store and select them.

    Of 20,480 latents some three share the bfloat16 of a token's 64th largest: which of them are selected decides a
    tenth of the gradients.
    """

    def pre_activations(self, inputs: Input, W_enc: jax.Array, b_enc: jax.Array) -> jax.Array:
        """Return the rounded numbers, with the gradients of the exact ones."""
        exact = super().pre_activations(inputs, W_enc, b_enc)
        return exact + jax.lax.stop_gradient(exact.astype(jnp.bfloat16).astype(jnp.float32) - exact)


def reference(dtype: str) -> Reference:
    """Return the reference that rounds what the implementation for this device does."""
    return (Rounded if dtype == "bfloat16" and choose(dtype).name == "gpu" else Reference)(dtype)


def batches(config: SAEConfig, count: int) -> list:
    """Return batches of activations with a mean that is not zero, in the form that the SAE reads."""
    n, width = ODD_N if config.d_in == ODD_D else N, config.d_in // config.layers
    shapes = [width, config.d_out] if config.is_transcoder else [width] * config.layers
    keys = jax.random.split(jax.random.key(0), count * len(shapes)).reshape(count, len(shapes))
    parts = [[jax.random.normal(k, (n, w)) + 0.2 for k, w in zip(row, shapes, strict=True)] for row in keys]
    return [row[0] if len(row) == 1 else tuple(row) for row in parts]


def steps(config: SAEConfig, ops: Ops, count: int, dead_after: int = 10**9) -> tuple[TrainState, list[float]]:
    """Return the state after some steps, and the loss per token of every step."""
    inputs = batches(config, count)
    n = len(jax.tree.leaves(inputs[0])[0])
    how = TrainConfig(1000 * n, n, learning_rate=1e-3, dead_after=dead_after, matmul_dtype=ops.matmul_dtype)
    members = [loop.Member(config, how)]
    programs, states, losses = loop.Programs(members, ops), loop.init(members, [inputs[0]], ops), []
    for number, batch in enumerate(inputs, 1):
        states, (sums,) = programs.at(number)(states, [batch])
        losses.append(float(sums.loss) / n)
    return states[0], losses


STEPS = [(name, dtype) for name in CONFIGS for dtype in ("float32", "bfloat16")]
STEPS = [(name, dtype) for name, dtype in STEPS if dtype == "bfloat16" or name == "topk" or name.startswith("odd")]


@pytest.mark.parametrize(("name", "dtype"), STEPS)
def test_gradients_and_loss_of_a_step_are_the_references(name, dtype):
    config = CONFIGS[name]
    with jax.default_matmul_precision("highest"):
        (ours, loss), (theirs, wanted) = (steps(config, ops, 1) for ops in (choose(dtype), reference(dtype)))
    # After one step the first moment is the clipped gradient times 1 - beta1.
    mine, other = (dict(jax.tree_util.tree_leaves_with_path(state.opt.mu)) for state in (ours, theirs))
    far = {
        jax.tree_util.keystr(path): distance(mine[path], other[path])
        for path in mine
        if float(jnp.abs(other[path]).max()) > 0
    }
    gap = abs(loss[0] - wanted[0]) / wanted[0]
    show(f"step {name} {dtype}", loss=gap, **far)
    near = 2e-3 if dtype == "float32" else 2e-2
    near *= 10 if name in AT_THE_EDGE else 1
    assert gap < near / 10
    assert {path: d for path, d in far.items() if not d < near} == {}


@pytest.mark.parametrize("name", ["topk", "batchtopk", "odd topk"])
def test_many_dead_latents_learn_as_with_the_reference(name):
    config = CONFIGS[name]
    with jax.default_matmul_precision("highest"):
        (_, losses), (_, wanted) = (
            steps(config, ops, 3, dead_after=1) for ops in (choose("float32"), Reference("float32"))
        )
    show(f"dead {name}", first=losses[0], last=losses[-1], reference=wanted[-1])
    np.testing.assert_allclose(losses, wanted, rtol=2e-3)


@pytest.mark.parametrize("name", ["topk", "batchtopk", "matryoshka", "relu", "gated", "jumprelu"])
def test_steps_that_are_taken_twice_end_with_the_same_bits(name):
    config = CONFIGS[name]
    (first, losses), (second, again) = (steps(config, choose("bfloat16"), 4, dead_after=2 * N) for _ in range(2))
    assert losses == again
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
