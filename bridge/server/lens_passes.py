"""Forward passes that lenses read: over a text and, token by token, over what the model writes after it."""

import contextlib
import dataclasses
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from bridge.hooks import capture, edit, hook_name
from bridge.lenses.lens import Lens
from bridge.lenses.streams import Streams
from bridge.lenses.tables import rows
from bridge.nanochat import engine
from bridge.server.lens_steering import Intervention
from bridge.server.session import Session
from bridge.server.words import is_word

_DECIMALS = 4


@dataclasses.dataclass(frozen=True)
class Continuation:
    """A continuation of a text by the model.

    Attributes:
      tokens: how many tokens at most.
      temperature: of the sampling.
      stop_tokens: ids that end it.
    """

    tokens: int
    temperature: float
    stop_tokens: tuple[int, ...]


class Passes:
    """The forward passes over a text and its continuation.

    Args:
      session: the model.
      ids: the text.
      continuation: what follows it.
      change: an intervention on the text and, if it says so, on the continuation.
    """

    def __init__(
        self, session: Session, ids: Sequence[int], continuation: Continuation, change: Intervention | None = None
    ):
        self._model, self._bos = session.im.model, session.im.tokenizer.bos_token_id
        self._names = [hook_name(layer, "resid_post") for layer in range(session.nano.config.n_layer)]
        self._ids, self._continuation, self._change = list(ids), continuation, change
        self._read = 0
        self._ready: list[tuple[list[int], Streams]] = []

    def __iter__(self) -> Iterator[tuple[list[int], Streams]]:
        """Yield the tokens and streams of every pass: those of the text, then of every new token."""
        if not self._continuation.tokens:
            self._forward(torch.tensor([self._ids], device=self._model.lm_head.weight.device))
            yield self._ready.pop()
            return
        columns = engine.generate(
            self._model,
            self._ids,
            max_tokens=self._continuation.tokens,
            temperature=self._continuation.temperature,
            seed=random.getrandbits(63),  # another text every time, as in Neuronpedia's own server
            stop_tokens=self._continuation.stop_tokens,
            forward=self._forward,
            read_last=True,
        )
        for _ in columns:
            yield self._ready.pop()
        yield from self._ready  # the last token, which the model has read although nothing follows

    def _forward(self, tokens: torch.Tensor, **settings: Any) -> torch.Tensor:
        """Run the model, keep what it computed, and return its logits."""
        change = self._change if not self._read or (self._change and self._change.generated) else None
        edits = change.edits(tokens, self._bos) if change else {}
        edited = edit(self._model, edits) if edits else contextlib.nullcontext()
        with torch.no_grad(), edited, capture(self._model, self._names) as acts:
            logits = self._model(tokens, **settings)
        self._read += tokens.shape[1]
        self._ready.append((tokens[0].tolist(), Streams([acts[name] for name in self._names], None, None, logits)))
        return logits


class ReadOuts:
    """The most likely tokens by several lenses after every layer.

    Args:
      session: the model.
      lenses: them, with the layers to read, by the name that the answer gives them.
      top: tokens per cell.
      words_only: leave out tokens that are no words, but not the most likely one of the model's own output.
        Probabilities are of all tokens in any case.
    """

    def __init__(self, session: Session, lenses: Mapping[str, tuple[Lens, Sequence[int]]], top: int, words_only: bool):
        self._model, self._tokenizer = session.im.model, session.im.tokenizer
        self._lenses, self._top, self._words = lenses, top, _words(session) if words_only else None

    @torch.no_grad()
    def __call__(self, streams: Streams) -> list[list[dict[str, Any]]]:
        """Return the results of every position, one per lens."""
        by_lens = [self._cells(name, lens, layers, streams) for name, (lens, layers) in self._lenses.items()]
        return [list(results) for results in zip(*by_lens, strict=True)]

    def _cells(self, name: str, lens: Lens, layers: Sequence[int], streams: Streams) -> list[dict[str, Any]]:
        tokens, probabilities = [], []
        for layer in layers:
            logs = rows(self._model, lens, streams, layer)[0]
            best = self._shown(logs, is_output=layer == layers[-1]).topk(self._top)
            tokens.append(best.indices.tolist())
            probabilities.append(best.values.exp().tolist())
        text = self._tokenizer.token_text
        return [
            {
                "type": name,
                "top_tokens": [[text(token) for token in row[place]] for row in tokens],
                "top_probs": [[_rounded(p) for p in row[place]] for row in probabilities],
            }
            for place in range(streams.blocks[0].shape[1])
        ]

    def _shown(self, logs: torch.Tensor, is_output: bool) -> torch.Tensor:
        """Return log-probabilities with those of tokens that are not to be shown at minus infinity."""
        if self._words is None:
            return logs
        shown = logs.masked_fill(~self._words, -torch.inf)
        if is_output:
            best = logs.max(-1, keepdim=True)
            shown.scatter_(-1, best.indices, best.values)
        return shown


def _words(session: Session) -> torch.Tensor:
    """Return which tokens of the vocabulary are words, computed once per server."""
    if session.words is None:
        text, size = session.im.tokenizer.token_text, session.nano.config.vocab_size
        flags = [is_word(text(token)) for token in range(size)]
        session.words = torch.tensor(flags, device=session.im.model.lm_head.weight.device)
    return session.words


def _rounded(p: float) -> float:
    return round(p, _DECIMALS) if p == p else 0.0  # JSON has no NaN
