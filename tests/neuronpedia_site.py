"""A site with Neuronpedia's documented public API, in a thread; faults can be injected."""

import contextlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "np-key-of-the-tests"
BODY_CAP = 4_500_000  # of the site's host
LIMITED = {
    "endpoint": "/api",
    "limitPerWindow": 25000,
    "requestWindow": "60 m",
    "remainingRequests": 0,
    "error": "Rate limit exceeded for this endpoint.",
}

Answer = tuple[int, Any]
Fault = Callable[["Site", dict], Answer | None]
"""A fault of one upload: an answer, or None for a dropped connection."""


@dataclass
class Site:
    """The contents of the site, and its log of requests."""

    models: dict[str, int] = field(default_factory=dict)
    source_sets: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    activations: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    """Sets of activations by feature: 1 is right, 2 are a duplicate."""
    explanations: dict[tuple[str, str, int], list[dict]] = field(default_factory=dict)
    stored: dict[tuple[str, str, int], dict] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    faults: list[Fault | None] = field(default_factory=list)
    """Faults of the coming uploads, in order; None for a correct one."""
    null_for_missing: bool = False
    """Answer like older versions, instead of 404."""
    url: str = ""
    lock: threading.RLock = field(default_factory=threading.RLock)

    def uploads(self) -> int:
        """Return the number of attempted uploads."""
        return self.requests.count(("POST", "/api/feature/upload-batch"))

    # ---- what it answers ------------------------------------------------------------------------------------------

    def get(self, path: str) -> Answer:
        missing: Answer = (200, None) if self.null_for_missing else (404, {"error": "Not found."})
        if found := re.fullmatch(r"/api/source-set/([^/]+)/([^/]+)", path):
            sources = self.source_sets.get((found[1], found[2]))
            return missing if sources is None else (200, {"name": found[2], "sources": [{"id": s} for s in sources]})
        if found := re.fullmatch(r"/api/feature/([^/]+)/([^/]+)/(\d+)", path):
            key = found[1], found[2], int(found[3])
            if key not in self.stored:
                return missing
            texts = self.stored[key]["activations"] * self.activations[key]
            return 200, {"index": found[3], "activations": texts, "explanations": self.explanations.get(key, [])}
        return 404, "<html>no such page</html>"

    def post(self, path: str, body: dict, key: str | None) -> Answer | None:
        if key != KEY:
            return 401, {"error": f"This endpoint requires authorization, not by {key}."}
        if path == "/api/model/new":
            if body["id"] in self.models:
                return 400, {"error": "Model already exists"}
            self.models[body["id"]] = body["layers"]
            return 200, {"id": body["id"], "layers": body["layers"], "displayName": body["id"], "website": None}
        if path == "/api/source-set/new":
            where = body["modelId"], body["name"]
            if body["modelId"] not in self.models or where in self.source_sets:
                return 400, {"error": "Source set name already exists for this model."}
            self.source_sets[where] = [f"{i}-{body['name']}" for i in range(self.models[body["modelId"]])]
            return 200, {"name": body["name"]}
        if path == "/api/feature/upload-batch":
            fault = self.faults.pop(0) if self.faults else None
            return fault(self, body) if fault else self.store(body)
        return 404, "<html>no such page</html>"

    def store(self, body: dict, first: int | None = None) -> Answer:
        """Accept a batch, or only its first features."""
        if wrong := _wrong(body):
            return 400, {"error": wrong, "path": "features"}
        model, source = body["modelId"], body["source"]
        if not any(source in sources for (owner, _), sources in self.source_sets.items() if owner == model):
            return 500, "Source not found."
        for feature in body["features"][:first]:
            key = model, source, feature["index"]
            self.stored.setdefault(key, feature)
            self.activations[key] += 1
            said = [{"description": e["text"]} for e in feature.get("explanations", [])]
            self.explanations.setdefault(key, []).extend(said)
        return 200, {"message": f"{len(body['features'])} features created."}


def _wrong(body: dict) -> str:
    """Return the violations of the site's rules by an upload."""
    features = body["features"]
    if not 1 <= len(features) <= 128:
        return "features must have 1 to 128 items"
    if len({feature["index"] for feature in features}) < len(features):
        return "All indexes must be unique."
    for feature in features:
        if "density" in feature and not 0 <= feature["density"] <= 1:
            return "density"
        if not feature.get("activations"):
            return "activations is a required field"
        for act in feature["activations"]:
            fits = len(act["tokens"]) == len(act["values"]) <= 1024 and all(act["tokens"])
            share = act.get("quantileFraction")
            if not fits or not (share is None or 0 <= share <= 1):
                return "activations"
        if any(not 1 <= len(explanation["text"]) <= 512 for explanation in feature.get("explanations", ())):
            return "text"
    return ""


# ---- bad behaviour ------------------------------------------------------------------------------------------------


def drop_before(site: Site, body: dict) -> None:
    """Drop the connection without doing anything."""


def drop_after(site: Site, body: dict) -> None:
    """Accept everything and drop the connection."""
    site.store(body)


def half(site: Site, body: dict) -> None:
    """Accept the first half of the features and drop the connection."""
    site.store(body, len(body["features"]) // 2)


def fail_before(site: Site, body: dict) -> Answer:
    """Answer 500, as after a transaction that was rolled back."""
    return 500, {"error": "Failed to create features. Please try again."}


def fail_after(site: Site, body: dict) -> Answer:
    """Answer 504, as a gateway whose timeout expired although the request succeeded."""
    site.store(body)
    return 504, "<html>An error occurred with your deployment</html>"


def limited(site: Site, body: dict) -> Answer:
    """Answer 429 without doing anything."""
    return 429, LIMITED


# ---- HTTP ---------------------------------------------------------------------------------------------------------


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet
    site: Site

    def do_GET(self) -> None:
        with self.site.lock:
            self.site.requests.append(("GET", self.path))
            self._answer(self.site.get(self.path))

    def do_POST(self) -> None:
        length = int(self.headers["content-length"])
        if length > BODY_CAP:
            self.close_connection = True
            self._answer((413, "FUNCTION_PAYLOAD_TOO_LARGE"))
            return
        body = json.loads(self.rfile.read(length))
        with self.site.lock:
            self.site.requests.append(("POST", self.path))
            self._answer(self.site.post(self.path, body, self.headers["x-api-key"]))

    def _answer(self, answer: Answer | None) -> None:
        if answer is None:
            self.close_connection = True
            return
        status, told = answer
        data = (told if isinstance(told, str) else json.dumps(told)).encode()
        with contextlib.suppress(ConnectionError):  # the other side may be gone
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            self.wfile.flush()

    def log_message(self, *arguments: object) -> None:
        """Log nothing."""


@contextlib.contextmanager
def serving() -> Iterator[Site]:
    """Run an empty site at `site.url` within the context."""
    site = Site()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"site": site}))
    server.daemon_threads = True
    site.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
