"""Windows of text through a model with an SAE's reconstruction in it, and the gradient of the output's loss. torch."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bridge import activations
from bridge.activations import ForwardPass
from bridge.finetuning.config import Objective
from bridge.hooks import edit
from bridge.selection import among

_LEAST = 1e-12  # nats: below this the output is the model's own, and there is nothing to balance


@dataclasses.dataclass(frozen=True)
class Batch:
    """Whole windows of text, after the model has read them."""

    passes: Sequence[ForwardPass]
    """In order; together they are the windows of the batch."""
    kept: Sequence[int]
    """Of every pass, the number of tokens that the SAE reconstructs."""
    acts: tuple[Float[Tensor, "n _"], ...]
    """For every hook n rows: the tokens that the SAE reconstructs, then repetitions of the first of them."""


class Output(NamedTuple):
    """The output of the model with the reconstruction in it."""

    gradient: Float[Tensor, "n o"]
    """Of the objective with respect to the reconstruction, times the weight; 0 for repetitions."""
    divergence: Float[Tensor, ""]
    """KL(model || model with the reconstruction) in nats per token."""
    cross_entropy: Float[Tensor, ""]
    """Nats per token."""


class SplicedModel:
    """A model in which an SAE's reconstruction replaces the activations that the SAE was trained on.

    Tokens that are left out in training (excluded ones and sinks) keep their activations, as in evaluation
    (`bridge.evaluate.splice`). Averages are over the positions whose own token is not excluded.

    Args:
      model: a nanochat, frozen.
      hooks: the hook that the SAE reads, and of a transcoder the one that it predicts; the last is replaced.
      objective: what the gradient is of; "mse" has none, and the model then runs only up to the hook.
      excluded: ids of tokens to leave out.
      drop_sinks: whether to leave out tokens of extreme norm.
      rows_per_forward: windows in one forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        hooks: Sequence[str],
        objective: Objective,
        *,
        excluded: tuple[int, ...],
        drop_sinks: bool,
        rows_per_forward: int,
    ):
        self._model, self._hooks, self._objective = model, tuple(hooks), objective
        self._excluded, self._drop_sinks, self._rows = excluded, drop_sinks, max(rows_per_forward, 1)

    def read(self, windows: Int[np.ndarray, "R T"]) -> Batch:
        """Run windows of token ids through the unchanged model.

        Raises:
          ValueError: no token of the windows counts.
        """
        parts = [windows[start : start + self._rows] for start in range(0, len(windows), self._rows)]
        passes = list(
            activations.read(
                self._model,
                self._hooks,
                parts,
                excluded=self._excluded,
                drop_sinks=self._drop_sinks,
                stop=self._objective == "mse",
            )
        )
        masks = [done.mask(*self._hooks).flatten() for done in passes]
        keep = torch.cat(masks)
        kept = torch.stack([mask.sum() for mask in masks]).tolist()
        if not sum(kept):
            raise ValueError(
                f"none of the {len(keep)} tokens of a batch counts at {', '.join(self._hooks)}: each is an excluded "
                "token or a token of extreme norm; give larger batches, or exclude fewer tokens"
            )
        order = torch.argsort(~keep, stable=True)[torch.arange(len(keep), device=keep.device) % sum(kept)]
        acts = tuple(torch.cat([done.acts[name].flatten(0, 1) for done in passes])[order] for name in self._hooks)
        return Batch(passes, kept, acts)

    def output(
        self, batch: Batch, y_hat: Float[Tensor, "n o"], target: Float[Tensor, "n o"], scale: float = 1.0
    ) -> Output:
        """Run the model with the reconstruction, and return the gradient of the objective.

        The gradient is weighted by MSE / KL of the batch, detached, so that the KL divergence and the squared error
        have equal magnitude: Karvonen 2025, "Revisiting end-to-end sparse autoencoder training: a short finetune is
        all you need" (arXiv 2503.17272). The cross-entropy has the same weight, because its size is mostly that of
        the text's own uncertainty.

        Args:
          batch: from `read`; the objective is not "mse".
          y_hat: the reconstruction of its rows, float32; only read.
          target: the activations that it replaces.
          scale: factor on the target in training, in whose units the squared error is.
        """
        gradients = torch.zeros_like(y_hat)
        counts = [~among(done.tokens, self._excluded) for done in batch.passes]
        positions = torch.stack([c.sum() for c in counts]).sum().clamp(min=1)
        predictions = torch.stack([c[:, :-1].sum() for c in counts]).sum().clamp(min=1)
        divergence = cross_entropy = torch.zeros((), device=y_hat.device)
        start = 0
        for done, counted, kept in zip(batch.passes, counts, batch.kept, strict=True):
            rows = slice(start, start + kept)
            own = y_hat[rows].detach().requires_grad_()
            with torch.enable_grad():
                sums = self._losses(done, counted, own)
                kl, ce = sums[0] / positions, sums[1] / predictions
                (gradients[rows],) = torch.autograd.grad(ce if self._objective == "ce" else kl, own)
            divergence, cross_entropy = divergence + kl.detach(), cross_entropy + ce.detach()
            start += kept
        error = (y_hat - target.float()).square().sum(-1).mean() * scale**2
        gradients *= error / divergence.clamp(min=_LEAST)
        return Output(gradients, divergence, cross_entropy)

    def _losses(
        self, done: ForwardPass, counted: Bool[Tensor, "B T"], own: Float[Tensor, "m o"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Return the sums of the KL divergence and of the cross-entropy over the positions of a pass that count."""
        with edit(self._model, {self._hooks[-1]: _replacement(done.mask(*self._hooks), own)}):
            log_probs = self._model(done.tokens).log_softmax(-1)
        base = done.logits.log_softmax(-1)
        divergence = (base.exp() * (base - log_probs)).sum(-1)
        nats = -log_probs[:, :-1].gather(-1, done.tokens[:, 1:, None])[..., 0]
        return (divergence * counted).sum(), (nats * counted[:, :-1]).sum()


def _replacement(mask: Bool[Tensor, "B T"], own: Float[Tensor, "m o"]) -> Callable[[Tensor], Tensor]:
    """Return the edit that puts rows in the place of the activations of masked tokens."""

    def replace(acts: Float[Tensor, "B T O"]) -> Float[Tensor, "B T O"]:
        replaced = acts.clone()
        replaced[mask] = own.to(acts.dtype)
        return replaced

    return replace
