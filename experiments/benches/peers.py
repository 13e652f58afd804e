"""Libraries that are measured against: an environment of their own, and a process there that is asked line by line."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Ask = Callable[[dict[str, Any]], dict[str, Any]]
"""Sends a job to a peer's process and waits for its answer."""

TRAINERS_HOME = "~/.cache/jsae/quality-peers-1"
"""Where SAELens, dictionary_learning and sparsify are installed, unless a flag says otherwise."""

_TRAINERS = (
    ["install", "-q", "torch>=2.9,<2.14", "sae-lens==6.54.12", "nnsight<0.4", "natsort", "schedulefree", "zstandard"],
    ["install", "-q", "--no-deps", "dictionary-learning==0.1.0", "eai-sparsify==1.3.3"],  # the rest is of other work
    # These come along, and fail to load beside a torch without CUDA.
    ["uninstall", "-q", "-y", "torchvision", "torchaudio"],
)
_TRAINERS_PROOF = "import sae_lens, sparsify, dictionary_learning.training"


def trainers(folder: str) -> Path:
    """The interpreter of an environment with the other trainers of SAEs.

    Raises:
      OSError: it could not be made.
    """
    return environment(Path(folder).expanduser(), _TRAINERS, _TRAINERS_PROOF)


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
def process(
    python: Path | str,
    script: Path,
    folder: Path,
    variables: Mapping[str, str] | None = None,
    *,
    called: str | None = None,
) -> Iterator[tuple[dict[str, str], Ask]]:
    """Runs `script folder` until the end: what it says first, `versions`, and how to ask it.

    It answers every line of JSON with one; what it prints to stderr is shown when it ends before its time. Its
    environment is this process's, with `variables` set; `called` is its name when it ends, else the script's.

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
            env={**os.environ, **(variables or {})},
        ) as peer,
    ):

        def answer() -> dict[str, Any]:
            line = peer.stdout.readline()
            if not line:
                errors.seek(0)
                raise OSError(f"{called or f'the process of {script.stem}'} ended:\n{errors.read()[-2000:]}")
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
