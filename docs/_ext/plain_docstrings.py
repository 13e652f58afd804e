"""Reads docstrings as plain text with `code` and indented formulas, which is how this project writes them.

Outside of code, characters that reStructuredText takes as markup are escaped; an indented paragraph that
belongs to no section such as `Args:` is shown as it stands.
"""

import re
from typing import Any

from sphinx.application import Sphinx

_CODE = re.compile(r"(``.*?``|`[^`]*`)", re.DOTALL)
_MARKUP = re.compile(r"(?<!\\)([*|])|(?<=\w)(_)(?=\W|$)")
_SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields|Warns|Example|Examples):$")


def _escape(text: str) -> str:
    """Return text with markup escaped and `code` in double backticks."""
    parts = _CODE.split(text)
    parts[::2] = [_MARKUP.sub(r"\\\1\2", part) for part in parts[::2]]
    parts[1::2] = ["``" + part.strip("`") + "``" for part in parts[1::2]]
    return "".join(parts)


def _plain(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    paragraphs = re.split(r"\n[ \t]*\n", "\n".join(lines))
    in_section, shown = False, []
    for paragraph in paragraphs:
        if not paragraph.startswith((" ", "\t")):
            in_section = bool(_SECTION.match(paragraph.split("\n")[0]))
        is_formula = paragraph.startswith("    ") and not in_section
        shown.append(f"::\n\n{paragraph}" if is_formula else _escape(paragraph))
    lines[:] = "\n\n".join(shown).split("\n")


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect before napoleon, which reads the sections."""
    app.connect("autodoc-process-docstring", _plain, priority=400)
    return {"parallel_read_safe": True}
