"""Load on a real explorer server, on this machine only: its memory, and the latency of other requests.

    python tests/explorer_load.py

Starts a server in a process of its own with SAEs of 8,192 latents, attacks it for under two minutes, prints a line per
attack, and ends the server. Tests import `Server`, `idle` and `health` for smaller attacks.
"""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import httpx

ROOT = Path(__file__).resolve().parents[1]
MODEL = {"model": "any"}

SERVE = """
import sys
sys.path.insert(0, "tests")
from pathlib import Path
from live_explorer import load
from bridge.server.server import serve
run = Path(sys.argv[1])
serve(run, lambda: load(run), port=0, say=lambda text: print(text, flush=True))
"""


class Server:
    """A server process of a run; `port` is where it listens. Ends with the context.

    Args:
      run: the run's directory, as `live_explorer.write_run` makes it.
    """

    def __init__(self, run: Path, stderr: IO[str] | int | None = None):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", SERVE, str(run)]
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True
        )
        self.port = int(re.search(r":(\d+)/", self._process.stdout.readline())[1])

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def client(self, timeout: float = 120.0) -> httpx.Client:
        """Return a client of this server."""
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=timeout, trust_env=False)

    def memory(self, which: str = "VmHWM") -> int:
        """Return bytes of memory: VmHWM is the peak since the start or `forget_peak`, VmRSS the current value."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(re.search(rf"{which}:\s+(\d+)", status)[1]) * 1024

    def forget_peak(self) -> None:
        """Reset the peak of memory."""
        Path(f"/proc/{self._process.pid}/clear_refs").write_text("5")

    def descriptors(self) -> int:
        """Return the number of open files and sockets of the process."""
        return len(list(Path(f"/proc/{self._process.pid}/fd").iterdir()))


@contextlib.contextmanager
def idle(port: int, count: int, head: bytes = b"GET / HTTP/1.1\r\nHost: ") -> Iterator[list[socket.socket]]:
    """Open connections that send the beginning of a request and then nothing."""
    with contextlib.ExitStack() as stack:
        opened = []
        for _ in range(count):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
            with contextlib.suppress(OSError):
                connection.sendall(head)
            opened.append(connection)
        yield opened


@contextlib.contextmanager
def health(server: Server) -> Iterator[list[tuple[float, int]]]:
    """Request /health repeatedly within the context; yield seconds and status of every answer, 0 for none."""
    answers: list[tuple[float, int]] = []
    done = threading.Event()

    def ask() -> None:
        with server.client() as client:
            while not done.is_set():
                before = time.perf_counter()
                try:
                    status = client.get("/health").status_code
                except httpx.HTTPError:
                    status = 0
                answers.append((time.perf_counter() - before, status))
                done.wait(0.02)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield answers
    finally:
        done.set()
        thread.join()


def report(name: str, server: Server, answers: list[tuple[float, int]], what: str) -> None:
    """Print a line about an attack."""
    statuses = {status: sum(s == status for _, s in answers) for status in {s for _, s in answers}}
    slowest = max(seconds for seconds, _ in answers)
    print(
        f"{name}: {what}; peak {server.memory() / 2**20:.0f} MiB; /health {statuses}, slowest {slowest * 1000:.0f} ms",
        flush=True,
    )


@contextlib.contextmanager
def measured(name: str, server: Server) -> Iterator[list[str]]:
    """Print a line about the server within the context, and what the context appends to the list."""
    server.forget_peak()
    what: list[str] = []
    with health(server) as answers:
        yield what
    report(name, server, answers, ", ".join(what))


def batches(server: Server) -> None:
    """Send a batch of the largest prompts, with too many results and with as many as one answer has."""
    code = "".join(path.read_text() for path in sorted((ROOT / "bridge").rglob("*.py")))
    prompts = [code[2200 * i : 2200 * (i + 1)] for i in range(32)]
    for results in (1000, 16):
        body = MODEL | {"prompts": prompts, "sourceSet": "res", "numResults": results}
        with measured(f"all-batch, {results} results", server) as what, server.client() as client:
            before = time.perf_counter()
            response = client.post("/v1/activation/all-batch", json=body)
            what.append(f"{len(response.request.content):,} bytes get {response.status_code}")
            what.append(f"{len(response.content):,} bytes in {time.perf_counter() - before:.1f} s")
    largest = json.dumps(MODEL | {"prompt": prompts[0], "sourceSet": "res", "numResults": 500}).encode()
    with measured("60 of the largest answers that nobody reads", server) as what:
        head = b"POST /v1/activation/all HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with idle(server.port, 60, head + b"Content-Length: %d\r\n\r\n" % len(largest) + largest):
            time.sleep(10)
            what.append(f"{server.descriptors()} descriptors")


def connections(server: Server) -> None:
    """Open connections that start a request, or its body, and do not continue."""
    head = b"POST /v1/tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for count, begun in (
        (140, b"GET / HTTP/1.1\r\n"),
        (500, b"GET / HTTP/1.1\r\n"),
        (200, head + b"Content-Length: 9\r\n\r\n{"),
    ):
        name = f"{count} times {begun.split(b' ')[0].decode()} that does not go on"
        with measured(name, server) as what, idle(server.port, count, begun):
            time.sleep(3)
            what.append(f"{server.descriptors()} descriptors")


def bodies(server: Server) -> None:
    """Send the largest bodies, of as many small lists as possible, all at once."""
    body = b'{"text":[' + b",".join([b"[]"] * 99_990).ljust(2**20 - 20) + b"]}"
    statuses: list[int] = []

    def send() -> None:
        with server.client() as client:
            headers = {"content-type": "application/json"}
            statuses.append(client.post("/v1/tokenize", content=body, headers=headers).status_code)

    with measured("64 bodies of 99,990 lists", server) as what:
        threads = [threading.Thread(target=send) for _ in range(64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        what.append(f"statuses {set(statuses)}")


def attack(server: Server) -> None:
    """Run every attack, one after the other."""
    print(f"at rest: {server.memory('VmRSS') / 2**20:.0f} MiB")
    batches(server)
    connections(server)
    bodies(server)


def main() -> None:
    """Start a server and attack it."""
    sys.path.insert(0, str(ROOT / "tests"))
    from live_explorer import RESID, C
    from toy_saes import export, toy_sae

    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        export(toy_sae("topk", C, 8192, hook_name=RESID, k=32), run / "sae" / RESID)
        with Server(run, subprocess.DEVNULL) as server:
            attack(server)


if __name__ == "__main__":
    main()
