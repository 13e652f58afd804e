"""Slow, idle and flooding connections end in time, while others are served."""

import contextlib
import http.client
import itertools
import json
import re
import socket
import threading
import time

import httpx
import pytest
from explorer_load import Server, health, idle
from live_explorer import RESID, lines, load, served, write_run

from bridge.server import connections
from bridge.server.bodies import Limits

HEAD = b"GET /api/info HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST /api/activations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
ASK = {"text": "x", "hook": RESID}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = write_run(tmp_path_factory.mktemp("runs") / "toy")
    (run / "explorer" / "large.js").write_bytes(b"/" * 2**25)
    return run


@pytest.fixture(scope="module")
def model(run):
    return load(run)


@pytest.fixture(scope="module")
def process(run):
    with Server(run) as server:
        yield server


def connect(client: httpx.Client, data: bytes = b"") -> socket.socket:
    """A connection to the server of a client, on which something was sent."""
    connection = socket.create_connection((client.base_url.host, client.base_url.port), timeout=10)
    connection.sendall(data)
    return connection


def rest(connection: socket.socket) -> bytes:
    """All that comes until the connection ends; a reset fails."""
    with connection:
        return b"".join(iter(lambda: connection.recv(65536), b""))


# ---- many that do nothing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "head"),
    [(140, b""), (140, HEAD), (140, POST + b"Content-Length: 99\r\n\r\n{"), (500, HEAD)],
    ids=["silent", "head", "body", "more"],
)
def test_idle_connections_keep_nobody_out(process, count, head):
    with process.client() as old:
        assert old.get("/health").status_code == 200
        with idle(process.port, count, head), health(process) as answers:
            for _ in range(8):
                with process.client() as new:  # one that connects among them
                    assert new.get("/health").status_code == 200
            with process.client() as client:
                assert client.post("/api/activations", json=ASK).status_code == 200
            assert process.descriptors() < 160, "idle connections of one client were kept"
        assert {status for _, status in answers} == {200}
        assert max(seconds for seconds, _ in answers) < 2


def test_dribbling_connections_keep_nobody_out(process):
    done = threading.Event()

    def dribble(opened: list[socket.socket]) -> None:
        for letter in itertools.cycle(b"abc"):
            for connection in opened:
                with contextlib.suppress(OSError):
                    connection.send(bytes([letter]))
            if done.wait(0.05):
                return

    with idle(process.port, 140) as opened:
        thread = threading.Thread(target=dribble, args=(opened,))
        thread.start()
        try:
            with health(process) as answers:
                time.sleep(1)
        finally:
            done.set()
            thread.join()
    assert len(answers) > 5
    assert {status for _, status in answers} == {200}


def test_who_is_answered_does_not_make_room(run, model):
    limits = Limits(client_connections=2)
    body = {"prompt": "def f(", "max_tokens": 100}
    with served(run, *model, limits=limits) as client, httpx.Client(base_url=client.base_url, timeout=30) as other:
        with (
            client.stream("POST", "/api/steer", json=body) as first,
            other.stream("POST", "/api/steer", json=body) as second,
        ):
            streams = [stream.iter_lines() for stream in (first, second)]
            assert all(next(stream) for stream in streams)
            refused = httpx.get(client.base_url.join("/health"))
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) >= 1
            assert "in use" in refused.json()["error"]
            assert all(json.loads(list(stream)[-1]) == {"done": True} for stream in streams)
        for _ in range(4):
            assert httpx.get(client.base_url.join("/health")).status_code == 200


def test_one_client_does_not_push_out_another():
    assert connections._address(("127.0.0.1", 1)) == connections._address(("127.0.0.1", 2))
    assert connections._address(("10.0.0.1", 1)) != connections._address(("10.0.0.2", 1))
    assert connections._address(("2001:db8::1%eth0", 1)) == connections._address(("2001:db8::ffff", 1))
    assert connections._address(("2001:db8::1", 1)) != connections._address(("2001:db8:0:1::1", 1))
    assert connections._address(None) == ""

    class Idle:
        waits_for = "head"

        def __init__(self, address: str):
            self.address, self.dropped, self.waits_since = address, False, next(times)

        def drop(self) -> None:
            self.dropped = True
            crowd.leave(self)

    times = itertools.count()
    crowd = connections.OpenConnections(Limits(client_connections=2, connections=3))
    calm, *greedy = [Idle("a"), *(Idle("b") for _ in range(9))]
    assert all(crowd.enter(each) for each in (calm, *greedy))
    assert [each.dropped for each in greedy] == [True] * 7 + [False] * 2
    assert not calm.dropped
    assert crowd.enter(Idle("c"))
    assert calm.dropped, "of all together the one that waits longest makes room"
    assert len(crowd) == 3


# ---- deadlines -----------------------------------------------------------------------------------------------------


def ends_within(connection: socket.socket, seconds: float, sent: bytes = b"") -> bytes:
    """Return what a connection receives; it must end in that time, though something is sent again and again."""
    connection.settimeout(0.05)
    got, before = b"", time.monotonic()
    with connection:
        while time.monotonic() - before < seconds:
            try:
                if sent:
                    connection.send(sent)
                part = connection.recv(65536)
            except TimeoutError:
                continue
            except OSError:
                return got
            if not part:
                return got
            got += part
    pytest.fail(f"the connection is still open after {seconds} seconds")


def test_a_head_that_does_not_come_is_not_waited_for(run, model):
    with served(run, *model, limits=Limits(head_seconds=0.3)) as client:
        assert ends_within(connect(client), 3) == b""
        for sent in (b"", b"x"):
            answer = ends_within(connect(client, HEAD + b"X: "), 3, sent)
            assert answer.startswith(b"HTTP/1.1 408 "), answer
            assert b"send it at once" in answer
        assert client.get("/health").status_code == 200


def test_an_idle_connection_is_closed(run, model):
    with served(run, *model, limits=Limits(idle_seconds=0.3, head_seconds=0.6)) as client:
        for sent in (b"", b"\r\n", b"x"):
            answer = ends_within(connect(client, HEAD + b"\r\n"), 4, sent)
            assert answer.startswith(b"HTTP/1.1 200 ")


def test_a_body_that_nobody_reads_has_a_deadline_too(run, model, monkeypatch):
    monkeypatch.setattr(connections, "_MARGIN", 0.1)
    with served(run, *model, limits=Limits(body_seconds=0.3)) as client:
        for sent in (b"", b"x"):
            answer = ends_within(connect(client, HEAD + b"Content-Length: 100000\r\n\r\n"), 4, sent)
            assert answer.startswith(b"HTTP/1.1 200 ")
            answer = ends_within(connect(client, POST + b"Content-Length: 100000\r\n\r\n{"), 4, sent)
            assert answer.startswith(b"HTTP/1.1 408 ")


def test_a_client_that_does_not_read_is_cut_off(run, model):
    with served(run, *model, limits=Limits(read_seconds=0.3)) as client:
        for close in (b"", b"Connection: close\r\n"):
            with connect(client, HEAD.replace(b"/api/info", b"/large.js") + close + b"\r\n") as connection:
                time.sleep(1.2)
                got = 0
                with contextlib.suppress(ConnectionResetError):
                    while part := connection.recv(2**20):
                        got += len(part)
                assert got < 2**25
        assert len(client.get("/large.js").content) == 2**25, "who reads gets all of it"


def test_a_slow_reader_gets_all(run, model):
    with served(run, *model, limits=Limits(read_seconds=0.5)) as client:
        with connect(client, HEAD.replace(b"/api/info", b"/large.js") + b"Connection: close\r\n\r\n") as connection:
            got = 0
            while part := connection.recv(2**20):
                got += len(part)
                if got % 5 == 0:
                    time.sleep(0.02)
        assert got > 2**25


# ---- bodies and heads that are too long ----------------------------------------------------------------------------


@pytest.mark.parametrize("close", [b"", b"Connection: close\r\n"], ids=["kept", "close"])
@pytest.mark.parametrize("chunked", [False, True])
def test_who_sends_all_of_a_long_body_first_reads_why_it_is_refused(client, close, chunked):
    body = b"x" * 2**23
    if chunked:
        head, body = b"Transfer-Encoding: chunked\r\n", b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    else:
        head = b"Content-Length: %d\r\n" % len(body)
    answer = rest(connect(client, POST + head + close + b"\r\n" + body))
    assert answer.startswith(b"HTTP/1.1 413 "), answer[:200]
    assert b"longer than 1,048,576 bytes" in answer


@pytest.fixture(scope="module")
def client(run, model):
    with served(run, *model) as client:
        yield client


def test_a_long_body_is_refused_to_the_clients_of_the_standard_library_and_httpx(client):
    body = b"x" * 2**24
    headers = {"content-type": "application/json"}
    for more in ({}, {"connection": "close"}):
        response = client.post("/api/activations", content=body, headers=headers | more)
        assert response.status_code == 413
        assert "shorter" in response.json()["error"]
        plain = http.client.HTTPConnection(client.base_url.host, client.base_url.port, timeout=10)
        plain.request("POST", "/v1/tokenize", body, headers | more)
        assert plain.getresponse().status == 413
        plain.close()


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (POST.replace(b"localhost", b"evil.example"), 403),
        (POST.replace(b"/api/activations", b"/nothing"), 405),
        (POST.replace(b"application/json", b"text/plain"), 415),
    ],
)
def test_whatever_is_refused_is_read_after_a_long_body(client, head, status):
    head += b"Connection: close\r\nContent-Length: 8388608\r\n\r\n"
    assert rest(connect(client, head + b"x" * 2**23)).startswith(b"HTTP/1.1 %d " % status)


def test_who_asks_before_sending_a_long_body_need_not_send_it(client):
    head = POST + b"Expect: 100-continue\r\nContent-Length: 8388608\r\n\r\n"
    assert rest(connect(client, head)).startswith(b"HTTP/1.1 413 ")


def test_a_body_without_end_is_cut_off(run, model):
    with served(run, *model, limits=Limits(unread_bytes=2**22)) as client:
        with connect(client, POST + b"Content-Length: 1000000000000\r\n\r\n") as connection:
            sent = 0
            with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                while sent < 1000:
                    connection.sendall(b"x" * 2**20)
                    sent += 1
        assert sent < 1000
        assert client.get("/health").status_code == 200


@pytest.mark.parametrize(
    "request_head",
    [
        HEAD + b"".join(b"X-%d: y\r\n" % i for i in range(100_000)) + b"\r\n",
        HEAD + b"X: " + b"y" * 2**20 + b"\r\n\r\n",
        b"GET /" + b"y" * 2**17 + b" HTTP/1.1\r\n\r\n",
        HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n",
        HEAD + b"Content-Length: -1\r\n\r\n",
        HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
        HEAD + b"Host: localhost\r\n\r\n",
        HEAD + b"X\x00: y\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
    ],
    ids=["headers", "header", "target", "digits", "negative", "two lengths", "two hosts", "nul", "tls"],
)
def test_data_that_is_not_a_request_gets_a_readable_refusal(client, request_head, caplog):
    answer = rest(connect(client, request_head))
    status, body = re.match(rb"HTTP/1.1 (4\d\d) .*\r\n\r\n(.*)$", answer, re.DOTALL).groups()
    assert status == b"400"
    assert "send a valid, shorter one" in json.loads(body)["error"]
    assert client.get("/health").status_code == 200
    assert not caplog.records, "a stranger fills the terminal"


def test_a_chunk_that_is_none_is_refused(client, caplog):
    head = POST + b"Transfer-Encoding: chunked\r\n\r\n"
    assert rest(connect(client, head + b"5\r\n{}   \r\nzz\r\n")).startswith(b"HTTP/1.1 400 ")
    assert not caplog.records


# ---- what HTTP allows ----------------------------------------------------------------------------------------------


def test_pipelined_requests_are_answered_in_order(client):
    paths = ["/health", "/api/info", "/missing"] * 20
    asked = [b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n" % path.encode() for path in paths]
    asked.append(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    answers = rest(connect(client, b"".join(asked)))
    assert [int(s) for s in re.findall(rb"HTTP/1.1 (\d+) ", answers)] == [200, 200, 404] * 20 + [200]


def test_requests_after_a_body_are_not_lost(client):
    body = json.dumps(ASK).encode()
    asked = POST + b"Content-Length: %d\r\n\r\n" % len(body) + body
    answers = rest(connect(client, asked * 5 + HEAD + b"Connection: close\r\n\r\n"))
    assert re.findall(rb"HTTP/1.1 (\d+) ", answers) == [b"200"] * 6


def test_a_web_socket_is_not_opened(client, caplog):
    upgrade = b"Connection: Upgrade, close\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    head = HEAD + upgrade + b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    answer = rest(connect(client, head))
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b'"live":true' in answer
    assert not caplog.records


def test_overlapping_ranges_of_a_file_are_no_lever(client):
    ranges = ",".join(f"{i}-" for i in range(1000))
    response = client.get("/large.js", headers={"range": f"bytes={ranges}"})
    assert len(response.content) <= 2**25


# ---- clients that go away ------------------------------------------------------------------------------------------


def test_who_goes_away_leaves_nothing_behind(run, model, caplog):
    body = json.dumps({"prompt": "def f(", "max_tokens": 256}).encode()
    steer = POST.replace(b"activations", b"steer") + b"Content-Length: %d\r\n\r\n" % len(body)
    with served(run, *model, limits=Limits(generations=1)) as client:
        for sent in (b"", b"GET", POST + b"Content-Length: 9\r\n\r\n{", steer + body):
            for _ in range(5):
                connect(client, sent).close()
        time.sleep(0.5)
        assert lines(client, prompt="def f(", max_tokens=1)[-1] == {"done": True}
    assert not caplog.records
