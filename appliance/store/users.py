"""Users: people who sign in. Passwords are kept as argon2id hashes."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from functools import cache
from typing import Any

from argon2 import PasswordHasher
from argon2.exceptions import VerificationError

from appliance.errors import BadRequest, Conflict, NotFound
from appliance.store import audit
from appliance.store.database import Store
from appliance.store.ids import COMMAND_LINE, checked_name, new_id, now

ROLES = ("administrator", "member")
SHORTEST_PASSWORD = 10
_hasher = PasswordHasher()  # argon2id with the library's current recommendations


@dataclass(frozen=True, slots=True)
class User:
    """One person; administrators need no account."""

    id: str
    account_id: str | None
    name: str
    role: str
    created: int
    disabled: int | None


def create(
    store: Store, name: str, password: str, role: str, account_id: str | None, *, by: str = COMMAND_LINE
) -> User:
    """A new user, durable when it returns. Raises BadRequest, or Conflict for a name that is taken."""
    user = User(new_id("usr"), account_id, checked_name(name, "a user"), role, now(), None)
    if role not in ROLES:
        raise BadRequest(f"There is no role {role[:50]!r}; the roles are {', '.join(ROLES)}.")
    hashed = _hashed(password)

    def insert(db: Any) -> None:
        if db.execute("select 1 from users where name = ?", [user.name]).fetchone():
            raise Conflict(f"There is a user {user.name!r} already.")
        db.execute(
            "insert into users (id, account_id, name, role, password_hash, created) values (?, ?, ?, ?, ?, ?)",
            [user.id, account_id, user.name, role, hashed, user.created],
        )
        audit.record(db, by, "user.create", user=user.id, name=user.name, role=role, account=account_id)

    store.write(insert, durable=True).result()
    return user


def set_password(store: Store, name: str, password: str, *, by: str = COMMAND_LINE) -> User:
    """Another password, durable when it returns. Raises NotFound or BadRequest."""
    user, hashed = by_name(store, name), _hashed(password)

    def change(db: Any) -> None:
        db.execute("update users set password_hash = ? where id = ?", [hashed, user.id])
        audit.record(db, by, "user.passwd", user=user.id)

    store.write(change, durable=True).result()
    return user


def disable(store: Store, name: str, *, by: str = COMMAND_LINE) -> User:
    """The user cannot sign in any more. Raises NotFound."""
    user = by_name(store, name)

    def change(db: Any) -> None:
        done = db.execute("update users set disabled = ? where id = ? and disabled is null", [now(), user.id])
        if done.rowcount:
            audit.record(db, by, "user.disable", user=user.id)

    store.write(change, durable=True).result()
    return by_name(store, name)


def by_name(store: Store, name: str) -> User:
    """The user of this name or id. Raises NotFound."""
    query = "select id, account_id, name, role, created, disabled from users where name = ? or id = ?"
    row = store.read(lambda db: db.execute(query, [name, name]).fetchone())
    if row is None:
        raise NotFound(f"There is no user {name[:100]!r}.")
    return User(*row)


def listing(store: Store) -> list[User]:
    """All users, oldest first."""
    query = "select id, account_id, name, role, created, disabled from users order by created, rowid"
    return [User(*row) for row in store.read(lambda db: db.execute(query).fetchall())]


def verify(store: Store, name: str, password: str) -> User | None:
    """The user of this name and password; None otherwise, in about the same time."""
    query = "select id, account_id, name, role, created, disabled, password_hash from users where name = ?"
    row = store.read(lambda db: db.execute(query, [name]).fetchone())
    try:
        _hasher.verify(row[6] if row else _nobodys_hash(), password)
    except VerificationError:
        return None
    return User(*row[:6]) if row and row[5] is None else None


def _hashed(password: str) -> str:
    if not SHORTEST_PASSWORD <= len(password) <= 1_000:
        raise BadRequest(f"A password needs {SHORTEST_PASSWORD} to 1,000 characters.")
    return _hasher.hash(password)


@cache
def _nobodys_hash() -> str:
    """Checked for names that do not exist, so that they take the usual time."""
    return _hasher.hash(secrets.token_hex())
