"""API keys: rows with the SHA-256 of a key, never the key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from appliance.errors import BadRequest, NotFound
from appliance.messages import SCOPES, Caller, Scope
from appliance.store import audit
from appliance.store.database import Store
from appliance.store.ids import COMMAND_LINE, checked_name, new_id, now


@dataclass(frozen=True, slots=True)
class Key:
    """One key as it may be shown; times in epoch seconds."""

    id: str
    account_id: str
    account: str
    name: str
    scope: Scope
    prefix: str
    last_four: str
    created: int
    created_by: str
    expires: int | None
    last_used: int | None
    revoked: int | None


@dataclass(frozen=True, slots=True)
class NewKey:
    """What identifies a key that was just made; the key itself stays with the caller."""

    digest: bytes
    prefix: str
    last_four: str


_COLUMNS = """k.id, k.account_id, a.name, k.name, k.scope, k.prefix, k.last_four, k.created, k.created_by, k.expires,
    k.last_used, k.revoked from keys k join accounts a on a.id = k.account_id"""


def create(store: Store, account_id: str, name: str, scope: str, new: NewKey, created_by: str) -> Key:
    """Records a new key, durable when it returns. Raises BadRequest or NotFound."""
    if scope not in SCOPES:
        raise BadRequest(f"There is no scope {scope[:50]!r}; the scopes are {', '.join(SCOPES)}.")
    key_id, name, created = new_id("key"), checked_name(name, "a key"), now()

    def insert(db: Any) -> None:
        if not db.execute("select 1 from accounts where id = ?", [account_id]).fetchone():
            raise NotFound("There is no such account.")
        db.execute(
            """insert into keys (id, account_id, name, scope, hash, prefix, last_four, created, created_by)
            values (?, ?, ?, ?, ?, ?, ?, ?, ?)""",
            [key_id, account_id, name, scope, new.digest, new.prefix, new.last_four, created, created_by],
        )
        about = {"key": key_id, "account": account_id, "name": name, "scope": scope}
        audit.record(db, created_by, "key.create", **about)

    store.write(insert, durable=True).result()
    return by_id(store, key_id)


def by_id(store: Store, key_id: str) -> Key:
    """Raises NotFound."""
    row = store.read(lambda db: db.execute(f"select {_COLUMNS} where k.id = ?", [key_id]).fetchone())
    if row is None:
        raise NotFound(f"There is no key {key_id[:100]!r}.")
    return Key(*row)


def listing(store: Store) -> list[Key]:
    """All keys, oldest first, revoked ones too."""
    return [
        Key(*r) for r in store.read(lambda db: db.execute(f"select {_COLUMNS} order by k.created, k.rowid").fetchall())
    ]


def revoke(store: Store, key_id: str, *, by: str = COMMAND_LINE) -> Key:
    """Ends a key for good, durable when it returns; revoking it again changes nothing. Raises NotFound."""
    by_id(store, key_id)

    def end(db: Any) -> None:
        done = db.execute("update keys set revoked = ? where id = ? and revoked is null", [now(), key_id])
        if done.rowcount:
            audit.record(db, by, "key.revoke", key=key_id)

    store.write(end, durable=True).result()
    return by_id(store, key_id)


def valid(store: Store) -> list[tuple[bytes, Caller, int | None]]:
    """Hash, caller and end of every key that is neither revoked nor of a disabled account."""
    query = """select k.hash, k.account_id, a.name, a.plan, k.id, k.scope, k.expires
        from keys k join accounts a on a.id = k.account_id where k.revoked is null and a.disabled is null"""
    rows = store.read(lambda db: db.execute(query).fetchall())
    return [(bytes(row[0]), Caller(*row[1:6]), row[6]) for row in rows]
