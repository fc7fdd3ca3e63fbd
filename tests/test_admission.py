"""Admission: charged at once, let in by turns, and nothing held or charged of a call that did not get in."""

from __future__ import annotations

import asyncio

import pytest

from appliance.access.admission import Admission, Entry, Terms
from appliance.access.leases import Room
from appliance.access.windows import Limits, Payer
from appliance.errors import RateLimited

NOON = 1_773_144_000.0  # 2026-03-10, 12:00 UTC
TERMS = Terms((Payer("a", Limits(20, 200, 1_000)),), (Room("a", 2),))


def admission(wait: float = 5.0) -> Admission:
    return Admission(wait_seconds=wait, clock=lambda: NOON)


async def enter(door: Admission, terms: Terms = TERMS, *, counts: bool = True, leases: bool = True) -> Entry:
    entry = door.reserve(terms, counts=counts, leases=leases)
    await door.turn(entry)
    return entry


def test_a_hundred_at_once_of_which_exactly_twenty_get_in() -> None:
    async def scenario() -> None:
        door = admission()
        inside: list[int] = []

        async def call() -> bool:
            try:
                entry = await enter(door)
            except RateLimited:
                return False
            inside.append(door.leases.held("a"))
            await asyncio.sleep(0.001)
            door.end(entry)
            return True

        answers = await asyncio.gather(*(call() for _ in range(100)))
        assert sum(answers) == 20 and max(inside) == 2
        assert door.leases.held("a") == 0 and door.windows.used("a", NOON)["minute"] == 20

    asyncio.run(scenario())


def test_a_call_whose_turn_does_not_come_is_refused_and_pays_nothing() -> None:
    async def scenario() -> None:
        door = admission(wait=0.05)
        holding = [await enter(door), await enter(door)]
        with pytest.raises(RateLimited, match="2 calls may run at the same time") as caught:
            await enter(door)
        assert caught.value.retry_after is not None and caught.value.retry_after >= 1
        assert door.windows.used("a", NOON)["minute"] == 2 and not list(door.leases)
        door.end(holding[0])
        assert (await enter(door)).waited == 0.0

    asyncio.run(scenario())


def test_a_call_that_is_cancelled_while_it_waits_leaves_the_line_and_pays_nothing() -> None:
    async def scenario() -> None:
        door = admission()
        first, _ = await enter(door), await enter(door)
        waiting = asyncio.ensure_future(enter(door))
        behind = asyncio.ensure_future(enter(door))
        await asyncio.sleep(0.01)
        assert door.leases.waiting("a") == 2, "the control: both hold a place in the line"
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert door.leases.waiting("a") == 1 and door.windows.used("a", NOON)["minute"] == 3
        door.end(first)
        assert (await behind).waited > 0

    asyncio.run(scenario())


def test_a_limit_that_falls_while_a_call_waits_refuses_it_in_words() -> None:
    async def scenario() -> None:
        door = admission(wait=0.05)
        wide = Terms(TERMS.payers, (Room("a", 3),))
        held = [await enter(door, wide) for _ in range(3)]
        waiting = asyncio.ensure_future(enter(door, wide))
        await asyncio.sleep(0.01)
        door.end(door.reserve(Terms(TERMS.payers, (Room("a", 1),)), counts=False, leases=True))
        door.end(held[0])
        with pytest.raises(RateLimited, match="1 call may run at the same time"):
            await waiting

    asyncio.run(scenario())


def test_a_waiting_call_is_told_its_place_and_how_long_it_may_take() -> None:
    async def scenario() -> None:
        door = admission()
        held = [await enter(door) for _ in range(2)]
        entries = [door.reserve(TERMS, counts=True, leases=True) for _ in range(2)]
        leases = [entry.lease for entry in entries if entry.lease is not None]
        assert [door.leases.place(lease) for lease in leases] == [1, 2]
        assert 0 < door.estimate(leases[0]) < door.estimate(leases[1])
        for entry in held:
            door.end(entry)
        await asyncio.gather(*map(door.turn, entries))

    asyncio.run(scenario())


def test_the_charge_of_our_own_failure_is_given_back_once() -> None:
    async def scenario() -> None:
        door = admission()
        entry = await enter(door)
        await enter(door)
        for _ in range(3):
            door.end(entry, give_back=True)
        assert door.windows.used("a", NOON)["minute"] == 1 and door.leases.held("a") == 1

    asyncio.run(scenario())


@pytest.mark.parametrize(("counts", "leases"), [(True, False), (False, True), (False, False)])
def test_only_what_an_endpoint_asks_for_is_taken(counts: bool, leases: bool) -> None:
    async def scenario() -> None:
        door = admission()
        entry = await enter(door, TERMS, counts=counts, leases=leases)
        assert door.windows.used("a", NOON)["minute"] == counts
        assert door.leases.held("a") == leases
        door.end(entry)
        assert door.leases.held("a") == 0 and door.windows.used("a", NOON)["minute"] == counts

    asyncio.run(scenario())


def test_who_has_no_terms_is_not_limited() -> None:
    async def scenario() -> None:
        door = admission()
        for _ in range(1_000):
            await enter(door, Terms())
        assert door.view(Terms()) is None and len(door.windows) == 0

    asyncio.run(scenario())
