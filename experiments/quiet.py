"""Suppression of what libraries print beside an error that a command reports in one line."""

import atexit
import contextlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

_LIBRARIES = ("/orbax/", "/tensorstore/", "/asyncio/")


@contextlib.contextmanager
def libraries(debug: bool) -> Iterator[None]:
    """Keep Orbax and TensorStore from printing tracebacks of an error that they also raise, unless debugging.

    After a failed write or read they leave unfinished coroutines, futures and late callbacks, whose exceptions Python
    would print one by one, some of them only when the process ends. Exceptions of other code are still printed.
    """
    if debug:
        yield
        return
    restore = _drop()
    try:
        yield
    except BaseException:
        atexit.register(_drop)
        raise
    finally:
        restore()


def _drop() -> Callable[[], None]:
    """Drop the errors of the libraries from now on; return a function that undoes this."""
    import absl.logging  # noqa: F401 - creates the logger of that name

    loggers = [logging.getLogger("absl"), logging.getLogger("asyncio")]
    for logger in loggers:
        logger.addFilter(_is_no_error)
    hook, sys.unraisablehook = sys.unraisablehook, _without_libraries(sys.unraisablehook)
    filters = warnings.catch_warnings()
    filters.__enter__()
    warnings.filterwarnings("ignore", r"coroutine .* was never awaited", RuntimeWarning)

    def restore() -> None:
        filters.__exit__(None, None, None)
        sys.unraisablehook = hook
        for logger in loggers:
            logger.removeFilter(_is_no_error)

    return restore


def _is_no_error(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR


def _without_libraries(default: Any) -> Any:
    """Return a hook for exceptions that Python ignores: it drops those of the libraries, passes others to `default`."""

    def hook(unraisable: Any) -> None:
        trace, last = unraisable.exc_traceback, ""
        while trace is not None:
            trace, last = trace.tb_next, trace.tb_frame.f_code.co_filename
        if not any(library in last for library in _LIBRARIES):
            default(unraisable)

    return hook
