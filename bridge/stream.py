"""The live source: text to tokens to nanochat's activations to jax. With `handover`, the only place where both meet."""

from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from bridge import handover
from bridge.hooks import capture, find
from bridge.selection import kept
from jsae.config import require
from jsae.data import Filling

_PATIENCE = 100  # forward passes in a row that may keep nothing


@runtime_checkable
class Rows(Protocol):
    """Token rows to run a model on: `bridge.nanochat.corpus.Corpus` is one."""

    def next_rows(self, n: int) -> np.ndarray:
        """The next n rows, (n, row_len) int32."""

    def position(self) -> dict[str, Any]:
        """Where the next row starts, as JSON values."""

    def seek(self, position: dict[str, Any]) -> None:
        """Goes back to a position."""


class ActivationStream:
    """A `jsae.data.Source` that runs a nanochat up to one hook and keeps what is worth learning from.

    Args:
      model: a nanochat, on its device, in the dtype it computes in.
      rows: where token rows come from.
      hook_name: which activation.
      bos_token_id: dropped from the stream; None keeps every token.
      rows_per_forward: rows in one forward pass.
      drop_sinks: whether to drop tokens of extreme norm.

    Raises:
      ValueError: a hook that the model does not have.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        rows: Rows,
        hook_name: str,
        *,
        bos_token_id: int | None,
        rows_per_forward: int = 16,
        drop_sinks: bool = True,
    ):
        find(model, hook_name)
        require(rows_per_forward >= 1, f"rows_per_forward is {rows_per_forward}: it must be at least 1")
        self.d_in = model.config.n_embd
        self.tokens_seen = 0
        self.tokens_kept = 0
        self._model, self._rows, self._hook_name = model, rows, hook_name
        self._bos, self._rows_per_forward, self._drop_sinks = bos_token_id, rows_per_forward, drop_sinks
        self._device = next(model.parameters()).device
        self._place = rows.position()  # of the chunk at hand, or of the next one
        self._chunk: torch.Tensor | None = None
        self._used = 0  # activations of the chunk at hand that went into earlier blocks

    def fill(self, rows: int) -> Filling:
        """The next block of activations, (rows, d_in), in the model's dtype; one forward pass a step."""
        block: torch.Tensor | None = None
        have = 0
        while have < rows:
            if self._chunk is None:
                self._chunk = self._forward()
            if block is None:
                block = torch.empty(rows, self.d_in, dtype=self._chunk.dtype, device=self._chunk.device)
            new = self._chunk[self._used : self._used + rows - have]
            block[have : have + len(new)] = new
            have += len(new)
            self._used += len(new)
            if self._used >= len(self._chunk):
                self._chunk, self._used, self._place = None, 0, self._rows.position()
            yield have / rows
        return handover.to_jax(block)

    def position(self) -> dict[str, Any]:
        """Where the chunk at hand starts in the text, and how much of it is used."""
        return {"text": self._place, "used": self._used}

    def seek(self, position: dict[str, Any]) -> None:
        """Goes back to a position; the chunk there is computed again."""
        self._rows.seek(position["text"])
        self._place, self._chunk, self._used = position["text"], None, int(position["used"])

    @torch.no_grad()
    def _forward(self) -> torch.Tensor:
        """One forward pass, up to the hook: the activations of the tokens kept, (kept, C)."""
        for _ in range(_PATIENCE):
            ids = self._rows.next_rows(self._rows_per_forward)
            tokens = torch.from_numpy(ids.astype(np.int64)).to(self._device, non_blocking=True)
            with capture(self._model, [self._hook_name], stop=True) as captured:
                self._model(tokens)
            acts = captured[self._hook_name]
            chunk = acts[kept(acts, tokens, self._bos, self._drop_sinks)]
            self.tokens_seen += tokens.numel()
            self.tokens_kept += len(chunk)
            if len(chunk):
                return chunk
        raise ValueError(f"{_PATIENCE} forward passes at {self._hook_name} gave no activation to keep: all text is BOS")
