"""Tokens as text for Neuronpedia: never empty, without NUL; a character of several tokens is in the last of them."""

from collections.abc import Iterable

from jsae.records.store import Texts

EMPTY = "◌"
"""Placeholder for a token without text: an empty one, or the first part of a character."""
NUL = "␀"
"""Placeholder for the NUL character, which Postgres cannot store."""


def spell(texts: Texts, tokens: Iterable[int]) -> list[str]:
    """Return one string for each of some consecutive tokens."""
    return [visible(string) for string in texts.spell(tokens)]


def word(texts: Texts, token: int) -> str:
    """Return a single token as text; invalid UTF-8 becomes U+FFFD."""
    return visible(texts.words[token])


def visible(string: str) -> str:
    """Return a string with placeholders for NUL and for the empty string."""
    return string.replace("\0", NUL) or EMPTY
