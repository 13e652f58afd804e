"""Requests to stop, SIGINT (Ctrl-C) and SIGTERM: none is lost, none ends in a traceback, a second ends at once."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

STOPPED = 75
"""Exit code of a run that was stopped and saved, and goes on with --resume: EX_TEMPFAIL of sysexits.h."""

_NUMBERS = (signal.SIGINT, signal.SIGTERM)
_CALLBACKS = "/jax/_src/callback.py"  # XLA makes a RuntimeError of what is raised there, and jax logs it
_AGAIN = 0.02  # seconds until a request that could not be raised is raised again
_raised: list[int] = []  # requests that became an exception and were not answered


class Terminated(KeyboardInterrupt):
    """SIGTERM: to be treated as Ctrl-C, but for the exit code."""


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Raise SIGINT as KeyboardInterrupt and SIGTERM as Terminated, so that whatever is open is closed.

    While a module is being imported the process ends at once: nothing is open, and a half imported module turns the
    exception into another one. An exception that Python must ignore (in a destructor, in a callback from C++) is raised
    again, and one within a callback of XLA waits until that has returned. A second SIGINT ends the process at once. A
    SIGINT that is ignored when this begins stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _raised.clear()
    numbers = [number for number in _NUMBERS if signal.getsignal(number) is not signal.SIG_IGN]
    kept = {number: signal.signal(number, _raise) for number in (*numbers, signal.SIGALRM)}
    hook, sys.unraisablehook = sys.unraisablehook, _unraisable(sys.unraisablehook)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = hook
        for number, handler in kept.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Yield a list that stays empty until SIGINT or SIGTERM comes; what is at hand is finished meanwhile.

    A second SIGINT ends the process at once.
    """
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in received:
            end_at_once(number)
        received.append(number)

    kept = {number: signal.signal(number, receive) for number in _NUMBERS}
    try:
        yield received
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def request() -> int | None:
    """Return the signal that became an exception, which may have become another one on its way; else None."""
    return _raised[-1] if _raised else None


def answered() -> None:
    """Forget a request that was obeyed by a command that goes on."""
    _raised.clear()


def exit_code(number: int) -> int:
    """Return the exit code of a process that a signal ended, as shells count."""
    return 128 + number


def end_at_once(number: int) -> NoReturn:
    """End the process without any clearing up: what is written is safe, because it could be killed just as well."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    with contextlib.suppress(OSError):
        shown = "\x1b[?25h" if os.isatty(2) else ""  # a progress bar hides the cursor
        os.write(2, f"{shown}FATAL {name(number)}\n".encode())
    os._exit(exit_code(number))


def name(number: int) -> str:
    """Return what happened to a process that got a signal."""
    return "interrupted" if number == signal.SIGINT else "terminated"


def _raise(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGALRM:  # a request that was ignored
        number = _raised.pop() if _raised else signal.SIGINT
    if (number == signal.SIGINT and number in _raised) or _is_in(frame, "<frozen importlib"):
        end_at_once(number)
    _raised.append(number)
    if _is_in(frame, _CALLBACKS):
        signal.setitimer(signal.ITIMER_REAL, _AGAIN)
        return
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated


def _is_in(frame: FrameType | None, file: str) -> bool:
    """Return whether a frame or one of its callers is of a file whose name has this part."""
    while frame is not None:
        if file in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


def _unraisable(otherwise: Any) -> Any:
    """Return a hook for exceptions that Python ignores: a request is raised again as soon as that is possible."""

    def hook(unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, _AGAIN)
        else:
            otherwise(unraisable)

    return hook
