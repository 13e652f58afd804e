"""Tables of results, for a terminal or as Markdown, with the machine that they were measured on."""

from collections.abc import Mapping, Sequence
from typing import Any


def show(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], machine: Mapping[str, Any], markdown: bool
) -> None:
    """Print a table with its title above, the machine and its versions below."""
    from rich.console import Console
    from rich.table import Table

    console, caption = Console(), ", ".join(_machine_text(name, value) for name, value in machine.items())
    if markdown:
        console.print(
            f"{title}\n\n{as_markdown(columns, rows)}\n\n{caption}", soft_wrap=True, markup=False, highlight=False
        )
        return
    table = Table(*columns, title=title, title_justify="left", caption=caption, caption_justify="left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def as_markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [columns, ["---"] * len(columns), *rows])


def ms(seconds: Mapping[str, float]) -> str:
    """Return the median of a spread in milliseconds."""
    return f"{1e3 * seconds['median']:.1f}"


def ratio(spread: Mapping[str, float]) -> str:
    """Return the median of a spread with its quartiles."""
    return f"{spread['median']:.2f} ({spread['q1']:.2f} to {spread['q3']:.2f})"


def _machine_text(name: str, value: Any) -> str:
    return str(value) if name in ("date", "device") else f"{name} {value}"
