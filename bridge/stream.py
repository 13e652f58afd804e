"""Stream nanochat's activations on text to jax. Apart from `handover`, the only module that uses torch and jax."""

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
    """A source of token rows, for example `bridge.nanochat.corpus.Corpus`."""

    row_len: int
    """Tokens in a row."""

    def next_rows(self, n: int) -> np.ndarray:
        """Return the next n rows, (n, row_len) int32."""

    def position(self) -> dict[str, Any]:
        """Return the position of the next row, as JSON values."""

    def seek(self, position: dict[str, Any]) -> None:
        """Continue from a position."""


class ActivationStream:
    """A `jsae.data.Source` that runs a nanochat and yields the activations of the tokens that count.

    A block has a fixed number of tokens of text. Tokens that are left out (`excluded` ones, and sinks at any hook of a
    site) are replaced by repetitions of the block's first other tokens. So a site's block depends only on its text, not
    on other sites of the same pass, and no shape depends on the data.

    Args:
      model: a nanochat, on its device, in its compute dtype.
      rows: the source of token rows.
      sites: for every SAE the hooks that it reads on the same tokens: one, a transcoder's two, or a crosscoder's.
      excluded: ids of tokens to leave out (`bridge.selection.excluded_ids`); () keeps every token.
      rows_per_forward: rows in one forward pass.
      drop_sinks: whether to leave out tokens of extreme norm.
      decode: returns the text of token ids, for errors.

    Raises:
      ValueError: the model does not have a hook, or a site has none.
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
        """Return the next block: for every site a tuple of (rows, d_in) in the model's dtype.

        A generator that runs one forward pass per step and yields the share of rows that are done.

        Raises:
          ActivationsError: activations are NaN, infinite or out of float32's range; names hook, token and position.
        """
        blocks: dict[str, torch.Tensor] = {}
        text = np.empty(rows, np.int32)
        keep = torch.empty(len(self._sites), rows, dtype=torch.bool, device=self._device)
        filled = 0
        while filled < rows:
            ids = self._rows.next_rows(min(self._rows_per_forward, -(-(rows - filled) // self._rows.row_len)))
            forward_pass = activations.forward(
                self._model, self._hooks, ids, excluded=self._excluded, drop_sinks=self._drop_sinks
            )
            self.tokens_seen += ids.size
            new = min(ids.size, rows - filled)
            for name, acts in forward_pass.acts.items():
                if name not in blocks:
                    blocks[name] = torch.empty(rows, self.d_in, dtype=acts.dtype, device=acts.device)
                blocks[name][filled : filled + new] = acts.reshape(-1, self.d_in)[:new]
            masks = torch.stack([forward_pass.mask(*site).flatten() for site in self._sites])
            keep[:, filled : filled + new] = masks[:, :new]
            text[filled : filled + new] = ids.reshape(-1)[:new]
            filled += new
            yield filled / rows
        packed = [_packed([blocks[name] for name in site], keep[i], site) for i, site in enumerate(self._sites)]
        if not finite.is_sound(part for parts in packed for part in parts):
            for site, stay in zip(self._sites, keep, strict=True):
                acts = {name: blocks[name] for name in site}
                if not finite.is_sound(block[stay] for block in acts.values()):
                    location = (acts, stay, text, self._rows.row_len)
                    raise ActivationsError(finite.first_unsound(self._model, *location, self._decode))
        return tuple(tuple(handover.to_jax(part) for part in parts) for parts in packed)

    def position(self) -> dict[str, Any]:
        """Return the position of the next block's text."""
        return self._rows.position()

    def seek(self, position: dict[str, Any]) -> None:
        """Continue from a position."""
        self._rows.seek(position)


def _packed(
    parts: list[Float[torch.Tensor, "rows d"]], keep: Bool[torch.Tensor, " rows"], site: tuple[str, ...]
) -> list[Float[torch.Tensor, "rows d"]]:
    """Return the rows to keep, in order, followed by repetitions of the first of them up to the same number."""
    count = keep.sum()
    if not count:
        raise ValueError(
            f"none of the {len(keep)} tokens of a block is kept at {', '.join(site)}: each is BOS, another "
            "excluded token or a token of extreme norm; read larger blocks, or exclude fewer tokens"
        )
    order = torch.argsort(~keep, stable=True)
    order = order[torch.arange(len(keep), device=keep.device) % count]
    return [part[order] for part in parts]
