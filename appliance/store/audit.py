"""The audit log: who did what when, each row chained by its hash to the one before. Rows are never changed or removed.

A row is written in the transaction of the act itself, so that neither is there without the other. The chain shows a row
that was changed or removed. Rows missing at its end, or a chain that somebody computed anew from some row on, show by
its length and last hash, to whoever has noted these.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from appliance.store.database import Store
from appliance.store.ids import now

FIRST = bytes(32)  # what the first row is chained to


@dataclass(frozen=True, slots=True)
class Act:
    """One administrative act; `about` names what it concerned and never holds a secret."""

    number: int
    at: int
    who: str
    what: str
    about: dict[str, Any]
    hash: bytes


@dataclass(frozen=True, slots=True)
class Chain:
    """What checking found: how many rows hold, the last good hash, and the first row that does not hold, if any."""

    rows: int
    head: bytes
    broken: int | None


def record(db: Any, who: str, what: str, **about: str | int | None) -> None:
    """Adds a row; to be called inside the write that performs the act."""
    last = db.execute("select number, hash from audit order by number desc limit 1").fetchone()
    number, before = (last[0] + 1, bytes(last[1])) if last else (1, FIRST)
    at, text = now(), json.dumps(about, sort_keys=True)
    row = [number, at, who, what, text, _hash(before, number, at, who, what, text)]
    db.execute("insert into audit (number, at, who, what, about, hash) values (?, ?, ?, ?, ?, ?)", row)


def listing(store: Store) -> list[Act]:
    """Every act, oldest first."""
    return [Act(n, at, who, what, json.loads(text), bytes(found)) for n, at, who, what, text, found in _rows(store)]


def verify(store: Store) -> Chain:
    """Follows the chain from its first row."""
    before, count = FIRST, 0
    for number, at, who, what, text, found in _rows(store):
        if number != count + 1 or bytes(found) != _hash(before, number, at, who, what, text):
            return Chain(count, before, count + 1)
        before, count = bytes(found), number
    return Chain(count, before, None)


def _rows(store: Store) -> Iterable[tuple[int, int, str, str, str, bytes]]:
    query = "select number, at, who, what, about, hash from audit order by number"
    rows: list[tuple[int, int, str, str, str, bytes]] = store.read(lambda db: db.execute(query).fetchall())
    return rows


def _hash(before: bytes, *fields: str | int) -> bytes:
    return hashlib.sha256(before + json.dumps(fields).encode()).digest()
