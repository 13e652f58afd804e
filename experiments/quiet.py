"""What libraries print beside an error that a command tells in one line."""

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

_LIBRARIES = ("/orbax/", "/tensorstore/", "/asyncio/")


@contextlib.contextmanager
def libraries(debug: bool) -> Iterator[None]:
    """Keep Orbax and TensorStore from logging tracebacks of an error that they also raise, unless debugging.

    After a failed write or read they leave unfinished coroutines and late callbacks behind, whose exceptions Python
    would print one by one. Exceptions of anything else are printed as ever.
    """
    if debug:
        yield
        return
    import absl.logging  # noqa: F401 - makes the logger of that name

    loggers = [logging.getLogger("absl"), logging.getLogger("asyncio")]
    for logger in loggers:
        logger.addFilter(_is_no_error)
    hook, sys.unraisablehook = sys.unraisablehook, _without_libraries(sys.unraisablehook)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"coroutine .* was never awaited", RuntimeWarning)
        try:
            yield
        finally:
            sys.unraisablehook = hook
            for logger in loggers:
                logger.removeFilter(_is_no_error)


def _is_no_error(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR


def _without_libraries(otherwise: Any) -> Any:
    """Return a hook for exceptions that Python ignores: drops those that were raised in the libraries."""

    def hook(unraisable: Any) -> None:
        trace, last = unraisable.exc_traceback, ""
        while trace is not None:
            trace, last = trace.tb_next, trace.tb_frame.f_code.co_filename
        if not any(library in last for library in _LIBRARIES):
            otherwise(unraisable)

    return hook
