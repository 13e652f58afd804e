"""The protocol of scripts in another environment: one JSON line in answer to each job, a JSON line on stdin.

Standard library only, no jsae.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TextIO


def open_answers() -> TextIO:
    """Return the stream for answers, the old stdout; anything else that is printed goes to stderr from now on."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def answer(answers: TextIO, message: dict[str, Any]) -> None:
    """Write a message as one line of JSON."""
    print(json.dumps(message), file=answers, flush=True)


def jobs() -> Iterator[dict[str, Any]]:
    """Yield the jobs on stdin until it ends."""
    for line in sys.stdin:
        yield json.loads(line)


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    installed = {}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            installed[package] = version(package)
    return installed
