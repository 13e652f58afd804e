"""Writes names that come from files into messages: in one line, printable, and not too long."""

from collections.abc import Iterable
from typing import Any


def shown(name: Any, limit: int = 100) -> str:
    """Return a name as it is if it is printable, otherwise with escapes; cut after so many characters."""
    text = str(name)
    text = text if len(text) <= limit else f"{text[: limit - 3]}..."
    return text if text.isprintable() else ascii(text)[1:-1]


def few(names: Iterable[Any], limit: int = 4) -> str:
    """Return the first names with commas between them, and how many more there are."""
    names = list(names)
    text = ", ".join(shown(name) for name in names[:limit])
    return text + (f" and {len(names) - limit} more" if len(names) > limit else "")
