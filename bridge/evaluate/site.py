"""Where activations are read: a hook of a model, the tokens that count there, and text run up to it."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import nn

from bridge.hooks import capture, parse
from bridge.selection import kept


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
        """Runs token ids, (rows, row_len) each, up to the hook."""
        start = 0
        for ids in batches:
            tokens = torch.from_numpy(ids.astype(np.int64)).to(self.device)
            names = (self.hook_name, *self.beside)
            with torch.no_grad(), capture(self.model, names, stop=True) as captured:
                self.model(tokens)
            found = [captured[name] for name in names]
            counts = [kept(acts, tokens, self.excluded, self.drop_sinks) for acts in found]
            if not self.transcodes:
                found = [torch.cat(found, dim=-1) if self.beside else found[0]]
            yield Batch(start, tokens, found[0], found[-1], torch.stack(counts).all(0))
            start += len(ids)

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
