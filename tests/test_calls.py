"""The log of calls: what a row holds, how long, and what happens while it cannot be written."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from appliance.access.calllog import MOST, CallLog
from appliance.config import RetentionSettings
from appliance.errors import Unavailable
from appliance.store import calls
from appliance.store.calls import PORTION, Row, shortened
from appliance.store.database import Store
from appliance.store.keyfile import MasterKey

NOW = 1_773_144_000.0
DAY = 86_400
ROW = Row(NOW, "POST", "/llm/chat", 200, "192.0.2.77", "req_1", "key_1", "acc_1", 12.5)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(Store.create(tmp_path / "appliance.db", MasterKey.generate())) as made:
        yield made


def written(store: Store, *rows: Row) -> None:
    store.write(lambda db: calls.insert(db, rows)).result()


def test_the_newest_come_last_and_the_next_ones_follow(store: Store) -> None:
    written(store, *(ROW._replace(request_id=f"r{n}", account_id=f"acc_{n % 2}") for n in range(6)))
    assert [row.request_id for _, row in calls.latest(store, 2)] == ["r4", "r5"]
    assert [row.request_id for _, row in calls.latest(store, 2, "acc_0")] == ["r2", "r4"]
    [(number, row)] = calls.after(store, 2, 1)
    assert (number, row.request_id) == (3, "r2") and row == ROW._replace(request_id="r2", account_id="acc_0")
    assert [row.request_id for _, row in calls.after(store, 3, 9, "acc_1")] == ["r3", "r5"]


def test_addresses_are_shortened_and_rows_go_by_age_a_portion_at_a_time(store: Store) -> None:
    old, middle, fresh = (ROW._replace(at=NOW - days * DAY) for days in (401, 31, 1))
    written(store, *[old] * (PORTION + 1), middle, fresh)
    kept = [len(calls.latest(store, 10_000))]
    while calls.purge(store, NOW, ip_days=30, call_days=400):
        kept.append(len(calls.latest(store, 10_000)))
    assert kept[:2] == [PORTION + 3, 3] and kept[-1] == 2
    assert [row.ip for _, row in calls.latest(store, 9)] == ["192.0.2.0", "192.0.2.77"]


@pytest.mark.parametrize(
    ("ip", "short"),
    [
        ("192.0.2.77", "192.0.2.0"), ("2001:db8:1:2:3::4", "2001:db8:1::"), ("::ffff:192.0.2.77", "192.0.2.0"),
        ("-", "-"), ("", "-"),
    ],
)  # fmt: skip
def test_what_is_left_of_an_address(ip: str, short: str) -> None:
    assert shortened(ip) == short


class Closed:
    """A store that takes nothing until it is opened."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.open = False

    def write(self, perform: Callable[[Any], Any]) -> Future[Any]:
        if self.open:
            return self._store.write(perform)
        refused: Future[Any] = Future()
        refused.set_exception(Unavailable("The disk is full."))
        return refused


def test_rows_wait_while_the_store_is_closed_and_the_oldest_are_lost_first(store: Store) -> None:
    async def scenario() -> None:
        door = Closed(store)
        log = CallLog(door, RetentionSettings)  # type: ignore[arg-type]
        for n in range(MOST + 5):
            log.add(ROW._replace(request_id=f"r{n}"))
        assert log.lost == 5
        await log.flush()
        assert calls.latest(store, 1) == [], "the control"
        door.open = True
        await log.flush()
        assert log.lost == 5

    asyncio.run(scenario())
    rows = [row.request_id for _, row in calls.after(store, 0, MOST + 9)]
    assert rows == [f"r{n}" for n in range(5, MOST + 5)]


def test_refusals_of_strangers_are_counted_and_not_kept(store: Store) -> None:
    async def scenario() -> CallLog:
        log = CallLog(store, RetentionSettings)
        log.add(ROW._replace(status=429, key_id=None, account_id=None))
        log.add(ROW._replace(status=429))
        await log.flush()
        return log

    log = asyncio.run(scenario())
    assert log.counts["/llm/chat", 429] == 2
    assert [row.key_id for _, row in calls.latest(store, 9)] == ["key_1"]


def test_rows_are_written_while_a_long_purge_goes_on(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.access.calllog.EVERY_SECONDS", 0.01)

    def without_end(*args: Any, **kwargs: Any) -> bool:
        time.sleep(0.01)
        return True

    monkeypatch.setattr(calls, "purge", without_end)

    async def scenario() -> None:
        log = CallLog(store, RetentionSettings)
        running = asyncio.create_task(log.run())
        await asyncio.sleep(0.2)
        log.add(ROW)
        async with asyncio.timeout(5):
            while not calls.latest(store, 1):
                await asyncio.sleep(0.01)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(scenario())
