"""A local hub of models: the part of the Hugging Face hub's API that downloads need, and a log of requests."""

import contextlib
import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SHA = "0123456789abcdef0123456789abcdef01234567"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        path, _, query = self.path.partition("?")
        parts = [urllib.parse.unquote(part) for part in path.strip("/").split("/")]
        self.server.asked.append((self.command, path))
        if parts[:2] == ["api", "models"]:
            self._api("/".join(parts[2:4]), parts[4:], query)
        elif len(parts) > 4 and parts[2] == "resolve":
            self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]), body)
        else:
            self._send(404, b"{}")

    def _api(self, repo: str, rest: list[str], query: str) -> None:
        folder = self._repo(repo)
        if folder is None:
            return
        revision = urllib.parse.unquote("/".join(rest[1:])) or "main"
        if revision not in self.server.revisions:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        names = [str(p.relative_to(folder)) for p in files]
        if rest and rest[0] == "tree":
            oids = [hashlib.sha1(p.read_bytes()).hexdigest() for p in files]
            sizes = [p.stat().st_size for p in files]
            tree = [
                {"type": "file", "path": n, "oid": o, "size": s} for n, o, s in zip(names, oids, sizes, strict=True)
            ]
            self._send(200, json.dumps(tree).encode())
        else:
            siblings = [{"rfilename": name} for name in names]
            if "blobs=" in query:
                siblings = [s | {"size": p.stat().st_size} for s, p in zip(siblings, files, strict=True)]
            self._send(200, json.dumps({"id": repo, "modelId": repo, "sha": SHA, "siblings": siblings}).encode())

    def _file(self, repo: str, revision: str, name: str, body: bool) -> None:
        folder = self._repo(repo)
        if folder is None:
            return
        if revision not in self.server.revisions or not (folder / name).is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        data = (folder / name).read_bytes()
        self.server.fetched += [name] * body
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        self._send(200, data, headers, body)

    def _repo(self, repo: str) -> Path | None:
        codes = {"toy/gated": (403, "GatedRepo"), "toy/broken": (500, ""), "toy/private": (401, "RepoNotFound")}
        folder = self.server.root / repo
        if repo in codes or not folder.is_dir():
            status, code = codes.get(repo, (404, "RepoNotFound"))
            self._send(status, b"{}", {"X-Error-Code": code} if code else {})
            return None
        return folder

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None, body: bool = True) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body and self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args) -> None:
        pass


class Hub(ThreadingHTTPServer):
    """Serves the folders root/OWNER/NAME, all at one commit, under given revisions."""

    daemon_threads = True

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.revisions = {"main", SHA, "refs/pr/1", "v1"}
        self.asked: list[tuple[str, str]] = []
        self.fetched: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextlib.contextmanager
def running(root: Path) -> Iterator[Hub]:
    """Run a hub within the context."""
    hub = Hub(root)
    thread = threading.Thread(target=hub.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
