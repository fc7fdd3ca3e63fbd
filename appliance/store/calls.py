"""The log of calls: when, what, from where, with which key, how it ended; never a body or a query string.

Rows come in groups, and go by age, some hundred at a time, so that no call waits for a purge.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_address, ip_network
from typing import Any, NamedTuple

from appliance.store.database import Store

DAY = 86_400
PORTION = 100  # rows that a purge touches in one transaction: charges wait behind it
IPV4_KEPT, IPV6_KEPT = 24, 48  # bits of an address that stay when it is shortened


class Row(NamedTuple):
    """One call; `at` in epoch seconds, `ms` from its first byte to its end."""

    at: float
    method: str
    endpoint: str
    status: int
    ip: str
    request_id: str
    key_id: str | None
    account_id: str | None
    ms: float


def insert(db: Any, rows: Iterable[Row]) -> None:
    """To be called inside a write."""
    db.conn.executemany(
        """insert into calls (at, method, endpoint, status, ip, request_id, key_id, account_id, ms)
        values (?, ?, ?, ?, ?, ?, ?, ?, ?)""",
        list(rows),
    )


_COLUMNS = "number, at, method, endpoint, status, ip, request_id, key_id, account_id, ms"


def latest(store: Store, most: int, account_id: str | None = None) -> list[tuple[int, Row]]:
    """(number, row) of the newest calls, oldest first."""
    query = f"select {_COLUMNS} from calls order by number desc limit ?2"
    if account_id is not None:
        query = f"select {_COLUMNS} from calls where account_id = ?1 order by number desc limit ?2"
    rows = store.read(lambda db: db.execute(query, [account_id, most]).fetchall())
    return [(number, Row(*row)) for number, *row in reversed(rows)]


def after(store: Store, number: int, most: int, account_id: str | None = None) -> list[tuple[int, Row]]:
    """(number, row) of the calls that follow call `number`, oldest first."""
    query = f"select {_COLUMNS} from calls where number > ?2 order by number limit ?3"
    if account_id is not None:
        query = f"select {_COLUMNS} from calls where account_id = ?1 and number > ?2 order by number limit ?3"
    rows = store.read(lambda db: db.execute(query, [account_id, number, most]).fetchall())
    return [(at, Row(*row)) for at, *row in rows]


def purge(store: Store, now: float, *, ip_days: int, call_days: int) -> bool:
    """Shortens addresses and deletes rows that are due, one portion; False when nothing was."""

    def portion(db: Any) -> int:
        gone: int = db.execute(
            "delete from calls where number in (select number from calls where at < ? order by at limit ?)",
            [now - call_days * DAY, PORTION],
        ).rowcount
        if gone:
            return gone
        due = db.execute(
            "select number, ip from calls where whole = 1 and at < ? order by at limit ?",
            [now - ip_days * DAY, PORTION],
        ).fetchall()
        db.conn.executemany(
            "update calls set ip = ?, whole = 0 where number = ?", [(shortened(ip), number) for number, ip in due]
        )
        return len(due)

    return store.write(portion).result() > 0


def shortened(ip: str) -> str:
    """The network that the address lies in: enough for "from where", too little for "who"."""
    try:
        address = ip_address(ip)
    except ValueError:
        return "-"
    address = getattr(address, "ipv4_mapped", None) or address
    return str(ip_network((address, IPV4_KEPT if address.version == 4 else IPV6_KEPT), strict=False).network_address)
