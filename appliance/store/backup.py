"""Backups: made from the live database, encrypted under the same key, and proved good before they are called so."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlcipher3 import dbapi2 as sqlite

from appliance.errors import ApplianceError, BackupError
from appliance.store.database import Store
from appliance.store.keyfile import MasterKey


@dataclass(frozen=True, slots=True)
class BackupReport:
    """A backup that was opened, decrypted, checked and counted."""

    path: Path
    bytes: int
    tables: dict[str, int]


def backup(store: Store, target: Path, key: MasterKey) -> BackupReport:
    """Copies the live database to the new file `target` (0600), while it is in use. Raises BackupError."""
    if target.exists():
        raise BackupError(f"{target} exists already; a backup overwrites nothing.")
    partial = target.with_name(target.name + ".partial")
    partial.unlink(missing_ok=True)
    try:
        os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        partial.unlink()  # VACUUM INTO makes the file itself; the attempt has shown that it can
        store.read(lambda db: _vacuum_into(db, partial))
        partial.chmod(0o600)
        _sync(partial)
        report = verify(partial, key)
        os.rename(partial, target)
        _sync(target.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise BackupError(f"The backup {target} cannot be written: {error.strerror}.") from error
    except ApplianceError as error:
        partial.unlink(missing_ok=True)
        raise BackupError(f"The backup failed: {error.message}") from error
    return BackupReport(target, report.bytes, report.tables)


def verify(path: Path, key: MasterKey) -> BackupReport:
    """Opens, decrypts, integrity-checks and counts. Raises BackupError unless all of it is good."""
    if not path.is_file():
        raise BackupError(f"There is no backup {path}.")
    if _opens(path, MasterKey.generate()):
        raise BackupError(f"The backup {path} is not encrypted.")
    try:
        connection = _connect(path, key)
        try:
            problems = [row[0] for row in connection.execute("pragma cipher_integrity_check")]
            problems += [row[0] for row in connection.execute("pragma integrity_check") if row[0] != "ok"]
            if problems:
                raise BackupError(f"The backup {path} is damaged: {problems[0]}.")
            names = "select name from sqlite_master where type = 'table' and name not like 'sqlite_%' order by name"
            tables = [row[0] for row in connection.execute(names).fetchall()]
            if "accounts" not in tables:
                raise BackupError(f"{path} is not a backup of an appliance.")
            counts = {t: int(connection.execute(f'select count(*) from "{t}"').fetchone()[0]) for t in tables}
        finally:
            connection.close()
    except sqlite.Error as error:
        raise BackupError(f"The backup {path} does not open with this master key, or it is damaged.") from error
    return BackupReport(path, path.stat().st_size, counts)


def restore(source: Path, database: Path, key: MasterKey) -> BackupReport:
    """Puts a proved backup in place of `database`, which must not be open; keeps the old one. Raises BackupError."""
    report = verify(source, key)
    partial = database.with_name(database.name + ".restoring")
    aside = database.with_name(f"{database.name}.before-restore-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}")
    try:
        partial.unlink(missing_ok=True)
        with source.open("rb") as original, os.fdopen(os.open(partial, os.O_CREAT | os.O_WRONLY, 0o600), "wb") as copy:
            while portion := original.read(1 << 20):
                copy.write(portion)
            copy.flush()
            os.fsync(copy.fileno())
        verify(partial, key)
        for suffix in ("", "-wal", "-shm"):
            if (old := database.with_name(database.name + suffix)).exists():
                os.rename(old, aside.with_name(aside.name + suffix))
        os.rename(partial, database)
        _sync(database.parent)
    except OSError as error:
        raise BackupError(f"The backup cannot be restored to {database}: {error.strerror}.") from error
    return report


def _vacuum_into(db: Any, target: Path) -> None:
    db.execute("pragma query_only = off")  # VACUUM INTO writes the new file only, but counts as a write
    try:
        db.execute("vacuum into ?", [str(target)])
    finally:
        db.execute("pragma query_only = on")


def _connect(path: Path, key: MasterKey | None) -> Any:
    connection = sqlite.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)
    connection.execute("pragma cipher_log_level = none")
    if key is not None:
        connection.execute(f"pragma key = {key.pragma}")
    return connection


def _opens(path: Path, key: MasterKey) -> bool:
    """Whether the file gives up its contents to `key`, or without one."""
    for given in (key, None):
        connection = _connect(path, given)
        try:
            connection.execute("select count(*) from sqlite_master")
            return True
        except sqlite.Error:
            continue
        finally:
            connection.close()
    return False


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
