"""The largest numbers of every row, without their order."""

import numpy as np
import torch
from jaxtyping import Float, Int

FEWEST_ROWS = 8
"""Rows from which numpy selects faster than torch on a processor: at 2,048 rows of 1,024, in 6 ms for 15."""


def largest(
    x: Float[torch.Tensor, "*rows f"], k: int
) -> tuple[Float[torch.Tensor, "*rows k"], Int[torch.Tensor, "*rows k"]]:
    """Return the values and indices of `x.topk(k)` in any order. Of equal values, any may be selected.

    Gradients flow to x. On a CPU numpy selects in a third to half of the time that torch takes.
    """
    few = x.shape[:-1].numel() < FEWEST_ROWS
    if few or x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) or torch.compiler.is_compiling():
        values, indices = x.topk(k, dim=-1, sorted=False)
        return values, indices
    width = x.shape[-1]
    if k == width:
        return x, torch.arange(width).expand(x.shape)
    indices = torch.from_numpy(np.argpartition(x.detach().numpy(), width - k, axis=-1)[..., width - k :])
    return x.gather(-1, indices), indices
