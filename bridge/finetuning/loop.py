"""The steps of fine-tuning: torch runs the model, jax the SAE, and every step hands gradients from one to the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import torch
from jaxtyping import Int

from bridge import handover
from bridge.finetuning.spliced import Batch, Output, SplicedModel
from jsae import loop, metrics, step
from jsae.loop import Member
from jsae.ops import Ops
from jsae.pretrained import Pretrained

if TYPE_CHECKING:
    from jsae.state import Acts

SAMPLE = 16384
"""Tokens, about, from which the scales of activations are estimated."""
RATE_SHARE = 0.06
"""The default learning rate is this fraction of the default for the training that the SAE had. The best rate does not
depend on the length of the fine-tuning (docs/performance.md)."""
_SLOWER = {"jumprelu": 1 / 5}
"""Factors on it: JumpReLU's thresholds move ten times as fast as weights."""

Windows = Callable[[int], Int[np.ndarray, "R T"]]
"""Returns the next windows of text, so many."""


class Steps:
    """The steps of one SAE, on whole windows of text.

    Args:
      member: the SAE; its batches are whole windows.
      start: the exported SAE that it continues.
      model: the model, with the objective.
      windows: the text.
      row_len: tokens of a window.
      guided: whether steps have a gradient of the model's output; False for the objective "mse".
      training: activations that the SAE was trained on before.
      ops: the implementation of operations.
    """

    def __init__(
        self,
        member: Member,
        start: Pretrained,
        model: SplicedModel,
        windows: Windows,
        row_len: int,
        guided: bool,
        training: int,
        ops: Ops | None = None,
    ):
        self._member, self._model, self._windows, self._guided = member, model, windows, guided
        self._rows = member.train.batch_size // row_len
        train, ops = member.train, ops or member.ops
        self._reconstruct = jax.jit(lambda state, acts: step.reconstruct(train, ops, state, acts))
        self._balance = jax.jit(lambda state, acts, g: step.balanced_strength(train, ops, state, acts, g))
        self._update = jax.jit(
            lambda state, acts, g: step.update(train, ops, state, acts, output_gradient=g), donate_argnums=0
        )
        sample_rows = max(SAMPLE // row_len, 1)
        sample = self._hand_over(model.read(windows(sample_rows)))
        self.state = loop.init([member], [sample], ops, None, [start])[0]
        if train.learning_rate is None:
            shorter = math.sqrt(train.num_activations / training)  # defaults fall with the root of the length
            share = RATE_SHARE * _SLOWER.get(member.sae.architecture, 1)
            self.state = self.state._replace(rate=share * shorter * self.state.rate)
        self._scale = float(self.state.scale_out)

    def run(self, log_every: int) -> Iterator[tuple[int, dict[str, Any] | None]]:
        """Take all steps; yield the number of each and, every `log_every` steps and after the last, the metrics.

        They are those of `jsae.loop.summaries` over the batches since the last ones; with an objective other than "mse"
        also `kl` and `ce`, nats per token. `density_histogram` is that of `jsae.metrics.density_histogram`.

        Raises:
          NotFiniteError, ActivationsError: a loss or activations that are not finite.
          ValueError: no token of a batch counts.
        """
        last, sums = self._member.train.num_steps, None
        outputs: list[Output] = []
        for number in range(1, last + 1):
            batch_sums, output = self._step(number)
            sums = batch_sums if sums is None else jax.tree.map(lambda a, b: a + b, sums, batch_sums)
            outputs += [] if output is None else [output]
            values = None
            if number % log_every == 0 or number == last:
                loop.check_finite(self.state, sums)
                values, sums, outputs = self._values(number, sums, outputs), None, []
            yield number, values

    def _step(self, number: int) -> tuple[metrics.Sums, Output | None]:
        """Take one step; return the sums of its batch and the output of the model, without its gradient."""
        batch = self._model.read(self._windows(self._rows))
        target = batch.acts[-1].detach()  # another handle of the memory that jax gets, to read
        acts, output, gradient = self._hand_over(batch), None, None
        if self._guided:
            y_hat = self._reconstruct(self.state, acts)
            output = self._model.output(batch, handover.to_torch(y_hat), target, self._scale)
            gradient = handover.to_jax(output.gradient)
        if number == 1 and self._member.sae.target_l0 is not None:
            strength = self._balance(self.state, acts, gradient)
            self.state = self.state._replace(control=self.state.control._replace(strength=strength))
        self.state, sums = self._update(self.state, acts, gradient)
        return sums, output

    def _hand_over(self, batch: Batch) -> Acts:
        """Return the activations of a batch in jax: an array, or input and target of a transcoder."""
        parts: Any = tuple(handover.to_jax(part) for part in batch.acts)
        return parts if len(parts) > 1 else parts[0]

    def _values(self, number: int, sums: metrics.Sums, outputs: list[Output]) -> dict[str, Any]:
        (summary,) = loop.summaries([self._member], number, (self.state,), (sums,))
        values: dict[str, Any] = summary | {"density_histogram": metrics.density_histogram(sums)}
        if outputs:
            for name, of in (("kl", "divergence"), ("ce", "cross_entropy")):
                values[name] = torch.stack([getattr(output, of) for output in outputs]).mean().item()
        return values
