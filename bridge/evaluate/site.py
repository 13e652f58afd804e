"""Where activations are read: a hook of a model, the tokens that count there, and text run up to it."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import nn

from bridge import activations
from bridge.hooks import parse


class Batch(NamedTuple):
    """One forward pass."""

    start: int
    """Rows that came before."""
    tokens: Int[torch.Tensor, "B T"]
    acts: Float[torch.Tensor, "B T C"]
    """What the SAE reads: of a crosscoder all its layers side by side."""
    wanted: Float[torch.Tensor, "B T O"]
    """What it should make: the same, but of a transcoder its target."""
    mask: Bool[torch.Tensor, "B T"]
    """Which tokens count: none that is excluded, no sinks (`bridge.selection`)."""


@dataclasses.dataclass(frozen=True)
class Site:
    """An activation of a model, and how it is read."""

    model: nn.Module
    """A nanochat."""
    hook_name: str
    excluded: tuple[int, ...]
    """The ids that do not count, as in training (`bridge.selection`); () counts all."""
    drop_sinks: bool = True
    """Whether tokens of extreme norm do not count."""
    tokens_per_forward: int = 8192
    beside: tuple[str, ...] = ()
    """A transcoder's target, or the other layers of a crosscoder."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def read(self, batches: Iterable[np.ndarray]) -> Iterator[Batch]:
        """Run token ids, (rows, row_len) each, up to the hook."""
        names = (self.hook_name, *self.beside)
        for done in self.passes(names, batches):
            acts = [done.acts[name] for name in names]
            if not self.transcodes:
                acts = [torch.cat(acts, dim=-1) if self.beside else acts[0]]
            yield Batch(done.first_row, done.tokens, acts[0], acts[-1], done.mask(*names))

    def passes(
        self, hooks: Sequence[str], batches: Iterable[np.ndarray], stop: bool = True
    ) -> Iterator[activations.ForwardPass]:
        """Yield the forward pass of every batch of token ids, (rows, row_len) each."""
        return activations.read(
            self.model, hooks, batches, excluded=self.excluded, drop_sinks=self.drop_sinks, stop=stop
        )

    @property
    def transcodes(self) -> bool:
        """Whether what is made is another activation of the same layer."""
        return len(self.beside) == 1 and parse(self.hook_name)[1] != parse(self.beside[0])[1]

    def batches(self, rows: Int[np.ndarray, "R T"], numbers_per_token: int = 1) -> list[Int[np.ndarray, "r T"]]:
        """The rows in batches of `tokens_per_forward`, of less where every token makes many numbers; a row at least."""
        tokens = min(self.tokens_per_forward, _MOST_NUMBERS // numbers_per_token)
        step = max(tokens // max(rows.shape[1], 1), 1)
        return [rows[start : start + step] for start in range(0, len(rows), step)]


_MOST_NUMBERS = 2**27  # in a batch of latents or logits: half a GiB
