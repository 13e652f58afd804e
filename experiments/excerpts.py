"""Show texts of others on one line of a terminal."""

from collections.abc import Mapping
from typing import Any

from rich.text import Text


def excerpt(context: Mapping[str, Any], most: int) -> Text:
    """Return a token in marks, with at most `most` characters of its context on either side.

    Args:
      context: of `bridge.stages.contexts`.
      most: characters.
    """
    return Text.assemble(*_start(context, most), plain(context["text_after"][:most]))


def start(context: Mapping[str, Any], most: int) -> Text:
    """Return a token in marks, with at most `most` characters of the text before it."""
    return Text.assemble(*_start(context, most))


def _start(context: Mapping[str, Any], most: int) -> tuple[str, tuple[str, str]]:
    return plain(context["text_before"][-most:]), (f"«{plain(context['at'])}»", "bold")


def plain(text: str) -> str:
    """Return a text on one line, with control characters shown."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
