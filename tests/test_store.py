"""The encrypted store: no plaintext on disk, one writer, failing writes alone, lost keys refused, proved backups."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlcipher3 import dbapi2 as sqlite

from appliance.errors import (
    AlreadyRunning,
    BackupError,
    BadRequest,
    Conflict,
    DataDirError,
    KeyFileError,
    NotFound,
    NotInitialised,
    Unavailable,
)
from appliance.store import accounts, backup, keys, users
from appliance.store.database import Store
from appliance.store.keyfile import MasterKey, create_key_file, read_key
from appliance.store.lock import DataDirLock

CANARY = "canary-5f1b7c-in-plain-text"


@pytest.fixture
def key() -> MasterKey:
    return MasterKey.generate()


@pytest.fixture
def store(tmp_path: Path, key: MasterKey) -> Iterator[Store]:
    with closing(Store.create(tmp_path / "appliance.db", key)) as made:
        yield made


def count(store: Store, table: str = "accounts") -> int:
    return int(store.read(lambda db: db.execute(f"select count(*) from {table}").fetchone()[0]))


# ── encryption ───────────────────────────────────────────────────────────────────────────────────────────────────


def holds_canary(path: Path) -> bool:
    return CANARY.encode() in path.read_bytes()


def test_no_file_holds_plaintext(store: Store, key: MasterKey, tmp_path: Path) -> None:
    for i in range(200):
        accounts.create(store, f"{CANARY}-{i}", "community", f"{CANARY}{i}@example.org")
    wal = store.path.with_name("appliance.db-wal")
    assert wal.stat().st_size > 100_000, "the rows are in the write-ahead log"
    copy = backup.backup(store, tmp_path / "copy.backup", key).path
    looked_at = [store.path, wal, copy]
    assert [path.name for path in looked_at if holds_canary(path)] == []

    control = tmp_path / "control.db"  # the same search finds the same rows where nothing is encrypted
    with closing(sqlite.connect(str(control))) as plain:
        plain.execute("create table accounts (name text)")
        rows = store.read(lambda db: db.execute("select name from accounts").fetchall())
        plain.executemany("insert into accounts values (?)", rows)
        plain.commit()
    assert holds_canary(control)


def test_the_key_shows_itself_nowhere(key: MasterKey) -> None:
    shown = f"{key} {key!r} {[key]}"
    assert key.hexadecimal not in shown
    with pytest.raises(TypeError):
        key.__reduce__()


def test_another_key_is_refused_and_the_file_stays(store: Store, key: MasterKey) -> None:
    accounts.create(store, "kept", "community")
    store.close()
    before = store.path.read_bytes()
    with pytest.raises(KeyFileError, match="does not open"):
        Store.open(store.path, MasterKey.generate())
    assert store.path.read_bytes() == before
    with closing(Store.open(store.path, key)) as again:
        assert count(again) == 1


def test_there_is_no_database_unless_it_was_made(tmp_path: Path, key: MasterKey) -> None:
    with pytest.raises(NotInitialised):
        Store.open(tmp_path / "none.db", key)
    assert not (tmp_path / "none.db").exists()
    (tmp_path / "taken.db").write_bytes(b"something")
    with pytest.raises(DataDirError):
        Store.create(tmp_path / "taken.db", key)
    assert (tmp_path / "taken.db").read_bytes() == b"something"


@pytest.mark.parametrize("damage", [b"x" * 4096, b""])
def test_a_damaged_file_is_a_sentence(store: Store, key: MasterKey, damage: bytes) -> None:
    store.close()
    if damage:
        with store.path.open("r+b") as file:
            file.write(damage)
        with pytest.raises(KeyFileError, match="belongs to another one, or the file is damaged"):
            Store.open(store.path, key)
    else:
        store.path.unlink()
        with pytest.raises(NotInitialised):
            Store.open(store.path, key)


# ── one writer ───────────────────────────────────────────────────────────────────────────────────────────────────


def insert(name: str) -> Any:
    return lambda db: db.execute(
        "insert into accounts (id, name, plan, created) values (?, ?, 'community', 0)", [name, name]
    )


def test_writes_from_many_threads_share_transactions(store: Store) -> None:
    gate = threading.Event()
    store.write(lambda db: gate.wait(10))  # the writer is held up, so that a queue builds up behind it
    before = store.commits
    futures: list[Future[Any]] = []
    lock = threading.Lock()

    def write(n: int) -> None:
        for i in range(50):
            future = store.write(insert(f"{n}-{i}"))
            with lock:
                futures.append(future)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gate.set()
    for future in futures:
        future.result(30)
    assert count(store) == 400
    assert store.commits - before <= 5  # one for the gate, the rest in groups of at most 256


def test_a_failing_write_fails_alone(store: Store) -> None:
    gate = threading.Event()
    store.write(lambda db: gate.wait(10))
    good, twice, broken, last = (
        store.write(insert("a")),
        store.write(insert("a")),
        store.write(lambda db: 1 / 0),
        store.write(insert("b")),
    )
    gate.set()
    good.result(10)
    last.result(10)
    assert twice.exception(10) is not None
    assert isinstance(broken.exception(10), ZeroDivisionError)
    assert count(store) == 2


def test_a_cancelled_write_is_dropped_and_the_writer_lives(store: Store) -> None:
    gate = threading.Event()
    store.write(lambda db: gate.wait(10))
    dropped = store.write(insert("dropped"))
    assert dropped.cancel()
    kept = store.write(insert("kept"))
    gate.set()
    kept.result(10)
    assert count(store) == 1


def test_what_must_last_is_synced_and_the_rest_is_not(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def level(db: Any) -> int:
        return int(db.execute("pragma synchronous").fetchone()[0])

    assert store.write(level, durable=True).result(10) == 2
    assert store.write(level).result(10) == 1
    asked: list[bool] = []
    write = store.write

    def noted(perform: Any, *, durable: bool = False) -> Any:
        asked.append(durable)
        return write(perform, durable=durable)

    monkeypatch.setattr(store, "write", noted)
    account = accounts.create(store, "a", "community")
    keys.revoke(store, keys.create(store, account.id, "n", "llm", keys.NewKey(b"h" * 32, "", ""), "test").id)
    assert asked == [True] * 3, "account, key and revocation are on the disk before anybody is told"


def test_a_full_disk_fails_the_writes_and_not_the_store(store: Store) -> None:
    accounts.create(store, "before", "community")
    pages = store.read(lambda db: db.execute("pragma page_count").fetchone()[0])
    store.write(lambda db: db.execute(f"pragma max_page_count = {pages}").fetchone()).result(10)
    with pytest.raises(Unavailable, match="full"):
        store.write(lambda db: db.execute("create table fat as select randomblob(100000) as x")).result(10)
    assert count(store) == 1
    store.write(lambda db: db.execute("pragma max_page_count = 1000000").fetchone()).result(10)
    accounts.create(store, "after", "community")
    assert count(store) == 2


def test_a_reader_cannot_write(store: Store) -> None:
    with pytest.raises(Unavailable, match="readonly"):
        store.read(insert("no"))
    assert count(store) == 0


def test_closing_performs_what_was_queued(tmp_path: Path, key: MasterKey) -> None:
    store = Store.create(tmp_path / "appliance.db", key)
    futures = [store.write(insert(str(i))) for i in range(100)]
    store.close()
    store.close()
    assert all(future.done() and future.exception() is None for future in futures)
    with pytest.raises(Unavailable):
        store.write(insert("late"))
    assert not store.path.with_name("appliance.db-wal").exists()
    with closing(Store.open(store.path, key)) as again:
        assert count(again) == 100


KILLED = """
import os, sys
from pathlib import Path
from appliance.store import accounts
from appliance.store.database import Store
from appliance.store.keyfile import read_key
store = Store.open(Path(sys.argv[1]) / "appliance.db", read_key(Path(sys.argv[1]) / "key"))
accounts.create(store, "acknowledged", "community")
print("acknowledged", flush=True)
os.kill(os.getpid(), 9)
"""


def test_what_was_acknowledged_survives_a_kill(tmp_path: Path) -> None:
    key = create_key_file(tmp_path / "key")
    Store.create(tmp_path / "appliance.db", key).close()
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (-9, "acknowledged\n"), done.stderr
    assert (tmp_path / "appliance.db-wal").stat().st_size > 0, "it was killed with work in its log"
    with closing(Store.open(tmp_path / "appliance.db", key)) as store:
        assert [a.name for a in accounts.listing(store)] == ["acknowledged"]
        assert store.read(lambda db: db.execute("pragma integrity_check").fetchone()) == ("ok",)


def test_the_pragmas_are_the_designs(store: Store) -> None:
    def pragma(name: str) -> Any:
        return store.read(lambda db: db.execute(f"pragma {name}").fetchone()[0])

    assert pragma("journal_mode") == "wal"
    assert pragma("foreign_keys") == 1
    assert pragma("auto_vacuum") == 2
    orphan = "insert into users values ('u', 'nobody', 'n', 'member', '', 0, null)"
    error = store.write(lambda db: db.execute(orphan)).exception(10)
    assert error is not None and "FOREIGN KEY" in str(error.__cause__)


# ── key file, lock ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_key_file_is_private_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "secrets" / "master.key"
    made = create_key_file(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert read_key(path, {}).hexadecimal == made.hexadecimal
    with pytest.raises(KeyFileError, match="File exists"):
        create_key_file(path)
    assert read_key(path, {}).hexadecimal == made.hexadecimal


@pytest.mark.parametrize("content", ["", "short", "g" * 64, "a" * 65, "\0" * 64, "a" * 10_000])
def test_a_malformed_key_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "master.key"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(KeyFileError) as refusal:
        read_key(path, {})
    assert len(content) < 10 or content not in refusal.value.message


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_key_file_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "master.key"
    create_key_file(path)
    path.chmod(mode)
    with pytest.raises(KeyFileError, match="chmod 600"):
        read_key(path, {})


def test_the_environment_goes_before_the_file(tmp_path: Path) -> None:
    create_key_file(tmp_path / "master.key")
    assert read_key(tmp_path / "master.key", {"APPLIANCE_MASTER_KEY": "AB" * 32}).hexadecimal == "ab" * 32
    with pytest.raises(KeyFileError, match="environment"):
        read_key(tmp_path / "master.key", {"APPLIANCE_MASTER_KEY": "nonsense"})


def test_a_directory_has_one_process(tmp_path: Path) -> None:
    with DataDirLock(tmp_path):
        with pytest.raises(AlreadyRunning, match=str(os.getpid())):
            DataDirLock(tmp_path).acquire()
    lock = DataDirLock(tmp_path)
    lock.acquire()
    lock.release()
    lock.release()


# ── nouns ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_names_are_taken_once_whatever_their_case(store: Store) -> None:
    accounts.create(store, "Team", "community")
    with pytest.raises(Conflict):
        accounts.create(store, "tEAM", "enterprise")
    assert accounts.by_name(store, "team").plan == "community"


@pytest.mark.parametrize("name", ["", "  ", "x" * 101, "a\nb", "a\x1b[31m"])
def test_a_bad_name_is_refused(store: Store, name: str) -> None:
    with pytest.raises(BadRequest, match="printable"):
        accounts.create(store, name, "community")


@pytest.mark.parametrize("email", ["", "x", "@x", "a b@c", "a@b\nBcc: c@d", "a@" + "b" * 300])
def test_a_bad_address_is_refused(store: Store, email: str) -> None:
    with pytest.raises(BadRequest, match="email"):
        accounts.create(store, "a", "community", email)


def test_a_key_is_kept_as_its_hash(store: Store) -> None:
    account = accounts.create(store, "a", "community")
    made = keys.create(store, account.id, "n", "llm", keys.NewKey(b"h" * 32, "oai_abcd", "wxyz"), "test")
    assert (made.prefix, made.last_four, made.scope, made.revoked) == ("oai_abcd", "wxyz", "llm", None)
    assert [k.digest for k in keys.valid(store)] == [b"h" * 32]
    first = keys.revoke(store, made.id)
    assert keys.revoke(store, made.id).revoked == first.revoked is not None
    assert keys.valid(store) == []
    with pytest.raises(NotFound):
        keys.revoke(store, "key_nowhere")
    with pytest.raises(NotFound):
        keys.create(store, "acc_nowhere", "n", "llm", keys.NewKey(b"i" * 32, "", ""), "test")
    with pytest.raises(BadRequest):
        keys.create(store, account.id, "n", "root", keys.NewKey(b"i" * 32, "", ""), "test")


def test_a_password_is_kept_as_argon2id(store: Store) -> None:
    users.create(store, "Ada", "a long password", "administrator", None)
    assert users.verify(store, "ada", "a long password") is not None
    assert users.verify(store, "ada", "a long passwore") is None
    assert users.verify(store, "nobody", "a long password") is None
    hashed = store.read(lambda db: db.execute("select password_hash from users").fetchone()[0])
    assert hashed.startswith("$argon2id$") and "password" not in hashed
    with pytest.raises(BadRequest, match="10 to 1,000"):
        users.create(store, "Bob", "short", "member", None)


# ── backups ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_backup_is_made_while_others_write(store: Store, key: MasterKey, tmp_path: Path) -> None:
    stop = threading.Event()
    written: list[Future[Any]] = []

    def write() -> None:
        while not stop.is_set():
            written.append(store.write(insert(f"w{len(written)}")))
            written[-1].result(10)

    accounts.create(store, "before", "community")
    writer = threading.Thread(target=write)
    writer.start()
    try:
        report = backup.backup(store, tmp_path / "b", key)
    finally:
        stop.set()
        writer.join()
    assert written, "somebody wrote meanwhile"
    assert 1 <= report.tables["accounts"] <= 1 + len(written)
    assert report.path.stat().st_mode & 0o777 == 0o600
    assert backup.verify(tmp_path / "b", key).tables == report.tables
    with pytest.raises(BackupError, match="exists already"):
        backup.backup(store, tmp_path / "b", key)


def test_only_a_good_backup_is_restored(store: Store, key: MasterKey, tmp_path: Path) -> None:
    accounts.create(store, "first", "community")
    good = backup.backup(store, tmp_path / "good", key).path
    accounts.create(store, "second", "community")
    store.close()
    data = good.read_bytes()
    middle = len(data) // 2
    for name, bad in {
        "cut": data[: middle + 100],
        "flipped": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        "empty": b"",
    }.items():
        (tmp_path / name).write_bytes(bad)
        with pytest.raises(BackupError):
            backup.restore(tmp_path / name, store.path, key)
    with pytest.raises(BackupError):
        backup.restore(good, store.path, MasterKey.generate())
    with closing(Store.open(store.path, key)) as untouched:
        assert count(untouched) == 2
    backup.restore(good, store.path, key)
    with closing(Store.open(store.path, key)) as restored:
        assert [a.name for a in accounts.listing(restored)] == ["first"]
    assert list(tmp_path.glob("appliance.db.before-restore-*")), "the old one is kept beside it"


def test_a_plain_database_is_no_backup(key: MasterKey, tmp_path: Path) -> None:
    with closing(sqlite.connect(str(tmp_path / "plain"))) as plain:
        plain.execute("create table accounts (id text)")
        plain.commit()
    with pytest.raises(BackupError, match="not encrypted"):
        backup.verify(tmp_path / "plain", key)
