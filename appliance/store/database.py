"""The encrypted database: one writer thread with group commit, one reader connection per reading thread.

The writer owns all writes and all checkpoints, so that SQLite's only multi-writer hazards cannot arise. A write is a
function that gets the database inside the transaction of its group; a failing one is rolled back alone. Foreign
exceptions become ours at one border, `_translated`. The live file is never opened with `open()`: that would drop
SQLite's locks.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import sqlcipher3
from sqlcipher3 import dbapi2 as sqlite

from appliance.errors import ApplianceError, DataDirError, InternalError, KeyFileError, NotInitialised, Unavailable
from appliance.store.keyfile import MasterKey

sys.modules.setdefault("pysqlite3", sqlcipher3)  # before sqlite_utils is imported: it then speaks SQLCipher throughout

from sqlite_utils import Database  # noqa: E402

from appliance.store.migrations import migrations  # noqa: E402

T = TypeVar("T")
GROUP = 256  # most writes in one transaction
BUSY_MS = 5_000


@dataclass(slots=True)
class _Write:
    perform: Callable[[Database], Any]
    durable: bool
    done: Future[Any]


class Store:
    """An open database. Thread-safe; `close` drains what was written and is safe to call twice."""

    def __init__(self, path: Path, key: MasterKey) -> None:
        self.path = path
        self._key = key
        self._queue: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self._local = threading.local()
        self._readers: weakref.WeakSet[Database] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._closed = False
        self._durable = False  # as `_connect` leaves it
        self.commits = 0
        self.commit_seconds = 0.0  # in whole transactions
        try:
            self._writer = self._connect()
            with _translated(path):
                self._writer.execute("pragma wal_autocheckpoint = 1000")
                migrations.apply(self._writer)
        except Unavailable as error:
            raise DataDirError(f"The data directory {path.parent} cannot be used: {error.message}") from error
        self._thread = threading.Thread(target=self._write_loop, name="store", daemon=True)
        self._thread.start()

    @classmethod
    def create(cls, path: Path, key: MasterKey) -> Store:
        """A new database. Raises DataDirError when one is there already."""
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except OSError as error:
            raise DataDirError(f"The database {path} cannot be made: {error.strerror}.") from error
        return cls(path, key)

    @classmethod
    def open(cls, path: Path, key: MasterKey) -> Store:
        """The database at `path`. Raises NotInitialised, KeyFileError or DataDirError."""
        if not path.exists():
            raise NotInitialised(f"There is no database in {path.parent}: run `appliance init` first.")
        return cls(path, key)

    def write(self, perform: Callable[[Database], T], *, durable: bool = False) -> Future[T]:
        """Queues a write. The future is done once its group is committed; on the disk, if `durable`."""
        done: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise Unavailable("The store is closed.", retry_after=5)
            self._queue.put(_Write(perform, durable, done))
        return done

    def read(self, query: Callable[[Database], T]) -> T:
        """Runs `query` on this thread's own read-only connection."""
        db: Database | None = getattr(self._local, "db", None)
        if db is None:
            if self._closed:
                raise Unavailable("The store is closed.", retry_after=5)
            db = self._connect()
            db.execute("pragma query_only = on")
            self._local.db = db
            self._readers.add(db)
        with _translated(self.path):
            return query(db)

    @property
    def wal_bytes(self) -> int:
        """Size of the write-ahead log."""
        try:
            return os.stat(f"{self.path}-wal").st_size
        except FileNotFoundError:
            return 0

    def close(self) -> None:
        """Performs what is queued, folds the WAL into the file, closes every connection."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._queue.put(None)
        self._thread.join()
        for reader in list(self._readers):
            reader.conn.close()
        with _translated(self.path):
            self._writer.execute("pragma wal_checkpoint(truncate)")
        self._writer.close()

    def _connect(self) -> Database:
        with _translated(self.path):
            connection = sqlite.connect(
                str(self.path), timeout=BUSY_MS / 1e3, check_same_thread=False, isolation_level=None
            )
            connection.execute("pragma cipher_log_level = none")  # its own log would write to our stderr
            connection.execute(f"pragma key = {self._key.pragma}")
            if not connection.execute("pragma page_count").fetchone()[0]:  # shows, too, whether the key is right
                connection.execute("pragma auto_vacuum = incremental")  # before the first table; later it only writes
            connection.execute("pragma journal_mode = wal")
            connection.execute("pragma synchronous = normal")
            connection.execute("pragma foreign_keys = on")
            connection.execute("pragma temp_store = memory")
            return Database(connection)

    # ── the writer thread ────────────────────────────────────────────────────────────────────────────────────────

    def _write_loop(self) -> None:
        while (first := self._queue.get()) is not None:
            group, more = [first], True
            while len(group) < GROUP and more:
                try:
                    following = self._queue.get_nowait()
                except queue.Empty:
                    break
                if following is None:
                    self._queue.put(None)
                    more = False
                else:
                    group.append(following)
            self._perform(group)

    def _perform(self, group: list[_Write]) -> None:
        """One transaction; whoever succeeded learns so after the commit."""
        db, started = self._writer, time.monotonic()
        group = [write for write in group if write.done.set_running_or_notify_cancel()]
        results: list[tuple[_Write, Any]] = []
        try:
            with _translated(self.path):
                self._synchronise(any(w.durable for w in group))
                db.execute("begin immediate")
                if len(group) == 1:
                    results.append((group[0], group[0].perform(db)))
                else:
                    for write in group:
                        self._perform_one(write, results)
                db.execute("commit")
                self.commits += 1
                self.commit_seconds += time.monotonic() - started
        except BaseException as error:
            self._roll_back()
            for write in group:
                if not write.done.done():
                    write.done.set_exception(error)
            return
        for write, result in results:
            write.done.set_result(result)

    def _synchronise(self, durable: bool) -> None:
        """Whether the next commit waits for the disk."""
        if durable != self._durable:
            self._writer.execute(f"pragma synchronous = {'full' if durable else 'normal'}")
            self._durable = durable

    def _perform_one(self, write: _Write, results: list[tuple[_Write, Any]]) -> None:
        db = self._writer
        db.execute("savepoint one")
        try:
            with _translated(self.path):
                results.append((write, write.perform(db)))
        except Exception as error:
            if isinstance(error, Unavailable):
                raise  # the disk's fault: the whole group fails and is rolled back
            db.execute("rollback to one")
            write.done.set_exception(error)
        db.execute("release one")

    def _roll_back(self) -> None:
        if self._writer.conn.in_transaction:
            try:
                self._writer.execute("rollback")
            except sqlite.Error:
                pass  # SQLite has rolled back by itself


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """The one border at which SQLite's exceptions become ours."""
    try:
        yield
    except ApplianceError:
        raise
    except sqlite.Error as error:
        raise _translate(error, path) from error


def _translate(error: sqlite.Error, path: Path) -> ApplianceError:
    text = str(error)
    if "file is not a database" in text or "file is encrypted" in text:
        return KeyFileError(
            f"The master key does not open the database {path}: it belongs to another one, or the file is damaged."
        )
    if "malformed" in text:
        return DataDirError(f"The database {path} is damaged: restore a backup.")
    if "unable to open" in text:
        return DataDirError(f"The database {path} cannot be opened: check the directory and its permissions.")
    if "disk is full" in text or "disk I/O" in text or "readonly" in text:
        return Unavailable(f"The box cannot write its database now ({text}).", retry_after=60)
    if "locked" in text or "busy" in text:
        return Unavailable("The database is busy.", retry_after=1)
    return InternalError("The database refused an operation.")
