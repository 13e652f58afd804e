"""How gathering is shown: a bar for what is being done, a line for what was found."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

from jsae.records.store import Store


@contextlib.contextmanager
def progress(console: Console) -> Iterator[Callable[[str, float], None]]:
    """Within the context, a function that takes what is being done and which share of it."""
    columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as shown:
        tasks: dict[str, TaskID] = {}

        def tell(what: str, share: float) -> None:
            if what not in tasks:
                for task in tasks.values():
                    shown.update(task, visible=False)
                tasks[what] = shown.add_task(what, total=1.0)
            shown.update(tasks[what], completed=share)

        yield tell


def summary(records: Path, hook: str) -> str:
    """What was gathered of one SAE."""
    store = Store(records / hook)
    dead = int((store["count"] == 0).sum())
    again = store.header.duplicate_rows
    dropped = f", {again:,} repeated row{'s' * (again > 1)} dropped" if again else ""
    return f"{hook}: {store.header.d_sae:,} latents ({dead:,} dead) on {store.header.tokens:,} tokens{dropped}"
