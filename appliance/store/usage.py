"""What was called: the running windows of every payer, to go on with after a restart, and totals per day for people.

A window is named by its start, as it was when the call was charged: what the clock says later is of no concern.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from operator import add
from typing import Any, NamedTuple

from appliance.store.database import Store

DAY = 86_400
Place = tuple[str, str, int]  # (payer, window, its start)
_Line = tuple[str, int, str, str, str, str]  # (account, day, key, endpoint, provider, model)


class Call(NamedTuple):
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


class Tally:
    """What calls took, summed up, so that each row of the store is written once however many they were. Adding to it
    is the event loop's business; whoever writes it owns it."""

    def __init__(self) -> None:
        self.entries = 0  # charges, returns and what was spent
        self._places: dict[Place, int] = {}  # calls, in the order in which the windows came
        self._lines: dict[_Line, list[float]] = {}  # calls, prompt, completion and cached tokens, seconds

    def charge(self, call: Call, places: Iterable[Place], calls: int = 1) -> None:
        """Counts a call in its windows, or takes it off again with `calls` -1."""
        line = self._line(call, "", "")
        line[0] += calls
        for place in places:
            self._places[place] = self._places.get(place, 0) + calls
        self.entries += 1

    def spend(self, call: Call, spent: Spent) -> None:
        """Adds what a counted call took."""
        line = self._line(call, spent.provider, spent.model)
        took = (0, spent.prompt_tokens, spent.completion_tokens, spent.cached_tokens, spent.seconds)
        line[:] = map(add, line, took)
        self.entries += 1

    def add(self, later: Tally) -> None:
        """Adds all of another one."""
        for place, calls in later._places.items():
            self._places[place] = self._places.get(place, 0) + calls
        for key, sums in later._lines.items():
            line = self._lines.setdefault(key, [0, 0, 0, 0, 0.0])
            line[:] = map(add, line, sums)
        self.entries += later.entries

    def write(self, db: Any) -> None:
        """Adds the sums to the store. A newer window takes the older one's row, and an older one changes nothing."""
        db.conn.executemany(_CHARGE, [(*place, calls) for place, calls in self._places.items()])
        db.conn.executemany(_ADD, [(*key, *sums) for key, sums in self._lines.items()])

    def split_off(self) -> Tally | None:
        """Takes one row's sum out, as a tally of its own; None when there is no more."""
        part = Tally()
        if self._places:
            part._places = dict([self._places.popitem()])
        elif self._lines:
            part._lines = dict([self._lines.popitem()])
        else:
            return None
        part.entries = 1
        return part

    def _line(self, call: Call, provider: str, model: str) -> list[float]:
        key = (call.account_id, call.day, call.key_id, call.endpoint, provider, model)
        return self._lines.setdefault(key, [0, 0, 0, 0, 0.0])


_CHARGE = """insert into windows (payer, window, start, calls) values (?1, ?2, ?3, max(0, ?4))
    on conflict do update set
        calls = case when excluded.start > start then excluded.calls else max(0, calls + ?4) end,
        start = excluded.start
    where excluded.start >= start"""
_ADD = """insert into usage (account_id, day, key_id, endpoint, provider, model,
        calls, prompt_tokens, completion_tokens, cached_tokens, seconds) values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
    on conflict do update set calls = calls + excluded.calls,
        prompt_tokens = prompt_tokens + excluded.prompt_tokens,
        completion_tokens = completion_tokens + excluded.completion_tokens,
        cached_tokens = cached_tokens + excluded.cached_tokens, seconds = seconds + excluded.seconds"""


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
