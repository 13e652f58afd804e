"""Pass arrays between torch and jax without a copy: the only DLPack calls, and the rule for writing to shared memory.

An activation that was handed over belongs to jax. A later write by torch is not ordered with respect to pending reads
by jax, so torch must never write to it again: `to_jax` empties the tensor that it was given. It cannot know of other
views of the same storage; the caller must not write to these.
"""

import jax
import torch

ALIGNMENT = 64
"""Alignment in bytes that jax requires to use CPU memory without a copy."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def to_jax(acts: torch.Tensor) -> jax.Array:
    """Hand activations to jax without a copy, and empty `acts`.

    A tensor that is not contiguous or not aligned is copied once, by torch, since jax would have to. Gradients are not
    passed on.

    Args:
      acts: float32, bfloat16 or float16, of any shape, on CPU or CUDA.

    Returns:
      The same numbers in the same memory, of the same dtype and shape.

    Raises:
      TypeError: `acts` has another dtype; copy token ids through numpy instead.
      ValueError: `acts` is empty, for example because it was handed over before.
    """
    if acts.dtype not in _FLOATS:
        raise TypeError(f"activations are float32, bfloat16 or float16, not {acts.dtype}: copy token ids through numpy")
    if acts.numel() == 0:
        raise ValueError(
            f"a tensor of shape {tuple(acts.shape)} holds nothing to hand over; was it handed over before?"
        )
    tensor = acts.detach()
    if not tensor.is_contiguous() or (tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT):
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    array = jax.dlpack.from_dlpack(tensor, copy=False)
    acts.data = acts.new_empty(0)  # jax holds the storage; this handle points to it no longer
    return array


def to_torch(array: jax.Array) -> torch.Tensor:
    """Return a torch view of a jax array, without a copy. jax arrays never change: only read it.

    Raises:
      RuntimeError: the array was donated or deleted.
    """
    if array.is_deleted():
        raise RuntimeError("the array was donated to a jax computation and is gone: hand it over before, or copy it")
    return torch.from_dlpack(array)
