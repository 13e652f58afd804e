"""Progress of long work: plain lines where the output is no terminal, a bar where it is one."""

import io
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from jsae.progress import Progress, shows_bar

ROOT = Path(__file__).resolve().parents[1]


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=40)


def lines(console: Console) -> list[str]:
    return console.file.getvalue().splitlines()


def test_a_line_every_ten_seconds_says_share_rate_and_time_left(clock, console):
    with Progress("training", 4000, "activations", console=console, clock=clock) as progress:
        for done in range(100, 4100, 100):  # a second each
            clock.now += 1
            progress.update(done, f"FVU {1 / done:.4f}")
    assert lines(console) == [
        "training: 25 %, 100 activations/s, 0:30 left, FVU 0.0010",
        "training: 50 %, 100 activations/s, 0:20 left, FVU 0.0005",
        "training: 75 %, 100 activations/s, 0:10 left, FVU 0.0003",
        "training: 100 %, 100 activations/s, 0:00 left, FVU 0.0003",
        "training: 100 %, 100 activations/s, took 0:40, FVU 0.0003",
    ]


def test_work_of_a_few_seconds_prints_nothing_unless_it_has_a_note(clock, console):
    with Progress("reading", 10, "rows", console=console, clock=clock) as progress:
        clock.now += 9
        progress.update(10)
    assert lines(console) == []
    with Progress("training", 10, "steps", console=console, clock=clock) as progress:
        clock.now += 2
        progress.update(10, "FVU 0.5")
    assert lines(console) == ["training: 100 %, 5.0 steps/s, took 0:02, FVU 0.5"]


def test_what_was_done_before_counts_for_the_share_and_not_for_the_rate(clock, console):
    with Progress("training", 100, "steps", 50, console=console, clock=clock) as progress:
        clock.now += 10
        progress.update(75)
    assert lines(console)[0] == "training: 75 %, 2.5 steps/s, 0:10 left"


def test_phases_follow_each_other_by_their_names(clock, console):
    with Progress("reading text", console=console, clock=clock) as progress:
        progress.share("reading text", 0.0)
        clock.now += 5
        progress.share("running the model", 0.0)
        clock.now += 7200
        progress.share("running the model", 0.25)
        progress.share("counting", 0.5)
    assert lines(console) == [
        "running the model: 25 %, 0.2 %/min, 6:00:00 left",
        "running the model: 25 %, 0.2 %/min, took 2:00:00",
    ]


def test_without_a_total_a_line_says_how_long_it_has_been(clock, console):
    with Progress("fitting probes", None, console=console, clock=clock) as progress:
        clock.now += 75
        progress.update(0)
    assert lines(console) == ["fitting probes: 1:15 so far", "fitting probes: took 1:15"]


def test_work_that_reports_nothing_still_has_its_lines_and_its_thread_ends(console):
    with Progress("compiling", 10, "steps", every=0.02, console=console):
        end = time.monotonic() + 20
        while len(lines(console)) < 3 and time.monotonic() < end:
            time.sleep(0.01)
    assert lines(console)[0].startswith("compiling: 0 %, 0:00 so far")
    assert len(lines(console)) >= 3
    assert not any(thread.name == "progress" for thread in threading.enumerate())


def test_work_that_fails_does_not_say_that_it_took_so_long(clock, console):
    def fail() -> None:
        with Progress("training", 10, "steps", console=console, clock=clock) as progress:
            progress.update(5, "FVU 0.5")
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 - without a message
        fail()
    assert lines(console) == []


def test_the_passes_of_a_model_are_counted_by_their_tokens(clock, console):
    model = torch.nn.Identity()
    with Progress("measuring", 400, "tokens", console=console, clock=clock) as progress, progress.tokens_of(model):
        clock.now += 10
        model(torch.zeros(4, 50))
    model(torch.zeros(4, 50))
    assert lines(console)[0] == "measuring: 50 %, 20 tokens/s, 0:10 left"
    assert not model._forward_pre_hooks


def test_a_terminal_has_a_bar_that_disappears(clock):
    terminal = Console(file=io.StringIO(), force_terminal=True, width=120, _environ={"TERM": "xterm"})
    assert shows_bar(terminal)
    with Progress("training", 100, "steps", console=terminal, clock=clock) as progress:
        progress.update(40, "FVU [0.5]")
        clock.now += 30
        progress.phase("exporting")
    written = terminal.file.getvalue()
    assert "━" in written
    assert "training: 40 %, 1.3 steps/s, took 0:30, FVU [0.5]" in written


@pytest.mark.parametrize(("terminal", "notebook", "kind", "bar"), [
    (True, False, "xterm", True), (True, False, "dumb", False), (False, False, "xterm", False), (False, True, "", True),
])  # fmt: skip
def test_a_bar_is_for_terminals_and_notebooks(terminal, notebook, kind, bar, tmp_path, monkeypatch):
    (tmp_path / "ipywidgets.py").touch()  # whether it is installed or not
    monkeypatch.syspath_prepend(tmp_path)
    console = Console(file=io.StringIO(), force_terminal=terminal, force_jupyter=notebook, _environ={"TERM": kind})
    assert shows_bar(console) is bar


def test_neither_jax_nor_torch_is_needed():
    code = "import sys, jsae.progress; assert not {'jax', 'torch'} & set(sys.modules), 'heavy'"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_notebook_gets_a_bar_where_rich_can_draw_one(monkeypatch):
    console, found = Console(file=io.StringIO(), force_jupyter=True), {"ipywidgets"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name in found else None)
    assert shows_bar(console)
    found.clear()
    assert not shows_bar(console)


def test_an_output_that_is_closed_does_not_end_the_work(clock):
    console = Console(file=io.StringIO(), force_terminal=False)
    with Progress("training", 10, "steps", console=console, clock=clock) as progress:
        console.file.close()
        clock.now += 20
        progress.update(10, "FVU 0.5")
