"""Run out of disk space at many points, and continue with enough space.

    python -m tests.campaign.full_disk --out=tests/campaign/full_disk.json

A run is trained, finished, evaluated and exported within increasing limits: on the size of a file (RLIMIT_FSIZE), and,
as root, on a separate file system (tmpfs). Each command must succeed, or end with exit code 1 and one FATAL line that
names a path of the run; earlier checkpoints must remain intact; and without the limit the same commands must give the
results of a run that always had space, bit for bit. Exit code 1 if anything differs.
"""

import argparse
import collections
import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.campaign import small_run

FILE_SIZES = (300, 2_000, 8_000, 20_000, 60_000, 150_000, 300_000, 600_000)
"""Bytes that no file may exceed."""

FREE = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Sizes of the file system, as fractions of the size of a complete run."""


def main() -> int:
    """Run the campaign and print where commands failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=None, help="folder for the runs; default: a temporary directory")
    parser.add_argument("--out", type=Path, default=None, help="file for the result, JSON")
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="jsae-full-", dir=arguments.work))
    (work / "disk").mkdir()
    try:
        text = small_run.make_text(work / "text")
        for _ in range(2):
            shutil.rmtree(_run(work), ignore_errors=True)
            problems = _chain(work, text, expected=None)
            expected = small_run.results(_run(work))
        size = sum(path.stat().st_size for path in _run(work).rglob("*"))
        failures: collections.Counter[str] = collections.Counter()
        for name, limit in _limits(work, size):
            shutil.rmtree(_run(work), ignore_errors=True)
            failed, wrong = _starved(work, text, limit)
            problems += [f"{name}: {problem}" for problem in wrong]
            problems += [f"{name}: {problem}" for problem in _chain(work, text, expected)]
            failures.update(failed)
            print(f"{name}: {len(failed)} failures, {len(wrong)} of them wrong", flush=True)
    finally:
        shutil.rmtree(work)
    for problem in problems:
        print(problem)
    for place, count in sorted(failures.items()):
        print(f"{count:4} {place}")
    if arguments.out is not None:
        result = {
            "command": "python -m tests.campaign.full_disk",
            "limits": len(FILE_SIZES) + len(FREE) * (os.geteuid() == 0),
            "failures": dict(failures),
            "problems": problems,
        }
        arguments.out.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return 1 if problems else 0


def _run(work: Path) -> Path:
    return work / "disk" / "run"


def _limits(work: Path, size: int) -> Iterator[tuple[str, Callable[[], contextlib.AbstractContextManager[Any]]]]:
    """Yield the name of every limit, and a function that returns the context in which it applies."""
    for limit in FILE_SIZES:
        yield f"files of at most {limit:,} bytes", lambda limit=limit: _largest_file(limit)
    if os.geteuid() == 0:
        for part in FREE:
            yield f"a disk of {part:.0%} of the run", lambda part=part: _small_disk(work / "disk", int(size * part))


@contextlib.contextmanager
def _largest_file(limit: int) -> Iterator[Callable[[], None]]:
    """Yield a function that limits the size of files of the process that calls it."""
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


@contextlib.contextmanager
def _small_disk(folder: Path, size: int) -> Iterator[Callable[[], None]]:
    """Mount a file system of a given size at a folder; keep its contents afterwards."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={max(size, 4096)}", "tmpfs", str(folder)]
    subprocess.run(mount, check=True)
    try:
        yield lambda: None
    finally:
        kept = folder.with_name("kept")
        if (folder / "run").exists():
            shutil.copytree(folder / "run", kept, symlinks=True)
        subprocess.run(["umount", str(folder)], check=True)
        if kept.exists():
            kept.rename(folder / "run")


def _starved(
    work: Path, text: Path, limit: Callable[[], contextlib.AbstractContextManager[Any]]
) -> tuple[list[str], list[str]]:
    """Run the commands of the chain within a limit; return their failures, and what is wrong with them."""
    failures, problems = [], []
    with limit() as prepare:
        for command in small_run.CHAIN:
            words = small_run.line(command, _run(work), text)
            checkpoints = _checkpoints(work)
            process = small_run.start(words, work / "log", preexec_fn=prepare)
            code = process.wait(600)
            output = (work / "log").read_text(errors="replace")
            if code == 0:
                continue
            fatal = [text for text in output.splitlines() if "FATAL" in text]
            failures.append(f"{command}: {_shortened(fatal[-1] if fatal else output[-300:], work)}")
            if code != 1 or len(fatal) != 1 or "Traceback" in output or "Exception ignored" in output:
                problems.append(f"{command} ended with code {code} and printed {output[-1500:]!r}")
            elif str(work) not in fatal[0]:
                problems.append(f"{command} names no path: {fatal[0]}")
            if not checkpoints <= _checkpoints(work):
                problems.append(f"{command} lost checkpoints: {checkpoints - _checkpoints(work)}")
            if command == "train":
                break  # the others need its result
    return failures, problems


def _checkpoints(work: Path) -> set[str]:
    folder = _run(work) / "checkpoints"
    return {path.name for path in folder.iterdir() if path.name.isdigit()} if folder.is_dir() else set()


def _shortened(fatal: str, work: Path) -> str:
    return fatal.replace(str(_run(work)), "RUN")[:160]


def _chain(work: Path, text: Path, expected: dict[str, Any] | None) -> list[str]:
    """Run all commands with enough space; return what is wrong in the end."""
    for command in small_run.CHAIN:
        process = small_run.start(small_run.line(command, _run(work), text), work / "log")
        if process.wait(600):
            return [f"{command} with space again: {(work / 'log').read_text(errors='replace')[-1500:]!r}"]
    return [] if expected is None else small_run.differences(small_run.results(_run(work)), expected)


if __name__ == "__main__":
    sys.exit(main())
