"""The ledger: charges outlive the process, also when the store could not be written for a while, and never twice."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from appliance.access import ledger as ledgers
from appliance.access.ledger import Ledger
from appliance.access.windows import Limits, Payer, Windows, bounds
from appliance.errors import RateLimited, Unavailable
from appliance.store import usage
from appliance.store.database import Store
from appliance.store.keyfile import MasterKey
from appliance.store.usage import Call, Spent

NOON = 1_773_144_000  # 2026-03-10, 12:00 UTC
CHAT = Call("a", "k1", "/llm/chat", NOON)
PAYER = Payer("a", Limits(20, 200, 1_000))


def looped(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """The test, in an event loop of its own."""

    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        asyncio.run(test(**fixtures))

    return run


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(Store.create(tmp_path / "appliance.db", MasterKey.generate())) as made:
        yield made


def month(store: Store) -> int:
    return next((calls for _, window, _, calls in usage.windows(store) if window == "month"), 0)


@contextmanager
def locked(store: Store) -> Iterator[None]:
    """Another connection holds the database, as another process would; the writer does not wait its usual 5 s."""
    store.write(lambda db: db.execute("pragma busy_timeout = 50")).result()
    other: Any = store._connect()
    other.execute("begin immediate")
    try:
        yield
    finally:
        other.execute("rollback")
        other.close()


@looped
async def test_a_charge_is_committed_before_it_returns_and_comes_back_after_a_restart(store: Store) -> None:
    ledger, windows = Ledger(store), Windows()
    for _ in range(3):
        await ledger.charge(CHAT, windows.take([PAYER], NOON))
    assert month(store) == 3 and ledger.owed == 0
    back = windows.take([PAYER], NOON)
    await ledger.charge(CHAT, back)
    ledger.take_back(CHAT, back)
    ledger.spend(CHAT, Spent("local", "m", 10, 5, 3, 0.5))
    await ledger.close()
    assert month(store) == 3
    again = Windows()
    Ledger(store).restore(again, NOON + 5)
    assert again.used("a", NOON + 5) == {"minute": 3, "hour": 3, "month": 3}
    day = NOON // 86_400 * 86_400
    assert sum(t.calls for t in usage.totals(store, "a", day, day)) == 3
    assert sum(t.prompt_tokens for t in usage.totals(store, "a", day, day)) == 10


@looped
async def test_what_cannot_be_written_is_owed_and_written_once_when_it_can_be(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledgers, "COMMIT_SECONDS", 5.0)
    ledger, windows = Ledger(store, retry_seconds=0.02), Windows()
    with locked(store):
        with pytest.raises(Unavailable):  # the control: a write really fails now
            await asyncio.wrap_future(store.write(lambda db: None))
        for _ in range(4):
            await ledger.charge(CHAT, windows.take([PAYER], NOON))  # the calls go on
        wrong = windows.take([PAYER], NOON)
        await ledger.charge(CHAT, wrong)
        ledger.take_back(CHAT, wrong)
        assert ledger.owed == 6 and month(store) == 0
        await asyncio.sleep(0.1)
        assert ledger.owed == 6, "tried again, in vain"
    async with asyncio.timeout(5):
        while ledger.owed:
            await asyncio.sleep(0.01)
    assert month(store) == 4
    await ledger.charge(CHAT, windows.take([PAYER], NOON))
    assert month(store) == 5


@looped
async def test_a_file_that_becomes_read_only_is_as_one_that_cannot_be_written_for_a_while(store: Store) -> None:
    ledger, windows = Ledger(store, retry_seconds=0.02), Windows()
    writer: Any = store._writer
    writer.execute("pragma query_only = on")  # SQLite says what it says of a read-only file
    with pytest.raises(Unavailable, match="readonly"):
        await asyncio.wrap_future(store.write(lambda db: db.execute("delete from windows")))
    for _ in range(3):
        await ledger.charge(CHAT, windows.take([PAYER], NOON))  # the calls go on
    assert ledger.owed == 3 and month(store) == 0
    writer.execute("pragma query_only = off")
    async with asyncio.timeout(5):
        while ledger.owed:
            await asyncio.sleep(0.01)
    assert month(store) == 3


@looped
async def test_a_slow_commit_holds_nobody_up(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledgers, "COMMIT_SECONDS", 0.05)
    ledger, windows = Ledger(store), Windows()
    store.write(lambda db: db.execute("pragma busy_timeout = 10000")).result()
    other: Any = store._connect()
    other.execute("begin immediate")
    async with asyncio.timeout(2):
        await ledger.charge(CHAT, windows.take([PAYER], NOON))
    assert ledger.owed == 1, "it is on its way"
    other.execute("rollback")
    other.close()
    await ledger.close()
    assert month(store) == 1 and ledger.owed == 0


@looped
async def test_the_end_does_not_wait_for_ever(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    ledger, windows = Ledger(store, retry_seconds=0.02), Windows()
    store.write(lambda db: db.execute("pragma busy_timeout = 10000")).result()
    other: Any = store._connect()
    other.execute("begin immediate")
    call = asyncio.ensure_future(ledger.charge(CHAT, windows.take([PAYER], NOON)))
    await asyncio.sleep(0.05)
    async with asyncio.timeout(3):
        await ledger.close()
        await call
    other.execute("rollback")
    other.close()
    assert "1 charges are lost" in caplog.text


@looped
async def test_what_is_owed_at_the_end_is_written_if_it_can_be(store: Store) -> None:
    ledger, windows = Ledger(store, retry_seconds=60), Windows()
    with locked(store):
        await ledger.charge(CHAT, windows.take([PAYER], NOON))
        assert ledger.owed == 1
    await ledger.close()
    assert ledger.owed == 0 and month(store) == 1


@looped
async def test_a_charge_that_is_being_written_when_the_end_comes_is_written_once(store: Store) -> None:
    store.write(lambda db: db.execute("pragma busy_timeout = 10000")).result()
    ledger, windows = Ledger(store, retry_seconds=0.02), Windows()
    other: Any = store._connect()
    other.execute("begin immediate")
    calls = [asyncio.ensure_future(ledger.charge(CHAT, windows.take([PAYER], NOON))) for _ in range(3)]
    await asyncio.sleep(0.1)
    ending = asyncio.ensure_future(ledger.close())
    await asyncio.sleep(0.1)
    assert not ending.done(), "it waits for what is under way"
    other.execute("rollback")
    other.close()
    await asyncio.gather(ending, *calls)
    assert month(store) == 3


@looped
async def test_a_row_that_cannot_be_written_holds_up_nobody(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    ledger, windows = Ledger(store), Windows()
    broken = CHAT._replace(key_id=2**64)  # type: ignore[arg-type]  # no whole number of SQLite's
    charges = [windows.take([PAYER], NOON) for _ in range(3)]
    await asyncio.gather(*(ledger.charge(c, charge) for c, charge in zip([CHAT, broken, CHAT], charges, strict=True)))
    day = NOON // 86_400 * 86_400
    assert [t.calls for t in usage.totals(store, "a", day, day)] == [2] and ledger.owed == 0
    assert month(store) == 3, "its windows are sound"
    assert caplog.text.count("it is dropped") == 1
    await ledger.charge(CHAT, windows.take([PAYER], NOON))
    assert month(store) == 4


@looped
async def test_a_call_that_makes_no_sense_changes_nothing(store: Store) -> None:
    ledger, windows = Ledger(store), Windows()
    with pytest.raises(ValueError, match="no time"):
        await ledger.charge(CHAT._replace(at="no time"), windows.take([PAYER], NOON))  # type: ignore[arg-type]
    await ledger.charge(CHAT, windows.take([PAYER], NOON))
    assert month(store) == 1 and ledger.owed == 0


@looped
async def test_the_calls_of_one_moment_share_a_transaction(store: Store) -> None:
    ledger, windows = Ledger(store), Windows()
    before = store.commits
    await asyncio.gather(*(ledger.charge(CHAT, windows.take([Payer("a", Limits())], NOON)) for _ in range(100)))
    assert month(store) == 100 and store.commits - before <= 3


@looped
async def test_once_the_store_answers_again_its_commits_are_waited_for(store: Store) -> None:
    ledger, windows = Ledger(store, retry_seconds=0.02), Windows()
    with locked(store):
        await ledger.charge(CHAT, windows.take([PAYER], NOON))
        assert month(store) == 0, "the control: nobody waits while it fails"
    async with asyncio.timeout(5):
        while ledger.owed:
            await asyncio.sleep(0.01)
    for n in range(2, 12):
        await ledger.charge(CHAT, windows.take([PAYER], NOON))
        assert month(store) == n


@looped
async def test_a_month_that_is_used_up_stays_so_after_a_restart(store: Store) -> None:
    ledger, windows = Ledger(store), Windows()
    small = Payer("a", Limits(None, None, 2))
    for _ in range(2):
        await ledger.charge(CHAT, windows.take([small], NOON))
    again = Windows()
    Ledger(store).restore(again, NOON)
    with pytest.raises(Exception, match="per month") as refused:
        again.take([small], NOON)
    assert not isinstance(refused.value, RateLimited)
    assert again.take([small], bounds("month", NOON)[1]), "the next month begins anew"
