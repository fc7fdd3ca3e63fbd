"""The server process over real sockets: refusals in the seed's shape, deadlines, hostile HTTP, limits, signals, TLS."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization

from appliance import server, tls
from appliance.config import ServerSettings
from appliance.errors import AddressInUse, ConfigError
from tests.box import Answer

QUICK = {
    "header_timeout_seconds": 1.0,
    "body_timeout_seconds": 1.0,
    "write_timeout_seconds": 1.0,
    "keep_alive_seconds": 1,
}


@dataclass
class Edge:
    """A process of `tests.edge_app`."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path

    def connect(self, timeout: float = 20) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=timeout)

    def send(self, data: bytes, *, finish: float = 20) -> bytes:
        """Everything that comes back on a connection of its own until the server closes it."""
        with self.connect(finish) as s:
            s.sendall(data)
            return until_closed(s)

    def get(self, path: str) -> Answer:
        return answers(self.send(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()))[0]

    def happened(self) -> list[str]:
        seen: list[str] = self.get("/happened").json
        return seen

    def log_lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]


@contextmanager
def edge(directory: Path, **settings: Any) -> Iterator[Edge]:
    """A running server with these `[server]` settings."""
    log = directory / "edge.log"
    with server.bind("127.0.0.1", 0) as bound, log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.edge_app", str(bound.fileno()), json.dumps(settings)],
            pass_fds=[bound.fileno()], stdout=out, stderr=out,
        )  # fmt: skip
        running = Edge(bound.getsockname()[1], process, log)
    try:
        yield running
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    """A server with deadlines of one second, shared by tests that leave it as it was."""
    with edge(tmp_path_factory.mktemp("edge"), **QUICK) as running:
        running.get("/hello")
        yield running


def until_closed(s: socket.socket) -> bytes:
    received = b""
    while data := s.recv(65_536):
        received += data
    return received


def until(s: socket.socket, end: bytes) -> bytes:
    received = b""
    while not received.endswith(end):
        data = s.recv(65_536)
        assert data, f"the server closed after {received!r}"
        received += data
    return received


def answers(received: bytes) -> list[Answer]:
    """The answers in a byte stream, read by the rules of HTTP/1.1."""
    found = []
    while received:
        head, _, received = received.partition(b"\r\n\r\n")
        status, *lines = head.decode("latin-1").split("\r\n")
        headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}
        assert len(headers) == len(lines), f"a header stands twice: {lines}"
        if status.startswith("HTTP/1.1 100"):
            continue
        if headers.get("transfer-encoding") == "chunked":
            body, received = _unchunked(received)
        else:
            length = int(headers.get("content-length", len(received)))
            body, received = received[:length], received[length:]
        found.append(Answer(int(status.split()[1]), headers, body))
    return found


def _unchunked(received: bytes) -> tuple[bytes, bytes]:
    body = b""
    while True:
        size, _, received = received.partition(b"\r\n")
        n = int(size, 16)
        body, received = body + received[:n], received[n + 2 :]
        if not n:
            return body, received


def refused(answer: Answer, status: int, code: str = "BAD_REQUEST") -> None:
    """The answer has the seed's error shape."""
    assert (answer.status, answer.json["success"], answer.json["code"]) == (status, False, code), answer
    assert len(answer.json["error"]) > 10
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"] == answer.json["request_id"]
    assert answer.headers["cache-control"] == "no-store"
    assert ("retry_after" in answer.json) == ("retry-after" in answer.headers) == (status in (429, 503))


def wait_until(condition: Any, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


GET = b"GET /hello HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST /echo HTTP/1.1\r\nHost: localhost\r\n"
CLOSE = b"Connection: close\r\n\r\n"


# malformed and hostile HTTP


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),  # TLS to a plain port
        b"hello\r\n\r\n",
        b"get / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"FETCH / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /hello HTTP/2.0\r\nHost: localhost\r\n\r\n",
        b"GET /hello HTTP/0.9\r\nHost: localhost\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /hello HTTP/1.1\nHost: localhost\n\n",
        b"GET /a b HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET hello HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET ftp://localhost/hello HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET http://me@localhost/hello HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /hello#part HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        GET + b"X-A: a\0b\r\n\r\n",
        GET + b"X-A: a\rb\r\n\r\n",
        GET + b"X-A: a\x01b\r\n\r\n",
        GET + b"X-A : b\r\n\r\n",
        GET + b"X-A: b\r\n folded\r\n\r\n",
        GET + b"\xc3\xa4: b\r\n\r\n",
        POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
        POST + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
        POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
        POST + b"Content-Length: +3\r\n\r\nabc",
        POST + b"Content-Length: -3\r\n\r\nabc",
        POST + b"Content-Length: 0x3\r\n\r\nabc",
        POST + b"Content-Length: 99999999999999999999999\r\n\r\nabc",
        POST + b"Transfer-Encoding: gzip\r\n\r\n",
        POST + b"Transfer-Encoding: identity\r\n\r\n",
        POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabcdef\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\nabc",
        POST + b"Transfer-Encoding: chunked\r\n\r\n3;" + b"x" * 200_000 + b"\r\nabc\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n" + b"X-T: y\r\n" * 20_000 + b"\r\n",
        b"POST /echo HTTP/1.0\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
    ids=lambda sent: repr(sent)[2:70],
)  # fmt: skip
def test_malformed_http_is_refused_once_and_closed(quick: Edge, sent: bytes) -> None:
    received = answers(quick.send(sent + b"\r\nGET /hello HTTP/1.1\r\nHost: localhost\r\n\r\n"))
    assert len(received) == 1, "something after the malformed request was taken for another one"
    refused(received[0], 400)
    assert received[0].headers["connection"] == "close"


@pytest.mark.parametrize(
    "head",
    [
        b"GET /" + b"a" * 66_000 + b" HTTP/1.1\r\nHost: localhost\r\n",
        GET + b"X-A: " + b"a" * 66_000 + b"\r\n",
        GET + b"X-A: b\r\n" * 9_000,
        GET + b"X-A" * 30_000 + b": b\r\n",
        GET + b"X-A: " + b"a" * 3_000_000 + b"\r\n",
    ],
    ids=["target", "header", "headers", "name", "megabytes"],
)
def test_a_head_over_the_cap_is_431(quick: Edge, head: bytes) -> None:
    (answer,) = answers(quick.send(head + b"\r\n"))
    refused(answer, 431)
    assert "65,536" in answer.json["error"]


def test_a_head_over_the_cap_is_refused_before_it_ends(quick: Edge) -> None:
    (answer,) = answers(quick.send(GET + b"X-A: " + b"a" * 80_000))
    refused(answer, 431)


def test_a_head_just_below_the_cap_is_taken_with_its_body(quick: Edge) -> None:
    head = POST + b"Content-Length: 500000\r\n" + CLOSE[:-2]
    head += b"X-A: " + b"a" * (65_536 - len(head) - 9) + b"\r\n\r\n"
    assert len(head) == 65_536
    (answer,) = answers(quick.send(head + b"b" * 500_000))
    assert (answer.status, answer.json["bytes"]) == (200, 500_000)


def test_trailers_never_become_headers(quick: Edge) -> None:
    sent = b"POST /headers HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nX-First: 1\r\n" + CLOSE
    (answer,) = answers(quick.send(sent + b"3\r\nabc\r\n0\r\nAuthorization: Bearer x\r\n\r\n"))
    names = [name for name, _ in answer.json["headers"]]
    assert answer.json["body"] == 3
    assert "x-first" in names and "authorization" not in names


def test_bytes_after_the_last_request_are_ignored(quick: Edge) -> None:
    (answer,) = answers(quick.send(GET + CLOSE + GET + CLOSE))
    assert answer.status == 200


def test_an_upgrade_is_ignored_and_the_next_request_served(quick: Edge) -> None:
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
    websocket = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n\r\n"
    with_body = POST + offer + b"Content-Length: 3\r\n\r\nabc"
    first, second, third = answers(quick.send(with_body + GET + websocket + GET + CLOSE))
    assert (first.json["bytes"], second.status, third.status) == (3, 200, 200)


@pytest.mark.parametrize("framing", [b"Content-Length: 37\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n25\r\n"])
def test_the_body_of_an_upgrade_is_no_request(quick: Edge, framing: bytes) -> None:
    smuggled = b"GET /happened HTTP/1.1\r\nHost: a.b\r\n\r\n"[:37]
    end = b"\r\n0\r\n\r\n" if b"chunked" in framing else b""
    sent = POST + b"Connection: Upgrade\r\nUpgrade: h2c\r\n" + framing + smuggled + end + GET + CLOSE
    first, second = answers(quick.send(sent))
    assert (first.json["bytes"], first.json["start"]) == (37, smuggled.decode())
    assert second.json["path"] == "/hello"


def test_the_absolute_form_of_a_target_is_the_same_request(quick: Edge) -> None:
    sent = b"GET http://localhost:80/hello?x=1 HTTP/1.1\r\nHost: other\r\n" + CLOSE
    (answer,) = answers(quick.send(sent))
    assert (answer.status, answer.json["path"]) == (200, "/hello")
    (foreign,) = answers(quick.send(b"GET http://evil.example/hello HTTP/1.1\r\nHost: localhost\r\n" + CLOSE))
    refused(foreign, 400)
    (hostless,) = answers(quick.send(b"GET http://localhost/hello HTTP/1.1\r\n" + CLOSE))
    refused(hostless, 400)


# the rest of HTTP/1 works


def test_pipelined_requests_are_answered_in_order(quick: Edge) -> None:
    sent = b"".join(b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n%02d" % i for i in range(12))
    received = answers(quick.send(sent + GET + CLOSE))
    assert [a.json.get("start") for a in received] == [f"{i:02}" for i in range(12)] + [None]


def test_a_malformed_pipelined_request_waits_for_the_answer_before_it(quick: Edge) -> None:
    first, second = answers(quick.send(b"GET /slow?seconds=0.3 HTTP/1.1\r\nHost: localhost\r\n\r\nrubbish\r\n\r\n"))
    assert (first.status, first.json["slept"]) == (200, 0.3)
    refused(second, 400)


def test_thousands_of_pipelined_requests_do_no_harm(quick: Edge) -> None:
    received = answers(
        quick.send(b"GET /slow?seconds=0.2 HTTP/1.1\r\nHost: localhost\r\n\r\n" + (GET + b"\r\n") * 20_000)
    )
    assert 1 < len(received) < 100
    assert all(a.status == 200 for a in received)


@pytest.mark.parametrize("path", ["/hello", "/stream?n=3&gap=0.01"])
def test_http_1_0_gets_no_chunks(quick: Edge, path: str) -> None:
    received = quick.send(f"GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
    (answer,) = answers(received)
    assert answer.status == 200 and "transfer-encoding" not in answer.headers
    assert answer.body.startswith(b'{"ok":true') or answer.body.endswith(b"data: 2\n\ndata: done\n\n")


def test_expect_100_continue(quick: Edge) -> None:
    with quick.connect() as s:
        s.sendall(POST + b"Expect: 100-continue\r\nContent-Length: 3\r\n" + CLOSE)
        assert s.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        s.sendall(b"abc")
        assert answers(until_closed(s))[0].json["bytes"] == 3


def test_a_refusal_instead_of_100_continue_ends_the_connection(quick: Edge) -> None:
    sent = b"POST /ignore HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 3000000\r\n\r\n"
    (answer,) = answers(quick.send(sent))
    assert (answer.status, answer.headers["connection"]) == (403, "close")


def test_head_has_no_body(quick: Edge) -> None:
    for path in (b"/hello", b"/nowhere"):
        received = quick.send(b"HEAD " + path + b" HTTP/1.1\r\nHost: localhost\r\n" + CLOSE)
        assert received.endswith(b"\r\n\r\n") and b"content-length: " in received


def test_an_answer_before_the_end_of_the_body_arrives_and_the_connection_lives(quick: Edge) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", quick.port, timeout=20)
    for _ in range(2):
        connection.request("POST", "/ignore", b"x" * 5_000_000)
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (403, b'{"read":0}')
    connection.close()


def test_a_refused_upload_reads_its_answer(quick: Edge) -> None:
    """Closing over unread bytes would reset the connection and could destroy the answer on its way."""
    sent = POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + b"x" * 20_000_000
    for _ in range(3):
        (answer,) = answers(quick.send(sent))
        refused(answer, 400)


# deadlines


def test_a_slow_head_is_408(quick: Edge) -> None:
    with quick.connect() as s:
        started = time.monotonic()
        s.sendall(b"GET /hello HTTP/1.1\r\n")
        for _ in range(4):
            time.sleep(0.2)
            s.sendall(b"X-A: b\r\n")  # every byte is in time, the whole is not
        (answer,) = answers(until_closed(s))
    refused(answer, 408)
    assert 0.9 < time.monotonic() - started < 4.5


def test_a_slow_head_after_an_answer_is_408(quick: Edge) -> None:
    with quick.connect() as s:
        s.sendall(GET + b"\r\n")
        time.sleep(0.5)
        s.sendall(b"GET /hel")
        started = time.monotonic()
        first, second = answers(until_closed(s))
    assert first.status == 200
    refused(second, 408)
    assert 0.9 < time.monotonic() - started < 4.5


def test_a_slow_body_is_408(quick: Edge) -> None:
    with quick.connect() as s:
        started = time.monotonic()
        s.sendall(POST + b"X-Request-Id: mine\r\nContent-Length: 100\r\n\r\n")
        for _ in range(4):
            time.sleep(0.2)
            s.sendall(b"x")
        (answer,) = answers(until_closed(s))
    refused(answer, 408)
    assert answer.headers["x-request-id"] == "mine"
    assert 0.9 < time.monotonic() - started < 4.5


def test_a_body_that_nobody_reads_yet_is_not_late(quick: Edge) -> None:
    with quick.connect() as s:
        s.sendall(b"POST /late HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 5\r\n" + CLOSE)
        assert s.recv(100).startswith(b"HTTP/1.1 100")  # after the body's deadline
        s.sendall(b"hello")
        assert answers(until_closed(s))[0].json == {"bytes": 5}


def test_a_silent_connection_is_closed_without_a_word(quick: Edge) -> None:
    started = time.monotonic()
    assert quick.send(b"") == b""
    assert 0.9 < time.monotonic() - started < 4


def test_an_idle_connection_is_closed_without_a_word(quick: Edge) -> None:
    started = time.monotonic()
    (answer,) = answers(quick.send(GET + b"\r\n"))
    assert answer.status == 200
    assert 0.9 < time.monotonic() - started < 4


def test_blank_lines_do_not_hold_a_connection(quick: Edge) -> None:
    with quick.connect() as s:
        started = time.monotonic()
        with pytest.raises(ConnectionError):
            while time.monotonic() - started < 5:
                s.sendall(b"\r\n")
                time.sleep(0.1)


def test_a_client_that_reads_nothing_is_dropped(tmp_path: Path) -> None:
    with edge(tmp_path, **QUICK) as own:
        with own.connect() as s:
            s.sendall(b"GET /flood HTTP/1.1\r\nHost: localhost\r\n\r\n")
            wait_until(lambda: own.happened() == ["flood: ended"])
            with pytest.raises(ConnectionError):
                until_closed(s)


def test_a_client_that_reads_slowly_is_kept(tmp_path: Path) -> None:
    with edge(tmp_path, **QUICK) as own, own.connect() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        s.sendall(b"GET /large?bytes=16000000 HTTP/1.1\r\nHost: localhost\r\n" + CLOSE)
        received = 0
        started = time.monotonic()
        while data := s.recv(200_000):
            received += len(data)
            if time.monotonic() - started < 2.5:  # longer than the write timeout
                time.sleep(0.2)
    assert received > 16_000_000


def test_an_answer_that_nobody_fetches_does_not_hold_its_connection(tmp_path: Path) -> None:
    with edge(tmp_path, **QUICK) as own, own.connect() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        s.sendall(b"GET /large?bytes=16000000 HTTP/1.1\r\nHost: localhost\r\n" + CLOSE)
        time.sleep(4)
        with pytest.raises(ConnectionError):
            until_closed(s)


def test_a_client_that_goes_is_noticed_also_behind_pipelined_requests(tmp_path: Path) -> None:
    with edge(tmp_path) as own:
        with own.connect() as s:
            s.sendall(b"GET /slow?seconds=60 HTTP/1.1\r\nHost: localhost\r\n\r\n" + GET + b"\r\n")
            time.sleep(0.3)
        wait_until(lambda: own.happened() == ["slow: client gone"])


# limits, broken apps, the log


def test_one_connection_too_many_is_503(tmp_path: Path) -> None:
    with edge(tmp_path, max_connections=4) as own:
        held = [own.connect() for _ in range(4)]
        for s in held:
            s.sendall(GET + b"\r\n")
            assert s.recv(65_536).startswith(b"HTTP/1.1 200")
        (answer,) = answers(own.send(GET + CLOSE))
        refused(answer, 503, "SERVICE_UNAVAILABLE")
        held.pop().close()
        wait_until(lambda: answers(own.send(GET + CLOSE))[0].status == 200)
        for s in held:
            s.close()


def test_the_file_limit_does_not_undercut_the_connections(tmp_path: Path) -> None:
    with edge(tmp_path, max_connections=3_000) as own:
        own.get("/hello")
        limits = Path(f"/proc/{own.process.pid}/limits").read_text()
        soft, hard = re.findall(r"Max open files\s+(\d+)\s+(\d+)", limits)[0]
        assert int(soft) >= min(3_000, int(hard))


@pytest.mark.parametrize("path", ["/crash", "/bare/raises", "/bare/silent"])
def test_a_broken_app_is_a_500_in_the_seeds_shape(quick: Edge, path: str) -> None:
    answer = quick.get(path)
    refused(answer, 500, "INTERNAL_ERROR")
    assert "secret" not in answer.json["error"]


@pytest.mark.parametrize("path", ["/breaking-download", "/bare/half"])
def test_an_answer_that_breaks_off_does_not_look_whole(quick: Edge, path: str) -> None:
    received = quick.send(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    assert received.startswith(b"HTTP/1.1 200") and not received.endswith(b"0\r\n\r\n")


def test_a_stream_that_breaks_ends_with_the_error(quick: Edge) -> None:
    answer = quick.get("/breaking-stream")
    first, last = [line for line in answer.body.decode().splitlines() if line]
    assert first == "data: 1"
    error = json.loads(last.removeprefix("data: "))
    assert (error["success"], error["code"]) == (False, "INTERNAL_ERROR") and "secret" not in error["error"]


def test_every_answer_is_logged_without_its_content(tmp_path: Path) -> None:
    with edge(tmp_path, **QUICK) as own:
        own.send(b"GET /hello?canary-q HTTP/1.1\r\nHost: localhost\r\nX-H: canary-h\r\n" + CLOSE)
        own.send(b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 8\r\n" + CLOSE + b"canary-b")
        (malformed,) = answers(own.send(b"canary-m\r\n\r\n"))
        lines = own.log_lines()
        statuses = [line["status"] for line in lines if line["event"] == "request"]
        assert statuses == [200, 200, 400]
        assert malformed.headers["x-request-id"] in [line.get("request_id") for line in lines]
        assert "canary" not in own.log.read_text()


# signals


def test_sigterm_lets_a_running_stream_finish(tmp_path: Path) -> None:
    with edge(tmp_path, drain_seconds=20) as own, own.connect() as s, own.connect() as idle:
        idle.sendall(GET + b"\r\n")
        until(idle, b"}")
        s.sendall(b"GET /stream?n=10&gap=0.1 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert s.recv(65_536).startswith(b"HTTP/1.1 200")
        own.process.terminate()
        assert idle.recv(100) == b""  # the idle connection is closed at once
        received = until_closed(s)
        assert received.endswith(b"data: done\n\n\r\n0\r\n\r\n")
        assert own.process.wait(5) == 0
        assert own.log.read_text().count("draining") == 1 and "ended" in own.log.read_text()
        with pytest.raises(ConnectionError):
            own.connect()


def test_a_request_that_was_arriving_at_sigterm_is_answered(tmp_path: Path) -> None:
    with edge(tmp_path, drain_seconds=20) as own, own.connect() as s:
        s.sendall(GET)
        time.sleep(0.3)
        own.process.terminate()
        time.sleep(0.3)
        s.sendall(b"\r\n")
        (answer,) = answers(until_closed(s))
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert own.process.wait(5) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_runs_over_the_limit_is_cut(tmp_path: Path, number: signal.Signals) -> None:
    with edge(tmp_path, drain_seconds=0.5) as own, own.connect() as stream, own.connect() as silent:
        stream.sendall(b"GET /stream?n=1000&gap=0.05 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        silent.sendall(b"GET /slow?seconds=60 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert stream.recv(65_536).startswith(b"HTTP/1.1 200")
        started = time.monotonic()
        own.process.send_signal(number)
        assert own.process.wait(10) == 0
        assert 0.4 < time.monotonic() - started < 0.5 + 2
        assert not until_closed(stream).endswith(b"0\r\n\r\n")
        (answer,) = answers(until_closed(silent))
        refused(answer, 503, "SERVICE_UNAVAILABLE")


def test_connections_that_nobody_reads_do_not_hold_up_the_end(tmp_path: Path) -> None:
    with edge(tmp_path, drain_seconds=0.5) as own, own.connect() as s:
        s.sendall(b"GET /flood HTTP/1.1\r\nHost: localhost\r\n\r\n")
        time.sleep(0.5)
        started = time.monotonic()
        own.process.terminate()
        assert own.process.wait(10) == 0
        assert time.monotonic() - started < 0.5 + 2


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    with edge(tmp_path, drain_seconds=60) as own, own.connect() as s:
        s.sendall(b"GET /stream?n=1000&gap=0.05 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert s.recv(65_536).startswith(b"HTTP/1.1 200")
        own.process.terminate()
        time.sleep(0.5)
        assert own.process.poll() is None  # it drains
        own.process.terminate()
        assert own.process.wait(1) == 128 + signal.SIGTERM


# binding and TLS


def test_a_port_in_use_is_one_sentence() -> None:
    with server.bind("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        with pytest.raises(AddressInUse, match=f"127.0.0.1:{port} .*--port"):
            server.bind("127.0.0.1", port)


@pytest.mark.parametrize(
    ("host", "error"), [("no.such.host.invalid", ConfigError), ("192.0.2.1", AddressInUse), ("a" * 300, ConfigError)]
)
def test_an_address_that_is_not_ours_is_one_sentence(host: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=host[:20]):
        server.bind(host, 0)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1", "0.0.0.0"])
def test_names_and_both_families_can_be_bound(host: str) -> None:
    try:
        probe = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        if ":" in host:
            pytest.skip("this machine has no IPv6")
    else:
        probe.close()
    with server.bind(host, 0) as bound:
        assert bound.getsockname()[1] > 0


def with_certificate(directory: Path) -> dict[str, str]:
    """Settings for a certificate of our own making."""
    made = tls.self_signed(directory / "tls")
    return {"tls_cert": str(made.certificate), "tls_key": str(made.key)}


def test_tls_serves_and_refuses_in_the_same_shape(tmp_path: Path) -> None:
    settings = with_certificate(tmp_path)
    context = ssl.create_default_context(cafile=settings["tls_cert"])
    with edge(tmp_path, **settings, **QUICK) as own:
        for sent, status in ((GET + CLOSE, 200), (b"rubbish\r\n\r\n", 400), (GET + b"X: " + b"a" * 70_000, 431)):
            with context.wrap_socket(own.connect(), server_hostname="localhost") as s:
                s.sendall(sent)
                (answer,) = answers(until_closed(s))
            assert answer.status == status
            assert answer.headers["x-request-id"]
        started = time.monotonic()
        with own.connect() as silent:  # a handshake that never comes is cut, too
            with contextlib.suppress(ConnectionError):
                assert until_closed(silent) == b""
        assert time.monotonic() - started < 4
        own.send(b"GET / HTTP/1.1\r\n\r\n")  # plain text to a TLS port
        assert "Traceback" not in own.log.read_text()


@pytest.mark.parametrize("fault", ["missing", "rubbish", "no key", "other key", "encrypted key", "open to others"])
def test_bad_tls_files_are_one_sentence(tmp_path: Path, fault: str) -> None:
    settings = with_certificate(tmp_path)
    cert, key = Path(settings["tls_cert"]), Path(settings["tls_key"])
    if fault == "missing":
        cert.unlink()
    elif fault == "rubbish":
        cert.write_text("rubbish")
    elif fault == "no key":
        settings["tls_key"] = ""
    elif fault == "open to others":
        key.chmod(0o640)
    elif fault == "other key":
        key.write_bytes(tls.self_signed(tmp_path / "other").key.read_bytes())
    else:
        plain = serialization.load_pem_private_key(key.read_bytes(), None)
        how = serialization.BestAvailableEncryption(b"x")
        key.write_bytes(plain.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how))
    with pytest.raises(ConfigError, match="tls_cert|tls_key") as caught:
        server.tls_context(ServerSettings(tls_cert=settings["tls_cert"], tls_key=settings["tls_key"]))
    assert "\n" not in caught.value.message


def test_without_tls_settings_there_is_no_context() -> None:
    assert server.tls_context(ServerSettings()) is None
