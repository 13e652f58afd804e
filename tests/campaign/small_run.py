"""A small run for campaigns: the commands of its chain, and the results that two runs must have in common."""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[2]
TRAIN = {
    "num_activations": 60_000,
    "batch_size": 500,
    "block_size": 5_000,
    "context_size": 64,
    "tokens_per_forward": 2048,
    "checkpoint_every": 5_000,
    "log_every": 4,
    "heldout_tokens": 1_000,
    "expansion_factor": 2,
    "k": 8,
    "dead_after": 5_000,
}
FORMATS = "sae_lens,neuronpedia,saedashboard,delphi,circuit_tracer"
CHAIN: dict[str, Callable[[Path, Path], list[str]]] = {
    "train": lambda run, text: [
        *(f"--{name}={value}" for name, value in TRAIN.items()),
        f"--data={text}/*.py",
        f"--output_dir={run}",
    ],
    "finish": lambda run, text: [*CHAIN["train"](run, text), "--prepare_neuronpedia"],
    "evaluate": lambda run, text: [f"--run_dir={run}", "--noprobes", "--noplots", "--heldout_tokens=1000"],
    "explore": lambda run, text: [f"--run_dir={run}", "--force"],
    "export": lambda run, text: [f"--run_dir={run}", f"--format={FORMATS}"],
}
"""Commands and their flags, in the order of use. `finish` resumes a trained run."""

# Files of a run that are not compared.
_NOT_RESULTS = {".lock", "config.json", "metrics.jsonl"}
_REMAINS = (".partial", ".outdated", ".unfinished", ".damaged")


def make_text(folder: Path) -> Path:
    """Copy some Python files, enough for a held-out part; return the folder."""
    folder.mkdir(parents=True)
    for path in sorted(Path(json.__file__).parents[1].glob("*.py"))[:48:4]:
        shutil.copy(path, folder)
    return folder


def line(command: str, run: Path, text: Path) -> list[str]:
    """Return the command line; a training run that has started is resumed."""
    flags, module = CHAIN[command](run, text), command
    if command in ("train", "finish"):
        module, flags = "train", flags + ["--resume"] * (run / "config.json").is_file()
    return [sys.executable, "-m", f"experiments.{module}", *flags]


def start(words: list[str], log: Path, **more: Any) -> subprocess.Popen[bytes]:
    """Start a command in the repository, with compiled programs cached beside the log; write its output to the log."""
    compiled = {
        "JAX_COMPILATION_CACHE_DIR": str(log.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",  # as tests/file_limit.py says; and processes are killed here
    }
    with log.open("wb") as file:
        return subprocess.Popen(words, cwd=ROOT, env={**os.environ, **compiled}, stdout=file, stderr=file, **more)


def paths(run: Path) -> set[str]:
    """Return all paths in a run directory, even while it changes."""
    relative: set[str] = set()
    for folder, folders, names in os.walk(run):
        relative |= {os.path.relpath(os.path.join(folder, name), run) for name in (*folders, *names)}  # noqa: PTH118
    return relative


def results(run: Path) -> dict[str, Any]:
    """Return by name what must be equal, bit for bit, after any interruptions; files as digests."""
    contents: dict[str, Any] = {
        "metrics.jsonl": [
            {name: value for name, value in json.loads(text).items() if not name.endswith("per_second")}
            for text in (run / "metrics.jsonl").read_text().splitlines()
        ],
        "checkpoints": sorted(path.name for path in (run / "checkpoints").iterdir()),
        "tensorboard": _scalars(run / "tb"),
        "remains": sorted(name for name in paths(run) if name.endswith(_REMAINS) or "orbax-checkpoint-tmp" in name),
    }
    for name in sorted(paths(run)):
        path = run / name
        if path.is_file() and name.split("/")[0] not in {"checkpoints", "tb"} and path.name not in _NOT_RESULTS:
            contents[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return contents


def differences(actual: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Return the names under which two runs differ, with the start of their contents."""
    names = sorted(name for name in actual.keys() | expected.keys() if actual.get(name) != expected.get(name))
    return [f"{name}: {str(actual.get(name))[:200]} is not {str(expected.get(name))[:200]}" for name in names]


def _scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of every resumed run
    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if not tag.endswith("per_second")
    }
