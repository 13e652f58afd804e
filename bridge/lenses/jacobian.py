"""Fit a Jacobian lens: the mean derivative of the final residual stream with respect to every layer's output.

The estimator of Neuronpedia's and Anthropic's jacobian-lens: the model with its real, nonlinear backward pass, a sum
over later targets, means over sources and prompts. The target is the stream that the final norm reads, after the
backout of G7, so that layers up to the one that is backed out have its effect in their matrices.
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bridge.circuits.frozen import check_model
from bridge.circuits.tracing import free_memory
from bridge.hooks import capture, edit, hook_name
from bridge.lenses.lens import JacobianLens
from bridge.lenses.paths import direct_paths
from bridge.lenses.streams import Streams

FIRST = 16
"""First position that counts as source and target: attention sinks are at the start of a text."""
SHORTEST = FIRST + 2
"""Tokens of the shortest prompt that counts: one valid position, and the last, which is none."""
_RECENT = 10
"""Prompts over which the movement of the mean is averaged."""
_COPY_FLOATS = 40
"""Floats per layer, position and channel that a copy of a prompt holds for the backward pass."""
_BATCH_BYTES = 2**30
_LARGEST_HALF = 65504.0


def row_jacobians(
    model: nn.Module, tokens: Int[Tensor, " T"], batch_size: int | None = None, first: int = FIRST
) -> Float[Tensor, "L C C"]:
    """Return the Jacobians of one prompt: row i of matrix l is the derivative of output channel i.

    Positions `first` to T - 2 are valid. One forward pass of copies of the prompt, then a backward pass for every
    `batch_size` channels: copy b has the cotangent 1 in its channel at all valid targets.

    Args:
      model: a nanochat in float32 or float64.
      tokens: the prompt, BOS first, on the model's device.
      batch_size: copies; None is as many as take about 1 GiB, or an eighth of a GPU's free memory.
      first: first valid position.

    Raises:
      ValueError: the prompt has no valid position, or the model is another or too coarse.
    """
    gpt = check_model(model, "Jacobian lenses")
    if len(tokens) < first + 2:
        raise ValueError(f"the prompt has {len(tokens)} tokens: at least {first + 2} are needed, as ends do not count")
    width, depth = gpt.config.n_embd, gpt.config.n_layer
    copies = tokens[:-1].expand(min(batch_size or _batch_size(gpt, len(tokens)), width), -1)  # nothing reads the last
    names = [hook_name(layer, "resid_post") for layer in range(depth)]
    rows = []
    with torch.inference_mode(False), torch.enable_grad():
        with edit(model, {names[0]: lambda h: h.detach().requires_grad_()}), capture(model, names) as acts:
            model(copies)
        blocks = [acts[name] for name in names]
        x0 = torch.zeros_like(blocks[0])  # the derivative with respect to it is not asked for
        target = Streams(blocks, x0, None, None).direct(direct_paths(model)[-1], depth - 1)
        for start in range(0, width, len(copies)):
            channels = torch.arange(start, min(start + len(copies), width), device=target.device)
            cotangent = torch.zeros_like(target)
            cotangent[torch.arange(len(channels)), first:, channels] = 1.0
            grads = torch.autograd.grad(target, blocks, cotangent, retain_graph=start + len(copies) < width)
            rows.append(torch.stack([grad[: len(channels), first:].mean(1) for grad in grads]))
    return torch.cat(rows, dim=1)


def _batch_size(gpt: nn.Module, length: int) -> int:
    weight = gpt.lm_head.weight
    budget = free_memory(weight.device) // 8 if weight.is_cuda else _BATCH_BYTES
    return max(1, budget // (_COPY_FLOATS * gpt.config.n_layer * length * gpt.config.n_embd * weight.element_size()))


@dataclasses.dataclass(frozen=True)
class Settings:
    """The conditions under which a fit ends.

    Attributes:
      max_prompts: most prompts.
      min_prompts: prompts before which it does not end by itself.
      tolerance: end when the mean moved by less over the last ten prompts, relative to its norm; it falls as 1 / n.
      batch_size: see `row_jacobians`.
    """

    max_prompts: int = 1000
    min_prompts: int = 100
    tolerance: float = 2e-3
    batch_size: int | None = None


class Mean:
    """The running mean of the Jacobians of prompts.

    Args:
      start: a lens whose prompts are counted too; None starts anew.
      moves: the last movements of its mean.
    """

    def __init__(self, start: JacobianLens | None = None, moves: Iterable[float] = ()):
        self.count = 0 if start is None else start.n_prompts
        self.moves: deque[float] = deque(moves, maxlen=_RECENT)
        """mean over layers of |J(n) - J(n-1)| / |J(n)|, for the last prompts."""
        self._mean = None if start is None else torch.stack([start.matrices[i] for i in start.layers])

    def add(self, jacobians: Float[Tensor, "L C C"]) -> None:
        """Add one prompt."""
        self.count += 1
        if self._mean is None:
            self._mean = jacobians.clone()
            return
        change = (jacobians - self._mean) / self.count
        self._mean += change
        norms = self._mean.flatten(1).norm(dim=1).clamp(min=torch.finfo(change.dtype).tiny)
        self.moves.append(float((change.flatten(1).norm(dim=1) / norms).mean()))

    @property
    def movement(self) -> float:
        """The mean of the last movements; infinite before there are ten."""
        return sum(self.moves) / _RECENT if len(self.moves) == _RECENT else float("inf")

    def lens(self, provenance: dict[str, object] | None = None) -> JacobianLens:
        """Return the lens of the prompts so far.

        Raises:
          ValueError: there is none yet, or the numbers are not finite.
        """
        if self._mean is None:
            raise ValueError(f"no prompt of at least {SHORTEST} tokens was given: give longer text")
        if not torch.isfinite(self._mean).all() or float(self._mean.abs().max()) > _LARGEST_HALF:
            raise ValueError(
                f"entries of the Jacobians reach {float(self._mean.abs().max()):g}; a lens file holds at most "
                f"{_LARGEST_HALF:g}: check the model's weights"
            )
        return JacobianLens(dict(enumerate(self._mean.clone())), self.count, provenance or {})


def fit(
    model: nn.Module,
    prompts: Iterable[Int[Tensor, " _"]],
    settings: Settings | None = None,
    *,
    mean: Mean | None = None,
    report: Callable[[Mean], None] = lambda mean: None,
) -> Mean:
    """Add prompts to a mean until it is as settled as asked, or the prompts end.

    Args:
      model: a nanochat in float32 or float64.
      prompts: token ids with BOS first, on the model's device, of at least `SHORTEST` tokens; others are skipped.
      settings: when to end.
      mean: the mean of earlier prompts; None starts anew.
      report: called after every prompt.

    Raises:
      ValueError: the model is another or too coarse.
    """
    settings, mean = settings or Settings(), mean or Mean()
    remaining = iter(prompts)  # no prompt is taken from it that is not counted
    while mean.count < settings.max_prompts and not _is_settled(mean, settings):
        tokens = next(remaining, None)
        if tokens is None:
            break
        if len(tokens) >= SHORTEST:
            mean.add(row_jacobians(model, tokens, settings.batch_size))
            report(mean)
    return mean


def _is_settled(mean: Mean, settings: Settings) -> bool:
    return mean.count >= settings.min_prompts and mean.movement < settings.tolerance
