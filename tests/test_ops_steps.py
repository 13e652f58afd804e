"""Every implementation takes the steps of the plain one, and the program that ships runs the one it is given."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementations import PIECES

import jsae
from jsae import loop, optim, step
from jsae import state as states
from jsae.architectures import Context, SAEConfig, make, sae_config
from jsae.config import TrainConfig
from jsae.ops import PLAIN, Cpu, Ops, Reference, Xla, choose

pytestmark = pytest.mark.usefixtures("quickly_compiled")
D, F, N = 16, 96, 60
OTHERS: dict[str, Ops] = {
    "reference": Reference(),
    "in pieces": PIECES,
    "gpu": Xla(),
    "dense": Xla(decoding="dense"),
}
SPARSE = {
    "topk": sae_config("topk", D, F, k=4),
    "batchtopk": sae_config("batchtopk", D, F, k=4),
    "matryoshka": sae_config("matryoshka", D, F, k=4, nested_widths=(24,)),
    "abstopk": sae_config("abstopk", D, F, k=4),
    "transcoder": sae_config("topk", D, F, k=4, d_out=8),
}
DENSE = {
    "relu": sae_config("relu", D, F, l1_coefficient=0.1),
    "gated": sae_config("gated", D, F, l1_coefficient=0.1),
    "jumprelu": sae_config("jumprelu", D, F, l0_coefficient=0.01, jump_recipe="l0", bandwidth=0.5),
    "controlled": sae_config("jumprelu", D, F, target_l0=5.0),
    "crosscoder": sae_config("relu", D, F, l1_coefficient=0.1, layers=2),
}


@functools.cache
def steps(config: SAEConfig, ops: Ops) -> tuple[states.TrainState, list]:
    """The state after three steps, the last two of which have dead latents, and their sums."""
    how = TrainConfig(num_activations=50 * N, batch_size=N, learning_rate=1e-2, dead_after=1)
    x = jax.random.normal(jax.random.key(3), (3, N, D)) + 0.2
    batches = list(x) if config.layers == 1 else [tuple(jnp.split(batch, config.layers, axis=1)) for batch in x]
    members = [loop.Member(config, how)]
    programs, state, seen = loop.Programs(members, ops), loop.init(members, [batches[0]], ops), []
    for number, batch in enumerate(batches, 1):
        state, sums = programs.at(number)(state, [batch])
        seen.append(sums[0])
    return state[0], seen


SAME = [(architecture, name) for name in ("in pieces", "reference") for architecture in ("topk", "batchtopk", *DENSE)]
# Its thresholds start at one of the pre-activations, which rounding then puts above or below.
SAME.remove(("controlled", "reference"))


@pytest.mark.parametrize(("architecture", "name"), SAME)
def test_a_step_in_pieces_is_the_step_as_a_whole(architecture, name):
    config = (SPARSE | DENSE)[architecture]
    plain, wanted = steps(config, PLAIN)
    state, found = steps(config, OTHERS[name])
    for ours, theirs in zip(jax.tree.leaves((state.sae, found)), jax.tree.leaves((plain.sae, wanted)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-5)
    np.testing.assert_array_equal(state.since_fired, plain.since_fired)


@functools.cache
def gradients(config: SAEConfig, ops: Ops) -> list[jax.Array]:
    """The gradients of the first loss, with every third latent dead."""
    sae = make(config, key=jax.random.key(1))
    x = jax.random.normal(jax.random.key(2), (N, D))
    y = x[:, :8] if config.is_transcoder else x
    context = Context(ops, training=True, dead=jnp.arange(F) % 3 == 0)
    return jax.tree.leaves(jax.jit(jax.grad(lambda sae: step.loss_of(sae, x, y, context)[0]))(sae))


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("architecture", SPARSE)
def test_gradients_are_the_same_in_every_implementation(architecture, name):
    plain = gradients(SPARSE[architecture], PLAIN)
    largest = max(float(jnp.abs(g).max()) for g in plain)
    for ours, theirs in zip(gradients(SPARSE[architecture], OTHERS[name]), plain, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6 * largest)


def test_the_optimiser_overwrites_blocks_without_an_array_of_all():
    """Beside weights, moments and gradients a step needs a few blocks, for any number of latents."""
    config, d, f = TrainConfig(num_activations=2**20), 64, 8192
    sizes = sae_config("topk", d, f)
    sae = jax.eval_shape(lambda: make(sizes, key=jax.random.key(0)))

    def planned(ops: Ops) -> int:
        optimizer = optim.make(config, sizes, ops)
        moments = jax.eval_shape(optimizer.init, sae)

        def step(params, state, grads):
            return optimizer.apply(grads, state, params, 1e-3)

        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(sae, moments, sae).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    block = 2**15
    assert planned(Cpu(block=block)) < 8 * 4 * block
    assert planned(PLAIN) >= 4 * d * f


class CalledError(RuntimeError):
    """An implementation was asked for something."""


@dataclasses.dataclass(frozen=True)
class Refusing(Reference):
    """An implementation that does not decode."""

    def decode(self, codes, W_dec, start):
        raise CalledError


def test_the_device_decides_unless_an_implementation_is_given():
    member = loop.Member(SPARSE["topk"], TrainConfig(num_activations=2 * N, batch_size=N, matmul_dtype="bfloat16"))
    assert member.ops == choose("bfloat16") == Cpu("bfloat16")
    x = jax.random.normal(jax.random.key(0), (N, D))
    begun = loop.init([member], [x])
    with pytest.raises(CalledError):
        loop.init([member], [x], Refusing())
    with pytest.raises(CalledError):
        loop.Programs([member], Refusing()).at(1)(begun, [x])
    loop.Programs([member]).at(1)(begun, [x])


class Kernels(Reference):
    """An implementation with kernels that compile."""

    name: ClassVar[str] = "gpu"


class BrokenKernels(Refusing):
    """An implementation with a kernel that does not compile."""

    name: ClassVar[str] = "gpu"


def test_kernels_are_chosen_if_they_compile_for_the_sizes_of_the_run(monkeypatch):
    how = TrainConfig(num_activations=2 * N, batch_size=N)
    members = [loop.Member(config, how, site) for site, config in enumerate(SPARSE.values())]
    assert loop.choose_ops(members) == (Cpu(), "the device is a processor")
    monkeypatch.setattr(loop, "choose_with_reason", lambda dtype: (Kernels(dtype), "kernels run here"))
    assert loop.choose_ops(members) == (Kernels(), "kernels run here")
    monkeypatch.setattr(loop, "choose_with_reason", lambda dtype: (BrokenKernels(dtype), "kernels run here"))
    ops, reason = loop.choose_ops(members)
    assert ops == Xla()
    assert reason == "a step with Triton kernels does not compile for this GPU (CalledError: )"


def test_training_on_a_gpu_without_kernels_warns(monkeypatch):
    obstacle = "no Triton kernels: compute capability 7.5 is below 8.0"
    monkeypatch.setattr(loop, "choose_with_reason", lambda dtype: (Xla(dtype), obstacle))
    acts, how = np.random.default_rng(0).normal(size=(2 * N, D)), TrainConfig(num_activations=2 * N, batch_size=N)
    with pytest.warns(UserWarning, match="compute capability 7.5"):
        jsae.train(acts.astype(np.float32), SPARSE["topk"], how)
