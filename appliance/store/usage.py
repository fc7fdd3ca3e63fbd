"""What was called: charges per minute, from which the windows are rebuilt, and totals per day that people read.

A charge is kept as long as a window can ask for it, the totals for good. All functions that take a `db` are to be
called inside a write.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from appliance.store.database import Store

MINUTE, DAY = 60, 86_400
PORTION = 1_000  # rows that one transaction of a purge deletes


@dataclass(frozen=True, slots=True)
class Call:
    """Who called what, and when (epoch seconds); `endpoint` is the route's template."""

    account_id: str
    key_id: str
    endpoint: str
    at: float

    @property
    def minute(self) -> int:
        return int(self.at) // MINUTE * MINUTE

    @property
    def day(self) -> int:
        return int(self.at) // DAY * DAY


@dataclass(frozen=True, slots=True)
class Spent:
    """What a call took of a model; `seconds` of the engine."""

    provider: str
    model: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Total:
    """One day of one account, key and endpoint, with whatever answered it."""

    day: int
    key_id: str
    endpoint: str
    provider: str
    model: str
    calls: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    seconds: float


def charge(db: Any, call: Call, calls: int = 1) -> None:
    """Counts a call, or takes it off again with `calls` -1."""
    db.execute(
        """insert into charges (account_id, key_id, minute, calls) values (?, ?, ?, ?)
        on conflict do update set calls = calls + excluded.calls""",
        [call.account_id, call.key_id, call.minute, calls],
    )
    _add(db, call, Spent("", "", 0, 0, 0, 0.0), calls)


def spend(db: Any, call: Call, spent: Spent) -> None:
    """Adds what a counted call took."""
    _add(db, call, spent, 0)


def _add(db: Any, call: Call, spent: Spent, calls: int) -> None:
    db.execute(
        """insert into usage (account_id, day, key_id, endpoint, provider, model,
            calls, prompt_tokens, completion_tokens, cached_tokens, seconds) values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
        on conflict do update set calls = calls + excluded.calls,
            prompt_tokens = prompt_tokens + excluded.prompt_tokens,
            completion_tokens = completion_tokens + excluded.completion_tokens,
            cached_tokens = cached_tokens + excluded.cached_tokens, seconds = seconds + excluded.seconds""",
        [
            *(call.account_id, call.day, call.key_id, call.endpoint, spent.provider, spent.model, calls),
            *(spent.prompt_tokens, spent.completion_tokens, spent.cached_tokens, spent.seconds),
        ],
    )


def charged(store: Store, since: int) -> Iterator[tuple[str, str, int]]:
    """(account, key, calls) of everybody who was charged from the minute `since` on."""
    query = "select account_id, key_id, sum(calls) from charges where minute >= ? group by account_id, key_id"
    yield from store.read(lambda db: db.execute(query, [since]).fetchall())


def totals(store: Store, account_id: str, first_day: int, last_day: int) -> list[Total]:
    """Every total of an account, by day; both days are included."""
    query = """select day, key_id, endpoint, provider, model, calls, prompt_tokens, completion_tokens, cached_tokens,
        seconds from usage where account_id = ? and day between ? and ?
        order by day, key_id, endpoint, provider, model"""
    rows = store.read(lambda db: db.execute(query, [account_id, first_day, last_day]).fetchall())
    return [Total(*row) for row in rows]


def purge(store: Store, before: int) -> int:
    """Deletes charges of minutes before `before`, in small transactions; how many."""
    query = """delete from charges where (account_id, key_id, minute) in
        (select account_id, key_id, minute from charges where minute < ? limit ?)"""
    gone = 0
    while portion := store.write(lambda db: int(db.execute(query, [before, PORTION]).rowcount)).result():
        gone += portion
    return gone
