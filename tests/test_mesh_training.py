"""Steps on a mesh against those of one device: dead latents, resampling, controllers, averages, annealing, NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jsae import axes, loop, metrics
from jsae.architectures import sae_config
from jsae.config import TrainConfig
from jsae.health import ActivationsError
from jsae.testing import toy

BATCH, STEPS, LATENTS = 256, 8, 64
SHARED = {"num_activations": BATCH * 100, "batch_size": BATCH, "learning_rate": 4e-3, "dead_after": BATCH}
# The SAE, and the run.
CASES = {
    "topk with dead latents and resampling": ("topk", {"k": 3}, {"resample_every": 3 * BATCH}),
    "abstopk": ("abstopk", {"k": 3}, {}),
    "batchtopk with k coming down": ("batchtopk", {"k": 3}, {"k_start": 6, "k_anneal_fraction": 0.05}),
    "matryoshka with an average": ("matryoshka", {"k": 3, "nested_widths": (8, 32)}, {"average_fraction": 0.5}),
    "gated with a target": ("gated", {"l1_coefficient": 2.0, "target_l0": 2.5}, {}),
    "jumprelu with a target": ("jumprelu", {"l0_coefficient": 0.5, "target_l0": 2.0}, {"resample_every": 3 * BATCH}),
}


@pytest.fixture(scope="module")
def acts() -> np.ndarray:
    return toy.world(4096, None, 1).acts[0]


def steps(member: loop.Member, acts: np.ndarray, mesh: jax.sharding.Mesh | None, broken: int | None = None):
    """Return the last states and sums; one latent in four never fires until it is resampled."""
    states = loop.init([member], (jnp.asarray(acts),), mesh=mesh)
    if member.sae.sae.sparse and member.sae.architecture != "abstopk":
        low = jnp.where(jnp.arange(LATENTS) % 4 == 1, -50.0, 0.0)
        low = low if mesh is None else jax.device_put(low, NamedSharding(mesh, axes.spec(("f",))))
        states[0].sae.b_enc[...] = states[0].sae.b_enc + low
    programs, total = loop.Programs([member], mesh=mesh), None
    for number in range(1, STEPS + 1):
        batch = jnp.asarray(acts[BATCH * (number - 1) : BATCH * number])
        batch = batch.at[7, 3].set(jnp.nan) if number == broken else batch
        batch = batch if mesh is None else jax.device_put(batch, NamedSharding(mesh, axes.BATCH))
        states, (sums,) = programs.at(number)(states, (batch,))
        total = sums if total is None else metrics.add(total, sums)
    return states, total


@pytest.mark.parametrize("case", CASES)
def test_steps_on_a_mesh_are_those_of_one_device(case, acts):
    architecture, settings, run = CASES[case]
    config = sae_config(architecture, acts.shape[1], LATENTS, **settings)
    member = loop.Member(config, TrainConfig(**SHARED, **run))
    expected, expected_sums = steps(member, acts, None)
    states, sums = steps(member, acts, axes.make_mesh(2))
    ours = jax.tree_util.tree_leaves_with_path((states, sums))
    for (path, leaf), other in zip(ours, jax.tree.leaves((expected, expected_sums)), strict=True):
        scale = np.abs(np.asarray(other, np.float64)).max() + 1e-30
        difference = np.abs(np.asarray(leaf, np.float64) - np.asarray(other)).max() / scale
        assert difference < 2e-5, (jax.tree_util.keystr(path), difference)
    np.testing.assert_array_equal(states[0].since_fired, expected[0].since_fired)
    if "dead" in case:
        assert np.asarray(expected[0].sae.b_enc).min() > -10  # those that never fired were resampled
    (summary,) = loop.summaries([member], STEPS, states, (sums,))
    (expected_summary,) = loop.summaries([member], STEPS, expected, (expected_sums,))
    assert summary == pytest.approx(expected_summary, rel=1e-4)


def test_a_number_that_is_not_finite_stops_a_run_on_a_mesh(acts):
    member = loop.Member(sae_config("topk", acts.shape[1], LATENTS, k=3), TrainConfig(**SHARED))
    states, sums = steps(member, acts, axes.make_mesh(2), broken=5)
    with pytest.raises(ActivationsError, match="the loss is not finite at step 5"):
        loop.check_finite(states[0], sums)
