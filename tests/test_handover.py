"""Arrays between torch and jax: no copies, bfloat16, and tensors that torch can no longer write to."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from bridge.handover import ALIGNMENT, return_behind_reads, to_jax, to_torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_activations_cross_without_a_copy(dtype):
    acts = torch.randn(64, 32).to(dtype)
    place, numbers = acts.data_ptr(), acts.float().numpy().copy()
    theirs = to_jax(acts)
    assert theirs.unsafe_buffer_pointer() == place
    assert str(theirs.dtype) == str(dtype).removeprefix("torch.")
    np.testing.assert_array_equal(np.asarray(theirs, np.float32), numbers)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_and_back_without_a_copy(dtype):
    array = jax.random.normal(jax.random.key(0), (16, 8), dtype)
    tensor = to_torch(array)
    assert tensor.data_ptr() == array.unsafe_buffer_pointer()
    np.testing.assert_array_equal(tensor.float().numpy(), np.asarray(array, np.float32))


def test_torch_cannot_write_to_a_tensor_that_was_handed_over():
    acts = torch.zeros(64, 32)
    theirs = to_jax(acts)
    assert acts.numel() == 0
    acts.fill_(1)
    assert not np.asarray(theirs).any()
    with pytest.raises(ValueError, match="handed over before"):
        to_jax(acts)


def test_memory_lives_as_long_as_jax_needs_it():
    theirs = to_jax(torch.arange(10_000, dtype=torch.float32))
    others = [torch.zeros(10_000) for _ in range(50)]  # would reuse the storage if it had been freed
    np.testing.assert_array_equal(theirs, np.arange(10_000))
    assert len(others) == 50


@pytest.mark.parametrize("cut", [lambda t: t[:, ::2], lambda t: t.T, lambda t: t.reshape(-1)[1:]])
def test_strided_and_unaligned_tensors_are_copied_once_and_right(cut):
    whole = torch.randn(64, 32)
    view = cut(whole)
    numbers, place = view.numpy().copy(), view.data_ptr()
    theirs = to_jax(view)
    np.testing.assert_array_equal(theirs, numbers)
    assert theirs.unsafe_buffer_pointer() != place
    assert theirs.unsafe_buffer_pointer() % ALIGNMENT == 0
    assert whole.numel() == 64 * 32  # only the view was given away


def test_gradients_are_left_behind():
    weight = torch.ones(32, requires_grad=True)
    np.testing.assert_array_equal(to_jax(weight * 2), np.full(32, 2.0))


def test_a_tensor_is_kept_until_the_array_is_gone_and_torch_then_waits_for_jax():
    entered, freed = [], []

    class Stream:
        def __enter__(self):
            entered.append(len(freed))

        def __exit__(self, *exception):
            pass

    tensor = torch.ones(1000)
    weakref.finalize(tensor, freed.append, True)
    array = jnp.ones(1000)
    return_behind_reads(array, tensor, Stream())
    del tensor
    gc.collect()
    assert (entered, freed) == ([], [])
    other = array
    del array
    assert (entered, freed) == ([], [])
    with jax.transfer_guard("disallow"):
        del other
    assert (entered, freed) == ([0], [True])


def test_token_ids_are_refused():
    with pytest.raises(TypeError, match="int64"):
        to_jax(torch.arange(5))


def test_a_donated_array_is_refused():
    array = jnp.arange(8.0)
    array.delete()
    with pytest.raises(RuntimeError, match="donated"):
        to_torch(array)
