"""Keep the results of a model for a text, so that several metrics share them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

MOST = 2**28
"""Numbers that are kept, of activations and of blocks each: a GiB of float32."""


class Row(NamedTuple):
    """Activations of one row of tokens at a site."""

    acts: Float[torch.Tensor, "T C"]
    target: Float[torch.Tensor, "T O"]
    mask: Bool[torch.Tensor, " T"]


@dataclasses.dataclass(frozen=True)
class Memory:
    """Activations of the rows of a text at a site, and outputs of the blocks before it, once they are computed.

    They stay on the model's device. Of either at most `MOST` numbers are kept.
    """

    blocks: tuple[str, ...]
    """Names of the outputs of blocks to keep; () if there is no space for those of the whole text."""
    rows: dict[bytes, Row | None]
    """By the token ids of every row of the text; None where it was not read yet."""
    outputs: dict[bytes, list[Float[torch.Tensor, "T C"]]] = dataclasses.field(default_factory=dict)
    """Likewise the outputs of `blocks`."""

    @classmethod
    def of_text(cls, rows: Int[np.ndarray, "R T"], blocks: Sequence[str], width: int) -> "Memory":
        """Return an empty memory for these rows.

        Args:
          rows: of tokens; no other rows are kept.
          blocks: names of the outputs of blocks.
          width: of these outputs.
        """
        fits = rows.size * len(blocks) * width <= MOST
        return cls(tuple(blocks) if fits else (), dict.fromkeys(map(_key, rows)))

    def unread(self, rows: Int[np.ndarray, "R T"]) -> int:
        """Return the number of tokens of the rows whose activations are not known."""
        return sum(row.size for row in rows if self.rows.get(_key(row)) is None)

    def recall(self, rows: Int[np.ndarray, "B T"]) -> Row | None:
        """Return the activations of rows, side by side, or None if some are not known."""
        known = [row for key in map(_key, rows) if (row := self.rows.get(key)) is not None]
        return Row(*map(torch.stack, zip(*known, strict=True))) if len(known) == len(rows) > 0 else None

    def keep(self, rows: Int[np.ndarray, "B T"], acts: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> None:
        """Keep activations of the rows that are of the text, if there is space for them.

        Args:
          rows: of tokens.
          acts: what the SAE reads there, (B, T, C).
          target: what it is to reconstruct, (B, T, O); acts itself takes no further space.
          mask: which tokens count, (B, T).
        """
        per_token = acts.shape[-1] + (0 if target is acts else target.shape[-1])
        kept = sum(row.mask.numel() for row in self.rows.values() if row is not None)
        if (kept + mask.numel()) * per_token > MOST:
            return
        for key, *row in zip(map(_key, rows), acts, target, mask, strict=True):
            if key in self.rows:
                self.rows[key] = Row(*row)

    def recall_blocks(self, rows: Int[np.ndarray, "B T"]) -> dict[str, Float[torch.Tensor, "B T C"]]:
        """Return the outputs of `blocks` for rows, or none if those of some rows are not known."""
        known = [self.outputs[key] for key in map(_key, rows) if key in self.outputs]
        if not len(known) == len(rows) > 0:
            return {}
        return dict(zip(self.blocks, map(torch.stack, zip(*known, strict=True)), strict=True))

    def keep_blocks(self, rows: Int[np.ndarray, "B T"], acts: Mapping[str, torch.Tensor]) -> None:
        """Keep outputs of `blocks`, (B, T, C) each by name, for the rows that are of the text."""
        for number, key in enumerate(map(_key, rows)):
            if self.blocks and key in self.rows:
                self.outputs[key] = [acts[name][number] for name in self.blocks]


def _key(row: Int[np.ndarray, " T"]) -> bytes:
    return row.astype(np.int64).tobytes()
