"""Admission of one call: its place in the windows first, then its turn among the calls that run. Knows no HTTP.

The windows are charged on arrival, so that a call that is over the limit learns it at once; a call that waits in vain
for its turn gets the charge back. Whoever is let in holds an `Entry`, which must be ended, whatever happens.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from appliance.access.leases import Lease, Leases, Room, State
from appliance.access.windows import Charge, Payer, View, Windows
from appliance.errors import RateLimited

USUAL_SECONDS = 1.0  # how long a call holds its lease, until some have been seen
SMOOTHING = 0.1


@dataclass(frozen=True, slots=True)
class Terms:
    """What a caller is allowed: who is charged, and where its calls find room. Empty: nothing is limited."""

    payers: tuple[Payer, ...] = ()
    rooms: tuple[Room, ...] = ()


@dataclass(eq=False, slots=True)
class Entry:
    """A call that was let in. `waited` is how long it waited for its turn, in seconds."""

    charge: Charge | None
    lease: Lease | None
    waited: float = 0.0
    began: float = field(default_factory=time.monotonic)
    ended: bool = False


class Admission:
    """The counts and leases of all callers. Lives on the event loop: check and charge are one step."""

    def __init__(self, *, wait_seconds: float, clock: Callable[[], float] = time.time) -> None:
        self.windows = Windows()
        self.leases = Leases()
        self._wait_seconds = wait_seconds
        self._clock = clock
        self._usual = USUAL_SECONDS

    def view(self, terms: Terms, *, refused: bool = False) -> View | None:
        """The window that headers show now."""
        return self.windows.view(terms.payers, self._clock(), refused=refused)

    def now(self) -> float:
        """Epoch seconds, by the clock that the windows go by."""
        return self._clock()

    async def enter(self, terms: Terms, *, counts: bool, leases: bool) -> Entry:
        """Lets a call in, after its turn came. Raises RateLimited or MonthlyLimitReached, and then nothing is held."""
        charge = self.windows.take(terms.payers, self._clock()) if counts else None
        entry = Entry(charge, None)
        try:
            if leases and terms.rooms:
                await self._turn(entry, terms)
        except BaseException:
            self.end(entry, give_back=True)
            raise
        return entry

    def end(self, entry: Entry, *, give_back: bool = False) -> None:
        """The call is over. Its charge is given back when it failed by our fault. Harmless the second time."""
        if entry.ended:
            return
        entry.ended = True
        if entry.lease is not None:
            if entry.lease.state is State.HELD:
                self._usual += SMOOTHING * (time.monotonic() - entry.began - self._usual)
            self.leases.end(entry.lease)
        if give_back and entry.charge is not None:
            self.windows.give_back(entry.charge)

    def estimate(self, lease: Lease) -> float:
        """Seconds until its turn, from its place and how long calls usually take."""
        return self._usual * self.leases.place(lease) / lease.rooms[0].limit

    async def _turn(self, entry: Entry, terms: Terms) -> None:
        turn = asyncio.Event()
        entry.lease = lease = self.leases.ask(terms.rooms, turn.set)
        if lease.state is State.WAITING:
            started = time.monotonic()
            try:
                async with asyncio.timeout(self._wait_seconds):
                    await turn.wait()
            except TimeoutError:
                raise self._no_turn(lease) from None
            entry.waited = time.monotonic() - started
            entry.began = time.monotonic()

    def _no_turn(self, lease: Lease) -> RateLimited:
        full = next(room for room in lease.rooms if self.leases.held(room.id) >= room.limit)
        calls = "1 call" if full.limit == 1 else f"{full.limit} calls"
        text = f"{calls} may run at the same time, and none ended within {self._wait_seconds:g} s."
        return RateLimited(text, retry_after=max(1, math.ceil(self.estimate(lease))))
