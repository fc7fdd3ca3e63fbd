"""Accounts: who pays and is limited. Which plans there are is not known here; whoever calls checks their names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from appliance.errors import BadRequest, Conflict, NotFound
from appliance.messages import PROMPTS, Prompts
from appliance.store import audit
from appliance.store.database import Store
from appliance.store.ids import COMMAND_LINE, checked_name, new_id, now


@dataclass(frozen=True, slots=True)
class Account:
    """One account; `disabled` is when it was, in epoch seconds."""

    id: str
    name: str
    plan: str
    email: str | None
    created: int
    disabled: int | None
    prompts: Prompts = "never"  # whether they may leave the box


def create(store: Store, name: str, plan: str, email: str | None = None, *, by: str = COMMAND_LINE) -> Account:
    """A new account, durable when it returns. Raises BadRequest, or Conflict for a name that is taken."""
    account = Account(new_id("acc"), checked_name(name, "an account"), plan, email, now(), None)
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


def set_plan(store: Store, name: str, plan: str, *, by: str = COMMAND_LINE) -> Account:
    """Another plan from the next call on. Raises NotFound."""
    account = by_name(store, name)

    def change(db: Any) -> None:
        db.execute("update accounts set plan = ? where id = ?", [plan, account.id])
        audit.record(db, by, "account.set-plan", account=account.id, before=account.plan, plan=plan)

    store.write(change, durable=True).result()
    return by_name(store, account.id)


def set_egress(store: Store, name: str, prompts: str, *, by: str = COMMAND_LINE) -> Account:
    """Whether prompts of the account may leave the box, from the next call on. Raises NotFound or BadRequest."""
    account = by_name(store, name)
    if prompts not in PROMPTS:
        raise BadRequest(f"Prompts may be {', '.join(PROMPTS)}, not {prompts[:50]!r}.")

    def change(db: Any) -> None:
        db.execute("update accounts set prompts = ? where id = ?", [prompts, account.id])
        audit.record(db, by, "account.set-egress", account=account.id, before=account.prompts, prompts=prompts)

    store.write(change, durable=True).result()
    return by_name(store, account.id)


def set_disabled(store: Store, name: str, disabled: bool, *, by: str = COMMAND_LINE) -> Account:
    """A disabled account's keys are refused; enabled again, they work as before. Raises NotFound."""
    account = by_name(store, name)
    what = "account.disable" if disabled else "account.enable"

    def change(db: Any) -> None:
        query = "update accounts set disabled = ?1 where id = ?2 and (disabled is null) = (?1 is not null)"
        if db.execute(query, [now() if disabled else None, account.id]).rowcount:
            audit.record(db, by, what, account=account.id)

    store.write(change, durable=True).result()
    return by_name(store, account.id)


def delete(store: Store, name: str, *, by: str = COMMAND_LINE) -> Account:
    """Removes an account's name, address, members and keys. What it used stays under its id, as numbers; rows of the
    logs stay as long as all others. Administrators stay, without an account. Raises NotFound."""
    account = by_name(store, name)

    def remove(db: Any) -> None:
        db.execute("delete from keys where account_id = ?", [account.id])
        db.execute("delete from users where account_id = ? and role = 'member'", [account.id])
        db.execute("update users set account_id = null where account_id = ?", [account.id])
        blank = "update accounts set name = id, email = null, disabled = ?1, deleted = ?1 where id = ?2"
        db.execute(blank, [now(), account.id])
        audit.record(db, by, "account.delete", account=account.id)

    store.write(remove, durable=True).result()
    return account


def listing(store: Store, *, deleted: bool = False) -> list[Account]:
    """All accounts, oldest first; deleted ones, of which only the id is left, if asked for."""
    query = """select id, name, plan, email, created, disabled, prompts from accounts where deleted is null or ?
        order by created, rowid"""
    return [Account(*row) for row in store.read(lambda db: db.execute(query, [deleted]).fetchall())]


def plans_in_use(store: Store) -> set[str]:
    """The names of all accounts' plans."""
    query = "select distinct plan from accounts where deleted is null"
    return {row[0] for row in store.read(lambda db: db.execute(query).fetchall())}


def by_name(store: Store, name: str) -> Account:
    """The account of this name or id. Raises NotFound, for a deleted one too."""
    query = """select id, name, plan, email, created, disabled, prompts from accounts
        where (name = ? or id = ?) and deleted is null"""
    row = store.read(lambda db: db.execute(query, [name, name]).fetchone())
    if row is None:
        raise NotFound(f"There is no account {name[:100]!r}.")
    return Account(*row)


def _plausible(email: str) -> bool:
    local, at, domain = email.partition("@")
    return bool(local and at and domain) and len(email) <= 254 and email.isprintable() and " " not in email
