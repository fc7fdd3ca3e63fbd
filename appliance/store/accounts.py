"""Accounts: who pays and is limited."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from appliance.errors import BadRequest, Conflict, NotFound
from appliance.store import audit
from appliance.store.database import Store
from appliance.store.ids import COMMAND_LINE, checked_name, new_id, now

PLAN_NAMES = ("community", "professional", "enterprise")


@dataclass(frozen=True, slots=True)
class Account:
    """One account; `disabled` is when it was, in epoch seconds."""

    id: str
    name: str
    plan: str
    email: str | None
    created: int
    disabled: int | None


def create(store: Store, name: str, plan: str, email: str | None = None, *, by: str = COMMAND_LINE) -> Account:
    """A new account, durable when it returns. Raises BadRequest, or Conflict for a name that is taken."""
    account = Account(new_id("acc"), checked_name(name, "an account"), plan, email, now(), None)
    if plan not in PLAN_NAMES:
        raise BadRequest(f"There is no plan {plan[:50]!r}; the plans are {', '.join(PLAN_NAMES)}.")
    if email is not None and not _plausible(email):
        raise BadRequest(f"{email[:100]!r} is not an email address.")

    def insert(db: Any) -> None:
        if db.execute("select 1 from accounts where name = ?", [account.name]).fetchone():
            raise Conflict(f"There is an account {account.name!r} already.")
        db.execute(
            "insert into accounts (id, name, plan, email, created) values (?, ?, ?, ?, ?)",
            [account.id, account.name, account.plan, account.email, account.created],
        )
        audit.record(db, by, "account.create", account=account.id, name=account.name, plan=plan)

    store.write(insert, durable=True).result()
    return account


def listing(store: Store) -> list[Account]:
    """All accounts, oldest first."""
    query = "select id, name, plan, email, created, disabled from accounts order by created, rowid"
    return [Account(*row) for row in store.read(lambda db: db.execute(query).fetchall())]


def by_name(store: Store, name: str) -> Account:
    """The account of this name or id. Raises NotFound."""
    query = "select id, name, plan, email, created, disabled from accounts where name = ? or id = ?"
    row = store.read(lambda db: db.execute(query, [name, name]).fetchone())
    if row is None:
        raise NotFound(f"There is no account {name[:100]!r}.")
    return Account(*row)


def _plausible(email: str) -> bool:
    local, at, domain = email.partition("@")
    return bool(local and at and domain) and len(email) <= 254 and email.isprintable() and " " not in email
