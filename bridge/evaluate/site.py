"""Read activations: a hook of a model, the tokens that count there, and text run up to it."""

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import nn

from bridge import activations
from bridge.evaluate.memory import Memory
from bridge.hooks import blocks_before, parse, replay
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

    memory: Memory | None = None
    """The results for a text that are kept (`remembering`), or None to run the model for all."""

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return next(self.model.parameters()).device

    def read(self, batches: Iterable[np.ndarray]) -> Iterator[Batch]:
        """Run batches of token ids, (rows, row_len) each, up to the hook; yield the activations.

        With a memory the model does not run where it knows all rows of a batch.
        """
        if self.memory is None:
            yield from self._read(batches)
            return
        start = 0
        for ids in batches:
            known = self.memory.recall(ids)
            if known is None:
                (batch,) = self._read([ids])
                self.memory.keep(ids, *batch[2:])
                yield batch._replace(start=start)
            else:
                target = known.target if self.transcodes else known.acts
                yield Batch(start, activations.upload(ids, self.device), known.acts, target, known.mask)
            start += len(ids)

    def unread(self, rows: Int[np.ndarray, "R T"]) -> int:
        """Return the number of tokens of the rows that the model has to read."""
        return rows.size if self.memory is None else self.memory.unread(rows)

    def _read(self, batches: Iterable[np.ndarray]) -> Iterator[Batch]:
        """As `read`, but with the model."""
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
        """Yield the forward pass of every batch of token ids, (rows, row_len) each; `first_row` precede them.

        With a memory a pass begins after the blocks whose outputs it knows.
        """
        memory = self.memory
        names = hooks if memory is None else tuple(dict.fromkeys((*hooks, *memory.blocks)))
        for ids in batches:
            with replay(self.model, {} if memory is None else memory.recall_blocks(ids)):
                done = activations.forward(
                    self.model,
                    names,
                    ids,
                    excluded=self.excluded,
                    drop_sinks=self.drop_sinks,
                    stop=stop,
                    first_row=first_row,
                )
            if memory is not None:
                memory.keep_blocks(ids, done.acts)
            yield done
            first_row += len(ids)

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


def remembering(site: Site, rows: Int[np.ndarray, "R T"]) -> Site:
    """Return the site with a memory of these rows, so that several metrics share what the model computes for them.

    Raises:
      ValueError: the site is of several models, which are not all in memory at once.
    """
    if site.models:
        raise ValueError(f"activations of {len(site.models)} models are not kept: give a site of one model")
    width = unwrapped(site.model).config.n_embd
    return dataclasses.replace(site, memory=Memory.of_text(rows, blocks_before(site.hook_name), width))


_MOST_NUMBERS = 2**27  # in a batch of latents or logits: half a GiB


def most_numbers(device: torch.device) -> int:
    """Return the most numbers, such as latents or logits, to compute at once without need for more.

    A processor computes 8 MiB of float32 several times as fast as half a GiB: they stay in its caches and in the memory
    that the process keeps. A GPU needs large arrays.
    """
    return 2**21 if device.type == "cpu" else _MOST_NUMBERS


def parts(count: int, most: int) -> Iterator[slice]:
    """Yield slices that split `count` things in order, `most` in each, at least one; one empty slice for none."""
    step = max(most, 1)
    yield from (slice(start, start + step) for start in range(0, max(count, 1), step))
