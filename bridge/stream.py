"""The live source: text to tokens to nanochat's activations to jax. With `handover`, the only place where both meet."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float

from bridge import activations, finite, handover
from bridge.hooks import find
from bridge.passes import unwrapped
from jsae.data import Filling
from jsae.health import ActivationsError
from jsae.settings import require


@runtime_checkable
class Rows(Protocol):
    """Token rows to run a model on: `bridge.nanochat.corpus.Corpus` is one."""

    row_len: int
    """Tokens in a row."""

    def next_rows(self, n: int) -> np.ndarray:
        """The next n rows, (n, row_len) int32."""

    def position(self) -> dict[str, Any]:
        """Where the next row starts, as JSON values."""

    def seek(self, position: dict[str, Any]) -> None:
        """Goes back to a position."""


class ActivationStream:
    """A `jsae.data.Source` that runs a nanochat and keeps activations that are worth learning from.

    A block is made of a fixed number of tokens of text. The places of tokens that are left out (`excluded`, and sinks
    at one of the hooks of a site) are filled with the block's first other tokens once more. So a block of a site
    depends on nothing but its text, whatever else is read in the same pass, and no shape depends on the data.

    Args:
      model: a nanochat, on its device, in the dtype it computes in.
      rows: where token rows come from.
      sites: for every SAE the hooks that it reads, of the same tokens: one, or a transcoder's two, or a crosscoder's.
      excluded: ids that are dropped from the stream (`bridge.selection.excluded_ids`); () keeps every token.
      rows_per_forward: rows in one forward pass.
      drop_sinks: whether to drop tokens of extreme norm.
      decode: makes text of token ids, for errors.

    Raises:
      ValueError: a hook that the model does not have, or none at all.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        rows: Rows,
        sites: Sequence[Sequence[str]],
        *,
        excluded: tuple[int, ...],
        rows_per_forward: int = 16,
        drop_sinks: bool = True,
        decode: finite.Decode | None = None,
    ):
        self._sites = tuple(tuple(site) for site in sites)
        self._hooks = tuple(dict.fromkeys(name for site in self._sites for name in site))
        require(bool(self._sites) and all(self._sites), "a stream needs at least one hook for every SAE")
        for name in self._hooks:
            find(model, name)
        require(rows_per_forward >= 1, f"rows_per_forward is {rows_per_forward}: it must be at least 1")
        self.d_in = unwrapped(model).config.n_embd
        self.tokens_seen = 0
        self._model, self._rows = model, rows
        self._excluded, self._rows_per_forward, self._drop_sinks = excluded, rows_per_forward, drop_sinks
        self._device, self._decode = next(model.parameters()).device, decode

    def fill(self, rows: int) -> Filling:
        """The next block: for every site a tuple of (rows, d_in) in the model's dtype; one forward pass a step.

        Raises:
          ActivationsError: activations that are NaN, infinite or out of float32's range; names hook, token and place.
        """
        blocks: dict[str, torch.Tensor] = {}
        text = np.empty(rows, np.int32)
        keep = torch.empty(len(self._sites), rows, dtype=torch.bool, device=self._device)
        have = 0
        while have < rows:
            ids = self._rows.next_rows(min(self._rows_per_forward, -(-(rows - have) // self._rows.row_len)))
            done = activations.forward(
                self._model, self._hooks, ids, excluded=self._excluded, drop_sinks=self._drop_sinks
            )
            self.tokens_seen += ids.size
            new = min(ids.size, rows - have)
            for name, acts in done.acts.items():
                if name not in blocks:
                    blocks[name] = torch.empty(rows, self.d_in, dtype=acts.dtype, device=acts.device)
                blocks[name][have : have + new] = acts.reshape(-1, self.d_in)[:new]
            masks = torch.stack([done.mask(*site).flatten() for site in self._sites])
            keep[:, have : have + new] = masks[:, :new]
            text[have : have + new] = ids.reshape(-1)[:new]
            have += new
            yield have / rows
        packed = [_packed([blocks[name] for name in site], keep[i], site) for i, site in enumerate(self._sites)]
        if not finite.is_sound(part for parts in packed for part in parts):
            for site, stay in zip(self._sites, keep, strict=True):
                acts = {name: blocks[name] for name in site}
                if not finite.is_sound(block[stay] for block in acts.values()):
                    place = (acts, stay, text, self._rows.row_len)
                    raise ActivationsError(finite.first_unsound(self._model, *place, self._decode))
        return tuple(tuple(handover.to_jax(part) for part in parts) for parts in packed)

    def position(self) -> dict[str, Any]:
        """Where the next block's text starts."""
        return self._rows.position()

    def seek(self, position: dict[str, Any]) -> None:
        """Goes back to a position."""
        self._rows.seek(position)


def _packed(
    parts: list[Float[torch.Tensor, "rows d"]], keep: Bool[torch.Tensor, " rows"], site: tuple[str, ...]
) -> list[Float[torch.Tensor, "rows d"]]:
    """The rows that stay, in order, and the first of them once more in the places of the others."""
    count = keep.sum()
    if not count:
        raise ValueError(
            f"none of the {len(keep)} tokens of a block is kept at {', '.join(site)}: each is BOS, another token "
            "that is left out or one of extreme norm; read larger blocks, or leave out fewer tokens"
        )
    order = torch.argsort(~keep, stable=True)
    order = order[torch.arange(len(keep), device=keep.device) % count]
    return [part[order] for part in parts]
