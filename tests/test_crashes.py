"""What is left after `kill -9` under load, and what goes on while the database cannot be written. Real processes."""

from __future__ import annotations

import http.client
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from appliance import admin
from appliance.errors import ApplianceError
from appliance.store import usage
from appliance.store.database import Store
from appliance.store.keyfile import read_key
from tests.box import Box, wait_until

ROOMY = {f"APPLIANCE_PLANS__ENTERPRISE__{name}": "1000000" for name in ("PER_MINUTE", "PER_HOUR")}
CALLERS = 4


def operate(box: Box, operation: str, **arguments: Any) -> Any:
    return admin.call(admin.socket_path(box.data_dir), operation, arguments)


def account(box: Box, name: str) -> str:
    """A new account's key."""
    operate(box, "account.create", name=name, plan="enterprise")
    key: str = operate(box, "key.create", account=name, name="k", scope="full")["key"]
    return key


def month(data_dir: Path, name: str) -> int:
    """Calls of this month, as the file says while no server runs; and the file is sound."""
    with closing(Store.open(data_dir / "appliance.db", read_key(data_dir / "secrets" / "master.key"))) as store:
        assert store.read(lambda db: db.execute("pragma integrity_check").fetchone()[0]) == "ok"
        [account_id] = store.read(lambda db: db.execute("select id from accounts where name = ?", [name]).fetchone())
        found = [n for payer, window, _, n in usage.windows(store) if (payer, window) == (account_id, "month")]
        return found[0] if found else 0


# ── kill -9 ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Load:
    """Callers, and an administrator who makes and revokes keys, until the process is gone; what was begun and what was
    acknowledged."""

    def __init__(self) -> None:
        self.begun = self.acknowledged = self.cut = 0
        self.made: set[str] = set()
        self.revoked: set[str] = set()
        self.plans = ["enterprise"]  # set or tried since the last acknowledged one
        self._lock = threading.Lock()

    def call(self, box: Box, key: str) -> None:
        while True:
            try:
                with self._lock:
                    self.begun += 1
                assert box.chat("Hi", max_tokens=4, key=key).status == 200
                with self._lock:
                    self.acknowledged += 1
            except ConnectionRefusedError:
                with self._lock:
                    self.begun -= 1  # nobody heard it
                return
            except (OSError, http.client.HTTPException):
                with self._lock:
                    self.cut += 1
                return

    def administer(self, box: Box) -> None:
        try:
            while True:
                made = operate(box, "key.create", account="keys", name="k", scope="llm")["id"]
                self.made.add(made)
                operate(box, "key.revoke", key_id=made)
                self.revoked.add(made)
                self.plans.append(random.choice(("community", "professional", "enterprise")))
                operate(box, "account.set-plan", name="keys", plan=self.plans[-1])
                self.plans = self.plans[-1:]
        except (OSError, ApplianceError, ValueError):
            return


def kill_again_and_again(data_dir: Path, kills: int) -> None:
    draw, load, interrupted = random.Random(5), Load(), 0
    with Box.start(data_dir, **ROOMY) as box:
        key = account(box, "month")
        account(box, "keys")
    for _ in range(kills):
        with Box.serve(data_dir, **ROOMY) as box, ThreadPoolExecutor(CALLERS + 1) as pool:
            box.wait_ready()
            cut, enough = load.cut, load.acknowledged + draw.randint(3, 25)
            for _ in range(CALLERS):
                pool.submit(load.call, box, key)
            pool.submit(load.administer, box)
            wait_until(lambda enough=enough: load.acknowledged >= enough)  # type: ignore[misc]
            time.sleep(draw.random() * 0.02)
            box.process.send_signal(signal.SIGKILL)
        interrupted += load.cut > cut
        assert load.acknowledged <= month(data_dir, "month") <= load.begun
    assert interrupted >= 0.6 * kills, "killed with work in flight"
    with Box.serve(data_dir, **ROOMY) as box:
        box.wait_ready()
        assert operate(box, "status")["calls_running"] == 0
        keys = {k["id"]: k for k in operate(box, "key.list")}
        assert load.made <= set(keys) and all(keys[k]["revoked"] for k in load.revoked) and len(load.revoked) >= kills
        assert next(a["plan"] for a in operate(box, "account.list") if a["name"] == "keys") in load.plans
        assert operate(box, "audit.verify")["broken"] is None
        assert box.chat("Hi", max_tokens=1, key=key).status == 200


def test_after_kill_9_what_was_acknowledged_is_there_and_no_lease_survives(tmp_path: Path) -> None:
    """A few kills here; the soak does fifty."""
    kill_again_and_again(tmp_path / "box", 5)


@pytest.mark.soak
def test_fifty_kills(tmp_path: Path) -> None:
    kill_again_and_again(tmp_path / "box", 50)


# ── a database that cannot be written ────────────────────────────────────────────────────────────────────────────


@contextmanager
def full_disk(box: Box) -> Iterator[None]:
    """The process cannot write a byte into any file."""
    before = resource.prlimit(box.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(box.process.pid, resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.prlimit(box.process.pid, resource.RLIMIT_FSIZE, before)


LOCKER = """
import sys
from pathlib import Path
from appliance.store.database import Store
from appliance.store.keyfile import read_key
store = Store.open(Path(sys.argv[1]), read_key(Path(sys.argv[2])))
store.write(lambda db: (db.execute("update accounts set email = email"), print("locked", flush=True), sys.stdin.read()))
store.close()
"""


@contextmanager
def locked(box: Box) -> Iterator[None]:
    """Another process is in the middle of a write."""
    words = [sys.executable, "-c", LOCKER, str(box.data_dir / "appliance.db"), str(box.data_dir / "secrets/master.key")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin and other.stdout and other.stdout.readline() == "locked\n"
        try:
            yield
        finally:
            other.stdin.close()
            other.wait(20)


def goes_on_and_is_written_later(data_dir: Path, trouble: Any, seconds: float, *, refused: bool) -> None:
    """Chats and GETs are answered, what saves something is refused clearly (or waits, where the trouble is short), and
    afterwards every call is counted once, without a restart."""
    calls = 0
    with Box.start(data_dir, **ROOMY) as box:
        key = account(box, "team")

        def chat() -> None:
            nonlocal calls
            answer = box.chat("Hi", max_tokens=1, key=key)
            calls += 1
            assert answer.status == 200, answer.body

        def used() -> int:
            nonlocal calls
            calls += 1
            found: int = box.get("/api/usage", key=key).json["windows"]["month"]["used"]
            return found

        chat()
        with trouble(box):
            until = time.monotonic() + seconds
            chat()
            assert box.get("/readyz").status == 200
            assert used() == calls, "counted in memory"
            if refused:
                with pytest.raises(ApplianceError, match=r"database (is busy|now)|cannot write"):
                    operate(box, "key.create", account="team", name="late", scope="full")
            while time.monotonic() < until:
                chat()
                time.sleep(0.2)
        operate(box, "key.create", account="team", name="later", scope="full")  # no restart was needed
        chat()
        wait_until(lambda: b"appliance_charges_owed 0.0" in box.get("/metrics", key=None).body)
        assert used() == calls
    assert month(data_dir, "team") == calls, "every call once"


def test_a_full_disk(tmp_path: Path) -> None:
    goes_on_and_is_written_later(tmp_path / "box", full_disk, 3, refused=True)


def test_a_lock_of_three_seconds(tmp_path: Path) -> None:
    goes_on_and_is_written_later(tmp_path / "box", locked, 3, refused=False)


def test_a_lock_that_outlasts_every_patience(tmp_path: Path) -> None:
    goes_on_and_is_written_later(tmp_path / "box", locked, 12, refused=True)


@pytest.mark.soak
def test_a_lock_of_a_minute(tmp_path: Path) -> None:
    goes_on_and_is_written_later(tmp_path / "box", locked, 60, refused=True)
