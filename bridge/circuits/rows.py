"""Rows of the matrix of an attribution graph: direct effects of all sources on some targets, by one backward pass."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bridge.circuits.replacement import Replacement


@torch.inference_mode(False)
def direct_effects(
    r: Replacement, layer: int | None, vectors: Float[Tensor, "B C"], positions: Int[Tensor, " B"]
) -> tuple[Float[Tensor, "B S"], Float[Tensor, " B"]]:
    """Return the direct effects of all sources on `vectors . y[position]` in the frozen network.

    The effect of a source that writes the vector v at a site is v . d(vector . y[position]) / d(site). One batched
    backward pass serves all targets; it runs over the tokens up to the last of the positions and the layers below.

    Args:
      r: the replacement model of the prompt.
      layer: y is what the MLP of this layer reads; None is the final stream that lm_head reads.
      vectors: what each target reads.
      positions: where.

    Returns:
      A row for every target, with columns for the features, the errors (by layer and position) and the tokens; and the
      sum of the effects of all decoder biases. A row and its bias sum to `vectors . y[position]`.
    """
    below, length = r.depth if layer is None else layer, int(positions.max()) + 1
    frozen = r.frozen.prefix(length)
    with torch.enable_grad():
        inputs = frozen.inputs([h[:length] for h in r.base]).differentiable()
        reads, final = frozen.run(inputs)
    output = final if layer is None else reads[layer]
    cotangents = vectors.new_zeros(len(vectors), *output.shape)
    cotangents[torch.arange(len(vectors), device=vectors.device), positions] = vectors
    leaves = inputs.of_tokens(below)
    gradients = torch.autograd.grad(
        output, [*leaves, *inputs.mlp[:below]], cotangents, is_grads_batched=True, allow_unused=True
    )
    rows = vectors.new_zeros(len(vectors), r.sources)
    biases = vectors.new_zeros(len(vectors))
    tokens = rows[:, r.tokens.start : r.tokens.start + length]
    for leaf, gradient in zip(leaves, gradients, strict=False):
        if gradient is not None:
            tokens += torch.einsum("btc,tc->bt", gradient, leaf.detach())
    for i, gradient in enumerate(gradients[len(leaves) :]):
        if gradient is not None:
            features, errors = r.columns(i, length)
            written = torch.einsum("btc,tkc->btk", gradient, r.writes[i][:length]).flatten(1)
            rows[:, features] = written[:, r.slots[i][: features.stop - features.start]]
            rows[:, errors] = torch.einsum("btc,tc->bt", gradient, r.errors[i][:length])
            biases += gradient.sum(1) @ r.transcoders[i].b_dec
    return rows, biases
