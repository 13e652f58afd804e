"""Start several processes of one run, as a launcher does, and wait for them."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def free_port() -> int:
    """Return a port whose next one is free too: torchrun has the first, jax takes the second."""
    while True:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            try:
                two.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


class Processes:
    """Processes of one run; a context manager that leaves none behind.

    Args:
      command: arguments of Python, the same for all unless `several`.
      count: number of processes.
      several: arguments of every process.
    """

    def __init__(self, command: Sequence[str], count: int, several: Sequence[Sequence[str]] | None = None):
        shared = {
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            "OMP_NUM_THREADS": "1",
        }
        self.all = [
            subprocess.Popen(
                [sys.executable, *(command if several is None else several[index])],
                cwd=ROOT,
                env=os.environ | shared | {"RANK": str(index), "LOCAL_RANK": str(index)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(count)
        ]

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.all:
            if process.poll() is None:
                process.kill()
            process.communicate()

    def send(self, index: int, number: signal.Signals) -> float:
        """Send a signal to one process; return the time."""
        self.all[index].send_signal(number)
        return time.monotonic()

    def finish(self, timeout: float = 200) -> list[tuple[int, str, str]]:
        """Wait for all; return exit code, stdout and stderr of every process."""
        until = time.monotonic() + timeout
        results = []
        for process in self.all:
            out, err = process.communicate(timeout=max(until - time.monotonic(), 1))
            results.append((process.returncode, out, err))
        return results
