"""Print where a latent comes from: the text that was read, documents, files, and the loss of tokens."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.excerpts import excerpt, start

_MOST_TEXT = 60  # characters on either side of a token


def show(origin: Mapping[str, Any], most: int) -> None:
    """Print the tables of one latent.

    Args:
      origin: of `bridge.stages.provenance.trace`.
      most: entries of a table.
    """
    console, grew, text = Console(), origin["grew"], origin["text"]
    levels = ", ".join(f"{level:.2f} at {name}" for name, level in origin["levels"].items())
    _say(console, f"latent {origin['latent']} of {origin['crosscoder']}, {origin['kind']}: {levels}")
    _say(console, f"grew most from {grew['from']} to {grew['to']}; of the text in between: {text['note']}")
    _say(
        console,
        f"read: {text['tokens']:,} tokens, {text['documents']:,} documents; it fires on {origin['fired']:,} tokens "
        f"({origin['density']:.3%})",
    )
    for name, words in {"where_it_fires": "where it fires", "elsewhere": "elsewhere"}.items():
        loss = origin["loss"][name]
        if loss["before"] is not None:
            fall = loss["before"] - loss["after"]
            _say(console, f"loss {words}: {loss['before']:.3f} -> {loss['after']:.3f} nats ({-fall:+.3f})")
    if origin["documents"]:
        console.print(_documents(origin["documents"][:most]))
        console.print(_files(origin["files"][:most]))
    if origin["tokens"]:
        console.print(_tokens(origin["tokens"][:most]))
    if origin["occurrences"]:
        console.print(_occurrences(origin["occurrences"][:most]))


def _say(console: Console, line: str) -> None:
    console.print(Text(line), soft_wrap=True)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column in ("document", "file", "text", "token") else "right")
    return table


def _documents(rows: list[dict[str, Any]]) -> Table:
    table = _table("documents on which it fires most", "document", "sum", "fired", "tokens", "text")
    for row in rows:
        table.add_row(
            _place(row), f"{row['total']:.1f}", f"{row['fired']:,}", f"{row['tokens']:,}", excerpt(row, _MOST_TEXT)
        )
    return table


def _files(rows: list[dict[str, Any]]) -> Table:
    table = _table("files and their parts", "file", "sum", "fired", "tokens", "density")
    for row in rows:
        table.add_row(
            Text(row["file"]), f"{row['total']:.1f}", f"{row['fired']:,}", f"{row['tokens']:,}", f"{row['density']:.3%}"
        )
    return table


def _tokens(rows: list[dict[str, Any]]) -> Table:
    table = _table("predicted tokens whose loss fell most, where it fires", "token", "times", "mean fall", "in all")
    for row in rows:
        table.add_row(
            Text(repr(row["token"])), f"{row['occurrences']:,}", f"{row['mean_fall']:.2f}", f"{row['total_fall']:.1f}"
        )
    return table


def _occurrences(rows: list[dict[str, Any]]) -> Table:
    table = _table("single ones", "before", "after", "token", "text", "document")
    for row in rows:
        context = start(row, _MOST_TEXT)
        predicted = Text(repr(row["predicted"]))
        table.add_row(f"{row['before']:.2f}", f"{row['after']:.2f}", predicted, context, _place(row))
    return table


def _place(row: Mapping[str, Any]) -> Text:
    return Text(" ".join(filter(None, (row["file"], row["part"]))) + f" [{row['document']}]")
