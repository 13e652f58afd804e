"""Read activations: a hook of a model, the tokens that count there, and text run up to it."""

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import nn

from bridge import activations
from bridge.hooks import parse
from bridge.passes import unwrapped


class Batch(NamedTuple):
    """One forward pass."""

    start: int
    """Number of rows in earlier batches."""
    tokens: Int[torch.Tensor, "B T"]
    acts: Float[torch.Tensor, "B T C"]
    """The SAE's input; for a crosscoder all its layers, concatenated."""
    target: Float[torch.Tensor, "B T O"]
    """What the SAE is to reconstruct: its input, or a transcoder's target."""
    mask: Bool[torch.Tensor, "B T"]
    """Which tokens count: neither excluded ones nor sinks (`bridge.selection`)."""


@dataclasses.dataclass(frozen=True)
class Site:
    """An activation of a model, and how it is read."""

    model: nn.Module
    """A nanochat."""
    hook_name: str
    excluded: tuple[int, ...]
    """Ids of tokens that do not count, as in training (`bridge.selection`); with () all count."""
    drop_sinks: bool = True
    """Whether tokens of extreme norm do not count."""
    tokens_per_forward: int = 8192
    other_hooks: tuple[str, ...] = ()
    """A transcoder's target, or the other layers of a crosscoder."""
    models: Collection[nn.Module] = ()
    """The checkpoints that a crosscoder over checkpoints reads, `model` among them, on one device; () is `model`
    alone. Unless they are a tuple, each is of use until the next one is asked for (`bridge.stages.loading.models`)."""

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return next(self.model.parameters()).device

    def read(self, batches: Iterable[np.ndarray]) -> Iterator[Batch]:
        """Run batches of token ids, (rows, row_len) each, up to the hook; yield the activations."""
        names = (self.hook_name, *self.other_hooks)
        for done in self.passes_of_all(names, batches):
            acts = [one.acts[name] for one in done for name in names]
            mask = done[0].mask(*names) if len(done) == 1 else torch.stack([one.mask(*names) for one in done]).all(0)
            if not self.transcodes:
                acts = [torch.cat(acts, dim=-1) if len(acts) > 1 else acts[0]]
            yield Batch(done[0].first_row, done[0].tokens, acts[0], acts[-1], mask)

    def passes_of_all(
        self, hooks: Sequence[str], batches: Iterable[np.ndarray], complete: Collection[int] = ()
    ) -> Iterator[list[activations.ForwardPass]]:
        """Yield for every batch of token ids one forward pass of each model.

        Models that are of use in turn read several batches each: up to half a GiB of activations and logits.

        Args:
          hooks: names of the activations to capture.
          batches: token ids, (rows, row_len) each.
          complete: numbers of the models whose passes go to the end and give logits.
        """
        models = self.models or (self.model,)
        start = 0
        numbers = 0
        if not isinstance(self.models, tuple):
            sizes = unwrapped(self.model).config
            numbers = len(models) * len(hooks) * sizes.n_embd + len(complete) * sizes.vocab_size
        for group in self._groups(batches, numbers):
            of_models: list[list[activations.ForwardPass]] = []
            for number, model in enumerate(models):
                own = dataclasses.replace(self, model=model, models=())
                of_models.append(list(own.passes(hooks, group, stop=number not in complete, first_row=start)))
            start += sum(map(len, group))
            yield from map(list, zip(*of_models, strict=True))

    def _groups(self, batches: Iterable[np.ndarray], numbers_per_token: int) -> Iterator[list[np.ndarray]]:
        """Yield the batches that a model reads before the next one does."""
        if isinstance(self.models, tuple):
            yield from ([batch] for batch in batches)
            return
        group: list[np.ndarray] = []
        for batch in batches:
            group.append(batch)
            if sum(one.size for one in group) * numbers_per_token >= _MOST_NUMBERS:
                yield group
                group = []
        if group:
            yield group

    def passes(
        self, hooks: Sequence[str], batches: Iterable[np.ndarray], stop: bool = True, first_row: int = 0
    ) -> Iterator[activations.ForwardPass]:
        """Yield the forward pass of every batch of token ids, (rows, row_len) each; `first_row` precede them."""
        excluded, drop_sinks = self.excluded, self.drop_sinks
        return activations.read(
            self.model, hooks, batches, excluded=excluded, drop_sinks=drop_sinks, stop=stop, first_row=first_row
        )

    @property
    def transcodes(self) -> bool:
        """True if the target is another activation of the same layer."""
        return len(self.other_hooks) == 1 and parse(self.hook_name)[1] != parse(self.other_hooks[0])[1]

    def batches(self, rows: Int[np.ndarray, "R T"], numbers_per_token: int = 1) -> list[Int[np.ndarray, "_ T"]]:
        """Split rows into batches of `tokens_per_forward` tokens, fewer if tokens need many numbers; at least a row."""
        step = self.rows_per_pass(rows.shape[1], numbers_per_token)
        return [rows[start : start + step] for start in range(0, len(rows), step)]

    def rows_per_pass(self, length: int, numbers_per_token: int = 1) -> int:
        """Return the number of rows of a length in a forward pass, see `batches`."""
        tokens = min(self.tokens_per_forward, _MOST_NUMBERS // numbers_per_token)
        return max(tokens // max(length, 1), 1)


_MOST_NUMBERS = 2**27  # in a batch of latents or logits: half a GiB
