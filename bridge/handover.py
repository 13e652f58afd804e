"""The door between torch and jax: the only DLPack calls, and the rule of who may write to what passes through.

An activation that was handed over belongs to jax. Nothing orders a later write by torch against a read by jax that is
still to run, so torch must never write to it again: `to_jax` empties the tensor it was given. Other views of the same
storage cannot be seen from here; whoever hands over a view answers for the rest.
"""

import jax
import torch

ALIGNMENT = 64
"""Bytes: jax takes CPU memory without a copy only where it starts on such a boundary."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def to_jax(acts: torch.Tensor) -> jax.Array:
    """Hands activations to jax without a copy, and empties `acts`.

    A tensor that is strided, or that starts off the alignment, is copied once, on torch's side, since jax would have
    to. Gradients are left behind.

    Args:
      acts: float32, bfloat16 or float16, of any shape, on CPU or CUDA.

    Returns:
      The same numbers in the same place, of the same dtype and shape.

    Raises:
      TypeError: another dtype; token ids are copied through numpy instead.
      ValueError: `acts` holds no numbers (it was handed over already?).
    """
    if acts.dtype not in _FLOATS:
        raise TypeError(f"activations are float32, bfloat16 or float16, not {acts.dtype}: copy token ids through numpy")
    if acts.numel() == 0:
        raise ValueError(
            f"a tensor of shape {tuple(acts.shape)} holds nothing to hand over; was it handed over before?"
        )
    mine = acts.detach()
    if not mine.is_contiguous() or (mine.device.type == "cpu" and mine.data_ptr() % ALIGNMENT):
        mine = mine.clone(memory_format=torch.contiguous_format)
    theirs = jax.dlpack.from_dlpack(mine, copy=False)
    acts.data = acts.new_empty(0)  # jax holds the storage; this handle points to it no longer
    return theirs


def to_torch(array: jax.Array) -> torch.Tensor:
    """Shows a jax array to torch without a copy. jax arrays never change: torch may only read it.

    Raises:
      RuntimeError: the array was donated or deleted.
    """
    if array.is_deleted():
        raise RuntimeError("the array was donated to a jax computation and is gone: hand it over before, or copy it")
    return torch.from_dlpack(array)
