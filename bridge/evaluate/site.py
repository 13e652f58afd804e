"""Where activations are read: a hook of a model, the tokens that count there, and text run up to it."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import nn

from bridge.hooks import capture
from bridge.selection import kept


class Batch(NamedTuple):
    """One forward pass."""

    start: int
    """Rows that came before."""
    tokens: Int[torch.Tensor, "B T"]
    acts: Float[torch.Tensor, "B T C"]
    mask: Bool[torch.Tensor, "B T"]
    """Which tokens count: not BOS, no sinks (`bridge.selection`)."""


@dataclasses.dataclass(frozen=True)
class Site:
    """An activation of a model, and how it is read."""

    model: nn.Module
    """A nanochat."""
    hook_name: str
    bos_token_id: int | None
    """The id that does not count; None counts all."""
    drop_sinks: bool = True
    """Whether tokens of extreme norm do not count."""
    tokens_per_forward: int = 8192

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def read(self, batches: Iterable[np.ndarray]) -> Iterator[Batch]:
        """Runs token ids, (rows, row_len) each, up to the hook."""
        start = 0
        for ids in batches:
            tokens = torch.from_numpy(ids.astype(np.int64)).to(self.device)
            with torch.no_grad(), capture(self.model, [self.hook_name], stop=True) as captured:
                self.model(tokens)
            acts = captured[self.hook_name]
            yield Batch(start, tokens, acts, kept(acts, tokens, self.bos_token_id, self.drop_sinks))
            start += len(ids)

    def batches(self, rows: Int[np.ndarray, "R T"], numbers_per_token: int = 1) -> list[Int[np.ndarray, "r T"]]:
        """The rows in batches of `tokens_per_forward`, of less where every token makes many numbers; a row at least."""
        tokens = min(self.tokens_per_forward, _MOST_NUMBERS // numbers_per_token)
        step = max(tokens // max(rows.shape[1], 1), 1)
        return [rows[start : start + step] for start in range(0, len(rows), step)]


_MOST_NUMBERS = 2**27  # in a batch of latents or logits: half a GiB
