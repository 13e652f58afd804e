"""Fit a tuned lens: translators of every layer's output, so that the model's end gives the model's own prediction.

Belrose et al. 2023, "Eliciting Latent Predictions from Transformers with the Tuned Lens": the loss is KL(model || lens)
in the mean over positions, the model is frozen, and translators start as the identity.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import kl_div

from bridge.circuits.frozen import check_model
from bridge.lenses.lens import TunedLens
from bridge.lenses.paths import direct_paths
from bridge.lenses.streams import read, unembed

Moments = Mapping[str, Mapping[int, Tensor]]
"""Adam's moments by name, those of `bridge.lenses.lens_file.MOMENTS`, and layer."""
_ADAM = {"mean": "exp_avg", "square": "exp_avg_sq"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The optimisation.

    Attributes:
      steps: number of steps; each takes one batch of rows.
      learning_rate: of Adam, at the start; it falls linearly to 0.
      weight_decay: pulls the translators to the identity, as in AdamW.
    """

    steps: int = 250
    learning_rate: float = 2e-3
    weight_decay: float = 0.0


def new(model: nn.Module) -> TunedLens:
    """Return the tuned lens before it is fitted, which is the logit lens.

    Raises:
      ValueError: the model is no nanochat of this project.
    """
    gpt = check_model(model, "tuned lenses", coarse=True)
    width, device = gpt.config.n_embd, gpt.lm_head.weight.device
    kind = torch.promote_types(gpt.lm_head.weight.dtype, torch.float32)
    signs = {layer: path.sign for layer, path in enumerate(direct_paths(model))}
    return TunedLens(
        signs,
        {layer: torch.zeros(width, width, dtype=kind, device=device) for layer in signs},
        {layer: torch.zeros(width, dtype=kind, device=device) for layer in signs},
    )


class Fit:
    """A fit in progress: translators, Adam's moments, and the number of steps that were taken.

    Args:
      model: a nanochat in float32 or float64.
      settings: the optimisation.
      lens: translators to continue with; None starts with those of `new`.
      moments: Adam's moments of these, from `moments`; None for a new lens.
      step: steps that were taken.

    Raises:
      ValueError: the model is another or too coarse.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        lens: TunedLens | None = None,
        moments: Moments | None = None,
        step: int = 0,
    ):
        check_model(model, "tuned lenses")
        self._model, self.settings, self.step = model, settings, step
        with torch.inference_mode(False):
            self.lens = lens or new(model)
        self._weights = [*self.lens.matrices.values(), *self.lens.biases.values()]
        for weight in self._weights:
            weight.requires_grad_()
        self._optimizer = torch.optim.AdamW(
            self._weights, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        if moments is not None:
            parts = {kind: [*moments[f"A_{kind}"].values(), *moments[f"b_{kind}"].values()] for kind in _ADAM}
            for number, weight in enumerate(self._weights):
                own = {name: parts[kind][number].clone() for kind, name in _ADAM.items()}
                self._optimizer.state[weight] = {"step": torch.tensor(float(step))} | own

    def take_step(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, " L"]:
        """Take a step on a batch; return the KL divergence by layer in nats, before it.

        Raises:
          ValueError: a loss is not finite.
        """
        with torch.inference_mode(False), torch.enable_grad():
            self._optimizer.param_groups[0]["lr"] = self.settings.learning_rate * (1 - self.step / self.settings.steps)
            self._optimizer.zero_grad()
            losses = _losses(self._model, self.lens, tokens)
            self.step += 1
            if not torch.isfinite(losses).all():
                raise ValueError(
                    f"the loss of step {self.step} is not finite: give a lower learning rate, or check the model"
                )
            self._optimizer.step()
        return losses

    def moments(self) -> Moments:
        """Return Adam's moments by name and layer, after at least one step."""
        kept: dict[str, dict[int, Tensor]] = {}
        for part, weights in {"A": self.lens.matrices, "b": self.lens.biases}.items():
            for kind, name in _ADAM.items():
                kept[f"{part}_{kind}"] = {
                    layer: self._optimizer.state[weight][name] for layer, weight in weights.items()
                }
        return kept

    def finished(self) -> TunedLens:
        """Return the lens, whose tensors need no gradient any more."""
        for weight in self._weights:
            weight.requires_grad_(False)
            weight.grad = None
        return self.lens


def fit(
    model: nn.Module,
    batches: Iterable[Int[Tensor, "_ _"]],
    settings: Settings | None = None,
    *,
    begun: Fit | None = None,
    report: Callable[[int, Float[Tensor, " L"]], None] = lambda step, losses: None,
) -> TunedLens:
    """Return a lens that is fitted on batches of rows.

    Args:
      model: a nanochat in float32 or float64.
      batches: token ids, on the model's device; one per step.
      settings: the optimisation.
      begun: a fit with these settings, which is continued; the batches are those of its further steps.
      report: called after every step with its number, from 1, and the KL divergence by layer in nats.

    Raises:
      ValueError: the model is another or too coarse, there are fewer batches than steps, or a loss is not finite.
    """
    fit = begun or Fit(model, settings or Settings())
    steps = fit.settings.steps
    for tokens in itertools.islice(batches, steps - fit.step):
        losses = fit.take_step(tokens)
        report(fit.step, losses)
    if fit.step < steps:
        raise ValueError(f"there are batches for {fit.step} steps of {steps}: give more text, or fewer steps")
    return fit.finished()


def _losses(model: nn.Module, lens: TunedLens, tokens: Int[Tensor, "B T"]) -> Float[Tensor, " L"]:
    """Add the gradient of every layer's loss to its translator, one layer at a time, and return the losses."""
    streams = read(model, tokens)
    target = streams.logits.log_softmax(-1)
    losses = []
    for layer in lens.layers:
        guess = unembed(model, lens.stream(streams, layer)).log_softmax(-1)
        loss = kl_div(guess, target, log_target=True, reduction="none").sum(-1).mean()
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses)
