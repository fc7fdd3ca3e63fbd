"""What was called: the running windows of every payer, to go on with after a restart, and totals per day for people.

A window is named by its start, as it was when the call was charged: what the clock says later is of no concern. All
functions that take a `db` are to be called inside a write.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from appliance.store.database import Store

DAY = 86_400
Place = tuple[str, str, int]  # (payer, window, its start)


@dataclass(frozen=True, slots=True)
class Call:
    """Who called what, and when (epoch seconds); `endpoint` is the route's template."""

    account_id: str
    key_id: str
    endpoint: str
    at: float

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


def charge(db: Any, call: Call, places: Iterable[Place], calls: int = 1) -> None:
    """Counts a call in its windows, or takes it off again with `calls` -1. A newer window takes the older one's row,
    and a call of an older one changes nothing there."""
    for place in places:
        db.execute(
            """insert into windows (payer, window, start, calls) values (?, ?, ?, max(0, ?))
            on conflict do update set
                calls = case when excluded.start > start then excluded.calls else max(0, calls + ?4) end,
                start = excluded.start
            where excluded.start >= start""",
            [*place, calls],
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


def windows(store: Store) -> list[tuple[str, str, int, int]]:
    """(payer, window, start, calls) of every payer's newest windows."""
    query = "select payer, window, start, calls from windows"
    return [tuple(row) for row in store.read(lambda db: db.execute(query).fetchall())]


def totals(store: Store, account_id: str, first_day: int, last_day: int) -> list[Total]:
    """Every total of an account, by day; both days are included."""
    query = """select day, key_id, endpoint, provider, model, calls, prompt_tokens, completion_tokens, cached_tokens,
        seconds from usage where account_id = ? and day between ? and ?
        order by day, key_id, endpoint, provider, model"""
    rows = store.read(lambda db: db.execute(query, [account_id, first_day, last_day]).fetchall())
    return [Total(*row) for row in rows]


def tokens_of_keys(store: Store, day: int) -> list[tuple[str, int]]:
    """(lineage, tokens of that day) of every key that has a limit of them."""
    query = """select coalesce(k.lineage, k.id), sum(u.prompt_tokens + u.completion_tokens)
        from keys k join usage u on u.account_id = k.account_id and u.day = ? and u.key_id = k.id
        where k.limits like '%tokens_per_day%' group by 1"""
    return [tuple(row) for row in store.read(lambda db: db.execute(query, [day]).fetchall())]


def month_used(store: Store, account_id: str, start: int) -> int:
    """Calls of the month that begins at `start`."""
    query = "select calls from windows where payer = ? and window = 'month' and start = ?"
    row = store.read(lambda db: db.execute(query, [account_id, start]).fetchone())
    return int(row[0]) if row else 0
