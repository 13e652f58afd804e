"""The prompts of a Jacobian lens: pieces of consecutive text."""

import itertools
from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Int
from torch import Tensor

from bridge.nanochat.tokenizer import Tokenizer

CHARACTERS = 2000
"""Characters of consecutive text from which a prompt is cut."""
LENGTH = 128
"""Most tokens of a prompt."""


def chunks(documents: Iterable[str], characters: int = CHARACTERS) -> Iterator[str]:
    """Yield consecutive pieces of a text; documents are joined by an empty line, and the last piece may be shorter."""
    pending = ""
    for document in documents:
        pending += document if not pending else "\n\n" + document
        whole = len(pending) - len(pending) % characters
        yield from (pending[start : start + characters] for start in range(0, whole, characters))
        pending = pending[whole:]
    if pending:
        yield pending


def prompts(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    *,
    first: int = 0,
    length: int = LENGTH,
    device: torch.device | str = "cpu",
) -> Iterator[Int[Tensor, " T"]]:
    """Yield the prompts of a text: the first tokens of every piece, after BOS.

    Args:
      documents: the text.
      tokenizer: the model's.
      first: number of pieces to leave out at the start.
      length: most tokens of a prompt, with BOS.
      device: of the ids.
    """
    for piece in itertools.islice(chunks(documents), first, None):
        yield torch.tensor(tokenizer.encode(piece, prepend_bos=True)[:length], device=device)
