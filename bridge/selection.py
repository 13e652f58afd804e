"""Which tokens an SAE is trained and measured on."""

import torch
from jaxtyping import Bool, Float, Int

SINK_NORM_MULTIPLE = 10.0
"""A token whose norm exceeds this multiple of the median is an attention sink: such tokens are few, say nothing of the
text, and would take the largest part of the squared error."""


def kept(
    acts: Float[torch.Tensor, "B T C"], tokens: Int[torch.Tensor, "B T"], drop: int | None, drop_sinks: bool
) -> Bool[torch.Tensor, "B T"]:
    """The tokens that count: not those with the id `drop` (BOS), nor, with `drop_sinks`, those of extreme norm.

    A token whose norm is not finite is no sink: it stays, so that the run that meets it can say so.
    """
    mask = torch.ones_like(tokens, dtype=torch.bool) if drop is None else tokens != drop
    if drop_sinks:
        norms = acts.float().norm(dim=-1)
        mask &= ~(norms > SINK_NORM_MULTIPLE * norms.nanmedian()) | ~norms.isfinite()
    return mask
