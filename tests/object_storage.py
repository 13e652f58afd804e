"""A small server with the interface of S3 on this machine: objects in memory, read in ranges, written, listed."""

import contextlib
import hashlib
import http.server
import threading
import urllib.parse
from collections.abc import Iterator
from email.utils import formatdate
from xml.sax.saxutils import escape


class Bucket:
    """The objects of the server, and faults that tests ask for.

    Attributes:
      objects: content by path, `/bucket/key`.
      requests: method and path of every request.
      full: whether writing is refused.
    """

    def __init__(self):
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.full = False
        self.lock = threading.Lock()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and content in one packet: the client acknowledges a first one late
    bucket: Bucket

    def log_message(self, *arguments: object) -> None:
        """Log nothing."""

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = urllib.parse.parse_qs(url.query)
        self._note()
        if "list-type" in query:
            self._list(urllib.parse.unquote(url.path), query)
            return
        content = self.bucket.objects.get(urllib.parse.unquote(url.path))
        if content is None:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
            return
        wanted = self.headers.get("Range")
        if wanted is None:
            self._answer(200, content, etag=content)
            return
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start = int(first) if first else max(len(content) - int(last), 0)
        stop = min(int(last) + 1, len(content)) if first and last else len(content)
        if start >= len(content):
            self._answer(416, b"<Error><Code>InvalidRange</Code></Error>")
            return
        extra = {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}
        self._answer(206, content[start:stop], extra, etag=content)

    def do_HEAD(self) -> None:
        self._note()
        content = self.bucket.objects.get(urllib.parse.unquote(urllib.parse.urlsplit(self.path).path))
        self._answer(404 if content is None else 200, b"", etag=content)

    def do_PUT(self) -> None:
        self._note()
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.bucket.full:
            self._answer(403, b"<Error><Code>QuotaExceeded</Code></Error>")
            return
        with self.bucket.lock:
            self.bucket.objects[urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)] = content
        self._answer(200, b"", etag=content)

    def do_DELETE(self) -> None:
        self._note()
        with self.bucket.lock:
            self.bucket.objects.pop(urllib.parse.unquote(urllib.parse.urlsplit(self.path).path), None)
        self._answer(204, b"")

    def _list(self, path: str, query: dict[str, list[str]]) -> None:
        """Answer a listing in pages of three, so that tests see more than one."""
        root, prefix = path.rstrip("/") + "/", query.get("prefix", [""])[0]
        with self.bucket.lock:
            keys = sorted(key.removeprefix(root) for key in self.bucket.objects if key.startswith(root + prefix))
        after = query.get("continuation-token", query.get("start-after", [""]))[0]
        keys = [key for key in keys if key > after]
        page = keys[:3]
        more = len(keys) > len(page)
        contents = "".join(f"<Contents><Key>{escape(key)}</Key><Size>1</Size></Contents>" for key in page)
        token = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if more else ""
        text = f"<IsTruncated>{str(more).lower()}</IsTruncated><KeyCount>{len(page)}</KeyCount>{token}{contents}"
        self._answer(200, f"<ListBucketResult>{text}</ListBucketResult>".encode())

    def _note(self) -> None:
        with self.bucket.lock:
            self.bucket.requests.append(f"{self.command} {self.path}")

    def _answer(
        self, status: int, content: bytes, extra: dict[str, str] | None = None, etag: bytes | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("x-amz-bucket-region", "us-east-1")
        self.send_header("Last-Modified", formatdate(usegmt=True))
        if etag is not None:
            self.send_header("ETag", f'"{hashlib.md5(etag).hexdigest()}"')
        for name, value in (extra or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


@contextlib.contextmanager
def serving() -> Iterator[tuple[str, Bucket]]:
    """Yield the address of a running server, and its bucket."""
    bucket = Bucket()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"bucket": bucket}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", bucket
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
