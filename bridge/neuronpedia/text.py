"""Tokens as Neuronpedia shows them: never empty, never a NUL, a character split over tokens whole on the last one."""

from collections.abc import Iterable

from jsae.records.store import Texts

EMPTY = "◌"
"""Stands where a token has no character of its own: an empty one, or the first part of a character."""
NUL = "␀"
"""Stands for the character 0, which Postgres cannot hold."""


def spell(texts: Texts, tokens: Iterable[int]) -> list[str]:
    """Tokens that follow each other, one string each."""
    return [visible(string) for string in texts.spell(tokens)]


def word(texts: Texts, token: int) -> str:
    """A token by itself; bytes that are no character are U+FFFD."""
    return visible(texts.words[token])


def visible(string: str) -> str:
    """The string with stand-ins for what could not be seen or stored."""
    return string.replace("\0", NUL) or EMPTY
