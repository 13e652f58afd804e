"""What is shown of a loop: a bar in a terminal, plain lines at least every ten seconds elsewhere."""

import io
import re
import sys
import threading
import time
import types

import pytest

from jsae import progress
from jsae.progress import Bar, Lines, display, line


@pytest.mark.parametrize(
    ("done", "rate", "seconds", "text", "expected"),
    [
        (0, 0.0, 10.2, "", "0 %  0 of 2,000 steps  0:10 so far"),
        (500, 12.5, 40.0, "FVU 0.2", "25 %  500 of 2,000 steps  12.5 steps/s  2:00 left  FVU 0.2"),
        (1000, 0.25, 9000.0, "", "50 %  1,000 of 2,000 steps  0.2 steps/s  1:06:40 left"),
        (1999, 1234.5, 3.0, "", "100 %  1,999 of 2,000 steps  1,234 steps/s  0:00 left"),
        (2000, 10.0, 3725.0, "", "100 %  2,000 of 2,000 steps  10.0 steps/s  1:02:05 taken"),
        (2000, 0.0, 3.0, "", "100 %  2,000 of 2,000 steps  0:03 taken"),
    ],
)
def test_a_line_says_the_share_the_rate_and_the_time_left(done, rate, seconds, text, expected):
    assert line(done, 2000, rate, seconds, text=text) == expected


def test_a_loop_of_nothing_is_done():
    assert line(0, 0, 0.0, 0.0).startswith("0 %  0 of 0 steps  0:00 taken")


class Watched(io.StringIO):
    """A stream that says when something was written."""

    def __init__(self):
        super().__init__()
        self.lines = threading.Semaphore(0)

    def flush(self) -> None:
        self.lines.release()


def test_lines_come_also_while_the_loop_says_nothing_and_the_rate_is_of_what_was_done():
    now, stream = [100.0], Watched()
    with Lines(1000, start=200, stream=stream, every=0.01, clock=lambda: now[0]) as shown:
        assert stream.lines.acquire(timeout=10)  # of itself
        shown.update(300)  # the loop begins: what went before was compiling
        now[0] = 110.0
        shown.update(400, "FVU 0.5")
        for _ in range(2):
            assert stream.lines.acquire(timeout=10)
        shown.update(1000, "FVU 0.1")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "20 %  200 of 1,000 steps  0:00 so far"
    assert any(each == "40 %  400 of 1,000 steps  10.0 steps/s  1:00 left  FVU 0.5" for each in lines)
    assert lines[-1] == "100 %  1,000 of 1,000 steps  70.0 steps/s  0:10 taken  FVU 0.1"


def test_a_short_loop_has_one_line_and_leaves_no_thread():
    stream, before = io.StringIO(), threading.active_count()
    with display(10, stream=stream) as shown:
        assert isinstance(shown, Lines)
        for done in range(10):
            shown.update(done + 1)
    shown.close()
    assert len(stream.getvalue().splitlines()) == 1
    assert threading.active_count() == before
    assert progress.EVERY == 10


def test_a_stream_that_breaks_does_not_stop_the_loop():
    stream = io.StringIO()
    with Lines(10, stream=stream, every=0.001) as shown:
        stream.close()
        time.sleep(0.02)
        shown.update(10)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_and_a_dumb_one_lines(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with display(10, stream=stream, unit="documents") as shown:
        assert isinstance(shown, Bar)
        shown.update(5, "FVU 0.3")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    assert "5/10 documents" in text
    assert "FVU 0.3" in text
    monkeypatch.setenv("TERM", "dumb")
    with display(10, stream=Terminal()) as shown:
        assert isinstance(shown, Lines)


def test_without_rich_a_terminal_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with display(10, stream=Terminal()) as shown:
        assert isinstance(shown, Lines)


def test_a_notebook_gets_a_bar_where_rich_can_draw_one(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    found = {"rich", "ipywidgets"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name in found else None)
    with display(10, stream=io.StringIO()) as shown:
        assert isinstance(shown, Bar)
    found.remove("ipywidgets")
    with display(10, stream=io.StringIO()) as shown:
        assert isinstance(shown, Lines)
