"""Measure how well lenses predict: their divergence from the model on held-out text, layer by layer."""

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.functional import kl_div

from bridge.lenses.jacobian import FIRST
from bridge.lenses.lens import Lens
from bridge.lenses.streams import read, unembed


@dataclasses.dataclass(frozen=True)
class Quality:
    """A lens after one layer.

    Attributes:
      kl: KL(model || lens) in nats, in the mean over positions.
      agreement: share of positions at which both have the same most likely token.
    """

    kl: float
    agreement: float


@torch.no_grad()
def measure(
    model: nn.Module, lenses: Sequence[Lens], batches: Iterable[Int[Tensor, "_ _"]], first: int = FIRST
) -> dict[str, dict[int, Quality]]:
    """Return the quality of lenses by name and layer; the last layer is read like the others, not replaced.

    Args:
      model: a nanochat.
      lenses: the lenses.
      batches: rows of text that they were not fitted on, on the model's device.
      first: first position that counts; the last one does not.

    Raises:
      ValueError: no position counts.
    """
    sums = {(lens.name, layer): [0.0, 0.0] for lens in lenses for layer in lens.layers}
    count = 0
    for tokens in batches:
        streams = read(model, tokens)
        own = streams.logits[:, first:-1]
        target, best = own.log_softmax(-1), own.argmax(-1)
        count += best.numel()
        for lens in lenses:
            for layer in lens.layers:
                guess = unembed(model, lens.stream(streams, layer))[:, first:-1].log_softmax(-1)
                total = sums[lens.name, layer]
                total[0] += float(kl_div(guess, target, log_target=True, reduction="sum"))
                total[1] += float((guess.argmax(-1) == best).sum())
    if not count:
        raise ValueError(f"no position counts: give rows of more than {first + 1} tokens")
    qualities: dict[str, dict[int, Quality]] = {}
    for (name, layer), (kl, same) in sums.items():
        qualities.setdefault(name, {})[layer] = Quality(kl / count, same / count)
    return qualities
