"""Which features fire: activations are kept as forward passes go by, and encoded when somebody asks."""

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
from bridge.steering import Reading
from bridge.torch_sae import RANKED, TorchSAE


@dataclasses.dataclass(frozen=True)
class Features:
    """Sparse numbers per position: `values` and `indices`, both (B, T, k), of `d_sae` features. Unpacks into the two.

    A value of 0 is padding: that feature is not active. Those of an AbsTopK SAE may be negative.
    """

    values: Float[torch.Tensor, "B T k"]
    indices: Int[torch.Tensor, "B T k"]
    d_sae: int

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter((self.values, self.indices))

    def dense(self) -> Float[torch.Tensor, "B T f"]:
        """All features, zeros included; made anew at every call."""
        zeros = self.values.new_zeros(*self.values.shape[:-1], self.d_sae)
        return zeros.scatter(-1, self.indices, self.values)


@dataclasses.dataclass(frozen=True)
class Token:
    """One token of a generation: its id, its position in the text, whether it was generated, and what fired on it.

    `text` is what the token adds to the text: nothing while a character is not whole, its last token then has it
    all. `features` are (index, activation) pairs per hook, those of the largest size first, active ones only.
    """

    id: int
    text: str
    position: int
    generated: bool
    features: dict[str, list[tuple[int, float]]]


def active(sae: TorchSAE, acts: Acts, top_k: int | None = None) -> Features:
    """The features of activations, those of the largest size first: top_k of them, or else all that are active.

    All are the k of a TopK or AbsTopK SAE; of another as many as the position with the most of them has.

    Raises:
      ValueError: a top_k that is not between 1 and the number of features.
    """
    if top_k is None and sae.architecture not in RANKED:
        latents = sae.encode(acts)
        widest = max(int((latents > 0).sum(-1).max()), 1)
        values, indices = latents.topk(widest, dim=-1)
    else:
        values, indices = sae.encode_sparse(acts, top_k)
    return Features(values, indices, sae.d_sae)


class Trace:
    """The activations of one hook over the forward passes of one text. Nothing is copied, nothing encoded."""

    def __init__(self, sae: TorchSAE, reading: Reading):
        self.sae = sae
        self._reading = reading
        self._chunks: list[Acts] = []
        self._end = 0  # the position after the last chunk

    def keep(self, acts: Acts) -> Acts:
        """An edit that changes nothing: notes the activations of a forward pass.

        One that does not go on where the last ended begins another text.
        """
        if self._reading.start != self._end:
            self._chunks = []
        self._chunks.append(acts)
        self._end = self._reading.start + acts.shape[1]
        return acts

    def features(self, top_k: int | None = None, whole_text: bool = False) -> Features:
        """The features of the last forward pass, or of all since the text began (or this trace, if that was later).

        Raises:
          ValueError: nothing has been read.
        """
        if not self._chunks:
            raise ValueError("nothing has been read yet: run the model within interpretation_enabled() first")
        acts = torch.cat(self._chunks, dim=1) if whole_text else self._chunks[-1]
        return active(self.sae, acts, top_k)


@contextlib.contextmanager
def watch(model: nn.Module, reading: Reading) -> Iterator[None]:
    """Within the context, every forward pass says in `reading` which tokens it reads, and from which position on.

    It knows the caches of this project (`position`) and of upstream (`get_pos()`); without one a text starts at 0.
    """

    def note(args: tuple, kwargs: dict) -> None:
        given = [*args, *kwargs.values()]
        reading.tokens = next(value for value in given if isinstance(value, torch.Tensor))
        reading.start = next((start for value in given if (start := _position(value)) is not None), 0)

    with hooks.watch(model, note):
        yield


def _position(value: object) -> int | None:
    """How many tokens a cache has seen; None for what is no cache."""
    if hasattr(value, "get_pos"):
        return int(value.get_pos())
    return getattr(value, "position", None)


def narrate(
    prompt_ids: Sequence[int],
    columns: Iterator[list[int | None]],
    traces: Mapping[str, Trace],
    tokenizer: Any,
    top_k: int | None,
    echo: bool,
) -> Iterator[Token]:
    """The tokens of a generation as the model has read them.

    Args:
      prompt_ids: what the generation continues.
      columns: of `engine.generate` with read_last, one row; a column comes when all tokens before it have been read.
      traces: of the forward passes that make the columns, by hook name.
      tokenizer: for the text of tokens; None gives none.
      top_k: features per hook and token at most, see `active`.
      echo: whether the prompt's tokens come too.
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
    """(index, activation) of what fired on each of the last n tokens of row 0, as plain numbers."""
    values, indices = trace.features(top_k)
    rows = zip(indices[0, -n:].tolist(), values[0, -n:].tolist(), strict=True)
    return [[(i, v) for i, v in zip(*row, strict=True) if v != 0] for row in rows]
