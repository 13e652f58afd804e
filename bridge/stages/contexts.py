"""Show tokens of a text with those around them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import SupportsInt

from bridge.evaluate.text import Text
from bridge.nanochat.tokenizer import Tokenizer

_BEFORE, _AFTER = 24, 8  # tokens around one that is shown


def context(rows: Text, row: int, position: int, tokenizer: Tokenizer) -> dict[str, str]:
    """Return the text around a token, within its document: `text_before`, `at` and `text_after`."""
    tokens, document = rows.tokens[row], rows.document[row]
    same = document == document[position]
    before, after = slice(max(position - _BEFORE, 0), position), slice(position + 1, position + 1 + _AFTER)
    return {
        "text_before": spelt(tokens[before][same[before]], tokenizer),
        "at": spelt([tokens[position]], tokenizer),
        "text_after": spelt(tokens[after][same[after]], tokenizer),
    }


def spelt(ids: Iterable[SupportsInt], tokenizer: Tokenizer) -> str:
    """Return the text of some tokens."""
    return tokenizer.decode([int(i) for i in ids])
