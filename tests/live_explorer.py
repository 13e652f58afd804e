"""The explorer's server as users run it: the demo nanochat with two random SAEs, under uvicorn, on a free port."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from toy_saes import export, toy_sae

import bridge.nanochat
from bridge.nanochat import Nanochat
from bridge.runtime import InterpretableModel, load_saes
from bridge.server import server
from bridge.server.bodies import Limits

RESID, MLP = "blocks.2.hook_resid_post", "blocks.4.hook_mlp_out"
C = 128
ROOT = Path(__file__).resolve().parents[1]


def write_run(run: Path) -> Path:
    """Write a run with SAEs at two hooks, and an example of every file beside a page."""
    export(toy_sae("topk", C, 256, hook_name=RESID), run / "sae" / RESID)
    export(toy_sae("jumprelu", C, 192, hook_name=MLP), run / "sae" / MLP)
    page = run / "explorer"
    (page / "records" / "texts").mkdir(parents=True)
    (page / "index.html").write_text("<!doctype html><title>a page</title>")
    (page / "core.js").write_text("var jsae = {};")
    (page / ".hidden.js").write_text("hidden")
    (page / "notes.jsonl").write_text("")
    (page / "records" / "texts" / "texts.json").write_text("{}")
    (page / "records" / "loose.js").write_text("a record")
    (run / "outside.js").write_text("outside")
    (page / "link.js").symlink_to(run / "outside.js")
    return run


def load(run: Path) -> tuple[InterpretableModel, Nanochat]:
    """Return the demo nanochat with a run's SAEs."""
    nano = bridge.nanochat.load("demo")
    return InterpretableModel.from_nanochat(nano, load_saes(run)), nano


@contextlib.contextmanager
def served(run: Path, im: InterpretableModel, nano: Nanochat, **settings: Any) -> Iterator[httpx.Client]:
    """Yield a client of a server that runs within the context."""
    with (
        listening(server.app(run, im, nano, **settings), settings.get("limits")) as port,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as client,
    ):
        yield client


@contextlib.contextmanager
def listening(app: Any, limits: Limits | None = None) -> Iterator[int]:
    """Serve an app within the context; yield its port."""
    with contextlib.closing(server.listen("127.0.0.1", 0)) as listener:
        running = uvicorn.Server(server.config(app, limits))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            running.should_exit = True
            thread.join()


@contextlib.contextmanager
def serving(run: Path, *arguments: str) -> Iterator[str]:
    """Yield the address that `experiments.explore --serve` prints, in a process that ends with the context."""
    command = [sys.executable, "-m", "experiments.explore", f"--run_dir={run}", *arguments, "--serve", "--port=0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            told = []
            for line in process.stdout:
                told.append(line)
                if found := re.search(r"explorer at (http://\S+)", line):
                    break
            else:
                pytest.fail("the server did not start: " + "".join(told))
            yield found[1]
        finally:
            process.terminate()
            process.communicate(timeout=20)


def lines(client: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    """Return everything that a steered continuation streams."""
    with client.stream("POST", "/api/steer", json=body) as response:
        assert response.status_code == 200, response.read()
        return [json.loads(line) for line in response.iter_lines()]


def raw(client: httpx.Client, request: str) -> str:
    """Return the answer to a raw request that no client would send."""
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=10) as connection:
        connection.sendall(request.encode("latin-1"))
        answer = b""
        while part := connection.recv(65536):
            answer += part
    return answer.decode("utf-8", "replace")
