"""Requests to stop, SIGINT (Ctrl-C) and SIGTERM: none is lost or prints a traceback; a second SIGINT ends at once."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

STOPPED = 75
"""Exit code of a run that was stopped and saved, and continues with --resume: EX_TEMPFAIL of sysexits.h."""

_NUMBERS = (signal.SIGINT, signal.SIGTERM)
_CALLBACKS = "/jax/_src/callback.py"  # XLA turns an exception there into a RuntimeError, and jax logs it
_RETRY = 0.02  # seconds until a request that could not be raised is raised again
_raised: list[int] = []  # requests that were raised as an exception and not yet answered


class Terminated(KeyboardInterrupt):
    """SIGTERM; handled like Ctrl-C except for the exit code."""


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Raise SIGINT as KeyboardInterrupt and SIGTERM as Terminated, so that open resources are closed.

    While a module is being imported the process ends at once: nothing is open, and a half imported module turns the
    exception into another one. An exception that Python must ignore (in a destructor, in a callback from C++) is raised
    again, and one within a callback of XLA is deferred until the callback has returned. A second SIGINT ends the
    process at once. A SIGINT that was ignored before stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _raised.clear()
    numbers = [number for number in _NUMBERS if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, _raise) for number in (*numbers, signal.SIGALRM)}
    hook, sys.unraisablehook = sys.unraisablehook, _unraisable(sys.unraisablehook)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = hook
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Yield a list to which SIGINT and SIGTERM are appended, so that the caller can finish its current work.

    A second SIGINT ends the process at once.
    """
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in received:
            end_at_once(number)
        received.append(number)

    previous = {number: signal.signal(number, receive) for number in _NUMBERS}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def request() -> int | None:
    """Return the last signal that was raised as an exception and not answered; None if there is none."""
    return _raised[-1] if _raised else None


def answered() -> None:
    """Forget a request that the command has handled and after which it continues."""
    _raised.clear()


def exit_code(number: int) -> int:
    """Return the exit code of a process that a signal ended, as shells report it: 128 + number."""
    return 128 + number


def end_at_once(number: int) -> NoReturn:
    """End the process without cleaning up: files are safe, since all writes survive a kill."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    with contextlib.suppress(OSError):
        shown = "\x1b[?25h" if os.isatty(2) else ""  # a progress bar hides the cursor
        os.write(2, f"{shown}FATAL {name(number)}\n".encode())
    os._exit(exit_code(number))


def name(number: int) -> str:
    """Return a word for the signal: "interrupted" or "terminated"."""
    return "interrupted" if number == signal.SIGINT else "terminated"


def _raise(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGALRM:  # a request that Python ignored
        number = _raised.pop() if _raised else signal.SIGINT
    if (number == signal.SIGINT and number in _raised) or _is_in(frame, "<frozen importlib"):
        end_at_once(number)
    _raised.append(number)
    if _is_in(frame, _CALLBACKS):
        signal.setitimer(signal.ITIMER_REAL, _RETRY)
        return
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated


def _is_in(frame: FrameType | None, file: str) -> bool:
    """Return whether a frame or one of its callers is in a file whose name contains `file`."""
    while frame is not None:
        if file in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


def _unraisable(default: Any) -> Any:
    """Return a hook for exceptions that Python ignores: it raises a request again, and passes others to `default`."""

    def hook(unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, _RETRY)
        else:
            default(unraisable)

    return hook
