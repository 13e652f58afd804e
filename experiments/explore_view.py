"""How gathering is shown: lines and a progress bar on stderr."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text


def say(text: str) -> None:
    """Print a line to stderr."""
    Console(stderr=True).print(Text(text), soft_wrap=True)


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, float], None]]:
    """Show a progress bar within the context; yield a function that takes the current task and its share done."""
    columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        tasks: dict[str, int] = {}

        def tell(what: str, share: float) -> None:
            if what not in tasks:
                for task in tasks.values():
                    shown.update(task, visible=False)
                tasks[what] = shown.add_task(what, total=1.0)
            shown.update(tasks[what], completed=share)

        yield tell
