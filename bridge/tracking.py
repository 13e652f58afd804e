"""Track the active features of forward passes: activations are stored, and encoded on demand."""

import codecs
import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import nn

from bridge import hooks
from bridge.hooks import Acts
from bridge.steering import PassInput
from bridge.torch_sae import RANKED, TorchSAE


@dataclasses.dataclass(frozen=True)
class Features:
    """Sparse features per position: `values` and `indices`, both (B, T, k), of `d_sae` features. Unpacks into the two.

    A value of 0 is padding. Values of an AbsTopK SAE may be negative.
    """

    values: Float[torch.Tensor, "B T k"]
    indices: Int[torch.Tensor, "B T k"]
    d_sae: int

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter((self.values, self.indices))

    def dense(self) -> Float[torch.Tensor, "B T f"]:
        """Return all features as a new dense tensor."""
        zeros = self.values.new_zeros(*self.values.shape[:-1], self.d_sae)
        return zeros.scatter(-1, self.indices, self.values)


@dataclasses.dataclass(frozen=True)
class Token:
    """One token of a generation.

    Attributes:
      id: token id.
      text: the text that the token adds; a character of several tokens is in the text of the last.
      position: position in the text.
      generated: whether it was generated, not part of the prompt.
      features: pairs (index, activation) of the active features per hook, by descending magnitude.
    """

    id: int
    text: str
    position: int
    generated: bool
    features: dict[str, list[tuple[int, float]]]


def active_features(sae: TorchSAE, acts: Acts, top_k: int | None = None) -> Features:
    """Return the active features per position, by descending magnitude.

    Args:
      sae: the SAE.
      acts: activations, (B, T, C).
      top_k: number of features per position; None: all active ones, which are k for a TopK or AbsTopK SAE, and the
        largest number at any position for others.

    Raises:
      ValueError: top_k is not between 1 and the number of features.
    """
    if top_k is None and sae.architecture not in RANKED:
        latents = sae.encode(acts)
        widest = max(int((latents > 0).sum(-1).max()), 1)
        values, indices = latents.topk(widest, dim=-1)
    else:
        values, indices = sae.encode_sparse(acts, top_k)
    return Features(values, indices, sae.d_sae)


class Trace:
    """The activations of one hook over the forward passes of one text, neither copied nor encoded.

    Args:
      sae: the SAE of the hook.
      pass_input: updated with the input of each forward pass, see `watch`.
      top_k: number of features to encode in every pass over a single token, as a part of the pass; None: all active
        ones, where their number is known before. A pass that is replayed on static memory (`bridge.nanochat.decoding`)
        then computes them too.
      encodes: whether to do so; otherwise activations are encoded when they are asked for.
    """

    def __init__(self, sae: TorchSAE, pass_input: PassInput, top_k: int | None = None, encodes: bool = False):
        self.sae = sae
        self._input = pass_input
        self._top_k = top_k
        self._encodes = encodes and (top_k is not None or sae.architecture in RANKED)
        self._encoded: Features | None = None
        self._chunks: list[Acts] = []
        self._end = 0  # the position after the last chunk

    def keep(self, acts: Acts) -> Acts:
        """Store the activations of a forward pass and return them unchanged, as an edit.

        A pass that does not continue at the end of the last one starts a new text.
        """
        if self._input.start != self._end:
            self._chunks = []
        self._chunks.append(acts)
        is_step = self._encodes and acts.shape[1] == 1
        self._encoded = active_features(self.sae, acts, self._top_k) if is_step else None
        self._end = self._input.start + acts.shape[1]
        return acts

    def features(self, top_k: int | None = None, whole_text: bool = False) -> Features:
        """Return the features of the last forward pass, or of all passes of the text since this trace was created.

        Args:
          top_k: see `active_features`.
          whole_text: whether to include all passes of the text.

        Raises:
          ValueError: there was no forward pass.
        """
        if not self._chunks:
            raise ValueError("no forward pass has been tracked: run the model within interpretation_enabled() first")
        if self._encoded is not None and not whole_text and top_k == self._top_k:
            return self._encoded
        acts = torch.cat(self._chunks, dim=1) if whole_text else self._chunks[-1]
        return active_features(self.sae, acts, top_k)


@contextlib.contextmanager
def watch(model: nn.Module, pass_input: PassInput) -> Iterator[None]:
    """Update `pass_input` at the start of every forward pass within the context.

    The start position is read from the cache of this project (`position`) or of upstream (`get_pos()`); without a cache
    it is 0.
    """

    def update(args: tuple, kwargs: dict) -> None:
        arguments = [*args, *kwargs.values()]
        pass_input.tokens = next(value for value in arguments if isinstance(value, torch.Tensor))
        pass_input.start = next((start for value in arguments if (start := _position(value)) is not None), 0)

    with hooks.watch(model, update):
        yield


def _position(value: object) -> int | None:
    """Return the number of tokens in a cache; None if the value is not a cache."""
    if hasattr(value, "get_pos"):
        return int(value.get_pos())
    return getattr(value, "position", None)


def stream_tokens(
    prompt_ids: Sequence[int],
    columns: Iterator[list[int | None]],
    traces: Mapping[str, Trace],
    tokenizer: Any,
    top_k: int | None,
    echo: bool,
) -> Iterator[Token]:
    """Yield the tokens of a generation after the model has read them.

    Args:
      prompt_ids: the prompt.
      columns: the output of `engine.generate` with read_last and one row.
      traces: traces of the forward passes of the generation, by hook name.
      tokenizer: decodes tokens; None: texts are empty.
      top_k: largest number of features per hook and token, see `active_features`.
      echo: whether to yield the tokens of the prompt too.
    """
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    unread: Sequence[int] | None = prompt_ids if echo else []
    position = 0 if echo else len(prompt_ids)
    while unread is not None:
        column = next(columns, None)
        fired = {name: _pairs(trace, len(unread), top_k) for name, trace in traces.items()} if unread else {}
        for i, token in enumerate(unread):
            text = decode(tokenizer.token_bytes_of(token)) if tokenizer else ""
            yield Token(token, text, position, position >= len(prompt_ids), {name: fired[name][i] for name in fired})
            position += 1
        unread = column


@torch.no_grad()
def _pairs(trace: Trace, n: int, top_k: int | None) -> list[list[tuple[int, float]]]:
    """Return pairs (index, activation) of the active features on each of the last n tokens of row 0."""
    values, indices = trace.features(top_k)
    rows = zip(indices[0, -n:].tolist(), values[0, -n:].tolist(), strict=True)
    return [[(i, v) for i, v in zip(*row, strict=True) if v != 0] for row in rows]
