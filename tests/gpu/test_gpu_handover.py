"""Arrays between torch and jax on a GPU: no copies, and no read before what was queued ahead of it is done."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from card import DEVICE, REHEARSED

from bridge.handover import to_jax, to_torch

pytestmark = pytest.mark.xdist_group("handover")

SIZE = 64 if REHEARSED else 4096


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_activations_cross_both_ways_without_a_copy(device, dtype):
    acts = torch.randn(128, 64, device=device).to(dtype)
    place, numbers = acts.data_ptr(), acts.float().cpu().numpy()
    theirs = to_jax(acts)
    assert (theirs.unsafe_buffer_pointer(), acts.numel()) == (place, 0)
    assert {d.platform for d in theirs.devices()} == {"cpu" if DEVICE == "cpu" else "gpu"}
    back = to_torch(theirs)
    assert (back.data_ptr(), back.dtype, back.device.type) == (place, dtype, DEVICE)
    np.testing.assert_array_equal(np.asarray(theirs, np.float32), numbers)
    np.testing.assert_array_equal(back.float().cpu().numpy(), numbers)


def test_jax_reads_what_torch_has_queued(device):
    wrong = 0
    for number in range(1, 31):
        acts = torch.zeros(SIZE, SIZE, device=device)
        for _ in range(8):
            acts = acts @ acts + number
        acts.fill_(number)
        wrong += float(jnp.sum(to_jax(acts)[:, :16])) != number * SIZE * 16
    assert wrong == 0


def test_torch_reads_what_jax_has_queued(device):
    @jax.jit
    def long(start: jax.Array) -> jax.Array:
        array = jnp.full((SIZE, SIZE), start)
        array = jax.lax.fori_loop(0, 8, lambda _, a: jnp.tanh(a @ a / SIZE), array)
        return array * 0 + start

    wrong = 0
    for number in range(1, 31):
        wrong += to_torch(long(jnp.float32(number)))[:, :16].sum().item() != number * SIZE * 16
    assert wrong == 0


def test_memory_that_torch_frees_stays_jaxs(device):
    theirs = to_jax(torch.full((SIZE, SIZE), 7.0, device=device))
    others = [torch.zeros(SIZE, SIZE, device=device) for _ in range(20)]
    assert float(theirs.min()) == float(theirs.max()) == 7
    assert len(others) == 20
