"""Format names from untrusted files for messages: printable, on one line, and not too long."""

from collections.abc import Iterable
from typing import Any


def shown(name: Any, limit: int = 100) -> str:
    """Return a name cut to `limit` characters, with escapes if it is not printable."""
    text = str(name)
    text = text if len(text) <= limit else f"{text[: limit - 3]}..."
    return text if text.isprintable() else ascii(text)[1:-1]


def few(names: Iterable[Any], limit: int = 4) -> str:
    """Return the first `limit` names, separated by commas, and the number of those left out."""
    names = list(names)
    text = ", ".join(shown(name) for name in names[:limit])
    return text + (f" and {len(names) - limit} more" if len(names) > limit else "")
