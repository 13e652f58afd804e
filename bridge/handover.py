"""Pass arrays between torch and jax without a copy: the only DLPack calls, and the rule for writing to shared memory.

An activation that was handed over belongs to jax. A later write by torch is not ordered with respect to pending reads
by jax, so torch must never write to it again: `to_jax` empties the tensor that it was given. It cannot know of other
views of the same storage; the caller must not write to these.

On a GPU the memory returns to torch's allocator only behind jax's reads. jax frees a foreign buffer as soon as the
array is gone, while computations that read it may still be queued, and torch would write to it on its own stream.
"""

import functools
import weakref
from typing import Any

import jax
import numpy as np
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
    if tensor.is_cuda:
        return_behind_reads(array, tensor, torch.cuda.stream(torch.cuda.current_stream(tensor.device)))
    acts.data = acts.new_empty(0)  # jax holds the storage; this handle points to it no longer
    return array


def return_behind_reads(array: jax.Array, tensor: torch.Tensor, stream: Any) -> None:
    """Keep the tensor that an array lies in until the array is gone; torch's later work waits for jax's earlier work.

    Args:
      array: the array.
      tensor: the tensor; freed when the array is gone.
      stream: a context manager that enters the stream on which torch will use the memory again.
    """
    (device,) = array.devices()
    finalizer = weakref.finalize(array, _return, tensor, stream, *_marker(device))
    finalizer.atexit = False


def _return(tensor: torch.Tensor, stream: Any, mark: Any, start: jax.Array) -> None:
    """Let torch's stream wait for all that jax has queued; afterwards the caller drops the tensor."""
    with stream:
        torch.from_dlpack(mark(start))


@functools.cache
def _marker(device: jax.Device) -> tuple[Any, jax.Array]:
    """Return a function and its argument: a computation that ends when all computations before it have ended."""
    return jax.jit(lambda x: x + 1), jax.device_put(np.int32(0), device)


def to_torch(array: jax.Array) -> torch.Tensor:
    """Return a torch view of a jax array, without a copy. jax arrays never change: only read it.

    On a GPU, keep the view until the kernels that read it have run.

    Raises:
      RuntimeError: the array was donated or deleted.
    """
    if array.is_deleted():
        raise RuntimeError("the array was donated to a jax computation and is gone: hand it over before, or copy it")
    return torch.from_dlpack(array)
