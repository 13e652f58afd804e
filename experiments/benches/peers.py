"""Libraries that are measured against: an environment of their own, and a process there that is asked line by line."""

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

Ask = Callable[[dict[str, Any]], dict[str, Any]]
"""Sends a job to a peer's process and waits for its answer."""


def environment(folder: Path, steps: Sequence[Sequence[str]], proof: str) -> Path:
    """The interpreter of a virtual environment, made where it is not there whole.

    Args:
      folder: of the environment.
      steps: arguments of pip, call by call.
      proof: a statement that runs in it when all is there.

    Raises:
      OSError: a step failed.
    """
    python, whole = folder / "bin" / "python", folder / "whole"
    if whole.is_file():
        return python
    print(f"making {folder}", file=sys.stderr)
    calls = [[sys.executable, "-m", "venv", "--clear", str(folder)]]
    calls += [[str(python), "-m", "pip", *step] for step in steps]
    for call in [*calls, [str(python), "-c", proof]]:
        if subprocess.run(call, check=False).returncode:
            raise OSError(f"{folder} could not be made: `{' '.join(call)}` failed")
    whole.touch()
    return python


@contextlib.contextmanager
def process(python: Path | str, script: Path, folder: Path) -> Iterator[tuple[dict[str, str], Ask]]:
    """Runs `script folder` until the end: what it says first, `versions`, and how to ask it.

    It answers every line of JSON with one; what it prints to stderr is shown when it ends before its time.

    Raises:
      OSError: it ended.
    """
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
        subprocess.Popen(
            [str(python), str(script), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as peer,
    ):

        def answer() -> dict[str, Any]:
            line = peer.stdout.readline()
            if not line:
                errors.seek(0)
                raise OSError(f"the process of {script.stem} ended:\n{errors.read()[-2000:]}")
            return json.loads(line)

        def ask(job: dict[str, Any]) -> dict[str, Any]:
            try:
                peer.stdin.write(json.dumps(job) + "\n")
                peer.stdin.flush()
            except BrokenPipeError:
                pass  # it ended, and `answer` says why
            return answer()

        try:
            yield answer()["versions"], ask
        finally:
            peer.terminate()
