"""Run token rows through a model and read activations: the one loop of rows, forward pass, captured hooks and mask.

Training, gathering of records, evaluation and the checks before a run all read activations through it.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import nn

from bridge.hooks import capture
from bridge.nanochat.model import Runner
from bridge.selection import kept


@dataclasses.dataclass(frozen=True)
class ForwardPass:
    """One forward pass over rows of text."""

    first_row: int
    """Number of rows in the passes before this one."""
    tokens: Int[torch.Tensor, "B T"]
    """Token ids, on the model's device."""
    acts: Mapping[str, Float[torch.Tensor, "B T C"]]
    """Activations by hook name."""
    logits: Float[torch.Tensor, "B T V"] | None
    """Output of the model; None where the pass ended at the deepest hook."""
    excluded: tuple[int, ...]
    drop_sinks: bool
    _masks: dict[str, Bool[torch.Tensor, "B T"]] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def mask(self, *hooks: str) -> Bool[torch.Tensor, "B T"]:
        """Return which tokens count at every one of the hooks (`bridge.selection.kept`); computed when first asked."""
        for name in hooks:
            if name not in self._masks:
                self._masks[name] = kept(self.acts[name], self.tokens, self.excluded, self.drop_sinks)
        masks = [self._masks[name] for name in hooks]
        return masks[0] if len(masks) == 1 else torch.stack(masks).all(0)


@torch.no_grad()
def forward(
    model: nn.Module,
    hooks: Sequence[str],
    ids: Integer[np.ndarray, "B T"] | Int[torch.Tensor, "B T"],
    *,
    excluded: tuple[int, ...],
    drop_sinks: bool,
    stop: bool = True,
    first_row: int = 0,
    rows: int | None = None,
    run: Runner | None = None,
) -> ForwardPass:
    """Run rows of token ids through a model and return what was captured at the hooks.

    Args:
      model: a nanochat, on its device.
      hooks: names of the activations to capture.
      ids: token ids; a tensor is on the model's device already (`upload`).
      excluded: ids of tokens that do not count.
      drop_sinks: whether tokens of extreme norm do not count.
      stop: end the pass at the deepest hook; otherwise it gives logits too.
      first_row: number of rows in earlier passes.
      rows: number of rows to return; those behind them fill a pass up to a fixed shape. None: all.
      run: calls the parts of the forward pass (`bridge.nanochat.compiled`); None: eager.

    Raises:
      ValueError: a hook that the model does not have or that the pass did not reach.
    """
    tokens = ids if isinstance(ids, torch.Tensor) else upload(ids, next(model.parameters()).device)
    with capture(model, list(hooks), stop=stop) as acts:
        logits = model(tokens) if run is None else model(tokens, run=run)
    if rows is not None and rows < len(tokens):
        tokens, logits = tokens[:rows], None if logits is None else logits[:rows]
        acts = {name: h[:rows] for name, h in acts.items()}
    return ForwardPass(first_row, tokens, dict(acts), logits, excluded, drop_sinks)


def upload(ids: Integer[np.ndarray, "B T"], device: torch.device) -> Int[torch.Tensor, "B T"]:
    """Return token ids on a device; the copy to a GPU begins in pinned memory, and nothing waits for it."""
    tokens = torch.from_numpy(ids.astype(np.int64))
    return tokens.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tokens.to(device)


def read(
    model: nn.Module,
    hooks: Sequence[str],
    batches: Iterable[Integer[np.ndarray, "_ T"]],
    *,
    excluded: tuple[int, ...],
    drop_sinks: bool,
    stop: bool = True,
    first_row: int = 0,
) -> Iterator[ForwardPass]:
    """Yield one forward pass for every batch of rows; arguments and errors are those of `forward`."""
    for ids in batches:
        yield forward(model, hooks, ids, excluded=excluded, drop_sinks=drop_sinks, stop=stop, first_row=first_row)
        first_row += len(ids)
