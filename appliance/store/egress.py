"""The ledger of what left the box: when, whose, where to, how much and why; never what."""

from __future__ import annotations

from typing import Any, NamedTuple

from appliance.store.database import Store


class Row(NamedTuple):
    """One exchange with a server elsewhere; `at` in epoch seconds, sizes in bytes."""

    at: float
    account_id: str
    key_id: str
    destination: str
    bytes_out: int
    bytes_in: int
    reason: str
    request_id: str


def insert(db: Any, row: Row) -> None:
    """To be called inside a write."""
    db.execute(
        """insert into egress (at, account_id, key_id, destination, bytes_out, bytes_in, reason, request_id)
        values (?, ?, ?, ?, ?, ?, ?, ?)""",
        list(row),
    )


def listing(store: Store, since: float, most: int, account_id: str | None = None) -> list[Row]:
    """The newest rows from `since` on, oldest first."""
    query = """select at, account_id, key_id, destination, bytes_out, bytes_in, reason, request_id from egress
        where at >= ?1 and (?2 is null or account_id = ?2) order by number desc limit ?3"""
    rows = store.read(lambda db: db.execute(query, [since, account_id, most]).fetchall())
    return [Row(*row) for row in reversed(rows)]
