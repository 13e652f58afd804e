"""Tokens as text for Neuronpedia's lens page: which are words, and characters that are split over tokens."""

import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

_INNER = ("'", "-", "\u2019")
LONGEST_CHARACTER = 4
"""Bytes of the longest character, and so the most tokens that it can be split over."""
UNKNOWN = "\ufffd"
"""The replacement of bytes that are no character."""


class Shown(NamedTuple):
    """The text of a token, and whether it repeats that of the token before, as a part of the same character."""

    text: str
    repeats: bool


def is_word(text: str) -> bool:
    """Return whether a token consists of letters and digits, possibly with inner apostrophes and hyphens.

    White space around it does not count; names of special tokens, `<...>`, are no words.
    """
    text = text.strip()
    if not text or "<|" in text or (text.startswith("<") and text.endswith(">")):
        return False
    inner = range(1, len(text) - 1)
    return all(unicodedata.category(c)[0] in "LN" or (c in _INNER and i in inner) for i, c in enumerate(text))


def display(pieces: Sequence[bytes]) -> list[Shown]:
    """Return every token's text.

    A character that is split over tokens is given whole at each of them, and repeats from the second on. Bytes that
    belong to no character become U+FFFD.
    """
    shown: list[Shown] = []
    while len(shown) < len(pieces):
        start = len(shown)
        for stop in range(start + 1, min(start + LONGEST_CHARACTER, len(pieces)) + 1):
            text = _decoded(b"".join(pieces[start:stop]))
            if text is not None:
                shown += [Shown(text, place > 0) for place in range(stop - start)]
                break
        else:
            shown.append(Shown(pieces[start].decode("utf-8", "replace"), False))
    return shown


def _decoded(data: bytes) -> str | None:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None
