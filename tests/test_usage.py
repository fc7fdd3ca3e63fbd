"""Charges and totals: exact, rebuilt after a crash, purged without losing what people read."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from appliance.access.windows import Limits, Payer, Windows, bounds
from appliance.errors import RateLimited
from appliance.store import usage
from appliance.store.database import Store
from appliance.store.keyfile import MasterKey, create_key_file, read_key
from appliance.store.usage import Call, Spent, Tally

NOON = 1_773_144_000  # 2026-03-10, 12:00 UTC
CHAT = Call("a", "k1", "/llm/chat", NOON)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(Store.create(tmp_path / "appliance.db", MasterKey.generate())) as made:
        yield made


PLACES = [("a", "minute", NOON), ("a", "hour", NOON), ("a", "month", bounds("month", NOON)[0])]


def charge(store: Store, *calls: Call) -> None:
    for call in calls:
        write(store, lambda tally, call=call: tally.charge(call, PLACES))  # type: ignore[misc]


def write(store: Store, fill: Callable[[Tally], None]) -> None:
    """One transaction with what `fill` puts into it."""
    tally = Tally()
    fill(tally)
    store.write(tally.write).result()


def test_calls_and_tokens_add_up_per_day_key_and_endpoint(store: Store) -> None:
    charge(store, CHAT, CHAT, Call("a", "k2", "/llm/chat", NOON + 90_000), Call("b", "k3", "/llm/chat", NOON))
    spent = Spent("local", "m", 10, 5, 3, 0.5)
    for _ in range(2):
        write(store, lambda tally: tally.spend(CHAT, spent))
    day = NOON // 86_400 * 86_400
    rows = usage.totals(store, "a", day, day)
    assert [(r.key_id, r.provider, r.calls, r.prompt_tokens, r.cached_tokens, r.seconds) for r in rows] == [
        ("k1", "", 2, 0, 0, 0.0),
        ("k1", "local", 0, 20, 6, 1.0),
    ]
    assert [r.key_id for r in usage.totals(store, "a", day, day + 86_400)] == ["k1", "k1", "k2"]


def test_a_charge_can_be_taken_off_again(store: Store) -> None:
    charge(store, CHAT, CHAT)
    write(store, lambda tally: tally.charge(CHAT, PLACES, -1))
    assert sorted(usage.windows(store)) == sorted((*place, 1) for place in PLACES)


def test_a_newer_window_takes_the_row_and_an_older_ones_call_changes_nothing(store: Store) -> None:
    def minute(start: int, calls: int = 1) -> None:
        write(store, lambda tally: tally.charge(CHAT, [("a", "minute", start)], calls))

    minute(NOON)
    minute(NOON)
    minute(NOON + 60)
    minute(NOON)
    minute(NOON, -1)
    assert usage.windows(store) == [("a", "minute", NOON + 60, 1)]
    minute(NOON + 60, -1)
    minute(NOON + 60, -1)
    assert usage.windows(store) == [("a", "minute", NOON + 60, 0)], "never below nothing"


def test_a_tally_writes_what_its_calls_would_have_written_one_by_one(store: Store, tmp_path: Path) -> None:
    later = [(payer, name, start + 86_400) for payer, name, start in PLACES]
    steps: list[Callable[[Tally], None]] = [
        lambda t: t.charge(CHAT, PLACES),
        lambda t: t.charge(CHAT._replace(key_id="k2"), PLACES),
        lambda t: t.charge(CHAT, PLACES, -1),
        lambda t: t.charge(CHAT._replace(at=NOON + 86_400), later),
        lambda t: t.charge(CHAT, PLACES),  # of a window that is over by now
        lambda t: t.spend(CHAT, Spent("local", "m", 7, 5, 3, 0.25)),
        lambda t: t.spend(CHAT, Spent("local", "m", 1, 1, 1, 0.25)),
        lambda t: t.spend(CHAT, Spent("groq", "m", 1, 1, 1, 0.25)),
    ]
    whole, halves = Tally(), (Tally(), Tally())
    for n, step in enumerate(steps):
        step(whole)
        step(halves[n // 4])
        with closing(Store.open(store.path, store._key)) as one_by_one:
            write(one_by_one, step)
    halves[0].add(halves[1])
    assert whole.entries == halves[0].entries == len(steps)

    def rows(of: Store) -> list[list[tuple[Any, ...]]]:
        return of.read(lambda db: [sorted(db.execute(f"select * from {t}").fetchall()) for t in ("windows", "usage")])

    expected = rows(store)
    assert expected[0] and expected[1]
    for n, tally in enumerate((whole, halves[0])):
        with closing(Store.create(tmp_path / f"{n}.db", MasterKey.generate())) as at_once:
            at_once.write(tally.write).result()
            assert rows(at_once) == expected


def test_windows_are_rebuilt_as_they_were(store: Store) -> None:
    account, key = Payer("a", Limits(20, 200, 1_000)), Payer("k1", Limits(minute=5))
    windows = Windows()
    for moment in (NOON - 3_600, NOON - 60, NOON, NOON + 1, NOON + 2):
        places = windows.take([account, key], moment).places
        write(store, lambda tally, places=places: tally.charge(CHAT, places))  # type: ignore[misc]
    rebuilt = Windows()
    for payer, window, start, calls in usage.windows(store):
        rebuilt.restore(payer, window, start, calls, NOON + 3)
    for payer in ("a", "k1"):
        assert rebuilt.used(payer, NOON + 3) == windows.used(payer, NOON + 3) == {"minute": 3, "hour": 3, "month": 5}
    rebuilt.take([account, key], NOON + 3)
    rebuilt.take([account, key], NOON + 3)
    with pytest.raises(RateLimited):
        rebuilt.take([account, key], NOON + 3)


CHARGER = """
import sys
from pathlib import Path
from typing import Any
from appliance.store import usage
from appliance.store.database import Store
from appliance.store.keyfile import read_key
store = Store.open(Path(sys.argv[1]), read_key(Path(sys.argv[2])))
pending = []
for n in range(10**6):
    tally = usage.Tally()
    tally.charge(usage.Call("a", "k", "/x", 0.0), [("a", "month", 0)])
    pending.append(store.write(tally.write))
    if len(pending) >= 20:
        pending.pop(0).result()
        print(n - 18, flush=True)  # so many are acknowledged
"""


def test_after_kill_minus_nine_every_acknowledged_charge_is_there_and_none_twice(tmp_path: Path) -> None:
    """Twenty writes are in flight all the time, so that the kill always hits some."""
    key_file = tmp_path / "key"
    create_key_file(key_file)
    database = tmp_path / "appliance.db"
    Store.create(database, read_key(key_file)).close()
    before = hits = turn = 0
    while hits < 3 and turn < 50:
        turn += 1
        command = [sys.executable, "-c", CHARGER, str(database), str(key_file)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout
            acknowledged = 0
            for line in child.stdout:
                acknowledged = int(line)
                if acknowledged >= 30 * turn:
                    break
            os.kill(child.pid, signal.SIGKILL)
            whole = child.stdout.read().splitlines(keepends=True)
            acknowledged = max([acknowledged, *(int(line) for line in whole if line.endswith("\n"))])
        with closing(Store.open(database, read_key(key_file))) as store:
            [(_, _, _, calls)] = usage.windows(store)
            assert store.read(lambda db: db.execute("pragma integrity_check").fetchone()[0]) == "ok"
        assert acknowledged <= calls - before <= acknowledged + 20 + 1, turn
        hits += acknowledged < calls - before
        before = calls
    assert hits == 3, "no kill came between a commit and its acknowledgement"
