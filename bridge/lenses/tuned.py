"""Fit a tuned lens: translators of every layer's output, so that the model's end gives the model's own prediction.

Belrose et al. 2023, "Eliciting Latent Predictions from Transformers with the Tuned Lens": the loss is KL(model || lens)
in the mean over positions, the model is frozen, and translators start as the identity.
"""

import dataclasses
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import kl_div

from bridge.circuits.frozen import check_model
from bridge.lenses.lens import TunedLens
from bridge.lenses.paths import direct_paths
from bridge.lenses.streams import read, unembed


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


def fit(
    model: nn.Module,
    batches: Iterable[Int[Tensor, "_ _"]],
    settings: Settings | None = None,
    *,
    report: Callable[[int, Float[Tensor, " L"]], None] = lambda step, losses: None,
) -> TunedLens:
    """Return a lens that is fitted on batches of rows.

    Args:
      model: a nanochat in float32 or float64.
      batches: token ids, on the model's device; one per step.
      settings: the optimisation.
      report: called after every step with its number, from 1, and the KL divergence by layer in nats.

    Raises:
      ValueError: the model is another or too coarse, there are fewer batches than steps, or a loss is not finite.
    """
    check_model(model, "tuned lenses")
    settings = settings or Settings()
    with torch.inference_mode(False), torch.enable_grad():
        return _fit(model, batches, settings, report)


def _fit(
    model: nn.Module,
    batches: Iterable[Int[Tensor, "_ _"]],
    settings: Settings,
    report: Callable[[int, Float[Tensor, " L"]], None],
) -> TunedLens:
    lens = new(model)
    weights = [*lens.matrices.values(), *lens.biases.values()]
    for weight in weights:
        weight.requires_grad_()
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / settings.steps)
    step = 0
    for step, tokens in enumerate(batches, 1):
        optimizer.zero_grad()
        losses = _losses(model, lens, tokens)
        if not torch.isfinite(losses).all():
            raise ValueError(f"the loss of step {step} is not finite: give a lower learning rate, or check the model")
        optimizer.step()
        schedule.step()
        report(step, losses)
        if step == settings.steps:
            break
    if step < settings.steps:
        raise ValueError(f"there are batches for {step} steps of {settings.steps}: give more text, or fewer steps")
    for weight in weights:
        weight.requires_grad_(False)
        weight.grad = None
    return lens


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
