"""Attribution of an output to features: activation times gradient."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bridge.hooks import Acts, edit
from bridge.torch_sae import TorchSAE
from bridge.tracking import Features, active_features

Target = Callable[[Float[Tensor, "B T V"]], Tensor] | tuple[int, int]
"""A function that computes a scalar from the logits; or a position and a token id, whose logit is summed over rows."""


def attribute(
    model: nn.Module, sae: TorchSAE, hook: str, tokens: Int[Tensor, "B T"], target: Target, top_k: int | None = None
) -> Features:
    """Return activation times gradient of the active features at every position, by descending magnitude.

    The SAE's error is kept, so the gradient of a feature is that of the activation along its decoder row. To first
    order, the product is the decrease of the target if the feature is ablated at the position.

    Args:
      model: a nanochat.
      sae: the SAE of the hook.
      hook: the hook name.
      tokens: token ids, (B, T).
      target: the number to explain.
      top_k: number of the most active features per position; None: all active features.

    Raises:
      ValueError: the target is outside the text or the vocabulary, is not a scalar, or does not depend on the hook.
    """
    leaves: list[Acts] = []

    def cut(h: Acts) -> Acts:
        leaves.append(h.detach().requires_grad_())
        return leaves[-1]

    with torch.inference_mode(False), torch.enable_grad():
        with edit(model, {hook: cut}):
            logits = model(tokens)
        (gradient,) = torch.autograd.grad(_score(logits, target), leaves, allow_unused=True)
    if gradient is None:
        raise ValueError(f"the target does not depend on {hook}")
    with torch.no_grad():
        values, indices = active_features(sae, leaves[0], top_k)
        products = values * (gradient.to(sae.W_dec.dtype) @ sae.W_dec.T).gather(-1, indices)
        order = products.abs().argsort(dim=-1, descending=True)
        return Features(products.gather(-1, order), indices.gather(-1, order), sae.d_sae)


def _score(logits: Float[Tensor, "B T V"], target: Target) -> Float[Tensor, ""]:
    """Return the target as a scalar."""
    if callable(target):
        score = target(logits)
        if score.numel() != 1 or not score.requires_grad:
            raise ValueError("the target must return one number computed from the logits")
        return score.reshape(())
    position, token = target
    _, length, vocabulary = logits.shape
    if not -length <= position < length or not 0 <= token < vocabulary:
        raise ValueError(
            f"no logit at position {position} for token {token}: there are {length} positions and {vocabulary} tokens"
        )
    return logits[:, position, token].sum()
