"""The admin socket with real sockets: answers, streams, errors, hostile lines, other users, and where it lies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop

from appliance import admin
from appliance.admin import AdminServer, RemoteError
from appliance.config import CHECKOUT
from appliance.errors import BadRequest, DataDirError, ModelError, ServerUnreachable

NOBODY = 65_534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")


class Desk:
    """A handler with one operation of each kind, which tells what became of the ones that wait."""

    def __init__(self) -> None:
        self.waiting = threading.Event()
        self.cancelled = threading.Event()

    async def handle(self, operation: str, arguments: dict[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        match operation:
            case "echo":
                yield {"result": arguments}
            case "count":
                for i in range(arguments["to"]):
                    yield {"part": i}
                yield {"result": None}
            case "refuse":
                raise ModelError("There is no such model.")
            case "fail":
                raise ValueError("secret inside")
            case "wait":
                yield {"part": "held"}
                self.waiting.set()
                try:
                    await asyncio.sleep(10)
                finally:
                    self.cancelled.set()
                yield {"result": "too late"}


@contextmanager
def serving(path: Path, handler: admin.Handler) -> Iterator[Callable[[], None]]:
    """An `AdminServer` on an event loop of its own; gives what closes it early."""
    loop = uvloop.new_event_loop()
    server = AdminServer(path, handler)
    thread = threading.Thread(target=loop.run_forever, daemon=True)  # a failed test ends all the same
    thread.start()

    def run(what: Any) -> None:
        asyncio.run_coroutine_threadsafe(what, loop).result(20)

    try:
        run(server.start())
        yield lambda: run(server.close())
    finally:
        run(server.close())
        run(asyncio.sleep(0.05))  # a connection that was only just accepted closes too
        loop.call_soon_threadsafe(loop.stop)
        thread.join(20)
        loop.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "admin.sock"


@pytest.fixture
def desk(path: Path) -> Iterator[Desk]:
    found = Desk()
    with serving(path, found.handle):
        yield found


def raw(path: Path, sent: bytes) -> bytes:
    """Everything that comes back for these bytes."""
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(20)
        s.connect(str(path))
        with contextlib.suppress(ConnectionError):
            s.sendall(sent)
        received = b""
        with contextlib.suppress(ConnectionError):
            while portion := s.recv(65_536):
                received += portion
        return received


# ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_operation_gets_its_arguments_and_gives_its_result(path: Path, desk: Desk) -> None:
    arguments = {"name": "größe \u2028 \x1b", "list": [1, None, {"deep": True}], "long": "x" * 1_000_000}
    assert admin.call(path, "echo", arguments) == arguments


def test_the_parts_of_a_stream_come_one_by_one(path: Path, desk: Desk) -> None:
    parts = list(admin.stream(path, "count", {"to": 3}))
    assert parts == [{"part": 0}, {"part": 1}, {"part": 2}, {"result": None}]


def test_several_clients_are_answered_side_by_side(path: Path, desk: Desk) -> None:
    waiting = admin.stream(path, "wait", {})
    assert next(waiting) == {"part": "held"}
    assert admin.call(path, "echo", {"a": 1}) == {"a": 1}
    waiting.close()  # type: ignore[attr-defined]


def test_a_refusal_keeps_its_sentence_and_its_exit_code(path: Path, desk: Desk) -> None:
    with pytest.raises(RemoteError) as refused:
        admin.call(path, "refuse", {})
    assert (refused.value.message, refused.value.exit_code) == ("There is no such model.", ModelError.exit_code)


def test_a_fault_is_logged_and_not_told(path: Path, desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RemoteError) as failed:
        admin.call(path, "fail", {})
    assert "secret" not in failed.value.message and failed.value.exit_code == 1
    assert "secret inside" in caplog.text
    assert admin.call(path, "echo", {}) == {}


# ── hostile and unlucky clients ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"nonsense\n",
        b"[]\n",
        b'{"operation": "echo"}\n',
        b'{"operation": 5, "arguments": {}}\n',
        b'{"operation": "echo", "arguments": []}\n',
        b"\xff\xfe\n",
        b"[" * 100_000 + b"\n",
        b"x" * (admin.LONGEST_LINE + 70_000) + b"\n",
    ],
    ids=["empty", "text", "list", "half", "number", "no object", "no UTF-8", "deep", "long"],
)
def test_a_malformed_request_is_answered_and_the_server_lives(path: Path, desk: Desk, line: bytes) -> None:
    answer = raw(path, line)
    if answer or len(line) < 10**6:  # an unread rest may cut the answer off
        assert json.loads(answer) == {"error": "The request on the admin socket is malformed.", "exit_code": 1}
    assert admin.call(path, "echo", {"a": 1}) == {"a": 1}


def test_a_request_beyond_the_cap_is_not_sent(path: Path, desk: Desk) -> None:
    with pytest.raises(BadRequest, match="too long"):
        admin.call(path, "echo", {"text": "x" * admin.LONGEST_LINE})


def test_whoever_says_nothing_is_dropped(path: Path, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "REQUEST_SECONDS", 0.2)
    started = time.monotonic()
    assert raw(path, b'{"operation": ') == b""
    assert 0.1 < time.monotonic() - started < 10


def test_work_ends_when_its_client_is_gone(path: Path, desk: Desk) -> None:
    parts = admin.stream(path, "wait", {})
    next(parts)
    assert desk.waiting.wait(20) and not desk.cancelled.wait(0.3)
    parts.close()  # type: ignore[attr-defined]
    assert desk.cancelled.wait(5)  # it would have waited for 10


def test_a_closing_server_cuts_its_clients_off(path: Path) -> None:
    desk = Desk()
    with serving(path, desk.handle) as close:
        parts = admin.stream(path, "wait", {})
        assert next(parts) == {"part": "held"}
        close()
        with pytest.raises(ServerUnreachable, match="ended before"):
            next(parts)
    assert desk.cancelled.is_set()


@pytest.mark.parametrize("said", [b"", b'{"part": 1}\n', b'{"result": "ha'])
def test_a_server_that_dies_in_mid_answer_is_no_success(path: Path, said: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()

        def die() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(1_000)
                connection.sendall(said)

        thread = threading.Thread(target=die, daemon=True)
        thread.start()
        with pytest.raises(ServerUnreachable, match="ended before"):
            admin.call(path, "echo", {})
        thread.join(20)


# ── the socket itself ────────────────────────────────────────────────────────────────────────────────────────────


def test_the_socket_is_private_and_gone_afterwards(path: Path) -> None:
    before = os.umask(0)
    try:
        with serving(path, Desk().handle) as close:
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert os.umask(0) == 0
            assert admin.reachable(path)
            close()
            assert not path.exists()
    finally:
        os.umask(before)


def test_nobody_answers_where_there_is_no_server(path: Path) -> None:
    assert not admin.reachable(path)
    with pytest.raises(ServerUnreachable, match="No server answers"):
        admin.call(path, "echo", {})


def test_what_a_killed_server_left_behind_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert path.exists() and not admin.reachable(path)
    with serving(path, Desk().handle):
        assert admin.reachable(path)


def test_a_socket_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    server = AdminServer(tmp_path / "absent" / "deep" / "admin.sock", Desk().handle)
    with pytest.raises(DataDirError, match="admin socket"):
        asyncio.run(server.start())


PROBE = """
import os, socket, sys
from appliance import admin
from pathlib import Path
s = socket.socket(socket.AF_UNIX)
os.setuid(int(sys.argv[2]))
s.connect(sys.argv[1])
try:
    s.sendall(b'{"operation": "echo", "arguments": {}}' + chr(10).encode())
    print(s.recv(1000))
except (BrokenPipeError, ConnectionResetError):  # it hung up before, or after, we could say a word
    print(b"")
"""


@as_root
@pytest.mark.parametrize(("uid", "answer"), [(0, b'{"result": {}}\n'), (NOBODY, b"")])
def test_another_user_gets_no_answer(uid: int, answer: bytes) -> None:
    """Even where the file's mode would let them in."""
    place = Path(f"/tmp/appliance-test-{os.getpid()}-{uid}")
    place.mkdir(mode=0o755)
    try:
        with serving(place / "admin.sock", Desk().handle):
            (place / "admin.sock").chmod(0o666)
            words = [sys.executable, "-c", PROBE, str(place / "admin.sock"), str(uid)]
            environ = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
            done = subprocess.run(words, env=environ, capture_output=True, text=True, timeout=60)
        assert done.stdout.strip() == repr(answer), done.stderr
    finally:
        shutil.rmtree(place)


@as_root
def test_a_client_trusts_nobody_elses_server(tmp_path: Path) -> None:
    """A stranger's socket at our path: the parent's owner is ours, the listener is not."""
    place = Path(f"/tmp/appliance-test-{os.getpid()}")
    place.mkdir(mode=0o777)
    place.chmod(0o777)
    code = (
        "import os, socket, sys; os.setuid(65534); s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen();"
        "print('ready', flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", code, str(place / "admin.sock")]
    try:
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as stranger:
            assert stranger.stdout is not None and stranger.stdout.readline() == b"ready\n"
            assert (place / "admin.sock").stat().st_uid == NOBODY
            assert not admin.reachable(place / "admin.sock")
            stranger.communicate(b"", timeout=20)
    finally:
        shutil.rmtree(place)


# ── where it lies ────────────────────────────────────────────────────────────────────────────────────────────────


def long_directory(base: Path) -> Path:
    found = base / ("d" * 60) / ("e" * 60)
    found.mkdir(parents=True)
    return found


def test_the_socket_lies_in_the_data_directory(tmp_path: Path) -> None:
    assert admin.socket_path(tmp_path) == tmp_path / "admin.sock"


def test_a_long_path_leads_to_a_short_one_that_works(tmp_path: Path) -> None:
    data_dir = long_directory(tmp_path)
    path = admin.socket_path(data_dir)
    assert len(os.fsencode(path)) <= admin.LONGEST_PATH and data_dir not in path.parents
    with serving(path, Desk().handle):
        assert stat.S_IMODE(path.parent.stat().st_mode) & 0o022 == 0
        assert admin.call(admin.socket_path(data_dir), "echo", {"a": 1}) == {"a": 1}


def test_every_way_to_a_directory_leads_to_one_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data_dir = long_directory(tmp_path)
    (tmp_path / "link").symlink_to(data_dir)
    found = admin.socket_path(data_dir)
    assert admin.socket_path(tmp_path / "link") == found
    monkeypatch.chdir(data_dir)
    assert admin.socket_path(Path(".")) == found
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert admin.socket_path(data_dir) == found
    assert admin.socket_path(long_directory(tmp_path / "other")) != found


@as_root
def test_root_and_the_owner_mean_the_same_socket(tmp_path: Path) -> None:
    data_dir = long_directory(tmp_path)
    mine = admin.socket_path(data_dir)
    os.chown(data_dir, NOBODY, NOBODY)
    assert admin.socket_path(data_dir) == Path(f"/tmp/appliance-{NOBODY}") / mine.name


@as_root
def test_a_directory_that_a_stranger_made_first_is_not_used(tmp_path: Path) -> None:
    uid = 54_321
    data_dir = long_directory(tmp_path)
    os.chown(data_dir, uid, uid)
    trap = Path(f"/tmp/appliance-{uid}")
    trap.mkdir(mode=0o700)
    try:
        with pytest.raises(DataDirError, match="somebody else"):
            admin.socket_path(data_dir)
        os.chown(trap, uid, uid)
        assert admin.socket_path(data_dir).parent == trap
        trap.chmod(0o777)
        with pytest.raises(DataDirError, match="somebody else"):
            admin.socket_path(data_dir)
    finally:
        trap.rmdir()
