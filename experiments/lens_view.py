"""Terminal output of lenses: layers by tokens, what a direction writes, divergence from the model."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid
from rich.text import Text

from bridge.graph_names import token_text
from bridge.lenses import DirectPath, JacobianLens, Table, Written
from bridge.lenses.quality import Quality
from experiments.steer_view import shown

_WIDEST = 12
"""Characters of a token in a cell."""


class Tokens(Protocol):
    """The part of a tokenizer that this module uses."""

    def token_bytes_of(self, token_id: int) -> bytes:
        """Return the bytes of a token."""


def show_table(table: Table, ids: Sequence[int], tokenizer: Tokens) -> None:
    """Print the most likely next tokens: a row per layer, the last one on top, and a column per token of the text.

    The token that really follows is bold. Columns that do not fit are printed below.
    """
    console = Console()
    cells = [[_cell(table, row, at, ids, tokenizer) for at in range(len(ids))] for row in range(len(table.layers))]
    wide = [
        max(cell.cell_len for row in cells for cell in (row[at], _token(ids[at], tokenizer))) for at in range(len(ids))
    ]
    room = console.width - 10
    start = 0
    while start < len(ids):
        stop = start + 1
        while stop < len(ids) and sum(wide[start : stop + 1]) + 3 * (stop + 1 - start) <= room:
            stop += 1
        title = f"{table.lens} lens, most likely next token in %" if start == 0 else None
        grid = Grid("layer", title=title, title_justify="left")
        for at in range(start, stop):
            grid.add_column(_token(ids[at], tokenizer), no_wrap=True)
        for row in reversed(range(len(table.layers))):
            last = row == len(table.layers) - 1
            grid.add_row("output" if last else str(table.layers[row]), *cells[row][start:stop], end_section=last)
        console.print(grid)
        start = stop


def _cell(table: Table, row: int, at: int, ids: Sequence[int], tokenizer: Tokens) -> Text:
    cell = Text()
    for place, (token, p) in enumerate(
        zip(table.tokens[row, at].tolist(), table.probabilities[row, at].tolist(), strict=True)
    ):
        follows = at + 1 < len(ids) and ids[at + 1] == token
        cell.append("\n" if place else "")
        cell.append_text(_token(token, tokenizer, "bold" if follows else "" if p >= 0.1 else "dim"))
        cell.append(f" {100 * p:.0f}", "dim")
    return cell


def _token(token: int, tokenizer: Tokens, style: str = "") -> Text:
    text = shown(token_text(tokenizer.token_bytes_of(token)))
    text = text if len(text) <= _WIDEST else text[: _WIDEST - 1] + "…"
    return Text(text.replace(" ", "·"), style)


def show_written(
    found: Sequence[Written], hook: str, path: DirectPath, jacobian: JacobianLens | None, tokenizer: Tokens
) -> None:
    """Print the tokens that a direction raises and lowers, by each lens."""
    console = Console()
    headers = [f"{one.lens}: {way}" for one in found for way in ("raised", "lowered")]
    grid = Grid(*headers, title=escape(f"written at {hook}"), title_justify="left")
    for place in range(len(found[0].top)):
        row = []
        for one in found:
            for ids, values in ((one.top, one.top_values), (one.bottom, one.bottom_values)):
                row.append(Text.assemble(_token(int(ids[place]), tokenizer), f" {float(values[place]):+.2f}"))
        grid.add_row(*row)
    console.print(grid)
    console.print(f"direct path     factor {path.own:.3g}", highlight=False)
    if len(found) > 1:
        assert jacobian is not None
        console.print(
            f"jacobian lens   {jacobian.n_prompts} prompts; of the ten most raised tokens it shares "
            f"{found[0].overlap(found[1])} with the direct path",
            highlight=False,
        )
    elif jacobian is None:
        console.print("jacobian lens   none: fit one with --fit=jacobian")
    if hook.endswith("attn_out"):
        console.print("the MLP of the same layer, which reads this, is in neither lens", highlight=False)


def show_quality(found: Mapping[str, Mapping[int, Quality]], depth: int) -> None:
    """Print KL(model || lens) and the share of equal most likely tokens, by lens and layer."""
    grid = Grid("after layer", *map(str, range(depth)), title="KL in nats, same top token in %", title_justify="left")
    for name, layers in found.items():
        cells = (f"{layers[i].kl:.3f} {100 * layers[i].agreement:3.0f}" if i in layers else "" for i in range(depth))
        grid.add_row(name, *cells)
    Console().print(grid)
